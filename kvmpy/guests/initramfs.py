# SPDX-License-Identifier: Apache-2.0
"""Writing an initramfs in pure Python: a cpio archive in the "newc" format, packed with gzip.

    image = initramfs.build({
        "init": initramfs.File(script, mode=0o755),
        "bin/busybox": Path("busybox"),                 # mode taken from the file
        "etc/motd": b"hello\n",
        "bin/sh": initramfs.Link("busybox"),
        "dev/console": initramfs.Device(5, 1),
    })

No root is needed, not even for device nodes: they are only entries of the archive. The same input gives the
same bytes. Source: Linux Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import gzip
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

MAGIC = b"070701"
TRAILER = "TRAILER!!!"
MAX_FILE = 0xFFFF_FFFF  # the size field has eight hex digits


@dataclass(frozen=True, slots=True)
class File:
    """A regular file: its bytes and permission bits."""

    data: bytes
    mode: int = 0o644


@dataclass(frozen=True, slots=True)
class Link:
    """A symbolic link to `target`."""

    target: str


@dataclass(frozen=True, slots=True)
class Directory:
    """A directory. Parents of other entries are made without being asked for."""

    mode: int = 0o755


@dataclass(frozen=True, slots=True)
class Device:
    """A device node by number; a character device unless `block`."""

    major: int
    minor: int
    mode: int = 0o600
    block: bool = False


Entry = File | Link | Directory | Device
# What `build()` takes: an entry, the bytes of a file, or the path of a host file to copy.
Source = Entry | bytes | os.PathLike[str]


def build(entries: Mapping[str, Source], *, compress: bool = True) -> bytes:
    """Build an initramfs image.

    Arguments: entries, path below "/" -> what is there; compress, pack with gzip, which every stock kernel
    opens.
    Returns: the image. Archives may be joined with `+`: the kernel unpacks one after the other.
    Errors: ValueError for a path that leaves the root, a path below something that is no directory, or
    numbers that do not fit; OSError when a host file cannot be read.
    """
    archive = cpio(entries)
    return gzip.compress(archive, compresslevel=6, mtime=0) if compress else archive


def cpio(entries: Mapping[str, Source]) -> bytes:
    """Build the archive that `build()` packs; arguments and errors are the same."""
    tree = _tree(entries)
    out = bytearray()
    for inode, (name, entry) in enumerate(tree.items(), 1):
        out += _record(inode, name, entry)
    out += _record(0, TRAILER, File(b"", 0))
    out += bytes(-len(out) % 512)  # what cpio(1) does; readers of blocks expect it
    return bytes(out)


def _tree(entries: Mapping[str, Source]) -> dict[str, Entry]:
    """The entries by normal name, each after its parent directories: the kernel makes none by itself."""
    asked: dict[str, Entry] = {}
    for path, source in entries.items():
        parts = [part for part in str(path).split("/") if part not in ("", ".")]
        if not parts or ".." in parts or "\0" in path or parts == [TRAILER]:
            raise ValueError(f"{path!r} is not a path below the root of the initramfs")
        name = "/".join(parts)
        if name in asked:
            raise ValueError(f"{path!r} is given twice")
        asked[name] = _entry(source)
    tree: dict[str, Entry] = {}
    for name, entry in asked.items():
        for parent in _parents(name):
            above = tree.setdefault(parent, asked.get(parent, Directory()))
            if not isinstance(above, Directory):
                raise ValueError(f"{name!r} is below {parent!r}, which is a {type(above).__name__.lower()}")
        tree[name] = entry
    return tree


def _parents(name: str) -> Iterator[str]:
    parts = name.split("/")
    return ("/".join(parts[:depth]) for depth in range(1, len(parts)))


def _entry(source: Source) -> Entry:
    match source:
        case File() | Link() | Directory() | Device():
            return source
        case bytes() | bytearray() | memoryview():
            return File(bytes(source))
        case os.PathLike():
            path = Path(source)
            return File(path.read_bytes(), 0o755 if path.stat().st_mode & 0o111 else 0o644)
        case _:
            kinds = "bytes, a path, File, Link, Directory or Device"
            raise TypeError(f"an initramfs entry is {kinds}, not {source!r}")


def _record(inode: int, name: str, entry: Entry) -> bytes:
    data, major, minor = b"", 0, 0
    match entry:
        case File(data, mode):
            mode = _permissions(name, mode) | (stat.S_IFREG if name != TRAILER else 0)
            if len(data) > MAX_FILE:
                raise ValueError(f"{name!r} has {len(data)} bytes; the format ends at {MAX_FILE}")
        case Link(target):
            data, mode = os.fsencode(target), 0o777 | stat.S_IFLNK
            if not data or b"\0" in data:
                raise ValueError(f"{name!r} links to {target!r}")
        case Directory(mode):
            mode = _permissions(name, mode) | stat.S_IFDIR
        case Device(major, minor, mode, block):
            mode = _permissions(name, mode) | (stat.S_IFBLK if block else stat.S_IFCHR)
            if not (0 <= major < 1 << 12 and 0 <= minor < 1 << 20):  # MAJOR and MINOR of linux/kdev_t.h
                raise ValueError(f"{name!r}: device {major}:{minor}; numbers end at {1 << 12}:{1 << 20}")
    path = os.fsencode(name) + b"\0"
    links = 2 if isinstance(entry, Directory) else 1
    fields = (inode, mode, 0, 0, links, 0, len(data), 0, 0, major, minor, len(path), 0)
    header = MAGIC + b"".join(b"%08X" % field for field in fields)
    return _padded(header + path) + _padded(data)


def _permissions(name: str, mode: int) -> int:
    if not 0 <= mode <= 0o7777:
        raise ValueError(f"{name!r}: {mode:#o} is more than permission bits")
    return mode


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
