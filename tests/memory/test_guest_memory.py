# SPDX-License-Identifier: Apache-2.0
"""Access by guest physical address."""

import threading
from random import Random

import pytest

from kvmpy.errors import GuestMemoryError, OverlapError, StateError
from kvmpy.memory import GuestMemory, Ram

PAGE = 4096
HIGH = 0x1_0000_0000


class Slots:
    """Stands for an engine: remembers its slots and what it was told."""

    def __init__(self):
        self.now = {}
        self.calls = []
        self.writes = []
        self.refuse = None

    def set_slot(self, slot, gpa, size, hva, flags):
        self.calls.append((slot, gpa, size, flags))
        if self.refuse is not None:
            raise self.refuse
        if size:
            self.now[slot] = (gpa, size, hva, flags)
        else:
            del self.now[slot]

    def wrote(self, gpa, size):
        self.writes.append((gpa, size))


@pytest.fixture
def slots():
    return Slots()


@pytest.fixture
def memory(slots):
    """Two adjoining regions of two pages at 0, a ROM page at 0x8000, a page at 4 GiB."""
    memory = GuestMemory(slots.set_slot, slots.wrote)
    memory.add(0, Ram.anonymous(2 * PAGE), name="low")
    memory.add(2 * PAGE, Ram.anonymous(2 * PAGE), name="middle")
    memory.add(0x8000, Ram.from_bytes(b"ROM!"), readonly=True, name="bios")
    memory.add(HIGH, Ram.anonymous(PAGE), name="high")
    yield memory
    slots.refuse = None
    memory.close()


# -- regions


def test_regions_are_told_to_the_engine_and_listed(memory, slots):
    assert [(r.name, r.gpa, r.size, r.slot, r.readonly) for r in memory.regions] == [
        ("low", 0, 0x2000, 0, False),
        ("middle", 0x2000, 0x2000, 1, False),
        ("bios", 0x8000, 0x1000, 2, True),
        ("high", HIGH, 0x1000, 3, False),
    ]
    assert slots.now == {r.slot: (r.gpa, r.size, r.address, 2 if r.readonly else 0) for r in memory.regions}
    assert memory.ram_ranges() == [(0, 0x4000), (HIGH, 0x1000)]
    assert memory.region_at(0x2000).name == "middle"
    assert memory.region_at(0x4000) is None


def test_slots_are_reused_and_deleted_before_the_region_goes(memory, slots):
    middle = memory.region_at(0x2000)
    slots.calls.clear()
    slots.refuse = OSError("busy")
    with pytest.raises(OSError, match="busy"):
        memory.remove(middle)
    assert memory.read(0x2000, 1) == b"\0"
    slots.refuse = None
    memory.remove(middle)
    assert slots.calls == [(1, 0x2000, 0, 0)] * 2
    assert memory.add(0x10_0000, Ram.anonymous(PAGE)).slot == 1
    with pytest.raises(ValueError, match="is not a region"):
        memory.remove(middle)


def test_part_of_a_ram_can_be_shown_and_shown_twice():
    slots = Slots()
    memory = GuestMemory(slots.set_slot)
    ram = Ram.anonymous(4 * PAGE)
    memory.add(0xF000_0000, ram)
    alias = memory.add(0x1_0000, ram, offset=3 * PAGE, size=PAGE, name="alias")
    memory.write(0x1_0000, b"shadow")
    assert memory.read(0xF000_3000, 6) == b"shadow"
    assert alias.address == ram.address + 3 * PAGE
    with pytest.raises(GuestMemoryError, match="no memory at 0x1_1000"):
        memory.read(0x1_0FFF, 2)


def test_overlap_names_both(memory, slots):
    slots.calls.clear()
    ram = Ram.anonymous(4 * PAGE)
    with pytest.raises(OverlapError, match=r"vga \[0x1000, 0x5000\) overlaps low \[0x0, 0x2000\) \(slot 0\)"):
        memory.add(0x1000, ram, name="vga")
    with pytest.raises(OverlapError, match="bios"):
        memory.add(0x6000, ram)
    assert slots.calls == []
    ram.close()  # nothing holds it


