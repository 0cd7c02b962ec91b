# SPDX-License-Identifier: Apache-2.0
"""What backs guest memory."""

import contextlib
import gc
import mmap
import os
import threading
import weakref
from pathlib import Path

import pytest

from kvmpy.errors import StateError
from kvmpy.memory import Ram

PAGE = 4096
MIB2 = 1 << 21


def map_entry(address: int, field: str) -> int:
    """A number of the mapping at `address`, in KiB, from /proc/self/smaps."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if "-" in name and not name.endswith(":"):
            low, high = (int(part, 16) for part in name.split("-"))
            inside = low <= address < high
        elif inside and name == f"{field}:":
            return int(rest.split()[0])
    raise AssertionError(f"no {field} at {address:#x}")


def make(kind: str, tmp_path: Path, size: int = 4 * PAGE) -> Ram:
    if kind == "anonymous":
        return Ram.anonymous(size)
    if kind == "memfd":
        return Ram.memfd(size)
    return Ram.file(tmp_path / "ram", size, create=True, shared=kind == "shared file")


KINDS = ("anonymous", "memfd", "shared file", "private file")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_starts_as_zeros_and_keeps_what_is_written(kind, tmp_path):
    ram = make(kind, tmp_path)
    assert ram.read(0, ram.size) == bytes(4 * PAGE)
    ram.write(PAGE - 1, b"abc")
    assert ram.read(PAGE - 2, 5) == b"\0abc\0"
    ram.fill(0, 2, 0xEE)
    assert bytes(memoryview(ram)[:3]) == b"\xee\xee\0"
    ram.close()


def test_private_file_memory_leaves_the_file_alone(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(b"original".ljust(PAGE, b"\0"))
    with Ram.file(path, shared=False) as ram:
        ram.write(0, b"changed!")
        assert ram.read(0, 8) == b"changed!"
    assert path.read_bytes()[:8] == b"original"


def test_shared_file_memory_reaches_the_file_and_a_second_mapping(tmp_path):
    with Ram.file(tmp_path / "ram", PAGE, create=True) as ram, Ram.file(tmp_path / "ram") as other:
        ram.write(7, b"x")
        assert other.read(7, 1) == b"x"
        ram.sync()
        assert (tmp_path / "ram").read_bytes()[7:8] == b"x"


def test_file_memory_from_an_offset(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"a" * PAGE + b"b" * PAGE)
    with Ram.file(path, offset=PAGE, readonly=True) as ram:
        assert (ram.size, ram.read(0, 2)) == (PAGE, b"bb")
        with pytest.raises(TypeError, match="read-only"):
            ram.write(0, b"x")
        with pytest.raises(TypeError, match="read-only"):
            ram.fill(0, 1)
        with pytest.raises(TypeError, match="read-only"):
            ram.store(0, 4, 1)
        assert memoryview(ram).readonly


def test_file_too_short_says_both_sizes(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(bytes(PAGE))
    with pytest.raises(ValueError, match=r"0x1000 bytes, the memory needs 0x2000"):
        Ram.file(path, 2 * PAGE)


def test_a_copy_on_write_clone_of_a_memfd_sees_old_bytes_and_changes_only_itself():
    with Ram.memfd(2 * PAGE) as parent:
        parent.write(0, b"warm")
        with Ram.from_fd(parent.fd, shared=False) as clone:
            clone.write(0, b"mine")
            assert (parent.read(0, 4), clone.read(0, 4)) == (b"warm", b"mine")


def test_memfd_cannot_be_shortened_under_a_guest():
    with Ram.memfd(2 * PAGE) as ram:
        with pytest.raises(PermissionError):
            os.ftruncate(ram.fd, PAGE)
        with pytest.raises(PermissionError):
            os.ftruncate(ram.fd, 4 * PAGE)


def test_from_bytes_is_rounded_up_to_a_page():
    with Ram.from_bytes(b"rom" * 2000) as ram:
        assert ram.size == 2 * PAGE
        assert ram.read(0, 6000) == b"rom" * 2000
        assert ram.read(6000, 2192) == bytes(2192)
    with pytest.raises(ValueError, match="no bytes"):
        Ram.from_bytes(b"")


@pytest.mark.parametrize("size", [0, -PAGE, 1, PAGE + 1])
def test_sizes_that_are_not_pages_are_refused_with_the_number(size):
    for make_ram in (Ram.anonymous, Ram.memfd):
        with pytest.raises(ValueError, match=f"multiple of 0x1000, not {size:#_x}"):
            make_ram(size)


def test_huge_page_sizes_are_checked():
    with pytest.raises(ValueError, match="multiple of 0x20_0000, not 0x1000"):
        Ram.anonymous(PAGE, huge_pages="2M")
    with pytest.raises(ValueError, match="multiple of 0x4000_0000"):
        Ram.memfd(MIB2, huge_pages="1G")
    with pytest.raises(ValueError, match="'3M'"):
        Ram.anonymous(MIB2, huge_pages="3M")


def huge_pool(shift: int) -> Path:
    return Path(f"/sys/kernel/mm/hugepages/hugepages-{(1 << shift) // 1024}kB")


@pytest.fixture
def huge_2m():
    """One more free 2 MiB page in the pool, if this host lets us."""
    knob = huge_pool(21) / "nr_hugepages"
    try:
        before = knob.read_text()
        knob.write_text(str(int(before) + 1))
    except OSError as error:
        pytest.skip(f"no huge pages here: {error}")
    if int((huge_pool(21) / "free_hugepages").read_text()) < 1:
        knob.write_text(before)
        pytest.skip("the host has no free 2 MiB page")
    yield
    gc.collect()
    knob.write_text(before)


@pytest.mark.parametrize("make_ram", [Ram.anonymous, Ram.memfd])
def test_hugetlb_memory_has_huge_pages(huge_2m, make_ram):
    try:
        ram = make_ram(MIB2, huge_pages="2M")
    except OSError as error:
        pytest.skip(f"somebody else took the page: {error}")
    with ram:
        ram.write(MIB2 - 1, b"x")
        assert (ram.page_size, ram.address % MIB2) == (MIB2, 0)
        assert map_entry(ram.address, "KernelPageSize") == 2048
        ram.discard(0, MIB2)
        assert ram.load(MIB2 - 1, 1) == 0


@pytest.mark.parametrize(("name", "shift"), [("2M", 21), ("1G", 30)])
def test_an_empty_huge_page_pool_is_an_error_at_once(name, shift):
    if not huge_pool(shift).exists():
        pytest.skip(f"the host has no {name} pages")
    more = int((huge_pool(shift) / "free_hugepages").read_text()) + 100
    with pytest.raises(OSError, match="allocate memory"):
        Ram.anonymous(more << shift, huge_pages=name)


def test_transparent_huge_pages_are_asked_for_and_aligned():
    with Ram.anonymous(2 * MIB2, huge_pages="thp") as ram:
        assert ram.address % MIB2 == 0
        flags = next(
            line for line in Path("/proc/self/smaps").read_text().split(f"{ram.address:x}-")[1].splitlines()
            if line.startswith("VmFlags")
        )
        assert " hg" in flags


@pytest.mark.parametrize("kind", KINDS)
def test_discard_gives_zeros_and_only_there(kind, tmp_path):
    ram = make(kind, tmp_path)
    ram.fill(0, ram.size, 0x55)
    ram.discard(PAGE, 2 * PAGE)
    assert ram.read(0, ram.size) == b"\x55" * PAGE + bytes(2 * PAGE) + b"\x55" * PAGE
    ram.close()


def test_discard_of_copied_file_pages_does_not_bring_the_file_back(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"secret".ljust(PAGE, b"!"))
    with Ram.file(path, shared=False) as ram:
        ram.discard(0, PAGE)
        assert ram.read(0, PAGE) == bytes(PAGE)


def test_discard_really_gives_memory_back():
    with Ram.anonymous(64 * PAGE) as ram:
        ram.fill(0, ram.size, 1)
        assert map_entry(ram.address, "Rss") >= 256
        ram.discard(0, ram.size)
        assert map_entry(ram.address, "Rss") == 0


@pytest.mark.parametrize(("offset", "size"), [(1, PAGE), (0, 5), (0, 0), (-PAGE, PAGE), (0, 5 * PAGE)])
def test_discard_of_no_whole_pages_is_refused(offset, size):
    with Ram.anonymous(4 * PAGE) as ram, pytest.raises(ValueError, match="not whole pages"):
        ram.discard(offset, size)


def test_hints_by_name():
    with Ram.anonymous(4 * PAGE) as ram:
        ram.hint("populate")
        assert map_entry(ram.address, "Rss") == 16
        with pytest.raises(ValueError, match="no such advice: 'faster'"):
            ram.hint("faster")


# -- lifetime


def test_close_refuses_while_a_view_exists_and_then_works():
    ram = Ram.memfd(PAGE)
    view = memoryview(ram)[4:8]
    with pytest.raises(BufferError, match=r"1 view\(s\)"):
        ram.close()
    view[0] = 7
    assert ram.read(4, 1) == b"\x07"
    view.release()
    fd = ram.fd
    ram.close()
    ram.close()
    assert ram.closed
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_close_refuses_during_copies_of_other_threads():
    ram = Ram.anonymous(1 << 20)
    started, ended = threading.Event(), []

    def copy():
        with contextlib.suppress(StateError):  # close() found a gap between two copies
            for _ in range(50):
                assert ram.read(0, 1 << 20) == bytes(1 << 20)
                started.set()
        ended.append(True)

    threads = [threading.Thread(target=copy) for _ in range(2)]
    for thread in threads:
        thread.start()
    started.wait(20)
    for _ in range(1000):
        with contextlib.suppress(BufferError):
            ram.close()
    for thread in threads:
        thread.join()
    assert ended == [True, True]
    ram.close()
    assert ram.closed


def test_a_view_keeps_the_mapping_when_the_ram_object_is_gone():
    ram = Ram.anonymous(PAGE)
    view = memoryview(ram)
    alive = weakref.ref(ram)
    del ram
    assert alive() is not None
    view[:3] = b"abc"
    assert bytes(view[:3]) == b"abc"
    view.release()
    assert alive() is None


def test_numpy_sees_the_same_bytes_and_keeps_them_mapped():
    numpy = pytest.importorskip("numpy")
    ram = Ram.anonymous(PAGE)
    array = numpy.frombuffer(ram, dtype="<u4")
    array[3] = 0x01020304
    assert ram.load(12, 4) == 0x01020304
    with pytest.raises(BufferError):
        ram.close()
    del array
    ram.close()


def test_a_closed_ram_says_so():
    ram = Ram.anonymous(PAGE)
    ram.close()
    for action in (
        lambda: ram.read(0, 1), lambda: ram.write(0, b"x"), lambda: ram.fill(0, 1), lambda: ram.address,
        lambda: ram.load(0, 1), lambda: ram.store(0, 1, 1), lambda: ram.find(b"x", 0, 0),
        lambda: memoryview(ram),
    ):  # fmt: skip
        with pytest.raises(StateError, match="closed"):
            action()


def test_dropping_a_ram_unmaps_it():
    ram = Ram.anonymous(PAGE)
    address = ram.address
    del ram
    assert f"{address:x}-" not in Path("/proc/self/maps").read_text().replace("\n", " ")


def held() -> tuple[int, int]:
    """How many mappings and descriptors this process has."""
    return Path("/proc/self/maps").read_text().count("\n"), sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_a_failed_mapping_leaves_nothing_behind(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(bytes(PAGE))
    fd = os.open(path, os.O_WRONLY)
    before = held()
    with pytest.raises(PermissionError):
        Ram.from_fd(fd)
    assert held() == before
    os.close(fd)


# -- bounds


@pytest.mark.parametrize(
    ("offset", "size"), [(0, PAGE + 1), (PAGE, 1), (PAGE + 1, 0), (1 << 63, 1), (1, (1 << 64) - 1)]
)
def test_access_outside_is_refused(offset, size):
    with Ram.anonymous(PAGE) as ram:
        with pytest.raises(IndexError, match="outside memory of 0x1000 bytes"):
            ram.read(offset, size)
        with pytest.raises(IndexError):
            ram.fill(offset, size)


def test_copies_between_overlapping_views_of_itself():
    with Ram.anonymous(PAGE) as ram:
        ram.write(0, b"0123456789")
        with memoryview(ram) as view:
            ram.write(2, view[0:8])
        assert ram.read(0, 10) == b"0101234567"


def test_long_copies_are_right():
    data = os.urandom(1 << 20)
    with Ram.anonymous(1 << 20) as ram:
        ram.write(0, data)
        assert ram.read(0, 1 << 20) == data
        copy = bytearray((1 << 20) - 5)
        ram.readinto(5, copy)
        assert copy == data[5:]


@pytest.mark.parametrize("size", range(1, 9))
def test_numbers_are_little_endian_at_any_alignment(size):
    value = int.from_bytes(bytes(range(1, size + 1)), "little")
    with Ram.anonymous(PAGE) as ram:
        for offset in (0, 1, 8, 13):
            ram.fill(0, 64, 0xAA)
            ram.store(offset, size, value)
            assert ram.load(offset, size) == value
            assert ram.read(offset, size + 1) == bytes(range(1, size + 1)) + b"\xaa"


def test_numbers_that_do_not_fit_are_refused():
    with Ram.anonymous(PAGE) as ram:
        for size, value in ((1, 256), (4, 1 << 32), (8, 1 << 64), (2, -1)):
            with pytest.raises(OverflowError):
                ram.store(0, size, value)
        for size in (0, 9):
            with pytest.raises(ValueError, match="1 to 8 bytes"):
                ram.load(0, size)
            with pytest.raises(ValueError, match="1 to 8 bytes"):
                ram.store(0, size, 0)


def test_find_is_bounded_on_both_sides():
    with Ram.anonymous(PAGE) as ram:
        ram.write(100, b"needle")
        assert ram.find(b"needle", 0, PAGE) == 100
        assert ram.find(b"needle", 100, 106) == 100
        assert ram.find(b"needle", 101, PAGE) == -1
        assert ram.find(b"needle", 0, 105) == -1
        with pytest.raises(IndexError):
            ram.find(b"x", 0, PAGE + 1)


def test_madvise_numbers_are_those_of_the_mmap_module():
    with Ram.anonymous(PAGE) as ram:
        ram.write(0, b"x")
        ram.advise(mmap.MADV_DONTNEED)
        assert ram.read(0, 1) == b"\0"
        with pytest.raises(OSError, match="Invalid argument"):
            ram.advise(9999)
