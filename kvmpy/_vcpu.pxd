# SPDX-License-Identifier: Apache-2.0

from libc.stdint cimport uint32_t, uint64_t

from kvmpy._exit cimport RunPage
from kvmpy._linux_kvm cimport kvmpy_gate
from kvmpy._vcpu_state cimport VcpuState

cdef extern from "kick.h" nogil:
    ctypedef struct kvmpy_target:
        pass

cdef extern from "rings.h" nogil:
    struct kvm_dirty_gfn:
        uint32_t flags
        uint32_t slot
        unsigned long offset


cdef class Vcpu(VcpuState):
    cdef RunPage page
    cdef kvmpy_target target        # the thread that is in KVM_RUN
    cdef kvm_dirty_gfn *ring        # the dirty ring, if the VM has them
    cdef uint32_t ring_size         # entries
    cdef uint32_t ring_next         # first entry not yet collected

    cdef int need_sync(self, uint64_t sets) except -1
    cdef int hold(self) except -1
    cdef void unhold(self) noexcept
    cdef int unmap(self) except -1
