# SPDX-License-Identifier: Apache-2.0
"""A sparse extent of VMDK: grains found through a grain directory and grain tables (Virtual Disk Format
5.0, "Hosted Sparse Extents").

A new grain is appended; the grain tables learn of it with the next flush, after the data is on disk.
"""

from __future__ import annotations

import struct
import sys
import threading
import zlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator

from kvmpy.block._disk import RawCore
from kvmpy.block.disk import Extent, PythonDisk
from kvmpy.block.hostfile import HostFile
from kvmpy.errors import ImageError

MAGIC = b"KDMV"
GRAIN = 128 * 512
_HEADER = struct.Struct("<4sIIQQQQIQQQB4sH")
_ENTRIES = 512  # of a grain table
_FOOTER = (1 << 64) - 1  # gdOffset: the real header is at the end
_MAX_DIRECTORY = 8 << 20  # entries
_CACHED_TABLES = 4096
NEWLINES, REDUNDANT, ZERO_GRAINS, COMPRESSED, MARKERS = 1, 2, 4, 1 << 16, 1 << 17
_UNCLEAN = 72  # offset of uncleanShutdown


class SparseExtent(PythonDisk):
    """One sparse extent as a disk; takes over `file`."""

    def __init__(self, file: HostFile) -> None:
        fields = _HEADER.unpack(file.pread(0, _HEADER.size))
        where = 0
        if fields[0] == MAGIC and fields[9] == _FOOTER:
            where = file.size - 1024  # footer, then one end-of-stream marker
            if where < 512:
                raise ImageError("the footer is missing", 0)
            fields = _HEADER.unpack(file.pread(where, _HEADER.size))
        (
            magic,
            version,
            self._flags,
            capacity,
            grain,
            text_at,
            text_size,
            entries,
            redundant,
            directory,
            overhead,
            _unclean,
            newlines,
            algorithm,
        ) = fields
        if magic != MAGIC or not 1 <= version <= 3:
            raise ImageError(f"not a sparse VMDK extent that is supported (magic {magic!r}, version {version})", where)
        if self._flags & NEWLINES and newlines != b"\n \r\n":
            raise ImageError("the file was damaged by a transfer in text mode", where + 73)
        if grain & (grain - 1) or not 8 <= grain <= 4096:
            raise ImageError(f"a grain of {grain} sectors is not a power of two within 8..4096", where + 20)
        if entries != _ENTRIES:
            raise ImageError(f"grain tables with {entries} entries are not supported (512 are)", where + 44)
        if self._flags & COMPRESSED and algorithm != 1:
            raise ImageError(f"compression algorithm {algorithm} is not supported (1, deflate, is)", where + 77)
        tables = -(-capacity // (grain * _ENTRIES))
        if tables > _MAX_DIRECTORY:
            raise ImageError(f"{capacity} sectors are too many", where + 12)
        super().__init__(capacity * 512, file.readonly)
        if not file.readonly and self._flags & (COMPRESSED | MARKERS):
            raise ImageError("streamOptimized VMDK images can only be read")
        self._file, self._raw = file, RawCore(file.fd, 0, 1 << 62, file.readonly)
        self.grain: int = grain * 512
        self._capacity: int = capacity * 512
        self._overhead: int = overhead * 512
        if text_size * 512 > 1 << 20:
            raise ImageError(f"a descriptor of {text_size} sectors is too long", where + 36)
        self.descriptor = file.pread(text_at * 512, text_size * 512) if text_at else b""
        self._directory = self._load(directory, tables)
        self._redundant = self._load(redundant, tables) if self._flags & REDUNDANT and not file.readonly else None
        self._tables: OrderedDict[int, array[int]] = OrderedDict()
        self._lock = threading.Lock()  # tables, `_end` and what a flush has still to write
        self._changed: dict[int, int] = {}  # grain -> sector
        self._end: int = max(-(-file.size // 512), overhead)
        self._opened = False

    @property
    def is_compressed(self) -> bool:
        """Are its grains compressed?"""
        return bool(self._flags & COMPRESSED)

    def limit(self, size: int) -> None:
        """Show only the first `size` bytes: the descriptor may say less than the extent maps."""
        self._size = size

    def _load(self, sector: int, entries: int) -> array[int]:
        loaded = array("I", self._file.pread(sector * 512, entries * 4))
        if sys.byteorder == "big":
            loaded.byteswap()
        return loaded

    def _table(self, i: int) -> array[int] | None:
        table = self._tables.get(i)
        if table is None:
            if not self._directory[i]:
                return None
            table = self._load(self._directory[i], _ENTRIES)
            self._tables[i] = table
            if len(self._tables) > _CACHED_TABLES:
                self._tables.popitem(last=False)
        else:
            self._tables.move_to_end(i)
        return table

    def _sector(self, grain: int) -> int:
        """Where a grain is: 0 not stored, 1 zeroes, else its sector in the file."""
        with self._lock:
            changed = self._changed.get(grain)
            if changed is not None:
                return changed
            table = self._table(grain // _ENTRIES)
            entry = table[grain % _ENTRIES] if table else 0
        if entry == 1 and not self._flags & ZERO_GRAINS:
            raise ImageError(
                f"grain {grain} is said to be in sector 1, the descriptor's",
                self._directory[grain // _ENTRIES] * 512,
            )
        return entry

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        while length:
            grain, at = divmod(offset, self.grain)
            n = min(length, self.grain - at)
            yield grain, at, n
            offset += n
            length -= n

    def _read(self, offset: int, out: memoryview) -> None:
        for grain, at, n in self._pieces(offset, len(out)):
            sector = self._sector(grain)
            if sector <= 1:
                out[:n] = bytes(n)
            elif self._flags & COMPRESSED:
                out[:n] = self._unpack(sector * 512, grain)[at : at + n]
            else:
                self._check_place(sector)
                self._raw.pread_into(sector * 512 + at, out[:n])
            out = out[n:]

    def _check_place(self, sector: int) -> None:
        if sector >= self._end or sector * 512 < self._overhead:
            raise ImageError("a grain is said to be where no grain can be", sector * 512)

    def _unpack(self, offset: int, grain: int) -> bytes:
        """A compressed grain: its first sector's number (with markers), the length, a zlib stream."""
        length = 0
        if self._flags & MARKERS:
            first, length = struct.unpack("<QI", self._file.pread(offset, 12))
            if first * 512 != grain * self.grain:
                raise ImageError(f"grain {grain} is marked as that of sector {first}", offset)
            offset += 12
        else:
            (length,) = struct.unpack("<I", self._file.pread(offset, 4))
            offset += 4
        if not 0 < length <= 2 * self.grain:
            raise ImageError(f"a compressed grain has {length} bytes", offset)
        try:
            data = zlib.decompressobj().decompress(self._file.pread(offset, length), self.grain)
        except zlib.error as error:
            raise ImageError(f"a compressed grain is damaged ({error})", offset) from None
        whole = min(self.grain, self._capacity - grain * self.grain)
        if len(data) < whole:
            raise ImageError(f"a compressed grain gives {len(data)} of {whole} bytes", offset)
        return data.ljust(self.grain, b"\0")

    def _write(self, offset: int, data: memoryview) -> None:
        for grain, at, n in self._pieces(offset, len(data)):
            sector = self._sector(grain)
            if sector <= 1:
                sector = self._append(grain)
            self._check_place(sector)
            self._raw.pwrite(sector * 512 + at, data[:n])
            data = data[n:]

    def _append(self, grain: int) -> int:
        sector = self._sector(grain)
        with self._lock:
            if grain in self._changed:
                return self._changed[grain]  # another thread was first
            if sector > 1:
                return sector
            if not self._directory[grain // _ENTRIES]:
                raise ImageError(f"there is no grain table for grain {grain}", grain // _ENTRIES * 4)
            if not self._opened:
                self._file.pwrite(_UNCLEAN, b"\1")
                self._opened = True
            i, entry = divmod(grain, _ENTRIES)
            for directory in (self._redundant, self._directory):  # room for what `_flush` will write
                if directory is not None and directory[i]:
                    self._file.reserve(directory[i] * 512 + entry * 4, 4)
            sectors = self.grain // 512
            place = self._end + -self._end % sectors
            if place + sectors >= 1 << 32:
                raise OSError(27, "a VMDK extent cannot be larger than 2 TiB")
            self._file.truncate((place + sectors) * 512)  # behind the end: reads as zeroes
            self._end = place + sectors
            self._changed[grain] = place
            return place

    def _write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        for grain, at, n in self._pieces(offset, length):
            sector = self._sector(grain)
            if sector > 1:
                self._check_place(sector)
                self._raw.write_zeroes(sector * 512 + at, n, unmap)

    def _discard(self, offset: int, length: int) -> None:
        self._write_zeroes(offset, length, True)

    def _flush(self) -> None:
        with self._lock:
            self._raw.flush()
            if not self._changed:
                return
            for grain, sector in self._changed.items():
                i, entry = divmod(grain, _ENTRIES)
                table = self._table(i)
                if table is not None:
                    table[entry] = sector
                for directory in (self._redundant, self._directory):
                    if directory is not None and directory[i]:
                        self._file.pwrite(directory[i] * 512 + entry * 4, struct.pack("<I", sector))
            self._raw.flush()
            self._changed.clear()

    def _status(self, offset: int, length: int) -> Extent:
        grain, at = divmod(offset, self.grain)
        first = self._sector(grain)
        n = self.grain - at
        sector = first
        while n < length and n < 1 << 30:
            following = self._sector(grain := grain + 1)
            if following != (sector if first <= 1 else sector + self.grain // 512) or (
                self._flags & COMPRESSED and first > 1
            ):
                break
            sector = following
            n += self.grain
        n = min(n, length)
        if first <= 1:
            return Extent(offset, n, data=False, zero=True, allocated=first == 1)
        if self._flags & COMPRESSED:
            return Extent(offset, n, data=True, zero=False, allocated=True, compressed=True)
        return Extent(offset, n, data=True, zero=False, allocated=True, host_offset=first * 512 + at)

    def _close(self) -> None:
        try:
            if self._opened:
                self._file.pwrite(_UNCLEAN, b"\0")
        finally:
            self._file.close()


def write_sparse(file: HostFile, sectors: int, text: bytes) -> None:
    """An empty sparse extent of `sectors`, with both grain directories, all grain tables and the descriptor
    `text`.
    """
    grain = GRAIN // 512
    tables = -(-sectors // (grain * _ENTRIES))
    if sectors >= 1 << 32:
        raise ValueError(f"{sectors * 512} bytes are too many for a VMDK extent, whose limit is 2 TiB")
    if len(text) > 20 * 512:
        raise ValueError("the descriptor is longer than its 20 sectors")
    directory_sectors = -(-tables * 4 // 512)
    each = directory_sectors + tables * 4
    redundant, directory = 21, 21 + each
    overhead = directory + each
    overhead += -overhead % grain
    header = _HEADER.pack(
        MAGIC,
        1,
        NEWLINES | REDUNDANT,
        sectors,
        grain,
        1,
        20,
        _ENTRIES,
        redundant,
        directory,
        overhead,
        0,
        b"\n \r\n",
        0,
    )
    file.pwrite(0, header.ljust(512, b"\0") + text)
    for at in (redundant, directory):
        entries = [at + directory_sectors + i * 4 for i in range(tables)]
        file.pwrite(at * 512, struct.pack(f"<{tables}I", *entries))
    file.truncate(overhead * 512)
