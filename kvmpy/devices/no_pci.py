# SPDX-License-Identifier: Apache-2.0
"""Where PCI's configuration mechanism #1 would be, 0xCF8-0xCFF, on a machine without PCI.

A guest that looks for a host bridge writes 32 bits to 0xCF8 and reads all ones at 0xCFC. Only a byte access
to 0xCF9 means the reset control register inside the window (PCI Local Bus Specification 3.0, 3.2.2.3.2).
"""

from __future__ import annotations

from typing import Any

from kvmpy.devices.base import StateReader
from kvmpy.devices.reset_control import ResetControl

RESET = 1  # offset of 0xCF9


class NoPci:
    """The window; it holds no state but that of `reset_control`."""

    name = "no-pci"
    size = 8

    def __init__(self, reset_control: ResetControl) -> None:
        self._reset_control = reset_control

    def read(self, offset: int, size: int) -> int:
        if (offset, size) == (RESET, 1):
            return self._reset_control.read(0, 1)
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        if (offset, size) == (RESET, 1):
            self._reset_control.write(0, 1, value)

    def reset(self) -> None:
        self._reset_control.reset()

    def save(self) -> dict[str, Any]:
        return {"version": 1, "reset_control": self._reset_control.save()}

    def load(self, state: dict[str, Any]) -> None:
        inner = state.get("reset_control") if isinstance(state, dict) else None
        if not isinstance(inner, dict):
            raise ValueError(f"{self.name}: the saved state lacks that of the reset control register")
        StateReader(self.name, {key: value for key, value in state.items() if key != "reset_control"}).end()
        self._reset_control.load(inner)
