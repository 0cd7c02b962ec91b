# SPDX-License-Identifier: Apache-2.0
"""An open qcow2 image: the C data path, and in Python what happens rarely (resize, header, close)."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import replace

from kvmpy.block._qcow2 import Qcow2Core
from kvmpy.block.disk import Disk
from kvmpy.block.hostfile import HostFile
from kvmpy.block.policy import NOTHING, Follow
from kvmpy.block.qcow2.check import check
from kvmpy.block.qcow2.compress import compressor, decompressor
from kvmpy.block.qcow2.header import (
    COMPRESSION_NAMES,
    CORRUPT,
    DATA_FILE,
    DIRTY,
    EXT_BACKING_FORMAT,
    RAW_EXTERNAL,
    Header,
)  # fmt: skip
from kvmpy.block.qcow2.snapshots import Snapshots
from kvmpy.errors import ImageError

CACHE_BYTES = 32 << 20  # L2 tables: enough for 256 GiB in clusters of 64 KiB

OpenBacking = Callable[[str, str, "HostFile", Follow], Disk]


class Qcow2Disk(Qcow2Core):
    """A qcow2 image of version 2 or 3. Made by `open_qcow2`."""

    format = "qcow2"

    def __init__(self) -> None:
        self.file: HostFile
        self.header: Header
        self._snapshots: Snapshots | None = None

    @property
    def path(self) -> str:
        """Where the file was opened."""
        return self.file.path

    @property
    def cluster_size(self) -> int:
        """Bytes."""
        return self.header.cluster_size

    @property
    def compression(self) -> str:
        """ "zlib" or "zstd"."""
        return COMPRESSION_NAMES[self.header.compression_type]

    @property
    def snapshots(self) -> Snapshots:
        """The internal snapshots."""
        if self._snapshots is None:
            self._snapshots = Snapshots(self)
        return self._snapshots

    def view_snapshot(self, name: str) -> None:
        """Show an internal snapshot instead of the present content, until closed; only of an image opened
        read-only.
        """
        if not self.readonly:
            raise ValueError("an image that is open for writing shows its present content")
        one = self.snapshots.find(name)
        self._lock()
        try:
            self._replace_l1(one.l1_offset, one.l1_size)
            self._set_size(one.disk_size)
        finally:
            self._unlock()

    def write_compressed(self, offset: int, data: bytes) -> None:
        """Write one cluster (or what is left of the disk) compressed, if that makes it smaller; `offset` is
        aligned to clusters.
        """
        if len(data) < self.cluster_size and offset + len(data) == self.size:
            data = bytes(data) + bytes(self.cluster_size - len(data))
        if offset % self.cluster_size or len(data) != self.cluster_size:
            raise ValueError(f"compressed writes are whole clusters of {self.cluster_size} bytes")
        if self.header.incompatible & DATA_FILE:
            raise ValueError("an image with an external data file cannot have compressed clusters")
        self.write_packed(offset, compressor(self.header.compression_type)(data), data)

    def write_packed(self, offset: int, packed: bytes, plain: bytes) -> None:
        """Write a cluster that is compressed already (by `compressor`), or plain if that is no longer."""
        if len(packed) < self.cluster_size:
            self._write_compressed(offset, packed)
        else:
            self.pwrite(offset, memoryview(plain)[: self.size - offset])

    def resize(self, size: int, shrink: bool = False) -> None:
        """Make the disk `size` bytes long (rounded up to 512). New bytes are zero; `shrink` must say so if
        bytes are to be lost.
        """
        size += -size % 512
        old = self.size
        if self.readonly:
            raise PermissionError(30, "the disk is read-only")
        if size < old and not shrink:
            raise ValueError(f"{size} bytes are fewer than {old}; shrink=True if the rest may be lost")
        if self.header.nb_snapshots and self.header.version < 3:
            raise ValueError("a version 2 image with snapshots cannot be resized")
        if size < old:
            self.write_zeroes(size, old - size)
            self.flush()
            self._put_size(size)
        else:
            self._grow_l1(self.header.l1_entries(size))
            self._set_size(size)
            try:
                self._clear_new(old, size)
                self.flush()
                self._put_size(size)
            except BaseException:
                self._set_size(old)
                raise
        if self.header.incompatible & DATA_FILE:
            self._data_file.truncate(size)

    def _clear_new(self, old: int, new: int) -> None:
        """What lies behind the old end must not show: the rest of its cluster, or a longer backing file."""
        seen = self.backing.size if self.backing else 0
        end = min(new, max(seen, -(-old // self.cluster_size) * self.cluster_size))
        if end > old:
            self.write_zeroes(old, end - old)

    def _grow_l1(self, entries: int) -> None:
        self._lock()
        try:
            self._flush_locked()
            offset, old = self._l1
            if entries <= len(old):
                return
            new = self._alloc(entries * 8)
            table = old + [0] * (entries - len(old))
            self.file.pwrite(new, struct.pack(f">{entries}Q", *table) + bytes(-entries * 8 % self.cluster_size))
            self._flush_locked()
            self.file.pwrite(36, struct.pack(">IQ", entries, new))
            self._sync()
            self.header = replace(self.header, l1_size=entries, l1_table_offset=new)
            self._replace_l1(new, entries)
            self._free(offset, len(old) * 8)
            self._flush_locked()
        finally:
            self._unlock()

    def _put_size(self, size: int) -> None:
        self.file.pwrite(24, struct.pack(">Q", size))
        self._sync()
        self.header = replace(self.header, size=size)
        self._set_size(size)

    def _put_l1(self, offset: int, entries: int, safe: int, size: int) -> None:
        """Switch to another L1 table. Between two states of the header the disk has the smaller size, which
        both tables cover.
        """
        if safe != self.header.size:
            self._put_size(safe)
        self.file.pwrite(36, struct.pack(">IQ", entries, offset))
        self._sync()
        self.header = replace(self.header, l1_size=entries, l1_table_offset=offset)
        if size != safe:
            self._put_size(size)

    def set_backing(self, name: str | None, backing_format: str | None = None) -> None:
        """Change only the names in the header (qemu-img's "unsafe rebase"); the content must already be
        right for it.
        """
        if name is not None and backing_format is None:
            raise ValueError("a backing file needs its format named")
        if self.readonly:
            raise PermissionError(30, "the disk is read-only")
        header = replace(self.header, backing_file=name, incompatible=self._incompatible)
        header.extensions = list(self.header.extensions)
        header.set_extension(EXT_BACKING_FORMAT, None if name is None else str(backing_format).encode())
        self.flush()
        self.file.pwrite(0, header.pack())
        self._sync()
        self.header = header

    def _sync(self) -> None:
        if not self._unsafe:
            self.file.sync()

    _unsafe = False
    _data_file: HostFile

    def _before_close(self) -> None:
        if self.readonly or self.file.is_block_device:
            return
        self.flush()
        # Readers that work in sectors or clusters must find the last one whole.
        size = self.file.size
        if size % self.cluster_size:
            self.file.truncate(size + -size % self.cluster_size)


def open_qcow2(
    file: HostFile,
    *,
    follow: Follow = NOTHING,
    open_backing: OpenBacking | None = None,
    backing: Disk | None = None,
    no_backing: bool = False,
    data_file: HostFile | None = None,
    unsafe: bool = False,
    discard: bool = True,
    cache_bytes: int = CACHE_BYTES,
) -> Qcow2Disk:
    """Open the image in `file`, which the disk closes in the end.

    `backing` or `data_file`, if given, stand for what the header names; else those names are opened as
    `follow` allows, backing files by `open_backing`; `no_backing` goes without one (unallocated clusters
    read as zero). A dirty image that is opened for writing is repaired first. `unsafe`: flushes do not wait
    for the disk. `discard`: space that comes free is given back to the host. `cache_bytes`: for L2 tables.
    """
    disk = Qcow2Disk()
    owned: list[HostFile] = [file]
    try:
        header = Header.parse(file)
        if header.incompatible & CORRUPT and not file.readonly:
            raise ImageError(
                "the image is marked corrupt: open it read-only, or repair it (check with repair='all')", 72
            )
        if header.incompatible & DATA_FILE:
            if data_file is None:
                if header.data_file is None:
                    raise ImageError("the image has an external data file but does not name it", 72)
                data_file = follow.open(header.data_file, file.folder, file.readonly, "data file")
            owned.append(data_file)
            disk._data_file = data_file
        elif data_file is not None:
            raise ValueError("the image has no external data file")
        if header.backing_file is not None and backing is None and not no_backing:
            backing = _open_backing(header, file, follow, open_backing)
        if not file.readonly:
            header = _prepare_for_writing(file, header)
        disk.file, disk.header, disk._unsafe = file, header, unsafe
        disk._open(
            file.fd, data_file.fd if data_file else -1, header, file.readonly, unsafe, discard, cache_bytes,
            decompressor(header.compression_type), tuple(owned),
        )  # fmt: skip
    except BaseException:
        for one in owned:
            one.close()
        if backing is not None:
            backing.close()
        raise
    if backing is not None:
        disk._set_backing(backing)
    if header.nb_snapshots:
        try:
            _ = disk.snapshots
        except BaseException:
            disk._set_readonly(True)
            disk.close()
            raise
    return disk


def _open_backing(header: Header, file: HostFile, follow: Follow, open_backing: OpenBacking | None) -> Disk:
    name = header.backing_file or ""
    if header.backing_format is None:
        raise ImageError(f"the image does not name the format of its backing file {name!r}; probing it is not safe", 8)
    if open_backing is None:
        raise ImageError(f"the image names a backing file {name!r}; following it was not allowed", 8)
    return open_backing(name, header.backing_format, file, follow)


def _prepare_for_writing(file: HostFile, header: Header) -> Header:
    """Before the first write: refcounts must be right, and what we do not keep up to date must not look
    valid.
    """
    if header.incompatible & DIRTY:
        result = check(file, repair="all")
        if result.corruptions or result.check_errors:
            raise ImageError("the image is dirty and its refcounts could not be repaired", 72)
        header = Header.parse(file)
    keep = RAW_EXTERNAL if header.incompatible & DATA_FILE else 0
    if header.autoclear & ~keep:
        header.autoclear &= keep
        file.pwrite(88, struct.pack(">Q", header.autoclear))
        os.fdatasync(file.fd)
    return header
