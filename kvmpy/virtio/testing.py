# SPDX-License-Identifier: Apache-2.0
"""The driver's side of virtio, to drive devices from a program without a guest: for tests, fuzzing and benchmarks.

driver = Driver(transport, memory, start=0x10_0000)
driver.start(wanted=features.EVENT_IDX)
queue = driver.queues[0]
reply = queue.request([header, data], [512, 1])      # writes, kicks, waits; what the device wrote, per buffer
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvmpy.memory import GuestMemory
from kvmpy.virtio import features as f
from kvmpy.virtio.mmio import CONFIG
from kvmpy.virtio.transport import VirtioTransport

NEXT, WRITE, INDIRECT = 1, 2, 4
PACKED_AVAIL, PACKED_USED = 1 << 7, 1 << 15
TIMEOUT = 10.0  # seconds until a device that does not answer is called dead


@dataclass
class Pending:
    """A request on its way: its descriptors, and where its writable buffers are."""

    slots: list[int]
    writable: list[tuple[int, int]]
    written: int | None = None


class DriverQueue:
    """What a driver does with a queue, whatever its format; `SplitQueue` and `PackedQueue` are the formats."""

    desc: int
    avail: int  # packed: the driver's event suppression
    used: int  # packed: the device's
    end: int

    def __init__(self, driver: Driver, index: int, size: int) -> None:
        self.driver = driver
        self.memory = driver.memory
        self.index = index
        self.size = size
        self.free = list(range(size))  # descriptors (split), buffer ids (packed)
        self.pending: dict[int, Pending] = {}

    def put_desc(self, slot: int, addr: int, size: int, flags: int, next: int, table: int | None = None) -> None:
        """Write one descriptor as it stands, into the table of the queue or another."""
        raise NotImplementedError

    def publish(self, head: int) -> None:
        """Make a descriptor available, whatever it is."""
        raise NotImplementedError

    def add(self, out: Sequence[bytes], room: Sequence[int] = (), *, indirect: bool = False) -> int:
        """Make a request of readable buffers `out` and writable ones of `room` bytes; its head. No kick."""
        raise NotImplementedError

    def take(self) -> list[tuple[int, int]]:
        """(head, written bytes) of what was used since the last call; tells the device how far it has looked."""
        raise NotImplementedError

    def want_interrupts(self, wanted: bool) -> None:
        """Without EVENT_IDX: ask for interrupts, or for none."""
        raise NotImplementedError

    @property
    def silent(self) -> bool:
        """Does the device ask for no kicks (without EVENT_IDX)?"""
        raise NotImplementedError

    def parts(self, out: Sequence[bytes], room: Sequence[int]) -> list[tuple[int, int, int]]:
        """(address, size, flags) of new buffers."""
        parts = [(self.driver.buffer(data), len(data), 0) for data in out]
        return parts + [(self.driver.alloc(size), size, WRITE) for size in room]

    def kick(self) -> None:
        """Write QueueNotify."""
        self.driver.write(0x50, self.index)

    def used_one(self, head: int, size: int) -> None:
        """A request was given back."""
        if head in self.pending:
            self.free += self.pending[head].slots
            self.pending[head].written = size

    def result(self, head: int) -> list[bytes]:
        """What stands in the writable buffers of a request."""
        return [self.memory.read(addr, size) for addr, size in self.pending[head].writable]

    def request(
        self, out: Sequence[bytes], room: Sequence[int] = (), *, indirect: bool = False, kick: bool = True
    ) -> list[bytes]:
        """Make a request, kick, wait for its end; the writable buffers."""
        head = self.add(out, room, indirect=indirect)
        if kick:
            self.kick()
        self.wait(lambda: self.pending[head].written is not None)
        return self.result(head)

    def wait(self, done: Callable[[], bool]) -> None:
        """Take used buffers until `done()`. Raises TimeoutError when the device is dead."""

        def look() -> bool:
            self.take()
            return done()

        self.driver.wait(look)


class SplitQueue(DriverQueue):
    """A split virtqueue as a driver sees it (2.7.13, 2.7.14)."""

    def __init__(self, driver: Driver, index: int, size: int, base: int) -> None:
        super().__init__(driver, index, size)
        self.desc = base
        self.avail = base + 16 * size
        self.used = (self.avail + 6 + 2 * size + 3) & ~3
        self.end = self.used + 6 + 8 * size
        self.next_avail = 0
        self.last_used = 0
        self.memory.fill(base, self.end - base)

    def put_desc(self, slot: int, addr: int, size: int, flags: int, next: int, table: int | None = None) -> None:
        """Write one descriptor as it stands, into the table of the queue or another."""
        at = (self.desc if table is None else table) + 16 * slot
        self.memory.write(at, struct.pack("<QIHH", addr, size, flags, next))

    def publish(self, head: int) -> None:
        """Make a descriptor available, whatever it is."""
        self.memory.put_u16(self.avail + 4 + 2 * (self.next_avail % self.size), head)
        self.next_avail = self.next_avail + 1 & 0xFFFF
        self.memory.put_u16(self.avail + 2, self.next_avail)

    def add(self, out: Sequence[bytes], room: Sequence[int] = (), *, indirect: bool = False) -> int:
        """Make a request of readable buffers `out` and writable ones of `room` bytes; its head. No kick."""
        parts = self.parts(out, room)
        table = self.driver.alloc(16 * len(parts)) if indirect else None
        slots = [self.free.pop(0) for _ in range(1 if indirect else len(parts))]
        numbers = list(range(len(parts))) if indirect else slots
        for i, (addr, size, flags) in enumerate(parts):
            last = i == len(parts) - 1
            self.put_desc(numbers[i], addr, size, flags | (0 if last else NEXT), 0 if last else numbers[i + 1], table)
        if table is not None:
            self.put_desc(slots[0], table, 16 * len(parts), INDIRECT, 0)
        self.pending[slots[0]] = Pending(slots, [(addr, size) for addr, size, flags in parts if flags])
        self.publish(slots[0])
        return slots[0]

    def take(self) -> list[tuple[int, int]]:
        """(head, written bytes) of what was used since the last call; tells the device how far it has looked."""
        done = []
        while self.last_used != self.memory.u16(self.used + 2):
            head, size = struct.unpack("<II", self.memory.read(self.used + 4 + 8 * (self.last_used % self.size), 8))
            done.append((head, size))
            self.last_used = self.last_used + 1 & 0xFFFF
            self.used_one(head, size)
        if self.driver.event_idx:
            self.memory.put_u16(self.avail + 4 + 2 * self.size, self.last_used)  # used_event
        return done

    def want_interrupts(self, wanted: bool) -> None:
        """Without EVENT_IDX: ask for interrupts, or for none."""
        self.memory.put_u16(self.avail, 0 if wanted else 1)

    @property
    def silent(self) -> bool:
        """Does the device ask for no kicks (without EVENT_IDX)?"""
        return bool(self.memory.u16(self.used) & 1)


class PackedQueue(DriverQueue):
    """A packed virtqueue as a driver sees it (2.8.21, 2.8.22)."""

    def __init__(self, driver: Driver, index: int, size: int, base: int) -> None:
        super().__init__(driver, index, size)
        self.desc = base
        self.avail = base + 16 * size
        self.used = self.avail + 4
        self.end = self.used + 4
        self.next, self.wrap = 0, True  # where the next available descriptor goes
        self.last_used, self.used_wrap = 0, True
        self.memory.fill(base, self.end - base)

    def flags(self, wrap: bool) -> int:
        """The flags that make a descriptor available in this lap."""
        return PACKED_AVAIL if wrap else PACKED_USED

    def put_desc(self, slot: int, addr: int, size: int, flags: int, next: int, table: int | None = None) -> None:
        """Write one descriptor as it stands, into the ring or a table; next: the buffer id."""
        at = (self.desc if table is None else table) + 16 * slot
        self.memory.write(at, struct.pack("<QIHH", addr, size, next, flags))

    def publish(self, head: int) -> None:
        """Make the next descriptor of the ring available, whatever it is, with buffer id `head`."""
        at = self.desc + 16 * self.next
        self.memory.put_u16(at + 12, head)
        flags = self.memory.u16(at + 14) & ~(PACKED_AVAIL | PACKED_USED)
        self.memory.put_u16(at + 14, flags | self.flags(self.wrap))
        self._forward(1)

    def _forward(self, slots: int) -> None:
        self.next += slots
        if self.next >= self.size:
            self.next, self.wrap = self.next - self.size, not self.wrap

    def add(self, out: Sequence[bytes], room: Sequence[int] = (), *, indirect: bool = False) -> int:
        """Make a request of readable buffers `out` and writable ones of `room` bytes; its id. No kick."""
        parts = self.parts(out, room)
        writable = [(addr, size) for addr, size, flags in parts if flags]
        if indirect:
            table = self.driver.alloc(16 * len(parts))
            for i, (addr, size, flags) in enumerate(parts):
                self.put_desc(i, addr, size, flags, 0, table)
            parts = [(table, 16 * len(parts), INDIRECT)]
        slots = [self.free.pop(0) for _ in parts]  # as many ids as slots, so that the ring is never overrun
        first = self.next
        first_flags = 0
        for i, (addr, size, flags) in enumerate(parts):
            flags |= self.flags(self.wrap) | (NEXT if i < len(parts) - 1 else 0)
            self.put_desc(self.next, addr, size, flags if i else flags & ~0x8080, slots[0])
            first_flags = first_flags if i else flags
            self._forward(1)
        self.pending[slots[0]] = Pending(slots, writable)
        self.memory.put_u16(self.desc + 16 * first + 14, first_flags)  # last: now it is the device's
        return slots[0]

    def take(self) -> list[tuple[int, int]]:
        """(id, written bytes) of what was used since the last call; tells the device how far it has looked."""
        done = []
        while True:
            size, head, flags = struct.unpack("<IHH", self.memory.read(self.desc + 16 * self.last_used + 8, 8))
            if bool(flags & PACKED_AVAIL) != self.used_wrap or bool(flags & PACKED_USED) != self.used_wrap:
                break
            if head not in self.pending or self.pending[head].written is not None:
                raise AssertionError(f"the device gave back {head}, which it does not have")
            done.append((head, size if flags & WRITE else 0))
            self.last_used += len(self.pending[head].slots)
            if self.last_used >= self.size:
                self.last_used, self.used_wrap = self.last_used - self.size, not self.used_wrap
            self.used_one(head, done[-1][1])
        if self.driver.event_idx:
            self.memory.write(self.avail, struct.pack("<HH", self.last_used | self.used_wrap << 15, 2))
        return done

    def want_interrupts(self, wanted: bool) -> None:
        """Without EVENT_IDX: ask for interrupts, or for none."""
        self.memory.write(self.avail, struct.pack("<HH", 0, 0 if wanted else 1))

    @property
    def silent(self) -> bool:
        """Does the device ask for no kicks (without EVENT_IDX)?"""
        return self.memory.u16(self.used + 2) == 1


class Driver:
    """A driver of one device: allocates rings and buffers in guest memory from `start` on."""

    def __init__(self, transport: VirtioTransport, memory: GuestMemory, start: int = 0x10_0000) -> None:
        self.transport = transport
        self.memory = memory
        self.start_of_heap = self._next = start
        self.queues: list[SplitQueue | PackedQueue] = []
        self.features = 0

    # -- memory

    def alloc(self, size: int, align: int = 16) -> int:
        """A guest address with `size` bytes; freed by `start` and `free_all`."""
        at = (self._next + align - 1) & ~(align - 1)
        self._next = at + size
        return at

    def buffer(self, data: bytes) -> int:
        """The guest address of a copy of `data`."""
        at = self.alloc(len(data))
        self.memory.write(at, data)
        return at

    def free_all(self) -> None:
        """Use the memory of buffers again; only with nothing in flight."""
        self._next = self._heap

    # -- registers

    def read(self, offset: int) -> int:
        """A 32-bit register."""
        return self.transport.read(offset, 4)

    def write(self, offset: int, value: int) -> None:
        """A 32-bit register."""
        self.transport.write(offset, 4, value)

    def config(self, offset: int, size: int) -> int:
        """A number in configuration space."""
        return self.transport.read(CONFIG + offset, size)

    def write_config(self, offset: int, size: int, value: int) -> None:
        """Write `size` bytes of configuration space."""
        self.transport.write(CONFIG + offset, size, value)

    @property
    def status(self) -> int:
        """The status register."""
        return self.read(0x70)

    @property
    def event_idx(self) -> bool:
        """Was EVENT_IDX negotiated?"""
        return bool(self.features & f.EVENT_IDX)

    def ack(self) -> int:
        """Read and acknowledge the interrupt status."""
        status = self.read(0x60)
        self.write(0x64, status)
        return status

    # -- the steps of 3.1.1

    def reset(self) -> None:
        """Write 0 to status."""
        self.write(0x70, 0)
        self._next = self.start_of_heap
        self.queues = []

    def offered(self) -> int:
        """The device's features."""
        value = 0
        for half in (0, 1):
            self.write(0x14, half)
            value |= self.read(0x10) << 32 * half
        return value

    def negotiate(self, wanted: int) -> bool:
        """Accept `wanted` and VERSION_1; did the device agree?"""
        self.write(0x70, f.ACKNOWLEDGE)
        self.write(0x70, f.ACKNOWLEDGE | f.DRIVER)
        self.features = wanted | f.VERSION_1
        for half in (0, 1):
            self.write(0x24, half)
            self.write(0x20, self.features >> 32 * half & 0xFFFF_FFFF)
        self.write(0x70, f.ACKNOWLEDGE | f.DRIVER | f.FEATURES_OK)
        return bool(self.status & f.FEATURES_OK)

    def setup_queue(self, index: int, size: int | None = None) -> SplitQueue | PackedQueue:
        """Allocate the rings of a queue and make it ready; size: default the largest."""
        self.write(0x30, index)
        largest = self.read(0x34)
        size = largest if size is None else size
        room = 16 * size + 6 + 2 * size + 4 + 6 + 8 * size
        kind = PackedQueue if self.features & f.RING_PACKED else SplitQueue
        queue = kind(self, index, size, self.alloc(room, 4096))
        self.write(0x38, size)
        for offset, address in ((0x80, queue.desc), (0x90, queue.avail), (0xA0, queue.used)):
            self.write(offset, address & 0xFFFF_FFFF)
            self.write(offset + 4, address >> 32)
        self.write(0x44, 1)
        return queue

    def start(self, wanted: int = 0, size: int | None = None, *, only: Sequence[int] | None = None) -> None:
        """Reset, negotiate, set up all queues (or `only` some), and set DRIVER_OK.

        Raises ValueError when the device does not agree to the features.
        """
        self.reset()
        if not self.negotiate(wanted):
            raise ValueError(f"the device refuses features {wanted:#x} of {self.offered():#x}")
        count = len(self.transport.device.queues)
        self.queues = [self.setup_queue(index, size) for index in (range(count) if only is None else only)]
        self._heap = self._next
        self.write(0x70, f.ACKNOWLEDGE | f.DRIVER | f.FEATURES_OK | f.DRIVER_OK)

    _heap = 0

    def wait(self, done: Callable[[], bool]) -> None:
        """Until `done()`, helping devices without threads. Raises TimeoutError when the device is dead."""
        end = time.monotonic() + TIMEOUT
        device = self.transport.device
        while not done():
            if not device.workers[0].threaded:
                device.poll()
            if time.monotonic() > end:
                raise TimeoutError(f"{device!r} did not answer; status {self.status:#x}")
            time.sleep(0.0005)