@pytest.mark.parametrize("gpa", [1, PAGE + 512, -PAGE])
def test_unaligned_or_negative_addresses_are_refused(memory, gpa):
    with pytest.raises(ValueError, match=f"at {gpa:#_x}, size 0x1000"):
        memory.add(gpa, Ram.anonymous(PAGE))


def test_a_region_past_the_end_of_the_address_space_is_refused(memory):
    with pytest.raises(ValueError, match="past the end of the address space"):
        memory.add((1 << 64) - PAGE, Ram.anonymous(2 * PAGE))
    assert memory.add((1 << 64) - PAGE, Ram.anonymous(PAGE)).end == 1 << 64
    memory.put_u64((1 << 64) - 8, 5)
    with pytest.raises(GuestMemoryError, match="not a 64-bit address"):
        memory.read((1 << 64) - 8, 9)


@pytest.mark.parametrize(
    "part",
    [{"offset": PAGE}, {"offset": 1, "size": PAGE}, {"size": 2 * PAGE}, {"offset": -PAGE}, {"size": 100}],
)
def test_a_part_that_is_not_in_the_ram_is_refused(memory, part):
    with pytest.raises(ValueError, match="memory ram"):
        memory.add(0x10_0000, Ram.anonymous(PAGE), **part)


def test_read_only_ram_needs_a_read_only_region(memory, tmp_path):
    (tmp_path / "rom").write_bytes(b"rom".ljust(PAGE))
    ram = Ram.file(tmp_path / "rom", readonly=True)
    with pytest.raises(ValueError, match="readonly=True"):
        memory.add(0x10_0000, ram)
    memory.add(0x10_0000, ram, readonly=True)
    assert memory.read(0x10_0000, 3) == b"rom"


def test_when_the_engine_refuses_nothing_has_changed(memory, slots):
    slots.refuse = OSError("no slots left")
    ram = Ram.anonymous(PAGE)
    with pytest.raises(OSError, match="no slots left"):
        memory.add(0x10_0000, ram)
    assert memory.region_at(0x10_0000) is None
    ram.close()


def test_a_ram_in_use_cannot_be_closed_until_it_is_removed(memory):
    region = memory.region_at(HIGH)
    with pytest.raises(BufferError):
        region.ram.close()
    memory.remove(region)
    region.ram.close()
    with pytest.raises(StateError, match="closed"):
        memory.add(0x10_0000, region.ram)


def test_close_removes_everything(memory, slots):
    rams = [region.ram for region in memory.regions]
    memory.close()
    memory.close()
    assert slots.now == {}
    assert memory.regions == ()
    for ram in rams:
        ram.close()
    with pytest.raises(GuestMemoryError):
        memory.read(0, 1)
    with pytest.raises(StateError, match="closed"):
        memory.add(0, Ram.anonymous(PAGE))


def test_close_after_the_vm_was_closed(memory, slots):
    slots.refuse = StateError("the VM is closed")
    memory.close()
    assert memory.regions == ()


def test_dropping_the_memory_deletes_its_slots(slots):
    memory = GuestMemory(slots.set_slot)
    memory.add(0, Ram.anonymous(PAGE))
    del memory
    assert slots.now == {}


# -- bytes


def test_accesses_span_adjoining_regions(memory, slots):
    memory.write(2 * PAGE - 3, b"abcdef")
    assert memory.read(2 * PAGE - 4, 8) == b"\0abcdef\0"
    assert slots.writes == [(2 * PAGE - 3, 3), (2 * PAGE, 3)]
    buffer = bytearray(6)
    memory.readinto(2 * PAGE - 3, buffer)
    assert buffer == b"abcdef"
    memory.fill(2 * PAGE - 1, 2, 0x7A)
    assert memory.read(2 * PAGE - 3, 6) == b"abzzef"
    memory.put_u32(2 * PAGE - 2, 0x04030201)
    assert (memory.u32(2 * PAGE - 2), memory.u16(2 * PAGE - 1)) == (0x04030201, 0x0302)


