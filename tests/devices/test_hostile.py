# SPDX-License-Identifier: Apache-2.0
"""Every device against a guest that writes anything anywhere, and against damaged states."""

from __future__ import annotations

import random

import pytest

from kvmpy.clock import FakeClock
from kvmpy.devices import (
    I8042,
    AcpiPm,
    DebugCon,
    DebugExit,
    FwCfg,
    GenericEvents,
    Port92,
    PostCode,
    ResetControl,
    Rtc,
    Serial,
    SleepRegisters,
)
from kvmpy.errors import GuestMemoryError
from kvmpy.irq import NullLine

SIZES = (1, 2, 4, 8)
STEPS = 4000
VALUES = (0, 1, 0x7F, 0x80, 0xFF, 0x1234, 0xFFFF, 0x8000_0000, 0xFFFF_FFFF, (1 << 64) - 1)


class Memory:
    """Guest memory that ends soon."""

    def __init__(self):
        self.bytes = bytearray(0x1000)

    def check(self, gpa, size):
        if gpa + size > len(self.bytes):
            raise GuestMemoryError("no memory", gpa, size, gpa)

    def read(self, gpa, size):
        self.check(gpa, size)
        return bytes(self.bytes[gpa : gpa + size])

    def write(self, gpa, data):
        self.check(gpa, len(data))
        self.bytes[gpa : gpa + len(data)] = data

    def fill(self, gpa, size, byte=0):
        self.check(gpa, size)
        self.bytes[gpa : gpa + size] = bytes([byte]) * size


def fw_cfg(clock):
    device = FwCfg(Memory())
    device.add_file("fixed", b"fixed")
    device.add_file("writable", bytes(16), writable=True)
    return device


def nothing(*args):
    pass


DEVICES = {
    "acpi-pm": lambda clock: AcpiPm(NullLine(), clock, nothing),
    "acpi-sleep": lambda clock: SleepRegisters(nothing),
    "acpi-events": lambda clock: GenericEvents(NullLine()),
    "debugcon": lambda clock: DebugCon(),
    "debug-exit": lambda clock: DebugExit(nothing),
    "fw_cfg": fw_cfg,
    "i8042": lambda clock: I8042(NullLine(), nothing),
    "port92": lambda clock: Port92(nothing),
    "post": lambda clock: PostCode(),
    "reset-control": lambda clock: ResetControl(nothing),
    "rtc": lambda clock: Rtc(NullLine(), clock),
    "serial": lambda clock: Serial(NullLine()),
}


@pytest.fixture(params=DEVICES)
def make(request):
    return DEVICES[request.param]


def abuse(device, clock, seed, steps=STEPS):
    """A random guest; what it reads must fit the access."""
    rng = random.Random(seed)
    for _ in range(steps):
        offset, size = rng.randrange(device.size), rng.choice(SIZES)
        if rng.random() < 0.5:
            assert 0 <= device.read(offset, size) < 1 << 8 * size
        else:
            value = rng.choice(VALUES) if rng.random() < 0.3 else rng.getrandbits(8 * size)
            device.write(offset, size, value & (1 << 8 * size) - 1)
        if rng.random() < 0.05:
            clock.advance(rng.randrange(3_000_000_000))
        if hasattr(device, "tick"):
            deadline = device.next_deadline_ns()
            assert deadline is None or deadline >= 0
            device.tick()
        if isinstance(device, Serial) and rng.random() < 0.05:
            device.receive(rng.randbytes(rng.randrange(40)))
        if isinstance(device, I8042) and rng.random() < 0.05:
            device.send_keys(rng.randbytes(5))


def trace(device, clock, seed):
    """What a random guest reads from now on."""
    rng = random.Random(seed)
    reads = []
    for _ in range(300):
        offset = rng.randrange(device.size)
        if rng.random() < 0.6:
            reads.append(device.read(offset, 1))
        else:
            device.write(offset, 1, rng.getrandbits(8))
        clock.advance(rng.randrange(100_000_000))
    return reads


def test_every_offset_takes_every_size(make):
    device = make(FakeClock())
    for offset in range(device.size):
        for size in SIZES:
            for value in VALUES:
                device.write(offset, size, value & (1 << 8 * size) - 1)
                assert 0 <= device.read(offset, size) < 1 << 8 * size


@pytest.mark.parametrize("seed", range(4))
def test_random_guest_finds_no_hole(make, seed):
    clock = FakeClock(1_750_000_000_000_000_000)
    abuse(make(clock), clock, seed)


@pytest.mark.parametrize("seed", range(4))
def test_state_saved_amid_operation_continues_the_same(make, seed):
    clock = FakeClock(1_750_000_000_000_000_000)
    device = make(clock)
    abuse(device, clock, seed)
    state = device.save()
    twin_clock = FakeClock(clock.wall_ns())
    twin_clock._now, twin_clock._start_wall = clock._now, clock._start_wall
    twin = make(twin_clock)
    twin.load(state)
    assert twin.save() == state
    assert trace(twin, twin_clock, seed) == trace(device, clock, seed)


def test_reset_gives_the_state_of_a_new_device_but_for_what_survives(make):
    clock = FakeClock(1_750_000_000_000_000_000)
    device = make(clock)
    fresh = device.save()
    abuse(device, clock, 1)
    device.reset()
    survivors = {
        "rtc": {"bytes", "offset_ns", "weekday_shift", "running"},
        "serial": {"backlog", "fifo", "lines"},
        "acpi-pm": {"elapsed_ns"},
    }.get(device.name, set())
    after = device.save()
    assert {k: v for k, v in after.items() if k not in survivors} == {
        k: v for k, v in fresh.items() if k not in survivors
    }


def test_guest_cannot_fill_the_log(make, caplog):
    clock = FakeClock()
    device = make(clock)
    abuse(device, clock, 3)
    assert len(caplog.records) <= 10


WRONG = (None, -1, 1 << 200, 1.5, "x", b"x" * 5000, [1 << 200], [[]], {}, {"version": 1}, True)


def test_load_refuses_damaged_states_and_stays_as_it_was(make):
    clock = FakeClock(1_750_000_000_000_000_000)
    device = make(clock)
    abuse(device, clock, 2, 200)
    good = device.save()
    damaged = [None, 7, [], {}, {**good, "version": 2}, {**good, "version": "1"}, {**good, "extra": 0}]
    for key in good:
        damaged.append({k: v for k, v in good.items() if k != key})
        damaged += [{**good, key: wrong} for wrong in WRONG if type(wrong) is not type(good[key])]
        if type(good[key]) is int:
            damaged += [{**good, key: wrong} for wrong in (-1, 1 << 200) if (key, wrong) != ("offset_ns", -1)]
    for state in damaged:
        with pytest.raises(ValueError):
            device.load(state)
    assert device.save() == good


def test_load_refuses_a_damaged_keyboard():
    device = I8042(NullLine())
    good = device.save()
    wrong_values = {"queue": b"x" * 257, "scan_code_set": 4, "leds": 8, "command": 256, "scanning": 1}
    for key, wrong in wrong_values.items():
        with pytest.raises(ValueError, match="keyboard"):
            device.load({**good, "keyboard": {**good["keyboard"], key: wrong}})
