# SPDX-License-Identifier: Apache-2.0
"""The C disks as Python objects: raw, qcow2, and any Python disk behind the same C face.

Every call drops the GIL before it takes a lock in C, so the callbacks below may take the GIL with C locks held.
"""
import errno as _errno
import logging
import os
import time

from kvmpy.block.disk import DiskStats, Extent
from kvmpy.errors import ImageError, StateError

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy

ctypedef disk disk_t

log = logging.getLogger("kvmpy.block")

cdef extern from * nogil:
    """
    #define KVMPY_ADD(p, n) __atomic_add_fetch((p), (n), __ATOMIC_ACQ_REL)
    #define KVMPY_GET(p) __atomic_load_n((p), __ATOMIC_RELAXED)
    """
    int KVMPY_ADD(int *, int)
    uint64_t KVMPY_GET(uint64_t *)

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_rwlock_t:
        pass
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_rwlock_wrlock(pthread_rwlock_t *)
    int pthread_rwlock_unlock(pthread_rwlock_t *)
    int pthread_mutex_lock(pthread_mutex_t *)
    int pthread_mutex_unlock(pthread_mutex_t *)

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

cdef extern from "block/qcow2.h" nogil:
    cdef struct q_params:
        int fd, data_fd
        unsigned version, cluster_bits, refcount_order
        uint64_t size, incompatible, l1_offset, l1_size, rt_offset, rt_clusters
        bint lazy, raw_external, readonly, no_sync, discard
        uint64_t cache_bytes
    cdef struct q_place:
        uint64_t offset, length
    cdef struct qcow2:
        disk disk
        disk *backing
        unsigned cluster_bits
        uint64_t cluster_size, incompatible
        bint corrupt
        uint64_t *l1
        uint64_t l1_size, l1_offset
        uint64_t *rt
        uint64_t rt_size, rt_offset, file_clusters
        q_place fixed[3]
        int (*decompress)(void *, const void *, size_t, void *, size_t) noexcept
        void *context
        pthread_mutex_t flush_lock, lock
        pthread_rwlock_t io
    ctypedef void (*q_report)(void *, int, uint64_t, uint64_t) noexcept
    int q_open(qcow2 *, const q_params *)
    int q_close(qcow2 *)
    int q_replace_l1(qcow2 *, uint64_t, uint64_t)
    int q_set_incompatible(qcow2 *, uint64_t)
    int q_flush(qcow2 *, bint)
    int q_refcount(qcow2 *, uint64_t, uint64_t *)
    int q_set_refcount(qcow2 *, uint64_t, uint64_t)
    int q_alloc(qcow2 *, uint64_t, bint, uint64_t *, uint64_t *, bint *)
    int q_free_later(qcow2 *, uint64_t, uint64_t)
    int q_preallocate(qcow2 *)
    int q_write_compressed(qcow2 *, uint64_t, const void *, size_t)
    int q_walk_refcounts(qcow2 *, const uint64_t *, uint64_t, int)
    int q_walk_flags(qcow2 *, const uint64_t *, uint64_t)
    int q_walk_compare(qcow2 *, const uint32_t *, uint64_t, bint, bint, q_report, void *)
    int q_walk_count(qcow2 *, const uint64_t *, uint64_t, bint, bint, uint32_t *, uint64_t, uint64_t *, q_report, void *)


cdef extern from * nogil:
    """
    #include <stdbool.h>
    static int kvmpy_q_alloc(struct qcow2 *q, uint64_t want, uint64_t *offset)
    {
        uint64_t got;
        bool fresh;
        return q_alloc(q, want, true, offset, &got, &fresh);
    }
    """
    int kvmpy_q_alloc(qcow2 *, uint64_t, uint64_t *)


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


def zero_runs(buffer, size_t unit) -> list:
    """[(offset, length, is zero), ...] of `buffer`, in steps of `unit` bytes."""
    cdef Py_buffer view
    cdef size_t at = 0, start = 0, step
    cdef int zero, before = -1
    runs = []
    if not unit:
        raise ValueError("unit 0")
    PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
    try:
        while at < view.len:
            with nogil:
                while True:
                    step = min(unit, view.len - at)
                    zero = buffer_is_zero(<char *>view.buf + at, step)
                    if before != -1 and zero != before:
                        break
                    before = zero
                    at += step
                    if at >= view.len:
                        break
            runs.append((start, at - start, bool(before)))
            start = at
            before = -1
    finally:
        PyBuffer_Release(&view)
    return runs


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


# --- a disk written in Python, behind the C face -------------------------------------------------------------------

cdef struct py_disk:
    disk disk
    void *object


