# SPDX-License-Identifier: Apache-2.0
# cython: auto_pickle=False, autotestdict=False, nonecheck=True
"""Why KVM_RUN returned: a class per KVM_EXIT_* reason (api.rst, section 5), made to be matched.

    match vcpu.run():
        case IoOut(port=0x3F8, data=data): ...
        case MmioRead() as read: read.answer(0)

A read is answered by `answer()` before the next run; one that nobody answers reads as all ones, like an empty bus.
Exits can also be made by hand, to test handlers without a processor: their `answered` tells what was answered.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from kvmpy._exit cimport Exit, answer_bytes
from kvmpy._linux_kvm cimport *

from kvmpy._exits_pv import (
    ApResetHold, HypervHcall, HypervSynic, HypervSyndbg, Hypercall, MemoryFault, SnpReqCerts, Tdx, XenHcall,
)

globals()["Exit"] = Exit  # a cimported name is not yet an attribute of the module


@cython.final
@cython.no_gc
cdef class IoIn(Exit):
    """The guest reads `count` items of `size` bytes from I/O port `port` (KVM_EXIT_IO; count > 1: REP INS)."""

    __match_args__ = ("port", "size", "count")
    reason = KVM_EXIT_IO

    def __init__(self, uint16_t port, uint8_t size=1, uint32_t count=1):
        self.port, self.size, self.count = port, size, count

    def answer(self, value):
        """Give what was read: an int when count is 1, else (or also) size * count bytes."""
        cdef bytes data = answer_bytes(value, self.size, self.count, "IoIn")
        cdef kvm_run *run = self.claim()
        if run != NULL:
            memcpy(<char *> run + self.offset, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
            self.release()
        self.answered = data


@cython.final
@cython.no_gc
cdef class IoOut(Exit):
    """The guest writes `count` items of `size` bytes, `data`, to I/O port `port` (KVM_EXIT_IO; count > 1: REP OUTS)."""

    __match_args__ = ("port", "data", "size", "count")
    reason = KVM_EXIT_IO

    def __init__(self, uint16_t port, bytes data not None, uint8_t size=0, uint32_t count=1):
        self.port, self.data, self.count = port, data, count
        self.size = size or len(data) // (count or 1)

    @property
    def value(self):
        """The (first) item as an int."""
        cdef uint32_t item = 0
        memcpy(&item, PyBytes_AS_STRING(self.data), min(self.size, 4, len(self.data)))
        return item


@cython.final
@cython.no_gc
cdef class MmioRead(Exit):
    """The guest reads `size` bytes at guest address `addr`, where no memory slot is (KVM_EXIT_MMIO)."""

    __match_args__ = ("addr", "size")
    reason = KVM_EXIT_MMIO

    def __init__(self, uint64_t addr, uint32_t size):
        self.addr, self.size = addr, size

    def answer(self, value):
        """Give what was read: an int, or `size` bytes."""
        cdef bytes data = answer_bytes(value, self.size, 1, "MmioRead")
        cdef kvm_run *run = self.claim()
        if run != NULL:
            memcpy(run.mmio.data, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
            self.release()
        self.answered = data


@cython.final
@cython.no_gc
cdef class MmioWrite(Exit):
    """The guest writes `data` at guest address `addr`, where no writable memory slot is (KVM_EXIT_MMIO)."""

    __match_args__ = ("addr", "data")
    reason = KVM_EXIT_MMIO

    def __init__(self, uint64_t addr, bytes data not None):
        self.addr, self.data = addr, data

    @property
    def size(self):
        """Bytes written."""
        return len(self.data)

    @property
    def value(self):
        """The data as an int."""
        return int.from_bytes(self.data, "little")


@cython.final
@cython.no_gc
cdef class Hlt(Exit):
    """The guest executed HLT and there is no in-kernel irqchip to wait for an interrupt (KVM_EXIT_HLT)."""

    reason = KVM_EXIT_HLT


@cython.final
@cython.no_gc
cdef class Interrupted(Exit):
    """KVM_RUN was left because of Vcpu.kick() or a signal (EINTR, KVM_EXIT_INTR)."""

    reason = KVM_EXIT_INTR


@cython.final
@cython.no_gc
cdef class IrqWindowOpen(Exit):
    """The guest can now take the interrupt that request_interrupt_window waits for (KVM_EXIT_IRQ_WINDOW_OPEN)."""

    reason = KVM_EXIT_IRQ_WINDOW_OPEN


@cython.final
@cython.no_gc
cdef class Shutdown(Exit):
    """Triple fault (KVM_EXIT_SHUTDOWN)."""

    reason = KVM_EXIT_SHUTDOWN


@cython.final
@cython.no_gc
cdef class Nmi(Exit):
    """An NMI of the host arrived in the guest (KVM_EXIT_NMI)."""

    reason = KVM_EXIT_NMI


@cython.final
@cython.no_gc
cdef class Watchdog(Exit):
    """A virtual watchdog expired (KVM_EXIT_WATCHDOG)."""

    reason = KVM_EXIT_WATCHDOG


@cython.final
@cython.no_gc
cdef class SetTpr(Exit):
    """The guest lowered its task priority and the chip is in user space (KVM_EXIT_SET_TPR)."""

    reason = KVM_EXIT_SET_TPR


@cython.final
@cython.no_gc
cdef class DirtyRingFull(Exit):
    """The dirty ring of this vCPU is (nearly) full: collect and reset before running on (KVM_EXIT_DIRTY_RING_FULL)."""

    reason = KVM_EXIT_DIRTY_RING_FULL


@cython.final
@cython.no_gc
cdef class BusLock(Exit):
    """The guest took a bus lock (KVM_EXIT_X86_BUS_LOCK; enabled by KVM_CAP_X86_BUS_LOCK_EXIT)."""

    reason = KVM_EXIT_X86_BUS_LOCK


@cython.final
@cython.no_gc
cdef class Notify(Exit):
    """No event window opened in the guest for too long (KVM_EXIT_NOTIFY); bit 0 of `notify`: context invalid."""

    __match_args__ = ("notify",)
    reason = KVM_EXIT_NOTIFY
    cdef readonly uint32_t notify

    def __init__(self, uint32_t notify=0):
        self.notify = notify

    @property
    def context_invalid(self):
        """The guest state is corrupted and cannot go on (KVM_NOTIFY_CONTEXT_INVALID)."""
        return bool(self.notify & KVM_NOTIFY_CONTEXT_INVALID)


@cython.final
@cython.no_gc
cdef class IoapicEoi(Exit):
    """The guest ended level-triggered interrupt `vector` of a user-space IOAPIC (KVM_EXIT_IOAPIC_EOI)."""

    __match_args__ = ("vector",)
    reason = KVM_EXIT_IOAPIC_EOI
    cdef readonly uint8_t vector

    def __init__(self, uint8_t vector):
        self.vector = vector


@cython.final
@cython.no_gc
cdef class Debug(Exit):
    """A breakpoint, watchpoint or single step (KVM_EXIT_DEBUG): `exception` 1 (#DB) or 3 (#BP) at `pc`."""

    __match_args__ = ("exception", "pc", "dr6", "dr7")
    reason = KVM_EXIT_DEBUG
    cdef readonly uint32_t exception
    cdef readonly uint64_t pc
    cdef readonly uint64_t dr6
    cdef readonly uint64_t dr7

    def __init__(self, uint32_t exception=1, uint64_t pc=0, uint64_t dr6=0, uint64_t dr7=0):
        self.exception, self.pc, self.dr6, self.dr7 = exception, pc, dr6, dr7


@cython.final
@cython.no_gc
cdef class HwUnknown(Exit):
    """The processor left the guest for a reason that KVM does not know (KVM_EXIT_UNKNOWN)."""

    __match_args__ = ("hardware_reason",)
    reason = KVM_EXIT_UNKNOWN
    cdef readonly uint64_t hardware_reason

    def __init__(self, uint64_t hardware_reason=0):
        self.hardware_reason = hardware_reason


@cython.final
@cython.no_gc
cdef class GuestException(Exit):
    """KVM_EXIT_EXCEPTION: `exception` with `error_code`; not produced by current kernels."""

    __match_args__ = ("exception", "error_code")
    reason = KVM_EXIT_EXCEPTION
    cdef readonly uint32_t exception
    cdef readonly uint32_t error_code

    def __init__(self, uint32_t exception=0, uint32_t error_code=0):
        self.exception, self.error_code = exception, error_code


@cython.final
@cython.no_gc
cdef class FailEntry(Exit):
    """The processor refused to enter the guest with this state (KVM_EXIT_FAIL_ENTRY)."""

    __match_args__ = ("hardware_reason", "cpu")
    reason = KVM_EXIT_FAIL_ENTRY
    cdef readonly uint64_t hardware_reason
    cdef readonly uint32_t cpu

    def __init__(self, uint64_t hardware_reason=0, uint32_t cpu=0):
        self.hardware_reason, self.cpu = hardware_reason, cpu


cdef dict SUBERRORS = {
    KVM_INTERNAL_ERROR_EMULATION: "emulation failure",
    KVM_INTERNAL_ERROR_SIMUL_EX: "unexpected simultaneous exceptions",
    KVM_INTERNAL_ERROR_DELIVERY_EV: "exit while an event was delivered",
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON: "unexpected exit reason",
}


@cython.final
@cython.no_gc
cdef class InternalError(Exit):
    """KVM gave up (KVM_EXIT_INTERNAL_ERROR); `suberror` is its KVM_INTERNAL_ERROR_*, `data` the words it left."""

    __match_args__ = ("suberror", "data")
    reason = KVM_EXIT_INTERNAL_ERROR
    cdef readonly uint32_t suberror
    cdef readonly tuple data
    cdef readonly bytes instruction

    def __init__(self, uint32_t suberror, data=(), bytes instruction not None=b""):
        self.suberror, self.data, self.instruction = suberror, tuple(data), instruction

    @property
    def suberror_name(self):
        """The suberror in words."""
        return SUBERRORS.get(self.suberror, f"suberror {self.suberror}")

    def __repr__(self):
        text = f"InternalError({self.suberror}: {self.suberror_name}"
        if self.instruction:
            text += f", instruction={self.instruction.hex(' ')}"
        return f"{text}, data=[{', '.join(f'{word:#x}' for word in self.data)}])"


@cython.final
@cython.no_gc
cdef class TprAccess(Exit):
    """The guest accessed the task priority register at `rip` (KVM_EXIT_TPR_ACCESS; see tpr_access_reporting)."""

    __match_args__ = ("rip", "is_write")
    reason = KVM_EXIT_TPR_ACCESS
    cdef readonly uint64_t rip
    cdef readonly bint is_write

    def __init__(self, uint64_t rip=0, bint is_write=False):
        self.rip, self.is_write = rip, is_write


cdef dict SYSTEM_EVENTS = {
    KVM_SYSTEM_EVENT_SHUTDOWN: "shutdown", KVM_SYSTEM_EVENT_RESET: "reset", KVM_SYSTEM_EVENT_CRASH: "crash",
    KVM_SYSTEM_EVENT_WAKEUP: "wakeup", KVM_SYSTEM_EVENT_SUSPEND: "suspend",
    KVM_SYSTEM_EVENT_SEV_TERM: "sev_term", KVM_SYSTEM_EVENT_TDX_FATAL: "tdx_fatal",
}


@cython.final
@cython.no_gc
cdef class SystemEvent(Exit):
    """The guest asks for a system-wide action (KVM_EXIT_SYSTEM_EVENT): `type` is a KVM_SYSTEM_EVENT_*."""

    __match_args__ = ("type", "data")
    reason = KVM_EXIT_SYSTEM_EVENT
    cdef readonly uint32_t type
    cdef readonly tuple data

    def __init__(self, uint32_t type, data=()):
        self.type, self.data = type, tuple(data)

    @property
    def name(self):
        """The type in words, e.g. "crash"."""
        return SYSTEM_EVENTS.get(self.type, f"type {self.type}")


@cython.final
@cython.no_gc
cdef class RdMsr(Exit):
    """The guest reads MSR `index` (KVM_EXIT_X86_RDMSR); `why` is a KVM_MSR_EXIT_REASON_*. Unanswered it gets #GP."""

    __match_args__ = ("index", "why")
    reason = KVM_EXIT_X86_RDMSR
    cdef readonly uint32_t index
    cdef readonly uint32_t why

    def __init__(self, uint32_t index, uint32_t why=0):
        self.index, self.why = index, why

    def answer(self, uint64_t value):
        """Let RDMSR give `value`."""
        cdef kvm_run *run = self.claim()
        if run != NULL:
            run.msr.data, run.msr.error = value, 0
            self.release()
        self.answered = value

    def fail(self):
        """Let RDMSR raise #GP."""
        cdef kvm_run *run = self.claim()
        if run != NULL:
            run.msr.error = 1
            self.release()
        self.answered = None


@cython.final
@cython.no_gc
cdef class WrMsr(Exit):
    """The guest writes `data` to MSR `index` (KVM_EXIT_X86_WRMSR). Unless answer()ed it gets #GP."""

    __match_args__ = ("index", "data", "why")
    reason = KVM_EXIT_X86_WRMSR
    cdef readonly uint32_t index
    cdef readonly uint64_t data
    cdef readonly uint32_t why

    def __init__(self, uint32_t index, uint64_t data=0, uint32_t why=0):
        self.index, self.data, self.why = index, data, why

    def answer(self):
        """Let WRMSR succeed."""
        cdef kvm_run *run = self.claim()
        if run != NULL:
            run.msr.error = 0
            self.release()
        self.answered = True

    def fail(self):
        """Let WRMSR raise #GP."""
        cdef kvm_run *run = self.claim()
        if run != NULL:
            run.msr.error = 1
            self.release()
        self.answered = None


cdef dict FOREIGN = {
    KVM_EXIT_S390_SIEIC: "S390_SIEIC", KVM_EXIT_S390_RESET: "S390_RESET", KVM_EXIT_DCR: "DCR", KVM_EXIT_OSI: "OSI",
    KVM_EXIT_PAPR_HCALL: "PAPR_HCALL", KVM_EXIT_S390_UCONTROL: "S390_UCONTROL", KVM_EXIT_S390_TSCH: "S390_TSCH",
    KVM_EXIT_EPR: "EPR", KVM_EXIT_S390_STSI: "S390_STSI", KVM_EXIT_ARM_NISV: "ARM_NISV",
    KVM_EXIT_RISCV_SBI: "RISCV_SBI", KVM_EXIT_RISCV_CSR: "RISCV_CSR", KVM_EXIT_LOONGARCH_IOCSR: "LOONGARCH_IOCSR",
    KVM_EXIT_ARM_SEA: "ARM_SEA", KVM_EXIT_ARM_LDST64B: "ARM_LDST64B",
}


@cython.final
@cython.no_gc
cdef class Unknown(Exit):
    """An exit for another architecture, or newer than this version of kvmpy; its `reason` is its own."""

    __match_args__ = ("reason",)
    cdef readonly uint32_t reason

    def __init__(self, uint32_t reason):
        self.reason = reason

    @property
    def name(self):
        """The KVM_EXIT_* name, or "KVM_EXIT_<number>"."""
        return "KVM_EXIT_" + FOREIGN.get(self.reason, str(self.reason))

    def __repr__(self):
        return f"Unknown({self.reason}: {self.name})"
