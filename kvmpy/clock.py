# SPDX-License-Identifier: Apache-2.0
"""Time as a parameter: devices ask a Clock, so that tests can turn it by hand."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

WALL_START = 1_577_836_800 * 10**9  # when deterministic machines begin: 2020-01-01, as in tcg/time.c


class Clock(Protocol):
    """Where a device gets its time from."""

    def monotonic_ns(self) -> int:
        """Nanoseconds since some fixed point; never goes back."""
        ...

    def wall_ns(self) -> int:
        """Nanoseconds since 1970-01-01 00:00 UTC."""
        ...


class HostClock:
    """The host's own clocks."""

    def monotonic_ns(self) -> int:
        return time.monotonic_ns()

    def wall_ns(self) -> int:
        return time.time_ns()


class GuestClock:
    """The time of a guest (`now`, in ns): for a deterministic machine, in which no device may look at the host."""

    def __init__(self, now: Callable[[], int]) -> None:
        self._now = now

    def monotonic_ns(self) -> int:
        return self._now()

    def wall_ns(self) -> int:
        return WALL_START + self.monotonic_ns()


class FakeClock:
    """A clock that stands still until `advance()`; for tests and replay."""

    def __init__(self, wall_ns: int = 0) -> None:
        self._start_wall = wall_ns
        self._now = 0

    def monotonic_ns(self) -> int:
        return self._now

    def wall_ns(self) -> int:
        return self._start_wall + self._now

    def advance(self, ns: int) -> None:
        """Turn the clock forward by `ns` nanoseconds."""
        if ns < 0:
            raise ValueError(f"time cannot go back: advance({ns})")
        self._now += ns
