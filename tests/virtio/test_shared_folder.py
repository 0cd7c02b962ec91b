# SPDX-License-Identifier: Apache-2.0
"""The file system device (virtio 1.2, 5.11): FUSE requests as a guest makes them, and as only a hostile one would."""

import errno
import os
import random
import stat
import struct
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from fuse_client import OPEN_IN, ROOT, Client

from kvmpy.virtio import SharedFolder, _host, folder, fuse
from kvmpy.virtio.fuse import Op

# The format of the ring makes no difference here; test_virtio_fuzz.py has packed ones.
pytestmark = pytest.mark.split_ring


def names(path):
    return sorted(one.name for one in path.iterdir())


@contextmanager
def fails(number):
    with pytest.raises(OSError) as caught:
        yield
    assert caught.value.errno == number, os.strerror(caught.value.errno)


@pytest.fixture
def host(tmp_path):
    """The shared folder, and beside it what must not be reached."""
    (tmp_path / "share").mkdir()
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("outside")
    return tmp_path / "share"


@pytest.fixture
def fs(host, threaded):
    client = Client(host, threaded).start()
    yield client
    client.rig.close()


def test_configuration_space(fs):
    config = fs.rig.driver.config
    assert bytes(config(at, 1) for at in range(36)) == b"tag".ljust(36, b"\0")
    assert config(36, 4) == 1


def test_what_init_agrees_on(fs):
    reply = fs.call(Op.INIT, 0, struct.pack("<IIII", 7, 38, 131072, 0xFFFF_FFFF))
    major, minor, ahead, flags, _, _, most, _, pages, *_ = fuse.INIT_OUT.unpack(reply)
    assert (major, minor, ahead, most, pages) == (7, 38, 131072, 1 << 20, 256)
    assert flags == fuse.FLAGS
    assert fuse.INIT_OUT.unpack(fs.call(Op.INIT, 0, struct.pack("<IIII", 8, 0, 0, 0)))[0] == 7
    with fails(errno.EPROTO):
        fs.call(Op.INIT, 0, struct.pack("<IIII", 7, 20, 0, 0))


def test_files_of_the_host_are_seen_and_read(fs, host):
    data = random.Random(1).randbytes(300_000)
    (host / "file").write_bytes(data)
    node = fs.lookup(ROOT, b"file")
    assert fs.attr(node)["size"] == 300_000 and stat.S_ISREG(fs.attr(node)["mode"])
    handle = fs.open(node, os.O_RDONLY)
    assert fs.read(node, handle, 0, 300_000) == data
    assert fs.read(node, handle, 299_990, 4096) == data[-10:]
    assert fs.read(node, handle, 300_000, 4096) == b"" == fs.read(node, handle, 1 << 60, 16)
    assert fs.read(node, handle, 0, 4096, room=100) == data[:100], "never more than there is room for"
    fs.call(Op.RELEASE, node, struct.pack("<Q16x", handle))
    with fails(errno.EBADF):
        fs.read(node, handle, 0, 1)
    assert fs.device.stats()["read_bytes"] == 300_110


def test_files_of_the_guest_are_written(fs, host):
    node, handle = fs.create(ROOT, b"new", 0o640)
    assert fs.write(node, handle, 5, b"hello" * 1000) == 5000
    assert (host / "new").read_bytes() == bytes(5) + b"hello" * 1000
    assert stat.S_IMODE((host / "new").stat().st_mode) == 0o640
    assert fs.call(Op.FLUSH, node, struct.pack("<Q16x", handle)) == b""
    assert fs.call(Op.FSYNC, node, struct.pack("<QI4x", handle, 0)) == b""
    fs.setattr(node, fuse.SET_SIZE, size=3)
    fs.setattr(node, fuse.SET_SIZE | fuse.SET_FH, size=4, handle=handle)
    fs.setattr(node, fuse.SET_ATIME | fuse.SET_MTIME, atime=1_000_000_000, mtime=1_100_000_000)
    assert fs.attr(node) | {"size": 4, "mtime": 1_100_000_000, "atime": 1_000_000_000} == fs.attr(node)
    appending = fs.open(node, os.O_WRONLY | os.O_APPEND)
    fs.write(node, appending, 0, b"end")
    assert (host / "new").read_bytes() == bytes(4) + b"end"
    truncating = fs.open(node, os.O_WRONLY | os.O_TRUNC)
    assert (host / "new").read_bytes() == b"" and truncating != handle
    with fails(errno.EEXIST):
        fs.create(ROOT, b"new", flags=os.O_RDWR | os.O_EXCL)
    assert fs.create(ROOT, b"new")[0] == node, "without O_EXCL it is opened"


