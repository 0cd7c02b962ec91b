# SPDX-License-Identifier: Apache-2.0
"""raw: holes, sizes, block devices, and the counters of any disk."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from block_judges import Driver

from kvmpy.block import Disk, DiskStats, Extent, create_disk, open_disk
from kvmpy.block._disk import copy_data, is_zero
from kvmpy.block.raw import RawDisk

SIZE = 4 << 20


@pytest.mark.parametrize("size", [SIZE, SIZE + 1, 1, 0])
def test_random_requests(tmp_path: Path, driver: type[Driver], size: int) -> None:
    create_disk(tmp_path / "x", "raw", size)
    if size:
        drive = driver(size, size)
        with open_disk(tmp_path / "x", "raw") as disk:
            drive.run(disk, 100)
            drive.verify(disk)
        assert (tmp_path / "x").read_bytes() == drive.expected
    assert (tmp_path / "x").stat().st_size == size


def test_holes_are_seen_and_made(tmp_path: Path) -> None:
    create_disk(tmp_path / "x", "raw", SIZE)
    with open_disk(tmp_path / "x", "raw") as disk:
        disk.pwrite(1 << 20, b"x" * (1 << 20))
        assert disk.block_status(0, SIZE) == Extent(0, 1 << 20, False, True, True, False, 0)
        assert disk.block_status(1 << 20, SIZE - (1 << 20)) == Extent(
            1 << 20, 1 << 20, True, False, True, False, 1 << 20
        )
        used = (tmp_path / "x").stat().st_blocks
        disk.discard(1 << 20, 1 << 20)
        assert (tmp_path / "x").stat().st_blocks < used
        assert disk.pread(1 << 20, 1 << 20) == bytes(1 << 20)
        disk.pwrite(0, b"y" * 8192)
        disk.write_zeroes(4096, 4096, unmap=False)
        assert disk.pread(0, 8192) == b"y" * 4096 + bytes(4096)


@pytest.mark.parametrize(("how", "least"), [("off", 0), ("falloc", SIZE), ("full", SIZE)])
def test_preallocation(tmp_path: Path, how: str, least: int) -> None:
    create_disk(tmp_path / "x", "raw", SIZE, preallocation=how)
    stat = (tmp_path / "x").stat()
    assert stat.st_size == SIZE and stat.st_blocks * 512 >= least


def test_resize(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x" * 1000)
    with open_disk(tmp_path / "x", "raw") as disk:
        assert isinstance(disk, RawDisk)
        disk.resize(2000)
        assert disk.pread(0, 2000) == b"x" * 1000 + bytes(1000)
        with pytest.raises(ValueError, match="shrink"):
            disk.resize(10)
        disk.resize(10, shrink=True)
        assert disk.size == 10
    assert (tmp_path / "x").read_bytes() == b"x" * 10


def test_discards_can_be_turned_off(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x" * 8192)
    with open_disk(tmp_path / "x", "raw", discard=False) as disk:
        disk.discard(0, 8192)
        assert disk.pread(0, 8192) == b"x" * 8192


@pytest.mark.parametrize("format", ["raw", "qcow2", "vdi", "vmdk"])
def test_counters_and_protocol(tmp_path: Path, format: str) -> None:
    create_disk(tmp_path / "x", format, SIZE)
    with open_disk(tmp_path / "x", format) as disk:
        assert isinstance(disk, Disk)
        disk.pwrite(0, b"12345")
        buffer = bytearray(3)
        disk.pread_into(1, buffer)
        disk.pread_into(0, memoryview(bytearray(10))[2:5])
        disk.pwrite(7, memoryview(b"__view__")[2:6])
        disk.flush()
        disk.discard(0, 512)
        disk.write_zeroes(0, 512)
        assert disk.stats == DiskStats(2, 6, 2, 9, 1, 1, 1, 0)
        assert buffer == b"234"
        with pytest.raises(BufferError if format in ("raw", "qcow2") else (BufferError, TypeError)):
            disk.pread_into(0, b"read-only")  # type: ignore[arg-type]


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "medium").write_bytes(b"m" * SIZE)
    done = subprocess.run(
        ["losetup", "--find", "--show", tmp_path / "medium"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no loop device: {done.stderr.strip()}")
    yield done.stdout.strip()
    subprocess.run(["losetup", "-d", done.stdout.strip()], check=True)


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_block_device(loop_device: str, driver: type[Driver], format: str) -> None:
    size = SIZE if format == "raw" else SIZE // 2
    create_disk(loop_device, format, size)
    drive = driver(6, size)
    if format == "raw":
        drive.expected[:] = b"m" * size
    with open_disk(loop_device, format) as disk:
        drive.verify(disk)
        drive.run(disk, 60)
        drive.verify(disk)
    with open_disk(loop_device, format, readonly=True) as disk:
        drive.verify(disk)


def test_zero_detection() -> None:
    for length in (0, 1, 15, 16, 17, 4096, 4097):
        assert is_zero(bytes(length))
        for at in {0, length // 2, length - 1} if length else ():
            data = bytearray(length)
            data[at] = 1
            assert not is_zero(data)


@pytest.mark.parametrize("chunk", [3, 8, 64])
@pytest.mark.parametrize("unit", [0, 4])
def test_copying_data_leaves_out_zeroes(tmp_path: Path, chunk: int, unit: int) -> None:
    content = b"abc" + bytes(9) + b"wxyz" + bytes(4) + b"x"
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "b").write_bytes(b"?" * len(content))
    with open_disk(tmp_path / "a", "raw") as a, open_disk(tmp_path / "b", "raw") as b:
        copy_data(a, b, 2, len(content) - 2, chunk, unit, target_is_zero=True)
        left = b.pread(0, len(content))
        assert left.replace(b"?", b"\0")[2:] == content[2:]
        assert left[:2] == b"??" and (b"?" in left[2:]) == bool(unit)
        copy_data(a, b, 0, len(content), chunk, unit, target_is_zero=False)
        assert b.pread(0, len(content)) == content
        with pytest.raises(ValueError, match="chunk"):
            copy_data(a, b, 0, 1, 0, unit, target_is_zero=False)
        with pytest.raises(ValueError, match="not inside"):
            copy_data(a, b, 1, len(content), chunk, unit, target_is_zero=False)
