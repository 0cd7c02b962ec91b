# SPDX-License-Identifier: Apache-2.0
"""Disks whose data path is C (disk.h) as Python objects; here raw ones, in `_qcow2` and `_python` the others.

Every call drops the GIL before it takes a lock in C, so callbacks of C may take the GIL with C locks held.
"""
import errno as _errno
import os
import time

from kvmpy.block.disk import DiskStats, Extent
from kvmpy.errors import ImageError, StateError

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint64_t
from libc.stdlib cimport free, malloc

ctypedef disk disk_t

cdef extern from * nogil:
    """
    #define KVMPY_ADD(p, n) __atomic_add_fetch((p), (n), __ATOMIC_ACQ_REL)
    #define KVMPY_GET(p) __atomic_load_n((p), __ATOMIC_RELAXED)
    """
    int KVMPY_ADD(int *, int)
    uint64_t KVMPY_GET(uint64_t *)

cdef extern from "block/disk.h" nogil:
    cdef struct host_file:
        int fd
        bint no_sync
    cdef struct raw_disk:
        disk disk
        host_file file
        bint discard
    void raw_init(raw_disk *, int, uint64_t, uint64_t, bint)
    int buffer_is_zero(const void *, size_t)
    cdef struct disk_copy_t "disk_copy":
        disk_t *from_ "from"
        disk_t *to
        size_t chunk
        size_t unit
        bint to_is_zero
    int disk_copy(const disk_copy_t *, void *, uint64_t, uint64_t, const disk_t **)

def is_zero(buffer) -> bool:
    """True if every byte of `buffer` is zero."""
    cdef Py_buffer view
    cdef int result
    PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
    with nogil:
        result = buffer_is_zero(view.buf, view.len)
    PyBuffer_Release(&view)
    return bool(result)


def time_reads(CoreDisk disk, uint64_t count, size_t length, uint64_t step) -> int:
    """Nanoseconds for `count` reads of `length` bytes, each `step` bytes after the last (around the end); for benchmarks."""
    cdef void *buffer = malloc(length)
    cdef uint64_t i, at = 0
    cdef int result = 0
    cdef disk_t *ptr
    if buffer == NULL:
        raise MemoryError
    disk._begin(0, length)
    ptr = disk.ptr
    start = time.perf_counter_ns()
    with nogil:
        for i in range(count):
            result = disk_pread(ptr, buffer, length, at)
            if result:
                break
            at = (at + step) % (ptr.size - ptr.size % length)
    took = time.perf_counter_ns() - start
    disk.release()
    free(buffer)
    if result:
        raise disk.failure(result, "read")
    return took


def copy_data(CoreDisk source, CoreDisk target, offset, length, size_t chunk, size_t unit, bint target_is_zero) -> None:
    """Copy bytes [offset, offset + length), `chunk` at a time; `unit` zeroes or more become a hole (0: none do), which
    nothing is written for if `target_is_zero`.
    """
    cdef disk_copy_t copy
    cdef const disk_t *failed
    cdef uint64_t at, size
    cdef int result
    if not chunk:
        raise ValueError("chunk 0")
    source._begin(offset, length)
    try:
        target._begin(offset, length)
        try:
            at, size = offset, length
            copy.from_, copy.to, copy.chunk, copy.unit, copy.to_is_zero = source.ptr, target.ptr, chunk, unit, target_is_zero
            buffer = malloc(min(chunk, size))
            if buffer == NULL:
                raise MemoryError
            with nogil:
                result = disk_copy(&copy, buffer, at, size, &failed)
            free(buffer)
            if result:
                disk = source if failed == source.ptr else target
                raise disk.failure(result, f"{'read' if disk is source else 'write'} of {length} bytes at {offset:#x}")
        finally:
            target.release()
    finally:
        source.release()