cdef int _from_exception(py_disk *pd, object error) noexcept:
    if isinstance(error, ImageError):
        log.warning("a Python disk reports damage: %s", error)
        pd.disk.fault.text = b"the image below is damaged (the log has the details)"
        pd.disk.fault.offset = error.offset or 0
        return -_errno.EBADMSG
    if isinstance(error, OSError) and error.errno:
        return -error.errno
    log.error("a Python disk failed", exc_info=error)
    return -_errno.EIO


cdef int py_preadv(disk *d, const iovec *iov, int count, uint64_t offset) noexcept nogil:
    cdef py_disk *pd = <py_disk *>d
    cdef int i
    with gil:
        try:
            target = <object>pd.object
            for i in range(count):
                target.pread_into(offset, PyMemoryView_FromMemory(<char *>iov[i].iov_base, iov[i].iov_len, 0x200))
                offset += iov[i].iov_len
            return 0
        except Exception as error:
            return _from_exception(pd, error)


cdef int py_pwritev(disk *d, const iovec *iov, int count, uint64_t offset) noexcept nogil:
    cdef py_disk *pd = <py_disk *>d
    cdef int i
    with gil:
        try:
            target = <object>pd.object
            for i in range(count):
                target.pwrite(offset, PyMemoryView_FromMemory(<char *>iov[i].iov_base, iov[i].iov_len, 0x100))
                offset += iov[i].iov_len
            return 0
        except Exception as error:
            return _from_exception(pd, error)


cdef int py_flush(disk *d) noexcept nogil:
    cdef py_disk *pd = <py_disk *>d
    with gil:
        try:
            (<object>pd.object).flush()
            return 0
        except Exception as error:
            return _from_exception(pd, error)


cdef int py_discard(disk *d, uint64_t offset, uint64_t length) noexcept nogil:
    cdef py_disk *pd = <py_disk *>d
    with gil:
        try:
            (<object>pd.object).discard(offset, length)
            return 0
        except Exception as error:
            return _from_exception(pd, error)


cdef int py_write_zeroes(disk *d, uint64_t offset, uint64_t length, unsigned flags) noexcept nogil:
    cdef py_disk *pd = <py_disk *>d
    with gil:
        try:
            (<object>pd.object).write_zeroes(offset, length, bool(flags & DISK_UNMAP))
            return 0
        except Exception as error:
            return _from_exception(pd, error)


cdef int py_status(disk *d, uint64_t offset, uint64_t length, disk_extent *extent) noexcept nogil:
    cdef py_disk *pd = <py_disk *>d
    with gil:
        try:
            e = (<object>pd.object).block_status(offset, length)
            extent.length = e.length
            extent.host = e.host_offset or 0
            extent.flags = ((DISK_DATA if e.data else 0) | (DISK_ZERO if e.zero else 0) | (DISK_ALLOCATED if e.allocated else 0)
                            | (DISK_COMPRESSED if e.compressed else 0) | (DISK_HOST_OFFSET if e.host_offset is not None else 0))
            if not 0 < extent.length <= length:
                raise ValueError(f"{e} for a request of {length} bytes")
            return 0
        except Exception as error:
            return _from_exception(pd, error)


cdef disk_ops py_ops
py_ops.preadv = py_preadv
py_ops.pwritev = py_pwritev
py_ops.flush = py_flush
py_ops.discard = py_discard
py_ops.write_zeroes = py_write_zeroes
py_ops.status = py_status


cdef class PyCore(CoreDisk):
    """A Python disk for C callers; they take the GIL for each request."""

    cdef py_disk pd

    def __cinit__(self, target):
        self.pd.disk.ops = &py_ops
        self.pd.disk.size = target.size
        self.pd.disk.readonly = target.readonly
        self.pd.object = <void *>target
        self._owner = (target,)
        self.ptr = &self.pd.disk


def as_core(disk) -> CoreDisk:
    """`disk` as C callers see it: itself if its data path is C, else a shell around it."""
    return disk if isinstance(disk, CoreDisk) else PyCore(disk)


# --- qcow2 -----------------------------------------------------------------------------------------------------------

cdef int _decompress(void *context, const void *data, size_t size, void *out, size_t out_size) noexcept nogil:
    with gil:
        try:
            (<Qcow2Core>context)._decompress(PyBytes_FromStringAndSize(<const char *>data, size),
                                             PyMemoryView_FromMemory(<char *>out, out_size, 0x200))
            return 0
        except Exception as error:
            log.debug("decompression failed: %s", error)
            return -1


cdef void _report(void *context, int kind, uint64_t offset, uint64_t value) noexcept nogil:
    with gil:
        (<list>context).append((kind, offset, value))


