# SPDX-License-Identifier: Apache-2.0
# cython: auto_pickle=False, autotestdict=False
"""From struct kvm_run to an Exit, and the memory of the last ones."""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from kvmpy._exit cimport PAST_COUNT, PAST_DATA, Exit, Past, RunPage
from kvmpy._exits cimport Hlt, IoIn, IoOut, MmioRead, MmioWrite
from kvmpy._linux_kvm cimport *

from kvmpy._exits import (
    ApResetHold, BusLock, Debug, DirtyRingFull, FailEntry, GuestException, HwUnknown, HypervHcall, HypervSynic,
    HypervSyndbg, Hypercall, InternalError, Interrupted, IoapicEoi, IrqWindowOpen, MemoryFault, Nmi, Notify, RdMsr,
    SetTpr, Shutdown, SnpReqCerts, SystemEvent, Tdx, TprAccess, Unknown, Watchdog, WrMsr, XenHcall,
)
from kvmpy.errors import StateError


cdef inline Exit bare(type cls):
    return <Exit> cls.__new__(cls)


cdef Exit decode(const kvm_run *run, const uint8_t *data, uint64_t data_size):
    """The exit that `run` tells of; `data` are the bytes of a port access."""
    cdef uint32_t reason = run.exit_reason
    if reason == KVM_EXIT_IO:
        return decode_io(run, data, data_size)
    if reason == KVM_EXIT_MMIO:
        return decode_mmio(run)
    if reason == KVM_EXIT_HLT:
        return Hlt.__new__(Hlt)
    if reason == KVM_EXIT_DEBUG:
        return Debug(run.debug.arch.exception, run.debug.arch.pc, run.debug.arch.dr6, run.debug.arch.dr7)
    return decode_rare(run, reason)


cdef Exit decode_io(const kvm_run *run, const uint8_t *data, uint64_t data_size):
    cdef IoOut out
    cdef IoIn into
    if run.io.direction == KVM_EXIT_IO_OUT:
        out = IoOut.__new__(IoOut)
        out.port, out.size, out.count = run.io.port, run.io.size, run.io.count
        out.data = PyBytes_FromStringAndSize(<const char *> data, data_size)
        return out
    into = IoIn.__new__(IoIn)
    into.port, into.size, into.count, into.offset = run.io.port, run.io.size, run.io.count, run.io.data_offset
    return into


cdef Exit decode_mmio(const kvm_run *run):
    cdef MmioRead read
    cdef MmioWrite write
    cdef uint32_t size = min(run.mmio.len, <uint32_t> 8)
    if run.mmio.is_write:
        write = MmioWrite.__new__(MmioWrite)
        write.addr = run.mmio.phys_addr
        write.data = PyBytes_FromStringAndSize(<const char *> run.mmio.data, size)
        return write
    read = MmioRead.__new__(MmioRead)
    read.addr, read.size = run.mmio.phys_addr, size
    return read


cdef tuple words(const void *at, uint32_t count):
    cdef const uint64_t *first = <const uint64_t *> at
    return tuple([first[i] for i in range(count)])


cdef dict PLAIN = {
    int(cls.reason): cls for cls in (
        IrqWindowOpen, Shutdown, Interrupted, SetTpr, Nmi, Watchdog, DirtyRingFull, ApResetHold, BusLock,
    )
}


cdef Exit decode_rare(const kvm_run *run, uint32_t reason):
    cdef uint32_t count
    cdef const kvmpy_exit_hypercall *call = <const kvmpy_exit_hypercall *> &run.hw
    cdef const kvmpy_exit_memory_fault *fault = <const kvmpy_exit_memory_fault *> &run.hw
    cdef const kvmpy_exit_tdx *tdx = <const kvmpy_exit_tdx *> &run.hw
    cdef const kvmpy_exit_snp_req_certs *certs = <const kvmpy_exit_snp_req_certs *> &run.hw
    plain = PLAIN.get(reason)
    if plain is not None:
        return bare(plain)
    if reason == KVM_EXIT_INTERNAL_ERROR:
        return decode_internal(run)
    if reason == KVM_EXIT_FAIL_ENTRY:
        return FailEntry(run.fail_entry.hardware_entry_failure_reason, run.fail_entry.cpu)
    if reason == KVM_EXIT_UNKNOWN:
        return HwUnknown(run.hw.hardware_exit_reason)
    if reason == KVM_EXIT_EXCEPTION:
        return GuestException(run.ex.exception, run.ex.error_code)
    if reason == KVM_EXIT_TPR_ACCESS:
        return TprAccess(run.tpr_access.rip, run.tpr_access.is_write)
    if reason == KVM_EXIT_IOAPIC_EOI:
        return IoapicEoi(run.eoi.vector)
    if reason == KVM_EXIT_SYSTEM_EVENT:
        count = min(run.system_event.ndata, <uint32_t> 16)
        return SystemEvent(run.system_event.type, words(run.system_event.data, count))
    if reason == KVM_EXIT_X86_RDMSR:
        return RdMsr(run.msr.index, run.msr.reason)
    if reason == KVM_EXIT_X86_WRMSR:
        return WrMsr(run.msr.index, run.msr.data, run.msr.reason)
    if reason == KVM_EXIT_HYPERCALL:
        return Hypercall(call.nr, words(call.args, 6), call.flags & KVM_EXIT_HYPERCALL_LONG_MODE)
    if reason == KVM_EXIT_XEN and run.xen.type == KVM_EXIT_XEN_HCALL:
        return XenHcall(run.xen.u.hcall.input, words(run.xen.u.hcall.params, 6), run.xen.u.hcall.longmode,
                        run.xen.u.hcall.cpl)
    if reason == KVM_EXIT_HYPERV:
        return decode_hyperv(run)
    if reason == KVM_EXIT_NOTIFY:
        return Notify(run.notify.flags)
    if reason == KVM_EXIT_MEMORY_FAULT:
        return MemoryFault(fault.gpa, fault.size, fault.flags)
    if reason == KVM_EXIT_TDX:
        return Tdx(tdx.nr, words(tdx.data, 5))
    if reason == KVM_EXIT_SNP_REQ_CERTS:
        return SnpReqCerts(certs.gpa, certs.npages)
    return Unknown(reason)


