# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import struct

import pytest
from boot_images import guest_memory

from kvmpy.arch import layout
from kvmpy.boot.mptable import build_mptable, write_mptable
from kvmpy.errors import BootError


def test_mptable_byte_by_byte() -> None:
    raw = build_mptable([0, 1], address=0xF_0000, signature=0x000A_0F10, features=0x178B_FBFF)
    pointer, header, body = raw[:16], raw[16:60], raw[60:]
    assert pointer[:10] == b"_MP_" + struct.pack("<I", 0xF_0010) + bytes([1, 4])
    assert pointer[11:] == bytes(5)
    assert sum(pointer) % 256 == sum(raw[16:]) % 256 == 0
    assert header[:7] == b"PCMP" + struct.pack("<H", len(raw) - 16) + bytes([4])
    assert header[8:28] == b"KVMPY   KVMPYVM     "
    count = 2 + 1 + 1 + 15 + 2
    assert header[28:] == struct.pack("<IHHIHBB", 0, 0, count, 0xFEE0_0000, 0, 0, 0)
    expected = bytes.fromhex("00 00 14 03 100f0a00 fffb8b17 0000000000000000")
    expected += bytes.fromhex("00 01 14 01 100f0a00 fffb8b17 0000000000000000")
    expected += b"\x01\x00ISA   "
    expected += bytes.fromhex("02 02 11 01 0000c0fe")
    expected += b"".join(bytes([3, 0, 0, 0, 0, irq, 2, irq]) for irq in range(16) if irq != 2)
    expected += bytes.fromhex("04 03 0000 00 00 ff 00  04 01 0000 00 00 ff 01")
    assert body == expected


def test_mptable_is_in_the_ebda_by_default() -> None:
    memory = guest_memory()
    at = write_mptable(memory, range(40))
    assert memory.find(b"_MP_", layout.EBDA, layout.EBDA + 0x400) == at == layout.MPTABLE
    assert memory.u8(layout.VGA_START) == 0


def test_many_processors_need_the_bios_area() -> None:
    with pytest.raises(BootError, match=r"254 processors has 5\d\d\d bytes; 1024 fit from 0x9_fc00"):
        write_mptable(guest_memory(), range(254), address=layout.MPTABLE)
    memory = guest_memory()
    assert write_mptable(memory, range(254)) == 0xF_0000
    assert memory.u8(0xF_0010 + 44 + 20 * 253 + 1) == 253


@pytest.mark.parametrize("ids", [[], [0, 0], [255], [-1]])
def test_impossible_apic_ids_are_refused(ids: list[int]) -> None:
    with pytest.raises(ValueError):
        build_mptable(ids)


def test_address_must_be_aligned() -> None:
    with pytest.raises(ValueError):
        build_mptable([0], address=0x9_FC08)
