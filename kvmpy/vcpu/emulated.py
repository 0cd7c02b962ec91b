# SPDX-License-Identifier: Apache-2.0
"""KVMs that emulate ring 0, and what a guest of one is told of its processor when the software CPU leads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kvmpy import _exits as x
from kvmpy import _kvm
from kvmpy._constants import (
    KVM_SYNC_X86_EVENTS,
    KVM_SYNC_X86_REGS,
    KVM_SYNC_X86_SREGS,
    KVM_VCPU_TSC_CTRL,
    KVM_VCPU_TSC_OFFSET,
)
from kvmpy._structs import CpuidEntry2, Regs
from kvmpy.arch import layout, x86
from kvmpy.arch.entry import long
from kvmpy.errors import KvmError
from kvmpy.memory import Ram
from kvmpy.vcpu import modes

if TYPE_CHECKING:
    from collections.abc import Iterable

ALL = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS
HARDWARE = ("kvm_intel", "kvm_amd")  # modules that run guests by VMX or SVM
CODE, SIZE = 0x1_0000, 0x2_0000
# lock cmpxchg16b [rsp]  hlt: plain memory, so that only an emulator of instructions can fail
PROBE = bytes.fromhex("f0480fc70c24 f4")

# Features that come with bits of control registers, page tables or MSRs, or are the local APIC's: by leaf and register.
# Others are the software CPU's alone. (KVM's table may lack LZCNT and have BMI2, and who finds that takes LZCNT too.)
STATE = {
    (1, "ecx"): 1 << 17 | 1 << 21 | 1 << 24 | 1 << 26,  # PCID, x2APIC, TSC deadline, XSAVE
    (1, "edx"): 0xFFFF_FFFF,
    (7, "ebx"): 1 << 0 | 1 << 1 | 1 << 7 | 1 << 20,  # FSGSBASE, TSC_ADJUST, SMEP, SMAP
    (7, "ecx"): 1 << 2 | 1 << 3 | 1 << 16,  # UMIP, PKU, LA57
    (0x8000_0001, "edx"): 0xFFFF_FFFF,
}
PV_FEATURES = 0x4000_0001
# Of KVM's paravirtual features (Documentation/virt/kvm/x86/cpuid.rst) those that need the guest's code to run in KVM.
# By memory shared while it does: ASYNC_PF, STEAL_TIME, PV_EOI, PV_TLB_FLUSH, ASYNC_PF_VMEXIT, ASYNC_PF_INT. By
# hypercalls: PV_UNHALT, PV_SEND_IPI, PV_SCHED_YIELD.
PV_IN_GUEST = sum(1 << bit for bit in (4, 5, 6, 9, 10, 14, 7, 11, 13))


def ring0(kvm: _kvm.Kvm) -> list[CpuidEntry2] | None:
    """None, or where this KVM emulates ring 0 of 64-bit mode, the CPUID table that its vCPUs really have.

    kvm_pvm shows other things in KVM_GET_SUPPORTED_CPUID, and its vCPUs show other things than KVM_SET_CPUID2 told them
    to. A tiny guest says it, once per process, and not where guests run by VMX or SVM.
    """
    if any(Path("/sys/module", name).exists() for name in HARDWARE):
        return None
    if not _known:
        _known.append(_probe(kvm))
    return _known[0]


_known: list[list[CpuidEntry2] | None] = []  # of the host's kernel


def _probe(kvm: _kvm.Kvm) -> list[CpuidEntry2] | None:
    ram = Ram.anonymous(SIZE)
    vm = _kvm.Vm(kvm)
    try:
        ram.write(layout.PAGE_TABLES, x86.identity_page_tables(layout.PAGE_TABLES))
        ram.write(CODE, PROBE)
        vm.set_user_memory_region(0, 0, SIZE, ram.address)
        vcpu = vm.create_vcpu()
        vcpu.sregs = modes.special_registers(vcpu.sregs, long(CODE, gdt=0, cr3=layout.PAGE_TABLES))
        vcpu.regs = Regs(rip=CODE, rsp=CODE + 0x1000, rflags=x86.RFLAGS_FIXED)
        vcpu.cpuid = kvm.get_supported_cpuid()
        emulated = isinstance(vcpu.run(), x.InternalError)
        # What leading takes (lead.py): registers in kvm_run, the TSC's offset.
        able = vm.check_extension("SYNC_REGS") & ALL == ALL
        able = able and vcpu.has_device_attr(KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET)
        return vcpu.cpuid if emulated and able else None
    except KvmError:
        return None
    finally:
        vm.close()
        ram.close()


def cpuid(software: Iterable[CpuidEntry2], kernel: Iterable[CpuidEntry2]) -> list[CpuidEntry2]:
    """The software CPU's table, as far as KVM's vCPU can hold the state, with KVM's features but PV_IN_GUEST."""
    theirs = {(e.function, e.index): e for e in kernel}
    table = {(e.function, e.index): e for e in software}
    for (function, register), mask in STATE.items():
        allowed = getattr(theirs[function, 0], register) | ~mask
        setattr(table[function, 0], register, getattr(table[function, 0], register) & allowed)
    for (function, _), entry in theirs.items():
        if 0x4000_0000 <= function < 0x4000_0100:
            if function == PV_FEATURES:
                entry.eax &= ~PV_IN_GUEST
            table[function, entry.index] = entry
    return list(table.values())
