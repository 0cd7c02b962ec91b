# SPDX-License-Identifier: Apache-2.0
"""The PCI bus without a guest: both doors to configuration space, BARs, the pins, and accesses that make no sense."""

import random

import pytest

from kvmpy.bus import Bus
from kvmpy.devices import ResetControl
from kvmpy.irq import NullLine
from kvmpy.pci import ConfigPorts, ConfigSpace, Ecam, PciBus, PciFunction
from kvmpy.pci import config as c

ECAM = 0xE000_0000
WINDOW = 0xC000_0000


class Machine:
    """A bus behind both doors, with a function of two BARs in slot 1: 4 KiB, and 64 KiB with 64 address bits."""

    def __init__(self):
        self.mmio, self.pio = Bus("mmio"), Bus("pio")
        self.lines = [NullLine() for _ in range(4)]
        self.resets = []
        self.bus = PciBus(self.mmio, self.lines)
        self.pio.add(0xCF8, ConfigPorts(self.bus, ResetControl(lambda: self.resets.append(1))))
        self.mmio.add(ECAM, Ecam(self.bus))
        self.moves = []
        self.function = self.plug("nic")

    def plug(self, name):
        function = PciFunction(name, ConfigSpace(0x1234, 0x5678, 0x02_0000, subsystem=(0xAAAA, 0xBBBB), pin=1))
        function.add_bar(0, 4096, lambda o, s: 0xC0DE, lambda o, s, v: None, moved=self.moves.append)
        function.add_bar(2, 65536, lambda o, s: o, lambda o, s, v: None, wide=True, prefetchable=True)
        function.config.add_capability(0x05, bytes(8), b"\1")
        self.bus.plug(function)
        return function

    def get(self, offset, size=4, slot=1):
        return self.mmio.read(ECAM + (slot << 15) + offset, size)

    def put(self, offset, value, size=4, slot=1):
        self.mmio.write(ECAM + (slot << 15) + offset, size, value)


@pytest.fixture
def machine():
    return Machine()


def test_both_doors_lead_to_the_same_registers(machine):
    for slot in range(3):
        for offset in range(0, 256, 4):
            machine.pio.write(0xCF8, 4, 1 << 31 | slot << 11 | offset)
            assert machine.pio.read(0xCF8, 4) == 1 << 31 | slot << 11 | offset
            assert machine.pio.read(0xCFC, 4) == machine.get(offset, slot=slot)
    machine.pio.write(0xCF8, 4, 1 << 31 | 1 << 11)
    assert [machine.pio.read(0xCFC + i, 1) for i in range(4)] == [0x34, 0x12, 0x78, 0x56]
    assert machine.pio.read(0xCFE, 2) == 0x5678
    machine.pio.write(0xCF8, 4, 1 << 31 | 1 << 11 | 0x3C)
    machine.pio.write(0xCFC, 1, 0x0B)
    assert machine.get(0x3C, 1) == 0x0B
    machine.pio.write(0xCF8, 4, 1 << 11)  # not enabled
    assert machine.pio.read(0xCFC, 4) == 0xFFFF_FFFF


def test_the_header(machine):
    assert machine.get(0) == 0x5678_1234 and machine.get(8) == 0x0200_0001
    assert machine.get(0x2C) == 0xBBBB_AAAA and machine.get(0x3D, 1) == 1
    assert machine.get(c.STATUS, 2) & c.HAS_CAPABILITIES
    at = machine.get(c.CAPABILITIES, 1)
    assert (machine.get(at, 1), machine.get(at + 1, 1)) == (0x05, 0)
    machine.put(at + 2, 0xFF, 1)
    machine.put(at + 3, 0xFF, 1)
    assert machine.get(at + 2, 2) == 1
    for offset in (0, 8, 0x2C, 0x34):  # fixed
        before = machine.get(offset)
        machine.put(offset, 0xFFFF_FFFF)
        assert machine.get(offset) == before
    assert machine.get(8, slot=0) == 0x0600_0001, "the host bridge"
    assert machine.get(0, slot=2) == 0xFFFF_FFFF and machine.get(0x1000) == 0xFFFF_FFFF, "no slot, no function"
    assert machine.get(0x100) == machine.get(0xFFC) == 0, "no extended capabilities"


def test_reset_control_is_a_byte_in_the_window(machine):
    machine.pio.write(0xCF8, 4, 0x8000_0600)
    assert not machine.resets
    machine.pio.write(0xCF9, 1, 6)
    assert machine.resets == [1] and machine.pio.read(0xCF8, 4) == 0x8000_0600


def test_sizing_and_placing_bars(machine):
    for offset in (0x10, 0x18, 0x1C):
        machine.put(offset, 0xFFFF_FFFF)
    assert machine.get(0x10) == 0xFFFF_F000 and machine.get(0x14) == 0
    assert machine.get(0x18) == 0xFFFF_000C and machine.get(0x1C) == 0xFFFF_FFFF
    machine.bus.place_bars(WINDOW, 0x1000_0000)
    assert machine.get(0x18) == WINDOW | 0xC and machine.get(0x10) == WINDOW + 0x1_0000
    assert machine.mmio.read(WINDOW + 8, 4) == 0xFFFF_FFFF, "memory is not enabled"
    machine.put(c.COMMAND, c.MEMORY_SPACE, 2)
    assert machine.mmio.read(WINDOW + 8, 4) == 8 and machine.mmio.read(WINDOW + 0x1_0000, 4) == 0xC0DE
    machine.put(0x18, 0xC)
    machine.put(0x1C, 0x20)
    assert machine.mmio.read(0x20_0000_0010, 4) == 0x10 and machine.mmio.read(WINDOW + 8, 4) == 0xFFFF_FFFF
    assert machine.moves == [WINDOW + 0x1_0000], "the other BAR stayed"
    machine.put(c.COMMAND, 0, 2)
    assert machine.moves == [WINDOW + 0x1_0000, None]
    assert machine.mmio.read(WINDOW + 0x1_0000, 4) == 0xFFFF_FFFF


