# SPDX-License-Identifier: Apache-2.0
"""The port and memory buses: which device answers at which address.

An access that fits into what one owner claimed is one call to it. One that does not fit, because it runs over
the end or begins before the claim, is split into bytes and each byte goes to its owner, as a bridge does it.
Where nobody answers, reads give all ones and writes go nowhere, as on a PC; `Bus.unclaimed` counts them.

Threads: vCPUs read and write at once; the table of claims is replaced, never changed, so they take no lock. A
device that has state locks for itself.
"""

from __future__ import annotations

import logging
import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal, Protocol

from kvmpy.errors import OverlapError

log = logging.getLogger(__name__)

Read = Callable[[int, int], int]          # read(offset, size) -> value
Write = Callable[[int, int, int], object]  # write(offset, size, value)

KINDS = {"pio": 1 << 16, "mmio": 1 << 64}
MASK = tuple((1 << 8 * size) - 1 for size in range(9))  # by size in bytes

# A guest chooses the addresses, so what is kept per address is bounded.
MAX_CACHED = 4096
MAX_LOGGED = 1024


class Device(Protocol):
    """Registers plus an interrupt pin; it knows no base address, no engine and no thread."""

    @property
    def name(self) -> str:
        """For messages and state files."""
        ...

    @property
    def size(self) -> int:
        """Bytes of address space."""
        ...

    def read(self, offset: int, size: int) -> int:
        """The value of `size` (1 to 8) bytes at `offset`; bits above them are ignored."""
        ...

    def write(self, offset: int, size: int, value: int) -> None:
        """Write `size` (1 to 8) bytes at `offset`."""
        ...

    def reset(self) -> None:
        """Go to the state after power-on."""
        ...

    def save(self) -> dict[str, Any]:
        """The state as ints, bytes, lists and dicts, with a "version"."""
        ...

    def load(self, state: dict[str, Any]) -> None:
        """Take over a saved state, which is untrusted. Raises ValueError."""
        ...


class Claim:
    """Who answers for [base, end); `read` or `write` is None where that direction is not claimed."""

    __slots__ = ("base", "device", "end", "owner", "read", "write")

    def __init__(
        self, base: int, size: int, owner: str, read: Read | None, write: Write | None, device: Device | None
    ) -> None:
        self.base = base
        self.end = base + size
        self.owner = owner
        self.read = read
        self.write = write
        self.device = device

    @property
    def size(self) -> int:
        """Bytes claimed."""
        return self.end - self.base

    def __repr__(self) -> str:
        ways = ("r" if self.read else "") + ("w" if self.write else "")
        return f"<Claim [{self.base:#_x}, {self.end:#_x}) {ways} {self.owner}>"


class _Lane:
    """The claims of one direction, sorted; immutable but for the cache in front of them."""

    __slots__ = ("cache", "claims", "starts")

    def __init__(self, claims: tuple[Claim, ...] = ()) -> None:
        self.claims = tuple(sorted(claims, key=lambda claim: claim.base))
        self.starts = tuple(claim.base for claim in self.claims)
        # address -> (the owner's callable, offset, bytes up to the end but at most 8)
        self.cache: dict[int, tuple[Callable[..., Any], int, int]] = {}

    def find(self, addr: int) -> Claim | None:
        index = bisect_right(self.starts, addr) - 1
        if index >= 0 and addr < self.claims[index].end:
            return self.claims[index]
        return None

    def any_in(self, start: int, end: int) -> Claim | None:
        """A claim that has an address in [start, end)."""
        index = bisect_right(self.starts, end - 1) - 1
        if index >= 0 and start < self.claims[index].end:
            return self.claims[index]
        return None

    def remember(self, addr: int, call: Callable[..., Any], claim: Claim) -> None:
        if len(self.cache) >= MAX_CACHED:
            self.cache.clear()
        self.cache[addr] = (call, addr - claim.base, min(claim.end - addr, 8))


