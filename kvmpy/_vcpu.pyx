# SPDX-License-Identifier: Apache-2.0
# cython: auto_pickle=False, autotestdict=False, nonecheck=True
"""A virtual processor: running it, kicking it out, and what KVM shares with it in memory."""

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from libc.stddef cimport size_t
from libc.stdint cimport intptr_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcpy, memset

from kvmpy._decode cimport decode_page, exit_counts, history, interrupted
from kvmpy._exit cimport RunPage
from kvmpy._handle cimport Handle, error
from kvmpy._linux_kvm cimport *
from kvmpy._structs cimport Struct
from kvmpy._vcpu_state cimport VcpuState

from kvmpy._exits import IoOut, MmioWrite
from kvmpy._stats import Stats
from kvmpy._structs import GuestDebug, SyncRegs
from kvmpy.errors import KvmError, StateError

cdef extern from "kick.h" nogil:
    """
    #include <pthread.h>
    """
    int kick_install()
    void kick_send(const kvmpy_engine *engine, int handle, kvm_run *run, kvmpy_target *target, int number)
    void kick_after_fork()
    long run_once(const kvmpy_engine *engine, int handle, kvm_run *run, kvmpy_target *target, int *kicked)
    bint kick_was_late()
    bint in_main_thread()
    int pthread_atfork(void (*prepare)() noexcept, void (*parent)() noexcept, void (*child)() noexcept)

cdef extern from "nudge.h" nogil:
    int nudge_start(int number)
    void nudge_after_fork()
    void nudge_begin()
    void nudge_end()

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "rings.h" nogil:
    struct kvm_coalesced_mmio:
        uint64_t phys_addr
        uint32_t len
        uint32_t pio
        uint8_t data[8]
    struct kvm_coalesced_mmio_ring:
        uint32_t first
        uint32_t last
    bint dirty_take(kvm_dirty_gfn *entry, kvm_dirty_gfn *into)
    bint coalesced_take(kvm_coalesced_mmio_ring *ring, kvm_coalesced_mmio *into)

cdef extern from "kvm_compat.h" nogil:
    struct kvm_interrupt:
        uint32_t irq
    struct kvm_tpr_access_ctl:
        uint32_t enabled
    struct kvm_vapic_addr:
        uint64_t vapic_addr
    struct kvm_signal_mask:
        uint32_t len
        uint8_t sigset[1]
    struct kvm_pre_fault_memory:
        uint64_t gpa
        uint64_t size
        uint64_t flags

cdef enum:
    PAGE = 4096
    ENCRYPT_COMMAND = 24    # sizeof(struct kvm_tdx_cmd)
    NO_EINTR = -4
    NO_EFAULT = -14
    NO_EHWPOISON = -133

cdef int kick_signal = 0

pthread_atfork(NULL, NULL, &kick_after_fork)
pthread_atfork(NULL, NULL, &nudge_after_fork)


cdef int claim_signal() except -1:
    """The signal that kicks: the first realtime one that nobody handles, claimed when the first vCPU is made."""
    global kick_signal
    if not kick_signal:
        number = kick_install()
        if number < 0:
            raise KvmError(-number, "sigaction", "every realtime signal has a handler already: none is left for kick()")
        kick_signal = number
    return kick_signal


cdef void *map_area(Handle vcpu, int handle, size_t size, uint64_t offset, str what) except? NULL:
    cdef void *area = vcpu.engine.map(handle, size, offset)
    if -4096 < <intptr_t> area < 0:
        raise KvmError(-<intptr_t> area, "mmap", what)
    return area


