# SPDX-License-Identifier: Apache-2.0
"""MSI-X (PCI 3.0, 6.8.2): a table of messages and a table of pending bits, both in a BAR."""

from __future__ import annotations

import logging
import struct
import threading
from typing import Any

from kvmpy.devices.base import GuestLog, StateReader, byte_lanes
from kvmpy.pci.msi import MsiLine, MsiSource

log = logging.getLogger("kvmpy.pci")

CAPABILITY = 0x11
ENTRY = 16
ADDRESS_LOW, ADDRESS_HIGH, DATA, CONTROL = range(4)  # the words of an entry (6.8.2.6 to 6.8.2.9)
MASKED = 1
FUNCTION_MASK, ENABLE = 1 << 14, 1 << 15  # of the capability's message control (6.8.2.3)
MASK32 = 0xFFFF_FFFF


class Msix:
    """The vectors of a function.

    count: how many, 1 to 2048. source: makes a line for each vector that is used. name: for messages.
    """

    def __init__(self, count: int, source: MsiSource, name: str) -> None:
        if not 1 <= count <= 2048:
            raise ValueError(f"{name}: MSI-X has 1 to 2048 vectors, not {count}")
        self.count = count
        self.name = name
        self._source = source
        self._lock = threading.Lock()
        self._lines: dict[int, MsiLine] = {}
        self._warn = GuestLog(log)
        self._clear()

    def _clear(self) -> None:
        self._control = 0
        self._words = [[0, 0, 0, MASKED] for _ in range(self.count)]
        self._pending: set[int] = set()
        self._routed: dict[int, tuple[int, int]] = {}  # what each vector's line sends now

    def capability(self, bar: int, table: int, pending: int) -> tuple[bytes, bytes]:
        """Body and writable bits of the capability; table, pending: offsets in the BAR."""
        body = struct.pack("<HII", self.count - 1, table | bar, pending | bar)
        return body, (FUNCTION_MASK | ENABLE).to_bytes(2, "little")

    @property
    def enabled(self) -> bool:
        """Does the function send messages instead of driving its pin?"""
        return bool(self._control & ENABLE)

    # -- software

    def set_control(self, control: int) -> None:
        """Software wrote message control."""
        with self._lock:
            self._control = control & (ENABLE | FUNCTION_MASK)
            for vector in range(self.count):
                self._changed(vector)

    def read_table(self, offset: int, size: int) -> int:
        """Read the table; words and pairs of words, others give 0 (6.8.2)."""
        vector, at = divmod(offset, ENTRY)
        if size not in (4, 8) or at % size or vector >= self.count:
            return 0
        words = self._words[vector]
        value = words[at // 4]
        return value if size == 4 else value | words[at // 4 + 1] << 32

    def write_table(self, offset: int, size: int, value: int) -> None:
        """Write the table, likewise."""
        vector, at = divmod(offset, ENTRY)
        if size not in (4, 8) or at % size or vector >= self.count:
            return
        with self._lock:
            for number in range(at // 4, (at + size) // 4):
                self._words[vector][number] = value & (MASKED if number == CONTROL else MASK32)
                value >>= 32
            self._words[vector][ADDRESS_LOW] &= ~3
            self._changed(vector)

    def read_pending(self, offset: int, size: int) -> int:
        """Read the pending bits."""
        with self._lock:
            bits = sum(1 << vector for vector in self._pending)
        return byte_lanes(bits, offset, size)

    def _open(self, vector: int) -> bool:
        masked = self._control & FUNCTION_MASK or self._words[vector][CONTROL] & MASKED
        return self.enabled and not masked

    def _changed(self, vector: int) -> None:
        """Something about this vector may have changed: route it, send what waits."""
        if self._open(vector) and self._route(vector) and vector in self._pending:
            self._pending.discard(vector)
            self._lines[vector].signal()

    def _route(self, vector: int) -> bool:
        low, high, data, _ = self._words[vector]
        message = (high << 32 | low, data)
        if self._routed.get(vector) == message:
            return True
        self._routed.pop(vector, None)
        try:
            if vector not in self._lines:
                self._lines[vector] = self._source.line()
            if self._lines[vector].route(*message):
                self._routed[vector] = message
                return True
            self._warn("%s: vector %d: no interrupt chip takes %#x at %#x", self.name, vector, data, message[0])
        except OSError as error:  # the host has no descriptors left; a guest must not stop its machine with that
            self._warn("%s: vector %d has no line: %s", self.name, vector, error)
        return False

    # -- the device

    def notify(self, vector: int) -> None:
        """Send a vector's message, or note that it is pending; from any thread."""
        if vector >= self.count:
            return
        with self._lock:
            if self._open(vector) and vector in self._routed:
                self._lines[vector].signal()
            else:
                self._pending.add(vector)

    # -- life and state

    def reset(self) -> None:
        """As after power-on; lines are kept for the next time."""
        with self._lock:
            self._clear()

    def close(self) -> None:
        """Close the lines."""
        with self._lock:
            while self._lines:
                self._lines.popitem()[1].close()
            self._clear()

    def save(self) -> dict[str, Any]:
        """The table and the pending bits; message control is in configuration space."""
        with self._lock:
            words = [word for entry in self._words for word in entry]
            return {"version": 1, "table": words, "pending": sorted(self._pending)}

    def check(self, state: dict[str, Any]) -> tuple[list[int], list[int]]:
        """The table and the pending vectors of a saved state. Raises ValueError."""
        reader = StateReader(f"{self.name}: MSI-X", state)
        table = reader.integers("table", 4 * self.count, MASK32)
        pending = reader.integers("pending", self.count, 0xFFF)
        reader.end()
        if len(table) != 4 * self.count or any(vector >= self.count for vector in pending):
            raise ValueError(f"{self.name}: the saved MSI-X table has {len(table)} words, pending are {pending[:8]}")
        return table, pending

    def load(self, checked: tuple[list[int], list[int]], control: int) -> None:
        """Take over what `check` gave, and message control."""
        table, pending = checked
        with self._lock:
            self._clear()
            for vector in range(self.count):
                low, high, data, mask = table[4 * vector : 4 * vector + 4]
                self._words[vector] = [low & ~3, high, data, mask & MASKED]
            self._pending = set(pending)
        self.set_control(control)
