# SPDX-License-Identifier: Apache-2.0
"""CMOS real-time clock (Motorola MC146818A data sheet) with the PC's battery-backed memory.

Time and date follow the wall clock of the `Clock` plus what the guest set; BCD or binary, 12 or 24 hours,
alarm with "don't care", update-ended and periodic interrupts, update-in-progress and divider reset are
here, and the century in byte 0x32 as on the PC AT. The bytes by which a PC's firmware learns the memory
size can be filled with `set_memory_size()`; any other byte with `poke()`.

Not implemented: daylight saving (DSE is kept and has no effect); the square wave output; time bases
other than 32,768 Hz (any divider setting but "reset" runs at that rate); the second bank of 128 bytes;
the NMI mask (bit 7 of the index port) is kept for `nmi_masked` but masks nothing by itself.
A time that is no date stands still, as written, until the guest completes it to one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from threading import Lock
from typing import TYPE_CHECKING, Any

from kvmpy.arch.layout import HIGH_RAM_START, KIB, MIB
from kvmpy.clock import Clock
from kvmpy.devices import calendar
from kvmpy.devices.base import ByteRegisters, StateReader
from kvmpy.devices.calendar import Format

if TYPE_CHECKING:
    from kvmpy.irq import IrqLine

# Ports, as offsets.
INDEX = 0
DATA = 1

# Bytes of the chip (data sheet, "Address Map").
ALARM_BYTES = (0x01, 0x03, 0x05)                     # second, minute, hour
TIME_BYTES = (0x00, 0x02, 0x04, 0x06, 0x07, 0x08, 0x09, 0x32)
REG_A, REG_B, REG_C, REG_D = 0x0A, 0x0B, 0x0C, 0x0D

# Bytes whose meaning is the PC's.
SHUTDOWN_STATUS = 0x0F   # what the firmware does after a CPU reset
CENTURY = 0x32

A_UIP = 0x80             # update in progress
A_DIVIDER = 0x70
A_DIVIDER_RESET = 0x60   # 11x holds the divider chain in reset
A_RATE = 0x0F

B_SET = 0x80             # halt updates while the guest sets the time
B_PIE = 0x40
B_AIE = 0x20
B_UIE = 0x10
B_SQWE = 0x08
B_BINARY = 0x04
B_24H = 0x02
B_DSE = 0x01

C_IRQF = 0x80
C_PF = 0x40
C_AF = 0x20
C_UF = 0x10              # the enables of B stand at the same bits

D_VRT = 0x80             # the battery is good

# The state in which a PC's firmware leaves the chip: 32 kHz base, 1,024 Hz rate; BCD, 24 hours.
INITIAL_A = 0x26
INITIAL_B = B_24H

SECOND_NS = 1_000_000_000
UPDATE_NS = 244_000 + 1_984_000   # UIP leads an update of 1,984 us by 244 us (data sheet, "Update Cycle")
OSCILLATOR_HZ = 32_768

_LONGEST = 1 << 80       # bound of saved times, far beyond what the calendar can reach


class Rtc(ByteRegisters):
    """The clock and its 128 bytes, behind an index and a data port.

    Args:
        irq: the interrupt line (ISA IRQ 8).
        clock: where time comes from.
        offset_s: what the guest's clock is ahead of UTC, e.g. for guests that expect local time.
    """

    name = "rtc"
    size = 2

    def __init__(self, irq: IrqLine, clock: Clock, offset_s: int = 0) -> None:
        self._clock = clock
        self._lock = Lock()
        self._irq = irq
        self.rearm: Callable[[], None] = lambda: None   # the timer service's hook
        self._index = 0
        self._bytes = bytearray(128)                    # the time bytes count only while the clock stands
        self._bytes[REG_A] = INITIAL_A
        self._bytes[REG_B] = INITIAL_B
        self._flags = 0                                 # PF, AF, UF
        self._offset_ns = offset_s * SECOND_NS          # guest time - wall time
        self._weekday_shift = 0
        self._running = True
        self._last_second = self._guest_ns() // SECOND_NS
        self._last_period = self._period_count()
        self._alarm_at = self._next_alarm(self._last_second)

    # The guest's side.

    def read_byte(self, offset: int) -> int:
        if offset == INDEX:
            return 0xFF   # write only on a PC
        with self._lock:
            self._catch_up()
            index = self._index & 0x7F
            if index == REG_A:
                value = self._bytes[REG_A] | (A_UIP if self._updating() else 0)
            elif index == REG_C:
                value = self._flags | (C_IRQF if self._level() else 0)
                self._flags = 0
                self._irq.set(False)
            elif index == REG_D:
                value = D_VRT
            elif index in TIME_BYTES and self._running:
                value = self._time_registers()[TIME_BYTES.index(index)]
            else:
                value = self._bytes[index]
        if index == REG_C:
            self.rearm()   # acknowledged: the next one may come
        return value

    def write_byte(self, offset: int, value: int) -> None:
        with self._lock:
            if offset == INDEX:
                self._index = value
                return
            self._catch_up()
            self._write_register(self._index & 0x7F, value)
            self._irq.set(self._level())
        self.rearm()

    # The host's side.

    def peek(self, index: int) -> int:
        """A byte of the memory (not of the clock: 0x0E..0x7F without the century)."""
        self._check_memory_index(index)
        with self._lock:
            return self._bytes[index]

    def poke(self, index: int, value: int) -> None:
        """Set a byte of the memory, as firmware setup would."""
        self._check_memory_index(index)
        if not 0 <= value <= 0xFF:
            raise ValueError(f"a CMOS byte is 0..0xff, not {value:#x}")
        with self._lock:
            self._bytes[index] = value

    def set_memory_size(self, below_4g: int, above_4g: int = 0) -> None:
        """Fill the bytes that tell firmware the memory size.

        0x15-0x16 base memory and 0x17-0x18, 0x30-0x31 extended memory in KiB, 0x34-0x35 memory above
        16 MiB and 0x5B-0x5D memory above 4 GiB in units of 64 KiB: what SeaBIOS and Bochs' BIOS read.

        Args:
            below_4g: bytes of RAM from address 0 on, the hole at 640 KiB included.
            above_4g: bytes of RAM from 4 GiB on.
        """
        if not MIB <= below_4g <= HIGH_RAM_START or above_4g < 0:
            raise ValueError(f"no PC has {below_4g:#x} bytes of low and {above_4g:#x} bytes of high memory")
        extended = min((below_4g - MIB) // KIB, 0xFFFF)
        beyond = min(max(below_4g - 16 * MIB, 0) // (64 * KIB), 0xFFFF)
        high = min(above_4g // (64 * KIB), 0xFF_FFFF)
        for first, count, value in (
            (0x15, 2, 640), (0x17, 2, extended), (0x30, 2, extended), (0x34, 2, beyond), (0x5B, 3, high),
        ):
            for i in range(count):
                self.poke(first + i, value >> 8 * i & 0xFF)

    @property
    def shutdown_status(self) -> int:
        """The shutdown status byte (0x0F)."""
        return self.peek(SHUTDOWN_STATUS)

    @property
    def nmi_masked(self) -> bool:
        """Bit 7 of the index port."""
        return bool(self._index & 0x80)

    def next_deadline_ns(self) -> int | None:
        """When the next enabled interrupt falls due (monotonic, ns); see kvmpy.devices.timers."""
        with self._lock:
            wanted = self._bytes[REG_B] & ~self._flags & (B_PIE | B_AIE | B_UIE)
            now = self._clock.monotonic_ns()
            deadlines = []
            period = self._period_ticks()
            if wanted & B_PIE and period:
                # The first nanosecond at which the count differs: round up.
                ticks = (self._last_period + 1) * period
                deadlines.append(-(-ticks * SECOND_NS // OSCILLATOR_HZ))
            if self._running:
                guest = self._guest_ns()
                if wanted & B_UIE:
                    deadlines.append(now + (self._last_second + 1) * SECOND_NS - guest)
                if wanted & B_AIE and self._alarm_at is not None:
                    deadlines.append(now + self._alarm_at * SECOND_NS - guest)
            return min(deadlines, default=None)

    def tick(self) -> None:
        """Raise the flags whose time has come."""
        with self._lock:
            self._catch_up()
            self._irq.set(self._level())

    def reset(self) -> None:
        """The RESET pin: interrupts off, flags cleared; clock and memory keep going (data sheet)."""
        with self._lock:
            self._catch_up()
            self._bytes[REG_B] &= ~(B_PIE | B_AIE | B_UIE | B_SQWE)
            self._flags = 0
            self._index = 0
            self._irq.set(self._level())
        self.rearm()

    def save(self) -> dict[str, Any]:
        """The state; the clock itself is saved as its distance from the wall clock, so it stays right."""
        with self._lock:
            self._catch_up()
            return {
                "version": 1,
                "index": self._index,
                "bytes": bytes(self._bytes),
                "flags": self._flags,
                "offset_ns": self._offset_ns,
                "weekday_shift": self._weekday_shift,
                "running": self._running,
            }

    def load(self, state: Mapping[str, Any]) -> None:
        s = StateReader(self.name, state)
        index, data = s.u8("index"), s.data("bytes", 128, 128)
        flags = s.bits("flags", C_PF | C_AF | C_UF)
        offset_ns = s.integer("offset_ns", -_LONGEST, _LONGEST)
        weekday_shift, running = s.integer("weekday_shift", 0, 6), s.flag("running")
        s.end()
        halted = bool(data[REG_B] & B_SET) or data[REG_A] & A_DIVIDER_RESET == A_DIVIDER_RESET
        if data[REG_A] & A_UIP or (running and halted):
            a, b = data[REG_A], data[REG_B]
            raise ValueError(f"rtc: saved registers A={a:#04x} B={b:#04x} contradict the running clock")
        with self._lock:
            self._index, self._bytes, self._flags = index, bytearray(data), flags
            self._offset_ns, self._weekday_shift, self._running = offset_ns, weekday_shift, running
            self._restart_counts()
            self._irq.set(self._level())
        self.rearm()

    # Registers; the lock is held from here on.

    def _write_register(self, index: int, value: int) -> None:
        if index == REG_A:
            value &= ~A_UIP
            held = self._bytes[REG_A] & A_DIVIDER_RESET == A_DIVIDER_RESET
            hold = value & A_DIVIDER_RESET == A_DIVIDER_RESET
            if hold and not held:
                self._stop()
            self._bytes[REG_A] = value
            self._last_period = self._period_count()
            if held and not hold:
                # The chain starts empty: the first update comes half a second later (data sheet).
                self._offset_ns += SECOND_NS // 2 - self._guest_ns() % SECOND_NS
                self._try_start()
        elif index == REG_B:
            if value & B_SET and not self._bytes[REG_B] & B_SET:
                self._stop()
            if value & B_SET:
                value &= ~B_UIE           # SET clears UIE (data sheet)
            self._bytes[REG_B] = value
            self._try_start()
            self._alarm_at = self._next_alarm(self._last_second + 1)
        elif index in TIME_BYTES:
            self._stop()
            self._bytes[index] = value
            self._try_start()
        elif index not in (REG_C, REG_D):
            self._bytes[index] = value
            if index in ALARM_BYTES:
                self._alarm_at = self._next_alarm(self._last_second + 1)

    def _check_memory_index(self, index: int) -> None:
        if not REG_D < index <= 0x7F or index == CENTURY:
            raise ValueError(f"CMOS byte {index:#x} is not one of the memory (0x0e..0x7f, not 0x32)")

    def _format(self) -> Format:
        b = self._bytes[REG_B]
        return Format(binary=bool(b & B_BINARY), hours24=bool(b & B_24H))

    def _guest_ns(self) -> int:
        return self._clock.wall_ns() + self._offset_ns

    def _time_registers(self) -> list[int]:
        return calendar.encode(self._last_second, self._weekday_shift, self._format())

    def _stop(self) -> None:
        """Let the time bytes hold the time, to be changed one by one."""
        if self._running:
            for index, value in zip(TIME_BYTES, self._time_registers(), strict=True):
                self._bytes[index] = value
            self._running = False

    def _try_start(self) -> None:
        """Run on from the time bytes, if nothing holds the clock and they are a date."""
        if self._running or self._bytes[REG_B] & B_SET:
            return
        if self._bytes[REG_A] & A_DIVIDER_RESET == A_DIVIDER_RESET:
            return
        decoded = calendar.decode([self._bytes[i] for i in TIME_BYTES], self._format())
        if decoded is None:
            return
        seconds, self._weekday_shift = decoded
        # Only whole seconds: where in the second we are is the divider's business.
        self._offset_ns += (seconds - self._guest_ns() // SECOND_NS) * SECOND_NS
        self._running = True
        self._restart_counts()

    def _restart_counts(self) -> None:
        self._last_second = self._guest_ns() // SECOND_NS
        self._last_period = self._period_count()
        self._alarm_at = self._next_alarm(self._last_second + 1)

    def _next_alarm(self, seconds: int) -> int | None:
        second, minute, hour = (self._bytes[i] for i in ALARM_BYTES)
        return calendar.next_alarm(seconds, (second, minute, hour), self._format())

    def _period_ticks(self) -> int:
        """Oscillator ticks per periodic interrupt; 0: none (data sheet, "Periodic Interrupt Selection")."""
        rate = self._bytes[REG_A] & A_RATE
        if rate == 0 or self._bytes[REG_A] & A_DIVIDER_RESET == A_DIVIDER_RESET:
            return 0
        return 1 << (rate + 6 if rate < 3 else rate - 1)

    def _period_count(self) -> int:
        ticks = self._period_ticks()
        return self._clock.monotonic_ns() * OSCILLATOR_HZ // (SECOND_NS * ticks) if ticks else 0

    def _updating(self) -> bool:
        return self._running and SECOND_NS - self._guest_ns() % SECOND_NS <= UPDATE_NS

    def _catch_up(self) -> None:
        count = self._period_count()
        if count != self._last_period:
            self._last_period = count
            self._flags |= C_PF
        if not self._running:
            return
        now = self._guest_ns() // SECOND_NS
        if now == self._last_second:
            return
        self._flags |= C_UF
        if now < self._last_second:       # the host's wall clock was set back
            self._alarm_at = self._next_alarm(now)
        self._last_second = now
        if self._alarm_at is not None and now >= self._alarm_at:
            self._flags |= C_AF
            self._alarm_at = self._next_alarm(now + 1)

    def _level(self) -> bool:
        return bool(self._flags & self._bytes[REG_B] & (C_PF | C_AF | C_UF))
