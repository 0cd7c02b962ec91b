# SPDX-License-Identifier: Apache-2.0
"""A disk written in Python behind the C face: its C callers take the GIL for each request."""
import errno as _errno
import logging
from threading import get_ident

from kvmpy.errors import ImageError

from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.stdint cimport uint64_t

from kvmpy.block._disk cimport (
    DISK_ALLOCATED, DISK_COMPRESSED, DISK_DATA, DISK_HOST_OFFSET, DISK_UNMAP, DISK_ZERO, CoreDisk, disk, disk_extent, disk_ops, iovec,
)

log = logging.getLogger("kvmpy.block")


cdef struct py_disk:
    disk disk
    void *object
    void *errors  # by thread: the last result that was an exception, and this


cdef int _from_exception(py_disk *pd, object error) noexcept:
    cdef int result = _number(pd, error)
    (<dict>pd.errors)[get_ident()] = result, error.with_traceback(None)  # whose frames see the caller's buffers
    return result


cdef int _number(py_disk *pd, object error) noexcept:
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
    cdef dict errors

    def __cinit__(self, target):
        self.errors = {}
        self.pd.errors = <void *>self.errors
        self.pd.disk.ops = &py_ops
        self.pd.disk.size = target.size
        self.pd.disk.readonly = target.readonly
        self.pd.object = <void *>target
        self._owner = (target,)
        self.ptr = &self.pd.disk

    cdef object failure(self, int result, str what):
        number, error = self.errors.pop(get_ident(), (0, None))
        return error if number == result else CoreDisk.failure(self, result, what)


def as_core(disk) -> CoreDisk:
    """`disk` as C callers see it: itself if its data path is C, else a shell around it."""
    return disk if isinstance(disk, CoreDisk) else PyCore(disk)
