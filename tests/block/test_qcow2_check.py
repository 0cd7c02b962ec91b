# SPDX-License-Identifier: Apache-2.0
"""Damage done on purpose: what check says, what repair saves, what an open image refuses."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from block_judges import Driver, Qemu

from kvmpy.block import Qcow2Disk, create_disk, open_disk
from kvmpy.block.hostfile import HostFile
from kvmpy.block.qcow2 import CheckResult, Header, check
from kvmpy.errors import ImageError

SIZE = 4 << 20
CLUSTER = 65536


@pytest.fixture
def image(tmp_path: Path, driver: type[Driver]) -> tuple[Path, Driver]:
    path = tmp_path / "disk.qcow2"
    create_disk(path, "qcow2", SIZE)
    drive = driver(2, SIZE)
    with open_disk(path, "qcow2") as disk:
        drive.run(disk, 60)
        assert isinstance(disk, Qcow2Disk)
        disk.snapshots.create("one")
        drive.run(disk, 30)
    return path, drive


def header(path: Path) -> Header:
    with HostFile.open(path, readonly=True) as file:
        return Header.parse(file)


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def u64(path: Path, offset: int) -> int:
    with path.open("rb") as file:
        file.seek(offset)
        return int(struct.unpack(">Q", file.read(8))[0])


def checked(path: Path, repair: str | None = None) -> CheckResult:
    with HostFile.open(path, readonly=repair is None) as file:
        return check(file, repair=repair)


def refblock(path: Path) -> int:
    return u64(path, header(path).refcount_table_offset)


def test_sound_image_is_clean_and_numbers_are_qemus(qemu: Qemu, image: tuple[Path, Driver]) -> None:
    path, _ = image
    ours, theirs = checked(path), qemu.check(path)
    assert ours.clean and ours.messages == []
    assert ours.total_clusters == theirs["total-clusters"]
    assert ours.allocated_clusters == theirs["allocated-clusters"]
    assert ours.image_end_offset == theirs["image-end-offset"]


def test_leaks_are_found_and_repaired(qemu: Qemu, image: tuple[Path, Driver]) -> None:
    path, drive = image
    end = path.stat().st_size // CLUSTER
    os.truncate(path, (end + 3) * CLUSTER)
    patch(path, refblock(path) + end * 2, struct.pack(">3H", 1, 2, 1))
    found = checked(path)
    assert (found.leaks, found.corruptions) == (3, 0)
    fixed = checked(path, "leaks")
    assert fixed.clean and fixed.leaks_fixed == 3
    qemu.check(path)
    qemu.same(path, drive.expected)


def test_zeroed_refcounts_are_errors_and_repaired(qemu: Qemu, image: tuple[Path, Driver]) -> None:
    path, drive = image
    patch(path, refblock(path), bytes(40))
    assert checked(path).corruptions >= 20
    assert not checked(path, "leaks").clean
    fixed = checked(path, "all")
    assert fixed.clean and fixed.corruptions_fixed >= 20
    qemu.check(path)
    qemu.same(path, drive.expected)


@pytest.mark.parametrize("entry", [0, 0x1234, 1 << 50, CLUSTER, 0x1FF], ids=hex)
def test_broken_refcount_table_is_rebuilt(qemu: Qemu, image: tuple[Path, Driver], entry: int) -> None:
    path, drive = image
    patch(path, header(path).refcount_table_offset, struct.pack(">Q", entry))
    assert not checked(path).clean
    assert checked(path, "all").clean
    qemu.check(path)
    qemu.same(path, drive.expected)
    with open_disk(path, "qcow2") as disk:
        drive.run(disk, 40)
        drive.verify(disk)
    qemu.check(path)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 32, 64])
def test_rebuild_packs_every_width(qemu: Qemu, tmp_path: Path, driver: type[Driver], bits: int) -> None:
    path = tmp_path / "disk.qcow2"
    create_disk(path, "qcow2", SIZE, refcount_bits=bits, cluster_size=4096)
    drive = driver(bits, SIZE)
    with open_disk(path, "qcow2") as disk:
        drive.run(disk, 40)
    patch(path, header(path).refcount_table_offset, struct.pack(">Q", 0x1200))
    assert checked(path, "all").clean
    qemu.check(path)
    qemu.same(path, drive.expected)


def test_entries_to_nowhere_are_cleared(qemu: Qemu, image: tuple[Path, Driver]) -> None:
    path, _ = image
    l2 = u64(path, header(path).l1_table_offset) & ~(1 << 63)
    for i, entry in enumerate([1 << 40 | 1 << 63, 0x1200, 1 << 62 | (1 << 54) - 1]):
        patch(path, l2 + i * 8, struct.pack(">Q", entry))
    found = checked(path)
    assert found.corruptions >= 3
    assert checked(path, "all").clean
    qemu.check(path)
    with open_disk(path, "qcow2", readonly=True) as disk:
        assert disk.pread(0, 3 * CLUSTER) == bytes(3 * CLUSTER)


@pytest.mark.parametrize("entry", [0x1200, 1 << 50], ids=["unaligned", "beyond the end"])
def test_l1_entry_to_nowhere(qemu: Qemu, image: tuple[Path, Driver], entry: int) -> None:
    path, _ = image
    patch(path, header(path).l1_table_offset, struct.pack(">Q", entry))
    with (
        open_disk(path, "qcow2", readonly=True) as disk,
        pytest.raises(ImageError, match=r"L2 table|metadata table"),
    ):
        disk.pread(0, 1)
    assert checked(path).corruptions
    assert checked(path, "all").clean
    qemu.check(path)


def test_damage_met_while_writing_marks_the_image_corrupt(qemu: Qemu, image: tuple[Path, Driver]) -> None:
    path, _ = image
    l2 = u64(path, header(path).l1_table_offset) & ~(1 << 63)
    patch(path, l2, struct.pack(">Q", header(path).l1_table_offset | 1 << 63))  # the guest's data is our L1 table
    disk = open_disk(path, "qcow2")
    with pytest.raises(ImageError, match="metadata"):
        disk.pwrite(0, b"guest writes its own L1")
    with pytest.raises(OSError):
        disk.pwrite(2 * CLUSTER, b"no more")
    disk.close()
    assert header(path).incompatible & 2
    with pytest.raises(ImageError, match="marked corrupt"):
        open_disk(path, "qcow2")
    open_disk(path, "qcow2", readonly=True).close()
    assert checked(path, "all").clean
    qemu.check(path)
    open_disk(path, "qcow2").close()


def test_metadata_counted_as_free_is_not_given_to_the_guest(image: tuple[Path, Driver]) -> None:
    path, _ = image
    table = header(path).l1_table_offset
    patch(path, refblock(path) + table // CLUSTER * 2, struct.pack(">H", 0))
    with open_disk(path, "qcow2") as disk:
        disk.discard(0, SIZE)
        with pytest.raises((ImageError, OSError)):
            for at in range(0, SIZE, CLUSTER):
                disk.pwrite(at, b"x" * CLUSTER)
    assert header(path).incompatible & 2


def test_lazy_refcounts_dirty_bit_and_repair_on_open(qemu: Qemu, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create_disk(path, "qcow2", SIZE, lazy_refcounts=True)
    disk = open_disk(path, "qcow2")
    disk.pwrite(0, b"lazy" * 50_000)
    disk.flush()
    assert header_unlocked(path).incompatible & 1
    copy = tmp_path / "crashed.qcow2"
    copy.write_bytes(path.read_bytes())
    disk.close()
    assert not header(path).incompatible & 1
    qemu.check(path)
    with open_disk(copy, "qcow2", readonly=True) as disk:  # reading repairs nothing
        assert disk.pread(0, 200_000) == b"lazy" * 50_000
    assert header(copy).incompatible & 1
    with open_disk(copy, "qcow2") as disk:
        assert disk.pread(0, 200_000) == b"lazy" * 50_000
        disk.pwrite(300_000, b"x")
    qemu.check(copy)
    assert not header(copy).incompatible & 1


def header_unlocked(path: Path) -> Header:
    with HostFile.open(path, readonly=True, lock=False) as file:
        return Header.parse(file)


def test_bitmaps_lose_their_mark_but_not_their_extension(qemu: Qemu, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu.img("create", "-q", "-f", "qcow2", path, "4M")
    qemu.img("bitmap", "--add", path, "changes")
    qemu.io(path, "write 0 1M")
    assert checked(path).clean
    assert header(path).autoclear & 1
    with open_disk(path, "qcow2") as disk:
        disk.pwrite(0, b"x")
    assert not header(path).autoclear & 1  # what we changed is not in the bitmap
    assert header(path).extension(0x23852875) is not None


def test_rewriting_the_header_keeps_all_of_it(qemu: Qemu, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu.img("create", "-q", "-f", "qcow2", "-o", "compression_type=zstd,lazy_refcounts=on", path, "4M")
    before = header(path)
    with open_disk(path, "qcow2") as disk:
        assert isinstance(disk, Qcow2Disk)
        disk.set_backing("base.raw", "raw")
    after = header(path)
    assert (after.compression_type, after.compatible, after.incompatible) == (1, 1, before.incompatible)
    assert (after.backing_file, after.backing_format) == ("base.raw", "raw")
    assert [kind for kind, _ in before.extensions if kind != 0xE2792ACA] == [
        kind for kind, _ in after.extensions if kind != 0xE2792ACA
    ]
