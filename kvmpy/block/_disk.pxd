# SPDX-License-Identifier: Apache-2.0
# What a device needs to use a disk without the GIL: `CoreDisk.ptr` and the doors of disk.h.
from libc.stdint cimport uint64_t

cdef extern from "<sys/uio.h>" nogil:
    cdef struct iovec:
        void *iov_base
        size_t iov_len

cdef extern from "block/disk.h" nogil:
    enum:
        DISK_DATA
        DISK_ZERO
        DISK_ALLOCATED
        DISK_COMPRESSED
        DISK_HOST_OFFSET
        DISK_UNMAP
    cdef struct disk_extent:
        uint64_t length
        uint64_t host
        unsigned flags
    cdef struct disk_stats:
        uint64_t reads, read_bytes, writes, written_bytes, flushes, discards, zeroes, errors
    cdef struct disk_fault:
        const char *text
        uint64_t offset
    cdef struct disk:
        const disk_ops *ops
        uint64_t size
        bint readonly
        disk_stats stats
        disk_fault fault
    cdef struct disk_ops:
        int (*preadv)(disk *, const iovec *, int, uint64_t) noexcept
        int (*pwritev)(disk *, const iovec *, int, uint64_t) noexcept
        int (*flush)(disk *) noexcept
        int (*discard)(disk *, uint64_t, uint64_t) noexcept
        int (*write_zeroes)(disk *, uint64_t, uint64_t, unsigned) noexcept
        int (*status)(disk *, uint64_t, uint64_t, disk_extent *) noexcept
    int disk_preadv(disk *, const iovec *, int, uint64_t)
    int disk_pwritev(disk *, const iovec *, int, uint64_t)
    int disk_pread(disk *, void *, size_t, uint64_t)
    int disk_pwrite(disk *, const void *, size_t, uint64_t)
    int disk_flush(disk *)
    int disk_discard(disk *, uint64_t, uint64_t)
    int disk_write_zeroes(disk *, uint64_t, uint64_t, unsigned)
    int disk_status(disk *, uint64_t, uint64_t, disk_extent *)


cdef class CoreDisk:
    cdef disk *ptr
    cdef int users          # calls (and devices) that use ptr now; close() refuses while there are any
    cdef object _owner      # what must live as long: files, backing disks
    cdef object _backing
    cdef object __weakref__
    cdef void acquire(self) noexcept
    cdef void release(self) noexcept
    cdef object failure(self, int result, str what)
    cdef int _begin(self, offset, length) except -1
    cdef int _shut(self) except? -1
