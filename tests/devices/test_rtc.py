# SPDX-License-Identifier: Apache-2.0
"""The MC146818 through its two ports."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from kvmpy.clock import FakeClock
from kvmpy.devices import Rtc, Timers
from kvmpy.devices.rtc import (
    A_DIVIDER_RESET,
    A_UIP,
    B_24H,
    B_AIE,
    B_BINARY,
    B_PIE,
    B_SET,
    B_UIE,
    C_AF,
    C_IRQF,
    C_PF,
    C_UF,
    D_VRT,
    DATA,
    INDEX,
    REG_A,
    REG_B,
    REG_C,
    REG_D,
    SHUTDOWN_STATUS,
    TIME_BYTES,
)
from kvmpy.irq import NullLine

SECOND = 1_000_000_000
MS = 1_000_000


class Pc:
    def __init__(self, *when):
        start = datetime(*(when or (2026, 3, 14, 13, 59, 26)), tzinfo=UTC)
        self.clock = FakeClock(int(start.timestamp()) * SECOND)
        self.irq = NullLine()
        self.rtc = Rtc(self.irq, self.clock)
        self.timers = Timers(self.clock)
        self.timers.add(self.rtc)

    def __getitem__(self, index):
        self.rtc.write(INDEX, 1, index)
        return self.rtc.read(DATA, 1)

    def __setitem__(self, index, value):
        self.rtc.write(INDEX, 1, index)
        self.rtc.write(DATA, 1, value)

    def pass_time(self, ns):
        """Let time pass as the timer thread would: deadline by deadline."""
        end = self.clock.monotonic_ns() + ns
        while (deadline := self.timers.run_due()) is not None and deadline <= end:
            self.clock.advance(deadline - self.clock.monotonic_ns())
        self.clock.advance(end - self.clock.monotonic_ns())
        self.timers.run_due()

    @property
    def time(self):
        return [self[index] for index in TIME_BYTES]


@pytest.fixture
def pc():
    return Pc()


def test_time_is_bcd_and_24_hours_at_first(pc):
    # 2026-03-14 is a Saturday: day 7 of a week that begins on Sunday.
    assert pc.time == [0x26, 0x59, 0x13, 7, 0x14, 0x03, 0x26, 0x20]


def test_binary_mode(pc):
    pc[REG_B] = B_24H | B_BINARY
    assert pc.time == [26, 59, 13, 7, 14, 3, 26, 20]


@pytest.mark.parametrize(
    ("hour", "register"), [(0, 0x12), (1, 0x01), (11, 0x11), (12, 0x92), (13, 0x81), (23, 0x91)]
)
def test_twelve_hour_mode(hour, register):
    pc = Pc(2026, 3, 14, hour, 0, 0)
    pc[REG_B] = 0
    assert pc[0x04] == register
    pc[REG_B] = B_SET
    pc[0x04] = register
    pc[REG_B] = 0
    pc[REG_B] = B_24H | B_BINARY
    assert pc[0x04] == hour


def test_time_goes_on_over_the_end_of_the_year():
    pc = Pc(1999, 12, 31, 23, 59, 59)
    pc.clock.advance(SECOND)
    assert pc.time == [0, 0, 0, 7, 1, 1, 0, 0x20]


def test_set_stops_the_clock_and_clearing_it_runs_on_from_what_was_written(pc):
    pc[REG_B] = B_SET | B_24H
    for index, value in zip(TIME_BYTES, [0x58, 0x59, 0x23, 2, 0x28, 0x02, 0x24, 0x20], strict=True):
        pc[index] = value
    pc.clock.advance(100 * SECOND)
    assert pc[0x00] == 0x58
    pc[REG_B] = B_24H
    pc.clock.advance(2 * SECOND)
    # A leap year, and the weekday as it was set, right or wrong.
    assert pc.time == [0, 0, 0, 3, 0x29, 0x02, 0x24, 0x20]


def test_no_date_stands_still_until_it_is_completed(pc):
    pc[0x08] = 0x02
    pc[0x07] = 0x31
    pc.clock.advance(10 * SECOND)
    assert pc[0x00] == 0x26
    pc[0x07] = 0x28
    pc.clock.advance(10 * SECOND)
    assert pc.time == [0x36, 0x59, 0x13, 7, 0x28, 0x02, 0x26, 0x20]


def test_update_in_progress_shows_just_before_the_second_changes(pc):
    assert not pc[REG_A] & A_UIP
    pc.clock.advance(SECOND - 3 * MS)
    assert not pc[REG_A] & A_UIP
    pc.clock.advance(1 * MS)
    assert pc[REG_A] & A_UIP
    pc.clock.advance(2 * MS)
    assert not pc[REG_A] & A_UIP


def test_leaving_divider_reset_updates_half_a_second_later(pc):
    pc.clock.advance(200 * MS)
    pc[REG_A] = A_DIVIDER_RESET | 6
    pc.clock.advance(5 * SECOND)
    pc[REG_A] = 0x26
    pc.clock.advance(499 * MS)
    assert pc[0x00] == 0x26
    pc.clock.advance(1 * MS)
    assert pc[0x00] == 0x27


def test_update_ended_interrupt_comes_each_second_and_reading_c_acknowledges(pc):
    pc[REG_C]
    pc[REG_B] = B_24H | B_UIE
    pc.pass_time(SECOND - 1)
    assert not pc.irq.level
    pc.pass_time(1)
    assert pc.irq.level
    assert pc[REG_C] & ~C_PF == C_IRQF | C_UF
    assert not pc.irq.level
    assert pc[REG_C] == 0
    pc.pass_time(SECOND)
    assert pc.irq.edges == 2


def test_set_clears_the_update_interrupt_enable(pc):
    pc[REG_B] = B_SET | B_24H | B_UIE
    assert pc[REG_B] == B_SET | B_24H


def test_flags_appear_without_being_enabled_and_raise_no_interrupt(pc):
    pc.clock.advance(SECOND)
    assert pc[REG_C] == C_PF | C_UF
    assert pc.irq.edges == 0


@pytest.mark.parametrize(("rate", "hz"), [(1, 256), (2, 128), (3, 8192), (6, 1024), (13, 8), (15, 2)])
def test_periodic_interrupt_rate(pc, rate, hz):
    pc[REG_A] = 0x20 | rate
    pc[REG_C]
    pc[REG_B] = B_24H | B_PIE
    interrupts = 0
    for _ in range(hz // 2):
        deadline = pc.rtc.next_deadline_ns()
        pc.clock.advance(deadline - pc.clock.monotonic_ns())
        pc.timers.run_due()
        interrupts += pc.irq.level
        assert pc[REG_C] & C_PF
    assert interrupts == hz // 2
    assert abs(pc.clock.monotonic_ns() - SECOND // 2) <= SECOND // hz


def test_rate_zero_has_no_periodic_interrupt(pc):
    pc[REG_A] = 0x20
    pc[REG_B] = B_24H | B_PIE
    assert pc.rtc.next_deadline_ns() is None


def set_alarm(pc, hour, minute, second):
    pc[0x05], pc[0x03], pc[0x01] = hour, minute, second
    pc[REG_C]
    pc[REG_B] = B_24H | B_AIE


def test_alarm_at_a_time_of_day(pc):
    set_alarm(pc, 0x14, 0x00, 0x05)
    pc.pass_time(39 * SECOND - 1)
    assert not pc.irq.level
    pc.pass_time(1)
    assert pc[REG_C] & (C_IRQF | C_AF) == C_IRQF | C_AF
    pc.pass_time(86_399 * SECOND)
    assert not pc.irq.level
    pc.pass_time(SECOND)
    assert pc.irq.level


def test_alarm_with_dont_care_hour_and_minute_rings_each_minute(pc):
    set_alarm(pc, 0xC0, 0xFF, 0x30)
    pc.pass_time(4 * SECOND)
    assert pc[REG_C] & C_AF
    pc.pass_time(60 * SECOND)
    assert pc[REG_C] & C_AF
    assert pc.irq.edges == 2


def test_alarm_for_every_second(pc):
    set_alarm(pc, 0xFF, 0xFF, 0xFF)
    pc.pass_time(SECOND)
    assert pc[REG_C] & C_AF


def test_alarm_that_is_no_time_never_rings(pc):
    set_alarm(pc, 0x25, 0x00, 0x00)
    assert pc.rtc.next_deadline_ns() is None
    pc.clock.advance(100_000 * SECOND)
    assert not pc[REG_C] & C_AF


def test_alarm_is_noticed_by_polling_long_after(pc):
    set_alarm(pc, 0x13, 0x59, 0x30)
    pc[REG_B] = B_24H
    pc.clock.advance(3 * 86_400 * SECOND)
    assert pc[REG_C] & C_AF


def test_battery_is_good_and_c_and_d_are_read_only(pc):
    pc[REG_D] = 0
    pc[REG_C] = 0xFF
    assert pc[REG_D] == D_VRT
    assert pc[REG_C] == 0


def test_memory_bytes_keep_what_is_written_and_survive_reset(pc):
    pc[SHUTDOWN_STATUS] = 0x0A
    pc[0x7F] = 0x5C
    pc.rtc.reset()
    assert (pc.rtc.shutdown_status, pc[0x7F]) == (0x0A, 0x5C)


def test_nmi_mask_is_bit_7_of_the_index(pc):
    pc[0x80 | 0x7F] = 1
    assert pc.rtc.nmi_masked
    assert pc[0x7F] == 1
    assert not pc.rtc.nmi_masked


def test_index_port_reads_all_ones(pc):
    assert pc.rtc.read(INDEX, 1) == 0xFF


def test_memory_size_bytes_for_a_small_and_a_large_machine(pc):
    pc.rtc.set_memory_size(8 << 20)
    assert [pc[i] for i in (0x15, 0x16, 0x17, 0x18, 0x30, 0x31, 0x34, 0x35)] == [
        0x80, 0x02, 0x00, 0x1C, 0x00, 0x1C, 0x00, 0x00,
    ]
    pc.rtc.set_memory_size(0xC000_0000, 5 << 30)
    assert [pc[i] for i in (0x17, 0x18, 0x34, 0x35)] == [0xFF, 0xFF, 0x00, 0xBF]
    assert [pc[i] for i in (0x5B, 0x5C, 0x5D)] == [0x00, 0x40, 0x01]


def test_memory_size_that_no_pc_has_is_refused(pc):
    with pytest.raises(ValueError, match="0x10000"):
        pc.rtc.set_memory_size(0x10000)


def test_poke_refuses_the_clock_and_values_that_are_no_byte(pc):
    with pytest.raises(ValueError, match="0x32"):
        pc.rtc.poke(0x32, 0)
    with pytest.raises(ValueError, match="0x100"):
        pc.rtc.poke(0x40, 0x100)


def test_reset_disables_interrupts_but_the_clock_goes_on(pc):
    pc[REG_B] = B_24H | B_BINARY | B_UIE
    pc.pass_time(SECOND)
    assert pc.irq.level
    pc.rtc.reset()
    assert not pc.irq.level
    assert pc[REG_B] == B_24H | B_BINARY
    assert pc[0x00] == 27


def test_loaded_clock_shows_the_time_of_its_new_host_plus_what_the_guest_had_set(pc):
    pc[REG_B] = B_SET | B_24H
    pc[0x04] = 0x20   # seven hours ahead
    pc[REG_B] = B_24H | B_UIE
    pc[0x40] = 0x77
    other = Pc(2027, 1, 1, 1, 0, 0)
    other.rtc.load(pc.rtc.save())
    assert other.time == [0, 0, 8, 6, 1, 1, 0x27, 0x20]
    assert other[0x40] == 0x77
    other.pass_time(SECOND)
    assert other.irq.level


def test_load_refuses_a_clock_that_runs_although_set_holds_it(pc):
    state = pc.rtc.save()
    data = bytearray(state["bytes"])
    data[REG_B] |= B_SET
    with pytest.raises(ValueError, match="contradict"):
        pc.rtc.load({**state, "bytes": bytes(data)})


def test_host_clock_set_back_loses_no_later_alarm(pc):
    set_alarm(pc, 0x14, 0x00, 0x00)
    pc.clock._start_wall -= 3600 * SECOND
    pc.pass_time(3634 * SECOND)
    assert pc[REG_C] & C_AF


def test_years_begin_again_after_9999(pc):
    pc[REG_B] = B_SET | B_24H
    for index, value in zip(TIME_BYTES, [0x59, 0x59, 0x23, 1, 0x31, 0x12, 0x99, 0x99], strict=True):
        pc[index] = value
    pc[REG_B] = B_24H
    pc.clock.advance(SECOND)
    assert pc.time[4:] == [1, 1, 1, 0]
