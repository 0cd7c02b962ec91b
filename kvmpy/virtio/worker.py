# SPDX-License-Identifier: Apache-2.0
"""The thread in which a device works: it sleeps in epoll until a kick or a descriptor of a back end wakes it."""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections.abc import Callable

log = logging.getLogger("kvmpy.virtio")

IN, OUT = select.EPOLLIN, select.EPOLLOUT


class Worker:
    """Calls functions when descriptors are ready, one at a time, in a thread between `start` and `stop`.

    name: of the thread. failed(error): a call raised; the thread goes on. threaded: False for tests and
    fuzzing: nothing happens but in `poll`, so that a run can be repeated exactly.
    """

    def __init__(self, name: str, failed: Callable[[BaseException], object], threaded: bool = True) -> None:
        self.threaded = threaded
        self.running = False
        self._name = name
        self._failed = failed
        self._calls: dict[int, Callable[[], object]] = {}
        self._later: dict[int, tuple[float, Callable[[], object]]] = {}
        self._thread: threading.Thread | None = None
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake, IN)

    def watch(self, fd: int, events: int, call: Callable[[], object]) -> None:
        """Call `call()` while `fd` has one of `events` (epoll bits); again changes the events."""
        if fd in self._calls:
            self._epoll.modify(fd, events)
        else:
            self._epoll.register(fd, events)
        self._calls[fd] = call

    def unwatch(self, fd: int) -> None:
        """No longer; unknown descriptors are ignored."""
        if self._calls.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def later(self, key: int, seconds: float, call: Callable[[], object]) -> None:
        """Call `call()` once after so many seconds, to a millisecond; in the worker. Again for `key` changes it."""
        self._later[key] = (time.monotonic() + seconds, call)

    def start(self) -> None:
        """Begin to serve; again is no error."""
        if self.running:
            return
        self.running = True
        if self.threaded:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Returns when no call runs and none will; a call may stop its own worker."""
        self.running = False
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            os.eventfd_write(self._wake, 1)
            thread.join()
            self._thread = None
        self._later.clear()  # whoever starts us again kicks every queue

    def poll(self, timeout: float = 0) -> bool:
        """Wait up to `timeout` seconds (-1: for ever) and make the calls that are due; were there any?"""
        if self._later:
            until = max(0.0, min(due for due, _ in self._later.values()) - time.monotonic())
            timeout = until if timeout < 0 else min(until, timeout)
        ready = self._epoll.poll(timeout)
        for fd, _ in ready:
            if fd == self._wake:
                os.eventfd_read(fd)
                continue
            call = self._calls.get(fd)
            if call is not None:
                self._do(call)
        return self._do_what_is_due() or bool(ready)

    def _do(self, call: Callable[[], object]) -> None:
        if not self.running:
            return
        try:
            call()
        except Exception as error:
            self._failed(error)

    def _do_what_is_due(self) -> bool:
        if not self._later:
            return False
        now = time.monotonic()
        due = [key for key, (when, _) in self._later.items() if when <= now]
        for key in due:
            entry = self._later.pop(key, None)
            if entry is not None:  # a call before it may have stopped us
                self._do(entry[1])
        return bool(due)

    def _run(self) -> None:
        while self.running:
            self.poll(-1)

    def close(self) -> None:
        """Stop and release the descriptors; again is no error."""
        self.stop()
        if not self._epoll.closed:
            self._epoll.close()
            os.close(self._wake)
