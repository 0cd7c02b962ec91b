# SPDX-License-Identifier: Apache-2.0
"""The port and memory buses."""

import logging
import threading

import pytest

from kvmpy.bus import MAX_CACHED, MAX_LOGGED, Bus
from kvmpy.errors import OverlapError

ALL_ONES = {1: 0xFF, 2: 0xFFFF, 3: 0xFF_FFFF, 4: 0xFFFF_FFFF, 8: (1 << 64) - 1}


class Recorder:
    """A device whose byte n reads as 0x10 + n, and that remembers what it was asked."""

    def __init__(self, name="recorder", size=4):
        self.name = name
        self.size = size
        self.calls = []

    def read(self, offset, size):
        self.calls.append(("r", offset, size))
        return int.from_bytes(bytes(0x10 + offset + i for i in range(size)), "little")

    def write(self, offset, size, value):
        self.calls.append(("w", offset, size, value))

    def reset(self):
        self.calls.clear()

    def save(self):
        return {"version": 1}

    def load(self, state):
        pass


@pytest.fixture
def bus():
    return Bus("pio")


@pytest.mark.parametrize("again", [1, 2])  # the second access comes from the cache
def test_an_access_reaches_the_device_by_offset(bus, again):
    device = Recorder()
    bus.add(0x100, device)
    for _ in range(again):
        device.calls.clear()
        assert bus.read(0x102, 2) == 0x1312
        bus.write(0x103, 1, 0x1FF)
        assert device.calls == [("r", 2, 2), ("w", 3, 1, 0xFF)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_nobody_reads_as_all_ones(bus, size):
    assert bus.read(0x80, size) == ALL_ONES[size]
    bus.write(0x80, size, 0)


def test_values_are_cut_to_the_size_of_the_access(bus):
    bus.claim(0x10, 1, "wide", read=lambda offset, size: -1)
    assert bus.read(0x10, 1) == 0xFF
    assert bus.read(0x10, 1) == 0xFF


def test_first_and_last_address_of_a_device(bus):
    bus.add(0x100, Recorder(size=4))
    assert [bus.read(a, 1) for a in (0xFF, 0x100, 0x103, 0x104)] == [0xFF, 0x10, 0x13, 0xFF]


def test_the_size_can_be_given(bus):
    device = Recorder(size=4)
    bus.add(0x100, device, size=2)
    assert bus.read(0x102, 1) == 0xFF


def test_a_device_at_two_addresses_is_removed_from_both(bus):
    device = Recorder()
    bus.add(0x100, device)
    bus.add(0x200, device)
    assert bus.read(0x200, 1) == 0x10
    bus.remove(device)
    assert bus.read(0x200, 1) == bus.read(0x100, 1) == 0xFF
    with pytest.raises(ValueError, match="recorder is not on the pio bus"):
        bus.remove(device)


# -- claims


def test_overlap_names_both_owners(bus):
    bus.add(0x3F8, Recorder("com1", 8))
    with pytest.raises(OverlapError, match=r"for ide: \[0x3f8, 0x400\) belongs to com1"):
        bus.add(0x3FF, Recorder("ide", 2))
    with pytest.raises(OverlapError, match=r"mine: .* belongs to com1"):
        bus.claim(0x3F0, 0x20, "mine", write=print)
    bus.add(0x400, Recorder("next", 1))
    bus.add(0x3F7, Recorder("before", 1))
    assert [claim.owner for claim in bus.entries()] == ["before", "com1", "next"]


def test_reads_and_writes_can_have_two_owners(bus):
    written = []
    reads = bus.claim(0x80, 1, "reader", read=lambda offset, size: 0x42)
    writes = bus.claim(0x80, 1, "writer", write=lambda *args: written.append(args))
    assert bus.read(0x80, 1) == 0x42
    bus.write(0x80, 1, 7)
    assert written == [(0, 1, 7)]
    with pytest.raises(OverlapError, match=r"pio writes .* for third: .* belongs to writer"):
        bus.claim(0x80, 1, "third", write=print)
    assert bus.at(0x80) == (reads, writes)
    bus.release(reads)
    assert bus.read(0x80, 1) == 0xFF
    bus.write(0x80, 1, 8)
    assert written[-1] == (0, 1, 8)
    with pytest.raises(ValueError, match="reader> is not on"):
        bus.release(reads)


def test_a_refused_device_claims_neither_direction(bus):
    bus.claim(0x81, 1, "writer", write=print)
    with pytest.raises(OverlapError):
        bus.add(0x80, Recorder())
    assert bus.read(0x80, 1) == 0xFF


def test_removal_is_seen_although_the_address_was_cached(bus):
    claim = bus.add(0x100, Recorder())
    assert bus.read(0x100, 1) == bus.read(0x100, 1) == 0x10
    bus.release(claim)
    assert bus.read(0x100, 1) == 0xFF
    bus.claim(0x100, 1, "new", read=lambda offset, size: 7)
    assert bus.read(0x100, 1) == 7


@pytest.mark.parametrize(
    ("base", "size"), [(-1, 1), (0x10000, 1), (0xFFFF, 2), (0, 0), (0, -1), (0, 0x10001)]
)
def test_claims_outside_the_bus_are_refused(bus, base, size):
    with pytest.raises(ValueError, match=r"dev: .* of pio"):
        bus.claim(base, size, "dev", read=lambda offset, size: 0)


def test_a_claim_needs_a_direction(bus):
    with pytest.raises(ValueError, match="nobody: a claim needs"):
        bus.claim(0, 1, "nobody")


def test_memory_bus_has_64_bit_addresses():
    bus = Bus("mmio")
    bus.claim((1 << 64) - 4, 4, "top", read=lambda offset, size: offset)
    assert bus.read((1 << 64) - 1, 1) == 3
    with pytest.raises(ValueError, match="of mmio"):
        bus.claim((1 << 64) - 4, 5, "over", write=print)
    with pytest.raises(ValueError, match='"pio" or "mmio"'):
        Bus("isa")


# -- accesses that do not fit


def test_an_access_over_the_end_is_split_into_bytes(bus):
    device = Recorder(size=4)
    bus.add(0x100, device)
    assert bus.read(0x102, 4) == 0xFFFF_1312
    bus.write(0x102, 4, 0x44332211)
    assert device.calls == [("r", 2, 1), ("r", 3, 1), ("w", 2, 1, 0x11), ("w", 3, 1, 0x22)]


def test_an_access_that_begins_before_a_device_reaches_it(bus):
    device = Recorder(size=2)
    bus.add(0x101, device)
    assert bus.read(0x100, 4) == 0xFF11_10FF
    bus.write(0x100, 4, 0x44332211)
    assert device.calls[-2:] == [("w", 0, 1, 0x22), ("w", 1, 1, 0x33)]


def test_an_access_over_two_devices_reaches_both(bus):
    first, second = Recorder("a", 2), Recorder("b", 2)
    bus.add(0x100, first)
    bus.add(0x102, second)
    assert bus.read(0x101, 2) == 0x1011
    bus.write(0x101, 2, 0xBBAA)
    assert (first.calls[-1], second.calls[-1]) == (("w", 1, 1, 0xAA), ("w", 0, 1, 0xBB))


def test_an_access_wraps_at_the_last_port(bus):
    bus.claim(0, 1, "zero", read=lambda offset, size: 0x22)
    bus.claim(0xFFFF, 1, "last", read=lambda offset, size: 0x11)
    assert bus.read(0xFFFF, 2) == 0x2211


def test_a_device_can_be_larger_than_an_access(bus):
    device = Recorder(size=0x1000)
    bus.add(0x1000, device)
    assert bus.read(0x1000, 8) == 0x1716151413121110
    assert device.calls == [("r", 0, 8)]


@pytest.mark.parametrize("size", [0, -1, 9, 16])
def test_sizes_that_no_processor_makes_are_mistakes(bus, size):
    bus.add(0x100, Recorder(size=64))
    bus.read(0x100, 1)
    bus.write(0x100, 1, 0)
    with pytest.raises(ValueError, match=f"1 to 8 bytes, not {size}"):
        bus.read(0x100, size)
    with pytest.raises(ValueError, match=f"1 to 8 bytes, not {size}"):
        bus.write(0x100, size, 0)


@pytest.mark.parametrize("addr", [-1, 0x10000])
def test_addresses_outside_are_mistakes(bus, addr):
    with pytest.raises(ValueError, match="is not an address of the pio bus"):
        bus.read(addr, 1)


def test_what_a_device_raises_comes_out(bus):
    def fail(*args):
        raise RuntimeError("broken device")

    bus.claim(0x10, 4, "bad", read=fail, write=fail)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken device"):
            bus.read(0x10, 4)
        with pytest.raises(RuntimeError, match="broken device"):
            bus.write(0x11, 1, 0)


# -- what nobody claimed


def test_unclaimed_accesses_are_counted_and_logged_once(bus, caplog):
    with caplog.at_level(logging.INFO, "kvmpy.bus"):
        for _ in range(3):
            bus.read(0x80, 1)
        bus.write(0x81, 2, 0)
    assert bus.unclaimed == {0x80: 3, 0x81: 1}
    assert bus.unclaimed_total == 4
    assert [record.getMessage() for record in caplog.records] == [
        "pio read of 1 byte(s) at 0x80: nobody answers",
        "pio write of 2 byte(s) at 0x81: nobody answers",
    ]


def test_what_is_kept_per_address_is_bounded(caplog):
    bus = Bus("mmio")
    bus.claim(0, 1 << 20, "ram", read=lambda offset, size: 0)
    with caplog.at_level(logging.INFO, "kvmpy.bus"):
        for addr in range(MAX_CACHED + 10):
            bus.read(addr, 1)
            bus.read((1 << 40) + addr, 1)
    assert len(bus._reads.cache) <= MAX_CACHED
    assert len(bus.unclaimed) == MAX_LOGGED == len(caplog.records)
    assert bus.unclaimed_total == MAX_CACHED + 10


def test_devices_come_and_go_while_others_are_used():
    bus = Bus("pio")
    bus.claim(0x10, 1, "steady", read=lambda offset, size: 0x5A)
    stop, wrong = threading.Event(), []

    def use():
        while not stop.is_set():
            if bus.read(0x10, 1) != 0x5A or bus.read(0x20, 1) not in (0xFF, 0x33):
                wrong.append(1)

    users = [threading.Thread(target=use) for _ in range(2)]
    for user in users:
        user.start()
    for _ in range(300):
        bus.release(bus.claim(0x20, 1, "guest", read=lambda offset, size: 0x33))
    assert bus.read(0x20, 1) == 0xFF
    stop.set()
    for user in users:
        user.join()
    assert wrong == []
    assert bus.read(0x20, 1) == 0xFF
