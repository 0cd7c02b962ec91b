# SPDX-License-Identifier: Apache-2.0
"""How fast a disk or a network card may be."""

from __future__ import annotations

from dataclasses import dataclass, fields

from kvmpy.virtio._queue import Limiter


@dataclass(frozen=True, slots=True, kw_only=True)
class RateLimit:
    """Rates of a device; 0 means no limit.

    bytes_per_second, operations_per_second: averages; a disk's flushes and discards are operations without bytes, a
    card's operations are frames. burst_bytes, burst_operations: what may go through at once after a quiet time; 0: what
    the rate allows in a tenth of a second. A request larger than the burst is delayed, never refused.
    """

    bytes_per_second: int = 0
    operations_per_second: int = 0
    burst_bytes: int = 0
    burst_operations: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not 0 <= getattr(self, field.name) < 1 << 63:
                raise ValueError(f"{field.name}={getattr(self, field.name)} is no rate")
        if (self.burst_bytes and not self.bytes_per_second) or (
            self.burst_operations and not self.operations_per_second
        ):
            raise ValueError("a burst belongs to a rate: give the rate too")

    def apply(self, limiter: Limiter) -> None:
        """Set `limiter` to these rates; requests that wait look again when their time is over."""
        limiter.set(self.bytes_per_second, self.burst_bytes, self.operations_per_second, self.burst_operations)


NONE = RateLimit()