def test_bars_that_lie_on_others_stay_away(machine, caplog):
    other = machine.plug("disk")
    machine.bus.place_bars(WINDOW, 0x1000_0000)
    machine.put(c.COMMAND, c.MEMORY_SPACE, 2)
    machine.put(c.COMMAND, c.MEMORY_SPACE, 2, slot=2)
    place = machine.get(0x10)
    machine.put(0x10, place, slot=2)
    assert "disk: BAR 0 stays unmapped" in caplog.text and other.bars[0].base is None
    assert machine.mmio.read(place, 4) == 0xC0DE
    machine.put(0x10, ECAM + 0x8000, slot=2)
    assert machine.get(0) == 0x5678_1234, "ECAM is where it was"
    machine.put(0x10, WINDOW + 0x10_0000, slot=2)
    assert machine.mmio.read(WINDOW + 0x10_0000, 4) == 0xC0DE


def test_there_is_no_room_without_end(machine):
    with pytest.raises(ValueError, match="nic: no room for BAR 0 of 0x1000 bytes below 0xc001_0000"):
        machine.bus.place_bars(WINDOW, 0x1_0000)
    for number in range(2, 32):
        machine.plug(f"n{number}")
    with pytest.raises(ValueError, match="more: PCI slot 32"):
        machine.plug("more")


@pytest.mark.parametrize(
    ("index", "size", "wide"),
    [(0, 4096, False), (5, 4096, True), (1, 4097, False), (1, 2048, False), (-1, 4096, False)],
)
def test_bars_that_cannot_be(machine, index, size, wide):
    with pytest.raises(ValueError, match="nic"):
        machine.function.add_bar(index, size, lambda o, s: 0, lambda o, s, v: None, wide=wide)


def test_the_pin(machine):
    other = machine.plug("other")
    assert machine.lines[1].level is False
    machine.function.set_pin(True)
    assert machine.lines[1].level and machine.get(c.STATUS, 1) & c.INTX_STATUS, "slot 1, INTA"
    assert machine.get(c.COMMAND) >> 16 & c.INTX_STATUS and machine.get(c.STATUS + 1, 1) == 0
    machine.put(c.COMMAND, c.INTX_DISABLE, 2)
    assert not machine.lines[1].level and machine.get(c.STATUS, 1) & c.INTX_STATUS
    machine.put(c.COMMAND, 0, 2)
    other.set_pin(True)
    assert machine.lines[1].level and machine.lines[2].level
    machine.function.set_pin(False)
    assert not machine.lines[1].level and machine.lines[2].level


def test_a_saved_function(machine):
    machine.bus.place_bars(WINDOW, 0x1000_0000)
    machine.put(c.COMMAND, c.MEMORY_SPACE | c.BUS_MASTER, 2)
    machine.function.set_pin(True)
    state = machine.function.save()
    other = Machine()
    other.function.load(state)
    assert other.function.save() == state and other.lines[1].level
    assert other.mmio.read(WINDOW + 0x1_0000, 4) == 0xC0DE
    for wrong in (
        {**state, "config": state["config"][:-1]},
        {**state, "config": b"\xff" + state["config"][1:]},
        {**state, "pin": 1},
        {**state, "more": 1},
        {**state, "version": 2},
    ):
        with pytest.raises(ValueError, match=r"nic|function|256 bytes"):
            other.function.load(wrong)
        assert other.function.save() == state
    other.bus.reset()
    assert other.mmio.read(WINDOW + 0x1_0000, 4) == 0xFFFF_FFFF and not other.lines[1].level


def test_hostile_accesses(machine):
    """Every size and offset of both doors, with values that place BARs anywhere: answers, and nothing breaks."""
    rng = random.Random(7)
    for offset in range(0xCF8, 0xD00):
        for size in (1, 2, 4):
            if (offset, size) != (0xCF9, 1):
                machine.pio.write(offset, size, rng.getrandbits(32))
                assert 0 <= machine.pio.read(offset, size) < 1 << 8 * size
    for slot in (0, 1, 2, 31):
        for offset in range(0x110):
            for size in (1, 2, 4, 8):
                assert 0 <= machine.get(offset, size, slot) < 1 << 8 * size
                machine.put(offset, rng.choice([0, (1 << 64) - 1, rng.getrandbits(64)]), size, slot)
    for _ in range(3000):
        offset = rng.choice([4, 0x10, 0x18, 0x1C, rng.randrange(4096)])
        machine.put(offset, rng.choice([2, 0x7FF, ECAM, WINDOW, rng.getrandbits(64)]), rng.choice([1, 2, 4, 8]))
        machine.pio.write(0xCF8, 4, rng.getrandbits(32) | 1 << 31)
        machine.pio.write(0xCFC + rng.randrange(4), rng.choice([1, 2, 4]), rng.getrandbits(32))
    machine.mmio.write(ECAM + machine.bus.functions[0].config.get(0, 0) + (1 << 20) - 1, 8, 0)
    assert machine.get(0) == 0x5678_1234
    owners = [claim.owner for claim in machine.mmio.entries()]
    assert len(owners) == len(set(owners)) <= 3
