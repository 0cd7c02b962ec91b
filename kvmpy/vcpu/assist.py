# SPDX-License-Identifier: Apache-2.0
"""The emulation assist: what the kernel's KVM cannot emulate, the software CPU runs.

A KVM that emulates guest code (nested without VMX, page-table based, real mode on old processors) stops with
KVM_EXIT_INTERNAL_ERROR at an instruction it does not know. Then a software vCPU with the same memory slots takes the
state over, runs that instruction and a stretch after it, and gives the state back. It goes no further than to what
belongs to KVM's own machine: ports, device memory, machine MSRs, CPUID, RDTSC, hypercalls, HLT.

Two things keep both processors in step. The software CPU forgets decoded code before each stretch, since nobody tells
it of KVM's writes. And KVM forgets its shadow page tables after it, since nobody tells KVM of writes to the guest's:
deleting a memory slot makes it do that (api.rst, KVM_X86_QUIRK_SLOT_ZAP_ALL).
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from functools import lru_cache
from typing import TYPE_CHECKING

from kvmpy import _exits as x
from kvmpy import _kvm
from kvmpy._constants import (
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MP_STATE_HALTED,
    KVM_MSR_EXIT_REASON_FILTER,
    KVM_MSR_EXIT_REASON_INVAL,
    KVM_MSR_EXIT_REASON_UNKNOWN,
    KVM_MSR_FILTER_READ,
    KVM_MSR_FILTER_WRITE,
    KVM_VCPUEVENT_VALID_SHADOW,
)
from kvmpy._structs import Xsave
from kvmpy.errors import BackendError, KvmError
from kvmpy.memory import Ram

if TYPE_CHECKING:
    from kvmpy._structs import CpuidEntry2
    from kvmpy.memory import GuestMemory
    from kvmpy.vcpu.vcpu import Vcpu

log = logging.getLogger("kvmpy.vcpu.assist")

STRETCH = 400_000  # instructions: about a millisecond, somewhat more than the moves of state and the zap cost
EMULATION = 1      # KVM_INTERNAL_ERROR_EMULATION
CAP_ASSIST = 0x6B76_0002  # KVMPY_CAP_TCG_ASSIST (tcg/vm.h)
PAGE = 4096
ZAP_GPA = 1 << 45  # of the slot that comes and goes: far above what a guest has

# STAR, LSTAR, CSTAR, FMASK, SYSENTER_*, TSC_AUX, XSS. A WRMSR is handed back, so only SWAPGS changes one: the last.
_KERNEL_GS_BASE = 0xC000_0102
_MSRS = (0xC000_0081, 0xC000_0082, 0xC000_0083, 0xC000_0084, 0x174, 0x175, 0x176, 0xC000_0103, 0xDA0, _KERNEL_GS_BASE)

_XSTATE_BV = slice(512, 520)
_PKRU = 1 << 9
# Where the XSAVE area has what, by XCR0 bit (SDM vol. 1, 13.4).
_PLACES = {1: ((0, 24), (32, 160)), 2: ((24, 32), (160, 416)), 4: ((576, 832),), _PKRU: ((2688, 2696),)}

_UNDEFINED = (b"\x0f\x0b", b"\x0f\xb9", b"\x0f\xff")  # UD2, UD1, UD0: #UD is what the guest wants
_UD = 6


class Assist:
    """The software CPU behind one VM of the kernel engine. `counts`: instructions it was called for, by mnemonic.

    `enabled` switches it off (default on; `$KVMPY_ASSIST=0` is off where the program did not say). `stretch` is how
    many instructions it runs at most in one go. It costs nothing until the first instruction that KVM cannot run.
    """

    def __init__(self, vm: _kvm.Vm, enabled: bool | None = None) -> None:
        if enabled is None:
            enabled = os.environ.get("KVMPY_ASSIST", "1") != "0"
        self.enabled = enabled and vm.backend == "kvm"
        self.counts: Counter[str] = Counter()
        self.stretch = STRETCH
        self._vm = vm
        self._lock = threading.RLock()  # slots, and the making of software vCPUs
        self._slots: dict[int, tuple[int, int, int, int]] = {}
        self._software: _kvm.Vm | None = None
        self._partners: dict[int, _Partner] = {}
        self._zap_lock = threading.Lock()
        self._zap_ram: Ram | None = None
        self._closed = False

    def set_slot(self, slot: int, gpa: int, size: int, hva: int, flags: int) -> None:
        """Follow a memory slot of the VM: returns when the software CPU uses what was there before no more."""
        with self._lock:
            if size:
                self._slots[slot] = (gpa, size, hva, flags)
            elif self._slots.pop(slot, None) is None:
                return
            if self._software is not None:
                self._software.set_user_memory_region(slot, gpa, size, hva, flags)

    def take(self, vcpu: Vcpu, exit: x.InternalError, memory: GuestMemory) -> x.Exit | None:
        """Run what KVM could not.

        Returns None when the guest goes on in KVM, the exit to serve when the software CPU ended in one that KVM
        would give too (HLT, shutdown, debug), `exit` itself when it could not help either.
        """
        if not self.enabled or exit.suberror != EMULATION:
            return exit
        try:
            partner = self._partner(vcpu)
            if bytes(exit.instruction[:2]) in _UNDEFINED:
                self._count(bytes(exit.instruction), partner.bits)
                _raise_ud(vcpu)
                return None
            result = partner.run(vcpu, self.stretch)
        except (BackendError, KvmError) as error:
            log.warning("no emulation assist for vCPU %d: %s", vcpu.id, error)
            return exit
        if result is None:
            return exit
        self._count(bytes(exit.instruction), partner.bits)
        self._mark_dirty(memory)
        self._zap()
        if isinstance(result, x.Hlt):
            try:
                vcpu.mp_state = KVM_MP_STATE_HALTED
            except KvmError:  # no local APIC in the kernel: HLT is an exit there too
                return result
        return result if isinstance(result, (x.Shutdown, x.Debug)) else None

    def close(self) -> None:
        """Free the software VM; nothing of the guest runs any more. Idempotent."""
        with self._lock:
            self._closed = True
            self._partners.clear()
            if self._software is not None:
                self._software.close()
                self._software.kvm.close()
                self._software = None
            if self._zap_ram is not None:
                self._zap_ram.close()
                self._zap_ram = None

    def _count(self, instruction: bytes, bits: int) -> None:
        name = _mnemonic(instruction, bits)
        with self._lock:
            self.counts[name] += 1

    def _partner(self, vcpu: Vcpu) -> _Partner:
        partner = self._partners.get(vcpu.id)
        if partner is not None:
            return partner
        with self._lock:
            if self._closed:
                raise BackendError("the VM is closed")
            if self._software is None:
                self._software = self._make()
            partner = self._partners[vcpu.id] = _Partner(self._software, vcpu)
        return partner

    def _make(self) -> _kvm.Vm:
        from kvmpy import tcg

        kvm = _kvm.Kvm(tcg.engine())
        try:
            software = _kvm.Vm(kvm)
            # Whatever MSR an instruction names is KVM's: the instruction is left to it.
            reasons = KVM_MSR_EXIT_REASON_FILTER | KVM_MSR_EXIT_REASON_INVAL | KVM_MSR_EXIT_REASON_UNKNOWN
            software.enable_cap("X86_USER_SPACE_MSR", reasons)
            nothing = (KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE, 0, bytes(8))
            software.set_msr_filter([nothing], default_deny=True)
            for slot, (gpa, size, hva, flags) in self._slots.items():
                software.set_user_memory_region(slot, gpa, size, hva, flags)
        except BaseException:
            kvm.close()
            raise
        self._zap_ram = Ram.anonymous(PAGE)
        return software

    def _mark_dirty(self, memory: GuestMemory) -> None:
        """Pages the software CPU wrote go into the VM's dirty log as pages the host wrote."""
        with self._lock:
            software = self._software
            logged = [(slot, at[0]) for slot, at in self._slots.items() if at[3] & KVM_MEM_LOG_DIRTY_PAGES]
            if software is None:
                return
            for slot, gpa in logged:
                bits = int.from_bytes(software.get_dirty_log(slot), "little")
                while bits:
                    page = (bits & -bits).bit_length() - 1
                    memory.wrote(gpa + page * PAGE, PAGE)
                    bits &= bits - 1

    def _zap(self) -> None:
        """Make KVM forget its shadow page tables."""
        with self._zap_lock:
            ram = self._zap_ram
            if ram is None:
                return
            slot = self._vm.check_extension("NR_MEMSLOTS") - 1
            for size in (PAGE, 0):  # by the ioctl itself: the software CPU need not know
                _kvm.Vm.set_user_memory_region(self._vm, slot, ZAP_GPA, size, ram.address)


