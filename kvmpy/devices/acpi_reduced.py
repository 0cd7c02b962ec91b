# SPDX-License-Identifier: Apache-2.0
"""Hardware-reduced ACPI: the sleep registers (ACPI 6.5, 4.8.4.7) and a generic event device's register
(5.6.9 "Interrupt-signaled ACPI events"), the counterparts of the fixed hardware in `acpi_pm`.

The event device (`ACPI0013` in the DSDT) has an interrupt and one 32-bit register that says what happened:
reading takes the events away, and the AML method _EVT does the rest.

Not implemented: sleep states other than S5; a guest that enters one wakes at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from threading import Lock
from typing import TYPE_CHECKING, Any

from kvmpy.devices.acpi_pm import S5_TYPE
from kvmpy.devices.base import ByteRegisters, GuestLog, StateReader

if TYPE_CHECKING:
    from kvmpy.irq import IrqLine

log = logging.getLogger("kvmpy.devices.acpi_reduced")

# Sleep registers: the FADT's SLEEP_CONTROL_REG and SLEEP_STATUS_REG.
SLEEP_CONTROL = 0
SLEEP_STATUS = 1
CONTROL_SLP_TYP = 0x1C
CONTROL_SLP_TYP_SHIFT = 2
CONTROL_SLP_EN = 0x20    # write only
STATUS_WAK = 0x80        # write one to clear

# Bits of the event register.
EVENT_POWER_BUTTON = 0x02
EVENT_SLEEP_BUTTON = 0x04


class SleepRegisters(ByteRegisters):
    """Sleep control and sleep status.

    Args:
        on_power_off: called, without locks, when the guest enters S5.
        s5_type: the SLP_TYP value that means S5 (0..7), as in the DSDT's \\_S5 package.
    """

    name = "acpi-sleep"
    size = 2

    def __init__(self, on_power_off: Callable[[], object] | None = None, s5_type: int = S5_TYPE) -> None:
        if not 0 <= s5_type <= 7:
            raise ValueError(f"SLP_TYP has three bits: {s5_type} does not fit")
        self._on_power_off = on_power_off
        self._s5_type = s5_type
        self._warn = GuestLog(log)
        self._lock = Lock()
        self._control = 0
        self._status = 0

    def read_byte(self, offset: int) -> int:
        with self._lock:
            return self._control if offset == SLEEP_CONTROL else self._status

    def write_byte(self, offset: int, value: int) -> None:
        with self._lock:
            if offset == SLEEP_STATUS:
                self._status &= ~value
                return
            self._control = value & CONTROL_SLP_TYP
            if not value & CONTROL_SLP_EN:
                return
            kind = self._control >> CONTROL_SLP_TYP_SHIFT
            if kind != self._s5_type:
                self._warn("sleep type %d does not exist here: the guest wakes at once", kind)
                self._status |= STATUS_WAK
                return
        if self._on_power_off is None:
            self._warn("the guest switched itself off and nobody is there to see it")
        else:
            self._on_power_off()

    def reset(self) -> None:
        with self._lock:
            self._control = self._status = 0

    def save(self) -> dict[str, Any]:
        with self._lock:
            return {"version": 1, "control": self._control, "status": self._status}

    def load(self, state: Mapping[str, Any]) -> None:
        s = StateReader(self.name, state)
        control, status = s.bits("control", CONTROL_SLP_TYP), s.bits("status", STATUS_WAK)
        s.end()
        with self._lock:
            self._control, self._status = control, status


class GenericEvents:
    """The register of the generic event device: which events are pending, taken away by reading.

    Args:
        irq: its interrupt (level triggered), high while something is pending.
    """

    name = "acpi-events"
    size = 4

    def __init__(self, irq: IrqLine) -> None:
        self._irq = irq
        self._lock = Lock()
        self._pending = 0

    def read(self, offset: int, size: int) -> int:
        if offset or size < 4:
            return 0             # a partial read could take events away unseen
        with self._lock:
            pending, self._pending = self._pending, 0
            self._irq.set(False)
        return pending

    def write(self, offset: int, size: int, value: int) -> None:
        """Read only."""

    def post(self, events: int) -> None:
        """Events have happened; bits of the register."""
        if events & ~0xFFFF_FFFF:
            raise ValueError(f"the event register has 32 bits: {events:#x}")
        with self._lock:
            self._pending |= events
            self._irq.set(self._pending != 0)

    def press_power_button(self) -> None:
        """The guest is asked to shut down; what it makes of that is its business."""
        self.post(EVENT_POWER_BUTTON)

    def press_sleep_button(self) -> None:
        """The guest is asked to go to sleep."""
        self.post(EVENT_SLEEP_BUTTON)

    def reset(self) -> None:
        with self._lock:
            self._pending = 0
            self._irq.set(False)

    def save(self) -> dict[str, Any]:
        with self._lock:
            return {"version": 1, "pending": self._pending}

    def load(self, state: Mapping[str, Any]) -> None:
        s = StateReader(self.name, state)
        pending = s.bits("pending", 0xFFFF_FFFF)
        s.end()
        with self._lock:
            self._pending = pending
            self._irq.set(pending != 0)
