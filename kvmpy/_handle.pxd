# SPDX-License-Identifier: Apache-2.0

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t

from kvmpy._linux_kvm cimport kvmpy_engine, kvmpy_gate
from kvmpy._structs cimport Struct


cdef class Handle:
    cdef const kvmpy_engine *engine
    cdef int handle                 # what a file descriptor is to KVM; -1: not open
    cdef kvmpy_gate own_gate
    cdef kvmpy_gate *gate           # who is inside; the vCPU's lies in its run page
    cdef readonly Handle parent
    cdef set children               # weak references
    cdef uint8_t known[256]         # capabilities that were found present
    cdef object __weakref__

    cdef int start(self, const kvmpy_engine *engine, int handle, Handle parent) except -1
    cdef int enter(self) except -1
    cdef void leave(self) noexcept
    cdef long call(self, unsigned long request, uintptr_t arg) except -1
    cdef long call_nogil(self, unsigned long request, uintptr_t arg) except -1
    cdef long try_call(self, unsigned long request, uintptr_t arg) except? -1
    cdef long try_call_nogil(self, unsigned long request, uintptr_t arg) except? -1
    cdef long capability(self, int number) except -1
    cdef int need(self, int number, unsigned long request) except -1
    cdef int enable(self, int needs, object cap, tuple args, uint32_t flags) except -1
    cdef int attributes(self) except -1
    cdef long attribute(self, unsigned long request, uint32_t group, uint64_t number, uintptr_t address) except? -1
    cdef object get(self, type cls, unsigned long request)
    cdef int put(self, type cls, object value, unsigned long request) except -1
    cdef int finish(self) except -1
    cdef int shut(self) except -1

cdef int capability_number(object cap) except -1
cdef object error(long code, unsigned long request)
