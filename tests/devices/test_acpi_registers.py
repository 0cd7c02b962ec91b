# SPDX-License-Identifier: Apache-2.0
"""ACPI fixed and reduced hardware."""

from __future__ import annotations

import pytest

from kvmpy.clock import FakeClock
from kvmpy.devices import AcpiPm, GenericEvents, SleepRegisters, Timers
from kvmpy.devices.acpi_pm import (
    CNT_SCI_EN,
    CNT_SLP_EN,
    CNT_SLP_TYP_SHIFT,
    GPE0_EN,
    GPE0_STS,
    PM1_CNT,
    PM1_EN,
    PM1_PWRBTN,
    PM1_SLPBTN,
    PM1_STS,
    PM1_TMR,
    PM1_WAK,
    PM_TMR,
    TIMER_HZ,
)
from kvmpy.irq import NullLine

SECOND = 1_000_000_000


class Pc:
    def __init__(self, timer_bits=32):
        self.clock = FakeClock()
        self.irq = NullLine()
        self.offs = 0
        self.pm = AcpiPm(self.irq, self.clock, self.off, timer_bits=timer_bits)

    def off(self):
        self.offs += 1

    def __getitem__(self, offset):
        return self.pm.read(offset, 4 if offset == PM_TMR else 2)

    def __setitem__(self, offset, value):
        self.pm.write(offset, 2, value)


@pytest.fixture
def pc():
    return Pc()


def test_timer_counts_at_its_frequency(pc):
    pc.clock.advance(SECOND)
    assert pc[PM_TMR] == TIMER_HZ


@pytest.mark.parametrize("bits", [24, 32])
def test_timer_begins_again_after_its_width(bits):
    pc = Pc(bits)
    pc.clock.advance(((1 << bits) + 5) * SECOND // TIMER_HZ + 1)
    assert pc[PM_TMR] == 5


def test_timer_cannot_be_written(pc):
    pc.clock.advance(SECOND)
    pc.pm.write(PM_TMR, 4, 0)
    assert pc[PM_TMR] == TIMER_HZ


def test_change_of_the_timers_top_bit_raises_the_sci(pc):
    pc = Pc(24)
    timers = Timers(pc.clock)
    timers.add(pc.pm)
    assert timers.run_due() is None
    pc[PM1_EN] = PM1_TMR
    for carry in (1, 2, 3):
        deadline = timers.run_due()
        assert deadline == -(-carry * (1 << 23) * SECOND // TIMER_HZ)
        pc.clock.advance(deadline - 1 - pc.clock.monotonic_ns())
        timers.run_due()
        assert not pc.irq.level
        pc.clock.advance(1)
        timers.run_due()
        assert pc.irq.level
        pc[PM1_STS] = PM1_TMR
        assert not pc.irq.level


def test_power_button_waits_in_status_until_it_is_enabled_and_cleared_by_writing_one(pc):
    pc.pm.press_power_button()
    assert pc[PM1_STS] == PM1_PWRBTN
    assert not pc.irq.level
    pc[PM1_EN] = PM1_PWRBTN
    assert pc.irq.level
    pc[PM1_STS] = PM1_SLPBTN
    assert pc.irq.level
    pc[PM1_STS] = PM1_PWRBTN
    assert not pc.irq.level


def test_s5_switches_the_machine_off(pc):
    pc[PM1_CNT] = CNT_SLP_EN | 5 << CNT_SLP_TYP_SHIFT
    assert pc.offs == 1


def test_sleep_type_without_sleep_enable_does_nothing(pc):
    pc[PM1_CNT] = 5 << CNT_SLP_TYP_SHIFT
    assert pc.offs == 0
    assert pc[PM1_CNT] == 5 << CNT_SLP_TYP_SHIFT | CNT_SCI_EN


def test_other_sleep_states_wake_at_once(pc, caplog):
    pc[PM1_CNT] = CNT_SLP_EN | 1 << CNT_SLP_TYP_SHIFT
    assert pc.offs == 0
    assert pc[PM1_STS] == PM1_WAK
    assert "sleep type 1" in caplog.text


def test_s5_by_byte_writes(pc):
    pc.pm.write(PM1_CNT + 1, 1, (CNT_SLP_EN | 5 << CNT_SLP_TYP_SHIFT) >> 8)
    assert pc.offs == 1


def test_general_purpose_event_drives_the_sci(pc):
    pc[GPE0_EN] = 1 << 3
    pc.pm.raise_gpe(2)
    assert not pc.irq.level
    pc.pm.raise_gpe(3)
    assert pc.irq.level
    assert pc[GPE0_STS] == 0b1100
    pc[GPE0_STS] = 0b1000
    assert not pc.irq.level
    with pytest.raises(ValueError, match="16"):
        pc.pm.raise_gpe(16)


def test_write_of_both_halves_touches_status_and_enable(pc):
    pc.pm.press_power_button()
    pc.pm.write(PM1_STS, 4, PM1_SLPBTN << 16 | PM1_PWRBTN)
    assert (pc[PM1_STS], pc[PM1_EN]) == (0, PM1_SLPBTN)


def test_timer_goes_on_from_its_saved_value_on_another_host(pc):
    pc.clock.advance(SECOND)
    pc[PM1_EN] = PM1_PWRBTN
    pc.pm.press_power_button()
    other = Pc()
    other.clock.advance(77 * SECOND)
    other.pm.load(pc.pm.save())
    assert other[PM_TMR] == TIMER_HZ
    assert other.irq.level


@pytest.mark.parametrize(("bits", "s5"), [(16, 5), (32, 8)])
def test_impossible_hardware_is_refused(bits, s5):
    with pytest.raises(ValueError):
        AcpiPm(NullLine(), FakeClock(), timer_bits=bits, s5_type=s5)


def test_reduced_hardware_s5_switches_off():
    offs = []
    registers = SleepRegisters(lambda: offs.append(1))
    registers.write(0, 1, 5 << 2)
    assert offs == []
    registers.write(0, 1, 0x20 | 5 << 2)
    assert offs == [1]
    assert registers.read(0, 1) == 5 << 2


def test_reduced_hardware_other_sleep_states_wake_at_once():
    registers = SleepRegisters()
    registers.write(0, 1, 0x20 | 3 << 2)
    assert registers.read(1, 1) == 0x80
    registers.write(1, 1, 0x80)
    assert registers.read(1, 1) == 0


def test_event_register_tells_each_event_once():
    irq = NullLine()
    events = GenericEvents(irq)
    events.press_power_button()
    events.press_sleep_button()
    assert irq.level
    assert events.read(0, 1) == 0
    assert events.read(0, 4) == 0x06
    assert not irq.level
    assert events.read(0, 4) == 0


def test_event_beyond_the_register_is_refused():
    with pytest.raises(ValueError, match="32 bits"):
        GenericEvents(NullLine()).post(1 << 32)
