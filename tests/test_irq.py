# SPDX-License-Identifier: Apache-2.0
"""Interrupt lines."""

import os
import threading
import time

import pytest

from kvmpy.irq import EventLine, GsiLine, NullLine, SharedLine


class Chip:
    """Stands for a VM: remembers the levels it was given."""

    def __init__(self):
        self.levels = []

    def irq_line(self, gsi, level):
        self.levels.append((gsi, level))


@pytest.fixture
def eventfd():
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    yield fd
    os.close(fd)


def signals(fd):
    """How often the eventfd was signalled since the last look."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def test_null_line_remembers_level_and_edges():
    line = NullLine()
    for level in (True, True, False, True):
        line.set(level)
    assert (line.level, line.edges) == (True, 2)
    line.pulse()
    assert (line.level, line.edges) == (False, 3)


def test_gsi_line_drives_the_chip_only_when_the_level_changes():
    chip = Chip()
    line = GsiLine(chip, 4)
    for level in (False, True, True, False, False):
        line.set(level)
    assert chip.levels == [(4, False), (4, True), (4, False)]


def test_gsi_line_pulse_is_an_edge_from_any_level():
    chip = Chip()
    line = GsiLine(chip, 9)
    line.pulse()
    assert [level for _, level in chip.levels] == [False, True, False]
    line.set(True)
    chip.levels.clear()
    line.pulse()
    assert [level for _, level in chip.levels] == [False, True, False]
    line.set(False)
    assert len(chip.levels) == 3


def test_gsi_line_tries_again_when_the_chip_refused():
    class Refusing(Chip):
        def irq_line(self, gsi, level):
            super().irq_line(gsi, level)
            if len(self.levels) == 1:
                raise OSError("not yet")

    chip = Refusing()
    line = GsiLine(chip, 1)
    with pytest.raises(OSError, match="not yet"):
        line.set(True)
    line.set(True)
    assert chip.levels == [(1, True)] * 2


def test_event_line_signals_rising_edges(eventfd):
    line = EventLine(eventfd)
    line.set(False)
    assert signals(eventfd) == 0
    line.set(True)
    line.set(True)
    assert signals(eventfd) == 1
    line.set(False)
    line.set(True)
    line.set(False)
    line.pulse()
    assert signals(eventfd) == 2


def test_event_line_is_raised_again_when_still_high_after_the_guests_eoi(eventfd):
    line = EventLine(eventfd)
    line.resample()
    assert signals(eventfd) == 0
    line.set(True)
    line.resample()
    assert signals(eventfd) == 2
    line.set(False)
    line.resample()
    assert signals(eventfd) == 0


def test_shared_line_is_high_while_any_input_is():
    target = NullLine()
    shared = SharedLine(target)
    a, b = shared.input(), shared.input()
    a.set(True)
    a.set(True)
    b.set(True)
    assert (target.level, target.edges, shared.asserted) == (True, 1, 2)
    a.set(False)
    a.set(False)
    assert target.level
    b.set(False)
    assert (target.level, target.edges, shared.asserted) == (False, 1, 0)


def test_shared_line_pulse_is_an_edge_only_when_nobody_else_holds_it():
    target = NullLine()
    shared = SharedLine(target)
    a, b = shared.input(), shared.input()
    a.pulse()
    assert (target.level, target.edges) == (False, 1)
    a.set(True)
    a.pulse()
    assert (target.level, target.edges) == (False, 3)
    b.set(True)
    a.pulse()
    assert (target.level, target.edges) == (True, 4)


def test_shared_line_ends_low_after_threads_drove_it():
    target = NullLine()
    shared = SharedLine(target)

    def drive(pin):
        for i in range(500):
            pin.set(i % 2 == 0)
        pin.set(False)

    threads = [threading.Thread(target=drive, args=(shared.input(),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (shared.asserted, target.level) == (0, False)


# -- on the real chips


def pic(vm):
    """The master 8259: (lines that are high, interrupts that were requested)."""
    state = vm.get_irqchip(0).pic
    return state.last_irr, state.irr


def test_gsi_line_reaches_the_interrupt_chip(vm):
    vm.create_irqchip()
    line = GsiLine(vm, 5)
    line.set(True)
    assert pic(vm) == (1 << 5, 1 << 5)
    line.set(False)
    assert pic(vm) == (0, 1 << 5)  # edge triggered: the request stays
    GsiLine(vm, 3).pulse()
    assert pic(vm) == (0, 1 << 5 | 1 << 3)


def test_event_line_reaches_the_interrupt_chip_by_irqfd(vm, eventfd):
    vm.create_irqchip()
    vm.irqfd(eventfd, 7)
    EventLine(eventfd).set(True)
    deadline = time.monotonic() + 20  # the kernel may do it in a worker
    while not pic(vm)[1] and time.monotonic() < deadline:
        time.sleep(0.001)
    assert pic(vm)[1] == 1 << 7
