# SPDX-License-Identifier: Apache-2.0
"""The driver's side of virtio-pci: a `Driver`, which names registers as virtio-mmio does, on the structures of BAR 0.

driver = PciDriver(transport, memory)                    # INTx; after use_msix(address) messages
"""

from __future__ import annotations

from kvmpy.memory import GuestMemory
from kvmpy.pci.msix import ENABLE
from kvmpy.virtio import pci
from kvmpy.virtio.testing import Driver

# virtio-mmio's offset (4.2.2) -> offset and width in the common structure (4.1.4.3).
COMMON = {
    0x010: (0x04, 4), 0x014: (0x00, 4), 0x020: (0x0C, 4), 0x024: (0x08, 4),
    0x030: (0x16, 2), 0x034: (0x18, 2), 0x038: (0x18, 2), 0x044: (0x1C, 2), 0x070: (0x14, 1),
    0x080: (0x20, 4), 0x084: (0x24, 4), 0x090: (0x28, 4), 0x094: (0x2C, 4), 0x0A0: (0x30, 4), 0x0A4: (0x34, 4),
    0x0C0: (0x3A, 2), 0x0FC: (0x15, 1),
}  # fmt: skip
QUEUE_NOTIFY, INTERRUPT_STATUS, INTERRUPT_ACK, CONFIG = 0x50, 0x60, 0x64, 0x100


class PciDriver(Driver):
    """A driver of a device behind `PciTransport`."""

    def __init__(self, transport: pci.PciTransport, memory: GuestMemory, start: int = 0x10_0000) -> None:
        super().__init__(transport, memory, start)
        self.pci = transport

    def read(self, offset: int) -> int:
        """The register that virtio-mmio has at `offset`; reading the interrupt status takes it away."""
        if offset == INTERRUPT_STATUS:
            return self.pci.read(pci.ISR, 1)
        if offset not in COMMON:
            return 0
        at, size = COMMON[offset]
        return self.pci.read(pci.COMMON + at, size)

    def write(self, offset: int, value: int) -> None:
        """Likewise; acknowledging does nothing, as reading did it."""
        if offset == QUEUE_NOTIFY:
            at = pci.NOTIFY + pci.NOTIFY_MULTIPLIER * value
            if at < pci.TABLE:
                self.pci.write(at, 2, value & 0xFFFF)
        elif offset in COMMON:
            at, size = COMMON[offset]
            self.pci.write(pci.COMMON + at, size, value & (1 << 8 * size) - 1)

    def config(self, offset: int, size: int) -> int:
        """A number in the device's configuration space."""
        return self.pci.read(pci.DEVICE + offset, size)

    def write_config(self, offset: int, size: int, value: int) -> None:
        """Write the device's configuration space."""
        self.pci.write(pci.DEVICE + offset, size, value)

    def use_msix(self, address: int = 0xFEE0_0000) -> None:
        """Enable MSI-X: vector n sends n + 0x40 to `address`; vector 0 is the configuration's, n + 1 queue n's."""
        for vector in range(self.pci.msix.count):
            entry = pci.TABLE + 16 * vector
            for word, value in enumerate((address & 0xFFFF_FFFF, address >> 32, 0x40 + vector, 0)):
                self.pci.write(entry + 4 * word, 4, value)
        self.pci.write(pci.COMMON + 0x10, 2, 0)
        for index in range(self.pci.msix.count - 1):
            self.write(0x30, index)
            self.pci.write(pci.COMMON + 0x1A, 2, index + 1)
        self.pci.function.write_config(self.pci.function.msix_at + 2, 2, ENABLE)