class _Partner:
    """The software vCPU beside one vCPU, and the way of state between them: KVM's own structures, both ways."""

    def __init__(self, software: _kvm.Vm, vcpu: Vcpu) -> None:
        self._cpu = software.create_vcpu(vcpu.id)
        entries = software.kvm.get_supported_cpuid()
        self._cpu.cpuid = entries
        leaf = next((e for e in entries if e.function == 0xD and e.index == 0), None)
        self._components = (leaf.eax if leaf is not None else 3) & ~_PKRU
        self._components |= _pkru_in_place(entries, vcpu.cpuid)
        self._places = {bit: places for bit, places in _PLACES.items() if self._components & bit}
        carried = _carried(vcpu.vm.kvm.get_supported_cpuid())
        if carried:
            self._cpu.enable_cap(CAP_ASSIST, 1, sum(carried))
            self._components |= sum(carried)
            self._places |= carried
        known = set(vcpu.vm.kvm.get_msr_index_list()) & set(software.kvm.get_msr_index_list())
        self._msrs = [index for index in _MSRS if index in known]
        self._debug: object = None
        self.bits = 64

    def run(self, vcpu: Vcpu, stretch: int) -> x.Exit | None:
        """Move the state over, run, move it back; None (and nothing is changed) when it got nowhere."""
        cpu = self._cpu
        before = vcpu.regs
        state, events, xcrs, area = vcpu.sregs2, vcpu.vcpu_events, vcpu.xcrs, vcpu.xsave
        self.bits = 64 if state.efer & 1 << 10 and state.cs.l else 32 if state.cs.db else 16
        if events.smi.smm:
            return None
        # An NMI that waits stays with KVM, where more may come meanwhile; so do INIT, SIPI and SMI.
        events.flags &= KVM_VCPUEVENT_VALID_SHADOW
        if vcpu.debug != self._debug:
            cpu.set_guest_debug(*(vcpu.debug or (0,)))
            self._debug = vcpu.debug
        enabled = xcrs.xcrs[0].value
        cpu.sregs2 = state
        cpu.cr8 = state.cr8
        cpu.set_msrs(vcpu.get_msrs(self._msrs))
        xcrs.xcrs[0].value = enabled & self._components
        cpu.xcrs = xcrs
        cpu.xsave = self._inside(area)
        cpu.debugregs = vcpu.debugregs
        cpu.regs = before
        cpu.vcpu_events = events
        cpu.enable_cap(CAP_ASSIST, 1 if vcpu.debug else stretch, 0, int(enabled & ~self._components != 0))
        exit = cpu.run()
        after = cpu.regs
        if isinstance(exit, x.InternalError) or (after == before and not isinstance(exit, (x.Debug, x.Shutdown))):
            log.warning("the software CPU gets no further either: %r", exit)
            if enabled & ~self._components:
                log.warning("it lacks state of the guest's XCR0 %#x (AMX?), so it leaves XSAVE alone", enabled)
            return None
        state = cpu.sregs2
        now = cpu.xcrs.xcrs[0].value
        if now != enabled & self._components:
            xcrs.xcrs[0].value = now
            vcpu.xcrs = xcrs
        vcpu.sregs2 = state
        vcpu.set_msrs(cpu.get_msrs([_KERNEL_GS_BASE]))
        vcpu.xsave = self._outside(area, cpu.xsave)
        vcpu.debugregs = cpu.debugregs
        vcpu.regs = after
        events = cpu.vcpu_events
        events.flags &= KVM_VCPUEVENT_VALID_SHADOW
        vcpu.vcpu_events = events
        return exit

    def _inside(self, area: Xsave) -> Xsave:
        """KVM's XSAVE area with what the software CPU knows of it."""
        raw = bytearray(bytes(area)[:PAGE])
        present = int.from_bytes(raw[_XSTATE_BV], "little") & self._components
        raw[_XSTATE_BV] = present.to_bytes(8, "little")
        return Xsave.from_bytes(bytes(raw))

    def _outside(self, area: Xsave, inside: Xsave) -> Xsave:
        """KVM's XSAVE area, in which the parts the software CPU knows are new."""
        raw, new = bytearray(bytes(area)), bytes(inside)
        present = int.from_bytes(raw[_XSTATE_BV], "little") & ~self._components
        present |= int.from_bytes(new[_XSTATE_BV], "little") & self._components
        raw[_XSTATE_BV] = present.to_bytes(8, "little")
        for places in self._places.values():
            for start, end in places:
                raw[start:end] = new[start:end]
        return Xsave.from_bytes(bytes(raw))


