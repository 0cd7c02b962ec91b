# SPDX-License-Identifier: Apache-2.0
"""The thread that calls devices when their time has come.

Devices own no thread. One that has something to do at a later time offers two methods, and calls
`rearm()` whenever its answer to the first may have become earlier:

    next_deadline_ns() -> int | None   the monotonic time of its clock at which tick() is due, or None
    tick() -> None                     bring the registers up to date with the clock, then the pin

`Timers` asks all of them, sleeps until the earliest deadline, and calls tick(). Without its thread,
`run_due()` does one round by hand: that is how tests and replays with a FakeClock drive devices.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from threading import Condition, Thread, current_thread
from typing import Protocol

from kvmpy.clock import Clock
from kvmpy.errors import StateError

log = logging.getLogger("kvmpy.devices.timers")

# Deadlines may rest on the wall clock, which can be set while we sleep: look again after this time.
LONGEST_SLEEP_NS = 10_000_000_000


class TimedDevice(Protocol):
    """A device that wants to be called later."""

    name: str
    rearm: Callable[[], None]

    def next_deadline_ns(self) -> int | None: ...

    def tick(self) -> None: ...


class Timers:
    """Calls `tick()` of its devices when they are due.

    Args:
        clock: the clock that the devices were given.
        failed: called in the timer thread, once, with an exception that a device let escape; the thread
            ends after that. Without it the exception is logged.
    """

    def __init__(self, clock: Clock, failed: Callable[[BaseException], None] | None = None) -> None:
        self._clock = clock
        self._failed = failed
        self._devices: list[TimedDevice] = []
        self._changed = Condition()
        self._news = False
        self._stopping = False
        self._thread: Thread | None = None

    def add(self, device: TimedDevice) -> None:
        """Look after `device`; takes over its `rearm` hook."""
        with self._changed:
            if any(device is d for d in self._devices):
                raise ValueError(f"{device.name} is already among the timed devices")
            self._devices.append(device)
        device.rearm = self.wake
        self.wake()

    def wake(self) -> None:
        """A deadline has changed: compute the sleep anew."""
        with self._changed:
            self._news = True
            self._changed.notify()

    def run_due(self) -> int | None:
        """Call tick() of every device that is due; returns the earliest deadline left (ns), or None."""
        with self._changed:
            devices = list(self._devices)
        now = self._clock.monotonic_ns()
        earliest: int | None = None
        for device in devices:
            deadline = device.next_deadline_ns()
            if deadline is not None and deadline <= now:
                device.tick()
                deadline = device.next_deadline_ns()
            if deadline is not None and (earliest is None or deadline < earliest):
                earliest = deadline
        return earliest

    def start(self) -> None:
        """Start the thread. A stopped service can be started again (pause and resume of a machine)."""
        with self._changed:
            if self._thread is not None:
                raise StateError("the timer thread is already running")
            self._stopping = False
            self._news = False
            self._thread = Thread(target=self._run, name="kvmpy-timers", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Stop the thread and wait for it; harmless when there is none."""
        with self._changed:
            thread = self._thread
            self._stopping = True
            self._changed.notify()
        if thread is not None and thread is not current_thread():
            thread.join()
        with self._changed:
            if self._thread is thread:
                self._thread = None

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._stopping:
                    return
                self._news = False
            try:
                earliest = self.run_due()
            except BaseException as error:
                if self._failed is None:
                    log.exception("a timed device failed; no device is called any more")
                else:
                    self._failed(error)
                return
            with self._changed:
                if self._news or self._stopping:
                    continue
                if earliest is None:
                    self._changed.wait()
                else:
                    left = min(earliest - self._clock.monotonic_ns(), LONGEST_SLEEP_NS)
                    if left > 0:
                        self._changed.wait(left / 1e9)
