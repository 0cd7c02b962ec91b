# SPDX-License-Identifier: Apache-2.0
"""Console device, virtio 1.2 section 5.3: one port, or several with names (MULTIPORT).

Port n has a receive and a transmit queue: 0 and 1 for port 0, 2 and 3 for control messages, 4 and 5 for port 1, and so
on (5.3.2). Each port talks to a character back end of `kvmpy.chardev`, as a serial line does.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kvmpy.chardev import CharBackend
from kvmpy.devices.base import StateReader
from kvmpy.virtio._queue import IDLE, MORE
from kvmpy.virtio.device import VirtioDevice

# Features (5.3.3).
SIZE = 1 << 0
MULTIPORT = 1 << 1
EMERG_WRITE = 1 << 2

# Control messages (5.3.6.2).
DEVICE_READY, DEVICE_ADD, DEVICE_REMOVE, PORT_READY, CONSOLE_PORT, RESIZE, PORT_OPEN, PORT_NAME = range(8)

EMERGENCY_AT = 8  # offset of emerg_wr in the configuration space
MAX_PORTS = 31
MAX_INPUT = 1 << 20  # bytes that wait for a guest that does not read; what is beyond is dropped
MAX_CONTROL = 1024  # control messages that wait likewise
BATCH = 16
RX_CONTROL, TX_CONTROL = 2, 3


@dataclass
class Port:
    """One port: its back end, its name in the guest (/dev/virtio-ports/NAME), is it a console (hvc)."""

    backend: CharBackend
    name: str = ""
    console: bool = False
    guest_open: bool = field(default=False, init=False)
    added: bool = field(default=False, init=False)  # the driver knows of it
    waiting: bytearray = field(default_factory=bytearray, init=False, repr=False)


class ConsoleDevice(VirtioDevice):
    """A console, and ports for programs in the guest.

    ports: `Port`s; or one back end for a plain console (hvc0) without MULTIPORT. Back ends are closed with the
    device. columns, rows: the size of the terminal, told to the guest.
    """

    device_id = 3

    def __init__(
        self,
        ports: CharBackend | Sequence[Port],
        *,
        name: str = "console",
        columns: int = 0,
        rows: int = 0,
        threaded: bool = True,
    ) -> None:
        self._multiport = isinstance(ports, Sequence)
        self.ports = list(ports) if isinstance(ports, Sequence) else [Port(ports, console=True)]
        if not 1 <= len(self.ports) <= MAX_PORTS:
            raise ValueError(f"a console device has 1 to {MAX_PORTS} ports, not {len(self.ports)}")
        self.dropped = 0
        self._lock = threading.Lock()  # of `waiting` and `_messages`; back ends call from their own threads
        self._messages: list[bytes] = []
        self._emergency = 0
        features = EMERG_WRITE | (SIZE if columns else 0) | (MULTIPORT if self._multiport else 0)
        queues = 2 * len(self.ports) + 2 if self._multiport else 2
        config = struct.pack("<HHII", columns, rows, len(self.ports), 0)
        super().__init__(name, [64] * queues, features, config, threaded=threaded)
        for number, port in enumerate(self.ports):
            port.backend.attach(lambda data, number=number: self.receive(number, data))  # type: ignore[misc]

    # -- from the host

    def receive(self, number: int, data: bytes) -> None:
        """Input for port `number`; from any thread. What the guest does not take, up to 1 MiB, waits."""
        port = self.ports[number]
        with self._lock:
            room = MAX_INPUT - len(port.waiting)
            self.dropped += max(0, len(data) - room)
            port.waiting += data[:room]
        self.kick(_rx(number))

    def resize(self, columns: int, rows: int) -> None:
        """The terminal has another size now (SIZE, 5.3.4)."""
        if not 0 < columns < 1 << 16 or not 0 < rows < 1 << 16:
            raise ValueError(f"a terminal of {columns} by {rows} characters")
        self.put_config(0, struct.pack("<HH", columns, rows))
        if self.accepted(MULTIPORT):
            for number, port in enumerate(self.ports):
                if port.console and port.added:
                    # Rows first, as Linux and FreeBSD read it; 5.3.6.2 has columns first.
                    self._tell(number, RESIZE, 1, struct.pack("<HH", rows, columns))

    # -- queues

    def activated(self) -> None:
        """A driver without MULTIPORT has port 0 only, and it is open at once."""
        if not self.accepted(MULTIPORT):
            self.ports[0].guest_open = True

    def was_reset(self) -> None:
        """No port is known or open; input that waits is kept, as a terminal would."""
        with self._lock:
            self._messages.clear()
        for port in self.ports:
            port.guest_open = port.added = False

    def serve(self, index: int) -> int:
        """A batch of a port's queue or of a control queue."""
        if self._multiport and index in (RX_CONTROL, TX_CONTROL):
            return self._send_messages() if index == RX_CONTROL else self._take_messages()
        number = 0 if index < 2 else index // 2 - 1
        return self._output(index, self.ports[number]) if index & 1 else self._input(index, self.ports[number])

    def _input(self, index: int, port: Port) -> int:
        queue = self.queues[index]
        while True:
            with self._lock:
                if not port.waiting or not port.guest_open:
                    return IDLE
                chain = queue.pop()
                if chain is None:
                    return IDLE
                if chain.readable or not chain.writable:
                    queue.fail("a console input buffer that is not writable")
                    return IDLE
                del port.waiting[: chain.write(bytes(port.waiting[: chain.writable]))]
            queue.push(chain)

    def _output(self, index: int, port: Port) -> int:
        queue = self.queues[index]
        for _ in range(BATCH):
            chain = queue.pop()
            if chain is None:
                return IDLE
            at = 0
            while at < chain.readable:  # in pieces: a chain may have 4 GiB
                if not self._worker_of[index].running:
                    return IDLE
                data = chain.read(at, 1 << 16)
                port.backend.write(data)
                at += len(data)
            queue.push(chain)
        return MORE

    # -- control messages (5.3.6.2)

    def _tell(self, number: int, event: int, value: int, extra: bytes = b"") -> None:
        with self._lock:
            if len(self._messages) < MAX_CONTROL:
                self._messages.append(struct.pack("<IHH", number, event, value) + extra)
        self.kick(RX_CONTROL)

    def _send_messages(self) -> int:
        queue = self.queues[RX_CONTROL]
        while True:
            with self._lock:
                chain = queue.pop() if self._messages else None
                if chain is None:
                    return IDLE
                message = self._messages.pop(0)
                if chain.write(message) < len(message):
                    queue.fail("a control buffer that is too small")
                    return IDLE
            queue.push(chain)

    def _take_messages(self) -> int:
        queue = self.queues[TX_CONTROL]
        for _ in range(BATCH):
            chain = queue.pop()
            if chain is None:
                return IDLE
            message = chain.read(0, 8)
            if len(message) == 8:
                self._message(*struct.unpack("<IHH", message))
            queue.push(chain)
        return MORE

    def _message(self, number: int, event: int, value: int) -> None:
        if event == DEVICE_READY:
            if value == 1:
                for n, port in enumerate(self.ports):
                    port.added = True
                    self._tell(n, DEVICE_ADD, 1)
            return
        if number >= len(self.ports) or not self.ports[number].added:
            return
        port = self.ports[number]
        if event == PORT_READY and value == 1:
            if port.console:
                self._tell(number, CONSOLE_PORT, 1)
                columns, rows = struct.unpack_from("<HH", self._config)
                if columns:
                    self._tell(number, RESIZE, 1, struct.pack("<HH", rows, columns))
            if port.name:
                self._tell(number, PORT_NAME, 1, port.name.encode())
            self._tell(number, PORT_OPEN, 1)  # the host's end is always open
        elif event == PORT_OPEN:
            port.guest_open = value == 1
            self.kick(_rx(number))

    def write_config(self, offset: int, size: int, value: int) -> None:
        """EMERG_WRITE: a character for port 0 before queues exist (5.3.4)."""
        if offset == EMERGENCY_AT and size in (1, 2, 4):
            self.ports[0].backend.write(bytes([value & 0xFF]))

    # -- state

    def save_device(self) -> dict[str, Any]:
        """Which ports the driver knows and has open, messages and input that wait."""
        with self._lock:
            return {
                "version": 1,
                "added": [int(port.added) for port in self.ports],
                "open": [int(port.guest_open) for port in self.ports],
                "messages": b"".join(struct.pack("<H", len(m)) + m for m in self._messages),
                "waiting": b"".join(struct.pack("<I", len(p.waiting)) + bytes(p.waiting) for p in self.ports),
            }

    def load_device(self, state: dict[str, Any]) -> None:
        """Raises ValueError."""
        reader = StateReader(self.name, state)
        added = reader.integers("added", len(self.ports), 1)
        is_open = reader.integers("open", len(self.ports), 1)
        messages = _split(reader.data("messages", 0, MAX_CONTROL * 1024), 2)
        waiting = _split(reader.data("waiting", 0, (MAX_INPUT + 4) * MAX_PORTS), 4)
        reader.end()
        if not len(added) == len(is_open) == len(waiting) == len(self.ports) or len(messages) > MAX_CONTROL:
            raise ValueError(f"{self.name}: saved state is for another number of ports")
        with self._lock:
            self._messages = messages
            for port, a, o, data in zip(self.ports, added, is_open, waiting, strict=True):
                port.added, port.guest_open, port.waiting = bool(a), bool(o), bytearray(data[:MAX_INPUT])

    def stats(self) -> dict[str, Any]:
        """Live counters by name."""
        return {**super().stats(), "dropped": self.dropped}

    def close(self) -> None:
        """Stop and close the back ends."""
        super().close()
        for port in self.ports:
            port.backend.close()


def _rx(number: int) -> int:
    """The receive queue of a port (5.3.2)."""
    return 0 if number == 0 else 2 * number + 2


def _split(data: bytes, width: int) -> list[bytes]:
    """The pieces of a run of counted pieces. Raises ValueError."""
    pieces = []
    while data:
        size = int.from_bytes(data[:width], "little")
        if len(data) < width + size:
            raise ValueError("a saved list of console data is cut off")
        pieces.append(data[width : width + size])
        data = data[width + size :]
    return pieces
