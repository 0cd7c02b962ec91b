# SPDX-License-Identifier: Apache-2.0
"""Making qcow2 images: the smallest possible one, which then grows through the ordinary allocator."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

from kvmpy.block.disk import Disk
from kvmpy.block.hostfile import HostFile
from kvmpy.block.qcow2 import header as h
from kvmpy.block.qcow2.compress import compressor
from kvmpy.block.qcow2.image import Qcow2Disk, open_qcow2
from kvmpy.block.raw import preallocate

VERSIONS = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}  # qemu-img's option compat


@dataclass(frozen=True)
class Qcow2Options:
    """How to make an image; the names are those of `qemu-img create -o`."""

    compat: str = "1.1"
    cluster_size: int = 65536  # bytes
    refcount_bits: int = 16
    lazy_refcounts: bool = False
    compression_type: str = "zlib"
    extended_l2: bool = False
    preallocation: str = "off"  # off, metadata, falloc, full
    backing_file: str | None = None
    backing_fmt: str | None = None
    data_file: str | None = None
    data_file_raw: bool = False

    def header(self, size: int) -> h.Header:
        """The header of an image without any table; ValueError for what cannot be combined."""
        if self.compat not in VERSIONS:
            raise ValueError(f"compat {self.compat!r} is not one of {', '.join(VERSIONS)}")
        bits = self.cluster_size.bit_length() - 1
        if 1 << bits != self.cluster_size or not h.MIN_CLUSTER_BITS <= bits <= h.MAX_CLUSTER_BITS:
            raise ValueError(f"cluster_size {self.cluster_size} is not a power of two within 512..2097152")
        if self.refcount_bits not in (1, 2, 4, 8, 16, 32, 64):
            raise ValueError(f"refcount_bits {self.refcount_bits} is not one of 1, 2, 4, 8, 16, 32, 64")
        if self.compression_type not in h.COMPRESSION_NAMES.values():
            raise ValueError(f"compression_type {self.compression_type!r} is not one of zlib, zstd")
        if self.preallocation not in ("off", "metadata", "falloc", "full"):
            raise ValueError(f"preallocation {self.preallocation!r} is not one of off, metadata, falloc, full")
        if self.preallocation != "off" and self.backing_file is not None:
            raise ValueError("preallocation and a backing file exclude each other")
        if self.backing_file is not None and self.backing_fmt is None:
            raise ValueError("a backing file needs its format named (backing_fmt)")
        if self.data_file_raw and self.data_file is None:
            raise ValueError("data_file_raw needs a data_file")
        if self.data_file_raw and self.backing_file is not None:
            raise ValueError("data_file_raw and a backing file exclude each other")
        if self.extended_l2 and bits < 14:
            raise ValueError("extended_l2 needs clusters of 16 KiB and more")
        made = h.Header(version=VERSIONS[self.compat], cluster_bits=bits, backing_file=self.backing_file)
        made.refcount_order = self.refcount_bits.bit_length() - 1
        zstd = self.compression_type == "zstd"
        newer = {
            "lazy_refcounts": self.lazy_refcounts,
            "extended_l2": self.extended_l2,
            "data_file": self.data_file,
            "compression_type=zstd": zstd,
            "refcount_bits other than 16": self.refcount_bits != 16,
        }
        if made.version < 3 and any(newer.values()):
            raise ValueError(f"{next(name for name, value in newer.items() if value)} needs compat=1.1")
        if zstd:
            compressor(h.ZSTD)  # refuse now what could not be written later
            made.compression_type = h.ZSTD
        made.incompatible = (
            (h.COMPRESSION if zstd else 0)
            | (h.EXTENDED_L2 if self.extended_l2 else 0)
            | (h.DATA_FILE if self.data_file else 0)
        )
        made.compatible = h.LAZY_REFCOUNTS if self.lazy_refcounts else 0
        made.autoclear = h.RAW_EXTERNAL if self.data_file_raw else 0
        if self.backing_fmt is not None and self.backing_file is not None:
            made.extensions.append((h.EXT_BACKING_FORMAT, self.backing_fmt.encode()))
        if self.data_file is not None:
            made.extensions.append((h.EXT_DATA_FILE, os.fsencode(self.data_file)))
        if made.version >= 3:
            table = (h.EXT_FEATURES, h.feature_table())
            made.extensions.append(table)
            try:
                made.pack()
            except ValueError:
                made.extensions.remove(table)  # a courtesy, and clusters of 512 bytes have no room for it
        made.l1_entries(size)
        return made


def create_qcow2(path: str | os.PathLike[str] | HostFile, size: int, options: Qcow2Options | None = None) -> None:
    """A new image of `size` bytes (rounded up to 512) at `path`, or in an open file, which this closes.

    The names of backing and data file go into the header as they are (relative ones are relative to the
    image). A data file is made beside the image; a backing file is not looked at.
    """
    with build_qcow2(path, size, options) as disk:
        disk.file.sync()


def build_qcow2(
    path: str | os.PathLike[str] | HostFile,
    size: int,
    options: Qcow2Options | None = None,
    *,
    backing: Disk | None = None,
    unsafe: bool = True,
) -> Qcow2Disk:
    """Like `create_qcow2`, but returns the new image open for writing, over `backing` (else unallocated
    clusters read as zero).

    `unsafe`: flushes of the open image do not wait for the disk.
    """
    options = options or Qcow2Options()
    size += -size % 512
    header = options.header(size)
    file = path if isinstance(path, HostFile) else HostFile.create(path)
    data_file = None
    try:
        if options.data_file is not None:
            data_file = HostFile.create(file.folder / options.data_file)
        _write_empty(file, header)
    except BaseException:
        file.close()
        if data_file is not None:
            data_file.close()
        raise
    disk = open_qcow2(file, backing=backing, no_backing=backing is None, data_file=data_file, unsafe=unsafe)
    try:
        disk._grow_l1(disk.header.l1_entries(size))
        disk._put_size(size)
        if data_file is not None:
            data_file.truncate(size)
        if options.preallocation != "off" or options.data_file_raw:
            _preallocate(disk, data_file, options.preallocation)
        disk.flush()
    except BaseException:
        disk._set_readonly(True)
        disk.close()
        raise
    return disk


def _write_empty(file: HostFile, header: h.Header) -> None:
    """Header, refcount table and one refcount block: three clusters that count themselves."""
    size = header.cluster_size
    header.refcount_table_offset, header.refcount_table_clusters = size, 1
    header.l1_table_offset = 0
    width = 1 << header.refcount_order
    ones = sum(1 << (i * width) for i in range(3))  # the first entry is the least significant
    if width < 8:
        block = ones.to_bytes(1, "little") if 3 * width <= 8 else ones.to_bytes(2, "little")
    else:
        block = (1).to_bytes(width // 8, "big") * 3
    file.pwrite(0, header.pack() + struct.pack(">Q", 2 * size).ljust(size, b"\0") + block.ljust(size, b"\0"))


def _preallocate(disk: Qcow2Disk, data_file: HostFile | None, how: str) -> None:
    target = data_file or disk.file
    if target.is_block_device or how == "full":  # old data of a device must not show through
        for at in range(0, disk.size, 1 << 20):
            disk.pwrite(at, bytes(min(1 << 20, disk.size - at)))
        return
    disk._preallocate()
    if data_file is None:
        disk.file.truncate(disk._file_end)
    preallocate(target, 0, target.size, "falloc" if how == "falloc" else "off")
