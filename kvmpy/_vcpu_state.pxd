# SPDX-License-Identifier: Apache-2.0

from kvmpy._handle cimport Handle


cdef class VcpuState(Handle):
    cdef readonly int id            # the APIC id
