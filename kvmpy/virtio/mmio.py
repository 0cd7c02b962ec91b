# SPDX-License-Identifier: Apache-2.0
"""The virtio-mmio transport, virtio 1.2 section 4.2: registers on the memory bus and one interrupt line.

A register has four bytes and one offset; other widths and offsets are ignored and read 0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from kvmpy.arch import layout
from kvmpy.devices.base import StateReader
from kvmpy.irq import IrqLine
from kvmpy.memory import GuestMemory
from kvmpy.virtio import features as f
from kvmpy.virtio.device import VirtioDevice
from kvmpy.virtio.transport import MASK32, HasIoEventFd, VirtioTransport

MAGIC = 0x7472_6976  # "virt"
VERSION = 2
VENDOR = 0x4B56_4D50  # "PMVK" as bytes; the specification only wants some number
CONFIG = 0x100
QUEUE_NOTIFY = 0x50


class MmioTransport(VirtioTransport):
    """A virtio device on the memory bus; a bus device of 4 KiB.

    device: is closed with the transport. memory: guest memory with the rings and buffers. line: where its
    interrupt pin leads: `irq.EventLine` of an irqfd, or `irq.GsiLine`. Edge or level both work.
    """

    size = layout.VIRTIO_MMIO_SIZE

    def __init__(self, device: VirtioDevice, memory: GuestMemory, line: IrqLine) -> None:
        self._line = line
        self._kicks: list[tuple[HasIoEventFd, int, int]] = []
        self._interrupt = 0
        super().__init__(device, memory)
        self._reads: dict[int, Callable[[], int]] = {
            0x000: lambda: MAGIC,
            0x004: lambda: VERSION,
            0x008: lambda: self.device.device_id,
            0x00C: lambda: VENDOR,
            0x010: self._device_features,
            0x034: lambda: self.device.queues[self._sel].max_size if self._queue else 0,
            0x044: lambda: int(self._queue.ready) if self._queue else 0,
            0x060: lambda: self._interrupt,
            0x070: lambda: self._status,
            # No shared memory regions: length and base of all ones (4.2.2).
            0x0B0: lambda: MASK32,
            0x0B4: lambda: MASK32,
            0x0B8: lambda: MASK32,
            0x0BC: lambda: MASK32,
            0x0C0: lambda: 0,  # QueueReset: done when the write returns (2.6.1)
            0x0FC: lambda: self.device.config_generation,
        }
        self._writes: dict[int, Callable[[int], None]] = {
            0x014: self._write_device_features_sel,
            0x020: self._write_driver_features,
            0x024: self._write_driver_features_sel,
            0x030: self._write_queue_sel,
            0x038: self._write_queue_size,
            0x044: self._write_queue_ready,
            0x064: self._write_interrupt_ack,
            0x070: self._write_status,
            0x080: lambda value: self._write_address("desc", 0, value),
            0x084: lambda value: self._write_address("desc", 32, value),
            0x090: lambda value: self._write_address("avail", 0, value),
            0x094: lambda value: self._write_address("avail", 32, value),
            0x0A0: lambda value: self._write_address("used", 0, value),
            0x0A4: lambda value: self._write_address("used", 32, value),
            0x0C0: lambda value: self._reset_queue() if value == 1 else None,
        }

    # -- the bus

    def read(self, offset: int, size: int) -> int:
        """Read a register (4 bytes, aligned) or configuration space (any width)."""
        if offset >= CONFIG:
            return self.device.read_config(offset - CONFIG, size)
        register = self._reads.get(offset) if size == 4 else None
        return register() if register is not None else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Write a register (4 bytes, aligned) or configuration space (any width)."""
        if offset == QUEUE_NOTIFY:
            if size == 4:
                self._kick(value)
            return
        with self._lock:
            if offset >= CONFIG:
                self._write_config(offset - CONFIG, size, value)
            elif size == 4 and offset in self._writes:
                self._writes[offset](value)
        self._inline()

    def _write_queue_ready(self, value: int) -> None:
        queue = self._queue
        if value == 1:
            self._enable_queue()
        elif value == 0 and queue is not None and queue.ready:
            # The device must touch the queue no more when this returns (4.2.2.2).
            self.device.stop_queue(self._sel)
            queue.ready = False

    def _write_interrupt_ack(self, value: int) -> None:
        with self._irq_lock:
            self._interrupt &= ~value
            # Low in between: on an edge-triggered line what is left needs an edge of its own.
            self._line.set(False)
            if self._interrupt:
                self._line.set(True)

    def _interrupts_reset(self) -> None:
        self._interrupt = 0
        self._line.set(False)

    def _raise(self, queue: int | None) -> None:
        with self._irq_lock:
            self._interrupt |= f.CONFIG_CHANGE if queue is None else f.USED_BUFFER
            self._line.set(True)

    def _save_interrupts(self) -> dict[str, Any]:
        return {"interrupt": self._interrupt}

    # -- wiring and life

    def connect_kicks(self, vm: HasIoEventFd, base: int) -> None:
        """Let kicks signal the workers without an exit (KVM_IOEVENTFD). base: guest address of the registers."""
        for index in range(len(self.device.queues)):
            fd = self.device.kick_fd(index)
            vm.ioeventfd(fd, base + QUEUE_NOTIFY, 4, datamatch=index)
            self._kicks.append((vm, base + QUEUE_NOTIFY, index))

    def close(self) -> None:
        """Stop the device and release it; again is no error. To be called while the VM is still open."""
        while self._kicks:
            vm, addr, index = self._kicks.pop()
            with contextlib.suppress(OSError):  # the VM may be gone, and its ioeventfds with it
                vm.ioeventfd(self.device.kick_fd(index), addr, 4, datamatch=index, deassign=True)
        with self._lock:
            self.device.close()

    # -- state

    def save(self) -> dict[str, Any]:
        """All registers, where the queues are, and the device's own state; requests in flight are finished first."""
        with self._lock:
            return self._save()

    def load(self, state: dict[str, Any]) -> None:
        """Take over a saved state, which is untrusted. Raises ValueError; then the device is reset."""
        reader = StateReader(self.name, state)
        interrupt = reader.bits("interrupt", f.USED_BUFFER | f.CONFIG_CHANGE)
        saved = self._read_state(reader)
        reader.end()
        with self._lock:
            self._load(saved)
            with self._irq_lock:
                self._interrupt = interrupt
                self._line.set(bool(interrupt))
            self._go_on()
