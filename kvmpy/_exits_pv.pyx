# SPDX-License-Identifier: Apache-2.0
# cython: auto_pickle=False, autotestdict=False, nonecheck=True
"""The exits of paravirtual and confidential guests: hypercalls, Hyper-V, Xen, private memory, TDX, SEV. See _exits."""

cimport cython
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy

from kvmpy._exit cimport Exit
from kvmpy._linux_kvm cimport *


@cython.final
@cython.no_gc
cdef class ApResetHold(Exit):
    """An SEV-ES guest asks to hold this processor in reset (KVM_EXIT_AP_RESET_HOLD)."""

    reason = KVM_EXIT_AP_RESET_HOLD


@cython.final
@cython.no_gc
cdef class Hypercall(Exit):
    """Hypercall `nr` with `args` that KVM leaves to user space (KVM_EXIT_HYPERCALL; KVM_CAP_EXIT_HYPERCALL)."""

    __match_args__ = ("nr", "args", "longmode")
    reason = KVM_EXIT_HYPERCALL
    cdef readonly uint64_t nr
    cdef readonly tuple args
    cdef readonly bint longmode

    def __init__(self, uint64_t nr, args=(), bint longmode=True):
        self.nr, self.args, self.longmode = nr, tuple(args), longmode

    def answer(self, uint64_t result):
        """Give the hypercall's result."""
        cdef kvm_run *run = self.claim()
        if run != NULL:
            (<kvmpy_exit_hypercall *> &run.hw).ret = result
            self.release()
        self.answered = result


@cython.final
@cython.no_gc
cdef class HypervSynic(Exit):
    """The guest changed its synthetic interrupt controller (KVM_EXIT_HYPERV, KVM_EXIT_HYPERV_SYNIC)."""

    __match_args__ = ("msr", "control", "evt_page", "msg_page")
    reason = KVM_EXIT_HYPERV
    cdef readonly uint32_t msr
    cdef readonly uint64_t control
    cdef readonly uint64_t evt_page
    cdef readonly uint64_t msg_page

    def __init__(self, uint32_t msr, uint64_t control=0, uint64_t evt_page=0, uint64_t msg_page=0):
        self.msr, self.control, self.evt_page, self.msg_page = msr, control, evt_page, msg_page


@cython.final
@cython.no_gc
cdef class HypervHcall(Exit):
    """Hyper-V hypercall `input` with `params` (KVM_EXIT_HYPERV, KVM_EXIT_HYPERV_HCALL)."""

    __match_args__ = ("input", "params")
    reason = KVM_EXIT_HYPERV
    cdef readonly uint64_t input
    cdef readonly tuple params

    def __init__(self, uint64_t input, params=(0, 0)):
        self.input, self.params = input, tuple(params)

    def answer(self, uint64_t result):
        """Give the hypercall's result."""
        cdef kvm_run *run = self.claim()
        if run != NULL:
            run.hyperv.u.hcall.result = result
            self.release()
        self.answered = result


@cython.final
@cython.no_gc
cdef class HypervSyndbg(Exit):
    """The guest uses the synthetic debugger (KVM_EXIT_HYPERV, KVM_EXIT_HYPERV_SYNDBG)."""

    __match_args__ = ("msr", "control", "send_page", "recv_page", "pending_page")
    reason = KVM_EXIT_HYPERV
    cdef readonly uint32_t msr
    cdef readonly uint64_t control
    cdef readonly uint64_t send_page
    cdef readonly uint64_t recv_page
    cdef readonly uint64_t pending_page

    def __init__(self, uint32_t msr, uint64_t control=0, uint64_t send_page=0, uint64_t recv_page=0,
                 uint64_t pending_page=0):
        self.msr, self.control = msr, control
        self.send_page, self.recv_page, self.pending_page = send_page, recv_page, pending_page

    def answer(self, uint64_t status):
        """Give the status that the guest reads."""
        cdef kvm_run *run = self.claim()
        if run != NULL:
            run.hyperv.u.syndbg.status = status
            self.release()
        self.answered = status


