# SPDX-License-Identifier: Apache-2.0
"""Several serial lines on one back end."""

from __future__ import annotations

import threading

from kvmpy.chardev.backend import CharBackend, Input
from kvmpy.chardev.escape import Escape


class Mux:
    """Shares `backend` among ports: all of them write to it, one of them has the keyboard.

    Ctrl-A C gives the keyboard to the next port (with one port: nothing). `current` is its name.
    """

    def __init__(self, backend: CharBackend) -> None:
        self._backend = backend
        self._ports: list[MuxPort] = []
        self._chosen = 0
        self._lock = threading.Lock()
        self._escape = Escape({"c": self.switch})
        backend.attach(self._input)

    def port(self, name: str) -> MuxPort:
        """A new back end on this one; the first has the keyboard."""
        port = MuxPort(name, self._backend)
        with self._lock:
            self._ports.append(port)
        return port

    @property
    def current(self) -> str:
        """The name of the port that has the keyboard, "" when there is none."""
        with self._lock:
            return self._ports[self._chosen].name if self._ports else ""

    def switch(self) -> None:
        """Give the keyboard to the next port."""
        with self._lock:
            if not self._ports:
                return
            before = self._chosen
            self._chosen = (before + 1) % len(self._ports)
            name = self._ports[self._chosen].name
        if self._chosen != before:
            self._backend.write(f"\r\n[{name}]\r\n".encode())

    def _input(self, data: bytes) -> None:
        self._escape.filter(data, self._emit)

    def _emit(self, data: bytes) -> None:
        with self._lock:
            port = self._ports[self._chosen] if self._ports else None
        if port is not None:
            port.deliver(data)

    def close(self) -> None:
        """Close the shared back end."""
        self._backend.close()


class MuxPort(Input):
    """One line of a `Mux`."""

    def __init__(self, name: str, backend: CharBackend) -> None:
        super().__init__()
        self.name = name
        self._backend = backend

    def write(self, data: bytes) -> None:
        """Bytes from the guest, to the shared back end."""
        self._backend.write(data)

    def close(self) -> None:
        """Nothing: the `Mux` closes the shared back end."""
