# SPDX-License-Identifier: Apache-2.0
"""A host that fails: no space, limits, vanished descriptors. The guest gets an error, the image stays
right.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from block_judges import Driver, Qemu

from kvmpy.block import create_disk, open_disk
from kvmpy.block._disk import RawCore
from kvmpy.block.hostfile import HostFile
from kvmpy.block.qcow2 import Header, check
from kvmpy.errors import ImageError

SIZE = 16 << 20
SPAN = 4 << 30


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "kvmpy-test", folder], capture_output=True, check=False
    ).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writes beyond `size` fail with EFBIG (Python ignores SIGXFSZ)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fill(driver: Driver, disk: object, requests: int = 400) -> int:
    """Random writes; those that fail must fail with ENOSPC and may leave old or new bytes. Returns how many
    failed.
    """
    failed = 0
    for _ in range(requests):
        offset, length = driver.range(200_000)
        data = driver.random.randbytes(length)
        try:
            disk.pwrite(offset, data)  # type: ignore[attr-defined]
            driver.expected[offset : offset + length] = data
        except OSError as error:
            assert error.errno in (errno.ENOSPC, errno.EFBIG), error
            failed += 1
            driver.expected[offset : offset + length] = disk.pread(offset, length)  # type: ignore[attr-defined]
    return failed


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("qcow2", {}),
        ("qcow2", {"cluster_size": 512}),
        ("qcow2", {"lazy_refcounts": True}),
        ("qcow2", {"extended_l2": True}),
    ],
)
def test_full_file_system_gives_errors_and_a_sound_image(
    qemu: Qemu, small_disk: Path, driver: type[Driver], format: str, options: dict[str, object]
) -> None:
    path = small_disk / "disk.image"
    create_disk(path, format, SIZE, **options)
    drive = driver(7, SIZE)
    (small_disk / "ballast").write_bytes(bytes(1 << 20))
    disk = open_disk(path, format)
    assert fill(drive, disk) > 0
    assert disk.pread(0, SIZE) == drive.expected
    (small_disk / "ballast").unlink()  # room again: all that was accepted must reach the disk
    disk.close()
    with HostFile.open(path, readonly=True) as file:
        result = check(file)
    assert not result.corruptions and not result.check_errors, result
    with open_disk(path, format, readonly=True) as disk:
        assert disk.pread(0, SIZE) == drive.expected


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("qcow2", {}),
        ("qcow2", {"cluster_size": 512}),
        ("qcow2", {"cluster_size": 4096}),
        ("qcow2", {"lazy_refcounts": True}),
        ("qcow2", {"extended_l2": True}),
        ("vdi", {}),
        ("vmdk", {}),
    ],
    ids=str,
)
def test_what_a_full_file_system_took_can_be_flushed(
    qemu: Qemu, small_disk: Path, tmp_path: Path, format: str, options: dict[str, object]
) -> None:
    """The tables' room is taken when they are made: a flush needs none, and the disk goes on."""
    path, after = small_disk / "disk.image", tmp_path / "after.image"
    create_disk(path, format, SPAN, **options)
    rnd = random.Random(9)
    kept: dict[int, bytes] = {}
    with open_disk(path, format) as disk:
        failed = 0
        for number in range(600):
            offset, data = rnd.randrange(SPAN >> 20) << 20, rnd.randbytes(rnd.choice([512, 4096, 30_000]))
            try:
                disk.pwrite(offset, data)
                kept[offset] = data
            except OSError as error:
                assert error.errno == errno.ENOSPC
                kept.pop(offset, None)
                failed += 1
            if number % 50 == 49:
                disk.flush()
        assert failed
        disk.flush()
        shutil.copyfile(path, after)  # as kill -9 would leave it
        for offset, data in kept.items():
            assert disk.pread(offset, len(data)) == data
    if format == "qcow2":
        with HostFile.open(after) as file:
            result = check(file)
        assert not result.check_errors and (options.get("lazy_refcounts") or not result.corruptions), result
    else:
        qemu.img("check", "-q", "-f", format, path)
    with open_disk(after, format) as disk:
        for offset, data in kept.items():
            assert disk.pread(offset, len(data)) == data


@pytest.mark.parametrize("format", ["raw", "qcow2", "vdi", "vmdk"])
def test_file_size_limit_gives_errors_and_a_sound_image(
    qemu: Qemu, tmp_path: Path, driver: type[Driver], format: str
) -> None:
    path = tmp_path / "disk.image"
    create_disk(path, format, SIZE)
    drive = driver(8, SIZE)
    with open_disk(path, format) as disk:
        with file_size_limit(4 << 20):
            assert fill(drive, disk, 100) > 0
        drive.run(disk, 50)
        drive.verify(disk)
    if format != "raw":
        qemu.img("check", "-q", "-f", format, path)
    qemu.same(path, drive.expected, format)


