# SPDX-License-Identifier: Apache-2.0
"""Multiboot 1 (GNU Multiboot Specification 0.6.96): kernels with a header in their first 8 KiB.

Not implemented: symbol tables (info flags 4 and 5), drives, APM and video modes; their flags stay clear,
which tells the kernel so. A kernel that asks for a video mode (flag 2) is started without one.
"""

from __future__ import annotations

from typing import NamedTuple

from kvmpy.arch import layout
from kvmpy.arch.entry import Entry
from kvmpy.boot.e820 import E820Entry
from kvmpy.boot.elf import MAGIC, load_segments, parse_elf
from kvmpy.boot.flat import enter_protected
from kvmpy.boot.image import Image
from kvmpy.boot.lowmem import CMDLINE_MAX, encode_cmdline, write_bios_data
from kvmpy.boot.space import Space
from kvmpy.boot.structs import Layout
from kvmpy.errors import BootError

HEADER_MAGIC = 0x1BAD_B002
BOOT_MAGIC = 0x2BAD_B002  # in EAX
SEARCH = 8192  # the header is in the first 8 KiB, on a 4-byte boundary (3.1)
LIMIT = 1 << 32

# Header flags (3.1.2): bits 0..15 must be understood, 16..31 may be ignored.
ALIGN_MODULES = 1 << 0
WANT_MEMORY = 1 << 1
WANT_VIDEO = 1 << 2
AOUT_KLUDGE = 1 << 16
UNDERSTOOD = ALIGN_MODULES | WANT_MEMORY | WANT_VIDEO

# Info flags (3.3).
INFO_MEMORY = 1 << 0
INFO_CMDLINE = 1 << 2
INFO_MODULES = 1 << 3
INFO_MMAP = 1 << 6
INFO_LOADER_NAME = 1 << 9

HEADER = Layout("multiboot header", "u32 magic; u32 flags; u32 checksum")
ADDRESSES = Layout(
    "multiboot address fields",
    "u32 header_addr; u32 load_addr; u32 load_end_addr; u32 bss_end_addr; u32 entry_addr",
)
INFO = Layout(
    "multiboot_info",
    "u32 flags; u32 mem_lower; u32 mem_upper; u32 boot_device; u32 cmdline; u32 mods_count; u32 mods_addr;"
    "u8 syms[16]; u32 mmap_length; u32 mmap_addr; u32 drives_length; u32 drives_addr; u32 config_table;"
    "u32 boot_loader_name; u32 apm_table; u32 vbe_control_info; u32 vbe_mode_info; u16 vbe_mode;"
    "u16 vbe_interface_seg; u16 vbe_interface_off; u16 vbe_interface_len",
)
MODULE = Layout("multiboot module", "u32 mod_start; u32 mod_end; u32 string; u32 reserved")
MMAP = Layout("multiboot_mmap_entry", "u32 size; u64 addr; u64 len; u32 type")

LOADER_NAME = b"kvmpy\0"


class Header(NamedTuple):
    """A multiboot header: its offset in the file and its flags."""

    offset: int
    flags: int


def find_header(data: bytes) -> Header | None:
    """The multiboot header, or None. One whose checksum is wrong is none (3.1.2)."""
    magic = HEADER_MAGIC.to_bytes(4, "little")
    at = data.find(magic, 0, SEARCH)
    while at >= 0:
        if at % 4 == 0 and at + HEADER.size <= min(len(data), SEARCH):
            header = HEADER.unpack(data, at, "multiboot header")
            if (header.magic + header.flags + header.checksum) & 0xFFFF_FFFF == 0:
                return Header(at, header.flags)
        at = data.find(magic, at + 1, SEARCH)
    return None


def load_multiboot(
    image: Image,
    space: Space,
    *,
    memory_map: list[E820Entry],
    cmdline: str | bytes | None = None,
    modules: list[tuple[Image, str]] | None = None,
) -> Entry:
    """Load a multiboot 1 kernel, ELF or by its header's addresses; EBX points to the multiboot information.

    The command line that the kernel sees starts with the image's name, as QEMU's does. Raises BootError.
    """
    header = find_header(image.data)
    if header is None:
        raise BootError(f"{image}: no multiboot header in the first {SEARCH} bytes")
    if unknown := header.flags & 0xFFFF & ~UNDERSTOOD:
        raise BootError(f"{image}: the multiboot header asks for features unknown here (flags {unknown:#x})")
    if header.flags & AOUT_KLUDGE:
        rip, end = _load_by_addresses(image, header, space)
    elif image.data.startswith(MAGIC):
        elf = parse_elf(image)
        load_segments(elf, space)
        rip, end = elf.physical_entry, elf.end
    else:
        raise BootError(
            f"{image}: a multiboot kernel must be ELF or have address fields (flag 16), and this has neither"
        )
    if rip >= LIMIT:
        raise BootError(f"{image}: entry {rip:#_x} is above 4 GiB; multiboot starts in 32-bit mode")
    info = _write_info(image, space, end, memory_map, cmdline, modules or [])
    entry = enter_protected(space, rip, {"rax": BOOT_MAGIC, "rbx": info})
    write_bios_data(space)
    return entry


