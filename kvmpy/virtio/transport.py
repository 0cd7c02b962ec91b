# SPDX-License-Identifier: Apache-2.0
"""What virtio transports do alike (virtio 1.2, 2.1, 2.6.1, 3.1.1): the state machine of status, features and queues.

The driver's side is enforced: features before FEATURES_OK, queues between FEATURES_OK and DRIVER_OK (or after the
reset of that queue), requests after DRIVER_OK. What comes out of order is ignored.

Locks: `_lock` is held by vCPUs while they change the device, and it may wait for workers; `_irq_lock` guards status and
interrupt bits, which workers change too, and nothing waits while it is held.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, Protocol

from kvmpy.devices.base import StateReader
from kvmpy.memory import GuestMemory
from kvmpy.virtio import features as f
from kvmpy.virtio.device import VirtioDevice

MASK32 = 0xFFFF_FFFF


@dataclass
class QueueRegisters:
    """What the driver wrote for one queue."""

    size: int = 0
    ready: bool = False
    desc: int = 0
    avail: int = 0
    used: int = 0
    was_reset: bool = False  # by a queue reset: may be set up again although the device runs


@dataclass
class Saved:
    """A saved state that was checked as far as it can be without the queues' memory."""

    status: int
    accepted: int
    selectors: list[int]
    generation: int
    queues: list[int]
    device: Any


class HasIoEventFd(Protocol):
    """The part of `kvmpy.Vm` that kicks without exits need."""

    def ioeventfd(
        self, fd: int, addr: int, size: int = 0, *, datamatch: int | None = None, deassign: bool = False
    ) -> object:
        """KVM_IOEVENTFD, api.rst 4.59."""
        ...


