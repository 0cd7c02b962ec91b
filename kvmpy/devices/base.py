# SPDX-License-Identifier: Apache-2.0
"""What devices have in common: byte-wide registers, windows, and the check of a saved state."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Protocol


class Registers(Protocol):
    """What a Window looks at."""

    name: str

    def read(self, offset: int, size: int) -> int: ...

    def write(self, offset: int, size: int, value: int) -> None: ...


class ByteRegisters:
    """A device whose registers are all 8 bits wide.

    The ISA bus splits a wider access into byte accesses, lowest address first; bytes past the last
    register belong to nobody: they read 0xFF and writes to them are lost.
    """

    name: str
    size: int

    def read_byte(self, offset: int) -> int:
        """Read the register at `offset` (0 <= offset < size)."""
        raise NotImplementedError

    def write_byte(self, offset: int, value: int) -> None:
        """Write `value` (0..255) to the register at `offset` (0 <= offset < size)."""
        raise NotImplementedError

    def read(self, offset: int, size: int) -> int:
        if size == 1 and 0 <= offset < self.size:
            return self.read_byte(offset)
        value = 0
        for i in range(size):
            byte = self.read_byte(offset + i) if 0 <= offset + i < self.size else 0xFF
            value |= byte << 8 * i
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        for i in range(size):
            if 0 <= offset + i < self.size:
                self.write_byte(offset + i, value >> 8 * i & 0xFF)


def byte_lanes(value: int, offset: int, size: int) -> int:
    """The `size` bytes at byte `offset` of a little-endian register that holds `value`."""
    return value >> 8 * offset & (1 << 8 * size) - 1


def merge_lanes(old: int, offset: int, size: int, value: int) -> int:
    """`old` with the `size` bytes at byte `offset` replaced by `value`; may be wider than `old`."""
    mask = (1 << 8 * size) - 1 << 8 * offset
    return old & ~mask | value << 8 * offset & mask


class GuestLog:
    """Warnings that a guest can cause: a bounded number of them, or it could fill the host's disk."""

    def __init__(self, log: logging.Logger, limit: int = 10) -> None:
        self._log = log
        self._left = limit

    def __call__(self, text: str, *args: object) -> None:
        if self._left > 0:
            self._left -= 1
            self._log.warning(text if self._left else f"{text} (this device logs no more)", *args)


class Window:
    """A part of a device's registers as a device of its own, for chips whose ports lie apart on the bus.

    It holds no state: the device behind it is what a machine resets, saves and loads.
    """

    def __init__(self, device: Registers, offset: int, size: int, name: str = "") -> None:
        self.device = device
        self.offset = offset
        self.size = size
        self.name = name or device.name

    def read(self, offset: int, size: int) -> int:
        return self.device.read(self.offset + offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self.device.write(self.offset + offset, size, value)

    def reset(self) -> None:
        """Nothing: see the class."""

    def save(self) -> dict[str, Any]:
        """An empty state: see the class."""
        return {"version": 1}

    def load(self, state: Mapping[str, Any]) -> None:
        StateReader(self.name, state).end()


class StateReader:
    """A saved state under examination: every getter checks type and range and raises ValueError.

    `load()` of a device reads everything first, calls `end()`, and only then changes itself, so that a
    refused state leaves it as it was.
    """

    def __init__(self, device: str, state: Mapping[str, Any], version: int = 1) -> None:
        self._device = device
        if not isinstance(state, Mapping):
            raise ValueError(f"{device}: the saved state is a {type(state).__name__}, not a mapping")
        self._state = dict(state)
        found = self._state.pop("version", None)
        if type(found) is not int or found != version:
            raise ValueError(f"{device}: saved state has version {found!r}, not {version}")

    def raw(self, key: str) -> Any:
        """Whatever is there: the caller checks it."""
        if key not in self._state:
            raise ValueError(f"{self._device}: saved state lacks {key!r}")
        return self._state.pop(key)

    def _wrong(self, key: str, value: object, wanted: str) -> ValueError:
        text = repr(value)
        return ValueError(f"{self._device}: saved {key!r} is {text[:60]}, should be {wanted}")

    def integer(self, key: str, low: int, high: int) -> int:
        """An int in low..high (both included)."""
        value = self.raw(key)
        if type(value) is not int or not low <= value <= high:
            raise self._wrong(key, value, f"an integer in {low}..{high}")
        return value

    def bits(self, key: str, mask: int) -> int:
        """An int that has no bit outside `mask`."""
        value = self.raw(key)
        if type(value) is not int or value & ~mask:
            raise self._wrong(key, value, f"an integer within the bits {mask:#x}")
        return value

    def u8(self, key: str) -> int:
        return self.bits(key, 0xFF)

    def flag(self, key: str) -> bool:
        value = self.raw(key)
        if type(value) is not bool:
            raise self._wrong(key, value, "True or False")
        return value

    def data(self, key: str, low: int, high: int) -> bytes:
        """Bytes, `low` to `high` of them."""
        value = self.raw(key)
        if type(value) is not bytes or not low <= len(value) <= high:
            raise self._wrong(key, value, f"{low}..{high} bytes")
        return value

    def integers(self, key: str, most: int, mask: int) -> list[int]:
        """A list of at most `most` ints without bits outside `mask`."""
        value = self.raw(key)
        if type(value) is not list or len(value) > most:
            raise self._wrong(key, value, f"a list of at most {most} integers")
        for item in value:
            if type(item) is not int or item & ~mask:
                raise self._wrong(key, item, f"integers within the bits {mask:#x}")
        return list(value)

    def optional_integer(self, key: str, low: int, high: int) -> int | None:
        """An int in low..high, or None."""
        if self._state.get(key, 0) is None:
            del self._state[key]
            return None
        return self.integer(key, low, high)

    def end(self) -> None:
        """Nothing else may be in the state."""
        if self._state:
            unknown = sorted(map(str, self._state))[:8]
            raise ValueError(f"{self._device}: saved state has unknown keys {unknown}")
