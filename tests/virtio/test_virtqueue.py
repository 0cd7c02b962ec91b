# SPDX-License-Identifier: Apache-2.0
"""The device's side of a split virtqueue (virtio 1.2, 2.7), without a device."""

import struct

import pytest
from virtio_rig import HEAP, HIGH, HOLE, MIB, ROM, TOP, guest_memory

from kvmpy.memory import Ram
from kvmpy.virtio._queue import Queue

SIZE = 8
DESC, AVAIL, USED, DATA, TABLE = HEAP, HEAP + 0x1000, HEAP + 0x2000, HEAP + 0x4000, HEAP + 0x3000
NEXT, WRITE, INDIRECT = 1, 2, 4


class Ring:
    """A queue and a hand-written driver side."""

    def __init__(self, memory=None, *, event_idx=False, indirect=True, size=SIZE):
        self.memory = memory if memory is not None else guest_memory()
        self.queue = Queue(0, size)
        self.size = size
        assert self.queue.configure(self.memory, size, DESC, AVAIL, USED, event_idx=event_idx, indirect=indirect)

    def desc(self, slot, addr, length, flags=0, next=0, table=DESC):
        self.memory.write(table + 16 * slot, struct.pack("<QIHH", addr, length, flags, next))

    def avail(self, *heads, idx=None):
        now = self.memory.u16(AVAIL + 2)
        for head in heads:
            self.memory.put_u16(AVAIL + 4 + 2 * (now % self.size), head)
            now = now + 1 & 0xFFFF
        self.memory.put_u16(AVAIL + 2, now if idx is None else idx)

    def used(self):
        count = self.memory.u16(USED + 2)
        return count, [
            struct.unpack("<II", self.memory.read(USED + 4 + 8 * i, 8)) for i in range(min(count, self.size))
        ]


def test_a_request_is_its_readable_then_its_writable_bytes():
    ring = Ring()
    ring.memory.write(DATA, b"hello, ")
    ring.memory.write(DATA + 0x100, b"world")
    ring.desc(3, DATA, 7, NEXT, 1)
    ring.desc(1, DATA + 0x100, 5, NEXT, 6)
    ring.desc(6, DATA + 0x200, 3, NEXT | WRITE, 7)
    ring.desc(7, DATA + 0x300, 4, WRITE)
    ring.avail(3)
    chain = ring.queue.pop()
    assert (chain.head, chain.readable, chain.writable) == (3, 12, 7)
    assert chain.read() == b"hello, world"
    assert chain.read(5, 4) == b", wo"
    assert chain.read(12) == chain.read(1 << 40) == b""
    assert chain.write(b"abcdefghij") == 7
    assert ring.memory.read(DATA + 0x200, 4) == b"abc\0"
    assert ring.memory.read(DATA + 0x300, 5) == b"defg\0"
    ring.queue.push(chain)
    assert ring.used()[0] == 0, "staged, not shown"
    assert ring.queue.complete()
    assert ring.used() == (1, [(3, 7)])
    assert ring.queue.pop() is None and ring.queue.fault is None


def test_the_length_told_is_what_was_written_without_gaps():
    ring = Ring()
    for slot in range(3):
        ring.desc(slot, DATA + 0x100 * slot, 16, WRITE)
    ring.avail(0, 1, 2)
    gap, none, overlap = ring.queue.pop(), ring.queue.pop(), ring.queue.pop()
    gap.write(b"x" * 4)
    gap.write(b"y" * 4, 8)  # 4..8 was not written
    overlap.write(b"x" * 4)
    overlap.write(b"y" * 4, 2)
    for chain in (gap, none, overlap):
        ring.queue.push(chain)
    ring.queue.complete()
    assert ring.used() == (3, [(0, 4), (1, 0), (2, 6)])


def test_a_buffer_may_span_adjacent_regions():
    memory = guest_memory()
    memory.add(HOLE, Ram.anonymous(MIB))
    ring = Ring(memory)
    ring.desc(0, HOLE - 3, 6, WRITE)
    ring.avail(0)
    chain = ring.queue.pop()
    assert chain.write(b"abcdef") == 6
    assert memory.read(HOLE - 3, 6) == b"abcdef"


def test_indirect_tables_alone_and_after_other_descriptors():
    ring = Ring()
    ring.memory.write(DATA, b"0123456789")
    ring.desc(0, DATA, 2, NEXT, 1)
    ring.desc(1, TABLE, 48, INDIRECT | WRITE)  # WRITE is ignored here (2.7.5.3.2)
    ring.desc(0, DATA + 4, 2, NEXT, 2, table=TABLE)
    ring.desc(1, DATA + 0x100, 8, WRITE, 0, table=TABLE)
    ring.desc(2, DATA + 8, 2, NEXT, 1, table=TABLE)
    ring.avail(0)
    chain = ring.queue.pop()
    assert chain.read() == b"014589" and chain.writable == 8