class VirtioTransport:
    """Base of the transports: a device, guest memory with its rings and buffers, and the registers of both.

    A transport has registers of its own, implements the methods below that say so, and calls the others with `_lock`
    held.
    """

    def __init__(self, device: VirtioDevice, memory: GuestMemory) -> None:
        self.device = device
        self.name = device.name
        self._memory = memory
        self._lock = threading.Lock()
        self._irq_lock = threading.Lock()
        self._status = 0
        self._clear()
        device.attach(self)

    def _clear(self) -> None:
        self._sel = 0
        self._device_features_sel = 0
        self._driver_features_sel = 0
        self._driver_features = 0
        self._registers = [self._fresh_queue(index) for index in range(len(self.device.queues))]

    def _fresh_queue(self, index: int) -> QueueRegisters:
        """The registers of a queue after reset."""
        return QueueRegisters()

    # -- for transports to implement

    def read(self, offset: int, size: int) -> int:
        """The driver reads a register."""
        raise NotImplementedError

    def write(self, offset: int, size: int, value: int) -> None:
        """The driver writes a register."""
        raise NotImplementedError

    def _interrupts_reset(self) -> None:
        """No interrupt is pending any more; `_irq_lock` is held."""
        raise NotImplementedError

    def _raise(self, queue: int | None) -> None:
        """Tell the driver of used buffers in `queue`, or of a new configuration (None); from any thread."""
        raise NotImplementedError

    def _save_interrupts(self) -> dict[str, Any]:
        """What is pending, for a saved state; `_irq_lock` is held and no worker runs."""
        raise NotImplementedError

    # -- what registers do

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

    def _open_for_setup(self) -> QueueRegisters | None:
        """The selected queue, if the driver may set it up now."""
        queue = self._queue
        if queue is None or not self._status & f.FEATURES_OK or self._status & (f.NEEDS_RESET | f.FAILED):
            return None
        return queue if not self._status & f.DRIVER_OK or queue.was_reset else None

    def _write_queue_sel(self, value: int) -> None:
        self._sel = value

    def _write_queue_size(self, value: int) -> None:
        queue = self._open_for_setup()
        if queue is not None and not queue.ready:
            queue.size = value  # checked when it becomes ready

    def _write_address(self, ring: str, shift: int, value: int) -> None:
        queue = self._open_for_setup()
        if queue is not None and not queue.ready:
            setattr(queue, ring, getattr(queue, ring) & ~(MASK32 << shift) | value << shift)

    def _enable_queue(self) -> None:
        queue = self._open_for_setup()
        if queue is not None and not queue.ready and self._configure(self._sel):
            queue.was_reset = False
            self.device.resume()

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

    def _reset_queue(self) -> None:
        """The selected queue alone (2.6.1); done when this returns."""
        if self._queue is not None and self._driver_features & f.RING_RESET and self._status & f.DRIVER_OK:
            self.device.stop_queue(self._sel)
            self._registers[self._sel] = self._fresh_queue(self._sel)
            self._registers[self._sel].was_reset = True

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
            self._interrupts_reset()
        self._clear()

    def _kick(self, index: int) -> None:
        """The driver notified queue `index`; no lock is held: a kick never waits for anything."""
        if index < len(self._registers):
            self.device.kick(index)
            self._inline()

    def _inline(self) -> None:
        """A device without threads works where it is kicked."""
        if not self.device.workers[0].threaded:
            self.device.poll()

    def _write_config(self, offset: int, size: int, value: int) -> None:
        """The driver wrote the device's configuration space."""
        if offset + size <= self.device.config_size:
            self.device.write_config(offset, size, value)

    # -- what devices tell

    def queue_interrupt(self, index: int) -> None:
        """There are used buffers."""
        self._raise(index)

    def config_interrupt(self) -> None:
        """The configuration space changed; before DRIVER_OK nobody may be told (2.1.2)."""
        if self._status & f.DRIVER_OK:
            self._raise(None)

    def needs_reset(self, reason: str) -> None:
        """DEVICE_NEEDS_RESET, with a configuration interrupt if the driver is ready (2.1.2)."""
        with self._irq_lock:
            self._status |= f.NEEDS_RESET
        self.config_interrupt()

    # -- life

    def reset(self) -> None:
        """The machine was reset."""
        with self._lock:
            self._reset()

    # -- state

    def _save(self) -> dict[str, Any]:
        """What all transports save; `_lock` is held. Requests in flight are finished first."""
        self.device.stop()
        try:
            inner = self.device.save_device()  # first: it may give back requests that it holds
            queues: list[int] = []
            for registers, queue in zip(self._registers, self.device.queues, strict=True):
                next_avail, next_used = queue.save()
                queues += [registers.size, registers.ready, registers.was_reset, registers.desc]
                queues += [registers.avail, registers.used, next_avail, next_used]
            with self._irq_lock:
                pending = self._save_interrupts()
            return {
                "version": 1,
                **pending,
                "status": self._status,
                "driver_features": self._driver_features,
                "selectors": [self._sel, self._device_features_sel, self._driver_features_sel],
                "generation": self.device.config_generation,
                "queues": [int(number) for number in queues],
                "device": inner,
            }
        finally:
            self.device.resume()

    def _read_state(self, reader: StateReader) -> Saved:
        """Check what `_save` gave; nothing is changed yet. Raises ValueError."""
        saved = Saved(
            status=reader.bits("status", 0xFF),
            accepted=reader.bits("driver_features", (1 << 64) - 1),  # before FEATURES_OK whatever the driver wrote
            selectors=reader.integers("selectors", 3, MASK32),
            generation=reader.bits("generation", MASK32),
            queues=reader.integers("queues", 8 * len(self._registers), (1 << 64) - 1),
            device=reader.raw("device"),
        )
        if saved.status & f.FEATURES_OK and not self._acceptable(saved.accepted):
            raise ValueError(f"{self.name}: saved features {saved.accepted:#x} are not what is offered")
        if saved.status & f.DRIVER_OK and not saved.status & f.FEATURES_OK:
            raise ValueError(f"{self.name}: saved status {saved.status:#x} cannot be")
        if len(saved.selectors) != 3 or len(saved.queues) != 8 * len(self._registers):
            raise ValueError(f"{self.name}: saved state has too few numbers")
        return saved

    def _load(self, saved: Saved) -> None:
        """Take over a checked state; `_lock` is held. Raises ValueError; then the device is reset."""
        self._reset()
        try:
            self._load_queues(saved.queues, saved.accepted)
            self._sel, self._device_features_sel, self._driver_features_sel = saved.selectors
            self.device.config_generation = saved.generation
            self.device.driver_features = saved.accepted
            self.device.load_device(saved.device)
        except BaseException:
            self._reset()
            raise
        with self._irq_lock:
            self._status = saved.status

    def _go_on(self) -> None:
        """After `_load`, when interrupts are as they were: let the device work if it did."""
        if self._status & f.NEEDS_RESET:
            self.device.broken = True
        if self._status & f.DRIVER_OK:
            self.device.activate(self._driver_features)

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
        return f"<{type(self).__name__} {self.device!r} status {self._status:#x}>"