cdef Exit decode_internal(const kvm_run *run):
    cdef const kvmpy_exit_emulation_failure *failure = <const kvmpy_exit_emulation_failure *> &run.hw
    cdef uint32_t count = min(run.internal.ndata, <uint32_t> 16)
    cdef bytes instruction = b""
    if (run.internal.suberror == KVM_INTERNAL_ERROR_EMULATION and count >= 3
            and failure.flags & KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES):
        instruction = PyBytes_FromStringAndSize(<const char *> failure.insn_bytes, min(failure.insn_size, <uint8_t> 15))
    return InternalError(run.internal.suberror, words(run.internal.data, count), instruction)


cdef Exit decode_hyperv(const kvm_run *run):
    if run.hyperv.type == KVM_EXIT_HYPERV_SYNIC:
        return HypervSynic(run.hyperv.u.synic.msr, run.hyperv.u.synic.control, run.hyperv.u.synic.evt_page,
                           run.hyperv.u.synic.msg_page)
    if run.hyperv.type == KVM_EXIT_HYPERV_HCALL:
        return HypervHcall(run.hyperv.u.hcall.input, words(run.hyperv.u.hcall.params, 2))
    if run.hyperv.type == KVM_EXIT_HYPERV_SYNDBG:
        return HypervSyndbg(run.hyperv.u.syndbg.msr, run.hyperv.u.syndbg.control, run.hyperv.u.syndbg.send_page,
                            run.hyperv.u.syndbg.recv_page, run.hyperv.u.syndbg.pending_page)
    return Unknown(KVM_EXIT_HYPERV)


cdef Exit decode_page(RunPage page):
    """The exit that KVM_RUN has just left in kvm_run; also remembers it."""
    cdef kvm_run *run = page.run
    cdef uint8_t *data = NULL
    cdef uint64_t size = 0
    cdef int way = 0
    if run.exit_reason == KVM_EXIT_IO:
        way = run.io.direction == KVM_EXIT_IO_OUT
        size = <uint64_t> run.io.size * run.io.count
        if size > page.size or run.io.data_offset > page.size - size:
            raise StateError(f"the engine put port data outside kvm_run: {size} bytes at {run.io.data_offset:#x}")
        data = <uint8_t *> run + run.io.data_offset
        if run.io.direction == KVM_EXIT_IO_IN:
            memset(data, 0xFF, size)
    elif run.exit_reason == KVM_EXIT_MMIO:
        way = run.mmio.is_write != 0
        if not way:
            memset(run.mmio.data, 0xFF, sizeof(run.mmio.data))
    elif run.exit_reason == KVM_EXIT_X86_RDMSR or run.exit_reason == KVM_EXIT_X86_WRMSR:
        run.msr.error = 1
    page.generation += 1
    page.counts[min(run.exit_reason, <uint32_t> 63)][way] += 1
    cdef Past *past = &page.past[page.generation % PAST_COUNT]
    memcpy(past.head, run, sizeof(past.head))
    past.data_size = min(size, <uint64_t> PAST_DATA)
    if past.data_size:
        memcpy(past.data, data, past.data_size)
    cdef Exit made = decode(run, data, size)
    made.page = page
    made.generation = page.generation
    made.flags = run.flags
    return made


cdef Exit interrupted(RunPage page):
    """KVM_RUN returned -EINTR, which leaves nothing else in kvm_run."""
    page.run.exit_reason = KVM_EXIT_INTR
    return decode_page(page)


cdef list history(RunPage page):
    """The last exits, oldest first; they cannot be answered, and of long port strings they have the beginning."""
    cdef list exits = []
    cdef uint64_t i, last = page.generation
    cdef Past *past
    cdef Exit made
    for i in range(last - min(last, <uint64_t> PAST_COUNT) + 1, last + 1):
        past = &page.past[i % PAST_COUNT]
        made = decode(<const kvm_run *> past.head, past.data, past.data_size)
        made.generation = i
        made.flags = (<const kvm_run *> past.head).flags
        exits.append(made)
    return exits


cdef dict NAMES = {
    (KVM_EXIT_IO, 0): "IoIn", (KVM_EXIT_IO, 1): "IoOut",
    (KVM_EXIT_MMIO, 0): "MmioRead", (KVM_EXIT_MMIO, 1): "MmioWrite",
    (KVM_EXIT_HYPERV, 0): "Hyperv", (63, 0): "Unknown",
}


cdef dict exit_counts(RunPage page):
    """How often each kind of exit has come, by the name of its class."""
    cdef dict names = {(cls.reason, 0): cls.__name__ for cls in Exit.__subclasses__()} | NAMES
    cdef int reason, way
    return {
        names.get((reason, way), f"Unknown({reason})"): page.counts[reason][way]
        for reason in range(64) for way in range(2) if page.counts[reason][way]
    }
