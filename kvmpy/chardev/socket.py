# SPDX-License-Identifier: Apache-2.0
"""A serial line on a unix stream socket."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from pathlib import Path

from kvmpy.chardev.backend import Input
from kvmpy.chardev.pump import Pump
from kvmpy.errors import StateError


class Socket(Input):
    """`Socket.listen(path)` serves one client after the other, `Socket.connect(path)` is a client.

    Without a connection output is lost; a client that does not read has 1 MiB kept for it. A second client
    waits until the first one leaves. Raises OSError.
    """

    def __init__(self, connection: socket.socket | None = None) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._pump: Pump | None = None
        self._closed = False
        self._free = threading.Event()  # no client
        self._free.set()
        self._connected = threading.Condition(self._lock)
        self._server: _Server | None = None
        if connection is not None:
            self._take(connection)

    @classmethod
    def connect(cls, path: str | os.PathLike[str]) -> Socket:
        """Connect to the unix socket `path`."""
        client = socket.socket(socket.AF_UNIX)
        try:
            client.connect(os.fspath(path))
        except BaseException:
            client.close()
            raise
        return cls(client)

    @classmethod
    def listen(cls, path: str | os.PathLike[str]) -> Socket:
        """Make the unix socket `path`, which must not exist, and serve it; `close()` removes it."""
        backend = cls()
        backend._server = _Server(Path(path), backend)
        return backend

    @property
    def connected(self) -> bool:
        """True while somebody is at the other end."""
        return self._pump is not None

    def wait_connected(self, timeout: float | None = None) -> None:
        """Wait for a client, at most `timeout` seconds. Raises TimeoutError, StateError when closed."""
        with self._connected:
            if not self._connected.wait_for(lambda: self._closed or self._pump is not None, timeout):
                raise TimeoutError(f"nobody connected within {timeout} s")
            if self._closed:
                raise StateError("the socket is closed")

    def write(self, data: bytes) -> None:
        """Bytes from the guest; never blocks, lost when nobody is connected."""
        pump = self._pump
        if pump is not None:
            pump.send(data)

    def close(self) -> None:
        """Hang up and stop listening; again is no error."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            pump, self._pump = self._pump, None
            self._connected.notify_all()
        self._free.set()
        if self._server is not None:
            self._server.close()
        if pump is not None:
            pump.close()

    def _take(self, connection: socket.socket) -> None:
        with self._lock:
            if self._closed:
                connection.close()
                return
            self._free.clear()
            self._pump = Pump(connection.detach(), self.deliver, self._gone, "kvmpy socket")
            self._pump.start()  # now that an answer to the first input finds it
            self._connected.notify_all()

    def _gone(self) -> None:
        with self._lock:
            self._pump = None
        self._free.set()


class _Server:
    """The listening socket and the thread that accepts."""

    def __init__(self, path: Path, backend: Socket) -> None:
        self._path = path
        self._backend = backend
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.bind(os.fspath(path))
            self._socket.listen(1)
        except BaseException:
            self._socket.close()
            raise
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name=f"kvmpy {path}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        poll.register(self._socket, select.POLLIN)
        while True:
            self._backend._free.wait()
            if self._wake in dict(poll.poll()):
                return
            with contextlib.suppress(ConnectionAbortedError):
                connection, _ = self._socket.accept()
                self._backend._take(connection)

    def close(self) -> None:
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        os.close(self._wake)
        self._socket.close()
        self._path.unlink(missing_ok=True)
