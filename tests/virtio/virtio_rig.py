# SPDX-License-Identifier: Apache-2.0
"""A device, its transport, guest memory with canaries around what the driver uses, and a driver."""

from __future__ import annotations

import hashlib

from kvmpy.bus import Bus
from kvmpy.irq import NullLine
from kvmpy.memory import GuestMemory, Ram
from kvmpy.pci import PciBus
from kvmpy.virtio import MmioTransport, PciTransport, VirtioDevice
from kvmpy.virtio import features as f
from kvmpy.virtio.testing import Driver
from kvmpy.virtio.testing_pci import PciDriver

MIB = 1 << 20
RAM = 0x0  # 4 MiB; the driver's heap is in the third
UNNAMED = 1 << 16  # below, the device writes when a driver enables a queue and has named no rings: those are at 0 then
HOLE = 4 * MIB
ROM = 8 * MIB  # 64 KiB, read-only
HIGH = 1 << 32  # 1 MiB
HEAP = 2 * MIB
HEAP_END = 3 * MIB
PACKED = False  # set by the fixture `ring`: drivers use packed rings
PCI = False  # likewise: devices are behind virtio-pci
TOP = (1 << 64) - 4096  # the last page of the address space is not memory


def guest_memory(wrote=None) -> GuestMemory:
    memory = GuestMemory(lambda *slot: None, wrote)
    memory.add(RAM, Ram.anonymous(4 * MIB))
    memory.add(ROM, Ram.from_bytes(b"\xee" * 65536), readonly=True)
    memory.add(HIGH, Ram.anonymous(MIB))
    return memory


class Messages:
    """An interrupt chip for MSI-X: keeps what was sent, (address, data); refuses addresses above 4 GiB."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, int]] = []
        self.open = 0

    def line(self) -> Messages.Line:
        self.open += 1
        return Messages.Line(self)

    class Line:
        def __init__(self, messages: Messages) -> None:
            self.messages = messages
            self.message: tuple[int, int] | None = None

        def route(self, address: int, data: int) -> bool:
            if address >> 32:
                return False
            self.message = (address, data)
            return True

        def signal(self) -> None:
            assert self.message is not None
            self.messages.sent.append(self.message)

        def close(self) -> None:
            self.messages.open -= 1


class Rig:
    def __init__(self, device: VirtioDevice, memory: GuestMemory | None = None) -> None:
        self.device = device
        if PACKED:
            device.offer(f.RING_PACKED)
        self.memory = memory if memory is not None else guest_memory()
        self.line = NullLine()
        if PCI:
            self.mmio = Bus("mmio")
            self.messages = Messages()
            self.bus = PciBus(self.mmio, [self.line] * 4)
            self.transport = PciTransport(device, self.memory, self.messages)
            self.bus.plug(self.transport.function)
            self.driver: Driver = PciDriver(self.transport, self.memory, HEAP)
        else:
            self.transport = MmioTransport(device, self.memory, self.line)
            self.driver = Driver(self.transport, self.memory, HEAP)
        for start, size in self.canaries():
            self.memory.fill(start, size, 0xA5)

    @staticmethod
    def canaries():
        return [(RAM, HEAP), (HEAP_END, MIB), (HIGH, MIB)]

    def canary(self, lowest: int = RAM) -> bytes:
        """A digest of memory from `lowest` on that no device may touch."""
        digest = hashlib.sha256()
        for start, size in self.canaries():
            left_out = max(lowest - start, 0)
            digest.update(self.memory.read(start + left_out, size - left_out))
        digest.update(self.memory.read(ROM, 65536))
        return digest.digest()

    def start(self, wanted: int = 0, size: int | None = None, only=None) -> Driver:
        self.driver.start(wanted | (f.RING_PACKED if PACKED else 0), size, only=only)
        return self.driver

    def close(self) -> None:
        self.transport.close()

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