cdef class Qcow2Core(CoreDisk):
    """The C part of a qcow2 image. Headers, snapshots and checks are in kvmpy.block.qcow2."""

    cdef qcow2 q
    cdef public object _decompress
    cdef bint opened

    def __cinit__(self, *arguments, **keywords):
        self.ptr = NULL

    def _open(self, int fd, int data_fd, header, bint readonly, bint unsafe, bint discard, uint64_t cache_bytes, decompress, owner):
        """`header`: a checked kvmpy.block.qcow2.Header; `owner`: what to close along with it."""
        cdef q_params p
        cdef int result
        if self.opened:
            raise StateError("already open")
        p.fd, p.data_fd, p.version, p.cluster_bits = fd, data_fd, header.version, header.cluster_bits
        p.refcount_order, p.size, p.incompatible = header.refcount_order, header.size, header.incompatible
        p.l1_offset, p.l1_size = header.l1_table_offset, header.l1_size
        p.rt_offset, p.rt_clusters = header.refcount_table_offset, header.refcount_table_clusters
        p.lazy, p.raw_external = header.lazy_refcounts, header.raw_external
        p.readonly, p.no_sync, p.discard, p.cache_bytes = readonly, unsafe, discard, cache_bytes
        self.opened = True
        with nogil:
            result = q_open(&self.q, &p)
        self.ptr = &self.q.disk
        if result:
            error = self.failure(result, "open")
            self.q.disk.readonly = True
            q_close(&self.q)
            self.ptr = NULL
            raise error
        self._decompress = decompress
        self.q.decompress = _decompress
        self.q.context = <void *>self
        self._owner = owner

    cdef int _shut(self) except? -1:
        cdef int result
        with nogil:
            result = q_close(&self.q)
        return result

    def _set_backing(self, backing) -> None:
        """Reads of unallocated clusters go to `backing` (closed along with this disk)."""
        cdef CoreDisk core = as_core(backing)
        self._backing = backing
        self._owner = (*self._owner, core)
        self.q.backing = core.ptr

    def _set_size(self, uint64_t size) -> None:
        self.q.disk.size = size

    def _set_readonly(self, bint readonly) -> None:
        self.q.disk.readonly = readonly

    def _write_compressed(self, uint64_t offset, bytes data) -> None:
        cdef const char *buffer = data
        cdef size_t size = len(data)
        cdef int result
        self._begin(offset, 0)
        try:
            with nogil:
                result = q_write_compressed(&self.q, offset, buffer, size)
            if result:
                raise self.failure(result, f"compressed write at {offset:#x}")
        finally:
            self.release()

    def _preallocate(self) -> None:
        cdef int result
        with nogil:
            result = q_preallocate(&self.q)
        if result:
            raise self.failure(result, "preallocation")

    @property
    def _file_end(self) -> int:
        """Bytes of the image file that are in use or were."""
        return self.q.file_clusters << self.q.cluster_bits

    # What follows is for snapshots, resize and repair: _lock, work, _unlock, in one thread.

    def _lock(self) -> None:
        self._begin(0, 0)
        with nogil:
            pthread_mutex_lock(&self.q.flush_lock)
            pthread_rwlock_wrlock(&self.q.io)

    def _unlock(self) -> None:
        pthread_rwlock_unlock(&self.q.io)
        pthread_mutex_unlock(&self.q.flush_lock)
        self.release()

    def _flush_locked(self) -> None:
        cdef int result
        with nogil:
            result = q_flush(&self.q, True)
        if result:
            raise self.failure(result, "flush")

    def _alloc(self, uint64_t length) -> int:
        """Allocate `length` bytes of contiguous clusters; the offset."""
        cdef uint64_t offset
        cdef int result
        cdef uint64_t want = (length + self.q.cluster_size - 1) >> self.q.cluster_bits
        with nogil:
            pthread_mutex_lock(&self.q.lock)
            result = kvmpy_q_alloc(&self.q, want, &offset)
            pthread_mutex_unlock(&self.q.lock)
        if result:
            raise self.failure(result, f"allocation of {length} bytes")
        return offset

    def _free(self, uint64_t offset, uint64_t length) -> None:
        """Lower the refcounts of a range with the next flush."""
        cdef int result
        if not length:
            return
        with nogil:
            pthread_mutex_lock(&self.q.lock)
            result = q_free_later(&self.q, offset, length)
            pthread_mutex_unlock(&self.q.lock)
        if result:
            raise self.failure(result, "free")

    def _refcount(self, uint64_t cluster) -> int:
        cdef uint64_t value
        cdef int result
        with nogil:
            pthread_mutex_lock(&self.q.lock)
            result = q_refcount(&self.q, cluster, &value)
            pthread_mutex_unlock(&self.q.lock)
        if result:
            raise self.failure(result, f"refcount of cluster {cluster:#x}")
        return value

    def _set_refcount(self, uint64_t cluster, uint64_t value) -> None:
        cdef int result
        with nogil:
            pthread_mutex_lock(&self.q.lock)
            result = q_set_refcount(&self.q, cluster, value)
            pthread_mutex_unlock(&self.q.lock)
        if result:
            raise self.failure(result, f"refcount of cluster {cluster:#x}")

    def _set_incompatible(self, uint64_t bits) -> None:
        cdef int result
        with nogil:
            pthread_mutex_lock(&self.q.lock)
            result = q_set_incompatible(&self.q, bits)
            self.q.corrupt = bits & 2
            pthread_mutex_unlock(&self.q.lock)
        if result:
            raise self.failure(result, "header")

    @property
    def _incompatible(self) -> int:
        return self.q.incompatible

    @property
    def _l1(self):
        """(offset, entries) of the active L1 table."""
        return self.q.l1_offset, [self.q.l1[i] for i in range(self.q.l1_size)]

    @property
    def _reftable(self):
        """(offset, entries) of the refcount table."""
        return self.q.rt_offset, [self.q.rt[i] for i in range(self.q.rt_size)]

    def _replace_l1(self, uint64_t offset, uint64_t entries) -> None:
        cdef int result
        with nogil:
            pthread_mutex_lock(&self.q.lock)
            result = q_replace_l1(&self.q, offset, entries)
            pthread_mutex_unlock(&self.q.lock)
        if result:
            raise self.failure(result, "L1 table")

    def _protect_snapshots(self, uint64_t offset, uint64_t length) -> None:
        """Data must not be written over the snapshot table."""
        with nogil:
            pthread_mutex_lock(&self.q.lock)
            self.q.fixed[2].offset = offset
            self.q.fixed[2].length = length
            pthread_mutex_unlock(&self.q.lock)

    def _walk(self, list l1, int delta) -> None:
        """Add `delta` to the refcounts of all that `l1` reaches."""
        cdef uint64_t *table = <uint64_t *>PyMem_Calloc(len(l1) + 1, 8)
        cdef uint64_t n = len(l1), i
        cdef int result
        if table == NULL:
            raise MemoryError
        try:
            for i in range(n):
                table[i] = l1[i]
            with nogil:
                result = q_walk_refcounts(&self.q, table, n, delta)
            if result == -_errno.ERANGE:
                raise ImageError("a refcount of this image is too narrow to count one more user of a cluster")
            if result:
                raise self.failure(result, "refcount update")
        finally:
            PyMem_Free(table)

    def _fix_flags(self, list l1=None) -> None:
        """Make the COPIED flags of what `l1` (None: the active table) reaches agree with the refcounts."""
        cdef uint64_t n = len(l1 or ()), i
        cdef uint64_t *table = NULL
        cdef int result
        if l1 is not None:
            table = <uint64_t *>PyMem_Calloc(n + 1, 8)
            if table == NULL:
                raise MemoryError
        try:
            for i in range(n):
                table[i] = l1[i]
            with nogil:
                result = q_walk_flags(&self.q, table, n)
            if result:
                raise self.failure(result, "update of the COPIED flags")
        finally:
            PyMem_Free(table)

    def _compare(self, uint32_t[::1] counts, bint fix_leaks, bint fix_low) -> list:
        """Compare refcounts with counts: [(kind, cluster, refcount), ...] of those that differ (or differed)."""
        cdef uint64_t clusters = counts.shape[0]
        cdef const uint32_t *table = &counts[0] if clusters else NULL
        cdef int result
        reports = []
        with nogil:
            result = q_walk_compare(&self.q, table, clusters, fix_leaks, fix_low, _report, <void *>reports)
        if result:
            raise self.failure(result, "check of refcounts")
        return reports

    def _count(self, list l1, bint active, bint fix, uint32_t[::1] counts):
        """Count what `l1` refers to into `counts`; (reports, [allocated, compressed, fragmented, 0])."""
        cdef uint64_t *table = <uint64_t *>PyMem_Calloc(len(l1) + 1, 8)
        cdef uint64_t n = len(l1), i, clusters = counts.shape[0]
        cdef uint64_t statistics[4]
        cdef uint32_t *out = &counts[0] if clusters else NULL
        cdef int result
        statistics[:] = [0, 0, 0, 0]
        reports = []
        if table == NULL:
            raise MemoryError
        try:
            for i in range(n):
                table[i] = l1[i]
            with nogil:
                result = q_walk_count(&self.q, table, n, active, fix, out, clusters, statistics, _report, <void *>reports)
            if result:
                raise self.failure(result, "check")
        finally:
            PyMem_Free(table)
        return reports, [statistics[i] for i in range(4)]
