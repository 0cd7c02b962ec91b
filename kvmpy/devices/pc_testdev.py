# SPDX-License-Identifier: Apache-2.0
"""The device that hypervisor test programs talk to, laid out as QEMU's pc-testdev.

    ports 0xE0-0xE3      a 32-bit latch: what was written is read back, in pieces of any size
    ports 0xE4-0xE7      a write of a page's address asks the host to take that page away and give it back
    port  0xE8           the latch again, byte by byte (0xE9 and up stay the debug console's)
    ports 0x2000-0x2017  one interrupt line each: a write of not zero raises it, of zero lowers it
    0xFF00_0000, 64 KiB  memory that is a device: each access leaves the guest

It is for tests and in a machine only when asked for (`Config.testdev`, `kvmpy run --testdev`): a guest with it can
drive every interrupt line.

Not implemented: taking the page away (0xE4). How the host maps guest memory is invisible to the guest; the test
programs do it to force a page fault of the hypervisor at a moment of their choice. The write is accepted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any

from kvmpy.devices.base import ByteRegisters, StateReader, Window
from kvmpy.irq import IrqLine

LATCH_SIZE = 4
MEMORY_SIZE = 0x1_0000
LINES = 24


class TestLatch(ByteRegisters):
    """Four bytes that keep what is written."""

    name = "testdev-latch"
    size = LATCH_SIZE

    def __init__(self) -> None:
        self._bytes = bytearray(LATCH_SIZE)

    def read_byte(self, offset: int) -> int:
        return self._bytes[offset]

    def write_byte(self, offset: int, value: int) -> None:
        self._bytes[offset] = value

    def reset(self) -> None:
        self._bytes[:] = bytes(LATCH_SIZE)

    def save(self) -> dict[str, Any]:
        return {"version": 1, "data": bytes(self._bytes)}

    def load(self, state: Mapping[str, Any]) -> None:
        s = StateReader(self.name, state)
        data = s.data("data", LATCH_SIZE, LATCH_SIZE)
        s.end()
        self._bytes[:] = data


class TestFlush:
    """The port that takes a page's address; see the module for what it does not do. `page` is the last one."""

    name = "testdev-flush"
    size = 4

    def __init__(self) -> None:
        self.page = 0

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        if (offset, size) == (0, 4):
            self.page = value & 0xFFFF_F000

    def reset(self) -> None:
        self.page = 0

    def save(self) -> dict[str, Any]:
        return {"version": 1, "page": self.page}

    def load(self, state: Mapping[str, Any]) -> None:
        s = StateReader(self.name, state)
        page = s.bits("page", 0xFFFF_F000)
        s.end()
        self.page = page


class TestLines(ByteRegisters):
    """One port for each interrupt line, which shows the level last written."""

    name = "testdev-lines"

    def __init__(self, lines: Sequence[IrqLine]) -> None:
        self._lines = tuple(lines)
        self.size = len(self._lines)
        self._levels = [False] * self.size
        self._lock = Lock()

    def read_byte(self, offset: int) -> int:
        return int(self._levels[offset])

    def write_byte(self, offset: int, value: int) -> None:
        with self._lock:
            self._levels[offset] = bool(value)
            self._lines[offset].set(bool(value))

    def reset(self) -> None:
        self._drive([False] * self.size)

    def save(self) -> dict[str, Any]:
        with self._lock:
            return {"version": 1, "high": [n for n, level in enumerate(self._levels) if level]}

    def load(self, state: Mapping[str, Any]) -> None:
        s = StateReader(self.name, state)
        high = s.integers("high", self.size, 0xFF)
        s.end()
        if any(n >= self.size for n in high):
            raise ValueError(f"{self.name}: saved 'high' names a line that is not there ({self.size} lines)")
        self._drive([n in high for n in range(self.size)])

    def _drive(self, levels: list[bool]) -> None:
        with self._lock:
            # Only what changes: the pin may be shared with a device that holds it high.
            for line, before, level in zip(self._lines, self._levels, levels, strict=True):
                if level is not before:
                    line.set(level)
            self._levels = levels


class TestMemory:
    """Plain bytes behind a device window."""

    name = "testdev-memory"
    size = MEMORY_SIZE

    def __init__(self) -> None:
        self._bytes = bytearray(MEMORY_SIZE)

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(self._bytes[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
        end = min(offset + size, MEMORY_SIZE)
        self._bytes[offset:end] = data[: end - offset]

    def reset(self) -> None:
        self._bytes[:] = bytes(MEMORY_SIZE)

    def save(self) -> dict[str, Any]:
        return {"version": 1, "data": bytes(self._bytes)}

    def load(self, state: Mapping[str, Any]) -> None:
        s = StateReader(self.name, state)
        data = s.data("data", MEMORY_SIZE, MEMORY_SIZE)
        s.end()
        self._bytes[:] = data


class PcTestdev:
    """All of it: the board puts each part in its place.

    Args:
        lines: the interrupt lines 0, 1, ... (as many as the IOAPIC has pins: 24).
    """

    def __init__(self, lines: Sequence[IrqLine]) -> None:
        self.latch = TestLatch()
        self.latch_bytes = Window(self.latch, 0, 1, "testdev-latch-bytes")
        self.flush = TestFlush()
        self.lines = TestLines(lines)
        self.memory = TestMemory()
