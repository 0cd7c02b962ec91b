# SPDX-License-Identifier: Apache-2.0
"""ACPI fixed hardware: PM1 event and control block, PM timer, one general-purpose event block
(ACPI 6.5, 4.8.4 "Fixed Hardware Registers" and 4.8.5.1; the layout is that of Intel's PIIX4).

    +0x0  PM1_STS  2   +0x4  PM1_CNT  2   +0xC  GPE0_STS  2
    +0x2  PM1_EN   2   +0x8  PM_TMR   4   +0xE  GPE0_EN   2

Entering the S5 sleep state calls `on_power_off`; the power and sleep buttons, the PM timer's carry and the
general-purpose events drive the SCI.

Not implemented: the legacy mode (SCI_EN is always set, so a FADT must have SMI_CMD = 0); bus master and
global lock bits do nothing; the RTC's alarm is not wired to RTC_STS. No sleep state but S5: a guest that
enters another one wakes at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from threading import Lock
from typing import TYPE_CHECKING, Any

from kvmpy.clock import Clock
from kvmpy.devices.base import GuestLog, StateReader, byte_lanes, merge_lanes

if TYPE_CHECKING:
    from kvmpy.irq import IrqLine

log = logging.getLogger("kvmpy.devices.acpi_pm")

# Offsets, and with them the FADT's PM1a_EVT_BLK, PM1a_CNT_BLK, PM_TMR_BLK and GPE0_BLK.
PM1_EVT = 0x0
PM1_STS = 0x0
PM1_EN = 0x2
PM1_CNT = 0x4
PM_TMR = 0x8
GPE0 = 0xC
GPE0_STS = 0xC
GPE0_EN = 0xE

# PM1 status and enable (4.8.4.1): the same bits.
PM1_TMR = 0x0001         # the timer's top bit has changed
PM1_BM = 0x0010
PM1_GBL = 0x0020
PM1_PWRBTN = 0x0100
PM1_SLPBTN = 0x0200
PM1_RTC = 0x0400
PM1_WAK = 0x8000         # status only
STS_ALL = PM1_TMR | PM1_BM | PM1_GBL | PM1_PWRBTN | PM1_SLPBTN | PM1_RTC | PM1_WAK
EN_ALL = PM1_TMR | PM1_GBL | PM1_PWRBTN | PM1_SLPBTN | PM1_RTC

# PM1 control (4.8.4.2).
CNT_SCI_EN = 0x0001
CNT_BM_RLD = 0x0002
CNT_GBL_RLS = 0x0004     # write only
CNT_SLP_TYP = 0x1C00
CNT_SLP_TYP_SHIFT = 10
CNT_SLP_EN = 0x2000      # write only
CNT_KEPT = CNT_BM_RLD | CNT_SLP_TYP

TIMER_HZ = 3_579_545     # 4.8.4.3
SECOND_NS = 1_000_000_000
LONGEST_NS = 1 << 63     # of a saved running time

S5_TYPE = 5              # what the DSDT's \_S5 package must say


class AcpiPm:
    """The register block.

    Args:
        irq: the SCI (level triggered).
        clock: what the PM timer counts.
        on_power_off: called, without locks, when the guest enters S5.
        timer_bits: 24 or 32, as the FADT's TMR_VAL_EXT says.
        s5_type: the SLP_TYP value that means S5 (0..7).
    """

    name = "acpi-pm"
    size = 0x10

    _status: int
    _enable: int
    _control: int
    _gpe_status: int
    _gpe_enable: int

    def __init__(
        self,
        irq: IrqLine,
        clock: Clock,
        on_power_off: Callable[[], object] | None = None,
        timer_bits: int = 32,
        s5_type: int = S5_TYPE,
    ) -> None:
        if timer_bits not in (24, 32):
            raise ValueError(f"the PM timer has 24 or 32 bits, not {timer_bits}")
        if not 0 <= s5_type <= 7:
            raise ValueError(f"SLP_TYP has three bits: {s5_type} does not fit")
        self._irq = irq
        self._clock = clock
        self._on_power_off = on_power_off
        self._timer_bits = timer_bits
        self._s5_type = s5_type
        self._warn = GuestLog(log)
        self._lock = Lock()
        self.rearm: Callable[[], None] = lambda: None   # the timer service's hook
        self._start_ns = clock.monotonic_ns()           # when the timer was 0
        self._reset_registers()

    # The guest's side.

    def read(self, offset: int, size: int) -> int:
        ticks = self._ticks() & (1 << self._timer_bits) - 1
        if offset == PM_TMR and size == 4:
            return ticks          # a clock source is read often, and needs no lock
        with self._lock:
            self._catch_up()
            low = self._status | self._enable << 16 | (self._control | CNT_SCI_EN) << 32
            high = ticks | (self._gpe_status | self._gpe_enable << 16) << 32
        return byte_lanes(low | high << 64, offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        # All at once as one 16-byte register; `touched` has ones where the guest wrote.
        written = merge_lanes(0, offset, size, value)
        touched = merge_lanes(0, offset, size, -1)
        power_off = False
        with self._lock:
            self._catch_up()
            self._status &= ~(written & 0xFFFF)         # write one to clear
            self._gpe_status &= ~(written >> 96 & 0xFFFF)
            self._enable = _replace(self._enable, written >> 16, touched >> 16) & EN_ALL
            self._gpe_enable = _replace(self._gpe_enable, written >> 112, touched >> 112)
            self._control = _replace(self._control, written >> 32, touched >> 32) & CNT_KEPT
            if written >> 32 & CNT_SLP_EN:
                power_off = self._sleep()
            self._irq.set(self._level())
        self.rearm()
        if power_off:
            if self._on_power_off is None:
                self._warn("the guest switched itself off and nobody is there to see it")
            else:
                self._on_power_off()

    # The host's side.

    def press_power_button(self) -> None:
        """The guest is asked to shut down; what it makes of that is its business."""
        self._raise(PM1_PWRBTN)

    def press_sleep_button(self) -> None:
        """The guest is asked to go to sleep."""
        self._raise(PM1_SLPBTN)

    def raise_gpe(self, event: int) -> None:
        """General-purpose event 0..15 has happened."""
        if not 0 <= event <= 15:
            raise ValueError(f"the block has the events 0..15, not {event}")
        with self._lock:
            self._gpe_status |= 1 << event
            self._irq.set(self._level())

    def next_deadline_ns(self) -> int | None:
        """When the timer's carry raises the SCI (monotonic, ns); see kvmpy.devices.timers."""
        with self._lock:
            if self._status & PM1_TMR or not self._enable & PM1_TMR:
                return None
            half = 1 << self._timer_bits - 1
            ticks = (self._last_half + 1) * half
            return self._start_ns - (-ticks * SECOND_NS // TIMER_HZ)

    def tick(self) -> None:
        """Notice the timer's carry."""
        with self._lock:
            self._catch_up()
            self._irq.set(self._level())

    def reset(self) -> None:
        """Power-on state; the timer runs on, as nothing says where it starts."""
        with self._lock:
            self._reset_registers()
            self._irq.set(self._level())
        self.rearm()

    def save(self) -> dict[str, Any]:
        with self._lock:
            self._catch_up()
            return {
                "version": 1,
                "status": self._status,
                "enable": self._enable,
                "control": self._control,
                "gpe_status": self._gpe_status,
                "gpe_enable": self._gpe_enable,
                "elapsed_ns": self._clock.monotonic_ns() - self._start_ns,
            }

    def load(self, state: Mapping[str, Any]) -> None:
        s = StateReader(self.name, state)
        status, enable = s.bits("status", STS_ALL), s.bits("enable", EN_ALL)
        control = s.bits("control", CNT_KEPT)
        gpe_status, gpe_enable = s.bits("gpe_status", 0xFFFF), s.bits("gpe_enable", 0xFFFF)
        elapsed_ns = s.integer("elapsed_ns", 0, LONGEST_NS)
        s.end()
        with self._lock:
            self._status, self._enable, self._control = status, enable, control
            self._gpe_status, self._gpe_enable = gpe_status, gpe_enable
            self._start_ns = self._clock.monotonic_ns() - elapsed_ns
            self._last_half = self._halves()
            self._irq.set(self._level())
        self.rearm()

    # Registers; the lock is held from here on.

    def _reset_registers(self) -> None:
        self._status = self._enable = self._control = 0
        self._gpe_status = self._gpe_enable = 0
        self._last_half = self._halves()

    def _raise(self, bit: int) -> None:
        """Set a status bit; takes the lock."""
        with self._lock:
            self._status |= bit
            self._irq.set(self._level())

    def _sleep(self) -> bool:
        """SLP_EN was written; returns True when the machine goes off."""
        kind = (self._control & CNT_SLP_TYP) >> CNT_SLP_TYP_SHIFT
        if kind == self._s5_type:
            return True
        self._warn("sleep type %d does not exist here: the guest wakes at once", kind)
        self._status |= PM1_WAK
        return False

    def _ticks(self) -> int:
        """How far the timer has counted, without its width's limit."""
        return (self._clock.monotonic_ns() - self._start_ns) * TIMER_HZ // SECOND_NS

    def _halves(self) -> int:
        return self._ticks() >> self._timer_bits - 1

    def _catch_up(self) -> None:
        halves = self._halves()
        if halves != self._last_half:
            self._last_half = halves
            self._status |= PM1_TMR

    def _level(self) -> bool:
        return bool(self._status & self._enable or self._gpe_status & self._gpe_enable)


def _replace(old: int, written: int, touched: int) -> int:
    """A 16-bit register after a write to the bits in `touched`."""
    return (old & ~touched | written & touched) & 0xFFFF