cdef class Vcpu(VcpuState):
    """A virtual processor of a Vm, made by Vm.create_vcpu().

        vcpu.regs = Regs(rip=0x1000, rflags=2)
        while True:
            match vcpu.run():
                case IoOut(port=0x3F8, data=data): print(data)
                case IoIn() as read: read.answer(0)
                case Hlt(): break

    Any thread may run it, one at a time. While it runs, its state cannot be had (StateError); kick(), the fields of
    kvm_run and the rings can.
    """

    def __init__(self, Handle vm not None, int id):
        """vCPU `id` (its APIC id) of `vm`.

        KVM_CREATE_VCPU, api.rst 4.7.
        """
        cdef long size
        cdef uint32_t ring_size = (<object> vm).ring_size
        if self.page is not None:
            raise StateError("a Vcpu is created once")
        claim_signal()
        size = vm.parent.call(KVM_GET_VCPU_MMAP_SIZE, 0)
        self.start(vm.engine, vm.call_nogil(KVM_CREATE_VCPU, id), vm)
        self.id = id
        self.page = RunPage.__new__(RunPage)
        try:
            self.page.run = <kvm_run *> map_area(self, self.handle, size, 0, "the kvm_run area")
            self.page.size = size
            if ring_size:
                self.ring = <kvm_dirty_gfn *> map_area(
                    self, self.handle, ring_size * sizeof(kvm_dirty_gfn), KVM_DIRTY_LOG_PAGE_OFFSET * PAGE,
                    "the dirty ring")
                self.ring_size = ring_size
        except BaseException:
            self.close()
            raise
        self.gate = &self.page.gate

    @property
    def vm(self):
        """The Vm that this is a processor of."""
        return self.parent

    cdef int attributes(self) except -1:
        return KVM_CAP_VCPU_ATTRIBUTES

    # What is shared with KVM can be looked at while the vCPU runs; `own_gate` keeps it from being unmapped meanwhile.

    cdef int hold(self) except -1:
        if self.handle < 0 or gate_enter(&self.own_gate):
            raise StateError("Vcpu is closed")
        return 0

    cdef void unhold(self) noexcept:
        gate_leave(&self.own_gate)

    cdef int finish(self) except -1:
        if self.gate != &self.own_gate:
            while gate_take(&self.own_gate, GATE_CLOSED) == GATE_BUSY:
                PyErr_CheckSignals()
                with nogil:  # who is inside may want it
                    sched_yield()
        return self.unmap()

    cdef int unmap(self) except -1:
        if self.page is not None and self.page.run != NULL:
            self.engine.unmap(self.page.run, self.page.size)
            self.page.run = NULL
        if self.ring != NULL:
            self.engine.unmap(self.ring, self.ring_size * sizeof(kvm_dirty_gfn))
            self.ring = NULL
        return 0

    def __dealloc__(self):
        # An exit may outlive us with the page: it must find the gate closed.
        if self.page is not None and gate_take(&self.page.gate, GATE_CLOSED) == 0:
            self.unmap()

    # Running

    def run(self):
        """Run the guest until something happens that Python must see; returns that Exit.

        KVM_RUN, api.rst 4.10.

        The GIL is released meanwhile. A signal lets Python's signal handlers run (Ctrl-C raises KeyboardInterrupt), then
        gives Interrupted(). When another thread than this one took the signal, or it comes at the very moment at which
        signals of others are looked for, they run within 0.2 s, and the guest goes on unless one raises. StateError if
        the vCPU is closed or another thread runs it; KvmError if KVM refuses.
        """
        cdef long result
        cdef int kicked = 0, blocked
        cdef RunPage page = self.page
        cdef bint main_thread = in_main_thread()
        if self.handle < 0:
            raise StateError("Vcpu is closed")
        if main_thread:
            blocked = nudge_start(kick_signal)
            if blocked:
                raise KvmError(-blocked, "pthread_create", "the thread that watches for signals")
        PyErr_CheckSignals()  # a signal that is here already would not end KVM_RUN
        while True:
            blocked = gate_take(&page.gate, GATE_RUNNING)
            if blocked:
                why = "closed" if blocked == GATE_CLOSED else "in use by another thread"
                raise StateError(f"Vcpu {self.id} is {why}")
            with nogil:
                if main_thread:
                    nudge_begin()
                result = run_once(self.engine, self.handle, page.run, &self.target, &kicked)
                if main_thread:
                    nudge_end()
            try:
                if result >= 0:
                    return decode_page(page)
                if result == NO_EINTR:
                    PyErr_CheckSignals()
                    if kicked or not kick_was_late():
                        return interrupted(page)
                elif result in (NO_EFAULT, NO_EHWPOISON) and page.run.exit_reason == KVM_EXIT_MEMORY_FAULT:
                    return decode_page(page)
                else:
                    raise error(result, KVM_RUN)
            finally:
                gate_release(&page.gate, GATE_RUNNING)

    def kick(self):
        """Make the run() that is under way, or else the next one, return Interrupted(), once; from any thread.

        It sends a realtime signal to the thread in KVM_RUN (the first one without a handler, from SIGRTMIN), so that
        thread must not block all signals.
        """
        self.hold()
        kick_send(self.engine, self.handle, self.page.run, &self.target, kick_signal)
        self.unhold()

    @property
    def running(self):
        """Is a thread inside run()?"""
        return self.handle >= 0 and bool(gate_state(&self.page.gate) & GATE_RUNNING)

    @property
    def history(self):
        """The last 16 exits, oldest first, for reports; they cannot be answered any more."""
        return history(self.page) if self.page is not None else []

    @property
    def exit_counts(self):
        """How many exits of each kind run() has returned so far, by the name of the exit's class."""
        return exit_counts(self.page) if self.page is not None else {}

    @property
    def exit_count(self):
        """How many exits run() has returned so far."""
        return self.page.generation if self.page is not None else 0

    # The fields of kvm_run (api.rst, section 5)

    @property
    def immediate_exit(self):
        """Make KVM_RUN return at once with EINTR; kick() sets it, the Interrupted() it causes clears it."""
        cdef bint value
        self.hold()
        value = self.page.run.immediate_exit
        self.unhold()
        return value

    @immediate_exit.setter
    def immediate_exit(self, bint value):
        self.hold()
        self.page.run.immediate_exit = value
        self.unhold()

    @property
    def request_interrupt_window(self):
        """Make run() return IrqWindowOpen() once the guest can take an interrupt (without an in-kernel irqchip)."""
        cdef bint value
        self.hold()
        value = self.page.run.request_interrupt_window
        self.unhold()
        return value

    @request_interrupt_window.setter
    def request_interrupt_window(self, bint value):
        self.hold()
        self.page.run.request_interrupt_window = value
        self.unhold()

    @property
    def ready_for_interrupt_injection(self):
        """Could the guest take interrupt() at the last exit?"""
        cdef bint value
        self.hold()
        value = self.page.run.ready_for_interrupt_injection
        self.unhold()
        return value

    @property
    def if_flag(self):
        """The guest's interrupt flag at the last exit."""
        cdef bint value
        self.hold()
        value = self.page.run.if_flag
        self.unhold()
        return value

    @property
    def run_flags(self):
        """kvm_run.flags at the last exit: KVM_RUN_X86_SMM, KVM_RUN_X86_BUS_LOCK, KVM_RUN_X86_GUEST_MODE."""
        cdef uint64_t value
        self.hold()
        value = self.page.run.flags
        self.unhold()
        return value

    @property
    def cr8(self):
        """The task priority; KVM takes it from here only without an in-kernel irqchip."""
        cdef uint64_t value
        self.hold()
        value = self.page.run.cr8
        self.unhold()
        return value

    @cr8.setter
    def cr8(self, uint64_t value):
        self.hold()
        self.page.run.cr8 = value
        self.unhold()

    @property
    def apic_base(self):
        """The APIC base MSR at the last exit; KVM takes it from here only without an in-kernel irqchip."""
        cdef uint64_t value
        self.hold()
        value = self.page.run.apic_base
        self.unhold()
        return value

    @apic_base.setter
    def apic_base(self, uint64_t value):
        self.hold()
        self.page.run.apic_base = value
        self.unhold()

    @property
    def sync_valid_regs(self):
        """Which KVM_SYNC_X86_* sets KVM leaves in `sync_regs` at each exit.

        KVM_CAP_SYNC_REGS has those it knows.
        """
        cdef uint64_t value
        self.hold()
        value = self.page.run.kvm_valid_regs
        self.unhold()
        return value

    @sync_valid_regs.setter
    def sync_valid_regs(self, uint64_t sets):
        self.need_sync(sets)
        self.hold()
        self.page.run.kvm_valid_regs = sets
        self.unhold()

    @property
    def sync_dirty_regs(self):
        """Which KVM_SYNC_X86_* sets KVM takes from `sync_regs` at the next run(); then it is 0 again."""
        cdef uint64_t value
        self.hold()
        value = self.page.run.kvm_dirty_regs
        self.unhold()
        return value

    @sync_dirty_regs.setter
    def sync_dirty_regs(self, uint64_t sets):
        self.need_sync(sets)
        self.hold()
        self.page.run.kvm_dirty_regs = sets
        self.unhold()

    cdef int need_sync(self, uint64_t sets) except -1:
        self.need(KVM_CAP_SYNC_REGS, KVM_RUN)
        if sets & ~<uint64_t> self.capability(KVM_CAP_SYNC_REGS):
            raise ValueError(f"KVM_CAP_SYNC_REGS offers {self.capability(KVM_CAP_SYNC_REGS):#x}, not {sets:#x}")
        return 0

    @property
    def sync_regs(self):
        """A copy of the registers that KVM exchanges in kvm_run without an ioctl; sync_valid_regs says which are valid."""
        cdef Struct regs = SyncRegs.__new__(SyncRegs)
        self.enter()
        memcpy(regs.pointer, self.page.run.s.padding, regs.size)
        self.leave()
        return regs

    @sync_regs.setter
    def sync_regs(self, value):
        if not isinstance(value, SyncRegs):
            raise TypeError(f"sync_regs: a SyncRegs is needed, not {type(value).__name__}")
        self.enter()
        memcpy(self.page.run.s.padding, (<Struct> value).pointer, (<Struct> value).size)
        self.leave()

    # Events

    def interrupt(self, uint32_t vector):
        """Queue external interrupt `vector`; without an in-kernel irqchip.

        KVM_INTERRUPT, api.rst 4.16.
        """
        cdef kvm_interrupt request
        request.irq = vector
        self.call(KVM_INTERRUPT, <uintptr_t> &request)

    def nmi(self):
        """Queue an NMI.

        KVM_NMI, api.rst 4.64; needs KVM_CAP_USER_NMI.
        """
        self.need(KVM_CAP_USER_NMI, KVM_NMI)
        self.call(KVM_NMI, 0)

    def smi(self):
        """Queue an SMI.

        KVM_SMI, api.rst 4.96; needs KVM_CAP_X86_SMM.
        """
        self.need(KVM_CAP_X86_SMM, KVM_SMI)
        self.call(KVM_SMI, 0)

    def set_guest_debug(self, control, debugreg=()):
        """Single-step and breakpoints: `control` is KVM_GUESTDBG_*, `debugreg` up to 8 values.

        KVM_SET_GUEST_DEBUG, api.rst 4.87; needs KVM_CAP_SET_GUEST_DEBUG.
        """
        self.need(KVM_CAP_SET_GUEST_DEBUG, KVM_SET_GUEST_DEBUG)
        request = GuestDebug(control=control)
        values = list(debugreg)
        request.arch.debugreg = values + [0] * (8 - len(values))
        self.put(GuestDebug, request, KVM_SET_GUEST_DEBUG)

    def set_signal_mask(self, signals):
        """The signals blocked during KVM_RUN, by number; None: those of the thread.

        KVM_SET_SIGNAL_MASK, api.rst 4.21.
        """
        cdef uint8_t room[16]
        cdef kvm_signal_mask *mask = <kvm_signal_mask *> room
        cdef uint64_t bits = 0
        if signals is None:
            self.call(KVM_SET_SIGNAL_MASK, 0)
            return
        for number in signals:
            if not 1 <= number <= 64:
                raise ValueError(f"there is no signal {number}")
            bits |= <uint64_t> 1 << (<int> number - 1)
        mask.len = sizeof(bits)  # the kernel's sigset_t
        memcpy(mask.sigset, &bits, sizeof(bits))
        self.call(KVM_SET_SIGNAL_MASK, <uintptr_t> mask)

    def tpr_access_reporting(self, bint enabled):
        """Exit with TprAccess when the guest accesses its task priority register.

        KVM_TPR_ACCESS_REPORTING; needs KVM_CAP_VAPIC.
        """
        cdef kvm_tpr_access_ctl control
        self.need(KVM_CAP_VAPIC, KVM_TPR_ACCESS_REPORTING)
        memset(&control, 0, sizeof(control))
        control.enabled = enabled
        self.call(KVM_TPR_ACCESS_REPORTING, <uintptr_t> &control)

    def set_vapic_addr(self, uint64_t gpa):
        """Where the guest keeps its virtual APIC page.

        KVM_SET_VAPIC_ADDR; needs KVM_CAP_VAPIC.
        """
        cdef kvm_vapic_addr request
        self.need(KVM_CAP_VAPIC, KVM_SET_VAPIC_ADDR)
        request.vapic_addr = gpa
        self.call(KVM_SET_VAPIC_ADDR, <uintptr_t> &request)

    def kvmclock_ctrl(self):
        """Tell a guest with kvmclock that it was paused, so that its watchdogs keep calm.

        KVM_KVMCLOCK_CTRL, api.rst 4.70; needs KVM_CAP_KVMCLOCK_CTRL.
        """
        self.need(KVM_CAP_KVMCLOCK_CTRL, KVM_KVMCLOCK_CTRL)
        self.call(KVM_KVMCLOCK_CTRL, 0)

    def enable_cap(self, cap, *args, flags=0):
        """Enable a capability of this vCPU, with up to 4 arguments.

        KVM_ENABLE_CAP, api.rst 4.37 and section 6; needs KVM_CAP_ENABLE_CAP.
        """
        self.enable(KVM_CAP_ENABLE_CAP, cap, args, flags)

    def memory_encrypt_op(self, command):
        """Pass a raw TDX command, a writable buffer with struct kvm_tdx_cmd, to the vCPU.

        KVM_MEMORY_ENCRYPT_OP, api.rst 4.110.
        """
        cdef uint8_t[::1] view = command
        if view.shape[0] < ENCRYPT_COMMAND:
            raise ValueError(f"KVM_MEMORY_ENCRYPT_OP: {ENCRYPT_COMMAND} bytes are needed, not {view.shape[0]}")
        return self.call_nogil(KVM_MEMORY_ENCRYPT_OP, <uintptr_t> &view[0])

    # Memory

    def pre_fault_memory(self, uint64_t gpa, uint64_t size, uint64_t flags=0):
        """Fill the page tables for [gpa, gpa + size) before the guest touches it.

        KVM_PRE_FAULT_MEMORY, api.rst 4.143; needs KVM_CAP_PRE_FAULT_MEMORY.
        """
        cdef kvm_pre_fault_memory request
        cdef long result
        self.need(KVM_CAP_PRE_FAULT_MEMORY, KVM_PRE_FAULT_MEMORY)
        memset(&request, 0, sizeof(request))
        request.gpa, request.size, request.flags = gpa, size, flags
        while request.size:
            result = self.try_call_nogil(KVM_PRE_FAULT_MEMORY, <uintptr_t> &request)
            if result < 0 and result != NO_EINTR:
                raise error(result, KVM_PRE_FAULT_MEMORY)
            PyErr_CheckSignals()

    def collect_dirty(self):
        """The pages in the dirty ring as a list of (slot, page number in the slot) (api.rst 7.36).

        They stay counted as written until Vm.reset_dirty_rings(), which must come before their contents are read.
        """
        cdef kvm_dirty_gfn entry
        cdef list pages = []
        if self.ring == NULL and self.handle >= 0:
            raise StateError("the VM has no dirty rings: Vm.enable_dirty_ring() comes before the vCPUs")
        self.hold()
        try:
            with cython.critical_section(self):
                while dirty_take(&self.ring[self.ring_next & (self.ring_size - 1)], &entry):
                    self.ring_next += 1
                    pages.append((entry.slot, entry.offset))
        finally:
            self.unhold()
        return pages

    def coalesced(self):
        """Take the writes that KVM has collected in the VM's ring, oldest first, as MmioWrite and IoOut.

        Vm.register_coalesced_mmio() says which writes go there (api.rst 4.116).
        """
        cdef kvm_coalesced_mmio write
        cdef kvm_coalesced_mmio_ring *ring
        cdef list writes = []
        self.need(KVM_CAP_COALESCED_MMIO, KVM_REGISTER_COALESCED_MMIO)
        self.hold()
        try:
            ring = <kvm_coalesced_mmio_ring *> (<char *> self.page.run + KVM_COALESCED_MMIO_PAGE_OFFSET * PAGE)
            with cython.critical_section(self.parent):
                while coalesced_take(ring, &write):
                    data = (<char *> write.data)[:min(write.len, <uint32_t> 8)]
                    writes.append(IoOut(write.phys_addr, data) if write.pio else MmioWrite(write.phys_addr, data))
        finally:
            self.unhold()
        return writes

    def stats(self):
        """Open the statistics of this vCPU: a Stats.

        KVM_GET_STATS_FD, api.rst 4.133.
        """
        return Stats(self)
