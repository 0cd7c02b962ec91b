# SPDX-License-Identifier: Apache-2.0
"""Messages of FUSE 7.38 as they stand on a queue of virtio-fs; <linux/fuse.h> has the names. All little endian."""

from __future__ import annotations

import os
import struct
from enum import IntEnum

MAJOR, MINOR = 7, 38
OLDEST_MINOR = 27  # Linux 4.18: before that INIT and others look different; virtio-fs is younger


class Op(IntEnum):
    """enum fuse_opcode: those that are answered."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    CREATE = 35
    DESTROY = 38
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47


IN_HEADER = struct.Struct("<IIQQIII4x")  # len, opcode, unique, nodeid, uid, gid, pid
OUT_HEADER = struct.Struct("<IiQ")  # len, error, unique
ATTR = struct.Struct("<6Q10I")
ENTRY = struct.Struct("<4Q2I")  # nodeid, generation, entry_valid, attr_valid, their nanoseconds; attr follows
ATTR_OUT = struct.Struct("<QI4x")  # attr_valid, its nanoseconds; attr follows
OPEN_OUT = struct.Struct("<QI4x")
KSTATFS = struct.Struct("<5Q3I28x")
DIRENT = struct.Struct("<QQII")  # ino, off, namelen, type; the name follows, padded to 8
INIT_IN = struct.Struct("<IIII")
INIT_OUT = struct.Struct("<IIIIHHIIHHI28x")
GETATTR_IN = struct.Struct("<I4xQ")
SETATTR_IN = struct.Struct("<I4xQQ8xQQQIIII4xII4x")
MKNOD_IN = struct.Struct("<II8x")
MKDIR_IN = struct.Struct("<I4x")
RENAME2_IN = struct.Struct("<QI4x")
OPEN_IN = struct.Struct("<I4x")
CREATE_IN = struct.Struct("<II8x")
IO_IN = struct.Struct("<QQII16x")  # fh, offset, size, flags of READ, READDIR and WRITE
RELEASE_IN = struct.Struct("<Q")
FSYNC_IN = struct.Struct("<QI4x")
FALLOCATE_IN = struct.Struct("<QQQI4x")
LSEEK_IN = struct.Struct("<QQI4x")
COPY_IN = struct.Struct("<7Q")
U64 = struct.Struct("<Q")
FORGET_ONE = struct.Struct("<QQ")

# INIT flags.
ASYNC_READ, ATOMIC_O_TRUNC, BIG_WRITES = 1 << 0, 1 << 3, 1 << 5
AUTO_INVAL_DATA, DO_READDIRPLUS, READDIRPLUS_AUTO = 1 << 12, 1 << 13, 1 << 14
ASYNC_DIO, PARALLEL_DIROPS, MAX_PAGES, CACHE_SYMLINKS = 1 << 15, 1 << 18, 1 << 22, 1 << 23
FLAGS = (
    ASYNC_READ | ATOMIC_O_TRUNC | BIG_WRITES | AUTO_INVAL_DATA | DO_READDIRPLUS | READDIRPLUS_AUTO
    | ASYNC_DIO | PARALLEL_DIROPS | MAX_PAGES | CACHE_SYMLINKS
)  # fmt: skip

# FATTR_*: what a SETATTR sets.
SET_MODE, SET_UID, SET_GID, SET_SIZE, SET_ATIME, SET_MTIME, SET_FH, SET_ATIME_NOW, SET_MTIME_NOW = (
    1 << bit for bit in range(9)
)

MAX_NAME = 255
MAX_TRANSFER = 1 << 20  # bytes of a READ or WRITE
MAX_PAGES_VALUE = MAX_TRANSFER // 4096


class ProtocolError(ValueError):
    """A message that is none: too short, or with a name that cannot be one."""


def name(data: bytes) -> bytes:
    """One path component from NUL-terminated bytes. Raises ProtocolError for what is none, "." and ".." included."""
    text, nul, rest = data.partition(b"\0")
    if not nul or rest:
        raise ProtocolError("a name that does not end with the message")
    if not text or len(text) > MAX_NAME or b"/" in text or text in (b".", b".."):
        raise ProtocolError("a name that is no path component")
    return text


def two_names(data: bytes) -> tuple[bytes, bytes]:
    """The two NUL-terminated texts of RENAME, each a component."""
    first, nul, rest = data.partition(b"\0")
    return name(first + nul), name(rest)


def attr(st: os.stat_result) -> bytes:
    """struct fuse_attr."""
    times = (st.st_atime_ns, st.st_mtime_ns, st.st_ctime_ns)
    seconds = [t // 10**9 & (1 << 64) - 1 for t in times]
    return ATTR.pack(
        st.st_ino, st.st_size, st.st_blocks, *seconds, *(t % 10**9 for t in times),
        st.st_mode, min(st.st_nlink, 0xFFFF_FFFF), st.st_uid, st.st_gid,
        os.major(st.st_rdev) << 8 & 0xFFF00 | os.minor(st.st_rdev) & 0xFF, st.st_blksize, 0,
    )  # fmt: skip


def dirent(ino: int, offset: int, kind: int, text: bytes, entry: bytes = b"") -> bytes:
    """struct fuse_dirent, or with `entry` struct fuse_direntplus."""
    data = entry + DIRENT.pack(ino, offset, len(text), kind) + text
    return data + bytes(-len(data) % 8)
