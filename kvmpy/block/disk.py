# SPDX-License-Identifier: Apache-2.0
"""What a disk is: the protocol every image format answers to, and the values it speaks in."""

from __future__ import annotations

from types import TracebackType
from typing import NamedTuple, Protocol, Self, runtime_checkable

from kvmpy.errors import StateError

SECTOR = 512


class Extent(NamedTuple):
    """A stretch of a disk that has one state (NBD's and qemu-img map's words).

    `zero`: reads give zeroes. `data`: bytes are stored, here or in a backing file. `allocated`: this layer
    answers, not its backing file. `host_offset`: where the data stands in the image file, if it stands
    there as it is.
    """

    offset: int
    length: int
    data: bool
    zero: bool
    allocated: bool
    compressed: bool = False
    host_offset: int | None = None


class DiskStats(NamedTuple):
    """Counters since the disk was opened: requests, and bytes moved by them."""

    reads: int = 0
    read_bytes: int = 0
    writes: int = 0
    written_bytes: int = 0
    flushes: int = 0
    discards: int = 0
    write_zeroes: int = 0
    errors: int = 0


@runtime_checkable
class Disk(Protocol):
    """A virtual disk. Offsets and lengths are bytes, need no alignment and must lie inside `size`.

    Every transfer is complete or raises: OSError with the host's errno, ImageError for damage in the image,
    ValueError for a range outside the disk, StateError once closed. What `flush` has returned for is on
    disk. All methods may be called from several threads.
    """

    @property
    def size(self) -> int: ...
    @property
    def readonly(self) -> bool: ...
    @property
    def stats(self) -> DiskStats: ...
    @property
    def backing(self) -> Disk | None: ...
    def pread(self, offset: int, length: int) -> bytes: ...
    def pread_into(self, offset: int, buffer: bytearray | memoryview) -> None: ...
    def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None: ...
    def flush(self) -> None: ...
    def discard(self, offset: int, length: int) -> None: ...
    def write_zeroes(self, offset: int, length: int, unmap: bool = True) -> None: ...
    def block_status(self, offset: int, length: int) -> Extent: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class PythonDisk:
    """Base of the formats whose data path is Python: checks, counters and what can be derived from the
    rest.

    A format implements `_read`, `_write`, `_flush`, `_status` and, if it can do better than data,
    `_write_zeroes` and `_discard`.
    """

    def __init__(self, size: int, readonly: bool) -> None:
        self._size = size
        self._readonly = readonly
        self._closed = False
        self._counts = dict.fromkeys(DiskStats._fields, 0)

    @property
    def size(self) -> int:
        """Bytes."""
        return self._size

    @property
    def readonly(self) -> bool:
        return self._readonly

    @property
    def stats(self) -> DiskStats:
        return DiskStats(**self._counts)

    @property
    def backing(self) -> Disk | None:
        return None

    def _check(self, what: str, offset: int, length: int, writes: bool = False) -> None:
        if self._closed:
            raise StateError("the disk is closed")
        if offset < 0 or length < 0 or offset + length > self._size:
            raise ValueError(
                f"bytes [{offset:#x}, {offset + length:#x}) are not inside a disk of {self._size:#x} bytes"
            )
        if writes and self._readonly:
            raise PermissionError(30, "the disk is read-only")
        self._counts[what] += 1

    def pread(self, offset: int, length: int) -> bytes:
        """Bytes [offset, offset + length)."""
        self._check("reads", offset, length)
        out = bytearray(length)
        self._counts["read_bytes"] += length
        self._counted(self._read, offset, memoryview(out))
        return bytes(out)

    def pread_into(self, offset: int, buffer: bytearray | memoryview) -> None:
        """Fill `buffer` from `offset` on."""
        view = memoryview(buffer).cast("B")
        self._check("reads", offset, len(view))
        self._counts["read_bytes"] += len(view)
        self._counted(self._read, offset, view)

    def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write `data` at `offset`."""
        view = memoryview(data).cast("B")
        self._check("writes", offset, len(view), writes=True)
        self._counts["written_bytes"] += len(view)
        self._counted(self._write, offset, view)

    def flush(self) -> None:
        """Return when all that was written is on disk."""
        self._check("flushes", 0, 0)
        if not self._readonly:
            self._counted(self._flush)

    def discard(self, offset: int, length: int) -> None:
        """Tell that the content is no longer wanted; a hint."""
        self._check("discards", offset, length, writes=True)
        self._counted(self._discard, offset, length)

    def write_zeroes(self, offset: int, length: int, unmap: bool = True) -> None:
        """Make the range read as zeroes; `unmap` lets the space go."""
        self._check("write_zeroes", offset, length, writes=True)
        self._counted(self._write_zeroes, offset, length, unmap)

    def block_status(self, offset: int, length: int) -> Extent:
        """What is at `offset`, and for how many of the next `length` bytes."""
        if length <= 0:
            raise ValueError(f"length {length} is not positive")
        if self._closed:
            raise StateError("the disk is closed")
        if offset < 0 or offset + length > self._size:
            raise ValueError(
                f"bytes [{offset:#x}, {offset + length:#x}) are not inside a disk of {self._size:#x} bytes"
            )
        return self._status(offset, length)

    def close(self) -> None:
        """Flush and let go; a second call does nothing."""
        if self._closed:
            return
        try:
            if not self._readonly:
                self._flush()
        finally:
            self._closed = True
            self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _counted(self, method: object, *arguments: object) -> None:
        try:
            method(*arguments)  # type: ignore[operator]
        except Exception:
            self._counts["errors"] += 1
            raise

    def _read(self, offset: int, out: memoryview) -> None:
        raise NotImplementedError

    def _write(self, offset: int, data: memoryview) -> None:
        raise NotImplementedError

    def _flush(self) -> None:
        raise NotImplementedError

    def _status(self, offset: int, length: int) -> Extent:
        return Extent(offset, length, data=True, zero=False, allocated=True)

    def _write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        zeroes = memoryview(bytes(min(length, 1 << 20)))
        for at in range(offset, offset + length, 1 << 20):
            self._write(at, zeroes[: min(1 << 20, offset + length - at)])

    def _discard(self, offset: int, length: int) -> None:
        """Discards are hints: a format that cannot give space back does nothing."""

    def _close(self) -> None:
        raise NotImplementedError
