# SPDX-License-Identifier: Apache-2.0
"""Debug console: a port whose written bytes are text for the host (Bochs' port 0xE9, SeaBIOS's 0x402).

A read gives 0xE9, by which a guest learns that the port exists.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from kvmpy.devices.base import ByteRegisters, StateReader

PRESENT = 0xE9


class CharSink(Protocol):
    """Where bytes go: a character back end or anything that writes."""

    def write(self, data: bytes) -> object: ...


class DebugCon(ByteRegisters):
    """One debug console.

    Args:
        out: where the bytes go; None: nowhere.
    """

    size = 1

    def __init__(self, out: CharSink | None = None, name: str = "debugcon") -> None:
        self.name = name
        self._out = out

    def read_byte(self, offset: int) -> int:
        return PRESENT

    def write_byte(self, offset: int, value: int) -> None:
        if self._out is not None:
            self._out.write(bytes((value,)))

    def reset(self) -> None:
        """There is nothing to reset."""

    def save(self) -> dict[str, Any]:
        return {"version": 1}

    def load(self, state: Mapping[str, Any]) -> None:
        StateReader(self.name, state).end()
