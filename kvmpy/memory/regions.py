# SPDX-License-Identifier: Apache-2.0
"""Regions: which host memory the guest sees at which guest physical address (GPA)."""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple

from kvmpy.errors import OverlapError
from kvmpy.memory.ram import PAGE, Ram

# Flags of struct kvm_userspace_memory_region (api.rst 4.35).
KVM_MEM_LOG_DIRTY_PAGES = 1 << 0
KVM_MEM_READONLY = 1 << 1

ADDRESS_END = 1 << 64


def extent(start: int, size: int) -> str:
    """A range of addresses for a message."""
    return f"[{start:#_x}, {start + size:#_x})"


class Region:
    """A memory slot: [gpa, end) of the guest is [offset, offset + size) of `ram`.

    `readonly`: guest writes become MMIO exits and host writes by guest address are refused.
    `slot` is its number in the engine. It keeps `ram` from being closed until it is removed.
    """

    __slots__ = (
        "_hold", "end", "gpa", "log_dirty", "marks", "name", "offset", "ram", "readonly", "size", "slot",
    )

    def __init__(self, gpa: int, ram: Ram, offset: int, size: int, readonly: bool, name: str) -> None:
        self.gpa = gpa
        self.size = size
        self.end = gpa + size
        self.ram = ram
        self.offset = offset
        self.readonly = readonly
        self.name = name
        self.slot = -1
        self.log_dirty = False
        # A byte per page that the host wrote, while log_dirty. Bytes and not bits, so that setting one
        # is a single step for threads that mark different pages.
        self.marks: bytearray | None = None
        self._hold: memoryview | None = None

    @property
    def address(self) -> int:
        """The host virtual address of the first byte."""
        return self.ram.address + self.offset

    @property
    def flags(self) -> int:
        """What the engine is told: KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY."""
        return KVM_MEM_LOG_DIRTY_PAGES * self.log_dirty | KVM_MEM_READONLY * self.readonly

    @property
    def pages(self) -> int:
        """Its size in pages of 4 KiB."""
        return self.size // PAGE

    def hold(self) -> None:
        """From now on `ram.close()` refuses."""
        self._hold = memoryview(self.ram)

    def release(self) -> None:
        """The engine no longer uses it."""
        if self._hold is not None:
            self._hold.release()
            self._hold = None

    def mark(self, offset: int, size: int) -> None:
        """The host wrote `size` (more than 0) bytes at `offset`: its pages are dirty."""
        marks = self.marks
        if marks is not None:
            first, last = offset // PAGE, (offset + size - 1) // PAGE
            if first == last:
                marks[first] = 1
            else:
                marks[first : last + 1] = b"\1" * (last + 1 - first)

    def __repr__(self) -> str:
        kind = " read-only" if self.readonly else ""
        return f"<Region {self.name} {extent(self.gpa, self.size)}{kind} slot {self.slot}>"


class Span(NamedTuple):
    """`size` bytes of one region from `offset` (in the region)."""

    region: Region
    offset: int
    size: int


class Table:
    """An immutable set of regions sorted by address; changing it makes another, so readers need no lock."""

    __slots__ = ("regions", "starts")

    def __init__(self, regions: tuple[Region, ...] = ()) -> None:
        self.regions = regions
        self.starts = tuple(region.gpa for region in regions)

    def find(self, gpa: int) -> Region | None:
        """The region that has `gpa`."""
        index = bisect_right(self.starts, gpa) - 1
        if index >= 0 and gpa < self.regions[index].end:
            return self.regions[index]
        return None

    def spans(self, gpa: int, size: int) -> tuple[list[Span], int]:
        """The parts of [gpa, gpa + size) up to the first hole, and where that is (or the end)."""
        parts = []
        end = gpa + size
        while gpa < end:
            region = self.find(gpa)
            if region is None:
                break
            count = min(end, region.end) - gpa
            parts.append(Span(region, gpa - region.gpa, count))
            gpa += count
        return parts, gpa

    def with_region(self, new: Region) -> Table:
        """This table and `new`. Raises OverlapError naming both."""
        for old in self.regions:
            if new.gpa < old.end and old.gpa < new.end:
                raise OverlapError(
                    f"memory {new.name} {extent(new.gpa, new.size)} overlaps "
                    f"{old.name} {extent(old.gpa, old.size)} (slot {old.slot})"
                )
        return Table(tuple(sorted((*self.regions, new), key=lambda region: region.gpa)))

    def without(self, region: Region) -> Table:
        """This table without `region`. Raises ValueError when it is not in it."""
        if region not in self.regions:
            raise ValueError(f"{region!r} is not a region of this memory")
        return Table(tuple(other for other in self.regions if other is not region))

    def free_slot(self) -> int:
        """The smallest slot number that no region has."""
        used = {region.slot for region in self.regions}
        return next(number for number in range(len(used) + 1) if number not in used)