@pytest.mark.parametrize(
    ("gpa", "size", "hole"),
    [(0x4000, 1, 0x4000), (0x3FFF, 2, 0x4000), (0, 0x8001, 0x4000), (0x8000, PAGE + 1, 0x9000),
     (HIGH - 1, 2, HIGH - 1), (HIGH + PAGE - 4, 8, HIGH + PAGE), (1 << 63, 8, 1 << 63)],
)  # fmt: skip
def test_holes_are_refused_with_their_first_address(memory, slots, gpa, size, hole):
    for action in (
        lambda: memory.read(gpa, size),
        lambda: memory.readinto(gpa, bytearray(size)),
        lambda: memory.write(gpa, bytes(size)),
        lambda: memory.write(gpa, memoryview(bytes(size))),
        lambda: memory.fill(gpa, size, 1),
        lambda: memory.view(gpa, size),
        lambda: memory.wrote(gpa, size),
    ):
        with pytest.raises(GuestMemoryError, match=f"at {hole:#_x}") as caught:
            action()
        assert (caught.value.gpa, caught.value.size, caught.value.hole) == (gpa, size, hole)
    assert slots.writes == []


@pytest.mark.parametrize("gpa", [0x4000, (1 << 64) - 4, 1 << 64, -8])
def test_numbers_in_holes_are_refused(memory, gpa):
    with pytest.raises(GuestMemoryError):
        memory.u64(gpa)
    with pytest.raises(GuestMemoryError):
        memory.put_u64(gpa, 0)


@pytest.mark.parametrize("gpa", [(1 << 64) - 1, 1 << 64, 1 << 70, -1])
def test_sums_that_wrap_are_refused(memory, gpa):
    for size in (1, 2, 1 << 63, (1 << 64) - 1):
        with pytest.raises(GuestMemoryError):
            memory.read(gpa, size)
        with pytest.raises(GuestMemoryError):
            memory.fill(gpa, size)


def test_a_failed_write_writes_nothing(memory):
    with pytest.raises(GuestMemoryError):
        memory.write(0x3FFE, b"abcd")
    with pytest.raises(GuestMemoryError):
        memory.fill(0, 0x4001, 0xFF)
    assert memory.read(0, 0x4000) == bytes(0x4000)


def test_a_failed_readinto_leaves_the_buffer(memory):
    buffer = bytearray(b"untouched")
    with pytest.raises(GuestMemoryError):
        memory.readinto(0x3FFE, buffer)
    assert buffer == b"untouched"


def test_read_only_memory_can_be_read_only(memory):
    assert memory.read(0x8000, 4) == b"ROM!"
    for action in (
        lambda: memory.write(0x8001, b"x"), lambda: memory.put_u8(0x8001, 1), lambda: memory.fill(0x8001, 2),
    ):  # fmt: skip
        with pytest.raises(GuestMemoryError, match="bios is read-only at 0x8001"):
            action()
    assert memory.view(0x8000, 4).readonly
    assert memory.read(0x8000, 4) == b"ROM!"


def test_nothing_is_nowhere(memory, slots):
    assert memory.read(0, 0) == b""
    memory.write(0x4000, b"")
    memory.fill(0x4000, 0)
    assert bytes(memory.view(0, 0)) == b""
    assert slots.writes == []
    for action in (lambda: memory.read(0, -1), lambda: memory.fill(0, -1), lambda: memory.view(0, -1)):
        with pytest.raises(ValueError, match="not be negative"):
            action()


def test_any_buffer_can_be_written(memory):
    numpy = pytest.importorskip("numpy")
    memory.write(0, numpy.arange(3, dtype="<u2"))
    memory.write(6, bytearray(b"xy"))
    memory.write(8, memoryview(b"abcdef")[::2])
    assert memory.read(0, 11) == b"\0\0\1\0\2\0xyace"


def test_numbers(memory, slots):
    memory.put_u8(8, 0x11)
    memory.put_u16(10, 0x2222)
    memory.put_u32(12, 0x33333333)
    memory.put_u64(16, 0x4444444444444444)
    assert memory.read(8, 16) == b"\x11\0" + b"\x22" * 2 + b"\x33" * 4 + b"\x44" * 8
    assert (memory.u8(8), memory.u16(10), memory.u32(12), memory.u64(16)) == (
        0x11, 0x2222, 0x33333333, 0x4444444444444444,
    )  # fmt: skip
    assert slots.writes == [(8, 1), (10, 2), (12, 4), (16, 8)]
    with pytest.raises(OverflowError):
        memory.put_u16(0, 0x10000)
    with pytest.raises(OverflowError):
        memory.put_u16(2 * PAGE - 1, 0x10000)
    with pytest.raises(OverflowError):
        memory.put_u8(0, -1)


