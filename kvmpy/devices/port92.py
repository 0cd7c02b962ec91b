# SPDX-License-Identifier: Apache-2.0
"""System control port A at 0x92: fast A20 and fast reset (IBM PS/2 Hardware Interface Technical
Reference, "System Control Port A").

Not implemented: the A20 bit moves no address line (KVM has none): it is kept and read back. The security
lock, watchdog and activity light bits read 0.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from kvmpy.devices.base import ByteRegisters, GuestLog, StateReader

log = logging.getLogger("kvmpy.devices.port92")

RESET = 0x01             # 0 -> 1 resets the processor
A20 = 0x02

INITIAL = A20


class Port92(ByteRegisters):
    """The port.

    Args:
        on_reset: called, without locks, when the guest asks for a reset.
    """

    name = "port92"
    size = 1

    def __init__(self, on_reset: Callable[[], object] | None = None) -> None:
        self._on_reset = on_reset
        self._warn = GuestLog(log)
        self._value = INITIAL

    @property
    def a20(self) -> bool:
        """What the guest set the A20 gate to (which moves nothing)."""
        return bool(self._value & A20)

    def read_byte(self, offset: int) -> int:
        return self._value

    def write_byte(self, offset: int, value: int) -> None:
        before, self._value = self._value, value & (A20 | RESET)
        if value & ~before & RESET:
            if self._on_reset is None:
                self._warn("the guest asked for a reset and nobody is there to do it")
            else:
                self._on_reset()

    def reset(self) -> None:
        self._value = INITIAL

    def save(self) -> dict[str, Any]:
        return {"version": 1, "value": self._value}

    def load(self, state: Mapping[str, Any]) -> None:
        s = StateReader(self.name, state)
        value = s.bits("value", A20 | RESET)
        s.end()
        self._value = value
