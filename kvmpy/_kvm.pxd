# SPDX-License-Identifier: Apache-2.0

from kvmpy._handle cimport Handle


cdef class Kvm(Handle):
    cdef object engine_capsule      # keeps a loaded engine alive