def test_directories_links_and_names(fs, host):
    a, b = fs.mkdir(ROOT, b"a"), fs.mkdir(ROOT, b"b", 0o700)
    assert stat.S_IMODE((host / "b").stat().st_mode) == 0o700
    node, _ = fs.create(a, b"file")
    fs.rename(a, b"file", b, b"moved")
    assert (host / "b" / "moved").exists() and fs.lookup(b, b"moved") == node
    with fails(errno.ENOENT):
        fs.lookup(a, b"file")
    fs.create(a, b"other")
    with fails(errno.EEXIST):
        fs.rename(a, b"other", b, b"moved", 1)  # RENAME_NOREPLACE
    fs.rename(a, b"other", b, b"moved", 2)  # RENAME_EXCHANGE
    assert fs.lookup(a, b"other") == node
    fs.call(Op.LINK, b, struct.pack("<Q", node) + b"again\0")
    assert (host / "b" / "again").samefile(host / "a" / "other") and fs.lookup(b, b"again") == node
    fs.call(Op.SYMLINK, ROOT, b"link\0../secret\0")
    link = fs.lookup(ROOT, b"link")
    assert fs.call(Op.READLINK, link) == b"../secret" and stat.S_ISLNK(fs.attr(link)["mode"])
    fs.call(Op.MKNOD, ROOT, struct.pack("<II8x", stat.S_IFIFO | 0o600, 0) + b"pipe\0")
    assert stat.S_ISFIFO((host / "pipe").stat().st_mode)
    fs.call(Op.UNLINK, ROOT, b"pipe\0")
    with fails(errno.ENOTEMPTY):
        fs.call(Op.RMDIR, ROOT, b"a\0")
    fs.call(Op.UNLINK, a, b"other\0")
    fs.call(Op.RMDIR, ROOT, b"a\0")
    assert names(host) == ["b", "link"]


def test_directories_are_listed_in_pieces(fs, host):
    names = {f"file-{number:04}".encode() for number in range(300)}
    for name in names:
        (host / os.fsdecode(name)).touch()
    (host / "sub").mkdir()
    for op in (Op.READDIR, Op.READDIRPLUS):
        found = fs.list(ROOT, op, 700)
        assert len(found) == 303 and {name for name, _ in found} == names | {b".", b"..", b"sub"}
        assert dict(found)[b"sub"] == 4 and dict(found)[b"file-0000"] == 8
    assert fs.device.stats()["known_files"] == 302, "READDIRPLUS looks up what fits, and only that"


def test_a_file_lives_on_without_a_name(fs, host):
    node, handle = fs.create(ROOT, b"file")
    fs.write(node, handle, 0, b"still here")
    fs.call(Op.UNLINK, ROOT, b"file\0")
    assert fs.read(node, handle, 0, 100) == b"still here"
    reply = fs.call(Op.GETATTR, node, struct.pack("<I4xQ", 1, handle))
    assert struct.unpack_from("<Q", reply, 24)[0] == 10


def test_holes_and_copies(fs, host):
    node, handle = fs.create(ROOT, b"a")
    other, target = fs.create(ROOT, b"b")
    fs.write(node, handle, 0, b"x" * 65536)
    fs.call(Op.FALLOCATE, node, struct.pack("<QQQI4x", handle, 8192, 4096, 3))  # PUNCH_HOLE | KEEP_SIZE
    assert (host / "a").read_bytes() == b"x" * 8192 + bytes(4096) + b"x" * (65536 - 12288)
    with fails(errno.EOPNOTSUPP):
        fs.call(Op.FALLOCATE, node, struct.pack("<QQQI4x", handle, 0, 4096, 8))  # COLLAPSE_RANGE
    assert struct.unpack("<Q", fs.call(Op.LSEEK, node, struct.pack("<QQI4x", handle, 0, os.SEEK_HOLE)))[0] <= 65536
    with fails(errno.EINVAL):
        fs.call(Op.LSEEK, node, struct.pack("<QQI4x", handle, 0, os.SEEK_END))
    reply = fs.call(Op.COPY_FILE_RANGE, node, struct.pack("<7Q", handle, 0, other, target, 10, 20, 0))
    assert struct.unpack_from("<I", reply)[0] == 20 and (host / "b").read_bytes() == bytes(10) + b"x" * 20


