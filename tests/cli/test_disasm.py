# SPDX-License-Identifier: Apache-2.0
"""Disassembly in the three widths, of damaged code, and without iced-x86."""

import sys

import pytest

from kvmpy.disasm import LACKING, disassemble


@pytest.fixture
def iced():
    pytest.importorskip("iced_x86")


def split(line):
    address, raw, text = (part.strip() for part in line.split("  ", 2)) if line.count("  ") else (line, "", "")
    return address, raw, text.strip()


@pytest.mark.parametrize(
    ("code", "bits", "address", "text"),
    [
        ("baf803", 16, "0x0010", "mov dx, 0x3f8"),
        ("baf8030000", 32, "0x0000_0010", "mov edx, 0x3f8"),
        ("0f05", 64, "0x0000_0000_0000_0010", "syscall"),
        ("f0480fc70f", 64, "0x0000_0000_0000_0010", "lock cmpxchg16b [rdi]"),
        ("ebfe", 64, "0x0000_0000_0000_0010", "jmp short 0x0000000000000010"),
        ("488d0510000000", 64, "0x0000_0000_0000_0010", "lea rax, [rel 0x27]"),
    ],
)
def test_one_instruction(iced, code, bits, address, text):
    (line,) = disassemble(bytes.fromhex(code), 0x10, bits)
    assert split(line) == (address, bytes.fromhex(code).hex(" "), text)


def test_addresses_go_on_and_count_is_a_bound(iced):
    code = bytes.fromhex("90 6690 f4 90 90")
    lines = [split(line) for line in disassemble(code, 0xFFFF_FFFF_8100_0000, 64, 3)]
    assert [address for address, _, _ in lines] == [
        "0xffff_ffff_8100_0000", "0xffff_ffff_8100_0001", "0xffff_ffff_8100_0003",
    ]  # fmt: skip
    assert [text for _, _, text in lines] == ["nop", "xchg ax, ax", "hlt"]
    assert disassemble(code, 0, 64, 0) == []
    assert disassemble(b"", 0, 64) == []


def test_what_is_no_instruction_is_the_last_line(iced):
    lines = disassemble(bytes.fromhex("90 06 90 90"), 0, 64)
    assert [split(line)[2] for line in lines] == ["nop", "(bad)"]
    lines = disassemble(bytes.fromhex("90 0fc7"), 0, 64)
    assert [split(line)[2] for line in lines] == ["nop", "(cut short)"]


def test_address_at_the_end_of_its_width_wraps(iced):
    lines = disassemble(b"\x90" * 3, 0xFFFF_FFFF, 32)
    assert [split(line)[0] for line in lines] == ["0xffff_ffff", "0x0000_0000", "0x0000_0001"]


@pytest.mark.parametrize("bits", [0, 8, 128])
def test_impossible_width_is_an_error(bits):
    with pytest.raises(ValueError, match=f"bits={bits}"):
        disassemble(b"\x90", 0, bits)


def test_without_iced_the_bytes_are_shown_and_the_lack_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "iced_x86", None)
    (line,) = disassemble(bytes(range(20)), 0x1000, 64, 8)
    assert line.startswith("0x0000_0000_0000_1000  00 01 02")
    assert line.endswith(LACKING)
    assert disassemble(b"", 0, 64) == []
