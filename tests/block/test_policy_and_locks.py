# SPDX-License-Identifier: Apache-2.0
"""What an image may have opened in its name, and who may use an image at the same time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from block_judges import Qemu

from kvmpy.block import Disk, Follow, create_disk, open_disk
from kvmpy.errors import ImageError

SIZE = 1 << 20


def overlay(path: Path, backing: str, format: str | None = "raw") -> Path:
    from kvmpy.block.hostfile import HostFile
    from kvmpy.block.qcow2 import Header

    create_disk(path, "qcow2", SIZE, backing_file=backing, backing_fmt=format or "raw")
    if format is None:
        with HostFile.open(path) as file:
            header = Header.parse(file)
            header.extensions = []
            file.pwrite(0, header.pack())
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "base.raw").write_bytes(b"base" * (SIZE // 4))
    (tmp_path / "secret").write_bytes(b"secret" * SIZE)
    return folder


def test_backing_file_is_followed_only_when_allowed(images: Path) -> None:
    path = overlay(images / "disk.qcow2", "base.raw")
    with pytest.raises(ImageError, match="not allowed"):
        open_disk(path, "qcow2")
    with open_disk(path, "qcow2", follow=Follow(images)) as disk:
        assert disk.pread(0, 4) == b"base"
        assert disk.backing is not None and disk.backing.readonly
    with open_disk(path, "qcow2", backing=False, readonly=True) as disk:
        assert disk.pread(0, 4) == bytes(4)


def test_relative_name_is_beside_the_image_not_the_working_folder(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base.raw").write_bytes(b"fake" * (SIZE // 4))
    monkeypatch.chdir(tmp_path)
    overlay(images / "disk.qcow2", "base.raw")
    with open_disk("images/disk.qcow2", "qcow2", follow=Follow(tmp_path)) as disk:
        assert disk.pread(0, 4) == b"base"


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "../images/../secret", "sub/../../secret"])
def test_names_outside_are_refused(images: Path, name: str) -> None:
    (images / "sub").mkdir()
    path = overlay(images / "disk.qcow2", name)
    with pytest.raises(ImageError, match="outside"):
        open_disk(path, "qcow2", follow=Follow(images))


def test_links_are_resolved_before_they_are_judged(images: Path, tmp_path: Path) -> None:
    (images / "out").symlink_to(tmp_path / "secret")
    (images / "dir").symlink_to(tmp_path)
    (images / "in").symlink_to(images / "base.raw")
    (tmp_path / "door").symlink_to(images)
    for name in ("out", "dir/secret"):
        with pytest.raises(ImageError, match="outside"):
            open_disk(overlay(images / "disk.qcow2", name), "qcow2", follow=Follow(images))
    path = overlay(images / "disk.qcow2", "in")
    with open_disk(path, "qcow2", follow=Follow(tmp_path / "door")) as disk:
        assert disk.pread(0, 4) == b"base"


def test_link_swapped_in_after_the_look_does_not_escape(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = overlay(images / "disk.qcow2", "sub/file")
    (images / "sub").mkdir()
    (images / "sub" / "file").write_bytes(b"fine")
    follow = Follow(images)
    resolve = os.path.realpath

    def swap(name: str) -> str:
        found = resolve(name)
        if "sub" in str(name):
            (images / "sub" / "file").unlink()
            (images / "sub" / "file").symlink_to(tmp_path / "secret")
        return str(found)

    monkeypatch.setattr(os.path, "realpath", swap)
    with pytest.raises(ImageError, match="changed into a link"):
        open_disk(path, "qcow2", follow=follow)


@pytest.mark.parametrize("name", ["nbd://localhost/x", "json:{}", "fat:dir", "ssh://host/file", "data:,x"])
def test_protocols_are_not_followed(images: Path, name: str) -> None:
    with pytest.raises(ImageError, match="not a plain path"):
        open_disk(overlay(images / "disk.qcow2", name), "qcow2", follow=Follow(images))


def test_backing_format_must_be_named_and_known(images: Path) -> None:
    with pytest.raises(ImageError, match="probing"):
        open_disk(overlay(images / "a.qcow2", "base.raw", None), "qcow2", follow=Follow(images))
    with pytest.raises(ImageError, match="vhdx"):
        open_disk(overlay(images / "b.qcow2", "base.raw", "vhdx"), "qcow2", follow=Follow(images))
    with pytest.raises(ValueError, match="format named"):
        create_disk(images / "c.qcow2", "qcow2", SIZE, backing_file="base.raw")


def test_chain_that_is_a_loop_ends(images: Path) -> None:
    overlay(images / "a.qcow2", "b.qcow2", "qcow2")
    overlay(images / "b.qcow2", "a.qcow2", "qcow2")
    with pytest.raises(ImageError, match="too deep"):
        open_disk(images / "a.qcow2", "qcow2", readonly=True, follow=Follow(images))
    overlay(images / "self.qcow2", "self.qcow2", "qcow2")
    with pytest.raises((ImageError, BlockingIOError)):
        open_disk(images / "self.qcow2", "qcow2", follow=Follow(images))
    assert len(list(Path("/proc/self/fd").iterdir())) < 100


def test_chain_depth_is_limited(images: Path) -> None:
    overlay(images / "0.qcow2", "base.raw")
    for i in range(1, 5):
        overlay(images / f"{i}.qcow2", f"{i - 1}.qcow2", "qcow2")
    with open_disk(images / "4.qcow2", "qcow2", follow=Follow(images, depth=5)) as disk:
        assert disk.pread(SIZE - 4, 4) == b"base"
    with pytest.raises(ImageError, match="too deep"):
        open_disk(images / "4.qcow2", "qcow2", follow=Follow(images, depth=4))


def test_fifo_and_folder_are_refused_and_do_not_hang(images: Path) -> None:
    os.mkfifo(images / "fifo")
    for name in ("fifo", "."):
        with pytest.raises((ImageError, OSError)):
            open_disk(images / name, "raw", readonly=True)
        with pytest.raises((ImageError, OSError)):
            open_disk(overlay(images / "disk.qcow2", name), "qcow2", follow=Follow(images))


def test_writable_disk_needs_its_format_named(images: Path) -> None:
    with pytest.raises(ValueError, match="format named"):
        open_disk(images / "base.raw")
    with open_disk(images / "base.raw", readonly=True) as disk:
        assert disk.size == SIZE


def test_guest_that_writes_a_qcow2_header_into_a_raw_disk_gains_nothing(images: Path) -> None:
    create_disk(images / "evil.qcow2", "qcow2", SIZE, backing_file="/etc/passwd", backing_fmt="raw")
    with open_disk(images / "base.raw", "raw") as disk:
        disk.pwrite(0, (images / "evil.qcow2").read_bytes()[:4096])
    with open_disk(images / "base.raw", "raw") as disk:
        assert disk.size == SIZE
    with pytest.raises(ImageError, match="not allowed"):
        open_disk(images / "base.raw", readonly=True)  # even where it is recognised


# --- locks


def opens(path: Path, readonly: bool) -> Disk:
    return open_disk(path, "qcow2", readonly=readonly)


@pytest.mark.parametrize(
    ("first", "second", "allowed"), [(False, False, 0), (False, True, 0), (True, False, 0), (True, True, 1)]
)
def test_one_writer_or_many_readers(tmp_path: Path, first: bool, second: bool, allowed: bool) -> None:
    path = tmp_path / "disk.qcow2"
    create_disk(path, "qcow2", SIZE)
    with opens(path, first):
        if allowed:
            opens(path, second).close()
        else:
            with pytest.raises(BlockingIOError, match="in use"):
                opens(path, second)
    opens(path, second).close()


def test_create_does_not_empty_an_image_in_use(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create_disk(path, "qcow2", SIZE)
    with opens(path, True):
        before = path.stat().st_size
        with pytest.raises(BlockingIOError):
            create_disk(path, "qcow2", SIZE)
        assert path.stat().st_size == before


def test_qemu_respects_our_locks_and_we_respect_qemus(qemu: Qemu, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create_disk(path, "qcow2", SIZE)
    with opens(path, False):
        qemu.img("info", path, status=1)
        qemu.run("qemu-io", "-f", "qcow2", "-c", "write 0 1", path, status=1)
    with opens(path, True):
        qemu.img("info", path)
        qemu.run("qemu-io", "-f", "qcow2", "-c", "write 0 1", path, status=1)
    # qemu-io holds the image open until its input ends.
    with subprocess.Popen(["qemu-io", "-f", "qcow2", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin and other.stdout
        other.stdin.write(b"write 0 512\n")
        other.stdin.flush()
        while b"512/512" not in other.stdout.readline():
            pass
        for readonly in (False, True):
            with pytest.raises(BlockingIOError):
                opens(path, readonly)
        other.stdin.close()
    opens(path, False).close()


def test_lock_is_gone_after_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create_disk(path, "qcow2", SIZE)
    program = f"import os; from kvmpy.block import open_disk; d = open_disk({str(path)!r}, 'qcow2'); os._exit(9)"
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[2]))
    assert subprocess.run([sys.executable, "-c", program], env=environment, check=False).returncode == 9
    opens(path, False).close()
