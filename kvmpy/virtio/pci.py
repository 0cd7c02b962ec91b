# SPDX-License-Identifier: Apache-2.0
"""The virtio-pci transport, virtio 1.2 section 4.1, of a modern device: structures in BAR 0, MSI-X or INTx.

    0x0000  common configuration (4.1.4.3)      0x3000  notifications, four bytes for each queue (4.1.4.4)
    0x1000  ISR status (4.1.4.5)                0x4000  MSI-X table
    0x2000  device configuration (4.1.4.6)      0x5000  MSI-X pending bits

A register of the common structure has one width and one offset (4.1.3.1; fields of 64 bits are two words); other
accesses are ignored and read 0. Vector 0xFFFF is none.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from typing import Any

from kvmpy.devices.base import StateReader
from kvmpy.memory import GuestMemory
from kvmpy.pci.config import ConfigSpace
from kvmpy.pci.function import PciFunction
from kvmpy.pci.msi import MsiSource
from kvmpy.pci.msix import Msix
from kvmpy.virtio import features as f
from kvmpy.virtio.device import VirtioDevice
from kvmpy.virtio.transport import HasIoEventFd, QueueRegisters, VirtioTransport

VENDOR = 0x1AF4
FIRST_DEVICE = 0x1040  # plus the virtio device id (4.1.2)
REVISION = 1
SUBSYSTEM = (VENDOR, 0x1100)
CLASSES = {1: 0x02_0000, 2: 0x01_0000, 3: 0x07_8000, 4: 0x10_0000, 5: 0x05_0000, 19: 0x07_8000}
OTHER_CLASS = 0xFF_0000

BAR = 0
BAR_SIZE = 0x8000
COMMON, ISR, DEVICE, NOTIFY, TABLE, PENDING = range(0, 0x6000, 0x1000)
PART = 0x1000  # bytes between them
COMMON_SIZE = 0x40
NOTIFY_MULTIPLIER = 4
NO_VECTOR = 0xFFFF
MAX_QUEUES = PART // 16 - 1  # vectors: one for each queue, one for the configuration

# Capabilities (4.1.4): the kind of structure.
VENDOR_SPECIFIC = 0x09
COMMON_CFG, NOTIFY_CFG, ISR_CFG, DEVICE_CFG, PCI_CFG = 1, 2, 3, 4, 5
WINDOW_BAR, WINDOW_OFFSET, WINDOW_LENGTH, WINDOW_DATA = 4, 8, 12, 16  # of the PCI_CFG capability (4.1.4.9)


class PciTransport(VirtioTransport):
    """A virtio device as a PCI function; plug `function` into a `pci.PciBus`.

    device: is closed with the transport. memory: guest memory with the rings and buffers. msi: where MSI-X messages go.
    vm: if given, kicks signal the workers without an exit (KVM_IOEVENTFD), wherever the guest puts the BAR.
    """

    def __init__(
        self, device: VirtioDevice, memory: GuestMemory, msi: MsiSource, vm: HasIoEventFd | None = None
    ) -> None:
        if len(device.queues) > MAX_QUEUES:
            raise ValueError(f"{device.name}: {len(device.queues)} queues, virtio-pci here has room for {MAX_QUEUES}")
        self._vm = vm
        self._isr = 0
        self._kicks: list[tuple[int, int]] = []  # (queue, address) of ioeventfds
        super().__init__(device, memory)
        config = ConfigSpace(
            VENDOR,
            FIRST_DEVICE + device.device_id,
            CLASSES.get(device.device_id, OTHER_CLASS),
            revision=REVISION,
            subsystem=SUBSYSTEM,
            pin=1,
        )
        self.msix = Msix(len(device.queues) + 1, msi, device.name)
        self.function = _VirtioFunction(device.name, config, self)
        self.function.add_bar(BAR, BAR_SIZE, self.read, self.write, moved=self._moved)
        self.function.use_msix(self.msix, BAR, TABLE, PENDING)
        _add_structure(config, COMMON_CFG, COMMON, COMMON_SIZE)
        _add_structure(config, NOTIFY_CFG, NOTIFY, NOTIFY_MULTIPLIER * len(device.queues), extra=NOTIFY_MULTIPLIER)
        _add_structure(config, ISR_CFG, ISR, 1)
        if device.config_size:
            _add_structure(config, DEVICE_CFG, DEVICE, device.config_size)
        self.function.window = _add_structure(config, PCI_CFG, 0, 0, extra=0, writable=True)
        self._common_reads: dict[tuple[int, int], Callable[[], int]] = {
            (0x00, 4): lambda: self._device_features_sel,
            (0x04, 4): self._device_features,
            (0x08, 4): lambda: self._driver_features_sel,
            (0x0C, 4): self._driver_features_word,
            (0x10, 2): lambda: self._config_vector,
            (0x12, 2): lambda: len(self._registers),
            (0x14, 1): lambda: self._status,
            (0x15, 1): lambda: self.device.config_generation & 0xFF,
            (0x16, 2): lambda: self._sel,
            (0x18, 2): lambda: self._queue.size & 0xFFFF if self._queue else 0,
            (0x1A, 2): lambda: self._vectors[self._sel] if self._queue else NO_VECTOR,
            (0x1C, 2): lambda: int(self._queue.ready) if self._queue else 0,
            (0x1E, 2): lambda: self._sel if self._queue else 0,
            (0x20, 4): lambda: self._address("desc", 0),
            (0x24, 4): lambda: self._address("desc", 32),
            (0x28, 4): lambda: self._address("avail", 0),
            (0x2C, 4): lambda: self._address("avail", 32),
            (0x30, 4): lambda: self._address("used", 0),
            (0x34, 4): lambda: self._address("used", 32),
            (0x3A, 2): lambda: 0,  # queue_reset: done when the write returns (2.6.1)
        }
        self._common_writes: dict[tuple[int, int], Callable[[int], None]] = {
            (0x00, 4): self._write_device_features_sel,
            (0x08, 4): self._write_driver_features_sel,
            (0x0C, 4): self._write_driver_features,
            (0x10, 2): self._write_config_vector,
            (0x14, 1): self._write_status,
            (0x16, 2): self._write_queue_sel,
            (0x18, 2): self._write_queue_size,
            (0x1A, 2): self._write_queue_vector,
            # The driver cannot take a queue away by writing 0 (4.1.4.3.2); that is what queue_reset is for.
            (0x1C, 2): lambda value: self._enable_queue() if value == 1 else None,
            (0x20, 4): lambda value: self._write_address("desc", 0, value),
            (0x24, 4): lambda value: self._write_address("desc", 32, value),
            (0x28, 4): lambda value: self._write_address("avail", 0, value),
            (0x2C, 4): lambda value: self._write_address("avail", 32, value),
            (0x30, 4): lambda value: self._write_address("used", 0, value),
            (0x34, 4): lambda value: self._write_address("used", 32, value),
            (0x3A, 2): self._write_queue_reset,
        }

    def _clear(self) -> None:
        super()._clear()
        self._config_vector = NO_VECTOR
        self._vectors = [NO_VECTOR] * len(self.device.queues)

    def _fresh_queue(self, index: int) -> QueueRegisters:
        """A driver that does not write the size takes the largest (4.1.4.3)."""
        return QueueRegisters(size=self.device.queues[index].max_size)

    # -- BAR 0

    def read(self, offset: int, size: int) -> int:
        """Read a structure in BAR 0."""
        part, at = offset & -PART, offset & PART - 1
        if part == COMMON:
            register = self._common_reads.get((at, size))
            return register() if register is not None else 0
        if part == ISR:
            return self._take_isr() if at == 0 else 0
        if part == DEVICE:
            return self.device.read_config(at, size)
        if part == TABLE:
            return self.msix.read_table(at, size)
        return self.msix.read_pending(at, size) if part == PENDING else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Write a structure in BAR 0."""
        part, at = offset & -PART, offset & PART - 1
        if part == NOTIFY:  # the address tells the queue, whatever is written (4.1.5.2)
            if at % NOTIFY_MULTIPLIER == 0:
                self._kick(at // NOTIFY_MULTIPLIER)
            return
        if part == TABLE:
            self.msix.write_table(at, size, value)
            return
        with self._lock:
            if part == DEVICE:
                self._write_config(at, size, value)
            elif part == COMMON and (at, size) in self._common_writes:
                self._common_writes[at, size](value)
        self._inline()

    # -- registers

    def _driver_features_word(self) -> int:
        sel = self._driver_features_sel
        return self._driver_features >> 32 * sel & 0xFFFF_FFFF if sel < 2 else 0

    def _address(self, ring: str, shift: int) -> int:
        queue = self._queue
        return getattr(queue, ring) >> shift & 0xFFFF_FFFF if queue is not None else 0

    def _write_config_vector(self, value: int) -> None:
        self._config_vector = value if value < self.msix.count else NO_VECTOR

    def _write_queue_vector(self, value: int) -> None:
        if self._queue is not None:
            self._vectors[self._sel] = value if value < self.msix.count else NO_VECTOR

    def _write_queue_reset(self, value: int) -> None:
        if value == 1 and self._queue is not None:
            self._reset_queue()
            self._vectors[self._sel] = NO_VECTOR

    # -- interrupts (4.1.5.3, 4.1.5.4)

    def _take_isr(self) -> int:
        """Reading acknowledges (4.1.4.5)."""
        with self._irq_lock:
            isr, self._isr = self._isr, 0
            self.function.set_pin(False)
        return isr

    def _interrupts_reset(self) -> None:
        self._isr = 0
        self.function.set_pin(False)

    def _raise(self, queue: int | None) -> None:
        if self.msix.enabled:
            self.msix.notify(self._config_vector if queue is None else self._vectors[queue])
            return
        with self._irq_lock:
            self._isr |= f.CONFIG_CHANGE if queue is None else f.USED_BUFFER
            self.function.set_pin(True)

    def _save_interrupts(self) -> dict[str, Any]:
        return {"isr": self._isr, "config_vector": self._config_vector, "vectors": list(self._vectors)}

    # -- wiring and life

    def _moved(self, base: int | None) -> None:
        """The guest has put BAR 0 elsewhere: kicks are signals there, not exits."""
        vm = self._vm
        if vm is None:
            return
        while self._kicks:
            index, addr = self._kicks.pop()
            with contextlib.suppress(OSError):  # the VM may be gone, and its ioeventfds with it
                vm.ioeventfd(self.device.kick_fd(index), addr, deassign=True)
        if base is None:
            return
        for index in range(len(self._registers)):
            addr = base + NOTIFY + NOTIFY_MULTIPLIER * index
            try:
                vm.ioeventfd(self.device.kick_fd(index), addr)  # a write of any size
            except OSError as error:  # kicks are exits then
                self.device.warn("%s: no ioeventfd at %#x: %s", self.name, addr, error)
                return
            self._kicks.append((index, addr))

    def close(self) -> None:
        """Stop the device and release it; again is no error. To be called while the VM is still open."""
        self.function.close()
        with self._lock:
            self.device.close()

    # -- state

    def save(self) -> dict[str, Any]:
        """All registers, the PCI function, where the queues are, the device's own state; requests in flight are
        finished first.
        """
        with self._lock:
            return {**self._save(), "pci": self.function.save()}

    def load(self, state: dict[str, Any]) -> None:
        """Take over a saved state, which is untrusted. Raises ValueError; then the device is reset."""
        reader = StateReader(self.name, state)
        isr = reader.bits("isr", f.USED_BUFFER | f.CONFIG_CHANGE)
        config_vector = reader.bits("config_vector", 0xFFFF)
        vectors = reader.integers("vectors", len(self._vectors), 0xFFFF)
        pci = reader.raw("pci")
        saved = self._read_state(reader)
        reader.end()
        known = {*range(self.msix.count), NO_VECTOR}
        if len(vectors) != len(self._vectors) or not {config_vector, *vectors} <= known:
            raise ValueError(f"{self.name}: saved vectors {config_vector}, {vectors} are not those of this device")
        with self._lock:
            self._load(saved)
            try:
                self.function.load(pci)
            except BaseException:
                self._reset()
                raise
            self._config_vector, self._vectors = config_vector, vectors
            with self._irq_lock:
                self._isr = isr
                self.function.set_pin(bool(isr))
            self._go_on()


def _add_structure(
    config: ConfigSpace, kind: int, offset: int, length: int, *, extra: int | None = None, writable: bool = False
) -> int:
    """A capability that says where a structure is (4.1.4); extra: its fifth word. Returns: its offset."""
    size = 16 if extra is None else 20
    body = struct.pack("<BBBBHII", size, kind, BAR, 0, 0, offset, length)
    if extra is not None:
        body += struct.pack("<I", extra)
    # Of the window: BAR, offset, length and data.
    mask = b"\0\0" + b"\xff" + bytes(3) + b"\xff" * 12 if writable else b""
    return config.add_capability(VENDOR_SPECIFIC, body, mask)


class _VirtioFunction(PciFunction):
    """A function with a window into its BAR, for software that only reaches configuration space (4.1.4.9)."""

    window = 0  # offset of the capability

    def __init__(self, name: str, config: ConfigSpace, transport: PciTransport) -> None:
        super().__init__(name, config)
        self._transport = transport

    def _target(self) -> tuple[int, int] | None:
        """Offset in BAR 0 and length, if the window is set to what may be accessed."""
        offset = self.config.get(self.window + WINDOW_OFFSET, 4)
        length = self.config.get(self.window + WINDOW_LENGTH, 4)
        bar = self.config.get(self.window + WINDOW_BAR, 1)
        if bar != BAR or length not in (1, 2, 4) or offset % length or offset > BAR_SIZE - length:
            return None
        return offset, length

    def _touches_data(self, offset: int, size: int) -> bool:
        data = self.window + WINDOW_DATA
        return offset < data + 4 and offset + size > data

    def read_config(self, offset: int, size: int) -> int:
        """As any function's; reading the window's data reads the BAR first."""
        if self._touches_data(offset, size) and (target := self._target()) is not None:
            value = self._transport.read(*target) & (1 << 8 * target[1]) - 1
            self.config.put(self.window + WINDOW_DATA, target[1], value)
        return super().read_config(offset, size)

    def write_config(self, offset: int, size: int, value: int) -> None:
        """As any function's; writing the window's data writes the BAR afterwards."""
        super().write_config(offset, size, value)
        if self._touches_data(offset, size) and (target := self._target()) is not None:
            self._transport.write(*target, self.config.get(self.window + WINDOW_DATA, target[1]))
