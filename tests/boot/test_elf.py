# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import struct

import pytest
from boot_images import MIB, elf, guest_memory, pvh_note

from kvmpy.arch import layout
from kvmpy.boot import load
from kvmpy.errors import BootError

CODE = b"\x90" * 15 + b"\xf4"


@pytest.mark.parametrize(("bits", "mode"), [(32, "protected"), (64, "long")])
def test_segments_go_to_physical_addresses_and_bss_is_zeroed(bits: int, mode: str) -> None:
    memory = guest_memory()
    memory.fill(0x20_0000, 0x4000, 0xAA)
    image = elf(
        [(0xC020_0000, 0x20_0000, CODE, 0x2000), (0xC030_0000, 0x30_0000, b"data", 4)],
        bits=bits,
        entry=0xC020_0004,
    )
    entry = load(image, memory)
    assert memory.read(0x20_0000, 0x2000) == CODE + bytes(0x2000 - 16)
    assert memory.u8(0x20_2000) == 0xAA
    assert memory.read(0x30_0000, 4) == b"data"
    assert (entry.mode, entry.rip, entry.format) == (mode, 0x20_0004, "ELF")


def test_physical_entry_is_taken_as_it_is() -> None:
    entry = load(elf([(0xFFFF_FFFF_8100_0000, 0x100_0000, CODE, 16)], entry=0x100_0000), guest_memory())
    assert entry.rip == 0x100_0000


def test_linux_vmlinux_starts_with_a_zero_page() -> None:
    memory = guest_memory()
    banner = b"Linux version %s\0Linux version 6.1.0-test (x) #1\n\0"
    image = elf([(0xFFFF_FFFF_8100_0000, 0x100_0000, CODE + banner, 0x1000)], entry=0x100_0000)
    entry = load(image, memory, cmdline="quiet", initrd=b"ramdisk")
    assert (entry.format, entry.mode, entry.rip) == ("vmlinux", "long", 0x100_0000)
    assert entry.detail == "6.1.0-test (x) #1"
    zero = entry.registers["rsi"]
    assert memory.read(zero + 0x202, 4) == b"HdrS"
    assert memory.read(memory.u32(zero + 0x228), 6) == b"quiet\0"
    assert memory.read(memory.u32(zero + 0x218), memory.u32(zero + 0x21C)) == b"ramdisk"


@pytest.mark.parametrize("size", [4, 8])
def test_pvh_note_gives_entry_and_start_info(size: int) -> None:
    memory = guest_memory((0, 64 * MIB), (1 << 32, MIB))
    image = elf([(0x10_0000, 0x10_0000, CODE, 16)], note=pvh_note(0x10_0008, size))
    entry = load(
        image, memory, cmdline="a b", initrd=b"I" * 5000, modules=[(b"mod", "second")], rsdp=0xE_0000
    )
    assert (entry.format, entry.mode, entry.rip) == ("PVH", "protected", 0x10_0008)
    info = entry.registers["rbx"]
    magic, version, flags, modules, modlist, cmdline, rsdp, memmap, count, reserved = struct.unpack(
        "<IIIIQQQQII", memory.read(info, 56)
    )
    assert (magic, version, flags, modules, rsdp, reserved) == (0x336E_C578, 1, 0, 2, 0xE_0000, 0)
    assert memory.read(cmdline, 4) == b"a b\0"
    first, second = (struct.unpack("<QQQQ", memory.read(modlist + 32 * i, 32)) for i in range(2))
    assert memory.read(first[0], first[1]) == b"I" * 5000
    assert first[0] % 4096 == 0
    assert (memory.read(second[0], second[1]), memory.read(second[2], 7)) == (b"mod", b"second\0")
    entries = [struct.unpack("<QQII", memory.read(memmap + 24 * i, 24)) for i in range(count)]
    assert entries == [
        (0, layout.EBDA, 1, 0),
        (layout.EBDA, 0x400, 2, 0),
        (0xE_0000, 0x2_0000, 2, 0),
        (0x10_0000, 63 * MIB, 1, 0),
        (1 << 32, MIB, 1, 0),
    ]


def test_bios_data_area_names_the_ebda() -> None:
    memory = guest_memory()
    load(elf([(0x10_0000, 0x10_0000, CODE, 16)], note=pvh_note(0x10_0000)), memory)
    assert memory.u16(0x40E) << 4 == layout.EBDA
    assert memory.u16(0x413) == 639


def test_pvh_entry_outside_the_image_is_refused() -> None:
    image = elf([(0x10_0000, 0x10_0000, CODE, 16)], note=pvh_note(0x10_0010))
    with pytest.raises(BootError, match="PVH entry 0x10_0010"):
        load(image, guest_memory())


def patched(offset: int, code: str, value: int, **more: int) -> bytes:
    image = bytearray(elf([(0x10_0000, 0x10_0000, CODE, 16)], **more))
    struct.pack_into("<" + code, image, offset, value)
    return bytes(image)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (elf([(0, 0x10_0000, CODE, 15)]), "0x10 bytes in the file but only 0xf in memory"),
        (elf([(0, 0x10_0000, CODE, 16)])[:-1], "truncated"),
        (elf([(0, 0x10_0000, CODE, 16), (0, 0x10_0008, CODE, 16)]), "overlaps"),
        (elf([(0, 64 * MIB - 8, CODE, 16)]), "not in guest RAM"),
        (elf([(0, 0x10_0000, CODE, 1 << 40)]), "not in guest RAM"),
        (elf([(0, (1 << 64) - 8, CODE, 16)]), "not in guest RAM"),
        (elf([(0, 0x10_0000, CODE, 16)], entry=0x20_0000), "ELF entry 0x20_0000 is in no loaded segment"),
        (elf([]), "0 program headers"),
        (elf([(0, 0, b"", 0)]), "without anything to load"),
        (b"\x7fELF", "not an ELF file"),
        (patched(4, "B", 3), "class 3"),
        (patched(5, "B", 2), "byte order 2"),
        (patched(16, "H", 4), "core dump"),
        (patched(0x36, "H", 55), "program headers of 55 bytes"),
        (patched(0x38, "H", 0xFFFF), "65535 program headers"),
        (patched(0x20, "Q", 1 << 63), "goes past the file's"),
        (patched(0x40, "I", 3), "dynamically linked"),
    ],
)
def test_a_broken_elf_is_a_boot_error_with_the_reason(image: bytes, words: str) -> None:
    with pytest.raises(BootError) as caught:
        load(image, guest_memory(), format="ELF")
    assert words in str(caught.value)


def test_plain_elf_takes_no_initrd() -> None:
    with pytest.raises(BootError, match="plain ELF program cannot be given initrd"):
        load(elf([(0, 0x10_0000, CODE, 16)]), guest_memory(), initrd=b"x")


def test_notes_of_any_size_are_skipped_in_bounded_time() -> None:
    flood = struct.pack("<III", 0, 0, 0) * 200_000
    with pytest.raises(BootError, match="no PVH entry"):
        load(elf([(0, 0x10_0000, CODE, 16)], note=flood), guest_memory(), format="PVH")
