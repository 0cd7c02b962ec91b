# SPDX-License-Identifier: Apache-2.0
"""The two doors to configuration space: ports (PCI 3.0, 3.2.2.3.2) and memory (ECAM, PCI Express 7.2.2)."""

from __future__ import annotations

from typing import Any, Protocol

from kvmpy.devices.base import StateReader
from kvmpy.pci.bus import PciBus

ADDRESS, RESET, DATA = 0, 1, 4  # offsets of 0xCF8, 0xCF9, 0xCFC
ENABLE = 1 << 31
ADDRESS_BITS = 0x80FF_FFFC
BUS_SIZE = 1 << 20


class ByteRegister(Protocol):
    """The reset control register at 0xCF9."""

    def read(self, offset: int, size: int) -> int: ...

    def write(self, offset: int, size: int, value: int) -> None: ...

    def reset(self) -> None: ...

    def save(self) -> dict[str, Any]: ...

    def load(self, state: dict[str, Any]) -> None: ...


class ConfigPorts:
    """Configuration mechanism #1: an address of 32 bits at 0xCF8, data at 0xCFC. A byte at 0xCF9 is reset control."""

    name = "pci-config"
    size = 8

    def __init__(self, bus: PciBus, reset_control: ByteRegister) -> None:
        self._bus = bus
        self._reset_control = reset_control
        self._address = 0

    def _target(self, offset: int) -> tuple[int, int, int, int]:
        """Bus, slot, function and register that the address names."""
        address = self._address
        return address >> 16 & 0xFF, address >> 11 & 0x1F, address >> 8 & 7, (address & 0xFC) + offset - DATA

    def read(self, offset: int, size: int) -> int:
        """Read the address, data, or reset control."""
        if offset >= DATA and self._address & ENABLE:
            return self._bus.read_config(*self._target(offset), size)
        if (offset, size) == (ADDRESS, 4):
            return self._address
        if (offset, size) == (RESET, 1):
            return self._reset_control.read(0, 1)
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Write the address, data, or reset control."""
        if offset >= DATA:
            if self._address & ENABLE:
                self._bus.write_config(*self._target(offset), size, value)
        elif (offset, size) == (ADDRESS, 4):
            self._address = value & ADDRESS_BITS
        elif (offset, size) == (RESET, 1):
            self._reset_control.write(0, 1, value)

    def reset(self) -> None:
        """As after power-on."""
        self._address = 0
        self._reset_control.reset()

    def save(self) -> dict[str, Any]:
        """The address, and reset control."""
        return {"version": 1, "address": self._address, "reset_control": self._reset_control.save()}

    def load(self, state: dict[str, Any]) -> None:
        """Take over a saved state. Raises ValueError."""
        reader = StateReader(self.name, state)
        address = reader.bits("address", ADDRESS_BITS)
        inner = reader.raw("reset_control")
        reader.end()
        if not isinstance(inner, dict):
            raise ValueError(f"{self.name}: the saved reset control is a {type(inner).__name__}")
        self._reset_control.load(inner)
        self._address = address


class Ecam:
    """Configuration space of one bus in memory: 4 KiB for each function."""

    name = "pci-ecam"
    size = BUS_SIZE

    def __init__(self, bus: PciBus) -> None:
        self._bus = bus

    def read(self, offset: int, size: int) -> int:
        """Read configuration space."""
        return self._bus.read_config(0, offset >> 15 & 0x1F, offset >> 12 & 7, offset & 0xFFF, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Write configuration space."""
        self._bus.write_config(0, offset >> 15 & 0x1F, offset >> 12 & 7, offset & 0xFFF, size, value)

    def reset(self) -> None:
        """Nothing: the bus has the state."""

    def save(self) -> dict[str, Any]:
        """Nothing."""
        return {"version": 1}

    def load(self, state: dict[str, Any]) -> None:
        """Nothing to take. Raises ValueError for a state that is not of this device."""
        StateReader(self.name, state).end()
