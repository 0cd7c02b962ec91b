# SPDX-License-Identifier: Apache-2.0
"""Where the parts of a guest go in its RAM: claims that never overlap, written only when all of them fit."""

from __future__ import annotations

from typing import NamedTuple

from kvmpy.arch import layout
from kvmpy.errors import BootError
from kvmpy.memory import GuestMemory

PAGE = 0x1000


class Claim(NamedTuple):
    """[start, end) of guest RAM and what is there."""

    start: int
    end: int
    what: str

    def __str__(self) -> str:
        return f"{self.what} [{self.start:#_x}, {self.end:#_x})"


# Nothing is placed here by itself, though an image may ask for it: tables for the guest lie here, and its
# memory map says that this is no RAM.
FIRMWARE_AREA = Claim(layout.EBDA, layout.BIOS_AREA_END, "the firmware area")


def align_up(value: int, alignment: int) -> int:
    """`value` rounded up to a multiple of `alignment`, any positive number."""
    return -(-value // alignment) * alignment


class Space:
    """The RAM of a guest while an image is being placed in it.

    Nothing is written before `commit()`, so an image that does not fit leaves guest memory as it was.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.ranges = memory.ram_ranges()
        self.claims: list[Claim] = []
        self._writes: list[tuple[int, bytes | memoryview | int]] = []

    @property
    def end(self) -> int:
        """The first address after all RAM."""
        return max((start + size for start, size in self.ranges), default=0)

    def claim(self, start: int, size: int, what: str) -> int:
        """Take [start, start + size) for `what`. Returns `start`; BootError when it is no RAM or taken."""
        claim = Claim(start, start + size, what)
        if size and not any(a <= start and start + size <= a + n for a, n in self.ranges):
            raise BootError(f"{claim} is not in guest RAM, which is {self._describe()}")
        for other in self.claims:
            if claim.start < other.end and other.start < claim.end:
                raise BootError(f"{claim} overlaps {other}")
        if size:
            self.claims.append(claim)
        return start

    def is_free(self, start: int, size: int) -> bool:
        """Whether all of [start, start + size) is RAM that nothing has claimed."""
        return any(a <= start and start + size <= b for a, b in self._free(self.claims))

    def lowest(
        self, size: int, what: str, *, start: int = 0, limit: int | None = None, align: int = PAGE
    ) -> int:
        """Claim the lowest free place in [start, limit). Returns its address; BootError when none fits."""
        for a, b in self._free([*self.claims, FIRMWARE_AREA]):
            at = align_up(max(a, start), align)
            if at + size <= (b if limit is None else min(b, limit)):
                return self.claim(at, size, what)
        raise BootError(self._no_room(size, what, start, limit))

    def highest(
        self, size: int, what: str, *, start: int = 0, limit: int | None = None, align: int = PAGE
    ) -> int:
        """Claim the highest free place in [start, limit). Returns its address; BootError when none fits."""
        for a, b in reversed(self._free([*self.claims, FIRMWARE_AREA])):
            at = ((b if limit is None else min(b, limit)) - size) // align * align
            if at >= max(a, start):
                return self.claim(at, size, what)
        raise BootError(self._no_room(size, what, start, limit))

    def near(self, preferred: int, size: int, what: str, *, limit: int | None = None) -> int:
        """Claim `preferred` when it is free, else the lowest free page. Returns the address."""
        if self.is_free(preferred, size):
            return self.claim(preferred, size, what)
        # Not page 0: real-mode code and the BIOS data area live there.
        return self.lowest(size, what, start=PAGE, limit=limit)

    def write(self, start: int, data: bytes | memoryview) -> None:
        """Write `data` at `start` on `commit()`; the place must have been claimed."""
        self._writes.append((start, data))

    def zero(self, start: int, size: int) -> None:
        """Fill `size` bytes from `start` with zeros on `commit()`, in the order of the calls."""
        if size:
            self._writes.append((start, size))

    def commit(self) -> None:
        """Write everything to guest memory."""
        for start, data in self._writes:
            if isinstance(data, int):
                self.memory.fill(start, data)
            elif len(data):
                self.memory.write(start, data)
        self._writes.clear()

    def _free(self, claims: list[Claim]) -> list[tuple[int, int]]:
        """The parts of RAM that none of `claims` has, as (start, end)."""
        free = []
        taken = sorted(claims)
        for start, size in self.ranges:
            at, end = start, start + size
            for claim in taken:
                if claim.end <= at or claim.start >= end:
                    continue
                if claim.start > at:
                    free.append((at, claim.start))
                at = claim.end
            if at < end:
                free.append((at, end))
        return free

    def _no_room(self, size: int, what: str, start: int, limit: int | None) -> str:
        where = f" from {start:#_x}" if start else ""
        where += f" below {limit:#_x}" if limit is not None else ""
        claims = ", ".join(str(c) for c in sorted(self.claims))
        taken = f" with {claims} in it" if claims else ""
        return f"{what}: {size:#x} bytes do not fit{where} in guest RAM, {self._describe()}{taken}"

    def _describe(self) -> str:
        ranges = ", ".join(f"[{start:#_x}, {start + size:#_x})" for start, size in self.ranges)
        return ranges or "none"
