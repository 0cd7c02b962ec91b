# SPDX-License-Identifier: Apache-2.0
"""The device's side of a packed virtqueue (virtio 1.2, 2.8), without a device: descriptors by hand."""

import random
import struct

import pytest
from virtio_rig import HEAP, HOLE, ROM, TOP, guest_memory

from kvmpy.virtio import features as f
from kvmpy.virtio._queue import Queue
from kvmpy.virtio.rng import Rng

SIZE = 5  # no power of two: a packed ring may have any size (2.8.10.1)
RING, DRIVER, DEVICE, DATA, TABLE = HEAP, HEAP + 0x1000, HEAP + 0x2000, HEAP + 0x4000, HEAP + 0x3000
NEXT, WRITE, INDIRECT, AVAIL, USED = 1, 2, 4, 1 << 7, 1 << 15
ENABLE, DISABLE, DESC = 0, 1, 2


class Ring:
    """A queue and a hand-written driver side."""

    def __init__(self, *, event_idx=False, indirect=True, size=SIZE, wrap=True):
        self.memory = guest_memory()
        self.queue = Queue(0, 8)
        self.size = size
        assert self.queue.configure(
            self.memory, size, RING, DRIVER, DEVICE, event_idx=event_idx, indirect=indirect, packed=True
        )
        self.at, self.wrap = 0, True

    def put(self, slot, addr, length, ident=0, flags=0, table=RING):
        self.memory.write(table + 16 * slot, struct.pack("<QIHH", addr, length, ident, flags))

    def give(self, *descs):
        """Available descriptors (addr, length, id, flags) in the next slots, the first of them last."""
        places = []
        for desc in descs:
            places.append((self.at, self.wrap, desc))
            self.at += 1
            if self.at == self.size:
                self.at, self.wrap = 0, not self.wrap
        for slot, wrap, (addr, length, ident, flags) in reversed(places):
            self.put(slot, addr, length, ident, flags | (AVAIL if wrap else USED))

    def slot(self, index):
        return struct.unpack("<QIHH", self.memory.read(RING + 16 * index, 16))

    def event(self, desc, flags):
        self.memory.write(DRIVER, struct.pack("<HH", desc, flags))

    def wish(self):
        return struct.unpack("<HH", self.memory.read(DEVICE, 4))


def test_a_chain_is_in_consecutive_slots_and_its_id_in_the_last_one():
    ring = Ring()
    ring.memory.write(DATA, b"hello, world")
    ring.give((DATA, 7, 99, NEXT), (DATA + 7, 5, 98, NEXT), (DATA + 0x100, 4, 0xBEEF, WRITE))
    chain = ring.queue.pop()
    assert (chain.head, chain.readable, chain.writable) == (0xBEEF, 12, 4)
    assert chain.read() == b"hello, world"
    assert chain.write(b"abcdef") == 4
    ring.queue.push(chain)
    assert not ring.slot(0)[3] & USED, "staged, not shown"
    assert ring.queue.complete()
    assert ring.slot(0)[1:] == (4, 0xBEEF, AVAIL | USED | WRITE)
    assert ring.queue.pop() is None and ring.queue.fault is None


def test_the_ring_wraps_and_the_counters_flip():
    ring = Ring()
    rng = random.Random(5)
    used_at, used_wrap = 0, True
    for lap in range(200):
        count = rng.randrange(1, SIZE + 1)
        ring.give(*((DATA + i, 1, lap, WRITE | (NEXT if i < count - 1 else 0)) for i in range(count)))
        chain = ring.queue.pop()
        assert chain.head == lap and chain.writable == count and ring.queue.pop() is None
        ring.queue.push(chain)
        ring.queue.complete()
        _, size, ident, flags = ring.slot(used_at)
        assert (size, ident, flags) == (0, lap, (AVAIL | USED) if used_wrap else 0)
        used_at += count
        if used_at >= SIZE:
            used_at, used_wrap = used_at - SIZE, not used_wrap
    assert ring.queue.save()[0] == ring.queue.save()[1] == used_at | used_wrap << 15