def test_statfs(fs, host):
    numbers = fuse.KSTATFS.unpack(fs.call(Op.STATFS, ROOT))
    assert numbers[0] == os.statvfs(host).f_blocks and numbers[6] == 255


def test_set_user_id_bits_are_never_given(fs, host):
    node, _ = fs.create(ROOT, b"file", 0o6755)
    fs.setattr(node, fuse.SET_MODE, mode=0o6777)
    assert stat.S_IMODE((host / "file").stat().st_mode) == 0o777
    fs.mkdir(ROOT, b"dir", 0o2775)
    assert stat.S_IMODE((host / "dir").stat().st_mode) == 0o775


def test_owners(host, threaded):
    with Client(host, threaded, keep_owners=False).start().rig as rig:
        fs = Client.__new__(Client)
        fs.rig, fs.device, fs.unique = rig, rig.device, 0
        node, _ = fs.create(ROOT, b"file")
        assert (host / "file").stat().st_uid == os.geteuid()
        with fails(errno.EPERM):
            fs.setattr(node, fuse.SET_UID, uid=os.geteuid() + 1)
        fs.setattr(node, fuse.SET_UID, uid=os.geteuid())
    if os.geteuid():
        pytest.skip("keeping owners needs root")
    with Client(host, threaded, keep_owners=True).start().rig as rig:
        fs = Client.__new__(Client)
        fs.rig, fs.device, fs.unique = rig, rig.device, 0
        fs.call(Op.MKDIR, ROOT, struct.pack("<I4x", 0o755) + b"dir\0", uid=1234, gid=77)
        st = (host / "dir").stat()
        assert (st.st_uid, st.st_gid) == (1234, 77)
        fs.setattr(fs.lookup(ROOT, b"dir"), fuse.SET_GID, gid=88)
        assert ((host / "dir").stat().st_uid, (host / "dir").stat().st_gid) == (1234, 88)


# -- what must not be


@pytest.mark.parametrize("name", [b"..", b".", b"", b"a/b", b"/etc", b"../secret", b"x" * 256, b"a\0b"])
def test_names_that_are_paths_are_refused_everywhere(fs, host, name):
    node, _ = fs.create(ROOT, b"file")
    text = name + b"\0"
    for op, parent, body in (
        (Op.LOOKUP, ROOT, text),
        (Op.UNLINK, ROOT, text),
        (Op.RMDIR, ROOT, text),
        (Op.MKDIR, ROOT, bytes(8) + text),
        (Op.MKNOD, ROOT, struct.pack("<II8x", stat.S_IFREG, 0) + text),
        (Op.CREATE, ROOT, struct.pack("<II8x", os.O_RDWR, 0o644) + text),
        (Op.LINK, ROOT, struct.pack("<Q", node) + text),
        (Op.RENAME, ROOT, struct.pack("<Q", ROOT) + b"file\0" + text),
        (Op.RENAME, ROOT, struct.pack("<Q", ROOT) + text + b"new\0"),
        (Op.RENAME2, ROOT, struct.pack("<QI4x", ROOT, 0) + b"file\0" + text),
        (Op.SYMLINK, ROOT, text + b"target\0"),
    ):
        error, _ = fs.send(op, parent, body)
        assert error == errno.EINVAL, op
    assert [path.name for path in host.iterdir()] == ["file"]
    assert fs.device.driver_features and fs.rig.driver.status == 15


@pytest.mark.parametrize("target", ["../secret", "/etc/passwd", "../outside", "."])
def test_links_are_text_and_lead_nowhere(fs, host, target):
    (host / "link").symlink_to(target)
    node = fs.lookup(ROOT, b"link")
    assert fs.call(Op.READLINK, node) == target.encode()
    tries = ((Op.OPEN, bytes(8)), (Op.OPENDIR, bytes(8)), (Op.LOOKUP, b"file\0"), (Op.MKDIR, bytes(8) + b"x\0"))
    for op, body in tries:
        assert fs.send(op, node, body)[0] in (errno.EACCES, errno.ENOTDIR, errno.ELOOP)
    with fails(errno.EINVAL):
        fs.setattr(node, fuse.SET_SIZE, size=0)
    with pytest.raises(OSError):
        fs.setattr(node, fuse.SET_MODE, mode=0o777)
    assert fs.send(Op.CREATE, ROOT, struct.pack("<II8x", os.O_RDWR | os.O_TRUNC, 0o644) + b"link\0")[0] == errno.EACCES
    fs.setattr(node, fuse.SET_MTIME, mtime=5)
    assert (host / "link").lstat().st_mtime == 5 != (host.parent / "secret").stat().st_mtime
    assert (host.parent / "secret").read_text() == "secret"
    assert list((host.parent / "outside").iterdir()) == [host.parent / "outside" / "file"]


