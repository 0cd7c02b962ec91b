# SPDX-License-Identifier: Apache-2.0
"""Which pages were written: the answer, and where the guest's part of it comes from."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

from kvmpy.memory.ram import PAGE
from kvmpy.memory.regions import Region


class DirtySource(Protocol):
    """Says which pages the guest wrote."""

    def collect(self, regions: Iterable[Region]) -> Mapping[int, bytes | bytearray]:
        """Slot number -> bitmap (bit n of the little-endian whole: page n) since the last call."""
        ...

    def forget(self, region: Region) -> None:
        """The region is going away; its slot number may be used again."""
        ...


class HasDirtyLog(Protocol):
    """The part of `kvmpy.Vm` that a DirtyLog needs."""

    def get_dirty_log(self, slot: int, /) -> bytes | bytearray:
        """The bitmap of a slot."""
        ...

    def clear_dirty_log(self, slot: int, bitmap: bytes | bytearray, /) -> object:
        """Protect pages again."""
        ...


class DirtyLog:
    """The guest's writes by bitmap (KVM_GET_DIRTY_LOG, api.rst 4.8): the kernel keeps one per slot.

    manual: the VM has KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 enabled, so what was read must be cleared
    (KVM_CLEAR_DIRTY_LOG, api.rst 4.117).
    """

    def __init__(self, vm: HasDirtyLog, manual: bool = False) -> None:
        self._vm = vm
        self._manual = manual

    def collect(self, regions: Iterable[Region]) -> Mapping[int, bytes | bytearray]:
        """One ioctl per region."""
        bitmaps = {}
        for region in regions:
            bitmap = bitmaps[region.slot] = self._vm.get_dirty_log(region.slot)
            if self._manual and any(bitmap):
                self._vm.clear_dirty_log(region.slot, bitmap)
        return bitmaps

    def forget(self, region: Region) -> None:
        """Nothing: the bitmap goes with the slot."""


class HasDirtyRing(Protocol):
    """The part of `kvmpy.Vcpu` that a DirtyRing needs."""

    def collect_dirty(self) -> Iterable[tuple[int, int]]:
        """The (slot, page) pairs in the ring of this vCPU."""
        ...


class HasDirtyRings(Protocol):
    """The part of `kvmpy.Vm` that a DirtyRing needs."""

    @property
    def vcpus(self) -> Iterable[HasDirtyRing]:
        """The open vCPUs."""
        ...

    def reset_dirty_rings(self) -> object:
        """Give the taken entries back."""
        ...


class DirtyRing:
    """The guest's writes by ring (KVM_CAP_DIRTY_LOG_RING, api.rst 7.36): the kernel keeps one per vCPU.

    For a VM after `enable_dirty_ring()`. On a KVM_EXIT_DIRTY_RING_FULL call `drain()` and run the vCPU again.
    """

    def __init__(self, vm: HasDirtyRings) -> None:
        self._vm = vm
        self._bitmaps: dict[int, bytearray] = {}
        self._lock = threading.Lock()  # a ring has one reader

    def drain(self) -> None:
        """Take what is in the rings now and keep it for `collect`; from any thread."""
        with self._lock:
            self._drain()

    def _drain(self) -> None:
        for vcpu in self._vm.vcpus:
            for slot, page in vcpu.collect_dirty():
                bitmap = self._bitmaps.setdefault(slot & 0xFFFF, bytearray())  # above: the address space
                if page // 8 >= len(bitmap):
                    bitmap.extend(bytes(page // 8 + 1 - len(bitmap)))
                bitmap[page // 8] |= 1 << page % 8
        self._vm.reset_dirty_rings()

    def collect(self, regions: Iterable[Region]) -> Mapping[int, bytes | bytearray]:
        """What was drained and what is in the rings now."""
        with self._lock:
            self._drain()
            bitmaps, self._bitmaps = self._bitmaps, {}
        return bitmaps

    def forget(self, region: Region) -> None:
        """Drop what is known of the region's slot."""
        with self._lock:
            self._drain()
            self._bitmaps.pop(region.slot, None)


class DirtyPages:
    """A set of pages by guest address: iterate `ranges()` or `pages()`, ask `gpa in dirty`, `len(dirty)`."""

    def __init__(self, bitmaps: Mapping[int, bytes | bytearray], regions: tuple[Region, ...]) -> None:
        self._bitmaps = {region.slot: bytes(bitmaps.get(region.slot, b"")) for region in regions}
        self._places = sorted((region.gpa, region.pages, region.slot) for region in regions)

    @classmethod
    def collect(cls, regions: tuple[Region, ...], guest: Mapping[int, bytes | bytearray]) -> DirtyPages:
        """What the guest wrote and what the host marked; the marks are taken."""
        bitmaps = {}
        for region in regions:
            bitmap = bytearray(-(-region.pages // 8))
            found = guest.get(region.slot, b"")[: len(bitmap)]
            bitmap[: len(found)] = found
            if region.marks is not None:
                _take_marks(region.marks, bitmap)
            bitmaps[region.slot] = bitmap
        return cls(bitmaps, regions)

    def bitmap(self, region: Region) -> bytes:
        """The pages of one region: bit n of byte n // 8 is page n; empty when it was not logged."""
        return self._bitmaps.get(region.slot, b"")

    def ranges(self) -> Iterator[tuple[int, int]]:
        """(gpa, size) in bytes by rising address, neighbouring pages joined."""
        start = end = -1
        for page in self.pages():
            if page != end:
                if end >= 0:
                    yield start, end - start
                start = page
            end = page + PAGE
        if end >= 0:
            yield start, end - start

    def pages(self) -> Iterator[int]:
        """The guest address of each page, rising."""
        for gpa, count, slot in self._places:
            for run in re.finditer(rb"[^\0]+", self._bitmaps[slot]):
                for index in range(run.start(), run.end()):
                    byte = self._bitmaps[slot][index]
                    for bit in range(8):
                        if byte >> bit & 1 and index * 8 + bit < count:
                            yield gpa + (index * 8 + bit) * PAGE

    def __iter__(self) -> Iterator[int]:
        return self.pages()

    def __len__(self) -> int:
        return sum(
            (int.from_bytes(self._bitmaps[slot], "little") & ((1 << count) - 1)).bit_count()
            for _, count, slot in self._places
        )

    def __contains__(self, gpa: int) -> bool:
        for start, count, slot in self._places:
            page = (gpa - start) // PAGE
            if 0 <= page < count:
                bitmap = self._bitmaps[slot]
                return page // 8 < len(bitmap) and bool(bitmap[page // 8] >> page % 8 & 1)
        return False

    def __repr__(self) -> str:
        return f"<DirtyPages {len(self)} pages>"


def _take_marks(marks: bytearray, bitmap: bytearray) -> None:
    page = marks.find(1)
    while page >= 0:
        # Cleared before the page is copied by the caller: a later write marks it anew.
        marks[page] = 0
        bitmap[page // 8] |= 1 << page % 8
        page = marks.find(1, page + 1)