def test_failed_sync_stays_failed(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(4096))
    reader, writer = os.pipe()
    fd = os.open(path, os.O_RDWR)
    disk = RawCore(fd, 0, 4096, False)
    disk.flush()
    os.dup2(writer, fd)  # fdatasync of a pipe fails with EINVAL
    with pytest.raises(OSError, match="flush"):
        disk.flush()
    again = os.open(path, os.O_RDWR)
    os.dup2(again, fd)  # a good file once more: the lost pages do not come back
    with pytest.raises(OSError, match="flush"):
        disk.flush()
    for one in (reader, writer, fd, again):
        os.close(one)


def test_signals_do_not_cut_transfers_short(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    create_disk(path, "raw", 64 << 20)
    seen = []
    old = signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
    data = os.urandom(1 << 20) * 8
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        with open_disk(path, "raw") as disk:
            for at in range(0, 64 << 20, 8 << 20):
                disk.pwrite(at, data)
                assert disk.pread(at, 8 << 20) == data
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def test_image_shorter_than_it_says_is_an_error_not_zeroes(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create_disk(path, "qcow2", 4 << 20)
    with open_disk(path, "qcow2") as disk:
        disk.pwrite(0, b"x" * (4 << 20))
    with HostFile.open(path, readonly=True) as file:
        table = Header.parse(file).l1_table_offset
        (l2,) = struct.unpack(">Q", file.pread(table, 8))
    with path.open("r+b") as image:  # the last cluster's entry points just behind the end
        image.seek((l2 & (1 << 63) - 1) + 8 * 63)
        image.write(struct.pack(">Q", path.stat().st_size | 1 << 63))
    with open_disk(path, "qcow2", readonly=True) as disk:
        assert disk.pread(0, 65536) == b"x" * 65536
        with pytest.raises(ImageError, match="beyond the end") as caught:
            disk.pread((4 << 20) - 65536, 65536)
    assert caught.value.offset is not None
    assert disk.closed  # type: ignore[attr-defined]


def test_closed_disk_raises_state_error(tmp_path: Path) -> None:
    from kvmpy.errors import StateError

    for format in ("raw", "qcow2", "vdi", "vmdk"):
        path = tmp_path / f"disk.{format}"
        create_disk(path, format, 1 << 20)
        disk = open_disk(path, format)
        disk.close()
        disk.close()
        with pytest.raises(StateError):
            disk.pread(0, 1)
        with open_disk(path, format, readonly=True) as disk:
            with pytest.raises(PermissionError):
                disk.pwrite(0, b"x")
            for bad in ((-1, 1), (1 << 20, 1), (0, (1 << 20) + 1), (1 << 64, 1)):
                with pytest.raises(ValueError, match="not inside"):
                    disk.pread(*bad)


FAULTY = """
import ctypes, os, sys
sys.path[:0] = [{tests!r}]
from block_judges import Driver
from kvmpy.block import create_disk, open_disk

SOUND, INTERRUPTED, BROKEN = range(3)
faulty = ctypes.CDLL(os.environ["LD_PRELOAD"]).faulty
path, format, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
drive = Driver(seed, 4 << 20)
create_disk(path, format, 4 << 20)
disk = open_disk(path, format)
faulty(INTERRUPTED, 3, seed)
drive.run(disk, 60)
drive.verify(disk)
disk.flush()
interrupted, failed = faulty(BROKEN, 4, seed), 0
assert interrupted > 10, "transfers were cut"
for _ in range(60):
    offset, length = drive.range(100_000)
    data = drive.random.randbytes(length)
    try:
        disk.pwrite(offset, data)
        drive.expected[offset : offset + length] = data
    except OSError as error:
        assert error.errno == 5, error
        failed += 1
        broken = faulty(SOUND, 1, seed)  # what is there now: old bytes, new bytes, some of both
        drive.expected[offset : offset + length] = disk.pread(offset, length)
        faulty(BROKEN, 4, seed + broken)
faulty(SOUND, 1, seed)
assert failed
drive.verify(disk)
try:
    disk.close()
except OSError as error:  # a table could not be written, and that was not forgotten
    assert error.errno == 5, error
else:
    with open_disk(path, format, readonly=True) as again:
        drive.verify(again)
"""


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that makes transfers fail."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler: install the package gcc")
    library = tmp_path_factory.mktemp("faulty") / "faulty.so"
    source = Path(__file__).with_name("faulty.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("format", ["raw", "qcow2", "vdi", "vmdk"])
def test_interrupted_and_failing_transfers(tmp_path: Path, faulty: Path, format: str, seed: int) -> None:
    path = tmp_path / "disk.faulty"
    script = FAULTY.replace("{tests!r}", repr(str(Path(__file__).parent)))
    done = subprocess.run(
        [sys.executable, "-c", script, path, format, str(seed)],
        env={**os.environ, "LD_PRELOAD": str(faulty)},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    if format == "qcow2":
        with HostFile.open(path, readonly=True) as file:
            result = check(file)
        assert not result.corruptions and not result.check_errors, result
