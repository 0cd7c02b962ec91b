# SPDX-License-Identifier: Apache-2.0
"""What is known about an image, in the words of `qemu-img info` and `qemu-img map`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kvmpy.block.disk import Disk, Extent
from kvmpy.block.formats import open_disk, probe_format
from kvmpy.block.hostfile import HostFile
from kvmpy.block.policy import NOTHING, Follow
from kvmpy.block.qcow2.header import COMPRESSION_NAMES, CORRUPT, DATA_FILE, DIRTY, Header
from kvmpy.block.qcow2.snapshots import read_table
from kvmpy.block.vdi import VdiDisk
from kvmpy.block.vmdk import VmdkDisk


class MapEntry(NamedTuple):
    """A stretch of a disk: which layer answers (`depth`, 0 is the top one) and, if the data stands as it is
    in a file, where.
    """

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    compressed: bool
    offset: int | None
    filename: str | None

    def as_dict(self) -> dict[str, Any]:
        """As in `qemu-img map --output=json`."""
        keys: dict[str, Any] = self._asdict()
        if self.offset is None:
            del keys["offset"]
        del keys["filename"]
        return keys


def map_disk(disk: Disk, start: int = 0, length: int | None = None) -> Iterator[MapEntry]:
    """The stretches of [start, start + length), as long as they can be."""
    end = disk.size if length is None else min(disk.size, start + length)
    pending: MapEntry | None = None
    while start < end:
        entry = _entry(disk, start, end - start, 0)
        start += entry.length
        if pending is not None and _joins(pending, entry):
            pending = pending._replace(length=pending.length + entry.length)
            continue
        if pending is not None:
            yield pending
        pending = entry
    if pending is not None:
        yield pending


def _entry(disk: Disk, start: int, length: int, depth: int) -> MapEntry:
    found: Extent = disk.block_status(start, length)
    below = disk.backing
    if not found.allocated and below is not None and start < below.size:
        return _entry(below, start, min(found.length, below.size - start), depth + 1)
    path = getattr(disk, "path", None) if found.host_offset is not None else None
    return MapEntry(
        start,
        found.length,
        depth,
        found.allocated,
        found.zero,
        found.data,
        found.compressed,
        found.host_offset,
        path,
    )


def _joins(first: MapEntry, second: MapEntry) -> bool:
    if first[2:7] != second[2:7] or first.filename != second.filename:
        return False
    if first.offset is None or second.offset is None:
        return first.offset is second.offset
    return first.offset + first.length == second.offset


def describe_image(
    path: str | os.PathLike[str], format: str | None = None, *, follow: Follow = NOTHING
) -> dict[str, Any]:
    """What `qemu-img info --output=json` says of an image. Backing files are named, not opened."""
    format = format or probe_format(path)
    if format == "qcow2":
        return _describe_qcow2(path)
    with open_disk(path, format, readonly=True, follow=follow, lock=False) as disk:
        about = {"filename": os.fspath(path), "format": format, "virtual-size": disk.size}
        if isinstance(disk, VmdkDisk):
            about["actual-size"] = disk.actual_size
        elif format != "nbd":
            about["actual-size"] = Path(path).stat().st_blocks * 512
        if isinstance(disk, VdiDisk) or (isinstance(disk, VmdkDisk) and disk.sparse):
            about["cluster-size"] = disk.cluster_size
        about["dirty-flag"] = False
        if isinstance(disk, VmdkDisk):
            about["format-specific"] = {"type": "vmdk", "data": disk.details()}
        return about


def _describe_qcow2(path: str | os.PathLike[str]) -> dict[str, Any]:
    with HostFile.open(path, readonly=True, lock=False) as file:
        header = Header.parse(file)
        snapshots, _ = read_table(file, header)
        about: dict[str, Any] = {
            "filename": os.fspath(path),
            "format": "qcow2",
            "virtual-size": header.size,
            "actual-size": os.fstat(file.fd).st_blocks * 512,
            "cluster-size": header.cluster_size,
            "dirty-flag": bool(header.incompatible & DIRTY),
        }
        if header.backing_file is not None:
            about["backing-filename"] = header.backing_file
            about["full-backing-filename"] = os.path.join(file.folder, header.backing_file)  # noqa: PTH118
            if header.backing_format is not None:
                about["backing-filename-format"] = header.backing_format
        if snapshots:
            about["snapshots"] = [
                {
                    "id": one.id,
                    "name": one.name,
                    "vm-state-size": one.vm_state_size,
                    "date-sec": one.date_sec,
                    "date-nsec": one.date_nsec,
                    "vm-clock-sec": one.vm_clock_nsec // 10**9,
                    "vm-clock-nsec": one.vm_clock_nsec % 10**9,
                }
                for one in snapshots
            ]
        data: dict[str, Any] = {"compat": "1.1" if header.version >= 3 else "0.10"}
        data["compression-type"] = COMPRESSION_NAMES[header.compression_type]
        data["refcount-bits"] = 1 << header.refcount_order
        if header.version >= 3:
            data["lazy-refcounts"] = header.lazy_refcounts
            data["corrupt"] = bool(header.incompatible & CORRUPT)
            data["extended-l2"] = header.extended_l2
        if header.incompatible & DATA_FILE:
            data["data-file"] = header.data_file
            data["data-file-raw"] = header.raw_external
        about["format-specific"] = {"type": "qcow2", "data": data}
        return about
