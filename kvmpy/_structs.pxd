# SPDX-License-Identifier: Apache-2.0

cdef class Layout:
    cdef readonly str name        # "Regs"
    cdef readonly str origin      # "struct kvm_regs"
    cdef readonly size_t size
    cdef readonly bint tail
    cdef readonly dict fields     # name -> Field, in the kernel's order


cdef class Struct:
    cdef char *pointer            # the structure itself: in `own`, or inside the parent's buffer
    cdef size_t size
    cdef object parent            # keeps the memory of a view alive; None: the memory is ours
    cdef Layout shape             # of its class


cdef int assign(Struct target, object value, str what) except -1
cdef int resize(Struct made, size_t size) except -1
