# SPDX-License-Identifier: Apache-2.0
"""Disassembly for failure reports and debuggers; iced-x86 is imported when it is first needed."""

from __future__ import annotations

import importlib
from typing import Any

LACKING = "(no disassembly: the Python package iced-x86 is not installed)"
LONGEST = 15  # bytes of an x86 instruction; SDM volume 2, 2.3.11


def disassemble(code: bytes, ip: int, bits: int, count: int = 8) -> list[str]:
    """Disassemble instructions in NASM's syntax.

    Arguments: code, bytes that start at an instruction; ip, address of the first byte (the offset in its
    segment, as branch targets are); bits, 16, 32 or 64; count, the most instructions to give.
    Returns: a line per instruction, "0x0000_1000  0f 05                    syscall". What cannot be decoded,
    or runs past the end of `code`, is the last line and says so; so does the only line when iced-x86 is
    lacking.
    Errors: ValueError for other `bits`.
    """
    return [_line(address, bits, raw, text) for address, raw, text in instructions(code, ip, bits, count)]


def instructions(code: bytes, ip: int, bits: int, count: int = 8) -> list[tuple[int, bytes, str]]:
    """As `disassemble()`: (address, bytes, text) of each."""
    if bits not in (16, 32, 64):
        raise ValueError(f"bits={bits}: code is 16, 32 or 64 bits wide")
    try:
        iced: Any = importlib.import_module("iced_x86")
    except ImportError:
        return [(ip, code[: min(len(code), LONGEST)], LACKING)] if code and count > 0 else []
    formatter = iced.Formatter(iced.FormatterSyntax.NASM)
    formatter.hex_prefix, formatter.hex_suffix = "0x", ""
    formatter.space_after_operand_separator = True
    formatter.uppercase_hex = False
    formatter.rip_relative_addresses = False
    decoder = iced.Decoder(bits, bytes(code), ip=ip & ((1 << 64) - 1))
    lines: list[tuple[int, bytes, str]] = []
    while decoder.can_decode and len(lines) < count:
        start = decoder.position
        address = decoder.ip
        instruction = decoder.decode()
        if instruction.is_invalid:
            rest = code[start : start + LONGEST]
            cut = decoder.last_error == iced.DecoderError.NO_MORE_BYTES
            lines.append((address, rest, "(cut short)" if cut else "(bad)"))
            break
        raw = code[start : start + instruction.len]
        lines.append((address, raw, formatter.format(instruction)))
    return lines


def _line(address: int, bits: int, raw: bytes, text: str) -> str:
    digits = {16: 4, 32: 8, 64: 16}[bits]
    number = f"{address & ((1 << bits) - 1):0{digits}x}"
    groups = "_".join(number[at : at + 4] for at in range(0, digits, 4))
    return f"0x{groups}  {raw.hex(' '):<30}  {text}"
