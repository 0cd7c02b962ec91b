# SPDX-License-Identifier: Apache-2.0
"""Configuration space of a function (PCI 3.0, 6.1 and 6.7): bytes, and which bits of them software may write."""

from __future__ import annotations

import struct

SIZE = 256
EXTENDED_SIZE = 4096  # beyond 256 bytes all is zero: there are no extended capabilities

# The type 0 header (6.1, 6.2).
VENDOR_ID, DEVICE_ID, COMMAND, STATUS = 0x00, 0x02, 0x04, 0x06
REVISION, CACHE_LINE = 0x08, 0x0C
BAR0 = 0x10
SUBSYSTEM_VENDOR, CAPABILITIES, INTERRUPT_LINE, INTERRUPT_PIN = 0x2C, 0x34, 0x3C, 0x3D
HEADER_SIZE = 0x40

# COMMAND and STATUS (6.2.2, 6.2.3).
MEMORY_SPACE, BUS_MASTER, PARITY, SERR, INTX_DISABLE = 1 << 1, 1 << 2, 1 << 6, 1 << 8, 1 << 10
INTX_STATUS, HAS_CAPABILITIES = 1 << 3, 1 << 4


class ConfigSpace:
    """256 bytes of registers, most of them fixed.

    vendor, device, subsystem: ids; class_code: 24 bits; pin: 1 for INTA, 0 for none.
    """

    def __init__(
        self,
        vendor: int,
        device: int,
        class_code: int,
        *,
        revision: int = 1,
        subsystem: tuple[int, int] = (0, 0),
        pin: int = 0,
    ) -> None:
        self._data = bytearray(SIZE)
        self._writable = bytearray(SIZE)
        self._next_capability = HEADER_SIZE
        self._last_link = CAPABILITIES
        struct.pack_into("<HH", self._data, VENDOR_ID, vendor, device)
        struct.pack_into("<I", self._data, REVISION, class_code << 8 | revision)
        struct.pack_into("<HH", self._data, SUBSYSTEM_VENDOR, *subsystem)
        self._data[INTERRUPT_PIN] = pin
        self.allow(COMMAND, (MEMORY_SPACE | BUS_MASTER | PARITY | SERR | INTX_DISABLE).to_bytes(2, "little"))
        self.allow(CACHE_LINE, b"\xff")
        self.allow(INTERRUPT_LINE, b"\xff")
        self._initial = bytes(self._data)

    def allow(self, offset: int, mask: bytes) -> None:
        """Let software write the bits of `mask` from `offset` on."""
        self._writable[offset : offset + len(mask)] = mask

    def add_capability(self, kind: int, body: bytes, writable: bytes = b"") -> int:
        """Append a capability (6.7): its id, `body` after the two bytes of the list, and the writable bits of `body`.

        Returns: its offset. Raises ValueError when there is no room.
        """
        at = self._next_capability
        end = at + 2 + len(body)
        if end > SIZE:
            raise ValueError(f"no room for capability {kind:#x} of {2 + len(body)} bytes at {at:#x}")
        self._data[self._last_link] = at
        self._data[at : at + 2] = kind, 0
        self._data[at + 2 : end] = body
        self.allow(at + 2, writable)
        self._last_link, self._next_capability = at + 1, -(-end // 4) * 4
        self._data[STATUS] |= HAS_CAPABILITIES
        self._initial = bytes(self._data)
        return at

    def add_bar(self, index: int, size: int, kind: int, *, wide: bool) -> None:
        """Make BAR `index` take addresses that are multiples of `size`; kind: its low four bits (6.2.5.1)."""
        mask = -size & (1 << (64 if wide else 32)) - 1
        at = BAR0 + 4 * index
        self._data[at] = kind
        self.allow(at, mask.to_bytes(8 if wide else 4, "little"))
        self._initial = bytes(self._data)

    # -- accesses

    def get(self, offset: int, size: int) -> int:
        """`size` bytes at `offset`, little endian; what is beyond the end reads 0."""
        return int.from_bytes(self._data[offset : offset + size], "little")

    def put(self, offset: int, size: int, value: int) -> None:
        """Set registers, whatever software may do with them."""
        self._data[offset : offset + size] = value.to_bytes(size, "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """A write by software: what is not writable keeps its value."""
        size = min(size, SIZE - offset)
        if size <= 0:
            return
        mask = int.from_bytes(self._writable[offset : offset + size], "little")
        self.put(offset, size, self.get(offset, size) & ~mask | value & mask)

    def reset(self) -> None:
        """As after power-on."""
        self._data[:] = self._initial

    def save(self) -> bytes:
        """All bytes."""
        return bytes(self._data)

    def load(self, data: bytes) -> None:
        """Take the writable bits of a saved space. Raises ValueError when its fixed bits are of another function."""
        if len(data) != SIZE:
            raise ValueError(f"a configuration space has {SIZE} bytes, not {len(data)}")
        differs = [i for i in range(SIZE) if (data[i] ^ self._initial[i]) & ~self._writable[i]]
        if differs:
            raise ValueError(f"the saved configuration space is of another function: byte {differs[0]:#x} differs")
        self.write(0, SIZE, int.from_bytes(data, "little"))