def _load_by_addresses(image: Image, header: Header, space: Space) -> tuple[int, int]:
    """Load an image by the header's address fields (3.1.3). Returns its entry and its end."""
    a = ADDRESSES.unpack(image.data, header.offset + HEADER.size, str(image))
    offset = header.offset - (a.header_addr - a.load_addr)
    if a.load_addr > a.header_addr or offset < 0:
        raise BootError(
            f"{image}: multiboot load address {a.load_addr:#_x} does not fit header address "
            f"{a.header_addr:#_x} and offset {header.offset:#x}"
        )
    size = a.load_end_addr - a.load_addr if a.load_end_addr else len(image.data) - offset
    if size <= 0 or offset + size > len(image.data):
        raise BootError(
            f"{image}: the multiboot header loads bytes [{offset:#x}, {offset + size:#x}) of a file of "
            f"{len(image.data):#x}; is it truncated?"
        )
    end = max(a.load_addr + size, a.bss_end_addr)
    if not a.load_addr <= a.entry_addr < end:
        raise BootError(
            f"{image}: entry {a.entry_addr:#_x} is outside the image [{a.load_addr:#_x}, {end:#_x})"
        )
    space.claim(a.load_addr, end - a.load_addr, str(image))
    space.write(a.load_addr, memoryview(image.data)[offset : offset + size])
    space.zero(a.load_addr + size, end - a.load_addr - size)
    return a.entry_addr, end


def _write_info(
    image: Image,
    space: Space,
    kernel_end: int,
    memory_map: list[E820Entry],
    cmdline: str | bytes | None,
    modules: list[tuple[Image, str]],
) -> int:
    """Place the modules after the kernel and write the information about everything. Returns its address."""
    name = image.name.removeprefix("kernel ").encode()
    arguments = encode_cmdline(cmdline, CMDLINE_MAX - len(name) - 1)
    line = (name + b" " + arguments if arguments else name) + b"\0"
    texts = [text.encode() + b"\0" for _, text in modules]
    fixed = INFO.size + len(modules) * MODULE.size + len(memory_map) * MMAP.size
    strings = [line, LOADER_NAME, *texts]
    at = space.near(
        layout.MULTIBOOT_INFO, fixed + sum(map(len, strings)), "the multiboot information", limit=LIMIT
    )

    addresses = []
    string_at = at + fixed
    for text in strings:
        addresses.append(string_at)
        string_at += len(text)
    entries = b""
    for (module, _), text_at in zip(modules, addresses[2:], strict=True):
        start = space.lowest(len(module.data), str(module), start=kernel_end, limit=LIMIT)
        space.write(start, module.data)
        entries += MODULE.pack(mod_start=start, mod_end=start + len(module.data), string=text_at)
    # `size` does not count itself (3.3).
    table = b"".join(MMAP.pack(size=MMAP.size - 4, addr=e.start, len=e.size, type=e.type) for e in memory_map)
    info = INFO.pack(
        flags=INFO_MEMORY | INFO_CMDLINE | INFO_MMAP | INFO_LOADER_NAME | (INFO_MODULES if modules else 0),
        mem_lower=_ram_from(memory_map, 0) >> 10,
        mem_upper=min(_ram_from(memory_map, layout.KERNEL) >> 10, 0xFFFF_FFFF),
        cmdline=addresses[0],
        mods_count=len(modules),
        mods_addr=at + INFO.size if modules else 0,
        mmap_length=len(table),
        mmap_addr=at + INFO.size + len(entries),
        boot_loader_name=addresses[1],
    )
    space.write(at, info + entries + table + b"".join(strings))
    return at


def _ram_from(memory_map: list[E820Entry], start: int) -> int:
    """How many bytes of RAM follow `start` without a hole."""
    return next(
        (e.start + e.size - start for e in memory_map if e.type == 1 and e.start <= start < e.start + e.size),
        0,
    )