def _carried(entries: list[CpuidEntry2]) -> dict[int, tuple[tuple[int, int]]]:
    """The components that the software CPU only carries (tcg/xstate.c), by XCR0 bit, and where they lie."""
    # It has x87, SSE, AVX and PKRU (9) itself.
    components = [e for e in entries if e.function == 0xD and 2 < e.index < 63 and e.index != 9]
    return {
        1 << e.index: ((e.ebx, e.ebx + e.eax),)
        for e in components
        if e.eax and not e.ecx & 1 and e.ebx >= 832 and e.ebx + e.eax <= PAGE
    }


def _raise_ud(vcpu: Vcpu) -> None:
    events = vcpu.vcpu_events
    events.flags &= KVM_VCPUEVENT_VALID_SHADOW
    events.exception.injected, events.exception.nr, events.exception.has_error_code = 1, _UD, 0
    vcpu.vcpu_events = events


def _pkru_in_place(software: list[CpuidEntry2], guest: list[CpuidEntry2]) -> int:
    """PKRU's bit, where both processors keep it at the same offset of the XSAVE area."""

    def place(entries: list[CpuidEntry2]) -> int | None:
        return next((e.ebx for e in entries if e.function == 0xD and e.index == 9 and e.eax), None)

    ours = place(software)
    return _PKRU if ours is not None and ours == place(guest) else 0


@lru_cache(maxsize=4096)
def _mnemonic(code: bytes, bits: int) -> str:
    """The instruction by name, prefixes left out: "cmpxchg16b"."""
    from kvmpy.disasm import LACKING, disassemble

    line = next(iter(disassemble(code, 0, bits, count=1)), "")
    if not code or LACKING in line:
        return code[:4].hex() or "unknown"
    words = line.split("  ", 2)[-1].split()
    return next((word for word in words if word not in ("lock", "rep", "repe", "repne")), "unknown")