BAD_CHAINS = {
    "self loop": lambda r: r.desc(0, DATA, 4, NEXT, 0),
    "two-node loop": lambda r: (r.desc(0, DATA, 4, NEXT, 1), r.desc(1, DATA, 4, NEXT, 0)),
    "next beyond the table": lambda r: r.desc(0, DATA, 4, NEXT, SIZE),
    "unknown flag": lambda r: r.desc(0, DATA, 4, 8),
    "packed ring flags": lambda r: r.desc(0, DATA, 4, 0x8080),
    "length 0": lambda r: r.desc(0, DATA, 0),
    "in a hole": lambda r: r.desc(0, HOLE, 4),
    "into a hole": lambda r: r.desc(0, HOLE - 2, 4),
    "wraps at 2^64": lambda r: r.desc(0, TOP + 0xFFF, 2),
    "the last byte of the address space": lambda r: r.desc(0, (1 << 64) - 1, 1),
    "write to ROM": lambda r: r.desc(0, ROM, 4, WRITE),
    "readable after writable": lambda r: (r.desc(0, DATA, 4, NEXT | WRITE, 1), r.desc(1, DATA, 4)),
    "4 GiB": lambda r: r.desc(0, DATA, 0xFFFF_FFFF),
    "indirect with next": lambda r: (r.desc(0, TABLE, 16, INDIRECT | NEXT, 1), r.desc(1, DATA, 4)),
    "indirect of length 0": lambda r: r.desc(0, TABLE, 0, INDIRECT),
    "indirect of odd length": lambda r: r.desc(0, TABLE, 17, INDIRECT),
    "indirect larger than the queue": lambda r: r.desc(0, TABLE, 16 * (SIZE + 1), INDIRECT),
    "indirect of 65536 entries": lambda r: r.desc(0, TABLE, 16 << 16, INDIRECT),
    "indirect in a hole": lambda r: r.desc(0, HOLE, 16, INDIRECT),
    "indirect over the end of RAM": lambda r: r.desc(0, HOLE - 16, 32, INDIRECT),
    "nested indirect": lambda r: (r.desc(0, TABLE, 16, INDIRECT), r.desc(0, TABLE, 16, INDIRECT, table=TABLE)),
    "loop in indirect": lambda r: (r.desc(0, TABLE, 32, INDIRECT), r.desc(0, DATA, 1, NEXT, 0, table=TABLE)),
    "next beyond indirect": lambda r: (r.desc(0, TABLE, 32, INDIRECT), r.desc(0, DATA, 1, NEXT, 2, table=TABLE)),
}


@pytest.mark.parametrize("name", BAD_CHAINS)
def test_a_bad_chain_stops_the_queue_until_it_is_configured_again(name):
    ring = Ring()
    ring.desc(5, DATA, 4)
    BAD_CHAINS[name](ring)
    ring.avail(5, 0, 5)
    good = ring.queue.pop()
    assert good is not None
    assert ring.queue.pop() is None
    assert ring.queue.fault is not None
    ring.queue.push(good)
    assert not ring.queue.complete() and ring.used()[0] == 0, "a broken device shows nothing more"
    assert ring.queue.pop() is None and not ring.queue.ready
    ring.desc(0, DATA, 4)
    ring.memory.fill(AVAIL, 4)
    assert ring.queue.configure(ring.memory, SIZE, DESC, AVAIL, USED)
    ring.avail(0)
    assert ring.queue.pop().readable == 4


def test_more_than_4_gib_in_sum_is_a_fault():
    memory = guest_memory()
    memory.add(2 * HIGH, Ram.anonymous(1 << 30))  # never touched
    for more in (0, 1):
        ring = Ring(memory)
        for slot in range(4):
            ring.desc(slot, 2 * HIGH, 1 << 30, NEXT, slot + 1)
        ring.desc(3 + more, 2 * HIGH, 1 << (0 if more else 30))
        ring.avail(0)
        chain = ring.queue.pop()
        if more:
            assert chain is None and "more than 4 GiB" in ring.queue.fault
        else:
            assert chain.readable == 1 << 32


def test_indirect_must_be_negotiated():
    ring = Ring(indirect=False)
    ring.desc(0, TABLE, 16, INDIRECT)
    ring.desc(0, DATA, 4, table=TABLE)
    ring.avail(0)
    assert ring.queue.pop() is None
    assert "not negotiated" in ring.queue.fault


