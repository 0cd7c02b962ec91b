# SPDX-License-Identifier: Apache-2.0

from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t

from kvmpy._vm_irq cimport VmIrq


cdef class Vm(VmIrq):
    cdef readonly uint32_t ring_size    # entries of the dirty ring of each vCPU; 0: there are none
    cdef set ids                        # of the vCPUs made so far
    cdef dict slots                     # slot -> size in bytes: how long its dirty bitmap is
    cdef object slots_lock

    cdef int note_slot(self, uint32_t slot, uint64_t size) except -1
    cdef size_t bitmap_size(self, uint32_t slot) except? 0
