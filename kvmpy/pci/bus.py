# SPDX-License-Identifier: Apache-2.0
"""Bus 0 of a PCI Express root bridge: 32 slots with one function each, the bridge itself in slot 0."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from kvmpy.bus import Bus
from kvmpy.irq import IrqLine, SharedLine
from kvmpy.pci import config as c
from kvmpy.pci.config import ConfigSpace
from kvmpy.pci.function import PciFunction

SLOTS = 32
# A bridge without a chipset's registers, so that no driver or firmware takes it for one that it knows.
BRIDGE_VENDOR, BRIDGE_DEVICE, BRIDGE_CLASS = 0x1B36, 0x0008, 0x06_0000


class PciBus:
    """The bus.

    mmio: where BARs go. pins: where INTA to INTD of slot 0 lead, level-triggered; they turn with the slot.
    """

    def __init__(self, mmio: Bus, pins: Sequence[IrqLine]) -> None:
        if len(pins) != 4:
            raise ValueError(f"a PCI bus has four interrupt pins, not {len(pins)}")
        self._mmio = mmio
        self._pins = [SharedLine(pin) for pin in pins]
        self._lock = threading.Lock()
        self.functions: dict[int, PciFunction] = {}
        self.plug(PciFunction("pci-host", ConfigSpace(BRIDGE_VENDOR, BRIDGE_DEVICE, BRIDGE_CLASS)))

    def plug(self, function: PciFunction, slot: int | None = None) -> int:
        """Put a function into a slot, by default the first free one. Returns: the slot. Raises ValueError."""
        if slot is None:
            slot = next((i for i in range(SLOTS) if i not in self.functions), SLOTS)
        if slot in self.functions or not 0 <= slot < SLOTS:
            raise ValueError(f"{function.name}: PCI slot {slot} is taken, or not one of the {SLOTS} slots")
        pin = function.config.get(c.INTERRUPT_PIN, 1)
        function.connect(self._mmio, self._pins[self.gsi_index(slot, pin or 1)].input())
        self.functions[slot] = function
        return slot

    @staticmethod
    def gsi_index(slot: int, pin: int) -> int:
        """Which of the four pins of slot 0 a pin (1 is INTA) of a slot is wired to."""
        return (slot + pin - 1) % 4

    def place_bars(self, start: int, size: int) -> None:
        """Give every BAR an address in [start, start + size), as firmware does; software still enables them.

        Raises ValueError when they do not fit.
        """
        end = start + size
        wanted = [(bar, function) for function in self.functions.values() for bar in function.bars]
        for bar, function in sorted(wanted, key=lambda item: -item[0].size):  # so that no room is lost between them
            start = -(-start // bar.size) * bar.size
            if start + bar.size > end:
                raise ValueError(f"{function.name}: no room for BAR {bar.index} of {bar.size:#x} bytes below {end:#_x}")
            function.write_config(c.BAR0 + 4 * bar.index, 4, start & 0xFFFF_FFFF)
            if bar.wide:
                function.write_config(c.BAR0 + 4 * bar.index + 4, 4, start >> 32)
            start += bar.size

    # -- configuration accesses

    def read_config(self, bus: int, slot: int, number: int, offset: int, size: int) -> int:
        """`size` bytes of a function's configuration space; all ones where there is none."""
        function = self.functions.get(slot) if bus == number == 0 else None
        if function is None:
            return (1 << 8 * size) - 1
        with self._lock:
            return function.read_config(offset, size)

    def write_config(self, bus: int, slot: int, number: int, offset: int, size: int, value: int) -> None:
        """Likewise."""
        function = self.functions.get(slot) if bus == number == 0 else None
        if function is not None:
            with self._lock:
                function.write_config(offset, size, value)

    def reset(self) -> None:
        """All functions as after power-on."""
        with self._lock:
            for function in self.functions.values():
                function.reset()