@cython.final
@cython.no_gc
cdef class XenHcall(Exit):
    """Xen hypercall `input` with `params` from privilege level `cpl` (KVM_EXIT_XEN)."""

    __match_args__ = ("input", "params", "longmode", "cpl")
    reason = KVM_EXIT_XEN
    cdef readonly uint64_t input
    cdef readonly tuple params
    cdef readonly bint longmode
    cdef readonly uint32_t cpl

    def __init__(self, uint64_t input, params=(0,) * 6, bint longmode=True, uint32_t cpl=0):
        self.input, self.params, self.longmode, self.cpl = input, tuple(params), longmode, cpl

    def answer(self, uint64_t result):
        """Give the hypercall's result."""
        cdef kvm_run *run = self.claim()
        if run != NULL:
            run.xen.u.hcall.result = result
            self.release()
        self.answered = result


@cython.final
@cython.no_gc
cdef class MemoryFault(Exit):
    """KVM could not resolve an access to [gpa, gpa + size) (KVM_EXIT_MEMORY_FAULT), e.g. private against shared."""

    __match_args__ = ("gpa", "size", "fault_flags")
    reason = KVM_EXIT_MEMORY_FAULT
    cdef readonly uint64_t gpa
    cdef readonly uint64_t size
    cdef readonly uint64_t fault_flags

    def __init__(self, uint64_t gpa, uint64_t size=0, uint64_t fault_flags=0):
        self.gpa, self.size, self.fault_flags = gpa, size, fault_flags

    @property
    def private(self):
        """Was it an access to private memory (KVM_MEMORY_EXIT_FLAG_PRIVATE)?"""
        return bool(self.fault_flags & KVM_MEMORY_EXIT_FLAG_PRIVATE)


@cython.final
@cython.no_gc
cdef class Tdx(Exit):
    """A TDX guest's TDVMCALL `nr` that user space must answer (KVM_EXIT_TDX); `data` are its words."""

    __match_args__ = ("nr", "data")
    reason = KVM_EXIT_TDX
    cdef readonly uint64_t nr
    cdef readonly tuple data

    def __init__(self, uint64_t nr, data=(0,) * 5):
        self.nr, self.data = nr, tuple(data)

    def answer(self, uint64_t result, data=None):
        """Give the result, and for get_tdvmcall_info also its words (leaf, r11, r12, r13, r14)."""
        cdef int i
        cdef uint64_t words[5]
        if data is not None:
            if len(data) != 5:
                raise ValueError(f"Tdx: 5 words are needed, not {len(data)}")
            for i in range(5):
                words[i] = data[i]
        cdef kvm_run *run = self.claim()
        cdef kvmpy_exit_tdx *tdx
        if run != NULL:
            tdx = <kvmpy_exit_tdx *> &run.hw
            tdx.ret = result
            if data is not None:
                memcpy(tdx.data, words, sizeof(words))
            self.release()
        self.answered = result


@cython.final
@cython.no_gc
cdef class SnpReqCerts(Exit):
    """An SEV-SNP guest wants the certificates at `gpa`, room for `npages` pages (KVM_EXIT_SNP_REQ_CERTS)."""

    __match_args__ = ("gpa", "npages")
    reason = KVM_EXIT_SNP_REQ_CERTS
    cdef readonly uint64_t gpa
    cdef readonly uint64_t npages

    def __init__(self, uint64_t gpa, uint64_t npages=0):
        self.gpa, self.npages = gpa, npages

    def answer(self, uint64_t result, npages=None):
        """Give 0 or an errno, and the number of pages needed when there were too few."""
        cdef uint64_t pages = self.npages if npages is None else npages
        cdef kvm_run *run = self.claim()
        if run != NULL:
            (<kvmpy_exit_snp_req_certs *> &run.hw).ret = result
            (<kvmpy_exit_snp_req_certs *> &run.hw).npages = pages
            self.release()
        self.answered = result
