# SPDX-License-Identifier: Apache-2.0
"""Looking at guest memory: search and hexdump, across regions and holes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from kvmpy.memory.regions import Span, Table

WIDTH = 16  # bytes per line of a dump


def find_all(table: Table, needle: bytes, start: int, end: int) -> Iterator[int]:
    """The addresses of every `needle` that lies wholly in [start, end), rising."""
    needle = bytes(needle)
    if not needle:
        raise ValueError("cannot search for nothing")
    return _find_all(table, needle, start, end)


def _find_all(table: Table, needle: bytes, start: int, end: int) -> Iterator[int]:
    tail, tail_end = b"", -1  # the last bytes before `region`, when it adjoins
    keep = len(needle) - 1
    for region in table.regions:
        low, high = max(start, region.gpa), min(end, region.end)
        if low >= high:
            continue
        base = region.offset - region.gpa  # gpa + base is the offset in ram
        if tail_end != low:
            tail = b""
        head = region.ram.read(low + base, min(keep, high - low))
        # Only hits that begin in the tail: those in the head come below.
        for at in _offsets(tail + head, needle):
            if at < len(tail):
                yield low - len(tail) + at
        at = low
        while (hit := region.ram.find(needle, at + base, high + base)) >= 0:
            at = hit - base
            yield at
            at += 1
        last = region.ram.read(max(low, high - keep) + base, high - max(low, high - keep)) if keep else b""
        tail = (tail + last)[-keep:] if keep else b""
        tail_end = high


def _offsets(text: bytes, needle: bytes) -> Iterator[int]:
    at = text.find(needle)
    while at >= 0:
        yield at
        at = text.find(needle, at + 1)


def hexdump(table: Table, gpa: int, size: int) -> str:
    """Lines of 16 bytes: address, hex, ASCII. Equal lines after the first become one `*`."""
    lines = []
    rows = ((at, _row(table, at, min(WIDTH, gpa + size - at))) for at in range(gpa, gpa + size, WIDTH))
    for row, same in groupby(rows, key=lambda pair: pair[1]):
        first, *more = (at for at, _ in same)
        lines.append(f"{first:016x}  {_format(row)}")
        if len(more) > 1:
            lines.append("*")
        if more:
            lines.append(f"{more[-1]:016x}  {_format(row)}")
    return "\n".join(lines)


def _row(table: Table, gpa: int, size: int) -> tuple[int | None, ...]:
    row: list[int | None] = []
    while len(row) < size:
        parts, _ = table.spans(gpa + len(row), size - len(row))
        for span in parts:
            row.extend(_bytes(span))
        if len(row) < size:
            row.append(None)
    return tuple(row)


def _bytes(span: Span) -> bytes:
    return span.region.ram.read(span.region.offset + span.offset, span.size)


def _format(row: tuple[int | None, ...]) -> str:
    cells = ["--" if byte is None else f"{byte:02x}" for byte in row]
    cells += ["  "] * (WIDTH - len(cells))
    text = "".join(chr(byte) if byte is not None and 0x20 <= byte < 0x7F else "." for byte in row)
    return f"{' '.join(cells[:8])}  {' '.join(cells[8:])}  |{text}|"
