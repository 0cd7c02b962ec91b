# SPDX-License-Identifier: Apache-2.0
"""The software vCPU beside one vCPU of the kernel's KVM, and the way of state between them: KVM's own structures."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from kvmpy import _exits as x
from kvmpy._constants import KVM_VCPUEVENT_VALID_SHADOW
from kvmpy._structs import Xsave

if TYPE_CHECKING:
    from kvmpy import _kvm
    from kvmpy._structs import CpuidEntry2
    from kvmpy.vcpu.vcpu import Vcpu

log = logging.getLogger("kvmpy.vcpu.assist")

CAP_ASSIST = 0x6B76_0002  # KVMPY_CAP_TCG_ASSIST (tcg/vm.h) and the bits of its third argument
PARTIAL, LEADS, KEEP = 1, 2, 4
PAGE = 4096

# STAR, LSTAR, CSTAR, FMASK, SYSENTER_*, TSC_AUX, XSS, KERNEL_GS_BASE. A partner that helps gives a WRMSR back, so only
# SWAPGS changes one: the last. One that leads has them all.
KERNEL_GS_BASE = 0xC000_0102
MSRS = (0xC000_0081, 0xC000_0082, 0xC000_0083, 0xC000_0084, 0x174, 0x175, 0x176, 0xC000_0103, 0xDA0, KERNEL_GS_BASE)

_XSTATE_BV = slice(512, 520)
_PKRU = 1 << 9
# Where the XSAVE area has what, by XCR0 bit (SDM vol. 1, 13.4).
_PLACES = {1: ((0, 24), (32, 160)), 2: ((24, 32), (160, 416)), 4: ((576, 832),), _PKRU: ((2688, 2696),)}


class Partner:
    """`cpu` is the software vCPU. `take()` moves the state of the kernel's vCPU to it, `give()` back."""

    def __init__(self, software: _kvm.Vm, vcpu: Vcpu, *, leads: bool = False) -> None:
        self.cpu = software.create_vcpu(vcpu.id)
        entries = software.kvm.get_supported_cpuid()
        # A KVM that emulates ring 0 may show other things than it was told to, even when asked for its table.
        self.cpu.cpuid = vcpu.announced if leads and vcpu.announced is not None else entries
        leaf = next((e for e in entries if e.function == 0xD and e.index == 0), None)
        self._components = (leaf.eax if leaf is not None else 3) & ~_PKRU
        self._components |= _pkru_in_place(entries, vcpu.cpuid)
        self._places = {bit: places for bit, places in _PLACES.items() if self._components & bit}
        carried = _carried(vcpu.vm.kvm.get_supported_cpuid())
        if carried:
            self.cpu.enable_cap(CAP_ASSIST, 1, sum(carried))
            self._components |= sum(carried)
            self._places |= carried
        known = set(vcpu.vm.kvm.get_msr_index_list()) & set(software.kvm.get_msr_index_list())
        self._msrs = [index for index in MSRS if index in known]
        self._debug: object = None
        self._area = Xsave()
        self.partial = False
        self.bits = 64

    def run(self, vcpu: Vcpu, stretch: int) -> x.Exit | None:
        """Move the state over, run, move it back; None (and nothing is changed) when it got nowhere."""
        cpu = self.cpu
        before = vcpu.regs
        if not self.take(vcpu):
            return None
        if vcpu.debug != self._debug:
            cpu.set_guest_debug(*(vcpu.debug or (0,)))
            self._debug = vcpu.debug
        cpu.enable_cap(CAP_ASSIST, 1 if vcpu.debug else stretch, 0, PARTIAL if self.partial else 0)
        exit = cpu.run()
        after = cpu.regs
        if isinstance(exit, x.InternalError) or (after == before and not isinstance(exit, (x.Debug, x.Shutdown))):
            log.warning("the software CPU gets no further either: %r", exit)
            if self.partial:
                log.warning("it lacks state of the guest's XCR0 (AMX?), so it leaves XSAVE alone")
            return None
        self.give(vcpu, [KERNEL_GS_BASE])
        return exit

    def take(self, vcpu: Vcpu) -> bool:
        """State from the kernel's vCPU; False, and nothing is moved, in system-management mode."""
        cpu = self.cpu
        state, events, xcrs = vcpu.sregs2, vcpu.vcpu_events, vcpu.xcrs
        self.bits = 64 if state.efer & 1 << 10 and state.cs.l else 32 if state.cs.db else 16
        if events.smi.smm:
            return False
        # An NMI that waits stays with KVM, where more may come meanwhile; so do INIT, SIPI and SMI.
        events.flags &= KVM_VCPUEVENT_VALID_SHADOW
        enabled = xcrs.xcrs[0].value
        self.partial = enabled & ~self._components != 0
        cpu.sregs2 = state
        cpu.cr8 = state.cr8
        cpu.set_msrs(vcpu.get_msrs(self._msrs))
        xcrs.xcrs[0].value = enabled & self._components
        cpu.xcrs = xcrs
        self._area = vcpu.xsave
        cpu.xsave = self._inside(self._area)
        cpu.debugregs = vcpu.debugregs
        cpu.regs = vcpu.regs
        cpu.vcpu_events = events
        return True

    def give(self, vcpu: Vcpu, msrs: list[int] | None = None, *, registers: bool = True) -> None:
        """State to the kernel's vCPU. msrs: which (None: all); without `registers` what kvm_run can move stays."""
        cpu = self.cpu
        xcrs = vcpu.xcrs
        enabled = cpu.xcrs.xcrs[0].value | xcrs.xcrs[0].value & ~self._components
        if enabled != xcrs.xcrs[0].value:
            xcrs.xcrs[0].value = enabled
            vcpu.xcrs = xcrs
        if registers:
            vcpu.sregs2 = cpu.sregs2
        vcpu.set_msrs(cpu.get_msrs(self._msrs if msrs is None else msrs))
        vcpu.xsave = self._outside(self._area, cpu.xsave)
        vcpu.debugregs = cpu.debugregs
        if registers:
            vcpu.regs = cpu.regs
            events = cpu.vcpu_events
            events.flags &= KVM_VCPUEVENT_VALID_SHADOW
            vcpu.vcpu_events = events

    def give_vectors(self, vcpu: Vcpu) -> None:
        """Only the XSAVE state to the kernel's vCPU, if it changed since the last take."""
        area = self._outside(self._area, self.cpu.xsave)
        if area != self._area:
            vcpu.xsave = self._area = area

    def take_vectors(self, vcpu: Vcpu) -> None:
        """Only the XSAVE state from it, if it changed."""
        area = vcpu.xsave
        if area != self._area:
            self._area = area
            self.cpu.xsave = self._inside(area)

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


def _pkru_in_place(software: list[CpuidEntry2], guest: list[CpuidEntry2]) -> int:
    """PKRU's bit, where both processors keep it at the same offset of the XSAVE area."""

    def place(entries: list[CpuidEntry2]) -> int | None:
        return next((e.ebx for e in entries if e.function == 0xD and e.index == 9 and e.eax), None)

    ours = place(software)
    return _PKRU if ours is not None and ours == place(guest) else 0
