# SPDX-License-Identifier: Apache-2.0
"""File system device, virtio 1.2 section 5.11: a folder of the host, for the guest's `mount -t virtiofs TAG DIR`.

The requests are FUSE's (fuse.py), the files those of a `Folder`. Data goes between file and guest memory without a copy
and without the GIL. No DAX window, no extended attributes, and locks hold within the guest only.
"""

from __future__ import annotations

import errno
import os
import struct
import time
from collections.abc import Callable
from typing import Any

from kvmpy.devices.base import StateReader
from kvmpy.virtio import _host, fuse
from kvmpy.virtio._queue import IDLE, MORE, Chain
from kvmpy.virtio.device import VirtioDevice
from kvmpy.virtio.folder import ROOT, Folder, error
from kvmpy.virtio.fuse import Op

HIGH_PRIORITY, REQUESTS = 0, 1
TAG_SIZE = 36
QUEUE_SIZE = 512  # a request of 1 MiB is 256 pages and a few more pieces
BATCH = 16
MAX_BODY = 1 << 16  # of a request without data
VALID = 1  # seconds for which the guest may believe names and attributes
FALLOCATE_MODES = 0x01 | 0x02 | 0x10  # KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE
COPY_MOST = 8 << 20  # bytes of one COPY_FILE_RANGE: the guest asks again for the rest
SILENT = {Op.FORGET, Op.BATCH_FORGET}

Handler = Callable[["SharedFolder", "Request"], bytes]


class Request:
    """A request: its header, copied once and checked, and the body of those that carry no data."""

    __slots__ = ("body", "chain", "gid", "node", "opcode", "uid", "unique")

    def __init__(self, chain: Chain) -> None:
        header = chain.read(0, fuse.IN_HEADER.size)
        if len(header) < fuse.IN_HEADER.size:
            raise fuse.ProtocolError("a request without a header")
        size, self.opcode, self.unique, self.node, self.uid, self.gid, _ = fuse.IN_HEADER.unpack(header)
        if not fuse.IN_HEADER.size <= size <= chain.readable:
            raise fuse.ProtocolError("a request that is longer than its buffers")
        self.chain = chain
        most = fuse.IO_IN.size if self.opcode == Op.WRITE else MAX_BODY
        self.body = chain.read(fuse.IN_HEADER.size, min(size - fuse.IN_HEADER.size, most))

    @property
    def owner(self) -> tuple[int, int]:
        """Who asks, in the guest."""
        return self.uid, self.gid

    def unpack(self, form: struct.Struct) -> tuple[Any, ...]:
        """The numbers that the body begins with. Raises ProtocolError when it is shorter."""
        if len(self.body) < form.size:
            raise fuse.ProtocolError("a request that is too short")
        return form.unpack_from(self.body)

    def room(self, wanted: int) -> int:
        """Bytes that may be answered, at most `wanted`."""
        return max(0, min(wanted, self.chain.writable - fuse.OUT_HEADER.size, fuse.MAX_TRANSFER))