def test_a_directory_that_becomes_a_link_leads_nowhere(fs, host):
    """The host, or another guest, exchanges what we walked through before."""
    (host / "dir").mkdir()
    (host / "dir" / "file").write_text("inside")
    directory = fs.lookup(ROOT, b"dir")
    node = fs.lookup(directory, b"file")
    for number in range(folder.MAX_OPEN + 10):  # so that the descriptors are gone
        (host / f"{number}").touch()
        fs.lookup(ROOT, b"%d" % number)
    (host / "dir").rename(host.parent / "gone")
    (host / "dir").symlink_to("../outside")
    for op, where, body in (
        (Op.OPEN, node, bytes(8)),
        (Op.LOOKUP, directory, b"file\0"),
        (Op.GETATTR, node, bytes(16)),
        (Op.CREATE, directory, struct.pack("<II8x", os.O_RDWR, 0o644) + b"new\0"),
    ):
        assert fs.send(op, where, body)[0] in (errno.ESTALE, errno.ENOTDIR, errno.ELOOP)
    assert names(host.parent / "outside") == ["file"]


def test_a_name_that_is_exchanged_meanwhile_never_leads_out(fs, host):
    """A race: a link and a file take turns under one name while the guest opens it."""
    (host / "file").write_text("inside")
    (host / "spare").symlink_to("../secret")
    stop = threading.Event()

    def exchange():
        fd = os.open(host, os.O_RDONLY)
        while not stop.is_set():
            _host.rename(fd, b"file", fd, b"spare", 2)
        os.close(fd)

    other = threading.Thread(target=exchange)
    other.start()
    try:
        read = 0
        for _ in range(300):
            error, reply = fs.send(Op.LOOKUP, ROOT, b"file\0")
            assert not error
            node = struct.unpack_from("<Q", reply)[0]
            error, reply = fs.send(Op.OPEN, node, bytes(8))
            if error:
                assert error in (errno.EACCES, errno.ESTALE)
                continue
            handle = struct.unpack_from("<Q", reply)[0]
            assert fs.read(node, handle, 0, 100) == b"inside"
            fs.call(Op.RELEASE, node, struct.pack("<Q16x", handle))
            read += 1
    finally:
        stop.set()
        other.join()
    assert read > 0


def test_devices_and_pipes_are_not_opened(fs, host):
    os.mkfifo(host / "pipe")
    node = fs.lookup(ROOT, b"pipe")
    with fails(errno.EACCES):
        fs.open(node)
    for kind in (stat.S_IFCHR, stat.S_IFBLK, stat.S_IFLNK, 0):
        with fails(errno.EPERM):
            fs.call(Op.MKNOD, ROOT, struct.pack("<II8x", kind | 0o666, 0x103) + b"device\0")


