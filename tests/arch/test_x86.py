# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import struct

import pytest

from kvmpy.arch import entry, x86
from kvmpy.arch.x86 import SegmentFields


def walk(tables: bytes, base: int, address: int) -> int:
    """Translate as the processor does (SDM volume 3, 4.5.4), with 2 MiB pages only."""
    table = base
    for shift in (39, 30):
        (value,) = struct.unpack_from("<Q", tables, table - base + (address >> shift & 511) * 8)
        assert value & x86.PTE_PRESENT
        assert not value & x86.PTE_LARGE
        table = value & 0x000F_FFFF_FFFF_F000
    (value,) = struct.unpack_from("<Q", tables, table - base + (address >> 21 & 511) * 8)
    assert value & x86.PTE_PRESENT
    assert value & x86.PTE_LARGE
    return (value & 0x000F_FFFF_FFE0_0000) | (address & 0x1F_FFFF)


@pytest.mark.parametrize("address", [0, 0x1000, 0x1F_FFFF, 0x20_0000, 0x4000_0000, 0xDEAD_BEEF, 0xFFFF_FFFF])
def test_identity_page_tables_map_every_address_to_itself(address: int) -> None:
    tables = x86.identity_page_tables(0x9000)
    assert len(tables) == 6 * 0x1000
    assert walk(tables, 0x9000, address) == address


def test_identity_page_tables_of_part_of_a_gib_leave_the_rest_unmapped() -> None:
    tables = x86.identity_page_tables(0x1000, size=4 << 20)
    assert len(tables) == 3 * 0x1000
    assert struct.unpack_from("<3Q", tables, 0x2000) == (0x87, 0x20_0087, 0)
    assert struct.unpack_from("<2Q", tables, 0x1000) == (0x3007, 0)


@pytest.mark.parametrize(("base", "size"), [(0x9001, 4 << 30), (0, 0), (0, 0x1000), (0, 513 << 30)])
def test_identity_page_tables_refuse_what_they_cannot_map(base: int, size: int) -> None:
    with pytest.raises(ValueError):
        x86.identity_page_tables(base, size)


@pytest.mark.parametrize(
    ("segment", "value"),
    [
        (x86.CODE32, 0x00CF_9B00_0000_FFFF),
        (x86.CODE64, 0x00AF_9B00_0000_FFFF),
        (x86.DATA32, 0x00CF_9300_0000_FFFF),
        (SegmentFields(base=0x1234_5678, limit=0x67, type=9, s=0), 0x1200_8934_5678_0067),
        (SegmentFields(limit=0xF_FFFF, type=3, dpl=3, avl=1, present=0), 0x001F_7300_0000_FFFF),
    ],
)
def test_descriptors_have_the_layout_of_the_manual(segment: SegmentFields, value: int) -> None:
    raw = x86.pack_descriptor(segment)
    assert struct.unpack("<Q", raw) == (value,)
    assert x86.unpack_descriptor(raw) == segment


@pytest.mark.parametrize(
    "segment", [SegmentFields(base=1 << 32), SegmentFields(limit=0x10_0000), SegmentFields(limit=0x1000, g=1)]
)
def test_descriptors_refuse_what_they_cannot_say(segment: SegmentFields) -> None:
    with pytest.raises(ValueError):
        x86.pack_descriptor(segment)


def test_bits_have_names() -> None:
    assert x86.cr0_names(0x8000_0011) == ["PE", "ET", "PG"]
    assert x86.cr4_names(0x6A0) == ["PAE", "PGE", "OSFXSR", "OSXMMEXCPT"]
    assert x86.efer_names(0xD01) == ["SCE", "LME", "LMA", "NXE"]
    assert x86.rflags_names(0x3246) == ["PF", "ZF", "IF", "IOPL=3"]
    assert x86.rflags_names(2) == []


def test_entry_reset_is_the_reset_vector() -> None:
    e = entry.reset()
    assert e.segments["cs"].base + e.rip == 0xFFFF_FFF0
    assert e.cr0 == 0x6000_0010


def test_entry_long_is_paged_and_64_bit() -> None:
    e = entry.long(0x10_0000, gdt=0x500, cr3=0x9000, code=0x10, data=0x18)
    assert e.cr0 & x86.CR0_PG
    assert e.efer == x86.EFER_LME | x86.EFER_LMA
    assert (e.segments["cs"].l, e.segments["cs"].db, e.segments["cs"].selector) == (1, 0, 0x10)
    assert e.segments["ss"].selector == 0x18
    assert e.gdt == (0x500, 31)


def test_flat_gdt_puts_descriptors_at_the_selectors() -> None:
    gdt = entry.flat_gdt(long_mode=True, code=0x10, data=0x18)
    assert gdt[:16] == bytes(16)
    assert x86.unpack_descriptor(gdt[16:24]) == x86.CODE64
    assert x86.unpack_descriptor(gdt[24:32]) == x86.DATA32
    with pytest.raises(ValueError):
        entry.flat_gdt(long_mode=False, code=0x08, data=0x08)


@pytest.mark.parametrize(("ip", "cs"), [(0x1_0000, 0), (0, 0x1_0000), (-1, 0)])
def test_entry_real_refuses_what_16_bits_cannot_hold(ip: int, cs: int) -> None:
    with pytest.raises(ValueError):
        entry.real(ip, cs=cs)
