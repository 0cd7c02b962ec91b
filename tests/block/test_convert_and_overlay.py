# SPDX-License-Identifier: Apache-2.0
"""Copies between formats, throw-away layers, and many threads on one disk."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest
from block_judges import Driver, Qemu

from kvmpy.block import Follow, Qcow2Disk, as_core, convert, create_disk, open_disk, open_overlay
from kvmpy.block.disk import PythonDisk
from kvmpy.errors import StateError

SIZE = 5 * 1024 * 1024 + 3 * 512


@pytest.mark.parametrize("target", ["raw", "qcow2", "vdi", "vmdk"])
@pytest.mark.parametrize("source", ["raw", "qcow2", "vdi", "vmdk"])
def test_convert_between_all_formats(
    qemu: Qemu, tmp_path: Path, driver: type[Driver], source: str, target: str
) -> None:
    drive = driver(1, SIZE)
    create_disk(tmp_path / "a", source, SIZE)
    create_disk(tmp_path / "b", target, SIZE)
    with open_disk(tmp_path / "a", source) as one:
        drive.run(one, 40)
    with open_disk(tmp_path / "a", source, readonly=True) as one, open_disk(tmp_path / "b", target) as two:
        convert(one, two, target_is_zero=True)
        drive.verify(two)
    qemu.same(tmp_path / "b", drive.expected, target)


def test_convert_keeps_holes(tmp_path: Path) -> None:
    create_disk(tmp_path / "a", "raw", 64 << 20)
    with open_disk(tmp_path / "a", "raw") as one:
        one.pwrite(10 << 20, b"x" * 100_000)
        one.pwrite(20 << 20, bytes(10 << 20))  # zeroes that are stored
    for format in ("raw", "qcow2"):
        create_disk(tmp_path / format, format, 64 << 20)
        with (
            open_disk(tmp_path / "a", "raw", readonly=True) as one,
            open_disk(tmp_path / format, format) as two,
        ):
            convert(one, two, target_is_zero=True)
        assert (tmp_path / format).stat().st_blocks * 512 < 1 << 20


def test_convert_onto_old_content_leaves_none_of_it(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a" * 1_000_000 + bytes(2_000_000))
    (tmp_path / "b").write_bytes(b"old" * 1_500_000)
    with open_disk(tmp_path / "a", "raw", readonly=True) as one, open_disk(tmp_path / "b", "raw") as two:
        convert(one, two)
    assert (tmp_path / "b").read_bytes() == b"a" * 1_000_000 + bytes(3_500_000)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression_type": "zstd"},
        {"cluster_size": 4096},
        {"cluster_size": 2 << 20},
        {"refcount_bits": 1},
    ],
)
def test_compressed_copy(qemu: Qemu, tmp_path: Path, driver: type[Driver], options: dict[str, object]) -> None:
    if "compression_type" in options:
        pytest.importorskip("zstandard")
    drive = driver(2, SIZE)
    create_disk(tmp_path / "a", "raw", SIZE)
    with open_disk(tmp_path / "a", "raw") as one:
        for at in range(0, SIZE, 200_000):
            one.pwrite(at, b"text text " * min(9_000, (SIZE - at) // 10))
        drive.expected[:] = one.pread(0, SIZE)
        drive.run(one, 10)
    path = tmp_path / "b.qcow2"
    create_disk(path, "qcow2", SIZE, **options)
    with open_disk(tmp_path / "a", "raw", readonly=True) as one, open_disk(path, "qcow2") as two:
        convert(one, two, compress=True, target_is_zero=True)
        drive.verify(two)
        drive.run(two, 60)  # compressed clusters are written over
        drive.verify(two)
    qemu.check(path)
    qemu.same(path, drive.expected)


def test_convert_reports_progress_and_refuses_what_does_not_fit(tmp_path: Path) -> None:
    create_disk(tmp_path / "a", "raw", 8 << 20)
    (tmp_path / "a").write_bytes(b"x" * (8 << 20))
    create_disk(tmp_path / "b", "raw", 9 << 20)
    create_disk(tmp_path / "c", "raw", 1 << 20)
    seen: list[tuple[int, int]] = []
    with open_disk(tmp_path / "a", "raw", readonly=True) as one, open_disk(tmp_path / "b", "raw") as two:
        convert(one, two, progress=lambda done, size: seen.append((done, size)))
        with pytest.raises(ValueError, match="compressed"):
            convert(one, two, compress=True)
    assert seen == sorted(seen) and seen[-1] == (9 << 20, 9 << 20)
    with (
        open_disk(tmp_path / "a", "raw", readonly=True) as one,
        open_disk(tmp_path / "c", "raw") as two,
        pytest.raises(ValueError, match="the source"),
    ):
        convert(one, two)


@pytest.mark.parametrize("in_file", [False, True])
def test_overlay_keeps_the_base_as_it_is(tmp_path: Path, driver: type[Driver], in_file: bool) -> None:
    content = random.Random(1).randbytes(SIZE + 77)  # not whole sectors
    (tmp_path / "base").write_bytes(content)
    drive = driver(4, len(content), content)
    base = open_disk(tmp_path / "base", "raw", readonly=True)
    with open_overlay(base, tmp_path if in_file else None) as disk:
        drive.run(disk, 100)
        drive.verify(disk)
        assert not disk.readonly
    assert base.closed  # type: ignore[attr-defined]
    assert (tmp_path / "base").read_bytes() == content
    assert [one.name for one in tmp_path.iterdir()] == ["base"]


class SlowMemory(PythonDisk):
    """A disk in Python, to stand below C ones."""

    def __init__(self, content: bytes) -> None:
        super().__init__(len(content), readonly=False)
        self.content = bytearray(content)
        self.fail = False

    def _read(self, offset: int, out: memoryview) -> None:
        if self.fail:
            raise OSError(5, "the medium is gone")
        out[:] = self.content[offset : offset + len(out)]

    def _write(self, offset: int, data: memoryview) -> None:
        self.content[offset : offset + len(data)] = data

    def _flush(self) -> None:
        pass

    def _close(self) -> None:
        pass


def test_python_disk_below_a_c_disk() -> None:
    below = SlowMemory(b"python" * 100_000)
    with open_overlay(below) as disk:
        disk.pwrite(100, b"C")
        assert disk.pread(96, 8) == b"pythCnpy"
        below.fail = True
        with pytest.raises(OSError) as caught:
            disk.pread(500_000, 10)
        assert caught.value.errno == 5
        with pytest.raises(OSError):
            disk.pwrite(500_000, b"needs the old data around it")
        below.fail = False
        disk.pwrite(500_000, b"now")
        assert disk.pread(500_000, 3) == b"now"
        core = as_core(below)
        below.fail = True
        with pytest.raises(OSError, match="the medium is gone"):
            core.pread(0, 10)
        below.fail = False
    core = as_core(SlowMemory(bytes(1000)))
    core.pwrite(10, b"through C and back")
    assert core.pread(10, 7) == b"through"
    assert as_core(core) is core


@pytest.mark.parametrize(
    "options",
    [{}, {"cluster_size": 4096, "refcount_bits": 8}, {"extended_l2": True}, {"lazy_refcounts": True}],
)
@pytest.mark.parametrize("with_backing", [False, True])
def test_threads_on_one_image(qemu: Qemu, tmp_path: Path, options: dict[str, object], with_backing: bool) -> None:
    """Each thread owns every fourth KiB, so clusters are shared, allocated and copied by several at once."""
    size, unit, workers = 4 << 20, 1024, 4
    base = random.Random(0).randbytes(size) if with_backing else bytes(size)
    (tmp_path / "base").write_bytes(base)
    named = {"backing_file": "base", "backing_fmt": "raw"} if with_backing else {}
    path = tmp_path / "disk.qcow2"
    create_disk(path, "qcow2", size, **options, **named)
    expected = bytearray(base)
    failures: list[BaseException] = []

    def work(me: int) -> None:
        rnd = random.Random(me)
        try:
            for step in range(400):
                at = (rnd.randrange(size // unit // workers) * workers + me) * unit
                if rnd.random() < 0.6:
                    data = rnd.randbytes(unit)
                    disk.pwrite(at, data)
                    expected[at : at + unit] = data
                else:
                    assert disk.pread(at, unit) == expected[at : at + unit]
                if step % 50 == 49:
                    disk.flush()
        except BaseException as error:
            failures.append(error)

    with open_disk(path, "qcow2", follow=Follow(tmp_path), unsafe=True) as disk:
        threads = [threading.Thread(target=work, args=(me,)) for me in range(workers)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        assert not failures
        assert disk.pread(0, size) == expected
    qemu.check(path)
    qemu.same(path, expected)


def test_threads_with_discards_and_snapshots_never_mix_clusters(qemu: Qemu, tmp_path: Path) -> None:
    """Each thread has its own region and fills it with its own byte: nobody may ever read another's."""
    size, workers = 8 << 20, 4
    path = tmp_path / "disk.qcow2"
    create_disk(path, "qcow2", size, cluster_size=16384)
    failures: list[BaseException] = []
    region = size // workers

    def work(me: int) -> None:
        rnd = random.Random(me)
        allowed = {0, me + 1}
        try:
            for _ in range(300):
                at = me * region + rnd.randrange(region)
                n = min(rnd.randrange(1, 100_000), (me + 1) * region - at)
                kind = rnd.random()
                if kind < 0.5:
                    disk.pwrite(at, bytes([me + 1]) * n)
                elif kind < 0.65:
                    disk.discard(at, n)
                elif kind < 0.75:
                    disk.write_zeroes(at, n)
                elif kind < 0.8:
                    disk.flush()
                elif kind < 0.82 and me == 0:
                    for one in list(disk.snapshots):
                        disk.snapshots.delete(one.id)
                    disk.snapshots.create("now")
                else:
                    assert set(disk.pread(at, n)) <= allowed
        except BaseException as error:
            failures.append(error)

    disk = open_disk(path, "qcow2", unsafe=True)
    assert isinstance(disk, Qcow2Disk)
    with disk:
        threads = [threading.Thread(target=work, args=(me,)) for me in range(workers)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        assert not failures
        content = disk.pread(0, size)
    for me in range(workers):
        assert set(content[me * region : (me + 1) * region]) <= {0, me + 1}
    qemu.check(path)
    qemu.same(path, content)


def test_close_while_in_use_is_refused(tmp_path: Path) -> None:
    below = SlowMemory(bytes(1 << 20))
    entered, leave = threading.Event(), threading.Event()
    read = below._read

    def slow(offset: int, out: memoryview) -> None:
        entered.set()
        leave.wait(60)
        read(offset, out)

    below._read = slow  # type: ignore[method-assign]
    disk = open_overlay(below)
    reader = threading.Thread(target=disk.pread, args=(0, 10))
    reader.start()
    entered.wait(60)
    with pytest.raises(StateError, match="in use"):
        disk.close()
    leave.set()
    reader.join()
    disk.close()
