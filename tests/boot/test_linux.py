# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import bz2
import gzip
import lzma
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from boot_images import MIB, bzimage, elf, guest_memory

from kvmpy.arch import layout
from kvmpy.boot import decompress, linux, load
from kvmpy.boot.image import Image
from kvmpy.errors import BootError

KERNEL = bytes(range(256)) * 64
ZERO = layout.ZERO_PAGE


def test_bzimage_starts_by_the_64_bit_protocol() -> None:
    memory = guest_memory()
    entry = load(bzimage(KERNEL), memory, cmdline="console=ttyS0", rsdp=0xE_0010)
    assert (entry.format, entry.mode, entry.rip) == ("bzImage", "long", 0x100_0200)
    assert entry.registers == {"rsi": ZERO}
    assert entry.segments["cs"].selector == 0x10
    assert {entry.segments[name].selector for name in ("ds", "es", "ss")} == {0x18}
    assert memory.u64(entry.gdt[0] + 0x10) == 0x00AF_9B00_0000_FFFF
    assert memory.u64(entry.gdt[0] + 0x18) == 0x00CF_9300_0000_FFFF
    assert entry.detail == "6.1-test #1"
    assert memory.read(0x100_0000, len(KERNEL)) == KERNEL


def test_zero_page_byte_by_byte() -> None:
    memory = guest_memory((0, 64 * MIB), (1 << 32, 32 * MIB))
    image = bzimage(KERNEL)
    load(image, memory, cmdline="console=ttyS0", initrd=b"R" * 5000, rsdp=0xE_0010)
    expected = bytearray(4096)
    expected[0x1F1:0x26C] = image[0x1F1:0x26C]
    struct.pack_into("<Q", expected, 0x070, 0xE_0010)
    struct.pack_into("<H", expected, 0x1FA, 0xFFFF)
    expected[0x210] = 0xFF
    struct.pack_into("<I", expected, 0x214, 0x100_0000)
    struct.pack_into("<II", expected, 0x218, 64 * MIB - 0x2000, 5000)
    struct.pack_into("<I", expected, 0x228, layout.CMDLINE)
    ranges = [
        (0, layout.EBDA, 1),
        (layout.EBDA, 0x400, 2),
        (0xE_0000, 0x2_0000, 2),
        (0x10_0000, 63 * MIB, 1),
        (1 << 32, 32 * MIB, 1),
    ]
    expected[0x1E8] = len(ranges)
    for i, entry in enumerate(ranges):
        struct.pack_into("<QQI", expected, 0x2D0 + 20 * i, *entry)
    assert memory.read(ZERO, 4096) == expected
    assert memory.read(layout.CMDLINE, 14) == b"console=ttyS0\0"
    assert memory.read(64 * MIB - 0x2000, 5000) == b"R" * 5000


def test_reserved_ranges_are_in_the_map() -> None:
    memory = guest_memory()
    load(bzimage(), memory, reserved=[(layout.PCI_ECAM, 256 * MIB), (32 * MIB, MIB)])
    entries = [
        struct.unpack("<QQI", memory.read(ZERO + 0x2D0 + 20 * i, 20)) for i in range(memory.u8(ZERO + 0x1E8))
    ]
    assert (layout.PCI_ECAM, 256 * MIB, 2) in entries
    assert entries[3:6] == [(MIB, 31 * MIB, 1), (32 * MIB, MIB, 2), (33 * MIB, 31 * MIB, 1)]


def test_32_bit_kernel_starts_in_protected_mode() -> None:
    memory = guest_memory()
    entry = load(bzimage(KERNEL, xloadflags=0), memory)
    assert (entry.mode, entry.rip, entry.registers) == ("protected", 0x100_0000, {"rsi": ZERO})
    assert (entry.segments["cs"].selector, entry.segments["ss"].selector) == (0x10, 0x18)
    assert memory.u64(entry.gdt[0] + 0x10) == 0x00CF_9B00_0000_FFFF


def test_old_kernel_without_init_size_goes_to_one_mib() -> None:
    memory = guest_memory((0, 8 * MIB))
    entry = load(bzimage(KERNEL, version=0x206, relocatable=0), memory)
    assert entry.rip == 0x10_0000


def test_relocatable_kernel_moves_up_when_its_place_is_taken() -> None:
    memory = guest_memory((0, 16 * MIB + 0x1000), (17 * MIB, 47 * MIB))
    entry = load(bzimage(KERNEL), memory)
    assert entry.rip == 18 * MIB + 0x200
    with pytest.raises(BootError, match=r"\[0x100_0000, 0x120_0000\) is not in guest RAM"):
        load(bzimage(KERNEL, relocatable=0), memory)


def test_kernel_that_does_not_fit_says_how_much_it_needs() -> None:
    with pytest.raises(BootError) as caught:
        load(bzimage(init_size=50 * MIB), guest_memory())
    assert "kernel: 0x3200000 bytes do not fit from 0x100_0000" in str(caught.value)
    assert "[0x0, 0x400_0000)" in str(caught.value)


