# SPDX-License-Identifier: Apache-2.0

from libc.stdint cimport uint32_t, uint64_t

from kvmpy._handle cimport Handle


cdef class VmIrq(Handle):
    cdef int coalesced_zone(self, unsigned long request, uint64_t addr, uint32_t size, bint pio) except -1
