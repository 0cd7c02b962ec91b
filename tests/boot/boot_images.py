# SPDX-License-Identifier: Apache-2.0
"""Small images of every format, built field by field, and guest memory to load them into."""

from __future__ import annotations

import struct

from kvmpy.memory import GuestMemory, Ram

MIB = 1 << 20


def guest_memory(*ranges: tuple[int, int]) -> GuestMemory:
    """Guest memory with RAM at (start, size) ranges, default 64 MiB at 0, without an engine."""
    memory = GuestMemory(lambda slot, gpa, size, hva, flags: None)
    for start, size in ranges or ((0, 64 * MIB),):
        memory.add(start, Ram.anonymous(size))
    return memory


def elf(
    segments: list[tuple[int, int, bytes, int]],
    *,
    bits: int = 64,
    entry: int = 0x10_0000,
    machine: int | None = None,
    note: bytes | None = None,
    flags: int = 5,
) -> bytes:
    """An ELF program; segments are (vaddr, paddr, data, memsz); a note becomes a PT_NOTE."""
    wide = bits == 64
    machine = machine if machine is not None else (62 if wide else 3)
    count = len(segments) + (note is not None)
    ehsize, phsize = (64, 56) if wide else (52, 32)
    at = ehsize + count * phsize
    headers, body = b"", b""

    def header(kind: int, vaddr: int, paddr: int, data: bytes, memsz: int, align: int) -> bytes:
        offset = at + len(body)
        if wide:
            return struct.pack("<IIQQQQQQ", kind, flags, offset, vaddr, paddr, len(data), memsz, align)
        return struct.pack("<IIIIIIII", kind, offset, vaddr, paddr, len(data), memsz, flags, align)

    for vaddr, paddr, data, memsz in segments:
        headers += header(1, vaddr, paddr, data, memsz, 0x1000)
        body += data
    if note is not None:
        headers += header(4, 0, 0, note, len(note), 4)
        body += note
    ident = b"\x7fELF" + bytes([2 if wide else 1, 1, 1]) + bytes(9)
    code = "<HHIQQQIHHHHHH" if wide else "<HHIIIIIHHHHHH"
    return (
        ident
        + struct.pack(code, 2, machine, 1, entry, ehsize, 0, 0, ehsize, phsize, count, 0, 0, 0)
        + headers
        + body
    )


def pvh_note(entry: int, size: int = 4) -> bytes:
    """The Xen note that names a PVH entry, after a note of another kind."""
    other = struct.pack("<III", 4, 3, 1) + b"GNU\0" + b"x\0\0\0"
    return other + struct.pack("<III", 4, size, 18) + b"Xen\0" + entry.to_bytes(size, "little")


def multiboot_kludge(load: int, code: bytes, *, bss: int = 0, flags: int = 0x1_0003, pad: int = 16) -> bytes:
    """A multiboot image with address fields; the header is `pad` bytes into the file, code follows it."""
    header = struct.pack("<III", 0x1BAD_B002, flags, -(0x1BAD_B002 + flags) & 0xFFFF_FFFF)
    entry = load + 32  # after the 12 bytes of header and 20 of addresses
    end = entry + len(code)
    header += struct.pack("<IIIII", load, load, end, end + bss if bss else 0, entry)
    return b"P" * pad + header + code


def bzimage(
    kernel: bytes = b"K" * 4096,
    *,
    version: int = 0x020F,
    setup_sects: int = 4,
    xloadflags: int = 3,
    loadflags: int = 1,
    cmdline_size: int = 2047,
    initrd_addr_max: int = 0x7FFF_FFFF,
    alignment: int = 0x20_0000,
    relocatable: int = 1,
    preferred: int = 0x100_0000,
    init_size: int = 0x20_0000,
    payload: tuple[int, int] = (0, 0),
    syssize: int | None = None,
) -> bytes:
    """A bzImage (boot.rst): boot sector, setup code with a version text at 0x400, the kernel."""
    setup = bytearray((setup_sects + 1) * 512)

    def put(offset: int, code: str, value: int) -> None:
        struct.pack_into("<" + code, setup, offset, value)

    put(0x1F1, "B", setup_sects)
    put(0x1F4, "I", -(-len(kernel) // 16) if syssize is None else syssize)
    put(0x1FE, "H", 0xAA55)
    put(0x200, "H", 0x6AEB)  # jmp over a header that ends at 0x26c
    setup[0x202:0x206] = b"HdrS"
    put(0x206, "H", version)
    put(0x20E, "H", 0x200)
    put(0x211, "B", loadflags)
    put(0x214, "I", 0x10_0000)
    put(0x22C, "I", initrd_addr_max)
    put(0x230, "I", alignment)
    put(0x234, "B", relocatable)
    put(0x235, "B", 21)
    put(0x236, "H", xloadflags)
    put(0x238, "I", cmdline_size)
    put(0x248, "I", payload[0])
    put(0x24C, "I", payload[1])
    put(0x258, "Q", preferred)
    put(0x260, "I", init_size)
    put(0x264, "I", 0x190)
    setup[0x400:0x40C] = b"6.1-test #1\0"
    return bytes(setup) + kernel