def test_initrd_stays_below_initrd_addr_max() -> None:
    memory = guest_memory()
    load(bzimage(initrd_addr_max=40 * MIB - 1), memory, initrd=b"R" * 4097)
    assert memory.u32(ZERO + 0x218) == 40 * MIB - 0x2000


def test_initrd_keeps_off_the_kernel() -> None:
    memory = guest_memory((0, 20 * MIB))
    load(bzimage(init_size=4 * MIB), memory, initrd=bytes(3 * MIB))
    start = memory.u32(ZERO + 0x218)
    assert start + 3 * MIB <= 16 * MIB
    assert start >= MIB


def test_initrd_goes_above_4_gib_when_the_kernel_can_and_low_ram_is_short() -> None:
    memory = guest_memory((0, 24 * MIB), (1 << 32, 64 * MIB))
    load(bzimage(), memory, initrd=b"R" * (32 * MIB))
    high, low = memory.u32(ZERO + 0x0C0), memory.u32(ZERO + 0x218)
    assert high << 32 | low == (1 << 32) + 32 * MIB
    assert memory.read((1 << 32) + 64 * MIB - 4, 4) == b"RRRR"
    with pytest.raises(BootError):
        load(
            bzimage(xloadflags=1), guest_memory((0, 24 * MIB), (1 << 32, 64 * MIB)), initrd=b"R" * (32 * MIB)
        )


def test_initrd_that_does_not_fit_says_size_and_limit() -> None:
    with pytest.raises(BootError) as caught:
        load(bzimage(xloadflags=1, initrd_addr_max=32 * MIB - 1), guest_memory(), initrd=bytes(17 * MIB))
    text = str(caught.value)
    assert "initrd: 0x1100000 bytes do not fit from 0x10_0000 below 0x200_0000" in text
    assert "[0x0, 0x400_0000)" in text


def test_initrd_larger_than_ram_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "initrd"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(BootError, match=r"0x10000000000 bytes, more than the 0x4000000"):
        load(bzimage(), guest_memory(), initrd=path)


def test_command_line_length_is_the_kernels_limit() -> None:
    memory = guest_memory()
    load(bzimage(cmdline_size=20), memory, cmdline="x" * 20)
    assert memory.read(layout.CMDLINE, 21) == b"x" * 20 + b"\0"
    with pytest.raises(BootError, match="has 21 bytes; this kernel takes at most 20"):
        load(bzimage(cmdline_size=20), guest_memory(), cmdline="x" * 21)
    with pytest.raises(BootError, match="NUL character at byte 1"):
        load(bzimage(), guest_memory(), cmdline="a\0b")


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (bzimage(version=0x205), "boot protocol 2.05"),
        (bzimage(loadflags=0), "zImage"),
        (bzimage(KERNEL)[:-16], "truncated"),
        (bzimage(syssize=0), "truncated"),
        (bzimage(alignment=0), "kernel_alignment 0x0"),
        (bzimage(alignment=0x300000), "kernel_alignment 0x300000"),
        (bzimage(preferred=1 << 32), "above 4 GiB"),
        (bzimage(preferred=(1 << 64) - 1), "above 4 GiB"),
        (bzimage(init_size=0xFFFF_FFFF), "above 4 GiB"),
        (bzimage()[:0x206], "boot protocol 0.00"),
    ],
)
def test_a_broken_bzimage_is_a_boot_error_with_the_reason(image: bytes, words: str) -> None:
    with pytest.raises(BootError) as caught:
        load(image, guest_memory())
    assert words in str(caught.value)


def test_linux_takes_no_modules() -> None:
    with pytest.raises(BootError, match="one initrd, not modules"):
        load(bzimage(), guest_memory(), modules=[b"x"])


VMLINUX = elf([(0xFFFF_FFFF_8100_0000, 0x100_0000, KERNEL, 0x10_0000)], entry=0x100_0040)


def lz4_legacy(data: bytes) -> bytes:
    """A legacy frame of one block that holds the data as literals (LZ4 block format)."""
    length, extra = len(data) - 15, b""
    while length >= 255:
        extra, length = extra + b"\xff", length - 255
    block = b"\xf0" + extra + bytes([length]) + data
    return b"\x02\x21\x4c\x18" + struct.pack("<I", len(block)) + block


def zstd(data: bytes) -> bytes:
    if shutil.which("zstd") is None:
        pytest.skip("needs the zstd command")
    return subprocess.run(["zstd", "-qc"], input=data, capture_output=True, check=True, timeout=30).stdout


PACKERS = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    "lz4": lz4_legacy,
    "zstd": zstd,
}


def packed_kernel(payload: bytes, size: int | None = None) -> bytes:
    body = b"boot" * 64 + payload + struct.pack("<I", len(VMLINUX) if size is None else size)
    return bzimage(body, payload=(256, len(payload) + 4))


