# SPDX-License-Identifier: Apache-2.0
"""Reading and writing by guest physical address, over a table of regions."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, overload

from kvmpy.errors import GuestMemoryError
from kvmpy.memory import search
from kvmpy.memory.regions import ADDRESS_END, Region, Span, Table, extent

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from kvmpy.memory.cstructs import ArrayView, Definitions, StructView

Wrote = Callable[[int, int], object]


class Access:
    """Every way to read and write guest memory; `GuestMemory` adds how its regions come and go."""

    def __init__(self, wrote: Wrote | None) -> None:
        self._tell = wrote
        self._table = Table()

    @property
    def watcher(self) -> Wrote | None:
        """Who must hear of every write by the host, dirty log or not, as watcher(gpa, size); None: nobody."""
        return self._tell

    @property
    def regions(self) -> tuple[Region, ...]:
        """All regions by rising address."""
        return self._table.regions

    def region_at(self, gpa: int) -> Region | None:
        """The region that has the byte at `gpa`, or None in a hole."""
        return self._table.find(gpa)

    # -- bytes

    def read(self, gpa: int, size: int) -> bytes:
        """A copy of `size` bytes from `gpa`. Raises GuestMemoryError naming the first bad address."""
        table = self._table
        index = bisect_right(table.starts, gpa) - 1
        if index >= 0:
            region = table.regions[index]
            offset = gpa - region.gpa
            if 0 <= size <= region.size - offset:
                return region.ram.read(region.offset + offset, size)
        return b"".join(s.region.ram.read(s.region.offset + s.offset, s.size) for s in self._spans(gpa, size))

    def readinto(self, gpa: int, buffer: Buffer) -> None:
        """Fill `buffer` (writable) from `gpa`. Raises GuestMemoryError; then the buffer is untouched."""
        with memoryview(buffer) as whole, whole.cast("B") as target:
            done = 0
            for region, offset, size in self._spans(gpa, target.nbytes):
                region.ram.readinto(region.offset + offset, target[done : done + size])
                done += size

    def write(self, gpa: int, data: Buffer) -> None:
        """Copy `data` (bytes or any buffer) to `gpa`. Raises GuestMemoryError; then nothing was written."""
        if type(data) is bytes:
            size = len(data)
            table = self._table
            index = bisect_right(table.starts, gpa) - 1
            if index >= 0:
                region = table.regions[index]
                offset = gpa - region.gpa
                if 0 < size <= region.size - offset and not region.readonly:
                    region.ram.write(region.offset + offset, data)
                    if region.marks is not None:
                        region.mark(offset, size)
                    if self._tell is not None:
                        self._tell(gpa, size)
                    return
        with memoryview(data) as whole:
            source = (whole if whole.c_contiguous else memoryview(whole.tobytes())).cast("B")
            done = 0
            for region, offset, size in self._spans(gpa, source.nbytes, write=True):
                region.ram.write(region.offset + offset, source[done : done + size])
                self._note(region, offset, size)
                done += size

    def fill(self, gpa: int, size: int, byte: int = 0) -> None:
        """Set `size` bytes from `gpa` to `byte`. Raises GuestMemoryError; then nothing was written."""
        for region, offset, count in self._spans(gpa, size, write=True):
            region.ram.fill(region.offset + offset, count, byte)
            self._note(region, offset, count)

    # -- numbers (little-endian)

    def load(self, gpa: int, size: int) -> int:
        """The number of `size` (1 to 8) bytes at `gpa`; one atomic load when naturally aligned."""
        table = self._table
        index = bisect_right(table.starts, gpa) - 1
        if index >= 0:
            region = table.regions[index]
            offset = gpa - region.gpa
            if size <= region.size - offset:
                return region.ram.load(region.offset + offset, size)
        return int.from_bytes(self.read(gpa, size), "little")

    def store(self, gpa: int, size: int, value: int) -> None:
        """Write a number of `size` (1 to 8) bytes; one atomic store when naturally aligned.

        Raises OverflowError when `value` is negative or too big, GuestMemoryError.
        """
        table = self._table
        index = bisect_right(table.starts, gpa) - 1
        if index >= 0:
            region = table.regions[index]
            offset = gpa - region.gpa
            if size <= region.size - offset and not region.readonly:
                region.ram.store(region.offset + offset, size, value)
                if region.marks is not None:
                    region.mark(offset, size)
                if self._tell is not None:
                    self._tell(gpa, size)
                return
        self.write(gpa, value.to_bytes(size, "little"))

    def u8(self, gpa: int) -> int:
        """The byte at `gpa`."""
        return self.load(gpa, 1)

    def u16(self, gpa: int) -> int:
        """The 16-bit number at `gpa`."""
        return self.load(gpa, 2)

    def u32(self, gpa: int) -> int:
        """The 32-bit number at `gpa`."""
        return self.load(gpa, 4)

    def u64(self, gpa: int) -> int:
        """The 64-bit number at `gpa`."""
        return self.load(gpa, 8)

    def put_u8(self, gpa: int, value: int) -> None:
        """Write the byte at `gpa`."""
        self.store(gpa, 1, value)

    def put_u16(self, gpa: int, value: int) -> None:
        """Write the 16-bit number at `gpa`."""
        self.store(gpa, 2, value)

    def put_u32(self, gpa: int, value: int) -> None:
        """Write the 32-bit number at `gpa`."""
        self.store(gpa, 4, value)

    def put_u64(self, gpa: int, value: int) -> None:
        """Write the 64-bit number at `gpa`."""
        self.store(gpa, 8, value)

    # -- without a copy

    @overload
    def view(self, gpa: int, what: int) -> memoryview: ...
    @overload
    def view(self, gpa: int, what: str, definitions: Definitions | None = None) -> StructView | ArrayView: ...
    def view(
        self, gpa: int, what: int | str, definitions: Definitions | None = None
    ) -> memoryview | StructView | ArrayView:
        """Guest memory itself: a memoryview of `what` bytes, or a C structure of the type named `what`.

        what: a size in bytes, or e.g. "struct boot_params" or "struct boot_e820_entry[8]" as declared in
        `definitions` (default: the boot structures, `kvmpy.memory.cstructs.BOOT`). The range must lie in one
        region. The view keeps the memory mapped. The guest may change it at any time: never check a value in
        a view and then use it. Writes through a structure are noted; after writes through a memoryview call
        `wrote(gpa, size)`. Raises GuestMemoryError.
        """
        if isinstance(what, str):
            return self._struct(gpa, what, definitions)
        parts = self._spans(gpa, what)
        if len(parts) > 1:
            other = parts[1].region
            raise GuestMemoryError(
                f"view of {extent(gpa, what)} spans regions: {other.name} begins at {other.gpa:#_x}",
                gpa,
                what,
                other.gpa,
            )
        if not parts:
            return memoryview(b"")
        region, offset, _ = parts[0]
        start = region.offset + offset
        part = memoryview(region.ram)[start : start + what]
        return part.toreadonly() if region.readonly else part

    def _struct(self, gpa: int, name: str, definitions: Definitions | None) -> StructView | ArrayView:
        from kvmpy.memory import cstructs

        types = definitions or cstructs.BOOT
        buffer = self.view(gpa, types.sizeof(name))
        region = self.region_at(gpa)

        def note(at: int, size: int) -> None:
            if region is not None and self.region_at(gpa) is region:  # else it is no longer the guest's
                self._note(region, gpa + at - region.gpa, size)

        return types.view(name, buffer, note)

    def wrote(self, gpa: int, size: int) -> None:
        """The host wrote [gpa, gpa + size) through a view: marks the pages dirty and tells the engine."""
        for region, offset, count in self._spans(gpa, size, write=True):
            self._note(region, offset, count)

    # -- looking

    def find(self, needle: bytes, start: int = 0, end: int = ADDRESS_END) -> int | None:
        """The address of the first `needle` that lies wholly in [start, end), or None; holes are skipped."""
        return next(search.find_all(self._table, needle, start, end), None)

    def find_all(self, needle: bytes, start: int = 0, end: int = ADDRESS_END) -> Iterator[int]:
        """The addresses of every `needle` in [start, end), overlapping ones too, rising."""
        return search.find_all(self._table, needle, start, end)

    def hexdump(self, gpa: int, size: int = 256) -> str:
        """Lines of 16 bytes as hex and ASCII; `--` where there is no memory."""
        return search.hexdump(self._table, gpa, size)

    # -- inside

    def _note(self, region: Region, offset: int, size: int) -> None:
        region.mark(offset, size)
        if self._tell is not None:
            self._tell(region.gpa + offset, size)

    def _spans(self, gpa: int, size: int, write: bool = False) -> list[Span]:
        """Where [gpa, gpa + size) lies. Raises GuestMemoryError when not all of it is (writable) memory."""
        if size < 0:
            raise ValueError(f"size must not be negative, but is {size}")
        if gpa < 0 or gpa + size > ADDRESS_END:
            raise _refused(gpa, size, write, gpa if gpa < 0 else ADDRESS_END, "not a 64-bit address")
        parts, hole = self._table.spans(gpa, size)
        if hole != gpa + size:
            raise _refused(gpa, size, write, hole, "no memory")
        if write:
            for region, offset, _ in parts:
                if region.readonly:
                    raise _refused(gpa, size, write, region.gpa + offset, f"{region.name} is read-only")
        return parts


def _refused(gpa: int, size: int, write: bool, hole: int, why: str) -> GuestMemoryError:
    way = "write" if write else "read"
    return GuestMemoryError(f"guest memory {way} {extent(gpa, size)}: {why} at {hole:#_x}", gpa, size, hole)
