# SPDX-License-Identifier: Apache-2.0
"""MSI-X vectors: masks, pending bits, routes; on the engines, a message that reaches a processor's local APIC."""

import time
from pathlib import Path

import pytest

from kvmpy.irq import GsiLine
from kvmpy.pci import MsiRoutes, Msix
from kvmpy.pci.msix import ENABLE, FUNCTION_MASK

CONTROL = 12


class Chip:
    """Keeps messages; takes none with data 0xBAD."""

    def __init__(self):
        self.sent, self.routes, self.open = [], 0, 0

    def line(self):
        self.open += 1
        if self.open > 4:
            self.open -= 1
            raise OSError(24, "too many open files")
        return Line(self)


class Line:
    def __init__(self, chip):
        self.chip = chip

    def route(self, address, data):
        self.chip.routes += 1
        self.message = (address, data)
        return data != 0xBAD

    def signal(self):
        self.chip.sent.append(self.message)

    def close(self):
        self.chip.open -= 1


@pytest.fixture
def chip():
    return Chip()


@pytest.fixture
def msix(chip):
    return Msix(5, chip, "dev")


def set_up(msix, vector, data, address=0xFEE0_1000, masked=0):
    msix.write_table(16 * vector, 8, address)
    msix.write_table(16 * vector + 8, 4, data)
    msix.write_table(16 * vector + CONTROL, 4, masked)


def test_a_vector_sends_its_message(msix, chip):
    set_up(msix, 1, 0x41)
    assert chip.routes == 0, "not before MSI-X is enabled"
    msix.set_control(ENABLE)
    msix.notify(1)
    msix.notify(1)
    assert chip.sent == [(0xFEE0_1000, 0x41)] * 2 and chip.routes == 1
    set_up(msix, 1, 0x42)
    msix.notify(1)
    assert chip.sent[-1] == (0xFEE0_1000, 0x42)


def test_what_is_masked_is_pending(msix, chip):
    msix.set_control(ENABLE)
    set_up(msix, 0, 0x40, masked=1)
    set_up(msix, 3, 0x43)
    msix.notify(0)
    msix.notify(0)
    assert msix.read_pending(0, 8) == 1 and not chip.sent
    set_up(msix, 0, 0x40)
    assert chip.sent == [(0xFEE0_1000, 0x40)] and msix.read_pending(0, 1) == 0
    msix.set_control(ENABLE | FUNCTION_MASK)
    msix.notify(3)
    assert msix.read_pending(0, 4) == 8
    msix.set_control(ENABLE)
    assert chip.sent[-1] == (0xFEE0_1000, 0x43) and msix.read_pending(0, 8) == 0


def test_the_table_takes_words_and_pairs(msix):
    msix.write_table(0, 8, 0x1_FEE0_0003)
    assert msix.read_table(0, 8) == 0x1_FEE0_0000 and msix.read_table(4, 4) == 1
    msix.write_table(CONTROL, 4, 0xFFFF_FFFE)
    assert msix.read_table(CONTROL, 4) == 0
    for offset, size in ((0, 1), (0, 2), (2, 4), (4, 8), (1, 8), (80, 4), (1 << 20, 8)):
        msix.write_table(offset, size, (1 << 64) - 1)
        assert msix.read_table(offset, size) == 0
    assert msix.read_pending(1 << 12, 8) == 0
    msix.notify(5)
    msix.notify(0xFFFF)
    assert msix.read_pending(0, 8) == 0


def test_messages_that_nobody_takes(msix, chip, caplog):
    msix.set_control(ENABLE)
    set_up(msix, 0, 0xBAD)
    msix.notify(0)
    assert not chip.sent and msix.read_pending(0, 1) == 1
    assert "no interrupt chip takes 0xbad" in caplog.text
    set_up(msix, 0, 0x40)
    assert chip.sent == [(0xFEE0_1000, 0x40)]
    for vector in range(5):
        set_up(msix, vector, 0x50 + vector)
    assert "vector 4 has no line" in caplog.text
    msix.close()
    msix.close()
    assert chip.open == 0


def test_a_saved_table(msix, chip):
    msix.set_control(ENABLE)
    set_up(msix, 0, 0x40)
    set_up(msix, 2, 0x42, masked=1)
    msix.notify(2)
    state = msix.save()
    other_chip = Chip()
    other = Msix(5, other_chip, "dev")
    other.load(other.check(state), ENABLE)
    assert other.save() == state
    other.notify(0)
    set_up(other, 2, 0x42)
    assert other_chip.sent == [(0xFEE0_1000, 0x40), (0xFEE0_1000, 0x42)]
    for wrong in ({"table": [0] * 19}, {"pending": [5]}, {"pending": [-1]}, {"table": [1 << 32] * 20}, {"more": 1}):
        with pytest.raises(ValueError, match="dev"):
            other.check({**state, **wrong})


def test_routes_on_an_engine(vm):
    """A message arrives at the local APIC, and the pins of the chips go on working beside it."""
    vm.create_irqchip()
    vcpu = vm.create_vcpu()
    lapic = vcpu.lapic
    regs = bytearray(lapic.regs)
    regs[0xF0:0xF4] = (0x1FF).to_bytes(4, "little")  # software enabled
    lapic.regs = bytes(regs)
    vcpu.lapic = lapic
    routes = MsiRoutes(vm)
    first = routes.line()
    assert first.route(0xFEE0_0000, 0x50)  # what an engine opens once for all
    first.close()
    before = set(Path("/proc/self/fd").iterdir())
    lines = [routes.line() for _ in range(3)]
    assert lines[0].route(0xFEE0_0000, 0x51) and lines[1].route(0xFEE0_0000, 0x62)

    def requested():
        irr = vcpu.lapic.regs[0x200:0x280]
        return {32 * i + bit for i in range(8) for bit in range(32) if irr[16 * i + bit // 8] >> bit % 8 & 1}

    def arrives(vectors):  # an engine may have a thread for eventfds
        end = time.monotonic() + 60
        while requested() != vectors and time.monotonic() < end:
            time.sleep(0.001)
        return requested() == vectors

    lines[0].signal()
    lines[1].signal()
    assert arrives({0x51, 0x62})
    assert lines[1].route(0xFEE0_0000, 0x63)
    lines[1].signal()
    lines[2].signal()  # has no route
    assert arrives({0x51, 0x62, 0x63})
    GsiLine(vm, 4).set(True)
    assert vm.get_irqchip(0).pic.irr & 1 << 4, "COM1's pin"
    for line in lines:
        line.close()
        line.close()
        line.signal()
    assert set(Path("/proc/self/fd").iterdir()) == before
    again = routes.line()
    assert again.route(0xFEE0_0000, 0x64)
    again.signal()
    assert arrives({0x51, 0x62, 0x63, 0x64})
    again.close()