def test_used_descriptors_appear_together_with_the_first_one():
    ring = Ring()
    for ident in range(3):
        ring.give((DATA, 4, ident, WRITE))
    chains = [ring.queue.pop() for _ in range(3)]
    for chain in reversed(chains):
        ring.queue.push(chain)
    assert ring.slot(0)[3] == AVAIL | WRITE, "the driver looks here first, and sees nothing yet"
    ring.queue.complete()
    assert [ring.slot(i)[2] for i in range(3)] == [2, 1, 0]


def test_indirect_tables_are_read_in_order():
    ring = Ring()
    ring.memory.write(DATA, b"0123456789")
    ring.put(0, DATA, 2, 7, NEXT | INDIRECT, TABLE)  # there only WRITE counts (2.8.7)
    ring.put(1, DATA + 4, 2, 0, 0, TABLE)
    ring.put(2, DATA + 0x100, 8, 0, WRITE, TABLE)
    ring.give((TABLE, 48, 3, INDIRECT))
    chain = ring.queue.pop()
    assert (chain.head, chain.read(), chain.writable) == (3, b"0145", 8)
    ring.queue.push(chain)
    ring.queue.complete()
    ring.give((DATA, 1, 4, 0))
    assert ring.queue.pop().head == 4, "it took one slot"