def test_read_only(host, threaded):
    (host / "file").write_text("as it was")
    before = (host / "file").stat()
    fs = Client(host, threaded, readonly=True).start()
    with fs.rig:
        node = fs.lookup(ROOT, b"file")
        handle = fs.open(node, os.O_RDONLY)
        assert fs.read(node, handle, 0, 100) == b"as it was"
        file_io = struct.pack("<QQIIQII", handle, 0, 1, 0, 0, 0, 0)
        for op, where, body in (
            (Op.OPEN, node, OPEN_IN.pack(os.O_RDWR)),
            (Op.OPEN, node, OPEN_IN.pack(os.O_TRUNC)),
            (Op.WRITE, node, file_io + b"x"),
            (Op.CREATE, ROOT, struct.pack("<II8x", os.O_RDWR, 0o644) + b"new\0"),
            (Op.MKDIR, ROOT, bytes(8) + b"new\0"),
            (Op.MKNOD, ROOT, struct.pack("<II8x", stat.S_IFREG, 0) + b"new\0"),
            (Op.SYMLINK, ROOT, b"new\0target\0"),
            (Op.LINK, ROOT, struct.pack("<Q", node) + b"new\0"),
            (Op.UNLINK, ROOT, b"file\0"),
            (Op.RMDIR, ROOT, b"file\0"),
            (Op.RENAME, ROOT, struct.pack("<Q", ROOT) + b"file\0new\0"),
            (Op.RENAME2, ROOT, struct.pack("<QI4x", ROOT, 2) + b"file\0new\0"),
            (Op.SETATTR, node, struct.pack("<I84x", fuse.SET_MODE)),
            (Op.SETATTR, node, struct.pack("<I84x", 0)),
            (Op.FALLOCATE, node, struct.pack("<QQQI4x", handle, 0, 1, 0)),
            (Op.COPY_FILE_RANGE, node, struct.pack("<7Q", handle, 0, node, handle, 0, 1, 0)),
        ):
            assert fs.send(op, where, body)[0] == errno.EROFS, op
    assert names(host) == ["file"] and (host / "file").stat().st_mtime_ns == before.st_mtime_ns


def test_numbers_that_the_guest_does_not_have(fs):
    for node in (0, 2, 99, (1 << 64) - 1):
        for op, body in ((Op.GETATTR, bytes(16)), (Op.LOOKUP, b"x\0"), (Op.OPEN, bytes(8)), (Op.READLINK, b"")):
            assert fs.send(op, node, body)[0] == errno.ESTALE
    for op in (Op.READ, Op.WRITE, Op.READDIR, Op.READDIRPLUS):
        assert fs.send(op, ROOT, struct.pack("<QQIIQII", 77, 0, 0, 0, 0, 0, 0))[0] == errno.EBADF
    for op in (Op.RELEASE, Op.RELEASEDIR, Op.FLUSH, Op.FSYNC, Op.FSYNCDIR):
        assert fs.send(op, ROOT, struct.pack("<Q16x", 1 << 63))[0] == errno.EBADF
    for op in (0, 4096, 53, 1 << 31, 21, 22, 39):
        assert fs.send(op, ROOT, bytes(64))[0] == errno.ENOSYS


def test_requests_without_room(fs):
    for op in Op:
        for size in range(0, 40, 8):
            if op not in (Op.FORGET, Op.BATCH_FORGET, Op.INIT, Op.DESTROY):
                error, _ = fs.send(op, ROOT, bytes(size))
                assert 0 <= error < 200
    assert fs.rig.driver.status == 15
    for message, room in ((b"x" * 39, 100), (struct.pack("<I", 41).ljust(40, b"\0"), 100), (bytes(40), 100)):
        fs.rig.start()
        fs.rig.driver.queues[1].add([message], [room])
        fs.rig.driver.queues[1].kick()
        fs.rig.driver.wait(lambda: fs.rig.driver.status & 64)
    fs.start()
    fs.rig.driver.queues[1].add([struct.pack("<IIQQIII4x", 40, Op.STATFS, 1, 1, 0, 0, 0)], [15])
    fs.rig.driver.queues[1].kick()
    fs.rig.driver.wait(lambda: fs.rig.driver.status & 64)


def test_nothing_before_init_and_nothing_after_reset(fs, host):
    node, _ = fs.create(ROOT, b"file")
    fs.rig.start()
    assert fs.send(Op.GETATTR, ROOT, bytes(16))[0] == errno.EIO
    fs.start()
    assert fs.send(Op.GETATTR, node, bytes(16))[0] == errno.ESTALE
    assert fs.device.stats()["open_files"] == 0
    fs.call(Op.DESTROY, 0)
    assert fs.send(Op.GETATTR, ROOT, bytes(16))[0] == errno.EIO


