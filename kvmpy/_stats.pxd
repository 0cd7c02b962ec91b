# SPDX-License-Identifier: Apache-2.0

from kvmpy._handle cimport Handle


cdef class Stats(Handle):
    cdef readonly str id            # "kvm-1234" or "kvm-1234/vcpu-0"
    cdef readonly tuple stats       # what there is: Stat, in the kernel's order
    cdef size_t data_offset
    cdef size_t data_size

    cdef bytearray take(self, size_t size, size_t offset)
