# SPDX-License-Identifier: Apache-2.0
"""What a character device talks to."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

Receive = Callable[[bytes], object]

MAX_PENDING = 1 << 16  # input kept for a device that is not there yet


class CharBackend(Protocol):
    """The outside end of a serial line."""

    def write(self, data: bytes) -> None:
        """Bytes from the guest; called by vCPU threads."""
        ...

    def attach(self, receive: Receive) -> None:
        """From now on give input to `receive(data)`, from any thread; one receiver at a time."""
        ...

    def close(self) -> None:
        """Stop input and release what is open; again is no error."""
        ...


class Input:
    """The input half of a back end: hands bytes to the receiver, keeps what comes before there is one."""

    def __init__(self) -> None:
        self._receive: Receive | None = None
        self._pending = bytearray()
        self._order = threading.RLock()  # input must arrive in the order it came

    def attach(self, receive: Receive) -> None:
        """From now on give input to `receive(data)`, from any thread; first what came before."""
        with self._order:
            self._receive = receive
            if self._pending:
                pending, self._pending = bytes(self._pending), bytearray()
                receive(pending)

    def deliver(self, data: bytes) -> None:
        """Input from outside; without a receiver the first 64 KiB are kept."""
        with self._order:
            if self._receive is not None:
                self._receive(data)
            else:
                self._pending += data[: MAX_PENDING - len(self._pending)]
