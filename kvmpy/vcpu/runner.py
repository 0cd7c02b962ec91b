# SPDX-License-Identifier: Apache-2.0
"""All vCPUs of a VM as one: start, pause, resume, stop, and the outcome of the run.

A run ends when a vCPU ends it (an outcome other than "halted", or an exception), when the host stops it, or
when every vCPU has halted. The first outcome or exception wins.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence

from kvmpy.errors import StateError
from kvmpy.vcpu.loop import Loop, Outcome
from kvmpy.vcpu.thread import State, VcpuThread

log = logging.getLogger("kvmpy.vcpu")
LOOK = 0.5  # seconds: Python does not see a signal that comes just before it waits for a lock, or to another thread


class Runner:
    """One run of a VM: its vCPU threads from start to outcome."""

    def __init__(self, loops: Sequence[Loop]) -> None:
        if not loops:
            raise StateError("the VM has no vCPU to run; create one with vm.create_vcpu()")
        self._changed = threading.Condition()
        self.threads = [VcpuThread(loop, self._changed, self._vcpu_ended) for loop in loops]
        self._running = len(self.threads)  # in their loops
        self._live = len(self.threads)  # threads not yet ended
        self._outcome: Outcome | None = None
        self._error: BaseException | None = None
        self._callbacks: list[Callable[[], None]] = []

    @property
    def done(self) -> bool:
        """Whether every vCPU thread has ended."""
        return self._live == 0

    @property
    def state(self) -> State:
        """The state of the whole: PAUSED when no vCPU runs and one is paused."""
        states = {thread.state for thread in self.threads}
        for state in (State.NEW, State.RUNNING, State.PAUSED):
            if state in states:
                return state
        return State.STOPPED

    def start(self, *, paused: bool = False) -> None:
        """Start every vCPU's thread."""
        for thread in self.threads:
            thread.start(paused=paused)

    def pause(self, timeout: float | None = None) -> None:
        """Take all vCPUs out of the guest; returns when all are out (but for the calling one)."""
        for thread in self.threads:
            thread.request_pause()
        for thread in self.threads:
            thread.wait_paused(timeout)

    def resume(self) -> None:
        """Let all vCPUs go on."""
        for thread in self.threads:
            thread.resume()

    def stop(self, outcome: Outcome | None = None) -> None:
        """End the run with `outcome` (default "stopped"), if nothing ended it before. Does not wait."""
        with self._changed:
            if self._live and self._outcome is None and self._error is None:
                self._outcome = outcome or Outcome("stopped")
        for thread in self.threads:
            thread.stop()

    def wait(self, timeout: float | None = None) -> Outcome:
        """Wait for the end of the run and return its outcome.

        Raises what a handler or device raised, GuestError when the guest died, TimeoutError after `timeout`
        seconds (the run goes on), KeyboardInterrupt on Ctrl-C (the run is stopped first).
        """
        if any(thread.is_current() for thread in self.threads):
            raise StateError("wait() in a vCPU's own thread would never return; return an Outcome instead")
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        try:
            with self._changed:
                while self._live:
                    left = deadline - time.monotonic()
                    if left <= 0:
                        raise TimeoutError(f"the guest is still running after {timeout} s")
                    self._changed.wait(min(left, LOOK))
        except KeyboardInterrupt:
            self.stop()
            self.join(timeout=5)
            raise
        if self._error is not None:
            raise self._error
        assert self._outcome is not None
        return self._outcome

    def join(self, timeout: float | None = None) -> None:
        """Wait until all threads have ended, whatever the outcome."""
        for thread in self.threads:
            thread.join(timeout)

    def add_done_callback(self, callback: Callable[[], None]) -> None:
        """Call `callback()` once, in some thread, when the run is over (at once if it is)."""
        with self._changed:
            if self._live:
                self._callbacks.append(callback)
                return
        callback()

    def _vcpu_ended(self, thread: VcpuThread, outcome: Outcome | None, error: BaseException | None) -> None:
        halted = outcome is not None and outcome.reason == "halted"
        with self._changed:
            decided = self._outcome is not None or self._error is not None
            self._running -= 1
            last = self._running == 0
            if not decided and error is not None:
                self._error = error
            elif not decided and outcome is not None and (last or not halted):
                self._outcome = outcome
            elif not decided and last:
                self._outcome = Outcome("stopped")
            elif error is not None:
                log.error("vCPU %d failed after the run was over", thread.vcpu.id, exc_info=error)
            decided = self._outcome is not None or self._error is not None
        if decided:
            for other in self.threads:
                other.stop()
        with self._changed:
            self._live -= 1
            callbacks = self._callbacks if self._live == 0 else []
            self._changed.notify_all()
        for callback in callbacks:
            callback()
