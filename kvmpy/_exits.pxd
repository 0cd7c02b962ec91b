# SPDX-License-Identifier: Apache-2.0

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from kvmpy._exit cimport Exit

# The exits of a busy guest: _decode.pyx fills their fields without a Python call.


cdef class IoIn(Exit):
    cdef readonly uint16_t port
    cdef readonly uint8_t size
    cdef readonly uint32_t count
    cdef size_t offset

cdef class IoOut(Exit):
    cdef readonly uint16_t port
    cdef readonly uint8_t size
    cdef readonly uint32_t count
    cdef readonly bytes data

cdef class MmioRead(Exit):
    cdef readonly uint64_t addr
    cdef readonly uint32_t size

cdef class MmioWrite(Exit):
    cdef readonly uint64_t addr
    cdef readonly bytes data

cdef class Hlt(Exit):
    pass
