# SPDX-License-Identifier: Apache-2.0
# cython: auto_pickle=False, autotestdict=False
"""Linux' own relocations: a quarter of a million additions, too many for Python at each start of a guest."""

from cpython.bytearray cimport PyByteArray_AS_STRING
from libc.stddef cimport size_t
from libc.stdint cimport int32_t, uint32_t, uint64_t
from libc.string cimport memcpy

cdef enum:
    SEGMENTS_MAX = 256

cdef struct Part:
    uint64_t start, size, offset


cdef uint64_t place_of(const Part *parts, Py_ssize_t count, uint64_t start, uint64_t width) noexcept nogil:
    """Where in the file the bytes from `start` on lie that are loaded together; 0 when they are not."""
    cdef Py_ssize_t i
    for i in range(count):
        if start >= parts[i].start and start - parts[i].start < parts[i].size:
            if parts[i].size - (start - parts[i].start) < width:
                return 0
            return parts[i].offset + (start - parts[i].start)
    return 0


def relocate(bytearray data not None, segments, Py_ssize_t at, Py_ssize_t count, uint64_t base, int width,
             uint64_t delta):
    """Add `delta` to `count` numbers of `width` bytes (4 or 8) in `data`, an ELF file.

    segments: (address, size, file offset) of what the file loads. at: offset of a table of 32-bit addresses; each,
    sign-extended and less `base`, is where a number lies. Raises ValueError for one that is not loaded from the file.
    """
    cdef Part parts[SEGMENTS_MAX]
    cdef Py_ssize_t number = len(segments), i, bad = -1
    cdef char *bytes_ = PyByteArray_AS_STRING(data)
    cdef uint64_t size = len(data), place, start
    cdef int32_t entry
    cdef uint32_t narrow
    cdef uint64_t wide
    if number > SEGMENTS_MAX or width not in (4, 8) or at < 0 or count < 0 or <uint64_t> at + 4 * <uint64_t> count > size:
        raise ValueError("the arguments do not go together")
    for i in range(number):
        parts[i].start, parts[i].size, parts[i].offset = segments[i]
        if parts[i].offset > size or parts[i].size > size - parts[i].offset:
            raise ValueError("a segment is outside the file")
    with nogil:
        for i in range(count):
            memcpy(&entry, bytes_ + at + 4 * i, 4)
            start = <uint64_t> (<long long> entry) - base
            place = place_of(parts, number, start, width)
            if place == 0:
                bad = i
                break
            if width == 4:
                memcpy(&narrow, bytes_ + place, 4)
                narrow += <uint32_t> delta
                memcpy(bytes_ + place, &narrow, 4)
            else:
                memcpy(&wide, bytes_ + place, 8)
                wide += delta
                memcpy(bytes_ + place, &wide, 8)
    if bad >= 0:
        memcpy(&narrow, bytes_ + at + 4 * bad, 4)
        raise ValueError(f"relocation {bad} is for {narrow:#x}, which is not loaded from the file")
