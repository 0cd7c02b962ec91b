# SPDX-License-Identifier: Apache-2.0
"""Reset control register at 0xCF9 (Intel 82371SB PIIX3 data sheet, "RC - Reset Control Register").

It is also what an ACPI FADT names as RESET_REG, with RESET_VALUE 0x06.

The port lies inside the PCI address register 0xCF8, which takes 32-bit accesses only: a PCI host bridge
must pass byte accesses to 0xCF9 on to this device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from kvmpy.devices.base import ByteRegisters, GuestLog, StateReader

log = logging.getLogger("kvmpy.devices.reset_control")

HARD = 0x02              # SRST: which kind of reset bit 2 makes
TRIGGER = 0x04           # RCPU: 0 -> 1 resets
FULL = 0x08              # later chips: with a power cycle
KEPT = HARD | TRIGGER | FULL

ACPI_RESET_VALUE = HARD | TRIGGER


class ResetControl(ByteRegisters):
    """The register. A machine makes no difference between soft, hard and full reset.

    Args:
        on_reset: called, without locks, when the guest asks for a reset.
    """

    name = "reset-control"
    size = 1

    def __init__(self, on_reset: Callable[[], object] | None = None) -> None:
        self._on_reset = on_reset
        self._warn = GuestLog(log)
        self._value = 0

    def read_byte(self, offset: int) -> int:
        return self._value

    def write_byte(self, offset: int, value: int) -> None:
        before, self._value = self._value, value & KEPT
        if value & ~before & TRIGGER:
            if self._on_reset is None:
                self._warn("the guest asked for a reset and nobody is there to do it")
            else:
                self._on_reset()

    def reset(self) -> None:
        self._value = 0

    def save(self) -> dict[str, Any]:
        return {"version": 1, "value": self._value}

    def load(self, state: Mapping[str, Any]) -> None:
        s = StateReader(self.name, state)
        value = s.bits("value", KEPT)
        s.end()
        self._value = value
