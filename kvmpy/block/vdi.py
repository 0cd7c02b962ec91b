# SPDX-License-Identifier: Apache-2.0
"""VDI, VirtualBox's format: a header, a map of blocks, the blocks. Dynamic and static images, version 1.1.

Not supported, and refused by name: differencing images (type 4), blocks with extra data, sector sizes other
than 512.

A new block is appended; the map learns of it with the next flush, after the data is on disk. Offsets of
fields are those of VirtualBox's VDIHEADER1PLUS, checked against images made by qemu-img.
"""

from __future__ import annotations

import os
import struct
import sys
import threading
import uuid
from array import array
from collections.abc import Iterator

from kvmpy.block._disk import RawCore
from kvmpy.block.disk import Extent, PythonDisk
from kvmpy.block.hostfile import HostFile
from kvmpy.errors import ImageError

SIGNATURE = 0xBEDA107F
VERSION = 0x00010001
DYNAMIC, STATIC, DIFFERENCING = 1, 2, 4
FREE, ZERO = 0xFFFFFFFF, 0xFFFFFFFE
BLOCK = 1 << 20
_TEXT = b"<<< Oracle VM VirtualBox Disk Image >>>\n"
_MAX_MAP = 256 << 20  # bytes: 64 TiB in blocks of 1 MiB
_HEADER = struct.Struct("<64sIIIII256sIIIIIIIQIIII16s16s16s16s")


class VdiDisk(PythonDisk):
    """An open VDI image."""

    format = "vdi"

    def __init__(self, file: HostFile) -> None:
        raw = file.pread(0, _HEADER.size)
        (
            _,
            signature,
            version,
            header_size,
            kind,
            _flags,
            _comment,
            map_at,
            data_at,
            _cylinders,
            _heads,
            _sectors,
            sector,
            _unused,
            size,
            block,
            extra,
            blocks,
            allocated,
            _create,
            _modify,
            link,
            _parent,
        ) = _HEADER.unpack(raw)
        if signature != SIGNATURE:
            raise ImageError("not a VDI image: wrong signature", 0x40)
        if version != VERSION:
            raise ImageError(f"VDI version {version >> 16}.{version & 0xFFFF} is not supported (1.1 is)", 0x44)
        if kind == DIFFERENCING or any(link):
            raise ImageError("differencing VDI images are not supported", 0x4C)
        if kind not in (DYNAMIC, STATIC):
            raise ImageError(f"VDI type {kind} is not supported", 0x4C)
        if header_size < 0x180 or sector != 512:
            raise ImageError(
                f"a VDI header of {header_size} bytes with sectors of {sector} bytes is not supported", 0x48
            )
        if extra:
            raise ImageError(f"VDI blocks with {extra} bytes of extra data are not supported", 0x17C)
        if block & (block - 1) or not 4096 <= block <= 256 << 20:
            raise ImageError(f"a VDI block size of {block} bytes is not a power of two within 4 KiB..256 MiB", 0x178)
        if blocks * 4 > _MAX_MAP or blocks * block < size or allocated > blocks:
            raise ImageError(
                f"{blocks} blocks ({allocated} allocated) of {block} bytes do not fit a disk of {size} bytes",
                0x180,
            )
        if map_at % 512 or data_at % 512 or map_at < _HEADER.size or map_at + blocks * 4 > data_at:
            raise ImageError(f"the map at {map_at:#x} and the data at {data_at:#x} overlap", 0x154)
        super().__init__(size, file.readonly)
        self._file = file
        self._block: int = block
        self._map_at: int = map_at
        self._data_at: int = data_at
        self._allocated: int = allocated
        self._map: array[int] = _map_from(file.pread(map_at, blocks * 4))
        self._check_map()
        self._raw = RawCore(file.fd, 0, 1 << 62, file.readonly)
        self._lock = threading.Lock()  # map, count and what a flush has still to write
        self._changed: set[int] = set()

    @property
    def path(self) -> str:
        """Where the file was opened."""
        return self._file.path

    @property
    def cluster_size(self) -> int:
        """Bytes of a block."""
        return self._block

    @property
    def allocated_blocks(self) -> int:
        return self._allocated

    def _check_map(self) -> None:
        used = bytearray(self._allocated)
        for i, entry in enumerate(self._map):
            if entry >= ZERO:
                continue
            if entry >= self._allocated or used[entry]:
                raise ImageError(
                    f"map entry {i} names block {entry:#x}, which does not exist or is used twice",
                    self._map_at + i * 4,
                )
            used[entry] = 1

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """(block, offset in it, length) for each block that a range touches."""
        while length:
            block, at = divmod(offset, self._block)
            n = min(length, self._block - at)
            yield block, at, n
            offset += n
            length -= n

    def _host(self, entry: int) -> int:
        return self._data_at + entry * self._block

    def _read(self, offset: int, out: memoryview) -> None:
        for block, at, n in self._pieces(offset, len(out)):
            entry = self._map[block]
            if entry >= ZERO:
                out[:n] = bytes(n)
            else:
                self._raw.pread_into(self._host(entry) + at, out[:n])
            out = out[n:]

    def _write(self, offset: int, data: memoryview) -> None:
        for block, at, n in self._pieces(offset, len(data)):
            if self._map[block] >= ZERO:
                self._append(block)
            self._raw.pwrite(self._host(self._map[block]) + at, data[:n])
            data = data[n:]

    def _append(self, block: int) -> None:
        with self._lock:
            if self._map[block] < ZERO:
                return  # another thread was first
            place = self._host(self._allocated)
            # Whatever an earlier life left there must not show around the data.
            if self._file.size > place:
                self._raw.write_zeroes(place, self._block)
            self._file.truncate(max(self._file.size, place + self._block))
            self._map[block] = self._allocated
            self._allocated += 1
            self._changed.add(block)

    def _write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        for block, at, n in self._pieces(offset, length):
            entry = self._map[block]
            if entry < ZERO:
                self._raw.write_zeroes(self._host(entry) + at, n, unmap)

    def _discard(self, offset: int, length: int) -> None:
        self._write_zeroes(offset, length, True)

    def _flush(self) -> None:
        with self._lock:
            self._raw.flush()
            if not self._changed:
                return
            # The count first: a block that it covers and no entry names is only leaked.
            self._file.pwrite(0x184, struct.pack("<I", self._allocated))
            for block in self._changed:
                self._file.pwrite(self._map_at + block * 4, struct.pack("<I", self._map[block]))
            self._raw.flush()
            self._changed.clear()

    def _status(self, offset: int, length: int) -> Extent:
        block, at = divmod(offset, self._block)
        entry = self._map[block]
        n = self._block - at
        while n < length:
            block += 1
            following = self._map[block]
            if (following >= ZERO) != (entry >= ZERO) or (entry < ZERO and following != self._map[block - 1] + 1):
                break
            n += self._block
        n = min(n, length)
        if entry >= ZERO:
            return Extent(offset, n, data=False, zero=True, allocated=entry == ZERO)
        return Extent(offset, n, data=True, zero=False, allocated=True, host_offset=self._host(entry) + at)

    def _close(self) -> None:
        self._file.close()


