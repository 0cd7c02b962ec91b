# SPDX-License-Identifier: Apache-2.0

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from kvmpy._linux_kvm cimport kvm_run, kvmpy_gate

cdef enum:
    PAST_COUNT = 16     # exits that are remembered
    PAST_DATA = 16      # bytes of port data remembered with one
    RUN_HEAD = 36       # 64-bit words of struct kvm_run up to and with its union (checked at compile time)


cdef struct Past:
    uint64_t head[RUN_HEAD]
    uint8_t data[PAST_DATA]
    uint32_t data_size


cdef class RunPage:
    """The kvm_run area of a vCPU: shared by the vCPU and its exits, so that an old exit cannot touch freed memory."""

    cdef kvm_run *run           # NULL once closed
    cdef size_t size
    cdef kvmpy_gate gate        # who is using the vCPU
    cdef uint64_t generation    # counts the exits; an exit of an older generation can no longer be answered
    cdef Past past[PAST_COUNT]  # the last exits, by generation
    cdef uint64_t counts[64][2]    # exits by reason; port and memory accesses by reads and writes


cdef class Exit:
    cdef RunPage page           # None: not (or no longer) the exit of a vCPU
    cdef uint64_t generation
    cdef readonly uint16_t flags
    cdef readonly object answered

    cdef kvm_run *claim(self) except? NULL
    cdef void release(self) noexcept


cdef bytes answer_bytes(object value, size_t size, size_t count, str what)