@pytest.mark.parametrize("name", PACKERS)
def test_vmlinux_inside_a_bzimage_is_unpacked_and_started(name: str) -> None:
    memory = guest_memory()
    entry = load(packed_kernel(PACKERS[name](VMLINUX)), memory, decompress=True, cmdline="x")
    assert (entry.mode, entry.rip) == ("long", 0x100_0040)
    assert memory.read(0x100_0000, len(KERNEL)) == KERNEL
    assert memory.read(ZERO + 0x202, 4) == b"HdrS"
    assert memory.u16(ZERO + 0x206) == 0x20F


@pytest.mark.parametrize("name", PACKERS)
def test_damaged_payload_is_a_boot_error(name: str) -> None:
    good = PACKERS[name](VMLINUX)
    with pytest.raises(BootError):
        load(packed_kernel(good[: len(good) // 2]), guest_memory(), decompress=True)


@pytest.mark.parametrize("name", PACKERS)
def test_payload_larger_than_promised_is_a_boot_error(name: str) -> None:
    with pytest.raises(BootError, match="more than the 0x800 bytes"):
        load(packed_kernel(PACKERS[name](VMLINUX), size=0x800), guest_memory(), decompress=True)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (bzimage(), "names no payload"),
        (bzimage(KERNEL, payload=(0x4000, 100)), "outside the kernel"),
        (bzimage(KERNEL, payload=(0xFFFF_FFFF, 0xFFFF_FFFF)), "outside the kernel"),
        (packed_kernel(KERNEL), "unknown here; it starts with 00 01 02 03 04 05"),
        (packed_kernel(gzip.compress(VMLINUX), size=0xFFFF_FFFF), "claims to hold 0xffffffff"),
    ],
)
def test_payload_that_cannot_be_unpacked_is_a_boot_error(image: bytes, words: str) -> None:
    with pytest.raises(BootError) as caught:
        load(image, guest_memory(), decompress=True)
    assert words in str(caught.value)


def test_whole_image_may_be_packed() -> None:
    memory = guest_memory()
    entry = load(gzip.compress(elf([(0, 0x10_0000, b"\xf4", 1)])), memory, decompress=True)
    assert (entry.format, entry.rip) == ("ELF", 0x10_0000)


def test_packed_image_that_ends_early_is_a_boot_error() -> None:
    for name, pack in PACKERS.items():
        with pytest.raises(BootError, match=f"damaged {name} data"):
            decompress.unpack(Image("kernel", pack(VMLINUX)[:-5]))


def test_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from cffi import FFI

    def no_library(self: FFI, name: str) -> None:
        raise OSError("not found")

    decompress._library.cache_clear()
    monkeypatch.setattr(FFI, "dlopen", no_library)
    with pytest.raises(BootError, match="packed with lz4: install liblz4"):
        load(packed_kernel(lz4_legacy(VMLINUX)), guest_memory(), decompress=True)


def test_structures_agree_with_the_kernels_header(tmp_path: Path) -> None:
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    fields = [name for name in linux.SETUP_HEADER.offsets if name != "kernel_info_offset"]
    params = {
        "acpi_rsdp_addr": linux.ACPI_RSDP_ADDR,
        "ext_ramdisk_image": linux.EXT_RAMDISK_IMAGE,
        "ext_ramdisk_size": linux.EXT_RAMDISK_SIZE,
        "ext_cmd_line_ptr": linux.EXT_CMD_LINE_PTR,
        "e820_entries": linux.E820_ENTRIES,
        "e820_table": linux.E820_TABLE,
        "hdr": linux.HEADER_AT,
    }
    lines = [f'printf("%zu\\n", offsetof(struct setup_header, {name}));' for name in fields]
    lines += [f'printf("%zu\\n", offsetof(struct boot_params, {name}));' for name in params]
    source = "#include <stddef.h>\n#include <stdio.h>\n#include <asm/bootparam.h>\n"
    (tmp_path / "t.c").write_text(source + "int main(void) {" + "\n".join(lines) + "return 0; }")
    subprocess.run(["cc", "-o", tmp_path / "t", tmp_path / "t.c"], check=True, timeout=60)
    out = subprocess.run([tmp_path / "t"], capture_output=True, check=True, timeout=60).stdout.split()
    expected = [linux.SETUP_HEADER.offsets[name] for name in fields] + list(params.values())
    assert [int(value) for value in out] == expected


def test_memtest_is_a_bzimage() -> None:
    path = Path("/boot/memtest86+x64.bin")
    if not path.exists():
        pytest.skip("Debian's memtest86+ is not installed")
    entry = load(path, guest_memory(), cmdline="console=ttyS0,115200")
    assert (entry.format, entry.mode, entry.rip) == ("bzImage", "long", 0x10_0200)
    assert entry.detail.startswith("Memtest86+")