def test_a_chain_as_long_as_the_queue_is_the_longest():
    ring = Ring()
    for slot in range(SIZE):
        ring.desc(slot, DATA, 1, NEXT if slot < SIZE - 1 else 0, slot + 1)
    ring.avail(0)
    assert ring.queue.pop().readable == SIZE


@pytest.mark.parametrize(
    ("heads", "idx", "words"),
    [
        ([SIZE], None, "beyond the table"),
        ([0xFFFF], None, "beyond the table"),
        ([0, 0], None, "available twice"),
        ([0], SIZE + 1, "ahead by more"),
        ([0], 0xFFFF, "ahead by more"),
    ],
)
def test_bad_available_rings(heads, idx, words):
    ring = Ring()
    ring.desc(0, DATA, 4)
    ring.avail(*heads, idx=idx)
    while ring.queue.pop() is not None:
        pass
    assert words in ring.queue.fault


BAD_RINGS = {
    "size 0": (0, DESC, AVAIL, USED),
    "size no power of two": (3, DESC, AVAIL, USED),
    "size larger than offered": (SIZE * 2, DESC, AVAIL, USED),
    "size 0x10000": (0x1_0000, DESC, AVAIL, USED),
    "descriptors at odd address": (SIZE, DESC + 8, AVAIL, USED),
    "available ring at odd address": (SIZE, DESC, AVAIL + 1, USED),
    "used ring at odd address": (SIZE, DESC, AVAIL, USED + 2),
    "descriptors in a hole": (SIZE, HOLE, AVAIL, USED),
    "descriptors over the end of RAM": (SIZE, HOLE - 16, AVAIL, USED),
    "used ring in ROM": (SIZE, DESC, AVAIL, ROM),
    "used ring at the end of the address space": (SIZE, DESC, AVAIL, (1 << 64) - 4),
    "available ring over the end of the address space": (SIZE, DESC, (1 << 64) - 2, USED),
}


@pytest.mark.parametrize("name", BAD_RINGS)
def test_rings_that_cannot_be_are_refused(name):
    queue = Queue(0, SIZE)
    assert not queue.configure(guest_memory(), *BAD_RINGS[name])
    assert queue.fault is not None and not queue.ready
    assert queue.pop() is None and not queue.complete() and not queue.want_kicks()


def test_indices_wrap_at_65536():
    ring = Ring()
    ring.desc(0, DATA, 4)
    ring.queue.restore(0xFFFE, 0xFFFE)
    ring.memory.put_u16(AVAIL + 2, 0xFFFE)
    ring.memory.put_u16(USED + 2, 0xFFFE)
    for expected in (0xFFFF, 0, 1, 2):
        ring.avail(0)
        ring.queue.push(ring.queue.pop())
        ring.queue.complete()
        assert ring.memory.u16(USED + 2) == expected
    assert ring.queue.save() == (2, 2)


def test_interrupts_follow_the_flag_of_the_available_ring():
    ring = Ring()
    for slot in range(2):
        ring.desc(slot, DATA, 4)
    ring.memory.put_u16(AVAIL, 1)  # NO_INTERRUPT
    ring.avail(0)
    ring.queue.push(ring.queue.pop())
    assert not ring.queue.complete()
    ring.memory.put_u16(AVAIL, 0)
    ring.avail(1)
    ring.queue.push(ring.queue.pop())
    assert ring.queue.complete()
    assert not ring.queue.complete(), "nothing new"


def test_interrupts_follow_used_event():
    ring = Ring(event_idx=True)
    wanted = []
    for number in range(6):
        ring.desc(0, DATA, 4)
        ring.memory.put_u16(AVAIL + 4 + 2 * SIZE, 3)  # tell me when entry 3 is used
        ring.avail(0)
        ring.queue.push(ring.queue.pop())
        if number == 0:
            ring.queue.complete()  # the first one is always told
        else:
            wanted.append(ring.queue.complete())
    assert wanted == [False, False, True, False, False]


def test_kicks_are_asked_for_without_losing_one():
    for event_idx in (False, True):
        ring = Ring(event_idx=event_idx)
        ring.desc(0, DATA, 4)
        ring.desc(1, DATA, 4)
        ring.avail(0)
        ring.queue.no_kicks()
        assert event_idx or ring.memory.u16(USED) == 1
        assert ring.queue.pop() is not None and ring.queue.pop() is None
        ring.avail(1)  # after the last look
        assert ring.queue.want_kicks()
        assert ring.queue.pop() is not None and ring.queue.pop() is None
        assert not ring.queue.want_kicks()
        assert ring.memory.u16(USED) == 0
        if event_idx:
            assert ring.memory.u16(USED + 4 + 8 * SIZE) == 2  # avail_event: kick at the next one