class SharedFolder(VirtioDevice):
    """A folder of the host for the guest.

    path: the folder; everything below it, and nothing else, can be reached. tag: what the guest mounts, up to 36 bytes.
    readonly: the guest changes nothing. keep_owners: files belong to the guest's users (needs root on the host, and
    is the default there), else to who runs this. Set-user-id and set-group-id bits are never given to a file.
    """

    device_id = 26

    def __init__(
        self,
        path: str | os.PathLike[str],
        tag: str,
        *,
        readonly: bool = False,
        keep_owners: bool | None = None,
        name: str = "fs",
        threaded: bool = True,
    ) -> None:
        data = tag.encode()
        if not 1 <= len(data) <= TAG_SIZE or b"\0" in data:
            raise ValueError(f"a tag has 1 to {TAG_SIZE} bytes, not {tag!r}")
        self.tag = tag
        if keep_owners is None:
            keep_owners = os.geteuid() == 0
        self.folder = Folder(path, readonly=readonly, keep_owners=keep_owners)
        self._mounted = False
        self._counts = {"reads": 0, "read_bytes": 0, "writes": 0, "written_bytes": 0, "errors": 0}
        config = data.ljust(TAG_SIZE, b"\0") + struct.pack("<I", 1)
        super().__init__(name, [QUEUE_SIZE] * 2, 0, config, threaded=threaded)

    # -- life

    def was_reset(self) -> None:
        """Nothing is mounted."""
        self._mounted = False
        self.folder.reset()

    def close(self) -> None:
        """Stop and close all files."""
        super().close()
        self.folder.close()

    def save_device(self) -> dict[str, Any]:
        """The files that the guest knows and has open, by name: after a restore they are looked for again."""
        nodes, handles = self.folder.save()
        packed = b"".join(struct.pack("<QQQH", *numbers, len(name)) + name for *numbers, name in nodes)
        return {
            "version": 1,
            "mounted": self._mounted,
            "nodes": packed,
            "handles": b"".join(struct.pack("<QQII", *handle) for handle in handles),
        }

    def load_device(self, state: dict[str, Any]) -> None:
        """Raises ValueError."""
        reader = StateReader(self.name, state)
        mounted = reader.flag("mounted")
        data = reader.data("nodes", 0, 1 << 28)
        handles = reader.data("handles", 0, 1 << 20)
        reader.end()
        nodes = []
        while data:
            try:
                number, parent, lookups, size = struct.unpack_from("<QQQH", data)
            except struct.error as reason:
                raise ValueError(f"{self.name}: saved files are cut off") from reason
            nodes.append((number, parent, lookups, data[26 : 26 + size]))
            data = data[26 + size :]
        if len(handles) % 24:
            raise ValueError(f"{self.name}: saved handles are cut off")
        self.folder.load(nodes, list(struct.iter_unpack("<QQII", handles)))
        self._mounted = mounted

    def stats(self) -> dict[str, Any]:
        """Live counters by name."""
        sizes = {"open_files": len(self.folder.handles), "known_files": len(self.folder.nodes)}
        return {**super().stats(), **self._counts, **sizes}

    # -- requests

    def serve(self, index: int) -> int:
        """A batch of one queue; the high-priority queue has the same requests, of which Linux sends FORGET there."""
        queue = self.queues[index]
        for _ in range(BATCH):
            chain = queue.pop()
            if chain is None:
                return IDLE
            try:
                self._answer(Request(chain))
            except fuse.ProtocolError as reason:
                queue.fail(str(reason), chain.readable)
                return IDLE
            queue.push(chain)
        return MORE

    def _answer(self, request: Request) -> None:
        handler = HANDLERS.get(request.opcode)
        reply, failure = b"", 0
        try:
            if handler is None:
                raise error(errno.ENOSYS)
            if not self._mounted and request.opcode != Op.INIT:
                raise error(errno.EIO)
            reply = handler(self, request)
        except OSError as reason:
            failure = reason.errno or errno.EIO
            self._counts["errors"] += 1
        except (ValueError, OverflowError):
            failure = errno.EINVAL  # numbers and names that no file has
            self._counts["errors"] += 1
        if request.opcode in SILENT:
            return
        chain = request.chain
        if chain.writable < fuse.OUT_HEADER.size:
            raise fuse.ProtocolError("a request without room for the answer")
        if failure:
            reply = b""
        done = len(reply)
        if request.opcode == Op.READ and not failure:
            done = int.from_bytes(reply, "little")  # the data is there already
        elif done > chain.writable - fuse.OUT_HEADER.size:
            raise fuse.ProtocolError("a request without room for the answer")
        chain.write(fuse.OUT_HEADER.pack(fuse.OUT_HEADER.size + done, -failure, request.unique))
        if request.opcode != Op.READ:
            chain.write(reply, fuse.OUT_HEADER.size)

    # -- answers

    def _entry(self, number: int, st: os.stat_result | None = None) -> bytes:
        """struct fuse_entry_out of a node that was just looked up."""
        if st is None:
            st = self.folder.stat(number)
        return fuse.ENTRY.pack(number, 0, VALID, VALID, 0, 0) + fuse.attr(st)

    def _attributes(self, st: os.stat_result) -> bytes:
        return fuse.ATTR_OUT.pack(VALID, 0) + fuse.attr(st)

    def _init(self, request: Request) -> bytes:
        major, minor, read_ahead, flags = request.unpack(fuse.INIT_IN)
        if major < fuse.MAJOR or (major == fuse.MAJOR and minor < fuse.OLDEST_MINOR):
            raise error(errno.EPROTO)
        if major == fuse.MAJOR:  # else it asks again with our version
            self.folder.reset()
            self._mounted = True
        return fuse.INIT_OUT.pack(
            fuse.MAJOR, min(minor, fuse.MINOR) if major == fuse.MAJOR else fuse.MINOR, read_ahead, flags & fuse.FLAGS,
            64, 48, fuse.MAX_TRANSFER, 1, fuse.MAX_PAGES_VALUE, 0, 0,
        )  # fmt: skip

    def _destroy(self, request: Request) -> bytes:
        self.folder.reset()
        self._mounted = False
        return b""

    def _lookup(self, request: Request) -> bytes:
        return self._entry(*self.folder.lookup(request.node, fuse.name(request.body)))

    def _forget(self, request: Request) -> bytes:
        self.folder.forget(request.node, *request.unpack(fuse.U64))
        return b""

    def _batch_forget(self, request: Request) -> bytes:
        count = request.unpack(fuse.OPEN_IN)[0]
        room = (len(request.body) - fuse.OPEN_IN.size) // fuse.FORGET_ONE.size
        for index in range(min(count, room)):
            at = fuse.OPEN_IN.size + index * fuse.FORGET_ONE.size
            self.folder.forget(*fuse.FORGET_ONE.unpack_from(request.body, at))
        return b""

    def _getattr(self, request: Request) -> bytes:
        flags, handle = request.unpack(fuse.GETATTR_IN)
        if flags & 1 and handle in self.folder.handles:  # also when its last name is gone
            return self._attributes(os.fstat(self.folder.handles[handle].fd))
        return self._attributes(self.folder.stat(request.node))

    def _setattr(self, request: Request) -> bytes:
        folder, node = self.folder, request.node
        valid, handle, size, *rest = request.unpack(fuse.SETATTR_IN)
        atime, mtime, _, atime_ns, mtime_ns, _, mode, uid, gid = rest
        folder.writable()
        if valid & fuse.SET_MODE:
            folder.set_mode(node, mode)
        if valid & (fuse.SET_UID | fuse.SET_GID):
            folder.set_owner(node, uid if valid & fuse.SET_UID else -1, gid if valid & fuse.SET_GID else -1)
        if valid & fuse.SET_SIZE:
            folder.set_size(node, size, handle if valid & fuse.SET_FH else None)
        if valid & (fuse.SET_ATIME | fuse.SET_MTIME):
            now = time.time_ns()
            wanted_a = now if valid & fuse.SET_ATIME_NOW else atime * 10**9 + atime_ns
            wanted_m = now if valid & fuse.SET_MTIME_NOW else mtime * 10**9 + mtime_ns
            folder.set_times(
                node, wanted_a if valid & fuse.SET_ATIME else None, wanted_m if valid & fuse.SET_MTIME else None
            )
        return self._attributes(folder.stat(node))

    def _readlink(self, request: Request) -> bytes:
        return self.folder.readlink(request.node)

    def _symlink(self, request: Request) -> bytes:
        name, _, target = request.body.partition(b"\0")
        if not target.endswith(b"\0") or b"\0" in target[:-1]:
            raise error(errno.EINVAL)
        return self._entry(self.folder.symlink(request.node, fuse.name(name + b"\0"), target[:-1], request.owner))

    def _mknod(self, request: Request) -> bytes:
        mode, _ = request.unpack(fuse.MKNOD_IN)
        name = fuse.name(request.body[fuse.MKNOD_IN.size :])
        return self._entry(self.folder.make(request.node, name, mode, request.owner))

    def _mkdir(self, request: Request) -> bytes:
        mode = request.unpack(fuse.MKDIR_IN)[0]
        name = fuse.name(request.body[fuse.MKDIR_IN.size :])
        return self._entry(self.folder.make(request.node, name, 0o40000 | mode & 0o7777, request.owner))

    def _unlink(self, request: Request) -> bytes:
        self.folder.unlink(request.node, fuse.name(request.body))
        return b""

    def _rmdir(self, request: Request) -> bytes:
        self.folder.unlink(request.node, fuse.name(request.body), directory=True)
        return b""

    def _rename(self, request: Request) -> bytes:
        parent = request.unpack(fuse.U64)[0]
        old, new = fuse.two_names(request.body[fuse.U64.size :])
        self.folder.rename(request.node, old, parent, new, 0)
        return b""

    def _rename2(self, request: Request) -> bytes:
        parent, flags = request.unpack(fuse.RENAME2_IN)
        old, new = fuse.two_names(request.body[fuse.RENAME2_IN.size :])
        self.folder.rename(request.node, old, parent, new, flags)
        return b""

    def _link(self, request: Request) -> bytes:
        old = request.unpack(fuse.U64)[0]
        return self._entry(self.folder.link(old, request.node, fuse.name(request.body[fuse.U64.size :])))

    def _open(self, request: Request) -> bytes:
        flags = request.unpack(fuse.OPEN_IN)[0]
        return fuse.OPEN_OUT.pack(self.folder.open(request.node, flags), 0)

    def _create(self, request: Request) -> bytes:
        flags, mode = request.unpack(fuse.CREATE_IN)
        name = fuse.name(request.body[fuse.CREATE_IN.size :])
        number, handle = self.folder.create(request.node, name, flags, mode, request.owner)
        return self._entry(number) + fuse.OPEN_OUT.pack(handle, 0)

    def _read(self, request: Request) -> bytes:
        handle, position, size, _ = request.unpack(fuse.IO_IN)
        fd = self.folder.handle(handle).fd
        request.chain.write(bytes(fuse.OUT_HEADER.size))  # what is told as written has no gap before the data
        done = request.chain.read_file(fd, position, fuse.OUT_HEADER.size, request.room(size))
        self._counts["reads"] += 1
        self._counts["read_bytes"] += done
        return done.to_bytes(8, "little")

    def _write(self, request: Request) -> bytes:
        handle, position, size, _ = request.unpack(fuse.IO_IN)
        self.folder.writable()
        fd = self.folder.handle(handle).fd
        data_at = fuse.IN_HEADER.size + fuse.IO_IN.size
        if size > fuse.MAX_TRANSFER or size > request.chain.readable - data_at:
            raise error(errno.EINVAL)
        done = request.chain.write_file(fd, position, data_at, size)
        self._counts["writes"] += 1
        self._counts["written_bytes"] += done
        return struct.pack("<I4x", done)

    def _statfs(self, request: Request) -> bytes:
        st = os.statvfs(self.folder.path(request.node if request.node in self.folder.nodes else ROOT))
        blocks = (st.f_blocks, st.f_bfree, st.f_bavail, st.f_files, st.f_ffree)
        return fuse.KSTATFS.pack(*blocks, st.f_bsize, st.f_namemax, st.f_frsize)

    def _release(self, request: Request) -> bytes:
        self.folder.release(request.unpack(fuse.RELEASE_IN)[0])
        return b""

    def _release_directory(self, request: Request) -> bytes:
        self.folder.release(request.unpack(fuse.RELEASE_IN)[0], directory=True)
        return b""

    def _flush(self, request: Request) -> bytes:
        # close(2) of a copy tells errors that some file systems keep for it.
        os.close(os.dup(self.folder.handle(request.unpack(fuse.RELEASE_IN)[0]).fd))
        return b""

    def _fsync(self, request: Request) -> bytes:
        handle, flags = request.unpack(fuse.FSYNC_IN)
        fd = self.folder.handle(handle).fd
        (os.fdatasync if flags & 1 else os.fsync)(fd)
        return b""

    def _fsync_directory(self, request: Request) -> bytes:
        os.fsync(self.folder.handle(request.unpack(fuse.FSYNC_IN)[0], directory=True).fd)
        return b""

    def _open_directory(self, request: Request) -> bytes:
        return fuse.OPEN_OUT.pack(self.folder.open(request.node, 0, directory=True), 0)

    def _read_directory(self, request: Request) -> bytes:
        return self._entries(request, plus=False)

    def _read_directory_plus(self, request: Request) -> bytes:
        return self._entries(request, plus=True)

    def _entries(self, request: Request, *, plus: bool) -> bytes:
        handle, offset, size, _ = request.unpack(fuse.IO_IN)
        room = request.room(size)
        directory = self.folder.handle(handle, directory=True).node
        reply = b""
        for ino, following, kind, name in self.folder.entries(handle, offset, max(512, room)):
            entry, looked_up = b"", 0
            if plus:
                entry = bytes(fuse.ENTRY.size + fuse.ATTR.size)  # node 0: nothing was looked up
                if name not in (b".", b".."):
                    try:
                        looked_up, st = self.folder.lookup(directory, name)
                        entry = self._entry(looked_up, st)
                    except OSError:  # it went meanwhile, or cannot be opened: then without
                        looked_up = 0
            record = fuse.dirent(ino, following, kind, name, entry)
            if len(reply) + len(record) > room:
                if looked_up:
                    self.folder.forget(looked_up, 1)
                break
            reply += record
        return reply

    def _fallocate(self, request: Request) -> bytes:
        handle, offset, size, mode = request.unpack(fuse.FALLOCATE_IN)
        self.folder.writable()
        if mode & ~FALLOCATE_MODES:
            raise error(errno.EOPNOTSUPP)
        _host.allocate(self.folder.handle(handle).fd, mode, offset, size)
        return b""

    def _lseek(self, request: Request) -> bytes:
        handle, offset, whence = request.unpack(fuse.LSEEK_IN)
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):  # the guest knows its position itself
            raise error(errno.EINVAL)
        return fuse.U64.pack(os.lseek(self.folder.handle(handle).fd, offset, whence))

    def _copy(self, request: Request) -> bytes:
        handle, offset, _, target, target_offset, size, flags = request.unpack(fuse.COPY_IN)
        self.folder.writable()
        if flags:
            raise error(errno.EINVAL)
        source = self.folder.handle(handle).fd
        target_fd = self.folder.handle(target).fd
        done = os.copy_file_range(source, target_fd, min(size, COPY_MOST), offset, target_offset)
        return struct.pack("<I4x", done)


