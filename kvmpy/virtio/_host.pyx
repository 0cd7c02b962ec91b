# SPDX-License-Identifier: Apache-2.0
# cython: auto_pickle=False, autotestdict=False
"""System calls for shared folders that Python's os module has not, or not with their flags."""

import os

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.errno cimport EINTR, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <fcntl.h>
    #include <stdio.h>
    #include <string.h>
    #include <sys/syscall.h>
    #include <unistd.h>
    """
    enum: SYS_getdents64, SYS_renameat2, SEEK_SET
    long syscall(long, ...) nogil
    int64_t lseek(int, int64_t, int) nogil
    size_t strnlen(const char *, size_t) nogil
    int fallocate(int, int, int64_t, int64_t) nogil

cdef enum:
    MOST = 1 << 20
    NAME_AT = 19  # in struct linux_dirent64: ino, off, reclen, type, name


cdef object failure(str what):
    return OSError(errno, f"{what}: {os.strerror(errno)}")


def directory_entries(int fd, int64_t offset, size_t size):
    """Entries of an open directory from a place that an entry before named: [(inode, place behind it, type, name), ...].

    size: bytes of room for them, up to 1 MiB; an empty list is the end. Raises OSError. getdents64(2).
    """
    cdef char *room
    cdef char *at
    cdef long got = 0
    cdef uint64_t ino
    cdef int64_t following
    cdef uint16_t length
    cdef long done = 0
    size = min(size, MOST)
    room = <char *>malloc(size + 1)
    if room == NULL:
        raise MemoryError
    found = []
    try:
        with nogil:
            if lseek(fd, offset, SEEK_SET) < 0:
                got = -1
            else:
                got = syscall(SYS_getdents64, fd, room, size)
        if got < 0:
            raise failure("getdents64")
        while done + NAME_AT <= got:
            at = room + done
            memcpy(&ino, at, 8)
            memcpy(&following, at + 8, 8)
            memcpy(&length, at + 16, 2)
            if length < NAME_AT or done + length > got:
                break
            name = PyBytes_FromStringAndSize(at + NAME_AT, strnlen(at + NAME_AT, length - NAME_AT))
            found.append((ino, following, <uint8_t>at[18], name))
            done += length
    finally:
        free(room)
    return found


def rename(int old_dir, bytes old, int new_dir, bytes new, unsigned flags=0):
    """renameat2(2): names relative to open directories. Raises OSError."""
    cdef const char *a = old
    cdef const char *b = new
    cdef long result
    with nogil:
        result = syscall(SYS_renameat2, old_dir, a, new_dir, b, flags)
    if result < 0:
        raise failure("rename")


def allocate(int fd, int mode, int64_t offset, int64_t length):
    """fallocate(2). Raises OSError."""
    cdef int result
    with nogil:
        result = fallocate(fd, mode, offset, length)
        while result < 0 and errno == EINTR:
            result = fallocate(fd, mode, offset, length)
    if result < 0:
        raise failure("fallocate")
