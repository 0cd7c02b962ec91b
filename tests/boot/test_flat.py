# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
import struct
from pathlib import Path

import pytest
from boot_images import MIB, elf, guest_memory

from kvmpy.arch import layout
from kvmpy.boot import load
from kvmpy.errors import BootError

HLT = b"\xf4"


def test_real_mode_image_starts_at_segment_zero_below_64k() -> None:
    memory = guest_memory()
    entry = load(b"\x90" + HLT, memory, load_address=0x7C00)
    assert memory.read(0x7C00, 2) == b"\x90\xf4"
    assert (entry.mode, entry.rip, entry.segments["cs"].selector, entry.format) == ("real", 0x7C00, 0, "flat")
    assert entry.segments["ds"].base == 0
    assert entry.registers == {"rsp": layout.BOOT_STACK}


def test_real_mode_image_above_64k_gets_its_own_segment() -> None:
    entry = load(bytes(0x200), guest_memory(), load_address=0x2_0000, entry=0x2_0100)
    assert (entry.segments["cs"].selector, entry.segments["cs"].base, entry.rip) == (0x2000, 0x2_0000, 0x100)


def test_protected_mode_is_the_default_above_one_mib() -> None:
    memory = guest_memory()
    entry = load(HLT, memory, load_address=0x10_0000)
    assert (entry.mode, entry.rip, entry.cr0 & 0x8000_0001) == ("protected", 0x10_0000, 1)
    gdt, limit = entry.gdt
    assert (gdt, limit) == (layout.GDT, 31)
    assert memory.u64(gdt + 8) == 0x00CF_9B00_0000_FFFF
    assert memory.u64(gdt + 16) == 0x00CF_9300_0000_FFFF


def test_long_mode_image_has_page_tables_and_gdt_in_guest_memory() -> None:
    memory = guest_memory()
    entry = load(HLT, memory, load_address=0x20_0000, mode="long")
    assert (entry.cr3, entry.efer, entry.cr4) == (layout.PAGE_TABLES, 0x500, 0x20)
    assert memory.u64(entry.cr3) == layout.PAGE_TABLES + 0x1007
    assert memory.u64(entry.cr3 + 0x2000 + 8) == 0x20_0087
    assert memory.u64(entry.gdt[0] + 8) == 0x00AF_9B00_0000_FFFF


def test_tables_give_way_to_an_image_that_lies_where_they_usually_are() -> None:
    memory = guest_memory()
    image = b"\x90" * 0x10_000
    entry = load(image, memory, load_address=0, mode="long")
    assert memory.read(0, len(image)) == image
    assert entry.cr3 >= len(image)
    assert entry.gdt[0] >= len(image)


def test_nothing_is_placed_where_firmware_tables_lie() -> None:
    memory = guest_memory((0, MIB))
    with pytest.raises(BootError, match="the page tables: 0x6000 bytes do not fit"):
        load(b"\x90" * 0x9_E000, memory, load_address=0x1000, mode="long")


def test_image_over_the_acpi_tables_is_refused() -> None:
    with pytest.raises(BootError, match=r"overlaps the ACPI tables \[0xe_0000, 0x10_0000\)"):
        load(HLT * 0x100, guest_memory(), load_address=0xE_FFF0, rsdp=layout.ACPI_TABLES)
    load(HLT * 0x100, guest_memory(), load_address=0xE_FFF0)


def test_image_may_be_a_path_or_an_open_file(tmp_path: Path) -> None:
    path = tmp_path / "code.bin"
    path.write_bytes(HLT)
    for source in (path, str(path), io.BytesIO(HLT), bytearray(HLT), memoryview(HLT)):
        memory = guest_memory()
        load(source, memory, load_address=0x1000)
        assert memory.read(0x1000, 1) == HLT


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"load_address": 64 * MIB - 1},
            ["[0x3ff_ffff, 0x400_0001)", "not in guest RAM", "[0x0, 0x400_0000)"],
        ),
        ({"load_address": -1}, ["-0x1"]),
        ({"load_address": 0x1000, "entry": 0x1002}, ["0x1002", "outside the image", "[0x1000, 0x1002)"]),
        ({"load_address": 0x10_0000, "mode": "real"}, ["0x10_0000", "real mode"]),
    ],
)
def test_flat_image_that_cannot_start_says_the_numbers(arguments: dict[str, int], words: list[str]) -> None:
    with pytest.raises(BootError) as caught:
        load(b"\x90\xf4", guest_memory(), **arguments)
    assert all(word in str(caught.value) for word in words)


