# SPDX-License-Identifier: Apache-2.0
"""Checking and repairing qcow2: count every reference anew and compare with what the image says.

Repairing "leaks" only lowers refcounts that are too high. "all" also raises those that are too low, builds
the refcounts anew if their own structures are broken, clears table entries that point nowhere (their data
is lost already) and ends with the dirty and corrupt bits cleared.
"""

from __future__ import annotations

import struct
import sys
from array import array
from dataclasses import dataclass, field

from kvmpy.block._qcow2 import Qcow2Core
from kvmpy.block.hostfile import HostFile
from kvmpy.block.qcow2.header import (
    BITMAPS,
    CORRUPT,
    DATA_FILE,
    DIRTY,
    EXT_BITMAPS,
    MAX_REFCOUNT_TABLE,
    Header,
)
from kvmpy.block.qcow2.snapshots import read_l1, read_table
from kvmpy.errors import ImageError

BAD_L1, BAD_L2_TABLE, BAD_ENTRY, BAD_FLAG, LEAK, TOO_LOW = range(6)  # enum in qcow2.h
_OFFSET = 0x00FFFFFFFFFFFE00
_MAX_CLUSTERS = 1 << 28  # counters for them take 1 GiB
_MAX_MESSAGES = 1000
_MAX_BITMAPS = 65535


@dataclass
class CheckResult:
    """What a check found, in the words of qemu-img check. Counts after `_fixed` are those that a repair
    took away.
    """

    total_clusters: int = 0
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    compressed_clusters: int = 0
    image_end_offset: int = 0
    check_errors: int = 0
    corruptions: int = 0
    leaks: int = 0
    stale_flags: int = 0  # COPIED flags that differ from the refcount, but cost no more than an extra copy
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    messages: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """True if nothing is wrong (any more)."""
        return not (self.check_errors or self.corruptions or self.leaks or self.stale_flags)

    def say(self, text: str) -> None:
        if len(self.messages) < _MAX_MESSAGES:
            self.messages.append(text)


