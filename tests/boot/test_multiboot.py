# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import struct
from pathlib import Path

import pytest
from boot_images import MIB, elf, guest_memory, multiboot_kludge

from kvmpy.arch import layout
from kvmpy.boot import load
from kvmpy.boot.multiboot import find_header
from kvmpy.errors import BootError

CODE = b"\x90" * 15 + b"\xf4"
HEADER = struct.pack("<III", 0x1BAD_B002, 0, -0x1BAD_B002 & 0xFFFF_FFFF)


def info_of(memory, entry) -> dict[str, int]:
    at = entry.registers["rbx"]
    names = (
        "flags mem_lower mem_upper boot_device cmdline mods_count mods_addr s0 s1 s2 s3 mmap_length mmap_addr"
    )
    values = struct.unpack("<13I", memory.read(at, 52))
    return dict(zip(names.split(), values, strict=True)) | {"boot_loader_name": memory.u32(at + 64)}


def test_elf32_kernel_starts_as_the_specification_says(tmp_path: Path) -> None:
    kernel = tmp_path / "test.flat"
    kernel.write_bytes(elf([(0x40_0000, 0x40_0000, HEADER + CODE, 0x3000)], bits=32, entry=0x40_000C))
    memory = guest_memory()
    entry = load(kernel, memory, cmdline="one two", modules=[(b"first", "env x"), b"second"])
    assert (entry.format, entry.mode, entry.rip) == ("multiboot", "protected", 0x40_000C)
    assert entry.registers["rax"] == 0x2BAD_B002
    assert entry.rflags == 2
    info = info_of(memory, entry)
    assert info["flags"] == 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9
    assert (info["mem_lower"], info["mem_upper"]) == (639, 63 * 1024)
    line = f"{kernel} one two".encode() + b"\0"
    assert memory.read(info["cmdline"], len(line)) == line
    assert memory.read(info["boot_loader_name"], 6) == b"kvmpy\0"
    assert info["mods_count"] == 2
    modules = [struct.unpack("<IIII", memory.read(info["mods_addr"] + 16 * i, 16)) for i in range(2)]
    assert modules[0][0] == 0x40_3000
    assert [memory.read(start, end - start) for start, end, _, _ in modules] == [b"first", b"second"]
    assert [start % 4096 for start, _, _, _ in modules] == [0, 0]
    assert memory.read(modules[0][2], 6) == b"env x\0"
    assert memory.read(modules[1][2], 1) == b"\0"


def test_initrd_is_the_first_module() -> None:
    memory = guest_memory()
    entry = load(elf([(0, 0x10_0000, HEADER + CODE, 28)], bits=32), memory, initrd=b"env", modules=[b"more"])
    info = info_of(memory, entry)
    assert info["mods_count"] == 2
    start, end = memory.u32(info["mods_addr"]), memory.u32(info["mods_addr"] + 4)
    assert memory.read(start, end - start) == b"env"


def test_memory_map_entries_do_not_count_their_size_field() -> None:
    memory = guest_memory((0, 16 * MIB))
    info = info_of(memory, load(elf([(0, 0x10_0000, HEADER + CODE, 28)], bits=32), memory))
    assert info["mmap_length"] == 4 * 24
    entries = [struct.unpack("<IQQI", memory.read(info["mmap_addr"] + 24 * i, 24)) for i in range(4)]
    assert entries[0] == (20, 0, layout.EBDA, 1)
    assert entries[3] == (20, MIB, 15 * MIB, 1)


def test_address_fields_load_any_file_format() -> None:
    memory = guest_memory()
    memory.fill(0x10_0000, 0x1000, 0xAA)
    entry = load(multiboot_kludge(0x10_0000, CODE, bss=100), memory)
    assert entry.rip == 0x10_0020
    assert memory.read(0x10_0020, 16 + 101) == CODE + bytes(100) + b"\xaa"


def test_address_fields_win_over_elf_headers() -> None:
    kludge = multiboot_kludge(0x20_0000, CODE, pad=0)
    image = elf([(0x10_0000, 0x10_0000, kludge, len(kludge))], bits=32)
    offset = image.index(kludge)
    memory = guest_memory()
    entry = load(image, memory)
    assert entry.rip == 0x20_0020
    assert find_header(image).offset == offset
    assert memory.read(0x20_0020, 16) == CODE


def test_header_must_be_aligned_and_in_the_first_8_kib_and_add_up() -> None:
    assert find_header(b"\0" * 8180 + HEADER).offset == 8180
    assert find_header(b"\0" * 8184 + HEADER) is None
    assert find_header(b"\0" * 2 + HEADER) is None
    assert find_header(HEADER[:8] + b"\0\0\0\0") is None
    assert find_header(HEADER[:4] * 4 + HEADER).offset == 16


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (multiboot_kludge(0x10_0000, CODE, flags=0x1_0008), "features unknown here (flags 0x8)"),
        (multiboot_kludge(0x10_0000, CODE)[:-1], "truncated"),
        (multiboot_kludge(64 * MIB, CODE), "not in guest RAM"),
        (HEADER + CODE, "must be ELF or have address fields"),
        (elf([(0, 0x10_0000, HEADER + CODE, 28)], bits=32, entry=0x50_0000), "in no loaded segment"),
    ],
)
def test_a_broken_multiboot_kernel_is_a_boot_error(image: bytes, words: str) -> None:
    with pytest.raises(BootError) as caught:
        load(image, guest_memory())
    assert words in str(caught.value)


def test_address_fields_before_the_file_are_refused() -> None:
    image = bytearray(multiboot_kludge(0x10_0000, CODE, pad=0))
    struct.pack_into("<I", image, 12, 0x10_0010)  # header_addr: the load address would be before the file
    with pytest.raises(BootError, match="does not fit header address"):
        load(bytes(image), guest_memory())


def test_module_that_does_not_fit_says_where() -> None:
    image = elf([(0, 0x10_0000, HEADER + CODE, 0x1000)], bits=32)
    with pytest.raises(BootError) as caught:
        load(image, guest_memory((0, 4 * MIB)), modules=[bytes(3 * MIB)])
    assert "module 0: 0x300000 bytes do not fit from 0x10_1000" in str(caught.value)
    assert "[0x0, 0x40_0000)" in str(caught.value)


def test_command_line_too_long_for_its_place_is_refused() -> None:
    image = elf([(0, 0x10_0000, HEADER + CODE, 28)], bits=32)
    with pytest.raises(BootError, match="70000 bytes"):
        load(image, guest_memory(), cmdline="x" * 70000)
