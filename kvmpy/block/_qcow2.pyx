# SPDX-License-Identifier: Apache-2.0
"""The C part of a qcow2 image (qcow2.h) as a Python object; headers, snapshots and checks are in `kvmpy.block.qcow2`."""
import errno as _errno
import logging

from kvmpy.block._python import as_core
from kvmpy.errors import ImageError, StateError

from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.stdint cimport uint32_t, uint64_t

from kvmpy.block._disk cimport CoreDisk, disk

log = logging.getLogger("kvmpy.block")

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_rwlock_t:
        pass
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_rwlock_wrlock(pthread_rwlock_t *)
    int pthread_rwlock_unlock(pthread_rwlock_t *)
    int pthread_mutex_lock(pthread_mutex_t *)
    int pthread_mutex_unlock(pthread_mutex_t *)

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
