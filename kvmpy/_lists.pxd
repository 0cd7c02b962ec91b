# SPDX-License-Identifier: Apache-2.0

from libc.stddef cimport size_t

from kvmpy._handle cimport Handle

cdef bytearray pack(object entries, type cls, size_t header, str what)
cdef list unpack(bytearray room, type cls, size_t header, size_t count)
cdef list get_cpuid(Handle handle, unsigned long request)
cdef list get_indices(Handle handle, unsigned long request)
cdef dict get_msrs(Handle handle, object indices)
cdef int set_msrs(Handle handle, object values) except -1
