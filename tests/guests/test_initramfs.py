# SPDX-License-Identifier: Apache-2.0
"""The cpio writer, checked field by field and by the real cpio."""

import gzip
import shutil
import stat
import subprocess

import pytest

from kvmpy.guests import initramfs
from kvmpy.guests.initramfs import Device, Directory, File, Link


def parse(archive):
    """A reader of its own: {name: (mode, rdev, data)} in order, from the format's description."""
    found, offset = {}, 0
    while True:
        header = archive[offset : offset + 110]
        assert header[:6] == b"070701"
        fields = [int(header[6 + 8 * i : 14 + 8 * i], 16) for i in range(13)]
        ino, mode, uid, gid, nlink, mtime, size, major, minor, rmajor, rminor, name_size, check = fields
        assert (uid, gid, mtime, major, minor, check) == (0, 0, 0, 0, 0, 0)
        raw = archive[offset + 110 : offset + 110 + name_size]
        assert raw.endswith(b"\0") and raw.count(b"\0") == 1
        name = raw[:-1].decode()
        start = -(-(offset + 110 + name_size) // 4) * 4
        assert not any(archive[offset + 110 + name_size : start])
        data = archive[start : start + size]
        assert len(data) == size
        offset = -(-(start + size) // 4) * 4
        if name == "TRAILER!!!":
            assert size == 0 and not any(archive[offset:])
            return found
        assert name not in found and ino == len(found) + 1 and nlink == (2 if stat.S_ISDIR(mode) else 1)
        found[name] = (mode, (rmajor, rminor), data)


ENTRIES = {
    "init": File(b"#!/bin/sh\n", 0o755),
    "bin/busybox": b"\x7fELF" + bytes(range(256)) * 41,
    "/bin/sh": Link("busybox"),
    "dev/console": Device(5, 1),
    "dev/vda": Device(254, 0, 0o660, block=True),
    "tmp": Directory(0o1777),
    "./etc//motd": b"",
    "a/very/deep/tree/with-a-name-of-some-length": b"123",
}


def test_cpio_fields_are_the_formats():
    found = parse(initramfs.cpio(ENTRIES))
    assert found["init"] == (stat.S_IFREG | 0o755, (0, 0), b"#!/bin/sh\n")
    assert found["bin/sh"] == (stat.S_IFLNK | 0o777, (0, 0), b"busybox")
    assert found["bin/busybox"] == (stat.S_IFREG | 0o644, (0, 0), ENTRIES["bin/busybox"])
    assert found["dev/console"] == (stat.S_IFCHR | 0o600, (5, 1), b"")
    assert found["dev/vda"] == (stat.S_IFBLK | 0o660, (254, 0), b"")
    assert found["tmp"] == (stat.S_IFDIR | 0o1777, (0, 0), b"")
    assert found["etc/motd"] == (stat.S_IFREG | 0o644, (0, 0), b"")
    assert found["a/very/deep"] == (stat.S_IFDIR | 0o755, (0, 0), b"")


def test_cpio_parents_come_before_children():
    names = list(parse(initramfs.cpio({"a/b/c": b"", "a/b": Directory(0o700), "a": Directory(0o711)})))
    assert names == ["a", "a/b", "a/b/c"]
    assert parse(initramfs.cpio({"a/b": b"", "a": Directory(0o711)}))["a"][0] == stat.S_IFDIR | 0o711


def test_build_is_gzip_and_the_same_every_time():
    image = initramfs.build(ENTRIES)
    assert image == initramfs.build(ENTRIES)
    assert gzip.decompress(image) == initramfs.cpio(ENTRIES) == initramfs.build(ENTRIES, compress=False)


def test_build_copies_host_files_with_their_x_bit(tmp_path):
    plain, program = tmp_path / "plain", tmp_path / "program"
    plain.write_bytes(b"1")
    program.write_bytes(b"2")
    program.chmod(0o700)
    found = parse(initramfs.build({"p": plain, "q": program}, compress=False))
    assert found["p"] == (stat.S_IFREG | 0o644, (0, 0), b"1")
    assert found["q"] == (stat.S_IFREG | 0o755, (0, 0), b"2")


def test_build_empty_is_only_the_trailer():
    assert parse(initramfs.build({}, compress=False)) == {}


@pytest.mark.parametrize(
    "entries",
    [
        {"..": b""},
        {"a/../../b": b""},
        {"": b""},
        {"/": b""},
        {"a\0b": b""},
        {"TRAILER!!!": b""},
        {"a": b"", "./a": b""},
        {"a": b"", "a/b": b""},
        {"a": Link("b"), "a/b": b""},
        {"a": File(b"", 0o10000)},
        {"a": File(b"", -1)},
        {"a": Link("")},
        {"a": Link("x\0y")},
        {"a": Device(1 << 12, 0)},
        {"a": Device(0, -1)},
    ],
)
def test_build_impossible_entry_is_an_error(entries):
    with pytest.raises(ValueError):
        initramfs.build(entries)


def test_build_wrong_type_is_an_error():
    with pytest.raises(TypeError, match="Link"):
        initramfs.build({"a": "text"})


def test_build_absent_host_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        initramfs.build({"a": tmp_path / "absent"})


def test_real_cpio_unpacks_it(tmp_path):
    program = shutil.which("cpio")
    if program is None:
        pytest.skip("no cpio program to compare with")
    entries = {name: entry for name, entry in ENTRIES.items() if not isinstance(entry, Device)}
    archive = initramfs.cpio(entries)
    command = [program, "-i", "-d", "-m", "--no-absolute-filenames", "--quiet"]
    subprocess.run(command, input=archive, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "bin/busybox").read_bytes() == ENTRIES["bin/busybox"]
    assert (tmp_path / "bin/sh").readlink().name == "busybox"
    assert (tmp_path / "init").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "a/very/deep/tree/with-a-name-of-some-length").read_bytes() == b"123"
    listing = subprocess.run(
        [program, "-i", "-t", "-v", "--quiet"], input=initramfs.cpio(ENTRIES), capture_output=True, check=True
    ).stdout.decode()
    assert any(line.startswith("crw-------") and "5,   1" in line for line in listing.splitlines())
    assert any(line.startswith("brw-rw----") and "254,   0" in line for line in listing.splitlines())


def test_archives_can_be_joined(tmp_path):
    program = shutil.which("cpio")
    if program is None:
        pytest.skip("no cpio program to compare with")
    first, second = initramfs.cpio({"a": b"1"}), initramfs.cpio({"b": b"2"})
    for archive in (first, second):
        assert len(archive) % 512 == 0
    command = [program, "-i", "-t", "--quiet"]
    names = [
        subprocess.run(command, input=x, capture_output=True, check=True).stdout for x in (first, second)
    ]
    assert names == [b"a\n", b"b\n"]