class Bus:
    """An address space of devices: `Bus("pio")`, 64 Ki ports, or `Bus("mmio")`, guest physical addresses."""

    def __init__(self, kind: Literal["pio", "mmio"]) -> None:
        if kind not in KINDS:
            raise ValueError(f'a bus is "pio" or "mmio", not {kind!r}')
        self.kind = kind
        self.end = KINDS[kind]
        self.unclaimed: Counter[int] = Counter()  # by address, for the first MAX_LOGGED addresses
        self.unclaimed_total = 0
        self._reads = _Lane()
        self._writes = _Lane()
        self._lock = threading.Lock()  # held by who changes the table and who counts, not during calls

    # -- who is there

    def add(self, base: int, device: Device, size: int | None = None) -> Claim:
        """Put `device` at [base, base + size) for reads and writes; size: bytes, default `device.size`.

        The same device may be added at several addresses. Raises OverlapError naming both owners, ValueError.
        """
        span = device.size if size is None else size
        return self._claim(Claim(base, span, device.name, device.read, device.write, device))

    def claim(
        self, base: int, size: int, owner: str, *, read: Read | None = None, write: Write | None = None
    ) -> Claim:
        """Let functions answer for [base, base + size): read(offset, size) and write(offset, size, value).

        A direction that is None stays free for another owner. owner: a name for messages. The result goes to
        `release`. Raises OverlapError naming both owners, ValueError.
        """
        if read is None and write is None:
            raise ValueError(f"{owner}: a claim needs read, write or both")
        return self._claim(Claim(base, size, owner, read, write, None))

    def _claim(self, new: Claim) -> Claim:
        if new.size <= 0 or new.base < 0 or new.end > self.end:
            raise ValueError(
                f"{new.owner}: [{new.base:#_x}, {new.end:#_x}) is not in [0, {self.end:#_x}) of {self.kind}"
            )
        with self._lock:
            for lane, wanted in ((self._reads, new.read), (self._writes, new.write)):
                old = lane.any_in(new.base, new.end) if wanted is not None else None
                if old is not None:
                    way = "reads" if lane is self._reads else "writes"
                    raise OverlapError(
                        f"{self.kind} {way} at [{new.base:#_x}, {new.end:#_x}) for {new.owner}: "
                        f"[{old.base:#_x}, {old.end:#_x}) belongs to {old.owner}"
                    )
            if new.read is not None:
                self._reads = _Lane((*self._reads.claims, new))
            if new.write is not None:
                self._writes = _Lane((*self._writes.claims, new))
        return new

    def release(self, claim: Claim) -> None:
        """Give up what `add` or `claim` returned. Raises ValueError when it is not on this bus."""
        if not self._drop(lambda other: other is claim):
            raise ValueError(f"{claim!r} is not on the {self.kind} bus")

    def remove(self, device: Device) -> None:
        """Take `device` away from everywhere it was added. Raises ValueError when it is not on this bus."""
        if not self._drop(lambda other: other.device is device):
            raise ValueError(f"{device.name} is not on the {self.kind} bus")

    def _drop(self, gone: Callable[[Claim], bool]) -> bool:
        with self._lock:
            before = len(self._reads.claims) + len(self._writes.claims)
            self._reads = _Lane(tuple(claim for claim in self._reads.claims if not gone(claim)))
            self._writes = _Lane(tuple(claim for claim in self._writes.claims if not gone(claim)))
            return len(self._reads.claims) + len(self._writes.claims) < before

    def entries(self) -> list[Claim]:
        """All claims by rising address."""
        return sorted({*self._reads.claims, *self._writes.claims}, key=lambda claim: (claim.base, claim.end))

    def at(self, addr: int) -> tuple[Claim | None, Claim | None]:
        """Who answers a read and who a write of the byte at `addr`."""
        return self._reads.find(addr), self._writes.find(addr)

    # -- accesses

    def read(self, addr: int, size: int) -> int:
        """What a read of `size` (1 to 8) bytes at `addr` gives; all ones where nobody answers.

        What the device raises comes out of here.
        """
        lane = self._reads
        hit = lane.cache.get(addr)
        if hit is not None and 0 < size <= hit[2]:
            value: int = hit[0](hit[1], size)
            return value & MASK[size]
        self._check(addr, size)
        claim = lane.find(addr)
        if claim is not None and addr + size <= claim.end:
            assert claim.read is not None
            lane.remember(addr, claim.read, claim)
            return claim.read(addr - claim.base, size) & MASK[size]
        if size > 1 and lane.any_in(addr, addr + size) is not None:
            return sum(self.read((addr + i) % self.end, 1) << 8 * i for i in range(size))
        self._missed("read", addr, size)
        return MASK[size]

    def write(self, addr: int, size: int, value: int) -> None:
        """Write the low `size` (1 to 8) bytes of `value` at `addr`; goes nowhere where nobody answers."""
        lane = self._writes
        hit = lane.cache.get(addr)
        if hit is not None and 0 < size <= hit[2]:
            hit[0](hit[1], size, value & MASK[size])
            return
        self._check(addr, size)
        claim = lane.find(addr)
        if claim is not None and addr + size <= claim.end:
            assert claim.write is not None
            lane.remember(addr, claim.write, claim)
            claim.write(addr - claim.base, size, value & MASK[size])
        elif size > 1 and lane.any_in(addr, addr + size) is not None:
            for i in range(size):
                self.write((addr + i) % self.end, 1, value >> 8 * i)
        else:
            self._missed("write", addr, size)

    def _check(self, addr: int, size: int) -> None:
        if not 1 <= size <= 8:
            raise ValueError(f"a bus access has 1 to 8 bytes, not {size}")
        if not 0 <= addr < self.end:
            raise ValueError(f"{addr:#_x} is not an address of the {self.kind} bus")

    def _missed(self, way: str, addr: int, size: int) -> None:
        with self._lock:
            self.unclaimed_total += 1
            first = addr not in self.unclaimed
            if first and len(self.unclaimed) >= MAX_LOGGED:
                return
            self.unclaimed[addr] += 1
        if first:
            log.info("%s %s of %d byte(s) at %#x: nobody answers", self.kind, way, size, addr)

    def __repr__(self) -> str:
        return f"<Bus {self.kind} {len(self.entries())} claims>"