class _Pass:
    """One walk over the whole image."""

    def __init__(self, file: HostFile, fix: bool) -> None:
        self.file, self.fix = file, fix
        self.result = CheckResult()
        self.header = Header.parse(file)
        self.shift = self.header.cluster_bits
        self.clusters = (file.size + self.header.cluster_size - 1) >> self.shift
        if self.clusters > _MAX_CLUSTERS:
            raise ImageError(f"a file of {self.clusters} clusters is too large to check (limit {_MAX_CLUSTERS})")
        self.counts = array("I", bytes(4 * self.clusters))
        self.core = Qcow2Core()
        # Data is not looked at, so an external data file need not be there: any descriptor will do in its
        # place.
        data_fd = file.fd if self.header.incompatible & DATA_FILE else -1
        self.core._open(file.fd, data_fd, self.header, not fix, False, False, 4 << 20, None, ())
        self.broken_table = False
        self.structures: list[int] = []  # clusters of the refcount table and its blocks
        self.broken_l1: list[int] = []  # file offsets of L1 entries
        self.flags: list[tuple[int, int]] = []  # (file offset, entry) whose COPIED flag contradicts the refcount

    def count(self) -> None:
        """Count all references; with `fix`, clear L2 entries that cannot be."""
        header, size = self.header, self.header.cluster_size
        self._mark(0, size, "the header", 0)
        offset, blocks = self.core._reftable
        self._mark(offset, header.refcount_table_clusters << self.shift, "the refcount table", 48)
        table = offset >> self.shift
        self.structures = list(range(table, min(self.clusters, table + header.refcount_table_clusters)))
        for i, entry in enumerate(blocks):
            where = offset + i * 8
            if not entry:
                continue
            if entry & (size - 1) or not 0 < entry >> self.shift < self.clusters:
                self._corrupt(f"refcount block {i} cannot be at {entry:#x}", where)
                self.broken_table = True
                continue
            self.structures.append(entry >> self.shift)
            self._mark(entry, size, f"refcount block {i}", where)
        at, l1 = self.core._l1
        self._mark(at, len(l1) * 8, "the L1 table", 40)
        self._tables(at, l1, active=True)
        snapshots, length = read_table(self.file, header)
        self._mark(header.snapshots_offset, length, "the snapshot table", 64)
        for one in snapshots:
            self._mark(
                one.l1_offset,
                one.l1_size * 8,
                f"the L1 table of snapshot {one.name!r}",
                header.snapshots_offset,
            )
            self._tables(one.l1_offset, read_l1(self.file, one.l1_offset, one.l1_size), active=False)
        if header.autoclear & BITMAPS:
            self._bitmaps()
        for cluster in self.structures:
            if self.counts[cluster] != 1:
                self._corrupt("refcounts share their place with something else", cluster << self.shift)
                self.broken_table = True
        for offset, entry in self.flags:
            text = f"the COPIED flag of entry {entry:#x} contradicts the refcount"
            if entry >> 63 and self.counts[(entry & _OFFSET) >> self.shift] > 1:
                self._corrupt(text, offset)  # a write in place would change the other user's data
            else:
                self.result.stale_flags += 1
                self.result.say(f"{text} (at file offset {offset:#x})")

    def compare(self, leaks: bool, low: bool) -> None:
        """Compare refcounts with the counts, and fix them if so asked."""
        for kind, cluster, value in self.core._compare(self.counts, leaks, low):
            expected = self.counts[cluster] if cluster < self.clusters else 0
            text = f"cluster {cluster} refcount={value} reference={expected}"
            if kind == LEAK:
                self.result.leaks += 1
                self.result.say(f"Leaked {text}")
            else:
                self.result.corruptions += 1
                self.result.say(f"ERROR {text}")

    def uncovered(self) -> bool:
        """True if a cluster is in use that no refcount block covers (so that its refcount cannot be put
        right in place).
        """
        per_block = 8 << self.shift >> self.header.refcount_order
        _, blocks = self.core._reftable
        for first in range(0, self.clusters, per_block):
            i = first // per_block
            if (i >= len(blocks) or not blocks[i]) and any(self.counts[first : first + per_block]):
                return True
        return False

    def finish(self) -> CheckResult:
        self.core.close()
        result = self.result
        result.total_clusters = -(-self.header.size // self.header.cluster_size)
        used = self.clusters
        while used and not self.counts[used - 1]:
            used -= 1
        result.image_end_offset = used << self.shift
        return result

    def _tables(self, at: int, l1: list[int], active: bool) -> None:
        active_flags = active and not self.broken_table
        reports, numbers = self.core._count(l1, active_flags, self.fix, self.counts)
        if active:
            (
                self.result.allocated_clusters,
                self.result.compressed_clusters,
                self.result.fragmented_clusters,
            ) = numbers[:3]
        for kind, offset, value in reports:
            if kind in (BAD_L1, BAD_L2_TABLE):
                where = at + offset * 8
                self.broken_l1.append(where)
                self._corrupt(f"L1 entry {value:#x} points to no L2 table", where)
            elif kind == BAD_FLAG:
                self.flags.append((offset, value))
            else:
                self._corrupt(f"L2 entry {value:#x} is not possible", offset)

    def _bitmaps(self) -> None:
        raw = self.header.extension(EXT_BITMAPS) or b""
        if len(raw) < 24:
            self._corrupt("the bitmaps extension is too short", 0)
            return
        number, _, length, at = struct.unpack_from(">IIQQ", raw)
        if number > _MAX_BITMAPS or length > number * 2048 or not self._mark(at, length, "the bitmap directory", 0):
            return
        directory, position = self.file.pread(at, length), 0
        for _ in range(number):
            if position + 24 > length:
                self._corrupt("the bitmap directory ends too early", at + position)
                return
            table, entries, _, _, _, name, extra = struct.unpack_from(">QIIBBHI", directory, position)
            position += (24 + name + extra + 7) & ~7
            if not self._mark(table, entries * 8, "a bitmap table", at + position):
                continue
            for i, entry in enumerate(read_l1(self.file, table, entries)):
                if entry & _OFFSET:
                    self._mark(entry & _OFFSET, self.header.cluster_size, "bitmap data", table + i * 8)

    def _mark(self, offset: int, length: int, what: str, where: int) -> bool:
        if not length:
            return True
        first, last = offset >> self.shift, (offset + length - 1) >> self.shift
        if offset & (self.header.cluster_size - 1) or last >= self.clusters:
            self._corrupt(f"{what} cannot be at {offset:#x}", where)
            return False
        for cluster in range(first, last + 1):
            self.counts[cluster] += 1
        return True

    def _corrupt(self, text: str, where: int) -> None:
        self.result.corruptions += 1
        self.result.say(f"ERROR {text} (at file offset {where:#x})")


def check(file: HostFile, repair: str | None = None) -> CheckResult:
    """Check the qcow2 image in `file`; `repair` is None, "leaks" or "all" (then the file must be open for
    writing).

    Raises ImageError if the header itself cannot be used.
    """
    if repair not in (None, "leaks", "all"):
        raise ValueError(f"repair {repair!r} is not one of None, 'leaks', 'all'")
    before = _look(file)
    if repair is None:
        return before
    if file.readonly:
        raise PermissionError(30, "the image file is open read-only")
    dirty = Header.parse(file).incompatible & (DIRTY | CORRUPT)
    if before.clean and not (dirty and repair == "all"):
        return before
    if repair == "all":
        _repair(file)
    else:
        one = _Pass(file, fix=True)
        try:
            one.fix = False  # entries stay as they are
            one.count()
            if not one.broken_table:
                one.compare(leaks=True, low=False)
                one.core._flush_locked()
                one.core._fix_flags()
        finally:
            one.finish()
    after = _look(file)
    after.corruptions_fixed = max(0, before.corruptions - after.corruptions)
    after.leaks_fixed = max(0, before.leaks - after.leaks)
    after.messages = before.messages + [f"after the repair: {text}" for text in after.messages]
    if repair == "all" and dirty and not (after.corruptions or after.check_errors):
        bits = Header.parse(file).incompatible & ~(DIRTY | CORRUPT)
        file.pwrite(72, struct.pack(">Q", bits))
        file.sync()
    return after


def _look(file: HostFile) -> CheckResult:
    one = _Pass(file, fix=False)
    try:
        one.count()
        if one.broken_table:
            one.result.say("the refcounts cannot be compared, as their table is broken")
        else:
            one.compare(leaks=False, low=False)
    except (ImageError, OSError) as error:
        one.result.check_errors += 1
        one.result.say(str(error))
    return one.finish()


def _repair(file: HostFile) -> None:
    # First what points nowhere, so that the second count is of a consistent image.
    one = _Pass(file, fix=True)
    try:
        one.count()
        broken = one.broken_l1
    finally:
        one.finish()
    for where in broken:
        file.pwrite(where, bytes(8))
    one = _Pass(file, fix=True)
    try:
        one.count()
        anew = one.broken_table or one.uncovered()
        if not anew:
            one.compare(leaks=True, low=True)
            one.core._flush_locked()
            one.core._fix_flags()
    finally:
        one.finish()
    if anew:
        _rebuild(file, one)
        last = _Pass(file, fix=True)
        try:
            last.core._fix_flags()
        finally:
            last.finish()


def _rebuild(file: HostFile, one: _Pass) -> None:
    """Write refcount blocks and their table anew, behind all else, and point the header there."""
    header, size, counts = one.header, one.header.cluster_size, one.counts
    for cluster in one.structures:
        counts[cluster] -= 1
    per_block = 8 * size >> header.refcount_order
    number, table = 0, 1
    while True:
        total = one.clusters + number + table
        if number * per_block >= total and table * size >= number * 8:
            break
        number = -(-total // per_block)
        table = -(-number * 8 // size)
    if table * size > MAX_REFCOUNT_TABLE:
        raise ImageError("the image has too many clusters for a refcount table")
    counts.extend([1] * (number + table))
    highest = (1 << (1 << header.refcount_order)) - 1
    if max(counts) > highest:
        raise ImageError(f"a cluster is used {max(counts)} times; {1 << header.refcount_order} bits cannot count that")
    start = one.clusters * size
    for i in range(number):
        file.pwrite(
            start + i * size,
            _pack(counts[i * per_block : (i + 1) * per_block], header.refcount_order).ljust(size, b"\0"),
        )
    entries = [start + i * size for i in range(number)]
    file.pwrite(start + number * size, struct.pack(f">{number}Q", *entries).ljust(table * size, b"\0"))
    file.sync()
    file.pwrite(48, struct.pack(">QI", start + number * size, table))
    file.sync()


def _pack(counts: array[int], order: int) -> bytes:
    if order >= 3:
        out = array("BHIQ"[order - 3], counts)
        if sys.byteorder == "little":
            out.byteswap()
        return out.tobytes()
    width = 1 << order
    packed = bytearray(-(-len(counts) * width // 8))
    for i, value in enumerate(counts):
        packed[i * width // 8] |= value << (i * width % 8)
    return bytes(packed)
