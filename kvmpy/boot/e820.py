# SPDX-License-Identifier: Apache-2.0
"""The memory map that a BIOS would report by INT 15h, E820 (ACPI 6.5, 15.1): RAM, and what firmware keeps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from kvmpy.arch import layout
from kvmpy.memory import GuestMemory

RAM = 1
RESERVED = 2
ACPI = 3
NVS = 4
UNUSABLE = 5
PERSISTENT = 7

# What a BIOS keeps below 1 MiB: the EBDA, video memory, option ROMs, its own shadow with ACPI and MP tables.
LOW_RESERVED = (
    (layout.EBDA, layout.VGA_START - layout.EBDA),
    (layout.ACPI_TABLES, layout.BIOS_AREA_END - layout.ACPI_TABLES),
)
_LOW_HOLE = (layout.EBDA, layout.KERNEL - layout.EBDA)


class E820Entry(NamedTuple):
    """A range of guest addresses: `start` and `size` in bytes, `type` RAM, RESERVED, ..."""

    start: int
    size: int
    type: int = RAM


def memory_map(memory: GuestMemory, reserved: Iterable[tuple[int, int]] = ()) -> list[E820Entry]:
    """The map of `memory` by rising address, without overlaps.

    Writable regions are RAM except for what firmware keeps below 1 MiB; `reserved` are further (start, size)
    ranges, in bytes, that the guest must leave alone, in RAM or not (PCI ECAM, say).
    """
    kept = [E820Entry(start, size, RESERVED) for start, size in (*LOW_RESERVED, *reserved) if size > 0]
    holes = [_LOW_HOLE, *((e.start, e.size) for e in kept)]
    free = [(start, start + size) for start, size in memory.ram_ranges()]
    for start, size in holes:
        free = [piece for range_ in free for piece in _cut(range_, start, start + size)]
    return sorted(_merge(kept) + [E820Entry(a, b - a) for a, b in free])


def _cut(range_: tuple[int, int], start: int, end: int) -> list[tuple[int, int]]:
    a, b = range_
    return [(x, y) for x, y in ((a, min(b, start)), (max(a, end), b)) if x < y]


def _merge(entries: list[E820Entry]) -> list[E820Entry]:
    """Reserved ranges with overlapping ones joined."""
    merged: list[E820Entry] = []
    for entry in sorted(entries):
        last = merged[-1] if merged else None
        if last and entry.start <= last.start + last.size:
            end = max(last.start + last.size, entry.start + entry.size)
            merged[-1] = E820Entry(last.start, end - last.start, RESERVED)
        else:
            merged.append(entry)
    return merged
