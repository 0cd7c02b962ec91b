# SPDX-License-Identifier: Apache-2.0
"""Internal snapshots: the table (qcow2.txt, "Snapshots") and create, apply, delete in an order that a crash
may cut anywhere.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvmpy.block.hostfile import HostFile
from kvmpy.block.qcow2.header import MAX_L1, MAX_OFFSET, MAX_SNAPSHOTS, Header
from kvmpy.errors import ImageError

if TYPE_CHECKING:
    from kvmpy.block.qcow2.image import Qcow2Disk

_FIXED = struct.Struct(">QIHHIIQII")  # 40 bytes
_MAX_TABLE = 64 << 20
_MAX_EXTRA = 1024
_OFFSET = 0x00FFFFFFFFFFFE00


@dataclass(frozen=True)
class Snapshot:
    """An internal snapshot. `vm_state_size` counts the bytes of machine state that QEMU saved behind the
    disk's end.
    """

    id: str
    name: str
    l1_offset: int
    l1_size: int
    date_sec: int
    date_nsec: int
    vm_clock_nsec: int
    vm_state_size: int
    disk_size: int
    icount: int | None = None
    extra: bytes = b""  # of versions to come

    def pack(self) -> bytes:
        ident, name = self.id.encode("utf-8", "surrogateescape"), self.name.encode("utf-8", "surrogateescape")
        more = struct.pack(">QQ", self.vm_state_size, self.disk_size)
        if self.icount is not None or self.extra:
            more += struct.pack(">Q", self.icount if self.icount is not None else (1 << 64) - 1)
        more += self.extra
        small = self.vm_state_size if self.vm_state_size < 1 << 32 else 0
        fixed = _FIXED.pack(
            self.l1_offset,
            self.l1_size,
            len(ident),
            len(name),
            self.date_sec,
            self.date_nsec,
            self.vm_clock_nsec,
            small,
            len(more),
        )
        entry = fixed + more + ident + name
        return entry + bytes(-len(entry) % 8)


def read_table(file: HostFile, header: Header) -> tuple[list[Snapshot], int]:
    """The snapshots of an image, and the length of their table in bytes; every length is checked."""
    found: list[Snapshot] = []
    at = header.snapshots_offset
    for _ in range(header.nb_snapshots):
        raw = file.pread(at, _FIXED.size)
        l1_offset, l1_size, ident_len, name_len, sec, nsec, clock, small, extra_len = _FIXED.unpack(raw)
        if extra_len > _MAX_EXTRA:
            raise ImageError(f"a snapshot has {extra_len} bytes of extra data, the limit is {_MAX_EXTRA}", at + 36)
        if l1_size * 8 > MAX_L1 or l1_offset & (header.cluster_size - 1) or l1_offset >= MAX_OFFSET:
            raise ImageError(f"a snapshot's L1 table ({l1_size} entries at {l1_offset:#x}) is not possible", at)
        length = _FIXED.size + extra_len + ident_len + name_len
        rest = file.pread(at + _FIXED.size, length - _FIXED.size)
        extra, ident, name = (
            rest[:extra_len],
            rest[extra_len : extra_len + ident_len],
            rest[extra_len + ident_len :],
        )
        state = struct.unpack_from(">Q", extra)[0] if extra_len >= 8 else small
        size = struct.unpack_from(">Q", extra, 8)[0] if extra_len >= 16 else header.size
        icount = struct.unpack_from(">Q", extra, 16)[0] if extra_len >= 24 else None
        try:
            needed = header.l1_entries(size)
        except ValueError as error:
            raise ImageError(str(error), at) from None
        if l1_size < needed:
            raise ImageError(f"a snapshot's L1 table has {l1_size} entries, its disk needs {needed}", at + 8)
        found.append(
            Snapshot(
                ident.decode("utf-8", "surrogateescape"),
                name.decode("utf-8", "surrogateescape"),
                l1_offset,
                l1_size,
                sec,
                nsec,
                clock,
                state,
                size,
                icount,
                extra[24:],
            )
        )
        at += length + -length % 8
        if at - header.snapshots_offset > _MAX_TABLE:
            raise ImageError(f"the snapshot table is longer than {_MAX_TABLE} bytes", header.snapshots_offset)
    return found, at - header.snapshots_offset


def read_l1(file: HostFile, offset: int, entries: int) -> list[int]:
    """An L1 table from the file."""
    return list(struct.unpack(f">{entries}Q", file.pread(offset, entries * 8)))


class Snapshots:
    """The internal snapshots of an open image: a read-only sequence with create, apply and delete."""

    def __init__(self, disk: Qcow2Disk) -> None:
        self._disk = disk
        self._list, self._length = read_table(disk.file, disk.header)
        self._note()

    def __iter__(self) -> Iterator[Snapshot]:
        return iter(self._list)

    def __len__(self) -> int:
        return len(self._list)

    def find(self, name: str) -> Snapshot:
        """The snapshot with this id, or else this name; KeyError if none."""
        for one in self._list:
            if one.id == name:
                return one
        for one in self._list:
            if one.name == name:
                return one
        raise KeyError(f"no snapshot {name!r}")

    def create(self, name: str, when_ns: int | None = None) -> Snapshot:
        """Keep the disk's present content under `name`; `when_ns` is the date (ns since 1970, default now).

        OSError ENOSPC, or ImageError if the refcounts are too narrow (1 bit counts no second user); the
        image is then as it was.
        """
        disk = self._disk
        if any(one.name == name for one in self._list):
            raise ValueError(f"a snapshot {name!r} exists already")
        if len(self._list) >= MAX_SNAPSHOTS:
            raise ValueError(f"the image has {MAX_SNAPSHOTS} snapshots, the limit")
        if disk.header.data_file is not None:
            raise ValueError("an image with an external data file cannot have internal snapshots")
        when_ns = time.time_ns() if when_ns is None else when_ns
        with self._alone():
            _, l1 = disk._l1
            disk._walk(l1, +1)
            try:
                disk._flush_locked()  # nothing may be marked shared before it is counted twice
                disk._fix_flags()
                disk._flush_locked()
                offset = disk._alloc(max(8, len(l1) * 8))
                plain = [entry & _OFFSET for entry in l1]
                disk.file.pwrite(offset, struct.pack(f">{len(l1)}Q", *plain))
                ident = str(
                    max(
                        (int(one.id) for one in self._list if one.id.isascii() and one.id.isdigit()),
                        default=0,
                    )
                    + 1
                )
                new = Snapshot(
                    ident,
                    name,
                    offset,
                    len(l1),
                    when_ns // 10**9 & 0xFFFFFFFF,
                    when_ns % 10**9,
                    0,
                    0,
                    disk.size,
                )
                self._store([*self._list, new])
            except BaseException:
                disk._walk(l1, -1)
                disk._fix_flags()
                raise
            self._reload()
        return new

    def delete(self, name: str) -> None:
        """Forget a snapshot; what only it used comes free."""
        disk, old = self._disk, self.find(name)
        with self._alone():
            l1 = read_l1(disk.file, old.l1_offset, old.l1_size)
            self._store([one for one in self._list if one is not old])
            # From here on a crash leaks clusters.
            disk._walk(l1, -1)
            disk._free(old.l1_offset, max(8, old.l1_size * 8))
            disk._flush_locked()
            disk._fix_flags()
            self._reload()

    def apply(self, name: str) -> None:
        """Make the disk what it was when the snapshot was made; the present content is lost."""
        disk, one = self._disk, self.find(name)
        with self._alone():
            old_offset, old = disk._l1
            l1 = read_l1(disk.file, one.l1_offset, one.l1_size)
            disk._walk(l1, +1)
            try:
                disk._flush_locked()
                # COPIED flags in a snapshot's tables mean nothing until now; the active disk would believe
                # them.
                disk._fix_flags(l1)
                entries = [entry & _OFFSET for entry in l1] + [0] * (len(old) - len(l1))
                offset = disk._alloc(max(8, len(entries) * 8))
                disk.file.pwrite(offset, struct.pack(f">{len(entries)}Q", *entries))
                disk._flush_locked()
                disk._put_l1(offset, len(entries), min(disk.size, one.disk_size), one.disk_size)
            except BaseException:
                disk._walk(l1, -1)
                raise
            disk._replace_l1(offset, len(entries))
            disk._walk(old, -1)
            disk._free(old_offset, max(8, len(old) * 8))
            disk._flush_locked()
            disk._fix_flags()
            self._reload()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        disk = self._disk
        if disk.readonly:
            raise PermissionError(30, "the disk is read-only")
        disk._lock()
        try:
            disk._flush_locked()
            yield
            disk._flush_locked()
        finally:
            disk._unlock()

    def _store(self, table: list[Snapshot]) -> None:
        """Write a new table beside the old one, then point the header at it."""
        disk = self._disk
        data = b"".join(one.pack() for one in table)
        old_offset, old_length = disk.header.snapshots_offset, self._length
        offset = disk._alloc(len(data)) if data else 0
        if data:
            disk.file.pwrite(offset, data)
        disk._flush_locked()
        disk.file.pwrite(60, struct.pack(">IQ", len(table), offset))
        disk._sync()
        disk.header = replace(disk.header, nb_snapshots=len(table), snapshots_offset=offset)
        self._list, self._length = table, len(data)
        self._note()
        disk._free(old_offset, old_length)

    def _note(self) -> None:
        self._disk._protect_snapshots(self._disk.header.snapshots_offset, self._length)

    def _reload(self) -> None:
        disk = self._disk
        disk._flush_locked()
        offset, entries = disk._l1
        disk._replace_l1(offset, len(entries))
