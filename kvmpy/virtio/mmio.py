# SPDX-License-Identifier: Apache-2.0
"""The virtio-mmio transport, virtio 1.2 section 4.2: registers on the memory bus and one interrupt line.

The driver's side of the state machine (2.1, 3.1.1) is enforced: features before FEATURES_OK, queues between
FEATURES_OK and DRIVER_OK (or after the reset of that queue), requests after DRIVER_OK. What comes out of order, with a
wrong width or at a wrong offset is ignored and reads 0.

Locks: `_lock` is held by vCPUs while they change the device, and it may wait for workers; `_irq_lock` guards status and
interrupt bits, which workers change too, and nothing waits while it is held.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from kvmpy.arch import layout
from kvmpy.devices.base import StateReader
from kvmpy.irq import IrqLine
from kvmpy.memory import GuestMemory
from kvmpy.virtio import features as f
from kvmpy.virtio.device import VirtioDevice

MAGIC = 0x7472_6976  # "virt"
VERSION = 2
VENDOR = 0x4B56_4D50  # "PMVK" as bytes; the specification only wants some number
CONFIG = 0x100
QUEUE_NOTIFY = 0x50
MASK32 = 0xFFFF_FFFF


@dataclass
class QueueRegisters:
    """What the driver wrote for one queue."""

    size: int = 0
    ready: bool = False
    desc: int = 0
    avail: int = 0
    used: int = 0
    was_reset: bool = False  # by QueueReset: may be set up again although the device runs


class HasIoEventFd(Protocol):
    """The part of `kvmpy.Vm` that kicks without exits need."""

    def ioeventfd(
        self, fd: int, addr: int, size: int = 0, *, datamatch: int | None = None, deassign: bool = False
    ) -> object:
        """KVM_IOEVENTFD, api.rst 4.59."""
        ...


class MmioTransport:
    """A virtio device on the memory bus; a bus device of 4 KiB.

    device: is closed with the transport. memory: guest memory with the rings and buffers. line: where its
    interrupt pin leads: `irq.EventLine` of an irqfd, or `irq.GsiLine`. Edge or level both work.
    """

    size = layout.VIRTIO_MMIO_SIZE

    def __init__(self, device: VirtioDevice, memory: GuestMemory, line: IrqLine) -> None:
        self.device = device
        self.name = device.name
        self._memory = memory
        self._line = line
        self._lock = threading.Lock()
        self._irq_lock = threading.Lock()
        self._kicks: list[tuple[HasIoEventFd, int, int]] = []
        self._status = 0
        self._interrupt = 0
        self._clear()
        device.attach(self)
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
            0x0C0: self._write_queue_reset,
        }

    def _clear(self) -> None:
        self._sel = 0
        self._device_features_sel = 0
        self._driver_features_sel = 0
        self._driver_features = 0
        self._registers = [QueueRegisters() for _ in self.device.queues]

    # -- the bus

    def read(self, offset: int, size: int) -> int:
        """Read a register (4 bytes, aligned) or configuration space (any width)."""
        if offset >= CONFIG:
            return self.device.read_config(offset - CONFIG, size)
        register = self._reads.get(offset) if size == 4 else None
        return register() if register is not None else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Write a register (4 bytes, aligned) or configuration space (any width)."""
        if offset == QUEUE_NOTIFY:  # without the lock: a kick never waits for anything
            if size == 4 and value < len(self._registers):
                self.device.kick(value)
                self._inline()
            return
        with self._lock:
            if offset >= CONFIG:
                if offset - CONFIG + size <= self.device.config_size:
                    self.device.write_config(offset - CONFIG, size, value)
            elif size == 4 and offset in self._writes:
                self._writes[offset](value)
        self._inline()

    def _inline(self) -> None:
        """A device without threads works where it is kicked."""
        if not self.device.workers[0].threaded:
            self.device.poll()

    # -- registers

    @property
    def status(self) -> int:
        """The device status field (2.1)."""
        return self._status

    @property
    def _queue(self) -> QueueRegisters | None:
        sel = self._sel
        return self._registers[sel] if sel < len(self._registers) else None

    def _device_features(self) -> int:
        return self.device.features >> 32 * self._device_features_sel & MASK32 if self._device_features_sel < 2 else 0

    def _write_device_features_sel(self, value: int) -> None:
        self._device_features_sel = value

    def _write_driver_features_sel(self, value: int) -> None:
        self._driver_features_sel = value

    def _write_driver_features(self, value: int) -> None:
        if self._status & (f.DRIVER | f.FEATURES_OK) == f.DRIVER and self._driver_features_sel < 2:
            shift = 32 * self._driver_features_sel
            self._driver_features = self._driver_features & ~(MASK32 << shift) | value << shift

    def _write_queue_sel(self, value: int) -> None:
        self._sel = value

    def _open_for_setup(self) -> QueueRegisters | None:
        """The selected queue, if the driver may set it up now."""
        queue = self._queue
        if queue is None or not self._status & f.FEATURES_OK or self._status & (f.NEEDS_RESET | f.FAILED):
            return None
        return queue if not self._status & f.DRIVER_OK or queue.was_reset else None

    def _write_queue_size(self, value: int) -> None:
        queue = self._open_for_setup()
        if queue is not None and not queue.ready:
            queue.size = value  # checked when it becomes ready

    def _write_address(self, ring: str, shift: int, value: int) -> None:
        queue = self._open_for_setup()
        if queue is not None and not queue.ready:
            setattr(queue, ring, getattr(queue, ring) & ~(MASK32 << shift) | value << shift)

    def _write_queue_ready(self, value: int) -> None:
        queue = self._queue
        if queue is None:
            return
        if value == 1 and not queue.ready:
            if self._open_for_setup() is not None and self._configure(self._sel):
                queue.was_reset = False
                self.device.resume()
        elif value == 0 and queue.ready:  # the device must touch the queue no more when this returns (4.2.2.2)
            self.device.stop_queue(self._sel)
            queue.ready = False

    def _configure(self, index: int) -> bool:
        """Take a queue into use; what is wrong with it breaks the device."""
        registers = self._registers[index]
        queue = self.device.queues[index]
        self.device.stop()
        registers.ready = queue.configure(
            self._memory,
            registers.size,
            registers.desc,
            registers.avail,
            registers.used,
            event_idx=bool(self._driver_features & f.EVENT_IDX),
            indirect=bool(self._driver_features & f.INDIRECT_DESC),
            packed=bool(self._driver_features & f.RING_PACKED),
        )
        if not registers.ready:
            self.device.needs_reset(f"queue {index}: {queue.fault}")
        return registers.ready

    def _write_queue_reset(self, value: int) -> None:
        queue = self._queue
        if value == 1 and queue is not None and self._driver_features & f.RING_RESET and self._status & f.DRIVER_OK:
            self.device.stop_queue(self._sel)
            self._registers[self._sel] = QueueRegisters(was_reset=True)

    def _write_status(self, value: int) -> None:
        if value == 0:
            self._reset()
            return
        value &= f.ACKNOWLEDGE | f.DRIVER | f.FEATURES_OK | f.DRIVER_OK | f.FAILED
        old = self._status & ~f.NEEDS_RESET
        new = value & ~old
        if old & ~value:
            return  # bits may only be cleared by a reset (2.1.1)
        if new & f.FEATURES_OK and not self._features_ok(value):
            new &= ~f.FEATURES_OK
        # The driver must have seen FEATURES_OK before it goes on (3.1.1).
        if new & f.DRIVER_OK and not old & f.FEATURES_OK:
            new &= ~f.DRIVER_OK
        with self._irq_lock:
            self._status |= new
            broken = self._status & (f.NEEDS_RESET | f.FAILED)
        if new & f.FAILED:
            self.device.stop()
        elif new & f.DRIVER_OK and not broken:
            self.device.activate(self._driver_features)

    def _features_ok(self, status: int) -> bool:
        known = f.ACKNOWLEDGE | f.DRIVER
        return status & known == known and self._acceptable(self._driver_features)

    def _acceptable(self, accepted: int) -> bool:
        """May a driver accept these features (2.2, 6.1)?"""
        return (
            not accepted & ~self.device.features
            and bool(accepted & f.VERSION_1)
            and self.device.check_features(accepted)
        )

    def _reset(self) -> None:
        self.device.reset()  # first: no worker may set a status or interrupt bit afterwards
        with self._irq_lock:
            self._status = 0
            self._interrupt = 0
            self._line.set(False)
        self._clear()

    def _write_interrupt_ack(self, value: int) -> None:
        with self._irq_lock:
            self._interrupt &= ~value
            # Low in between: on an edge-triggered line what is left needs an edge of its own.
            self._line.set(False)
            if self._interrupt:
                self._line.set(True)

    # -- what devices tell

    def queue_interrupt(self, index: int) -> None:
        """There are used buffers."""
        self._raise(f.USED_BUFFER)

    def config_interrupt(self) -> None:
        """The configuration space changed; before DRIVER_OK nobody may be told (2.1.2)."""
        if self._status & f.DRIVER_OK:
            self._raise(f.CONFIG_CHANGE)

    def needs_reset(self, reason: str) -> None:
        """DEVICE_NEEDS_RESET, with a configuration interrupt if the driver is ready (2.1.2)."""
        with self._irq_lock:
            self._status |= f.NEEDS_RESET
        self.config_interrupt()

    def _raise(self, bit: int) -> None:
        with self._irq_lock:
            self._interrupt |= bit
            self._line.set(True)

    # -- wiring and life

    def connect_kicks(self, vm: HasIoEventFd, base: int) -> None:
        """Let kicks signal the workers without an exit (KVM_IOEVENTFD). base: guest address of the registers."""
        for index in range(len(self.device.queues)):
            fd = self.device.kick_fd(index)
            vm.ioeventfd(fd, base + QUEUE_NOTIFY, 4, datamatch=index)
            self._kicks.append((vm, base + QUEUE_NOTIFY, index))

    def reset(self) -> None:
        """The machine was reset."""
        with self._lock:
            self._reset()

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
            self.device.stop()
            try:
                inner = self.device.save_device()  # first: it may give back requests that it holds
                queues: list[int] = []
                for registers, queue in zip(self._registers, self.device.queues, strict=True):
                    next_avail, next_used = queue.save()
                    queues += [registers.size, registers.ready, registers.was_reset, registers.desc]
                    queues += [registers.avail, registers.used, next_avail, next_used]
                with self._irq_lock:
                    status, interrupt = self._status, self._interrupt
                return {
                    "version": 1,
                    "status": status,
                    "interrupt": interrupt,
                    "driver_features": self._driver_features,
                    "selectors": [self._sel, self._device_features_sel, self._driver_features_sel],
                    "generation": self.device.config_generation,
                    "queues": [int(number) for number in queues],
                    "device": inner,
                }
            finally:
                self.device.resume()

    def load(self, state: dict[str, Any]) -> None:
        """Take over a saved state, which is untrusted. Raises ValueError; then the device is reset."""
        reader = StateReader(self.name, state)
        status = reader.bits("status", 0xFF)
        interrupt = reader.bits("interrupt", f.USED_BUFFER | f.CONFIG_CHANGE)
        accepted = reader.bits("driver_features", (1 << 64) - 1)  # before FEATURES_OK whatever the driver wrote
        selectors = reader.integers("selectors", 3, MASK32)
        generation = reader.bits("generation", MASK32)
        numbers = reader.integers("queues", 8 * len(self._registers), (1 << 64) - 1)
        inner = reader.raw("device")
        reader.end()
        if status & f.FEATURES_OK and not self._acceptable(accepted):
            raise ValueError(f"{self.name}: saved features {accepted:#x} are not what is offered")
        if status & f.DRIVER_OK and not status & f.FEATURES_OK:
            raise ValueError(f"{self.name}: saved status {status:#x} cannot be")
        if len(selectors) != 3 or len(numbers) != 8 * len(self._registers):
            raise ValueError(f"{self.name}: saved state has too few numbers")
        with self._lock:
            self._reset()
            try:
                self._load_queues(numbers, accepted)
                self._sel, self._device_features_sel, self._driver_features_sel = selectors
                self.device.config_generation = generation
                self.device.driver_features = accepted
                self.device.load_device(inner)
            except BaseException:
                self._reset()
                raise
            with self._irq_lock:
                self._status, self._interrupt = status, interrupt
                self._line.set(bool(interrupt))
            if status & f.NEEDS_RESET:
                self.device.broken = True
            if status & f.DRIVER_OK:
                self.device.activate(accepted)

    def _load_queues(self, numbers: list[int], accepted: int) -> None:
        self._driver_features = accepted
        for index, registers in enumerate(self._registers):
            size, ready, was_reset, desc, avail, used, next_avail, next_used = numbers[8 * index : 8 * index + 8]
            if next_avail > 0xFFFF or next_used > 0xFFFF or max(ready, was_reset) > 1:
                raise ValueError(f"{self.name}: saved queue {index} is damaged")
            registers.size, registers.desc, registers.avail, registers.used = size & MASK32, desc, avail, used
            registers.was_reset = bool(was_reset)
            if ready and not self._configure(index):
                raise ValueError(f"{self.name}: saved queue {index}: {self.device.queues[index].fault}")
            if ready:
                self.device.queues[index].restore(next_avail, next_used)

    def __repr__(self) -> str:
        return f"<MmioTransport {self.device!r} status {self._status:#x}>"
