# SPDX-License-Identifier: Apache-2.0
"""Internal snapshots, ours and QEMU's, on each other's images."""

from __future__ import annotations

from pathlib import Path

import pytest
from block_judges import Driver, Qemu

from kvmpy.block import Qcow2Disk, create_disk, open_disk
from kvmpy.errors import ImageError

SIZE = 4 << 20

VARIANTS = {
    "v3": {},
    "v2": {"compat": "0.10"},
    "small clusters": {"cluster_size": 1024},
    "extended L2": {"extended_l2": True},
}


def opened(path: Path, readonly: bool = False) -> Qcow2Disk:
    disk = open_disk(path, "qcow2", readonly=readonly)
    assert isinstance(disk, Qcow2Disk)
    return disk


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_create_apply_delete_in_random_order(
    qemu: Qemu, tmp_path: Path, driver: type[Driver], options: dict[str, object]
) -> None:
    path = tmp_path / "disk.qcow2"
    create_disk(path, "qcow2", SIZE, **options)
    drive = driver(1, SIZE)
    kept: dict[str, bytes] = {}
    disk = opened(path)
    for step in range(24):
        drive.run(disk, 12)
        name = drive.random.choice([*kept, None])
        if name is None or len(kept) < 2:
            disk.snapshots.create(f"s{step}")
            kept[f"s{step}"] = bytes(drive.expected)
        elif drive.random.random() < 0.5:
            disk.snapshots.apply(name)
            drive.expected[:] = kept[name]
        else:
            disk.snapshots.delete(name)
            del kept[name]
        drive.verify(disk)
        if step % 6 == 5:
            disk.close()
            qemu.check(path)
            disk = opened(path)
            assert [one.name for one in disk.snapshots] == list(kept)
    disk.close()
    qemu.check(path)
    for name, content in kept.items():
        with opened(path, readonly=True) as look:
            look.view_snapshot(name)
            assert look.pread(0, SIZE) == content
        qemu.img("convert", "-f", "qcow2", "-O", "raw", "-l", name, path, "snapshot.raw")
        assert (tmp_path / "snapshot.raw").read_bytes() == content
    with opened(path) as disk:
        for name in kept:
            disk.snapshots.delete(name)
        drive.verify(disk)
    qemu.check(path)
    qemu.same(path, drive.expected)


def test_qemu_applies_ours_and_we_apply_qemus(qemu: Qemu, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create_disk(path, "qcow2", SIZE)
    with opened(path) as disk:
        disk.pwrite(0, b"1" * 200_000)
        made = disk.snapshots.create("ours", when_ns=1_700_000_000_123_456_789)
        disk.pwrite(100_000, b"2" * 200_000)
    assert (made.date_sec, made.date_nsec) == (1_700_000_000, 123_456_789)
    qemu.img("snapshot", "-c", "theirs", path)
    qemu.io(path, "write -P 0x33 0 1M")
    qemu.check(path)
    with opened(path) as disk:
        assert [one.name for one in disk.snapshots] == ["ours", "theirs"]
        disk.snapshots.apply("theirs")
        assert disk.pread(0, 400_000) == (b"1" * 100_000 + b"2" * 200_000).ljust(400_000, b"\0")
    qemu.check(path)
    qemu.img("snapshot", "-a", "ours", path)
    qemu.check(path)
    with opened(path) as disk:
        assert disk.pread(0, 400_000) == (b"1" * 200_000).ljust(400_000, b"\0")
        disk.snapshots.delete("ours")
        disk.snapshots.delete("theirs")
        assert len(disk.snapshots) == 0
    qemu.check(path)


def test_apply_restores_another_size(qemu: Qemu, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create_disk(path, "qcow2", SIZE, cluster_size=512)
    with opened(path) as disk:
        disk.pwrite(SIZE - 3, b"end")
        disk.snapshots.create("small")
        disk.resize(3 * SIZE)
        disk.pwrite(2 * SIZE, b"more")
        disk.snapshots.create("large")
        disk.snapshots.apply("small")
        assert (disk.size, disk.pread(SIZE - 3, 3)) == (SIZE, b"end")
        disk.snapshots.apply("large")
        assert (disk.size, disk.pread(2 * SIZE, 4)) == (3 * SIZE, b"more")
    qemu.check(path)


def test_refcounts_too_narrow_leave_the_image_as_it_was(qemu: Qemu, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create_disk(path, "qcow2", SIZE, refcount_bits=1)
    with opened(path) as disk:
        disk.pwrite(0, b"x" * 300_000)
        with pytest.raises(ImageError, match="too narrow"):
            disk.snapshots.create("no")
        assert len(disk.snapshots) == 0
        disk.pwrite(0, b"y" * 300_000)
    qemu.check(path)


def test_unknown_and_double_names_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create_disk(path, "qcow2", SIZE)
    with opened(path) as disk:
        disk.snapshots.create("one")
        with pytest.raises(ValueError, match="exists"):
            disk.snapshots.create("one")
        with pytest.raises(KeyError, match="no snapshot"):
            disk.snapshots.apply("two")
    with opened(path, readonly=True) as disk, pytest.raises(PermissionError):
        disk.snapshots.create("two")
    with opened(path) as disk, pytest.raises(ValueError, match="present content"):
        disk.view_snapshot("one")


def test_compressed_clusters_survive_snapshots(qemu: Qemu, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create_disk(path, "qcow2", SIZE)
    with opened(path) as disk:
        for at in range(0, SIZE, 65536):
            disk.write_compressed(at, bytes([at >> 16]) * 65536)
        disk.snapshots.create("packed")
        disk.pwrite(70_000, b"plain" * 20_000)
        disk.snapshots.apply("packed")
        assert all(disk.pread(at, 65536) == bytes([at >> 16]) * 65536 for at in range(0, SIZE, 65536))
        disk.snapshots.delete("packed")
        disk.write_compressed(0, b"n" * 65536)
        assert disk.pread(65536, 65536) == bytes([1]) * 65536
    qemu.check(path)