def test_handles_and_nodes_are_bounded(fs, host, monkeypatch):
    monkeypatch.setattr(folder, "MAX_HANDLES", 10)
    monkeypatch.setattr(folder, "MAX_NODES", 20)
    node, _ = fs.create(ROOT, b"file")
    for _ in range(9):
        fs.open(node)
    actions = (lambda: fs.open(node), lambda: fs.create(ROOT, b"x"), lambda: fs.call(Op.OPENDIR, ROOT, bytes(8)))
    for action in actions:
        with fails(errno.ENFILE):
            action()
    for number in range(18):
        fs.mkdir(ROOT, b"%d" % number)
    with fails(errno.ENFILE):
        fs.mkdir(ROOT, b"one more")
    for _ in range(3):  # looked up twice, so given back twice
        fs.raw(struct.pack("<IIQQIII4x", 48, Op.FORGET, 0, node, 0, 0, 0) + struct.pack("<Q", 1), queue=0)
    ones = struct.pack("<I4x", 2) + struct.pack("<QQ", 3, 1) + struct.pack("<QQ", 4, 1 << 63)
    fs.raw(struct.pack("<IIQQIII4x", 40 + len(ones), Op.BATCH_FORGET, 0, 0, 0, 0, 0) + ones, queue=0)
    assert fs.device.stats()["known_files"] == 17
    before = len(names(Path("/proc/self/fd")))
    fs.rig.driver.reset()
    assert len(names(Path("/proc/self/fd"))) < before


def test_descriptors_are_bounded_and_come_back(fs, host, monkeypatch):
    monkeypatch.setattr(folder, "MAX_OPEN", 16)
    (host / "a" / "b" / "c").mkdir(parents=True)
    for number in range(100):
        (host / "a" / "b" / "c" / str(number)).write_text(str(number))
    deep = fs.lookup(fs.lookup(fs.lookup(ROOT, b"a"), b"b"), b"c")
    nodes = [fs.lookup(deep, b"%d" % number) for number in range(100)]
    fs.rename(ROOT, b"a", ROOT, b"z")
    assert len(fs.device.folder._open) <= 16
    for number, node in enumerate(nodes):
        handle = fs.open(node, os.O_RDONLY)
        assert fs.read(node, handle, 0, 10) == str(number).encode()
        fs.call(Op.RELEASE, node, struct.pack("<Q16x", handle))
    assert len(fs.device.folder._open) <= 16


def test_open_files_survive_a_restore(fs, host):
    directory = fs.mkdir(ROOT, b"dir")
    node, handle = fs.create(directory, b"file")
    fs.write(node, handle, 0, b"before")
    gone, _ = fs.create(ROOT, b"gone")
    state = fs.rig.transport.save()
    (host / "gone").unlink()
    fs.rig.driver.write(0x70, 0)
    fs.rig.transport.load(state)
    assert fs.read(node, handle, 0, 100) == b"before"
    fs.write(node, handle, 6, b" and after")
    assert (host / "dir" / "file").read_text() == "before and after"
    assert fs.send(Op.GETATTR, gone, bytes(16))[0] == errno.ESTALE
    state = fs.rig.transport.save()  # the rings have moved on
    inner = state["device"]
    for key, wrong in (
        ("nodes", b"x"),
        ("nodes", struct.pack("<QQQH", 5, 1, 1, 9) + b"../secret"),
        ("nodes", struct.pack("<QQQH", 1, 1, 1, 1) + b"x"),
        ("handles", b"x"),
        ("handles", struct.pack("<QQII", 1 << 63, 1, 0, 1)),
        ("handles", struct.pack("<QQII", 4, 1, 0, 1) * 2),
        ("mounted", 3),
    ):
        with pytest.raises(ValueError):
            fs.rig.transport.load({**state, "device": {**inner, key: wrong}})
    looping = struct.pack("<QQQH", 5, 6, 1, 1) + b"x" + struct.pack("<QQQH", 6, 5, 1, 1) + b"y"
    fs.rig.transport.load({**state, "device": {**inner, "nodes": looping, "handles": b""}})
    assert fs.send(Op.GETATTR, 5, bytes(16))[0] in (errno.ESTALE, errno.ELOOP)


