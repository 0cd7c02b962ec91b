# SPDX-License-Identifier: Apache-2.0
"""A PCI function: its configuration space, its BARs on the memory bus, its interrupt pin or MSI-X vectors.

Locks: configuration accesses come with the bus's lock held, and registers in a BAR may have locks of their own below
it; `_pin_lock` guards the pin, which devices drive from any thread, and nothing waits while it is held.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvmpy.bus import Bus, Claim, Read, Write
from kvmpy.devices.base import GuestLog, StateReader
from kvmpy.errors import OverlapError
from kvmpy.irq import IrqLine, NullLine
from kvmpy.pci import config as c
from kvmpy.pci.config import ConfigSpace
from kvmpy.pci.msix import CAPABILITY, Msix

log = logging.getLogger("kvmpy.pci")

WIDE, PREFETCHABLE = 0x4, 0x8  # low bits of a memory BAR (6.2.5.1)
SMALLEST_BAR = 4096


@dataclass
class Bar:
    """A window of registers that software places in memory; `base` is where it is now, None: nowhere."""

    index: int
    size: int
    wide: bool
    read: Read
    write: Write
    moved: Callable[[int | None], None]
    claim: Claim | None = None

    @property
    def base(self) -> int | None:
        """Guest address, or None."""
        return self.claim.base if self.claim is not None else None


class PciFunction:
    """A function of a PCI bus.

    name: for messages. config: its configuration space with all ids. A device calls `add_bar` and `use_msix` before the
    function is plugged into a `PciBus`, and drives `set_pin`.
    """

    def __init__(self, name: str, config: ConfigSpace) -> None:
        self.name = name
        self.config = config
        self.bars: list[Bar] = []
        self.msix: Msix | None = None
        self.msix_at = 0
        self._mmio: Bus | None = None
        self._line: IrqLine = NullLine()
        self._pin = False
        self._pin_lock = threading.Lock()
        self._warn = GuestLog(log)

    # -- for devices

    def add_bar(
        self,
        index: int,
        size: int,
        read: Read,
        write: Write,
        *,
        wide: bool = False,
        prefetchable: bool = False,
        moved: Callable[[int | None], None] = lambda base: None,
    ) -> None:
        """Registers in memory. index: 0 to 5 (a `wide` one, of 64 bits, takes two). size: bytes, a power of two from
        4096. moved(base): called when software has placed it elsewhere, or nowhere (None). Raises ValueError.
        """
        if size < SMALLEST_BAR or size & (size - 1) or (size > 1 << 31 and not wide):
            raise ValueError(f"{self.name}: a BAR has a power of two of bytes from {SMALLEST_BAR}, not {size:#x}")
        taken = {i for bar in self.bars for i in (bar.index, bar.index + bar.wide)}
        if index < 0 or index + wide > 5 or taken & {index, index + wide}:
            raise ValueError(f"{self.name}: BAR {index} is taken or does not exist")
        self.config.add_bar(index, size, WIDE * wide | PREFETCHABLE * prefetchable, wide=wide)
        self.bars.append(Bar(index, size, wide, read, write, moved))

    def use_msix(self, msix: Msix, bar: int, table: int, pending: int) -> None:
        """Offer MSI-X with its tables at these offsets of a BAR, whose functions hand accesses to `msix`."""
        self.msix = msix
        self.msix_at = self.config.add_capability(CAPABILITY, *msix.capability(bar, table, pending))

    def set_pin(self, level: bool) -> None:
        """Drive INTx; with MSI-X enabled, or INTx disabled, only the status bit follows (6.2.3)."""
        with self._pin_lock:
            self._pin = level
            self._drive()

    def _drive(self) -> None:
        silent = self.command & c.INTX_DISABLE or (self.msix is not None and self.msix.enabled)
        self._line.set(self._pin and not silent)

    @property
    def command(self) -> int:
        """The command register."""
        return self.config.get(c.COMMAND, 2)

    # -- for the bus

    def connect(self, mmio: Bus, line: IrqLine) -> None:
        """Plug the function in: where BARs go, where its pin leads."""
        self._mmio = mmio
        self._line = line

    def read_config(self, offset: int, size: int) -> int:
        """Read configuration space."""
        value = self.config.get(offset, size)
        if self._pin and offset <= c.STATUS < offset + size:
            value |= c.INTX_STATUS << 8 * (c.STATUS - offset)
        return value

    def write_config(self, offset: int, size: int, value: int) -> None:
        """Write configuration space, and let the change take effect."""
        self.config.write(offset, size, value)
        end = offset + size
        if offset < c.BAR0 + 24 and end > c.COMMAND:
            self._take_effect()
        elif self.msix is not None and offset < self.msix_at + 4 and end > self.msix_at + 2:
            self._take_control()

    def _take_control(self) -> None:
        if self.msix is not None:
            self.msix.set_control(self.config.get(self.msix_at + 2, 2))
        with self._pin_lock:
            self._drive()

    def _take_effect(self) -> None:
        # First all BARs leave their places: one may take over what another has left.
        wanted = [self.address_of(bar) if self.command & c.MEMORY_SPACE else None for bar in self.bars]
        moving = [(bar, base) for bar, base in zip(self.bars, wanted, strict=True) if base != bar.base]
        for bar, _ in moving:
            self._unmap(bar)
        for bar, base in moving:
            if base is not None:
                self._map(bar, base)
        with self._pin_lock:
            self._drive()

    def address_of(self, bar: Bar) -> int | None:
        """Where software has put a BAR; None at 0 and at the very end, which is how its size is asked for."""
        base = self.config.get(c.BAR0 + 4 * bar.index, 8 if bar.wide else 4) & -bar.size
        return base if 0 < base < (1 << (64 if bar.wide else 32)) - bar.size else None

    def _map(self, bar: Bar, base: int) -> None:
        if self._mmio is None:
            return
        try:
            bar.claim = self._mmio.claim(
                base, bar.size, f"{self.name} BAR {bar.index}", read=bar.read, write=bar.write
            )
        except OverlapError as error:
            self._warn("%s: BAR %d stays unmapped: %s", self.name, bar.index, error)
            return
        bar.moved(base)

    def _unmap(self, bar: Bar) -> None:
        if bar.claim is not None and self._mmio is not None:
            bar.moved(None)
            self._mmio.release(bar.claim)
        bar.claim = None

    # -- life and state

    def reset(self) -> None:
        """As after power-on: no BAR is placed, no interrupt pending."""
        for bar in self.bars:
            self._unmap(bar)
        self.config.reset()
        if self.msix is not None:
            self.msix.reset()
        self.set_pin(False)

    def close(self) -> None:
        """Take the BARs off the bus, close the vectors' lines; again is no error."""
        for bar in self.bars:
            self._unmap(bar)
        if self.msix is not None:
            self.msix.close()

    def save(self) -> dict[str, Any]:
        """Configuration space and MSI-X."""
        state: dict[str, Any] = {"version": 1, "config": self.config.save(), "pin": self._pin}
        if self.msix is not None:
            state["msix"] = self.msix.save()
        return state

    def load(self, state: dict[str, Any]) -> None:
        """Take over a saved state, which is untrusted. Raises ValueError; then nothing has changed."""
        reader = StateReader(self.name, state)
        data = reader.data("config", c.SIZE, c.SIZE)
        pin = reader.flag("pin")
        msix = self.msix.check(reader.raw("msix")) if self.msix is not None else None
        reader.end()
        self.config.load(data)
        if self.msix is not None and msix is not None:
            self.msix.load(msix, self.config.get(self.msix_at + 2, 2))
        self._take_effect()
        self.set_pin(pin)

    def __repr__(self) -> str:
        places = ", ".join(f"BAR {bar.index} at {bar.base:#_x}" for bar in self.bars if bar.base is not None)
        return f"<PciFunction {self.name} {places or 'not placed'}>"
