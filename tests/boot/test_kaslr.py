# SPDX-License-Identifier: Apache-2.0
"""Kernels that the host moves to a random virtual address."""

from __future__ import annotations

import gzip
import random
import struct

import pytest
from boot_images import MIB, bzimage, elf, guest_memory

from kvmpy.arch import layout
from kvmpy.boot import kaslr, linux, load
from kvmpy.boot.elf import parse_elf
from kvmpy.boot.image import Image
from kvmpy.errors import BootError

BASE = 0xFFFF_FFFF_8100_0000  # of the first segment, which goes to physical 16 MiB
PER_CPU = 0x120_0000  # the physical address of the second, which has the virtual address 0
WIDE, INVERSE, NARROW, LAST = 0x100, 0x208, 0x301, 0x1FF8
LOADFLAGS = layout.ZERO_PAGE + 0x211
STEP = 2 * MIB


def vmlinux(*tables: list[int]) -> bytes:
    """A kernel with numbers in several places, its section headers at the end, then relocation tables."""
    text = bytearray(b"Linux version 6.1\n".ljust(0x2000, b"\x90"))
    struct.pack_into("<Q", text, WIDE, BASE + 0x40)
    struct.pack_into("<i", text, INVERSE, -0x1000)
    struct.pack_into("<I", text, NARROW, 0x8100_0080)
    struct.pack_into("<Q", text, LAST, BASE)
    file = bytearray(elf([(BASE, 0x100_0000, bytes(text), 0x2000), (0, PER_CPU, bytes(64), 64)], entry=BASE))
    struct.pack_into("<Q", file, 0x28, len(file))  # e_shoff: two section headers
    struct.pack_into("<HH", file, 0x3A, 64, 2)
    file += bytes(128)
    for table in tables:
        file += struct.pack(f"<I{len(table)}I", 0, *table)
    return bytes(file)


def at(offset: int) -> int:
    return BASE + offset & 0xFFFF_FFFF


TABLES = ([at(WIDE), at(LAST)], [at(INVERSE)], [at(NARROW), 0x8120_0004])


def packed(content: bytes, **fields: int) -> bytes:
    payload = gzip.compress(content) + struct.pack("<I", len(content))
    return bzimage(payload, payload=(0, len(payload)), init_size=MIB, **fields)


def distance_of(memory: object) -> int:
    return memory.u64(0x100_0000 + WIDE) - (BASE + 0x40)  # type: ignore[attr-defined]


def check(memory: object, distance: int) -> None:
    """All numbers that hold addresses moved by `distance`, and nothing else did."""
    original = parse_elf(Image("vmlinux", vmlinux()))
    text = bytearray(original.image.data[original.segments[0].offset :][:0x2000])
    for offset, code, value in (
        (WIDE, "<Q", BASE + 0x40 + distance),
        (LAST, "<Q", BASE + distance),
        (INVERSE, "<I", (-0x1000 - distance) & 0xFFFF_FFFF),
        (NARROW, "<I", 0x8100_0080 + distance),
    ):
        struct.pack_into(code, text, offset, value)
    assert memory.read(0x100_0000, 0x2000) == text  # type: ignore[attr-defined]
    assert memory.u32(PER_CPU + 4) == distance  # type: ignore[attr-defined]


def test_every_number_moves_by_the_same_multiple_of_the_alignment() -> None:
    seen = set()
    for _ in range(12):
        memory = guest_memory()
        entry = load(packed(vmlinux(*TABLES)), memory, decompress=True)
        distance = distance_of(memory)
        assert distance % STEP == 0 and 0 <= distance < kaslr.IMAGE_SIZE - 16 * MIB
        check(memory, distance)
        assert entry.rip == 0x100_0000
        assert bool(memory.u8(LOADFLAGS) & linux.KASLR_FLAG) == (distance != 0)
        seen.add(distance)
    assert len(seen) > 3  # of some 500 places