def test_flat_entry_more_than_64k_up_is_out_of_reach_of_its_segment() -> None:
    with pytest.raises(BootError, match="more than 64 KiB"):
        load(bytes(0x2_0000), guest_memory(), load_address=0x1_0000, entry=0x2_8000)


def test_flat_image_takes_no_command_line() -> None:
    with pytest.raises(BootError, match="cannot be given cmdline and initrd"):
        load(HLT, guest_memory(), load_address=0x1000, cmdline="x", initrd=b"y")


@pytest.mark.parametrize(
    "arguments",
    [
        {"format": "qcow2"},
        {"format": "flat"},
        {"load_address": 0, "mode": "virtual"},
        {"format": "ELF", "entry": 1},
    ],
)
def test_arguments_that_do_not_go_together_are_value_errors(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError) as caught:
        load(HLT, guest_memory(), **arguments)
    assert not isinstance(caught.value, BootError)


def test_nothing_is_written_when_something_does_not_fit() -> None:
    memory = guest_memory((0, 0x6000))
    with pytest.raises(BootError, match="page tables"):
        load(b"\x90" * 0x1000, memory, load_address=0x1000, mode="long")
    assert memory.read(0, 0x6000) == bytes(0x6000)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (bytes(64), "64 zero bytes"),
        (b"\x1f\x8b\x08" + bytes(100), "gzip data; decompress=True unpacks it"),
        (b"\xfd7zXZ\0" + bytes(100), "xz data"),
        (b"070701" + bytes(100), "cpio"),
        (b"QFI\xfb" + bytes(100), "qcow2"),
        (b"#!/bin/sh\n", "a script"),
        (b"hello world\n", "text starting with 'hello world'"),
        (b"MZ" + bytes(400), "PE/EFI"),
        (bytes(56) + b"ARM\x64", "Linux Image for aarch64"),
        (b"\xfa" + bytes(509) + b"\x55\xaa", "boot sector"),
        (b"\x01\x02\xff", "3 bytes starting with 01 02 ff"),
    ],
)
def test_what_is_no_kernel_is_named(data: bytes, words: str) -> None:
    with pytest.raises(BootError) as caught:
        load(data, guest_memory())
    assert words in str(caught.value)
    assert "not a kernel" in str(caught.value)


def test_elf_for_another_machine_is_named() -> None:
    with pytest.raises(BootError, match="a 64-bit ELF program for aarch64"):
        load(elf([(0x10_0000, 0x10_0000, HLT, 1)], machine=183), guest_memory())


def test_missing_empty_and_odd_files_are_boot_errors(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for path, words in (("nowhere", "No such file"), ("empty", "empty"), (".", "directory")):
        with pytest.raises(BootError, match=words):
            load(tmp_path / path, guest_memory())
    with pytest.raises(BootError, match="character device"):
        load("/dev/zero", guest_memory())


def test_firmware_ends_at_4_gib_and_is_shadowed_below_1_mib() -> None:
    memory = guest_memory((0, 2 * MIB))
    rom = (
        struct.pack("<I", 0x1234)
        + bytes(256 * 1024 - 20)
        + b"\xea\x5b\xe0\x00\xf0"
        + b"01/01/99"
        + b"\0\xfc\0"
    )
    entry = load(rom, memory, format="firmware")
    assert memory.read((1 << 32) - len(rom), len(rom)) == rom
    assert memory.read(0xE_0000, 0x2_0000) == rom[-0x2_0000:]
    assert memory.regions[-1].readonly
    assert (entry.mode, entry.segments["cs"].base + entry.rip) == ("reset", 0xFFFF_FFF0)


def test_small_firmware_is_filled_up_in_front() -> None:
    memory = guest_memory((0, MIB))
    load(HLT * 16, memory, format="firmware")
    assert memory.read(0xFFFF_F000, 0x1000) == b"\xff" * 0xFF0 + HLT * 16
    assert memory.read(0xF_FFF0, 16) == HLT * 16


@pytest.mark.parametrize(("size", "words"), [(15, "reset vector"), ((16 << 20) + 1, "at most 0x1000000")])
def test_firmware_of_a_wrong_size_is_refused(size: int, words: str) -> None:
    memory = guest_memory()
    with pytest.raises(BootError, match=words):
        load(b"\x90" * size, memory, format="firmware")
    assert len(memory.regions) == 1
