# SPDX-License-Identifier: Apache-2.0
"""GuestMemory: the guest's physical memory; all that devices and loaders see of it.

Threads: the table of regions is replaced, never changed, so any thread may read and write while another adds
or removes regions. What a guest can change meanwhile is copied by every method but `view`; a device reads a
structure once and checks the copy. Aligned 1, 2, 4 and 8 byte numbers are single loads and stores.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from kvmpy.errors import StateError
from kvmpy.memory.access import Access, Wrote
from kvmpy.memory.dirty import DirtyPages, DirtySource
from kvmpy.memory.ram import PAGE, Ram
from kvmpy.memory.regions import ADDRESS_END, Region, extent

SetSlot = Callable[[int, int, int, int, int], object]


class GuestMemory(Access):
    """The guest's physical memory.

    set_slot(slot, gpa, size, hva, flags): tells the engine of a region (size 0: it is gone), as
    KVM_SET_USER_MEMORY_REGION (api.rst 4.35). wrote(gpa, size): called after each write by the host, for
    an engine that caches what it translated; None when the engine does not care.
    """

    def __init__(self, set_slot: SetSlot, wrote: Wrote | None = None) -> None:
        super().__init__(wrote)
        self._set_slot = set_slot
        self._lock = threading.RLock()  # held by who changes the table, never by readers
        self._closed = False
        self._logging = False  # new regions are logged too
        self._dirty: DirtySource | None = None

    # -- regions

    def add(
        self,
        gpa: int,
        ram: Ram,
        readonly: bool = False,
        log_dirty: bool = False,
        *,
        offset: int = 0,
        size: int | None = None,
        name: str = "",
    ) -> Region:
        """Show `ram` (or `size` bytes of it from `offset`) to the guest at `gpa`.

        gpa, offset, size: bytes, multiples of 4096. readonly: guest writes become MMIO exits (needs
        KVM_CAP_READONLY_MEM). log_dirty: its written pages are logged from the start. name: for messages.
        Raises ValueError, OverlapError naming both regions, or what the engine raises.
        """
        if size is None:
            size = ram.size - offset
        name = name or ("rom" if readonly else "ram")
        if ram.closed:
            raise StateError(f"memory {name} at {gpa:#_x}: its Ram is closed")
        if gpa < 0 or gpa % PAGE or size <= 0 or size % PAGE:
            raise ValueError(f"memory {name} at {gpa:#_x}, size {size:#_x}: not multiples of {PAGE:#x}")
        if gpa + size > ADDRESS_END:
            raise ValueError(f"memory {name}: {gpa:#_x} + {size:#_x} goes past the end of the address space")
        if offset < 0 or offset % PAGE or offset + size > ram.size:
            raise ValueError(f"memory {name}: {extent(offset, size)} is not in Ram of {ram.size:#_x} bytes")
        if ram.readonly and not readonly:
            raise ValueError(f"memory {name} at {gpa:#_x}: read-only Ram needs add(..., readonly=True)")
        region = Region(gpa, ram, offset, size, readonly, name)
        with self._lock:
            if self._closed:
                raise StateError("this guest memory is closed")
            table = self._table.with_region(region)
            region.slot = self._table.free_slot()
            if log_dirty or (self._logging and not readonly):
                region.log_dirty = True
                region.marks = bytearray(region.pages)
            region.hold()
            try:
                self._set_slot(region.slot, gpa, size, region.address, region.flags)
            except BaseException:
                region.release()
                raise
            self._table = table
        return region

    def remove(self, region: Region) -> None:
        """Take a region away from the guest; its Ram stays. Raises ValueError when it is not here."""
        with self._lock:
            table = self._table.without(region)
            # First the engine: no vCPU may use memory that nothing keeps mapped.
            self._set_slot(region.slot, region.gpa, 0, 0, 0)
            self._table = table
            region.release()
            if self._dirty is not None:
                self._dirty.forget(region)

    def close(self) -> None:
        """Remove all regions; again is no error. A VM that is closed already has no slots left to delete."""
        with self._lock:
            self._closed = True
            for region in self._table.regions:
                try:
                    self.remove(region)
                except StateError:  # the VM is closed
                    self._table = self._table.without(region)
                    region.release()

    def __del__(self) -> None:
        # A VM that lives longer must not keep slots over memory that nothing keeps mapped.
        if self._table.regions:
            self.close()

    def ram_ranges(self) -> list[tuple[int, int]]:
        """(gpa, size) of writable memory by rising address, neighbours joined; for E820 and the like."""
        ranges: list[tuple[int, int]] = []
        for region in self._table.regions:
            if region.readonly:
                continue
            if ranges and sum(ranges[-1]) == region.gpa:
                ranges[-1] = (ranges[-1][0], ranges[-1][1] + region.size)
            else:
                ranges.append((region.gpa, region.size))
        return ranges

    # -- dirty pages

    def start_dirty_log(self, source: DirtySource | None = None) -> None:
        """Log from now on which pages of writable regions, new ones too, the guest and the host write.

        source: where the guest's pages come from, a `DirtyLog` or a `DirtyRing`; None: only the host's.
        """
        with self._lock:
            self._dirty = source
            self._logging = True
            for region in self._table.regions:
                if not region.readonly and not region.log_dirty:
                    self._set_logging(region, True)

    def stop_dirty_log(self) -> None:
        """Log no longer; what was not collected is lost."""
        with self._lock:
            self._logging = False
            for region in self._table.regions:
                if region.log_dirty:
                    self._set_logging(region, False)
            self._dirty = None

    def collect_dirty(self) -> DirtyPages:
        """The pages written since logging began or since the last call, of all regions that are logged.

        A page written while this runs is in this answer, in the next, or in both; never in none. Read the
        pages after this, not before. Some processors buffer the log: it is complete with all vCPUs paused.
        """
        with self._lock:
            regions = tuple(region for region in self._table.regions if region.log_dirty)
            guest = self._dirty.collect(regions) if self._dirty is not None else {}
            return DirtyPages.collect(regions, guest)

    def _set_logging(self, region: Region, on: bool) -> None:
        region.log_dirty = on
        region.marks = bytearray(region.pages) if on else None
        try:
            self._set_slot(region.slot, region.gpa, region.size, region.address, region.flags)
        except BaseException:
            region.log_dirty = not on
            raise

    def __repr__(self) -> str:
        inside = ", ".join(f"{region.name} {extent(region.gpa, region.size)}" for region in self.regions)
        return f"<GuestMemory {inside or 'empty'}>"