def test_tables_of_newer_kernels_have_no_inverse_part() -> None:
    moved = parse_elf(Image("vmlinux", vmlinux(TABLES[0], TABLES[2])))
    tables = kaslr.find_relocations(moved)
    assert tables is not None and tables.inverse == (0, 0)
    assert (tables.wide[1], tables.narrow[1]) == (2, 2)
    data = kaslr.move(moved, tables, STEP).image.data
    text = moved.segments[0].offset
    assert struct.unpack_from("<Q", data, text + WIDE)[0] == BASE + 0x40 + STEP
    assert struct.unpack_from("<i", data, text + INVERSE)[0] == -0x1000


@pytest.mark.parametrize("cmdline", ["nokaslr", "quiet nokaslr panic=1"])
def test_nokaslr_leaves_the_kernel_where_it_is(cmdline: str) -> None:
    memory = guest_memory()
    load(packed(vmlinux(*TABLES)), memory, decompress=True, cmdline=cmdline)
    check(memory, 0)
    assert not memory.u8(LOADFLAGS) & linux.KASLR_FLAG


def test_a_kernel_that_cannot_be_moved_stays() -> None:
    for image in (packed(vmlinux()), packed(vmlinux(*TABLES), relocatable=0), packed(vmlinux(*TABLES, [1], [2]))):
        memory = guest_memory()
        load(image, memory, decompress=True)
        assert distance_of(memory) == 0


@pytest.mark.parametrize("bad", [0x8100_1FFD, 0x8300_0000, 0x0000_1000, 0x8120_003D])
def test_a_relocation_outside_the_kernel_is_a_boot_error(bad: int) -> None:
    image = parse_elf(Image("vmlinux", vmlinux(TABLES[0], TABLES[1], [bad])))
    tables = kaslr.find_relocations(image)
    assert tables is not None
    with pytest.raises(BootError, match=f"relocation 0 is for {bad:#x}, which is not loaded"):
        kaslr.move(image, tables, STEP)


def test_any_table_is_refused_or_stays_inside_the_kernel() -> None:
    rng = random.Random(11)
    for _ in range(300):
        lists = [[rng.choice((at(rng.randrange(0x2000)), rng.getrandbits(32))) for _ in range(rng.randrange(4))]
                 for _ in range(rng.randrange(1, 5))]  # fmt: skip
        image = parse_elf(Image("vmlinux", vmlinux(*lists) + rng.randbytes(rng.choice((0, 0, 4, 3)))))
        tables = kaslr.find_relocations(image)
        if tables is None:
            continue
        before, end = image.image.data, image.segments[-1].offset + image.segments[-1].filesz
        try:
            after = kaslr.move(image, tables, STEP).image.data
        except BootError:
            continue
        assert len(after) == len(before)
        assert after[: image.segments[0].offset] == before[: image.segments[0].offset]
        assert after[end:] == before[end:]


def test_left_to_itself_where_the_host_cannot_unpack() -> None:
    memory = guest_memory()
    entry = load(bzimage(b"not packed".ljust(4096)), memory, decompress=None)
    assert entry.rip == 0x100_0200
    entry = load(packed(vmlinux(*TABLES)), guest_memory(), decompress=None)
    assert entry.rip == 0x100_0000
    with pytest.raises(BootError):
        load(bzimage(b"not packed".ljust(4096)), guest_memory(), decompress=True)


def test_an_image_without_a_kernel_alignment_is_not_moved() -> None:
    image = parse_elf(Image("vmlinux", vmlinux(*TABLES)))
    header = linux.parse_bzimage(Image("kernel", packed(vmlinux(*TABLES))))
    assert kaslr.slots(image, header) > 400
    for fields in ({"kernel_alignment": 0}, {"relocatable_kernel": 0}, {"init_size": 0xFFFF_FFFF}):
        changed = header._replace(header=header.header._replace(**fields))
        assert kaslr.slots(image, changed) == 1
