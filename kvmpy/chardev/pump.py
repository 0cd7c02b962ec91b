# SPDX-License-Identifier: Apache-2.0
"""A thread that moves bytes to and from a descriptor, so that no vCPU waits for the other end."""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Callable

CHUNK = 4096
MAX_QUEUED = 1 << 20  # output that nobody takes; what is beyond is dropped


class Pump:
    """Reads `fd` and gives the bytes to `receive(data)`; writes what `send` queued.

    fd: becomes non-blocking and belongs to the pump, which begins with `start()`. eof(): called at the end
    of the thread unless `close` ended it: the other end hung up, or `receive` raised (`threading.excepthook`
    reports that). `dropped` counts output bytes that found 1 MiB waiting already.
    """

    def __init__(
        self, fd: int, receive: Callable[[bytes], object], eof: Callable[[], object], name: str
    ) -> None:
        self.dropped = 0
        self._fd = fd
        self._receive = receive
        self._eof = eof
        self._queue = bytearray()
        self._changed = threading.Condition()  # of the queue and of _stop
        self._stop = False
        os.set_blocking(fd, False)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin; from now on `receive` is called."""
        self._thread.start()

    def send(self, data: bytes) -> None:
        """Write `data` when the other end takes it; never blocks."""
        with self._changed:
            if self._stop:
                return
            room = max(0, MAX_QUEUED - len(self._queue))
            self.dropped += max(0, len(data) - room)
            first = not self._queue
            self._queue += data[:room]
            if first:
                # Usually there is room at once, and the thread need not wake up.
                self._flush()
                if self._queue:
                    os.eventfd_write(self._wake, 1)

    def _flush(self) -> None:
        # A broken connection shows up as the end of input, in the thread.
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            while self._queue:
                del self._queue[: os.write(self._fd, self._queue[:CHUNK])]
        self._changed.notify_all()

    def _run(self) -> None:
        try:
            self._move()
        finally:
            with self._changed:
                closed, self._stop = self._stop, True
                os.close(self._wake)
                os.close(self._fd)
                self._changed.notify_all()
            if not closed:
                self._eof()

    def _move(self) -> None:
        """Until the other end hangs up or `close`."""
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        while True:
            with self._changed:
                if self._stop:
                    return
                poll.register(self._fd, select.POLLIN | (select.POLLOUT if self._queue else 0))
            events = dict(poll.poll())
            if self._wake in events:
                os.eventfd_read(self._wake)
            got = events.get(self._fd, 0)
            if got & select.POLLOUT:
                with self._changed:
                    self._flush()
            if got & (select.POLLIN | select.POLLHUP | select.POLLERR):
                data = self._read()
                if data:
                    self._receive(data)
                elif data is not None:
                    return

    def _read(self) -> bytes | None:
        """Bytes, b"" at the end, None when there was nothing to read after all."""
        try:
            return os.read(self._fd, CHUNK)
        except BlockingIOError:
            return None
        except OSError:  # EIO of a pty, ECONNRESET of a socket: the other end is gone
            return b""

    def close(self, flush: float = 1.0) -> None:
        """Stop the thread and close the descriptor; waits up to `flush` seconds for output to be taken."""
        inside = threading.current_thread() is self._thread
        with self._changed:
            if not inside:
                self._changed.wait_for(lambda: self._stop or not self._queue, flush)
            if not self._stop:
                self._stop = True
                os.eventfd_write(self._wake, 1)
        if not inside:
            self._thread.join()
