# SPDX-License-Identifier: Apache-2.0
"""One thread per vCPU: start, pause, resume, kick, stop and join, from any thread.

A request is a word that the vCPU's own thread reads when it is kicked out of the guest; whoever changes the
word kicks. A kick cannot get lost: it sets `immediate_exit`, which KVM looks at on entry.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from enum import Enum

from kvmpy.errors import StateError
from kvmpy.vcpu.loop import Loop, Outcome


class State(Enum):
    """What a vCPU thread is doing; `STOPPED` is final."""

    NEW = "new"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"


class _Request(Enum):
    RUN = 0
    PAUSE = 1
    STOP = 2


class VcpuThread:
    """Runs one vCPU's loop in a thread of its own.

    `ended(thread, outcome, error)` is called in that thread when the loop is over: with an outcome, with the
    exception that ended it, or with neither when it was stopped.
    """

    def __init__(
        self,
        loop: Loop,
        changed: threading.Condition,
        ended: Callable[[VcpuThread, Outcome | None, BaseException | None], None],
    ) -> None:
        self.vcpu = loop.vcpu
        self.state = State.NEW
        self._loop = loop
        self._changed = changed  # shared by the VM's vCPUs; guards state and request
        self._ended = ended
        self._request = _Request.RUN
        # A daemon, so that a forgotten machine cannot keep the interpreter from exiting.
        self._thread = threading.Thread(target=self._main, name=f"vcpu{loop.vcpu.id}", daemon=True)

    def start(self, *, paused: bool = False) -> None:
        """Start the thread; with `paused` it waits for `resume()` before it enters the guest."""
        with self._changed:
            if self.state is not State.NEW:
                raise StateError(f"vCPU {self.vcpu.id} was started before")
            self.state = State.PAUSED if paused else State.RUNNING
            if paused and self._request is _Request.RUN:  # another vCPU may have stopped us already
                self._request = _Request.PAUSE
        self._thread.start()

    def pause(self, timeout: float | None = None) -> None:
        """Take the vCPU out of the guest and wait until it is out.

        Called from a handler, that is from this thread itself, it takes effect when the handler returns.
        Raises TimeoutError after `timeout` seconds (a handler that does not return).
        """
        self.request_pause()
        self.wait_paused(timeout)

    def request_pause(self) -> None:
        """Ask for a pause without waiting for it."""
        self._ask(_Request.PAUSE)

    def wait_paused(self, timeout: float | None = None) -> None:
        """Wait until the vCPU is out of the guest (at once from its own thread)."""
        if self.is_current():
            return
        out = (State.PAUSED, State.STOPPED, State.NEW)
        with self._changed:
            if not self._changed.wait_for(lambda: self.state in out, timeout):
                raise TimeoutError(f"vCPU {self.vcpu.id} did not pause within {timeout} s: a handler is busy")

    def resume(self) -> None:
        """Let a paused vCPU go on."""
        with self._changed:
            if self._request is _Request.PAUSE:
                self._request = _Request.RUN
                self._changed.notify_all()

    def kick(self) -> None:
        """Make the vCPU leave the guest once; it goes on by itself."""
        self.vcpu.kick()

    def stop(self) -> None:
        """Ask the thread to end after the present exit; `join()` waits for it."""
        self._ask(_Request.STOP)

    def join(self, timeout: float | None = None) -> None:
        """Wait for the thread to end. Raises TimeoutError after `timeout` seconds."""
        if self.is_current() or self._thread.ident is None:  # never started: Ctrl-C came before
            return
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"vCPU {self.vcpu.id} did not stop within {timeout} s: a handler is busy")

    def is_current(self) -> bool:
        """Whether the caller runs in this vCPU's thread."""
        return threading.current_thread() is self._thread

    def _ask(self, request: _Request) -> None:
        with self._changed:
            if self._request is not _Request.STOP:
                self._request = request
                self._changed.notify_all()
            running = self.state is State.RUNNING
        if running:
            with contextlib.suppress(StateError):  # closed since we looked: it runs no more
                self.vcpu.kick()

    def _main(self) -> None:
        outcome: Outcome | None = None
        error: BaseException | None = None
        try:
            while outcome is None:
                if self._request is not _Request.RUN and not self._obey():
                    break
                outcome = self._loop.run()
        except BaseException as e:  # whatever a handler raised comes out of wait()
            error = e
        with self._changed:
            self.state = State.STOPPED
            self._changed.notify_all()
        self._ended(self, outcome, error)

    def _obey(self) -> bool:
        """Sit out a pause. Returns whether to go on."""
        with self._changed:
            while self._request is _Request.PAUSE:
                self.state = State.PAUSED
                self._changed.notify_all()
                self._changed.wait()
            if self._request is _Request.STOP:
                return False
            self.state = State.RUNNING
            return True