# -- views


def test_a_view_is_the_memory(memory):
    view = memory.view(0x1000, 16)
    view[2:5] = b"abc"
    assert memory.read(0x1001, 5) == b"\0abc\0"
    memory.write(0x1000, b"z")
    assert view[0] == ord("z")


def test_a_view_lies_in_one_region(memory):
    with pytest.raises(GuestMemoryError, match="spans regions: middle begins at 0x2000"):
        memory.view(0x1FFF, 2)


def test_a_view_outlives_its_region_but_keeps_the_memory(memory):
    region = memory.region_at(HIGH)
    view = memory.view(HIGH, 4)
    memory.remove(region)
    view[:] = b"safe"
    with pytest.raises(BufferError):
        region.ram.close()
    view.release()
    region.ram.close()


def test_numpy_over_a_view(memory):
    numpy = pytest.importorskip("numpy")
    table = numpy.frombuffer(memory.view(0, PAGE), dtype="<u8")
    table[:] = numpy.arange(512) * 0x20_0000 | 0x83
    assert memory.u64(8 * 3) == 0x60_0083


def test_writes_through_a_view_can_be_announced(memory, slots):
    memory.view(0x1FFE, 2)[:] = b"ab"
    memory.wrote(0x1FFE, 4)
    assert slots.writes == [(0x1FFE, 2), (0x2000, 2)]


# -- looking


def test_find_across_regions_and_around_holes(memory):
    memory.write(0x10, b"needle")
    memory.write(0x1FFD, b"needle")       # across low and middle
    memory.write(0x3FFA, b"needle")       # ends at the hole
    memory.write(HIGH, b"needleneedle")
    memory.write(0x3FFD - 0x1000, b"needl")  # not whole
    everywhere = [0x10, 0x1FFD, 0x3FFA, HIGH, HIGH + 6]
    assert list(memory.find_all(b"needle")) == everywhere
    assert memory.find(b"needle", 0x11) == 0x1FFD
    assert memory.find(b"needle", 0x1FFE) == 0x3FFA
    assert memory.find(b"needle", 0x1FFD, 0x2002) is None
    assert memory.find(b"needle", 0x1FFD, 0x2003) == 0x1FFD
    assert memory.find(b"absent") is None
    with pytest.raises(ValueError, match="nothing"):
        memory.find(b"")


def test_find_does_not_join_bytes_around_a_hole(memory):
    memory.write(0x3FFD, b"abc")
    memory.remove(memory.region_at(0x8000))
    memory.add(0x5000, Ram.from_bytes(b"def"))
    assert memory.find(b"abcdef") is None
    assert memory.find(b"def") == 0x5000


def test_find_overlapping_and_one_byte_needles(memory):
    memory.write(0x1FFE, b"aaaa")
    assert list(memory.find_all(b"aa")) == [0x1FFE, 0x1FFF, 0x2000]
    assert list(memory.find_all(b"a")) == [0x1FFE, 0x1FFF, 0x2000, 0x2001]


def test_find_a_needle_longer_than_a_region():
    memory = GuestMemory(Slots().set_slot)
    for page in range(4):
        memory.add(page * PAGE, Ram.anonymous(PAGE))
    needle = bytes(i % 251 + 1 for i in range(2 * PAGE + 100))
    memory.write(PAGE - 50, needle)
    assert list(memory.find_all(needle)) == [PAGE - 50]


def test_hexdump(memory):
    memory.write(0x3FF0, b"Hello, \x01world\xff!!")
    assert memory.hexdump(0x3FF0, 24).splitlines() == [
        "0000000000003ff0  48 65 6c 6c 6f 2c 20 01  77 6f 72 6c 64 ff 21 21  |Hello, .world.!!|",
        "0000000000004000  -- -- -- -- -- -- -- --                           |........|",
    ]