def open_vdi(file: HostFile) -> VdiDisk:
    """The disk in `file`, which it closes in the end; ImageError if it is no VDI image that can be used."""
    try:
        return VdiDisk(file)
    except BaseException:
        file.close()
        raise


def create_vdi(path: str | os.PathLike[str], size: int, *, static: bool = False) -> None:
    """A new VDI image of `size` bytes (rounded up to 512); `static` gives every block its place now."""
    size += -size % 512
    blocks = -(-size // BLOCK)
    if blocks * 4 > _MAX_MAP:
        raise ValueError(f"{size} bytes are too many for a VDI image, whose limit is {_MAX_MAP // 4 * BLOCK}")
    map_at, data_at = 512, 512 + (blocks * 4 + 511) // 512 * 512
    header = _HEADER.pack(
        _TEXT,
        SIGNATURE,
        VERSION,
        0x190,
        STATIC if static else DYNAMIC,
        0,
        b"",
        map_at,
        data_at,
        0,
        0,
        0,
        512,
        0,
        size,
        BLOCK,
        0,
        blocks,
        blocks if static else 0,
        uuid.uuid4().bytes_le,
        uuid.uuid4().bytes_le,
        bytes(16),
        bytes(16),
    )
    entries = array("I", range(blocks)) if static else array("I", [FREE]) * blocks
    with HostFile.create(path) as file:
        file.pwrite(0, header.ljust(512, b"\0"))
        file.pwrite(map_at, _map_to(entries))
        file.truncate(data_at + (blocks * BLOCK if static else 0))
        file.sync()


def _map_from(raw: bytes) -> array[int]:
    entries = array("I", raw)
    if sys.byteorder == "big":
        entries.byteswap()
    return entries


def _map_to(entries: array[int]) -> bytes:
    if sys.byteorder == "big":
        entries = array("I", entries)
        entries.byteswap()
    return entries.tobytes()
