# SPDX-License-Identifier: Apache-2.0
"""A virtio device without its transport: features, configuration space, queues, and the threads that serve them.

Threads: a transport calls `activate`, `stop`, `reset`, `stop_queue` from vCPU threads, one at a time;
between `activate` and `stop` the queues belong to the workers. `stop` waits for them; after it nothing touches
guest memory.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from kvmpy.devices.base import GuestLog, StateReader, byte_lanes
from kvmpy.errors import StateError
from kvmpy.virtio import features as f
from kvmpy.virtio._queue import BLOCKED, FAULT, GONE, IDLE, LIMITED, MORE, Queue
from kvmpy.virtio.worker import IN, Worker

log = logging.getLogger("kvmpy.virtio")

ROUNDS = 16  # batches of one queue before other queues of the worker get their turn


class Transport(Protocol):
    """What a device tells its transport, from any thread."""

    def queue_interrupt(self, index: int) -> None:
        """Queue `index` has used buffers that the driver wants to know of."""
        ...

    def config_interrupt(self) -> None:
        """The configuration space changed."""
        ...

    def needs_reset(self, reason: str) -> None:
        """The driver broke the rules; the device does nothing more until it is reset (2.1.2)."""
        ...


class VirtioDevice:
    """Base of all devices.

    name: for messages. queue_sizes: the largest size of each queue. features: what is offered beyond
    `features.COMMON`. config: the configuration space as it is after reset. groups: which queues share a thread;
    by default all. threaded: False for tests, then `poll()` does the work.

    A device implements `serve(index)`, and where needed `activated`, `was_reset`, `write_config`.
    """

    device_id: ClassVar[int] = 0

    def __init__(
        self,
        name: str,
        queue_sizes: Sequence[int],
        features: int = 0,
        config: bytes = b"",
        *,
        groups: Sequence[Sequence[int]] | None = None,
        threaded: bool = True,
    ) -> None:
        self.name = name
        self.features = f.COMMON | features
        self.driver_features = 0
        self.queues = tuple(Queue(index, size) for index, size in enumerate(queue_sizes))
        self.config_generation = 0
        self.active = False
        self.paused = False
        self.broken = False  # until reset: see needs_reset
        self.warn = GuestLog(log)
        self._config = bytearray(config)
        self._config_lock = threading.Lock()
        self._transport: Transport | None = None
        self._closed = False
        self._kick_lock = threading.Lock()  # a kick must not go to a descriptor that was closed
        self._kicks = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in self.queues]
        self.workers: list[Worker] = []
        self._worker_of: dict[int, Worker] = {}
        for number, group in enumerate(groups if groups is not None else [range(len(self.queues))]):
            worker = Worker(f"{name}.{number}", self._failed, threaded)
            self.workers.append(worker)
            for index in group:
                self._worker_of[index] = worker
                worker.watch(self._kicks[index], IN, lambda index=index: self._kicked(index))  # type: ignore[misc]

    # -- for devices to implement

    def serve(self, index: int) -> int:
        """Work off a batch of queue `index`, in its worker: pop, work, push.

        Returns IDLE (nothing left), MORE (call again), BLOCKED (a watched descriptor will call
        `serve_queue`), LIMITED (nothing for `queue.wait` seconds), GONE (the back end ended) or FAULT.
        """
        raise NotImplementedError

    def check_features(self, accepted: int) -> bool:
        """May a driver accept exactly these features? For devices whose features depend on each other."""
        return True

    def activated(self) -> None:
        """The driver set DRIVER_OK; the workers start after this."""

    def was_reset(self) -> None:
        """Reset, the workers are stopped, the queues empty: back to the state after power-on."""

    def queue_was_reset(self, index: int) -> None:
        """Queue `index` alone was reset; forget requests of it that are held."""

    def write_config(self, offset: int, size: int, value: int) -> None:
        """The driver wrote its configuration space; by default nothing in it can be written."""

    def save_device(self) -> dict[str, Any]:
        """The device's own state, the workers being stopped."""
        return {"version": 1}

    def load_device(self, state: dict[str, Any]) -> None:
        """Take over a saved state, which is untrusted; the queues are configured already. Raises ValueError."""
        StateReader(self.name, state).end()

    # -- for devices to use

    def accepted(self, feature: int) -> bool:
        """Did the driver accept all bits of `feature`?"""
        return self.driver_features & feature == feature

    def put_config(self, offset: int, data: bytes, *, notify: bool = True) -> None:
        """Change the configuration space; notify: the host changed it, so the driver is told (2.5)."""
        with self._config_lock:
            self._config[offset : offset + len(data)] = data
            if notify:
                self.config_generation = self.config_generation + 1 & 0xFFFF_FFFF
        if notify and self._transport is not None:
            self._transport.config_interrupt()

    def serve_queue(self, index: int) -> None:
        """Serve a queue until it is empty, blocked or others wait; in its worker."""
        queue = self.queues[index]
        worker = self._worker_of[index]
        if not queue.ready:
            self._check(queue)
            return
        queue.no_kicks()
        for _ in range(ROUNDS):
            result = self.serve(index)
            self.finish(queue)
            if queue.fault is not None or result in (FAULT, GONE, BLOCKED) or not worker.running:
                return
            if result == LIMITED:
                worker.later(index, queue.wait, lambda: self.serve_queue(index))
                return
            if result == IDLE and not queue.want_kicks():
                return
        self.kick(index)  # others first

    def finish(self, queue: Queue) -> None:
        """Show the driver what was pushed, with an interrupt if it wants one; report a fault."""
        if queue.complete() and self._transport is not None:
            self._transport.queue_interrupt(queue.index)
        self._check(queue)

    def _check(self, queue: Queue) -> None:
        if queue.fault is not None:
            self.needs_reset(f"queue {queue.index}: {queue.fault}")

    def needs_reset(self, reason: str) -> None:
        """Stop working and ask the driver for a reset (2.1.2)."""
        self.broken = True
        for worker in self.workers:
            worker.running = False
        self.warn("%s: needs reset: %s", self.name, reason)
        if self._transport is not None:
            self._transport.needs_reset(reason)

    def _kicked(self, index: int) -> None:
        os.eventfd_read(self._kicks[index])
        self.serve_queue(index)

    def _failed(self, error: BaseException) -> None:
        # A bug or a host failure in a worker: this device stops, the machine goes on, the host can read why.
        log.error("%s failed", self.name, exc_info=error)
        self.needs_reset(f"{type(error).__name__}: {error}")

    # -- for transports

    def offer(self, features: int) -> None:
        """Offer these features of rings too, such as `features.RING_PACKED`; before the driver looks."""
        if features & ~(f.COMMON | f.RING_PACKED):
            raise ValueError(f"{self.name}: features {features:#x} are not of rings")
        if self.driver_features:
            raise StateError(f"{self.name} is in use")
        self.features |= features

    def attach(self, transport: Transport) -> None:
        """The transport to tell; a device has one. Raises ValueError for a second one."""
        if self._transport is not None:
            raise ValueError(f"{self.name} has a transport already")
        self._transport = transport

    @property
    def config_size(self) -> int:
        """Bytes of configuration space."""
        return len(self._config)

    def read_config(self, offset: int, size: int) -> int:
        """`size` bytes of the configuration space at `offset`; what is beyond its end reads 0."""
        with self._config_lock:
            return byte_lanes(int.from_bytes(self._config[: offset + size], "little"), offset, size)

    def activate(self, accepted: int) -> None:
        """The driver is ready with these features: begin to serve the configured queues."""
        self.driver_features = accepted
        self.active = True
        self.activated()
        self._go()

    def _go(self) -> None:
        if self.broken or self.paused:
            return
        for worker in self.workers:
            worker.start()
        for queue in self.queues:  # kicks may have come before we listened
            if queue.ready:
                self.kick(queue.index)

    def stop(self) -> None:
        """Wait until the workers touch nothing more."""
        for worker in self.workers:
            worker.stop()

    def resume(self) -> None:
        """Go on after `stop`, if the driver is ready."""
        if self.active:
            self._go()

    def pause(self) -> None:
        """Touch nothing from now on, whatever is activated or loaded meanwhile; the processors stand still."""
        self.paused = True
        self.stop()

    def unpause(self) -> None:
        """Go on after `pause`."""
        self.paused = False
        self.resume()

    def reset(self) -> None:
        """Back to the state after power-on (2.4); requests in flight are finished or dropped first."""
        self.stop()
        self.active = self.broken = False
        self.driver_features = 0
        for queue in self.queues:
            queue.disable()
        self.was_reset()

    def stop_queue(self, index: int) -> None:
        """Forget queue `index` alone (2.6.1); the others go on."""
        self.stop()
        self.queues[index].disable()
        self.queue_was_reset(index)
        self.resume()

    def kick_fd(self, index: int) -> int:
        """The eventfd that kicks queue `index`, for KVM_IOEVENTFD."""
        return self._kicks[index]

    def kick(self, index: int) -> None:
        """Queue `index` has requests, or the host has something for it; from any thread, never blocks."""
        with self._kick_lock:
            if not self._closed:
                os.eventfd_write(self._kicks[index], 1)

    def poll(self, rounds: int = 64) -> None:
        """Without threads: serve what is due, at most `rounds` times. With threads: nothing, they do it."""
        for worker in self.workers:
            if worker.threaded:
                continue
            for _ in range(rounds):
                if not worker.running or not worker.poll(0):
                    break

    def stats(self) -> dict[str, Any]:
        """Live counters by name; "queues": (requests, interrupts, in flight) of each queue."""
        queues = [(*queue.stats, queue.in_flight) for queue in self.queues]
        return {
            "requests": sum(queue[0] for queue in queues),
            "interrupts": sum(queue[1] for queue in queues),
            "queues": queues,
        }

    def close(self) -> None:
        """Stop for ever and release what is open; again is no error."""
        if self._closed:
            return
        self.reset()
        with self._kick_lock:
            self._closed = True
        for worker in self.workers:
            worker.close()
        for fd in self._kicks:
            os.close(fd)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}{' active' if self.active else ''}>"


__all__ = ["BLOCKED", "FAULT", "GONE", "IDLE", "LIMITED", "MORE", "Queue", "Transport", "VirtioDevice"]