cdef class CoreDisk:
    """A disk whose data path is C and runs without the GIL; see `kvmpy.block.Disk` for the methods."""

    cdef void acquire(self) noexcept:
        KVMPY_ADD(&self.users, 1)

    cdef void release(self) noexcept:
        KVMPY_ADD(&self.users, -1)

    cdef object failure(self, int result, str what):
        if result == -_errno.EBADMSG and self.ptr.fault.text != NULL:
            return ImageError(self.ptr.fault.text.decode(), self.ptr.fault.offset)
        if result == -_errno.EROFS:
            return PermissionError(_errno.EROFS, f"{what}: the disk is read-only")
        return OSError(-result, f"{what}: {os.strerror(-result)}")

    cdef int _begin(self, offset, length) except -1:
        if self.ptr == NULL:
            raise StateError("the disk is closed")
        if offset < 0 or length < 0 or offset + length > KVMPY_GET(&self.ptr.size):
            raise ValueError(
                f"bytes [{offset:#x}, {offset + length:#x}) are not inside a disk of {self.ptr.size:#x} bytes"
            )
        self.acquire()
        return 0

    @property
    def size(self) -> int:
        """Bytes."""
        if self.ptr == NULL:
            raise StateError("the disk is closed")
        return self.ptr.size

    @property
    def readonly(self) -> bool:
        if self.ptr == NULL:
            raise StateError("the disk is closed")
        return self.ptr.readonly

    @property
    def closed(self) -> bool:
        return self.ptr == NULL

    @property
    def backing(self):
        """The disk that answers where this layer has nothing, or None."""
        return self._backing

    @property
    def stats(self):
        """Counters since the disk was opened."""
        if self.ptr == NULL:
            raise StateError("the disk is closed")
        cdef disk_stats *s = &self.ptr.stats
        return DiskStats(KVMPY_GET(&s.reads), KVMPY_GET(&s.read_bytes), KVMPY_GET(&s.writes), KVMPY_GET(&s.written_bytes),
                         KVMPY_GET(&s.flushes), KVMPY_GET(&s.discards), KVMPY_GET(&s.zeroes), KVMPY_GET(&s.errors))

    def pread(self, offset, length) -> bytes:
        """Bytes [offset, offset + length)."""
        cdef uint64_t at
        cdef size_t size
        cdef int result
        self._begin(offset, length)
        try:
            at, size = offset, length
            data = PyBytes_FromStringAndSize(NULL, size)
            buffer = PyBytes_AS_STRING(data)
            with nogil:
                result = disk_pread(self.ptr, buffer, size, at)
            if result:
                raise self.failure(result, f"read of {length} bytes at {offset:#x}")
        finally:
            self.release()
        return data

    def pread_into(self, offset, buffer) -> None:
        """Fill `buffer` from `offset` on."""
        cdef Py_buffer view
        cdef uint64_t at
        cdef int result
        PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE)
        try:
            self._begin(offset, view.len)
            try:
                at = offset
                with nogil:
                    result = disk_pread(self.ptr, view.buf, view.len, at)
                if result:
                    raise self.failure(result, f"read of {view.len} bytes at {offset:#x}")
            finally:
                self.release()
        finally:
            PyBuffer_Release(&view)

    def pwrite(self, offset, data) -> None:
        """Write `data` at `offset`."""
        cdef Py_buffer view
        cdef uint64_t at
        cdef int result
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            self._begin(offset, view.len)
            try:
                at = offset
                with nogil:
                    result = disk_pwrite(self.ptr, view.buf, view.len, at)
                if result:
                    raise self.failure(result, f"write of {view.len} bytes at {offset:#x}")
            finally:
                self.release()
        finally:
            PyBuffer_Release(&view)

    def flush(self) -> None:
        """Return when all that was written is on disk."""
        cdef int result
        self._begin(0, 0)
        try:
            with nogil:
                result = disk_flush(self.ptr)
            if result:
                raise self.failure(result, "flush")
        finally:
            self.release()

    def discard(self, offset, length) -> None:
        """Tell that the content is no longer wanted; a hint."""
        cdef uint64_t at, size
        cdef int result
        self._begin(offset, length)
        try:
            at, size = offset, length
            with nogil:
                result = disk_discard(self.ptr, at, size)
            if result:
                raise self.failure(result, f"discard of {length} bytes at {offset:#x}")
        finally:
            self.release()

    def write_zeroes(self, offset, length, unmap=True) -> None:
        """Make the range read as zeroes; `unmap` lets the space go."""
        cdef uint64_t at, size
        cdef unsigned flags = DISK_UNMAP if unmap else 0
        cdef int result
        self._begin(offset, length)
        try:
            at, size = offset, length
            with nogil:
                result = disk_write_zeroes(self.ptr, at, size, flags)
            if result:
                raise self.failure(result, f"zeroes of {length} bytes at {offset:#x}")
        finally:
            self.release()

    def block_status(self, offset, length):
        """What is at `offset`, and for how many of the next `length` bytes."""
        cdef uint64_t at, size
        cdef disk_extent extent
        cdef int result
        if length <= 0:
            raise ValueError(f"length {length} is not positive")
        self._begin(offset, length)
        try:
            at, size = offset, length
            with nogil:
                result = disk_status(self.ptr, at, size, &extent)
            if result:
                raise self.failure(result, f"status of {length} bytes at {offset:#x}")
        finally:
            self.release()
        return Extent(offset, extent.length, bool(extent.flags & DISK_DATA), bool(extent.flags & DISK_ZERO),
                      bool(extent.flags & DISK_ALLOCATED), bool(extent.flags & DISK_COMPRESSED),
                      extent.host if extent.flags & DISK_HOST_OFFSET else None)

    cdef int _shut(self) except? -1:
        """Free what ptr points at; a result of the last flush."""
        return 0

    def close(self) -> None:
        """Flush and let go of the file; a second call does nothing. Backing disks that were opened for it close too."""
        if self.ptr == NULL:
            return
        if self.users:
            raise StateError("the disk is in use")
        cdef int result = 0
        try:
            self._before_close()
        finally:
            result = self._shut()
            self.ptr = NULL
            owner, self._owner, self._backing = self._owner, None, None
            for one in owner or ():
                one.close()
        if result:
            raise OSError(-result, f"close: {os.strerror(-result)}")

    def _before_close(self) -> None:
        """For subclasses in Python."""

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        self.close()

    def __dealloc__(self):
        # Not closed: what was not flushed is lost, as in a crash; the image stays consistent.
        if self.ptr != NULL:
            self.ptr.readonly = True
            self._shut()


cdef class RawCore(CoreDisk):
    """Bytes [start, start + size) of a file. `owner` are objects to close along with it."""

    cdef raw_disk raw

    def __cinit__(self, int fd, uint64_t start, uint64_t size, bint readonly, bint unsafe=False, bint discard=True, owner=(),
                  **ignored):
        raw_init(&self.raw, fd, start, size, readonly)
        self.raw.file.no_sync = unsafe
        self.raw.discard = discard
        self._owner = owner
        self.ptr = &self.raw.disk

    cdef int _shut(self) except? -1:
        return 0 if self.raw.disk.readonly else disk_flush(&self.raw.disk)

    def _set_size(self, uint64_t size):
        self.raw.disk.size = size