BAD = {
    "more than the ring": [(DATA, 1, 0, NEXT)] * SIZE,
    "unknown flag": [(DATA, 4, 0, 8)],
    "length 0": [(DATA, 0, 0, 0)],
    "in a hole": [(HOLE, 4, 0, 0)],
    "into a hole": [(HOLE - 2, 4, 0, 0)],
    "wraps at 2^64": [(TOP + 0xFFF, 2, 0, 0)],
    "write to ROM": [(ROM, 4, 0, WRITE)],
    "readable after writable": [(DATA, 4, 0, NEXT | WRITE), (DATA, 4, 0, 0)],
    "4 GiB": [(DATA, 0xFFFF_FFFF, 0, 0)],
    "indirect with next": [(TABLE, 16, 0, INDIRECT | NEXT), (DATA, 4, 0, 0)],
    "indirect in a chain": [(DATA, 4, 0, NEXT), (TABLE, 16, 0, INDIRECT)],
    "indirect of length 0": [(TABLE, 0, 0, INDIRECT)],
    "indirect of odd length": [(TABLE, 17, 0, INDIRECT)],
    "indirect larger than the queue": [(TABLE, 16 * (SIZE + 1), 0, INDIRECT)],
    "indirect in a hole": [(HOLE, 16, 0, INDIRECT)],
    "indirect over the end of RAM": [(HOLE - 16, 32, 0, INDIRECT)],
    "indirect with a hole in it": [(TABLE + 0x100, 16, 0, INDIRECT)],
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_chain_stops_the_queue_until_it_is_configured_again(name):
    ring = Ring(size=SIZE)
    ring.put(0, DATA, 4, 0, 0, TABLE)
    ring.put(0, HOLE, 4, 0, 0, TABLE + 0x100)
    ring.give(*BAD[name])
    assert ring.queue.pop() is None
    assert ring.queue.fault is not None and not ring.queue.ready
    assert not ring.queue.complete()
    ring.memory.fill(RING, 16 * SIZE)
    assert ring.queue.configure(ring.memory, SIZE, RING, DRIVER, DEVICE, packed=True)
    ring.put(0, DATA, 4, 1, AVAIL)
    assert ring.queue.pop().readable == 4


def test_an_id_that_is_in_flight_is_a_fault():
    ring = Ring()
    ring.give((DATA, 4, 1, 0))
    ring.give((DATA, 4, 1, 0))
    assert ring.queue.pop() is not None and ring.queue.pop() is None
    assert "made available twice" in ring.queue.fault


def test_slots_that_are_in_flight_cannot_be_used_again():
    ring = Ring()
    for ident in range(SIZE):
        ring.give((DATA, 4, ident, 0))
    for _ in range(SIZE):
        assert ring.queue.pop() is not None
    assert ring.queue.pop() is None and ring.queue.fault is None
    ring.give((DATA, 4, 9, 0))  # over a request that was not given back
    assert ring.queue.pop() is None
    assert "in flight" in ring.queue.fault


def test_indirect_must_be_negotiated():
    ring = Ring(indirect=False)
    ring.put(0, DATA, 4, 0, 0, TABLE)
    ring.give((TABLE, 16, 0, INDIRECT))
    assert ring.queue.pop() is None and "not negotiated" in ring.queue.fault


@pytest.mark.parametrize(
    "rings",
    [
        (0, RING, DRIVER, DEVICE),
        (9, RING, DRIVER, DEVICE),
        (0x1_0000, RING, DRIVER, DEVICE),
        (SIZE, RING + 8, DRIVER, DEVICE),
        (SIZE, RING, DRIVER + 2, DEVICE),
        (SIZE, RING, DRIVER, DEVICE + 1),
        (SIZE, ROM, DRIVER, DEVICE),  # the device writes into the ring itself
        (SIZE, RING, DRIVER, ROM),
        (SIZE, HOLE - 16, DRIVER, DEVICE),
        (SIZE, RING, HOLE, DEVICE),
        (SIZE, RING, DRIVER, (1 << 64) - 4),
    ],
)
def test_rings_that_cannot_be_are_refused(rings):
    queue = Queue(0, 8)
    assert not queue.configure(guest_memory(), *rings, packed=True)
    assert queue.fault is not None and queue.pop() is None and not queue.want_kicks()


def test_requests_that_were_given_back_come_again_also_over_the_end():
    ring = Ring()
    ring.give((DATA, 4, 0, NEXT), (DATA, 4, 0, NEXT), (DATA, 4, 0, 0))
    ring.queue.push(ring.queue.pop())
    ring.queue.complete()
    ring.give((DATA, 1, 1, NEXT), (DATA, 2, 1, NEXT), (DATA, 3, 1, 0))
    chain = ring.queue.pop()
    before = ring.queue.save()
    ring.queue.unpop(chain)
    assert ring.queue.in_flight == 0
    again = ring.queue.pop()
    assert again.readable == 6 and ring.queue.save() == before


def test_interrupts_follow_the_flags():
    ring = Ring()
    for ident, (flags, wanted) in enumerate([(ENABLE, True), (DISABLE, False), (ENABLE, True), (DESC, True)]):
        ring.event(0, flags)  # DESC was not negotiated: then it is no reason to be silent
        ring.give((DATA, 4, ident, 0))
        ring.queue.push(ring.queue.pop())
        assert ring.queue.complete() == wanted
        assert not ring.queue.complete(), "nothing new"


def test_interrupts_follow_the_place_that_the_driver_waits_for():
    """Against the definition: an interrupt when the used descriptors of a batch cover the place."""
    rng = random.Random(8)
    ring = Ring(event_idx=True)
    place = 0  # slots since the start
    for number in range(600):
        batch = rng.randrange(1, SIZE + 1)
        event = place + rng.randrange(-SIZE + 1, SIZE)
        if event < 0:
            continue
        lap, index = divmod(event, SIZE)
        ring.event(index | (0 if lap % 2 else 1) << 15, DESC)
        for _ in range(batch):
            ring.give((DATA, 4, number & 0xFFFF, 0))
            ring.queue.push(ring.queue.pop())
        assert ring.queue.complete() == (place <= event < place + batch), (number, place, event, batch)
        place += batch
    ring.event(0x7FFF, DESC)  # no such place
    ring.give((DATA, 4, 0, 0))
    ring.queue.push(ring.queue.pop())
    assert ring.queue.complete()


@pytest.mark.parametrize("event_idx", [False, True])
def test_kicks_are_asked_for_without_losing_one(event_idx):
    ring = Ring(event_idx=event_idx)
    ring.give((DATA, 4, 0, 0))
    ring.queue.no_kicks()
    assert ring.wish()[1] == DISABLE
    ring.queue.push(ring.queue.pop())
    ring.queue.complete()
    assert ring.queue.pop() is None
    ring.give((DATA, 4, 1, 0))  # after the last look
    assert ring.queue.want_kicks()
    ring.queue.no_kicks()
    ring.queue.push(ring.queue.pop())
    ring.queue.complete()
    assert not ring.queue.want_kicks()
    assert ring.wish() == ((2 | 1 << 15, DESC) if event_idx else (0, ENABLE))
    # Requests that are left where they are were seen once, and are waited behind.
    ring.give((DATA, 4, 2, 0))
    ring.give((DATA, 4, 3, 0))
    assert ring.queue.want_kicks() and not ring.queue.want_kicks()
    if event_idx:
        assert ring.wish() == (4 | 1 << 15, DESC)
    assert [ring.queue.pop().head, ring.queue.pop().head] == [2, 3]


def test_a_full_ring_that_nobody_takes_is_seen_once():
    ring = Ring(event_idx=True)
    for ident in range(SIZE):
        ring.give((DATA, 4, ident, 0))
    assert ring.queue.want_kicks() and not ring.queue.want_kicks()
    assert ring.wish() == (0, DESC), "the same place, a lap later"


def test_saved_places_are_taken_up_again():
    ring = Ring()
    for ident in range(SIZE + 2):
        ring.give((DATA, 4, ident, 0))
        ring.queue.push(ring.queue.pop())
        ring.queue.complete()
    places = ring.queue.save()
    other = Queue(0, 8)
    assert other.configure(ring.memory, SIZE, RING, DRIVER, DEVICE, packed=True)
    other.restore(*places)
    ring.give((DATA, 9, 77, 0))
    assert other.pop().readable == 9
    for bad in ((SIZE, 0), (0, SIZE | 0x8000), (0x7FFF, 0x7FFF)):
        with pytest.raises(ValueError, match="cannot be at"):
            other.restore(*bad)


def test_what_the_device_writes_into_the_ring_is_dirty():
    ring = Ring()
    ring.give((DATA + 0xFFC, 8, 0, WRITE))
    ring.memory.start_dirty_log()
    ring.memory.collect_dirty()
    chain = ring.queue.pop()
    chain.write(b"x" * 8)
    ring.queue.push(chain)
    ring.queue.complete()
    assert set(ring.memory.collect_dirty().pages()) == {DATA, DATA + 0x1000, RING}


def test_random_rings_harm_nothing():
    """Random bytes near what is right, in the ring and in a table that it names."""
    ring = Ring()
    memory = ring.memory
    memory.fill(0, HEAP, 0xA5)
    queue = Queue(0, 8)
    rng = random.Random(3)
    taken = faults = 0
    for number in range(3000):
        if not queue.ready:
            faults += queue.fault is not None
            size = 1 + number % 8
            assert queue.configure(memory, size, RING, DRIVER, DEVICE, event_idx=True, indirect=True, packed=True)
        for _ in range(6):
            addr = rng.choice([DATA, DATA, DATA + 64, TABLE, TABLE, RING, rng.choice([HOLE - 8, HOLE, ROM, TOP])])
            flags = rng.choice([AVAIL, USED, AVAIL | NEXT, AVAIL | WRITE, AVAIL | INDIRECT, 0, rng.getrandbits(16)])
            at = rng.choice([RING, TABLE]) + 16 * rng.randrange(8)
            size = rng.choice([1, 16, 48, 0 if rng.random() < 0.1 else 4096])
            memory.write(at, struct.pack("<QIHH", addr, size, rng.getrandbits(16), flags))
        while (chain := queue.pop()) is not None and rng.random() < 0.95:
            taken += 1
            for gpa, count in chain.ranges():
                assert gpa >= HEAP and gpa + count <= HOLE
            chain.write(rng.randbytes(8))
            queue.push(chain)
        assert queue.in_flight <= 8
        queue.complete()
        queue.want_kicks()
    assert taken > 200 and faults > 200
    assert memory.read(0, HEAP) == b"\xa5" * HEAP


def test_a_driver_negotiates_it_only_where_it_is_offered():
    from virtio_rig import Rig

    with Rig(Rng(threaded=False)) as rig:
        with pytest.raises(ValueError, match="refuses"):
            rig.driver.start(f.RING_PACKED)
        rig.driver.reset()
        with pytest.raises(ValueError, match="not of rings"):
            rig.device.offer(1)
        rig.device.offer(f.RING_PACKED)
        queue = rig.driver.start(f.RING_PACKED | f.EVENT_IDX, 7) or rig.driver.queues[0]
        assert rig.device.queues[0].size == 7
        for _ in range(20):
            assert queue.request([], [16, 16]) != [bytes(16), bytes(16)]
        assert rig.driver.status == 15
