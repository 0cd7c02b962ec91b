# SPDX-License-Identifier: Apache-2.0
"""Which pages were written."""

import pytest

from kvmpy.memory import DirtyLog, DirtyRing, GuestMemory, Ram

PAGE = 4096
HIGH = 0x1_0000_0000


@pytest.fixture
def calls():
    return []


@pytest.fixture
def memory(calls):
    """20 pages at 0, 3 pages at 4 GiB, a ROM page below."""
    memory = GuestMemory(lambda *slot: calls.append((slot[0], slot[2], slot[4])))
    memory.add(0, Ram.anonymous(20 * PAGE))
    memory.add(HIGH, Ram.anonymous(3 * PAGE))
    memory.add(HIGH - PAGE, Ram.anonymous(PAGE), readonly=True)
    return memory


class Log:
    """A VM with a dirty log: gives what the test set, once."""

    def __init__(self):
        self.dirty = {}
        self.asked = []
        self.cleared = []

    def get_dirty_log(self, slot):
        self.asked.append(slot)
        return self.dirty.pop(slot, bytes(8))

    def clear_dirty_log(self, slot, bitmap):
        self.cleared.append((slot, bitmap))


class Rings:
    """A VM, and its only vCPU, with a dirty ring."""

    def __init__(self, *entries):
        self.entries = list(entries)
        self.vcpus = [self]
        self.resets = 0

    def collect_dirty(self):
        taken, self.entries = self.entries, []
        return taken

    def reset_dirty_rings(self):
        self.resets += 1


def test_nothing_is_logged_before_it_is_asked_for(memory):
    memory.write(0, b"x")
    assert len(memory.collect_dirty()) == 0
    assert all(region.marks is None for region in memory.regions)


def test_logging_is_told_to_the_engine_for_writable_regions(memory, calls):
    calls.clear()
    memory.start_dirty_log()
    memory.start_dirty_log()
    assert calls == [(0, 20 * PAGE, 1), (1, 3 * PAGE, 1)]
    calls.clear()
    memory.stop_dirty_log()
    assert calls == [(0, 20 * PAGE, 0), (1, 3 * PAGE, 0)]
    memory.write(0, b"x")
    assert not memory.collect_dirty()


def test_a_region_can_be_logged_from_the_start(calls):
    memory = GuestMemory(lambda *slot: calls.append(slot[4]))
    memory.add(0, Ram.anonymous(PAGE), log_dirty=True)
    assert calls == [1]
    memory.put_u8(0, 1)
    assert list(memory.collect_dirty().pages()) == [0]