HANDLERS: dict[int, Handler] = {
    Op.INIT: SharedFolder._init, Op.DESTROY: SharedFolder._destroy, Op.LOOKUP: SharedFolder._lookup,
    Op.FORGET: SharedFolder._forget, Op.BATCH_FORGET: SharedFolder._batch_forget,
    Op.GETATTR: SharedFolder._getattr, Op.SETATTR: SharedFolder._setattr, Op.STATFS: SharedFolder._statfs,
    Op.READLINK: SharedFolder._readlink, Op.SYMLINK: SharedFolder._symlink, Op.MKNOD: SharedFolder._mknod,
    Op.MKDIR: SharedFolder._mkdir, Op.UNLINK: SharedFolder._unlink, Op.RMDIR: SharedFolder._rmdir,
    Op.RENAME: SharedFolder._rename, Op.RENAME2: SharedFolder._rename2, Op.LINK: SharedFolder._link,
    Op.OPEN: SharedFolder._open, Op.CREATE: SharedFolder._create, Op.READ: SharedFolder._read,
    Op.WRITE: SharedFolder._write, Op.RELEASE: SharedFolder._release, Op.FLUSH: SharedFolder._flush,
    Op.FSYNC: SharedFolder._fsync, Op.OPENDIR: SharedFolder._open_directory,
    Op.READDIR: SharedFolder._read_directory, Op.READDIRPLUS: SharedFolder._read_directory_plus,
    Op.RELEASEDIR: SharedFolder._release_directory, Op.FSYNCDIR: SharedFolder._fsync_directory,
    Op.FALLOCATE: SharedFolder._fallocate, Op.LSEEK: SharedFolder._lseek, Op.COPY_FILE_RANGE: SharedFolder._copy,
}  # fmt: skip
