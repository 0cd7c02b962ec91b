# SPDX-License-Identifier: Apache-2.0
"""A guest whose processor is the software CPU and whose machine is the kernel's KVM.

For a KVM that emulates ring 0: its emulator is a hundred times slower than the software CPU, lacks instructions that
every kernel uses, and ring 3, which it runs on the processor itself, cannot come back by SYSCALL (kvm_pvm leaves it in
ring 3). So here the software vCPU has the guest's state and runs all of it. What belongs to the machine is done by the
kernel's vCPU: one single step with the same registers for a port, device memory or an MSR of the chips in the kernel,
one step in the parking lot (parking.py) to see which interrupt has come, a sleep there for HLT. Ports and device memory
that belong to nobody in the kernel do not go there at all: their exit is the software CPU's own.

Whenever somebody may look at the vCPU (a handler, a pause, an error) the whole state is in the kernel's vCPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from errno import EINVAL
from typing import TYPE_CHECKING

from kvmpy import _exits as x
from kvmpy import _kvm
from kvmpy._constants import (
    KVM_GUESTDBG_ENABLE,
    KVM_GUESTDBG_SINGLESTEP,
    KVM_MP_STATE_HALTED,
    KVM_MP_STATE_RUNNABLE,
    KVM_SYNC_X86_EVENTS,
    KVM_SYNC_X86_REGS,
    KVM_SYNC_X86_SREGS,
    KVM_VCPU_TSC_CTRL,
    KVM_VCPU_TSC_OFFSET,
    KVM_VCPUEVENT_VALID_SHADOW,
    KVM_X86_SHADOW_INT_STI,
)
from kvmpy._structs import VcpuEvents
from kvmpy.arch.x86 import RFLAGS_IF, RFLAGS_TF
from kvmpy.errors import KvmError
from kvmpy.vcpu.partner import CAP_ASSIST, KEEP, LEADS

if TYPE_CHECKING:
    from kvmpy._structs import SyncRegs
    from kvmpy.vcpu.parking import ParkingLot
    from kvmpy.vcpu.partner import Partner
    from kvmpy.vcpu.vcpu import Vcpu

ALL = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS
STEP = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP
DB, NMI = 1, 2
DR6_BS = 1 << 14

ACCESSES = (x.IoIn, x.IoOut, x.MmioRead, x.MmioWrite)
Claims = Callable[[x.Exit], bool]

# Nothing under way, and what comes waits: NMIs are masked, interrupts are in the shadow of an instruction before.
_QUIET = VcpuEvents(flags=KVM_VCPUEVENT_VALID_SHADOW)
_QUIET.nmi.masked = 1
_QUIET.interrupt.shadow = KVM_X86_SHADOW_INT_STI


class Lead:
    """Runs one vCPU: `run()` instead of the vCPU's, `leave()` when it is not called again at once.

    in_kernel(exit): whether the access is for a device in the kernel, or for a handler that may look at the vCPU.
    zap(): KVM forgets its shadow page tables. wrote(): pages that the software CPU wrote go into the dirty log.
    """

    def __init__(
        self,
        vcpu: Vcpu,
        partner: Partner,
        lot: ParkingLot,
        *,
        stretch: int,
        in_kernel: Claims,
        zap: Callable[[], None],
        wrote: Callable[[], None],
    ) -> None:
        self.steps: Counter[str] = Counter()  # what the kernel's vCPU was entered for
        self._vcpu = vcpu
        self._partner = partner
        self._cpu = partner.cpu
        self._lot = lot
        self._stretch = stretch
        self._in_kernel = in_kernel
        self._zap = zap
        self._wrote = wrote
        self._ahead = False  # the partner has the state, the kernel's vCPU an old one
        self._answered = False  # an exit of the partner is being served; it goes on by running it again
        self._completes = False  # an exit of the kernel's vCPU is
        self._halted = False
        self._keep = 0  # KEEP: what is decoded stays, because the kernel's vCPU ran nothing that may have written code
        self._exits = 0  # of the kernel's vCPU when it got the state
        self._tsc_offset = 0
        self._stepping = False

    # What the run loop calls

    def run(self) -> x.Exit:
        """As Vcpu.run()."""
        if self._vcpu.debug is not None:
            self.leave()
            return self._vcpu.run()
        if not self._ahead and (exit := self._begin()) is not None:
            return exit
        return self._go()

    def leave(self) -> None:
        """Put the whole state into the kernel's vCPU."""
        if self._answered:
            self._answered = False
            self._cpu.immediate_exit = True  # the answered instruction is completed, nothing after it
            self._cpu.run()
        self._settle()
        if self._stepping:
            self._stepping = False
            _kvm.Vcpu.set_guest_debug(self._vcpu, 0)

    # State

    def _settle(self) -> None:
        if not self._ahead:
            return
        self._ahead = False
        self._partner.give(self._vcpu)
        self._move_nmis()
        self._wrote()
        self._exits = self._vcpu.exit_count

    def _move_nmis(self) -> None:
        events = self._cpu.vcpu_events
        for _ in range(events.nmi.pending):
            self._vcpu.nmi()
        if events.nmi.pending:
            events.nmi.pending = 0
            self._cpu.vcpu_events = events

    def _begin(self) -> x.Exit | None:
        """Take the state from the kernel's vCPU, which first ends what it has begun; an exit of it, if there is one."""
        vcpu = self._vcpu
        state = vcpu.mp_state
        if vcpu.exit_count != self._exits:  # somebody ran it meanwhile
            self._keep = 0
        while self._completes or state not in (KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_HALTED):
            self._completes = False
            self._keep = 0
            self._single_step()
            self._zap()
            exit = vcpu.run()
            if not isinstance(exit, (x.Debug, x.InternalError)):
                self._completes = not isinstance(exit, x.Interrupted)
                return exit
            state = vcpu.mp_state
        if not self._partner.take(vcpu):
            raise KvmError(EINVAL, "KVM_GET_VCPU_EVENTS", "the guest is in system-management mode")
        self._cpu.request_interrupt_window = False
        self._ahead = True
        self._halted = state == KVM_MP_STATE_HALTED
        self._get_tsc_offset()
        self._single_step()
        return None

    def _single_step(self) -> None:
        vcpu = self._vcpu
        if not self._stepping:
            self._stepping = True
            _kvm.Vcpu.set_guest_debug(vcpu, STEP)
            vcpu.sync_valid_regs = self._cpu.sync_valid_regs = ALL

    def _get_tsc_offset(self) -> None:
        raw = self._vcpu.get_device_attr(KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET)
        self._tsc_offset = int.from_bytes(raw, "little")

    # Running

    def _go(self) -> x.Exit:
        vcpu, cpu = self._vcpu, self._cpu
        while True:
            if vcpu.immediate_exit:
                return self._interrupted()
            if self._halted and (parked := self._park("halt")) is not None:
                return parked
            if not self._answered:
                cpu.enable_cap(CAP_ASSIST, self._stretch, 0, LEADS | self._keep, self._tsc_offset)
                self._keep = KEEP
            self._answered = False
            exit = cpu.run()
            kind = type(exit)
            if kind in ACCESSES:
                if not self._in_kernel(exit):
                    self._answered = True
                    return exit
                done = self._step(exit)
            elif kind is x.Interrupted or kind is x.IrqWindowOpen:
                done = self._park("poll")
            elif kind is x.Hlt:
                done = self._halt(exit)
            elif kind in (x.RdMsr, x.WrMsr):
                done = self._step(exit)
                if done is None and kind is x.WrMsr:
                    self._get_tsc_offset()
                    done = self._park("wrmsr")  # KVM writes a clock page, say, when it enters the guest
            else:
                self._settle()
                return exit
            if done is not None:
                return done

    def _interrupted(self) -> x.Exit:
        self.leave()
        exit = self._vcpu.run()  # at once: immediate_exit is set
        self._exits = self._vcpu.exit_count
        return exit

    def _step(self, wanted: x.Exit) -> x.Exit | None:
        """Have the kernel's vCPU run one instruction, or raise its exception. Interrupts wait for the parking lot."""
        vcpu, cpu = self._vcpu, self._cpu
        self.steps[type(wanted).__name__] += 1
        before = cpu.sync_regs
        there = cpu.sync_regs
        there.sregs.interrupt_bitmap = [0] * 4
        there.events = _QUIET
        memory = type(wanted) in (x.MmioRead, x.MmioWrite)
        if memory:
            self._partner.give_vectors(vcpu)  # the instruction may store or load one
        if before.sregs.ss.dpl == 3:
            self._zap()  # ring 3 runs on the processor itself, which uses KVM's page tables
        vcpu.sync_regs, vcpu.sync_dirty_regs = there, ALL
        exit = vcpu.run()
        after = vcpu.sync_regs
        if memory:
            self._partner.take_vectors(vcpu)
        moved = after.regs.rip != before.regs.rip
        if isinstance(exit, x.InternalError) and isinstance(wanted, ACCESSES) and not moved:
            self._answered = True  # KVM cannot emulate this access; whoever is on the bus gets it
            return wanted
        # An exception was raised, and the handler's first instruction is one that KVM lacks: the step is done.
        raised = isinstance(exit, x.InternalError) and moved
        if not raised and not isinstance(exit, (x.Debug, x.Interrupted)):
            self._expose()
            return exit
        self._accept(before, after, trap=bool(before.regs.rflags & RFLAGS_TF) and moved)
        if isinstance(exit, x.Interrupted):
            self._settle()
            return exit
        return None

    def _expose(self) -> None:
        """The kernel's vCPU is in the middle of the instruction: it gets the rest of the state and will go on."""
        self._ahead, self._completes = False, True
        self._partner.give(self._vcpu, registers=False)
        events = self._cpu.vcpu_events
        events.flags = KVM_VCPUEVENT_VALID_SHADOW
        events.interrupt.shadow = 0
        self._vcpu.vcpu_events = events
        self._move_nmis()
        self._wrote()

    def _accept(self, before: SyncRegs, after: SyncRegs, *, trap: bool) -> None:
        """The partner goes on from `after`. Most steps change no special register, and then nothing is forgotten."""
        cpu = self._cpu
        if trap:
            after.regs.rflags |= RFLAGS_TF  # KVM took it for the single step's
        after.sregs.interrupt_bitmap = before.sregs.interrupt_bitmap
        if after.sregs != before.sregs:
            cpu.sregs = after.sregs
            cpu.cr8 = after.sregs.cr8
        cpu.regs = after.regs
        after.events = before.events
        if before.events.interrupt.shadow or trap:
            after.events.flags = KVM_VCPUEVENT_VALID_SHADOW
            after.events.interrupt.shadow = 0
            if trap:
                debug = cpu.debugregs
                debug.dr6 |= DR6_BS
                cpu.debugregs = debug
                after.events.exception.injected, after.events.exception.nr = 1, DB
            cpu.vcpu_events = after.events
        cpu.sync_regs = after  # as if it had left there

    # Interrupts

    def _halt(self, exit: x.Exit) -> x.Exit | None:
        try:
            self._vcpu.mp_state = KVM_MP_STATE_HALTED
        except KvmError:  # no local APIC in the kernel: HLT is an exit there too
            self._settle()
            return exit
        self._halted = True
        return None

    def _park(self, why: str) -> x.Exit | None:
        """Has an interrupt come? Then the partner takes it. When halted, sleep until one comes."""
        vcpu, cpu, lot = self._vcpu, self._cpu, self._lot
        self.steps[why] += 1
        self._wrote()
        own = cpu.sync_regs
        events = own.events
        # One that the partner has not taken yet, because it was stopped before that, must not be replaced.
        busy = events.interrupt.shadow or events.interrupt.injected or events.exception.injected
        open = bool(own.regs.rflags & RFLAGS_IF) and not busy
        parked = lot.registers(own.sregs)
        parked.regs.rflags = 2 | (RFLAGS_IF if open else 0)
        parked.events.nmi.masked = events.nmi.masked
        vcpu.sync_regs, vcpu.sync_dirty_regs = parked, ALL
        exit = vcpu.run()
        seen = vcpu.sync_regs
        if seen.sregs.cr3 != lot.base:
            return self._initialised(exit)
        vector = lot.vector(seen)
        if vector == NMI:
            cpu.nmi()
        elif vector is not None:
            cpu.interrupt(vector)
        if self._halted:
            self._halted = vector is None and vcpu.mp_state == KVM_MP_STATE_HALTED
        cpu.request_interrupt_window = vector is None and not open
        if isinstance(exit, x.Debug):
            return None
        self._settle()
        return exit

    def _initialised(self, exit: x.Exit) -> x.Exit | None:
        """An INIT took the vCPU away from the parking lot; what it does not reset is still the partner's."""
        self._ahead = self._halted = False
        self._partner.give(self._vcpu, registers=False)
        return self._begin() if isinstance(exit, x.Debug) else exit
