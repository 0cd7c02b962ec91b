# SPDX-License-Identifier: Apache-2.0
"""Interrupt lines: what the interrupt pin of a device is wired to.

A device computes the level of its pin from its registers and calls `line.set(level)` after each change, with
its own lock held: a line never calls back into a device, and without the lock two vCPUs could deliver two
levels in the wrong order and leave the pin wrong for ever.
"""

from __future__ import annotations

import os
import threading
from typing import Protocol


class IrqLine(Protocol):
    """One wire to an interrupt controller, high when asserted."""

    def set(self, level: bool) -> None:
        """Drive the line; setting the level that it has is cheap and changes nothing."""
        ...

    def pulse(self) -> None:
        """Low, high, low: exactly one edge."""
        ...


class NullLine:
    """A line that leads nowhere; it remembers its `level` and counts its rising `edges`."""

    def __init__(self) -> None:
        self.level = False
        self.edges = 0
        self._lock = threading.Lock()

    def set(self, level: bool) -> None:
        with self._lock:
            self.edges += level and not self.level
            self.level = bool(level)

    def pulse(self) -> None:
        with self._lock:
            self.edges += 1
            self.level = False


class HasIrqLine(Protocol):
    """The part of `kvmpy.Vm` that a GsiLine needs."""

    def irq_line(self, gsi: int, level: bool, /) -> object:
        """KVM_IRQ_LINE, api.rst 4.25."""
        ...


class GsiLine:
    """A pin of the machine's interrupt chip, driven by KVM_IRQ_LINE (api.rst 4.25). gsi: its number."""

    def __init__(self, vm: HasIrqLine, gsi: int) -> None:
        self._vm = vm
        self.gsi = gsi
        self._level: bool | None = None  # not known before the first set
        self._lock = threading.Lock()

    def set(self, level: bool) -> None:
        """Drive the pin; a level that it has already costs nothing."""
        if level == self._level:  # without the lock: whoever changes it now comes before or after
            return
        with self._lock:
            self._vm.irq_line(self.gsi, bool(level))
            self._level = bool(level)

    def pulse(self) -> None:
        """One edge: low, high, low."""
        with self._lock:
            if self._level is not False:
                self._vm.irq_line(self.gsi, False)
            self._vm.irq_line(self.gsi, True)
            self._vm.irq_line(self.gsi, False)
            self._level = False


class EventLine:
    """A line into an eventfd, as KVM_IRQFD takes it (api.rst 4.75): each rising edge is one signal.

    fd: the eventfd; it stays the caller's. For a level-triggered interrupt give the irqfd a resample fd too,
    and call `resample()` when that is signalled: the guest has ended the interrupt, and a line that is
    still high is raised again.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._level = False
        self._lock = threading.Lock()

    def set(self, level: bool) -> None:
        with self._lock:
            if level and not self._level:
                os.eventfd_write(self.fd, 1)
            self._level = bool(level)

    def pulse(self) -> None:
        with self._lock:
            os.eventfd_write(self.fd, 1)
            self._level = False

    def resample(self) -> None:
        """The guest acknowledged the interrupt: signal again if the line is still high."""
        with self._lock:
            if self._level:
                os.eventfd_write(self.fd, 1)


class SharedLine:
    """Several pins on one wire (wired-or, as PCI INTx): high while at least one of them is high.

    Each device gets its own `input()`. `asserted` is how many are high.
    """

    def __init__(self, target: IrqLine) -> None:
        self.target = target
        self.asserted = 0
        self._lock = threading.Lock()

    def input(self) -> IrqLine:
        """A new pin on this wire, low."""
        return _SharedInput(self)

    def change(self, up: bool) -> None:
        # The target is driven with the lock held, so that its level always is that of the last change.
        self.asserted += 1 if up else -1
        if self.asserted == (1 if up else 0):
            self.target.set(up)


class _SharedInput:
    def __init__(self, line: SharedLine) -> None:
        self._line = line
        self._level = False

    def set(self, level: bool) -> None:
        with self._line._lock:
            if bool(level) is not self._level:
                self._level = bool(level)
                self._line.change(self._level)

    def pulse(self) -> None:
        with self._line._lock:
            if self._level:
                self._level = False
                self._line.change(False)
            if self._line.asserted == 0:
                self._line.target.pulse()
            # else the wire is high already: a pulse on it is no edge