class Twins:
    """The same operations through the device and on a reference folder."""

    def __init__(self, fs, twin):
        self.fs, self.twin = fs, twin
        self.nodes = {(): ROOT}

    def at(self, path):
        return self.twin.joinpath(*path)

    def both(self, action, mirror):
        """Do both: they must end alike."""
        results = []
        for call in (action, mirror):
            try:
                call()
                results.append(0)
            except OSError as reason:
                results.append(reason.errno)
        assert results[0] == results[1]

    def step(self, rng):
        fs, at = self.fs, self.at
        folders = [path for path in self.nodes if at(path).is_dir()]
        where = rng.choice(folders)
        name = rng.choice("abcdef")
        path, parent, data = (*where, name), self.nodes[where], name.encode()
        kind = rng.choice(["mkdir", "write", "write", "rename", "unlink", "rmdir", "truncate"])
        if kind == "mkdir" and len(where) < 4:
            self.both(lambda: fs.mkdir(parent, data), lambda: at(path).mkdir())
        elif kind == "write" and not at(path).is_dir():
            content, offset = rng.randbytes(rng.randrange(5000)), rng.randrange(5000)
            node, handle = fs.create(parent, data)
            fs.write(node, handle, offset, content)
            fs.call(Op.RELEASE, node, struct.pack("<Q16x", handle))
            with at(path).open("r+b" if at(path).exists() else "w+b") as file:
                file.seek(offset)
                file.write(content)
        elif kind == "truncate" and at(path).is_file():
            size = rng.randrange(6000)
            fs.setattr(fs.lookup(parent, data), fuse.SET_SIZE, size=size)
            os.truncate(at(path), size)
        elif kind == "unlink":
            self.both(lambda: fs.call(Op.UNLINK, parent, data + b"\0"), lambda: at(path).unlink())
        elif kind == "rmdir":
            self.both(lambda: fs.call(Op.RMDIR, parent, data + b"\0"), lambda: at(path).rmdir())
        elif kind == "rename":
            target, new = rng.choice(folders), rng.choice("abcdef")
            moved = (*target, new)
            self.both(
                lambda: fs.rename(parent, data, self.nodes[target], new.encode()), lambda: at(path).rename(at(moved))
            )

    def look_around(self):
        """As a guest does, which sees what went where."""
        self.nodes = {(): ROOT}
        for path in sorted(self.twin.rglob("*")):
            if path.is_dir():
                parts = path.relative_to(self.twin).parts
                self.nodes[parts] = self.fs.lookup(self.nodes[parts[:-1]], parts[-1].encode())


def test_random_work_is_what_the_host_would_do(fs, host, tmp_path):
    (tmp_path / "twin").mkdir()
    twins = Twins(fs, tmp_path / "twin")
    rng = random.Random(11)
    for _ in range(400):
        twins.step(rng)
        twins.look_around()

    def tree(top):
        return {path.relative_to(top): path.is_file() and path.read_bytes() for path in top.rglob("*")}

    assert tree(host) == tree(twins.twin) and len(tree(host)) > 3


def test_random_messages_harm_nothing(fs, host, tmp_path):
    rng = random.Random(12)
    (host / "dir").mkdir()
    (host / "file").write_bytes(bytes(5000))
    (host / "link").symlink_to("../secret")
    forms = [bytes(rng.choice([0, 4, 8, 16, 24, 40, 88])) for _ in range(20)]
    outside = sorted(str(path) for path in tmp_path.rglob("*") if host not in path.parents)
    for number in range(1500):
        if number % 300 == 0:
            fs.start()
        body = bytearray(rng.choice(forms))
        for _ in range(rng.randrange(4)):
            if len(body) >= 8:
                value = rng.choice([0, 1, 2, 3, 7, 1 << 32, 1 << 63, (1 << 64) - 1, rng.getrandbits(64)])
                struct.pack_into("<Q", body, rng.randrange(len(body) // 8) * 8, value)
        tail = rng.choice([b"", b"file\0", b"dir\0", b"link\0", b"..\0", b"a\0b\0", b"../secret\0", rng.randbytes(30)])
        op = rng.choice([*Op, rng.randrange(64)])
        if op in (Op.DESTROY, Op.FORGET, Op.BATCH_FORGET, Op.INIT):
            continue
        error, _ = fs.send(op, rng.choice([0, 1, 1, 2, 3, 4, rng.getrandbits(64)]), bytes(body) + tail)
        assert 0 <= error < 200
    assert fs.rig.driver.status == 15
    assert sorted(str(path) for path in tmp_path.rglob("*") if host not in path.parents) == outside
    assert (tmp_path / "secret").read_text() == "secret"


@pytest.mark.parametrize("tag", ["", "x" * 37, "a\0b"])
def test_tags_that_cannot_be(host, tag):
    with pytest.raises(ValueError, match="a tag has"):
        SharedFolder(host, tag)


def test_a_folder_that_is_none(host):
    (host / "file").touch()
    with pytest.raises(NotADirectoryError):
        SharedFolder(host / "file", "tag")
    with pytest.raises(FileNotFoundError):
        SharedFolder(host / "none", "tag")