def test_hexdump_folds_equal_lines(memory):
    assert memory.hexdump(0, 0x50).splitlines() == [
        "0000000000000000  " + "  ".join(["00 00 00 00 00 00 00 00"] * 2) + "  |................|",
        "*",
        "0000000000000040  " + "  ".join(["00 00 00 00 00 00 00 00"] * 2) + "  |................|",
    ]


# -- threads


def test_readers_never_see_a_half_changed_table(memory):
    """While one thread adds and removes regions, the others go on reading theirs."""
    memory.write(0x1000, b"stays")
    stop = threading.Event()
    wrong = []

    def read():
        while not stop.is_set():
            if memory.read(0x1000, 5) != b"stays" or memory.u8(0x1004) != ord("s"):
                wrong.append("changed")

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for _ in range(300):
        memory.remove(memory.add(0x10_0000, Ram.anonymous(PAGE)))
    stop.set()
    for reader in readers:
        reader.join()
    assert wrong == []


# -- against a model


@pytest.mark.parametrize("seed", range(20))
def test_random_use_agrees_with_a_simple_model(seed):
    """The model is one list of bytes, None in holes; the address space has 16 pages."""
    random = Random(seed)
    slots = Slots()
    memory = GuestMemory(slots.set_slot, slots.wrote)
    memory.start_dirty_log()
    model = [None] * (16 * PAGE)
    dirty = set()
    for _ in range(300):
        gpa, size = random.randrange(16 * PAGE), random.choice([1, 2, 3, 4, 8, 100, PAGE, 3 * PAGE])
        inside = gpa + size <= len(model) and None not in model[gpa : gpa + size]
        match random.choice(["add", "remove", "read", "write", "fill", "number", "find"]):
            case "add":
                first, count = gpa // PAGE, random.randrange(1, 4)
                where = slice(first * PAGE, (first + count) * PAGE)
                free = first + count <= 16 and all(byte is None for byte in model[where])
                if free:
                    memory.add(first * PAGE, Ram.anonymous(count * PAGE), log_dirty=True)
                    model[where] = bytes(count * PAGE)
            case "remove" if memory.regions:
                region = random.choice(memory.regions)
                memory.remove(region)
                model[region.gpa : region.end] = [None] * region.size
                dirty -= set(range(region.gpa, region.end, PAGE))
            case "read" if inside:
                assert memory.read(gpa, size) == bytes(model[gpa : gpa + size])
            case "write" if inside:
                data = random.randbytes(size)
                memory.write(gpa, random.choice([bytes, bytearray, memoryview])(data))
                model[gpa : gpa + size] = data
                dirty |= set(range(gpa // PAGE * PAGE, gpa + size, PAGE))
            case "fill" if inside:
                memory.fill(gpa, size, 0x41)
                model[gpa : gpa + size] = b"\x41" * size
                dirty |= set(range(gpa // PAGE * PAGE, gpa + size, PAGE))
            case "number" if inside and size in (1, 2, 4, 8):
                assert memory.load(gpa, size) == int.from_bytes(bytes(model[gpa : gpa + size]), "little")
                value = random.getrandbits(8 * size)
                memory.store(gpa, size, value)
                model[gpa : gpa + size] = value.to_bytes(size, "little")
                dirty |= set(range(gpa // PAGE * PAGE, gpa + size, PAGE))
            case "find" if inside:
                needle = bytes(model[gpa : gpa + size])
                found = memory.find(needle)
                assert found is not None
                assert found <= gpa
                assert bytes(model[found : found + size]) == needle
            case "read" | "write" | "fill" | "number" if not inside:
                hole = next((a for a in range(gpa, 16 * PAGE) if model[a] is None), 16 * PAGE)
                with pytest.raises(GuestMemoryError) as caught:
                    random.choice([memory.read, memory.fill, memory.wrote])(gpa, size)
                assert caught.value.hole == hole
    assert set(memory.collect_dirty()) == dirty
    for region in memory.regions:
        assert memory.read(region.gpa, region.size) == bytes(model[region.gpa : region.end])
    assert sorted(slots.now) == sorted(region.slot for region in memory.regions)


def test_who_watches_writes():
    assert GuestMemory(lambda *slot: None, print).watcher is print
    assert GuestMemory(lambda *slot: None).watcher is None