@pytest.mark.parametrize(
    ("write", "pages"),
    [
        (lambda m: m.write(PAGE - 1, b"ab"), [0, 1]),
        (lambda m: m.write(PAGE - 1, memoryview(b"ab")), [0, 1]),
        (lambda m: m.write(PAGE - 1, b"a"), [0]),
        (lambda m: m.fill(2 * PAGE, 3 * PAGE), [2, 3, 4]),
        (lambda m: m.put_u8(5 * PAGE, 1), [5]),
        (lambda m: m.put_u64(6 * PAGE - 4, 1), [5, 6]),
        (lambda m: m.wrote(7 * PAGE, 1), [7]),
        (lambda m: setattr(m.view(8 * PAGE, "struct hvm_start_info"), "magic", 1), [8]),
    ],
)
def test_every_kind_of_host_write_is_logged_once(memory, write, pages):
    memory.start_dirty_log()
    write(memory)
    assert [gpa // PAGE for gpa in memory.collect_dirty()] == pages
    assert list(memory.collect_dirty()) == []


def test_regions_added_while_logging_are_logged(memory):
    memory.start_dirty_log()
    memory.add(0x10_0000, Ram.anonymous(PAGE))
    memory.add(0x20_0000, Ram.anonymous(PAGE), readonly=True)
    memory.put_u8(0x10_0000, 1)
    assert list(memory.collect_dirty()) == [0x10_0000]
    assert not memory.region_at(0x20_0000).log_dirty
    memory.stop_dirty_log()
    assert not memory.add(0x30_0000, Ram.anonymous(PAGE)).log_dirty


def test_ranges_join_neighbours_and_stop_at_regions(memory):
    memory.start_dirty_log()
    memory.fill(3 * PAGE, 2 * PAGE)
    memory.put_u8(19 * PAGE, 1)
    memory.fill(HIGH, 3 * PAGE)
    dirty = memory.collect_dirty()
    assert list(dirty.ranges()) == [(3 * PAGE, 2 * PAGE), (19 * PAGE, PAGE), (HIGH, 3 * PAGE)]
    assert len(dirty) == 6
    assert 3 * PAGE + 17 in dirty
    assert 5 * PAGE not in dirty
    assert HIGH + 3 * PAGE not in dirty
    assert dirty.bitmap(memory.region_at(0)) == (0b11000 | 1 << 19).to_bytes(3, "little")
    assert dirty.bitmap(memory.region_at(HIGH)) == b"\x07"
    assert dirty.bitmap(memory.region_at(HIGH - PAGE)) == b""


def test_adjoining_regions_are_one_range():
    memory = GuestMemory(lambda *slot: None)
    for page in range(3):
        memory.add(page * PAGE, Ram.anonymous(PAGE), log_dirty=True)
    memory.fill(0, 3 * PAGE)
    assert list(memory.collect_dirty().ranges()) == [(0, 3 * PAGE)]


def test_the_log_of_the_engine_is_joined_with_the_hosts(memory):
    log = Log()
    memory.start_dirty_log(DirtyLog(log))
    log.dirty[0] = (1 << 2 | 1 << 17).to_bytes(8, "little")
    memory.put_u8(4 * PAGE, 1)
    memory.put_u8(2 * PAGE, 1)
    assert [gpa // PAGE for gpa in memory.collect_dirty()] == [2, 4, 17]
    assert log.asked == [0, 1]
    assert log.cleared == []
    assert len(memory.collect_dirty()) == 0


def test_bits_beyond_the_region_do_not_count(memory):
    log = Log()
    memory.start_dirty_log(DirtyLog(log))
    log.dirty[1] = b"\xff" * 8
    dirty = memory.collect_dirty()
    assert (len(dirty), list(dirty.ranges())) == (3, [(HIGH, 3 * PAGE)])


def test_a_log_with_manual_clearing_is_cleared_with_what_was_read(memory):
    log = Log()
    memory.start_dirty_log(DirtyLog(log, manual=True))
    log.dirty[1] = b"\x05" + bytes(7)
    assert len(memory.collect_dirty()) == 2
    assert log.cleared == [(1, b"\x05" + bytes(7))]


def test_the_ring_gives_the_same_answer(memory):
    vm = Rings((0, 2), (1, 1), (0, 17), (0, 2))
    ring = DirtyRing(vm)
    memory.start_dirty_log(ring)
    memory.put_u8(4 * PAGE, 1)
    ring.drain()  # as on KVM_EXIT_DIRTY_RING_FULL
    vm.entries.append((1, 2))
    assert list(memory.collect_dirty().ranges()) == [
        (2 * PAGE, PAGE), (4 * PAGE, PAGE), (17 * PAGE, PAGE), (HIGH + PAGE, 2 * PAGE),
    ]  # fmt: skip
    assert vm.resets == 2
    assert not memory.collect_dirty()


def test_a_removed_region_does_not_leave_dirt_for_the_next_one_in_its_slot(memory):
    memory.start_dirty_log(DirtyRing(Rings((1, 0))))
    memory.remove(memory.region_at(HIGH))
    assert memory.add(HIGH, Ram.anonymous(PAGE), log_dirty=True).slot == 1
    assert not memory.collect_dirty()


def test_a_failed_start_leaves_logging_off(memory):
    def refuse(*slot):
        raise OSError("no memory for the bitmap")

    works, memory._set_slot = memory._set_slot, refuse
    with pytest.raises(OSError, match="bitmap"):
        memory.start_dirty_log()
    memory._set_slot = works
    assert not any(region.log_dirty for region in memory.regions)
    memory.write(0, b"x")
    assert not memory.collect_dirty()