def test_requests_that_were_given_back_come_again():
    ring = Ring()
    ring.desc(0, DATA, 4)
    ring.desc(1, DATA, 5)
    ring.avail(0, 1)
    ring.queue.pop()
    second = ring.queue.pop()
    ring.queue.unpop(second)
    ring.queue.unpop(second)
    again = ring.queue.pop()
    assert again.head == 1 and ring.queue.in_flight == 2


def test_a_request_is_given_back_once_and_never_after_a_reset():
    ring = Ring()
    ring.desc(0, DATA, 4, WRITE)
    ring.avail(0)
    chain = ring.queue.pop()
    ring.queue.push(chain)
    ring.queue.push(chain)
    ring.queue.complete()
    assert ring.used()[0] == 1
    ring.desc(1, DATA, 4, WRITE)
    ring.avail(1)
    late = ring.queue.pop()
    ring.memory.fill(AVAIL, 64)
    ring.memory.fill(USED, 64)
    ring.queue.configure(ring.memory, SIZE, DESC, AVAIL, USED)
    assert late.write(b"late") == 0
    ring.queue.push(late)
    ring.queue.complete()
    assert ring.used()[0] == 0 and ring.memory.read(DATA, 4) == bytes(4)


def test_memory_that_is_removed_stays_mapped_while_a_request_uses_it():
    memory = guest_memory()
    ring = Ring(memory)
    ram = Ram.anonymous(MIB)
    region = memory.add(HOLE, ram)
    ring.desc(0, HOLE, 8, WRITE)
    ring.desc(1, HOLE, 8, WRITE)
    ring.avail(0)
    chain = ring.queue.pop()
    memory.remove(region)
    assert chain.write(b"still ok") == 8
    with pytest.raises(BufferError):
        ram.close()
    ring.queue.push(chain)
    ring.queue.complete()
    ring.avail(1)
    assert ring.queue.pop() is None, "no longer guest memory"
    assert "not in guest memory" in ring.queue.fault
    del chain
    ram.close()


def test_rings_in_memory_that_is_removed_are_a_fault():
    memory = guest_memory()
    region = memory.add(HOLE, Ram.anonymous(MIB))
    queue = Queue(0, SIZE)
    assert queue.configure(memory, SIZE, HOLE, HOLE + 0x1000, HOLE + 0x2000)
    memory.remove(region)
    assert queue.pop() is None
    assert "not in guest RAM" in queue.fault


def test_what_the_device_writes_is_told_before_the_driver_learns_of_it():
    seen = []

    def wrote(gpa, size):
        seen.append((gpa, size, memory.u16(USED + 2)))

    memory = guest_memory(wrote)
    ring = Ring(memory)
    ring.desc(0, DATA, 8, NEXT | WRITE, 1)
    ring.desc(1, DATA + 0x100, 8, WRITE)
    ring.avail(0)
    chain = ring.queue.pop()
    seen.clear()
    chain.write(b"x" * 12)
    ring.queue.push(chain)
    ring.queue.complete()
    assert seen[:2] == [(DATA, 8, 0), (DATA + 0x100, 4, 0)]
    assert [entry for entry in seen[2:] if entry[2] == 0] == []
    assert any(gpa <= USED < gpa + size for gpa, size, _ in seen)


def test_what_the_device_writes_is_dirty():
    memory = guest_memory()
    ring = Ring(memory)
    ring.desc(0, DATA + 0xFFC, 8, WRITE)
    ring.avail(0)
    memory.start_dirty_log()
    memory.collect_dirty()
    chain = ring.queue.pop()
    chain.write(b"x" * 8)
    ring.queue.push(chain)
    ring.queue.complete()
    dirty = set(memory.collect_dirty().pages())
    assert dirty == {DATA, DATA + 0x1000, USED}


def test_more_written_ranges_than_are_kept_apart_are_still_all_told():
    count = 1024
    memory = guest_memory()
    queue = Queue(0, count)
    desc, avail, used = HEAP, HEAP + 0x8000, HEAP + 0x1_0000
    assert queue.configure(memory, count, desc, avail, used)
    for slot in range(count):
        addr = HIGH + 0x100 * slot if slot % 2 else 0x100 * slot
        memory.write(
            desc + 16 * slot, struct.pack("<QIHH", addr, 4, WRITE | (NEXT if slot < count - 1 else 0), slot + 1 & 0x3FF)
        )
    memory.put_u16(avail + 2, 1)
    memory.start_dirty_log()
    memory.collect_dirty()
    chain = queue.pop()
    assert chain.write(b"x" * 4 * count) == 4 * count
    queue.push(chain)
    queue.complete()
    dirty = set(memory.collect_dirty().pages())
    wanted = {(HIGH if slot % 2 else 0) + (0x100 * slot & ~0xFFF) for slot in range(count)}
    assert wanted <= dirty
