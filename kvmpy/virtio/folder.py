# SPDX-License-Identifier: Apache-2.0
"""A folder of the host as the files behind FUSE's node numbers and file handles. Nothing leaves the folder.

Every access goes from a directory that is open already to one name in it, without following a link: a name is never a
path, never "..", and a symbolic link is only ever read as text, for the guest to follow on its own side. So there is
nothing to race against: whatever the host or the guest exchange meanwhile, the walk cannot leave the tree. Only regular
files and directories are opened; devices, pipes and sockets are seen, not touched.

A node keeps an O_PATH descriptor, but only `MAX_OPEN` of them do; a node that lost it is walked to again from the
root, by the name under which it was last seen, and must be the same file.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvmpy.virtio import _host

ROOT = 1
MAX_NODES = 1 << 18
MAX_HANDLES = 1024
MAX_OPEN = 512
MAX_DEPTH = 256

PATH_FLAGS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
OPEN_FLAGS = os.O_ACCMODE | os.O_APPEND | os.O_SYNC | os.O_DSYNC  # what a guest may ask for
SPECIAL_BITS = stat.S_ISUID | stat.S_ISGID  # never given: they would be the host user's


def error(number: int) -> OSError:
    """An OSError with the words for it."""
    return OSError(number, os.strerror(number))


@dataclass(slots=True)
class Node:
    """A file that the guest knows: where it was last seen, which file that is, how often the guest looked it up."""

    number: int
    parent: int
    name: bytes
    key: tuple[int, int]
    kind: int  # S_IFMT of its mode
    lookups: int = 0


@dataclass(slots=True)
class Handle:
    """An open file or directory."""

    fd: int
    node: int
    flags: int
    directory: bool


class Folder:
    """The folder `path`; readonly: nothing in it is changed. Raises OSError when it cannot be opened.

    keep_owners: new files belong to the guest's user, and the guest may change owners (needs root on the host); else
    all belong to who runs this. For one thread.
    """

    def __init__(self, path: str | os.PathLike[str], *, readonly: bool = False, keep_owners: bool = False) -> None:
        self.readonly = readonly
        self.keep_owners = keep_owners
        # The one place where links are followed: it is the host's own choice.
        self._root = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self.nodes: dict[int, Node] = {}
        self.handles: dict[int, Handle] = {}
        self._by_key: dict[tuple[int, int], int] = {}
        self._open: OrderedDict[int, int] = OrderedDict()  # node -> O_PATH descriptor, the latest used last
        self._next_node = ROOT + 1
        self._next_handle = 1
        self.reset()

    def reset(self) -> None:
        """Forget all nodes and close all handles; the root stays."""
        for handle in self.handles.values():
            os.close(handle.fd)
        for fd in self._open.values():
            os.close(fd)
        self.handles.clear()
        self._open.clear()
        st = os.fstat(self._root)
        root = Node(ROOT, ROOT, b"", (st.st_dev, st.st_ino), stat.S_IFDIR, 1)
        self.nodes = {ROOT: root}
        self._by_key = {root.key: ROOT}

    def close(self) -> None:
        """Close everything; again is no error."""
        if self._root >= 0:
            self.reset()
            os.close(self._root)
            self._root = -1

    # -- nodes

    def node(self, number: int) -> Node:
        """Raises OSError (ESTALE) for a number that the guest does not have."""
        node = self.nodes.get(number)
        if node is None:
            raise error(errno.ESTALE)
        return node

    def fd(self, number: int) -> int:
        """The O_PATH descriptor of a node; good until many others were asked for."""
        if number == ROOT:
            return self._root
        fd = self._open.get(number)
        if fd is not None:
            self._open.move_to_end(number)
            return fd
        node = self.node(number)
        fd = self._walk(node)
        st = os.fstat(fd)
        if (st.st_dev, st.st_ino) != node.key or stat.S_IFMT(st.st_mode) != node.kind:
            os.close(fd)
            raise error(errno.ESTALE)
        self._keep(number, fd)
        return fd

    def _keep(self, number: int, fd: int) -> None:
        self._open[number] = fd
        if len(self._open) > MAX_OPEN:
            os.close(self._open.popitem(last=False)[1])

    def _walk(self, node: Node) -> int:
        """Open a node by the names that lead to it, from the nearest directory that is open."""
        names = []
        number = node.number
        while number != ROOT and number not in self._open:
            step = self.node(number)
            names.append(step.name)
            number = step.parent
            if len(names) > MAX_DEPTH:
                raise error(errno.ELOOP)
        base = self._root if number == ROOT else self._open[number]
        fd = -1
        try:
            for name in reversed(names):
                following = os.open(name, PATH_FLAGS, dir_fd=base if fd < 0 else fd)
                if fd >= 0:
                    os.close(fd)
                fd = following
        except OSError as reason:
            if fd >= 0:
                os.close(fd)
            # The host moved it away.
            raise error(errno.ESTALE if reason.errno in (errno.ENOENT, errno.ENOTDIR) else reason.errno or 0) from None
        return fd

    def path(self, number: int) -> str:
        """A path for calls that take no descriptor: it leads to the very file, whatever its names are."""
        return f"/proc/self/fd/{self.fd(number)}"

    def lookup(self, parent: int, name: bytes, *, count: bool = True) -> tuple[int, os.stat_result]:
        """The node of `name` in a directory, which the guest has once more now. Raises OSError."""
        fd = os.open(name, PATH_FLAGS, dir_fd=self.directory(parent))
        try:
            st = os.fstat(fd)
            number = self._by_key.get((st.st_dev, st.st_ino))
            if number is None:
                if len(self.nodes) >= MAX_NODES:
                    raise error(errno.ENFILE)
                number = self._next_node
                self._next_node += 1
                self.nodes[number] = Node(number, parent, name, (st.st_dev, st.st_ino), stat.S_IFMT(st.st_mode))
                self._by_key[st.st_dev, st.st_ino] = number
                self._keep(number, fd)
                fd = -1
        finally:
            if fd >= 0:
                os.close(fd)
        node = self.nodes[number]
        if number != ROOT:
            node.parent, node.name = parent, name
        node.lookups += 1
        return number, st

    def forget(self, number: int, count: int) -> None:
        """The guest gives back `count` lookups."""
        node = self.nodes.get(number)
        if node is None or number == ROOT:
            return
        node.lookups -= min(count, node.lookups)
        if not node.lookups:
            del self.nodes[number]
            self._by_key.pop(node.key, None)
            fd = self._open.pop(number, None)
            if fd is not None:
                os.close(fd)

    def directory(self, number: int) -> int:
        """The descriptor of a node that must be a directory."""
        if self.node(number).kind != stat.S_IFDIR:
            raise error(errno.ENOTDIR)
        return self.fd(number)

    def stat(self, number: int) -> os.stat_result:
        """Raises OSError."""
        return os.fstat(self.fd(number))

    def writable(self) -> None:
        """Raises OSError (EROFS) when the folder is shared read-only."""
        if self.readonly:
            raise error(errno.EROFS)

    # -- open files

    def handle(self, number: int, *, directory: bool = False) -> Handle:
        """Raises OSError (EBADF)."""
        handle = self.handles.get(number)
        if handle is None or handle.directory != directory:
            raise error(errno.EBADF)
        return handle

    def _add_handle(self, fd: int, node: int, flags: int, directory: bool) -> int:
        number = self._next_handle
        self._next_handle += 1
        self.handles[number] = Handle(fd, node, flags, directory)
        return number

    def _room_for_handle(self) -> None:
        if len(self.handles) >= MAX_HANDLES:
            raise error(errno.ENFILE)

    def open(self, number: int, flags: int, *, directory: bool = False) -> int:
        """Open a file or directory; a handle. Raises OSError."""
        kind = self.node(number).kind
        if directory:
            if kind != stat.S_IFDIR:
                raise error(errno.ENOTDIR)
            flags = os.O_RDONLY | os.O_DIRECTORY
        else:
            if kind != stat.S_IFREG:
                raise error(errno.EISDIR if kind == stat.S_IFDIR else errno.EACCES)
            flags &= OPEN_FLAGS | os.O_TRUNC
            if flags & (os.O_ACCMODE | os.O_TRUNC):
                self.writable()
        self._room_for_handle()
        fd = os.open(self.path(number), flags | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
        return self._add_handle(fd, number, flags & ~os.O_TRUNC, directory)

    def release(self, number: int, *, directory: bool = False) -> None:
        """Close a handle."""
        os.close(self.handle(number, directory=directory).fd)
        del self.handles[number]

    # -- changes

    def create(self, parent: int, name: bytes, flags: int, mode: int, owner: tuple[int, int]) -> tuple[int, int]:
        """Create (or, without O_EXCL, open) a regular file; (node, handle)."""
        self.writable()
        self._room_for_handle()
        fd = -1
        try:
            base = self.directory(parent)
            wanted = flags & OPEN_FLAGS | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(name, wanted, mode & 0o1777, dir_fd=base)
        except FileExistsError:
            if flags & os.O_EXCL:
                raise
        if fd < 0:  # it is there: what it is decides
            number, _ = self.lookup(parent, name)
            try:
                return number, self.open(number, flags)
            except OSError:
                self.forget(number, 1)
                raise
        try:
            if self.keep_owners:
                os.fchown(fd, *owner)
            os.fchmod(fd, mode & 0o1777)  # whatever our umask left of it: the guest's was applied there
            number, st = self.lookup(parent, name)
            own = os.fstat(fd)
            if (st.st_dev, st.st_ino) != (own.st_dev, own.st_ino):  # the host put another file there meanwhile
                self.forget(number, 1)
                raise error(errno.ESTALE)
        except BaseException:
            os.close(fd)
            raise
        return number, self._add_handle(fd, number, flags & OPEN_FLAGS, False)

    def make(self, parent: int, name: bytes, mode: int, owner: tuple[int, int]) -> int:
        """Make a directory, an empty file, a pipe or a socket by `mode`; its node. Devices are refused (EPERM)."""
        self.writable()
        base = self.directory(parent)
        kind = stat.S_IFMT(mode)
        if kind == stat.S_IFDIR:
            os.mkdir(name, mode & 0o1777, dir_fd=base)
        elif kind in (stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK):
            os.mknod(name, kind | mode & 0o1777, dir_fd=base)
        else:
            raise error(errno.EPERM)
        return self._made(parent, name, owner, mode)

    def symlink(self, parent: int, name: bytes, target: bytes, owner: tuple[int, int]) -> int:
        """Make a symbolic link, whose text may be anything; its node."""
        self.writable()
        os.symlink(target, name, dir_fd=self.directory(parent))
        return self._made(parent, name, owner)

    def link(self, number: int, parent: int, name: bytes) -> int:
        """Give a file one more name; its node."""
        self.writable()
        if self.node(number).kind == stat.S_IFDIR:
            raise error(errno.EPERM)
        base = self.directory(parent)
        os.link(self.path(number), name, dst_dir_fd=base, follow_symlinks=True)  # follows the path to the descriptor
        return self.lookup(parent, name)[0]

    def _made(self, parent: int, name: bytes, owner: tuple[int, int], mode: int | None = None) -> int:
        number, _ = self.lookup(parent, name)
        if self.keep_owners:
            os.chown(self.path(number), *owner)
        if mode is not None:
            Path(self.path(number)).chmod(mode & 0o1777)  # whatever our umask left of it
        return number

    def unlink(self, parent: int, name: bytes, *, directory: bool = False) -> None:
        """Remove a name."""
        self.writable()
        base = self.directory(parent)
        (os.rmdir if directory else os.unlink)(name, dir_fd=base)

    def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int) -> None:
        """Move a name; flags: RENAME_NOREPLACE or RENAME_EXCHANGE of renameat2(2)."""
        self.writable()
        if flags not in (0, 1, 2):
            raise error(errno.EINVAL)
        moved = self._seen_as(parent, name)
        other = self._seen_as(new_parent, new_name)
        target = self.directory(new_parent)
        _host.rename(self.directory(parent), name, target, new_name, flags)
        if moved is not None:
            moved.parent, moved.name = new_parent, new_name
        if other is not None and flags == 2:
            other.parent, other.name = parent, name

    def _seen_as(self, parent: int, name: bytes) -> Node | None:
        try:
            st = os.stat(name, dir_fd=self.directory(parent), follow_symlinks=False)
        except FileNotFoundError:
            return None
        return self.nodes.get(self._by_key.get((st.st_dev, st.st_ino), 0))

    def set_mode(self, number: int, mode: int) -> None:
        """Permissions; set-user-id and set-group-id are left out."""
        self.writable()
        Path(self.path(number)).chmod(stat.S_IMODE(mode) & ~SPECIAL_BITS)

    def set_owner(self, number: int, uid: int, gid: int) -> None:
        """-1: as it is. EPERM unless the folder keeps owners."""
        self.writable()
        st = self.stat(number)
        if not self.keep_owners and (uid not in (-1, st.st_uid) or gid not in (-1, st.st_gid)):
            raise error(errno.EPERM)
        if self.keep_owners:
            os.chown(self.path(number), uid, gid)

    def set_size(self, number: int, size: int, handle: int | None) -> None:
        """Bytes of a regular file."""
        self.writable()
        if self.node(number).kind != stat.S_IFREG:
            raise error(errno.EINVAL)
        if handle is not None:
            os.ftruncate(self.handle(handle).fd, size)
        else:
            os.truncate(self.path(number), size)

    def set_times(self, number: int, atime: int | None, mtime: int | None) -> None:
        """Nanoseconds; None: as it is."""
        self.writable()
        st = self.stat(number)
        times = (st.st_atime_ns if atime is None else atime, st.st_mtime_ns if mtime is None else mtime)
        os.utime(self.path(number), ns=times)

    def readlink(self, number: int) -> bytes:
        """The text of a symbolic link."""
        if self.node(number).kind != stat.S_IFLNK:
            raise error(errno.EINVAL)
        return os.readlink(b"", dir_fd=self.fd(number))

    # -- state

    def save(self) -> tuple[list[tuple[int, int, int, bytes]], list[tuple[int, int, int, int]]]:
        """Nodes (number, parent, lookups, name) and handles (number, node, flags, is it a directory)."""
        nodes = [(n.number, n.parent, n.lookups, n.name) for n in self.nodes.values() if n.number != ROOT]
        return nodes, [(number, h.node, h.flags, int(h.directory)) for number, h in self.handles.items()]

    def load(self, nodes: list[tuple[int, int, int, bytes]], handles: list[tuple[int, int, int, int]]) -> None:
        """Take them up again; what is no longer there is stale for the guest. Raises ValueError for what cannot be."""
        numbers = {node[0] for node in nodes} | {handle[0] for handle in handles}
        names = {name for _, _, _, name in nodes}
        if len(nodes) > MAX_NODES or len(handles) > MAX_HANDLES or not all(0 <= n < 1 << 63 for n in numbers):
            raise ValueError("too many files, or numbers that no file has")
        impossible = any(b"/" in n or b"\0" in n or n in (b"", b".", b"..") for n in names)
        if impossible or any(node[0] <= ROOT for node in nodes):
            raise ValueError("a name that is no path component")
        self.reset()
        places = {number: Node(number, parent, name, (0, 0), 0, lookups) for number, parent, lookups, name in nodes}
        self.nodes.update(places)
        self._next_node = max(self.nodes) + 1
        for node in places.values():
            try:
                fd = self._walk(node)
            except OSError:
                node.key = (-1, node.number)  # stale
                continue
            st = os.fstat(fd)
            node.key, node.kind = (st.st_dev, st.st_ino), stat.S_IFMT(st.st_mode)
            self._by_key.setdefault(node.key, node.number)
            self._keep(node.number, fd)
        self._next_handle = max([0, *(handle[0] for handle in handles)]) + 1
        for number, node_number, flags, directory in handles:
            if number in self.handles:
                raise ValueError(f"handle {number} is there twice")
            try:
                self.open(node_number, flags & ~os.O_TRUNC, directory=bool(directory))
            except OSError:
                continue
            self.handles[number] = self.handles.pop(self._next_handle - 1)

    def entries(self, handle: int, offset: int, size: int) -> Iterator[tuple[int, int, int, bytes]]:
        """(inode, place behind it, type, name) from a place in a directory on; "." and ".." have its own inode."""
        opened = self.handle(handle, directory=True)
        own = os.fstat(opened.fd).st_ino
        for ino, following, kind, name in _host.directory_entries(opened.fd, offset, size):
            yield own if name in (b".", b"..") else ino, following, kind, name
