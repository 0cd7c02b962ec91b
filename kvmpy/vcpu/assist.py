# SPDX-License-Identifier: Apache-2.0
"""The emulation assist: what the kernel's KVM cannot emulate, the software CPU runs.

A KVM that emulates guest code (nested without VMX, page-table based, real mode on old processors) stops with
KVM_EXIT_INTERNAL_ERROR at an instruction it does not know. Then a software vCPU with the same memory slots takes the
state over, runs that instruction and a stretch after it, and gives the state back. It goes no further than to what
belongs to KVM's own machine: ports, device memory, machine MSRs, CPUID, RDTSC, hypercalls, HLT. On a KVM that emulates
all of ring 0 a machine asks for more: there the software CPU leads (lead.py) and KVM is only the machine around it.

Two things keep both processors in step. The software CPU forgets decoded code before each stretch, since nobody tells
it of KVM's writes. And KVM forgets its shadow page tables after it, since nobody tells KVM of writes to the guest's:
deleting a memory slot makes it do that (api.rst, KVM_X86_QUIRK_SLOT_ZAP_ALL).
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

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
from kvmpy.errors import BackendError, KvmError
from kvmpy.memory import Ram
from kvmpy.vcpu import emulated
from kvmpy.vcpu.lead import Lead
from kvmpy.vcpu.parking import ParkingLot
from kvmpy.vcpu.partner import Partner

if TYPE_CHECKING:
    from kvmpy._structs import CpuidEntry2
    from kvmpy.memory import GuestMemory
    from kvmpy.vcpu.handlers import Handlers
    from kvmpy.vcpu.vcpu import Vcpu

log = logging.getLogger("kvmpy.vcpu.assist")

STRETCH = 400_000  # instructions: about a millisecond, somewhat more than the moves of state and the zap cost
EMULATION = 1      # KVM_INTERNAL_ERROR_EMULATION
PAGE = 4096
ZAP_GPA = 1 << 45  # of the slot that comes and goes: far above what a guest has

# MSRs of the processor itself, as (first, bits): SPEC_CTRL and PRED_CMD; ARCH_CAPABILITIES; SYSENTER_*; PAT;
# EFER, STAR, LSTAR, CSTAR, FMASK; FS_BASE, GS_BASE, KERNEL_GS_BASE, TSC_AUX.
PROCESSOR_MSRS = (
    (0x48, 0b11), (0x10A, 1), (0x174, 0b111), (0x277, 1), (0xC000_0080, 0b11111), (0xC000_0100, 0b1111),
)  # fmt: skip
# Ports of the chips in the kernel: PICs with their edge control, PIT with the speaker's port.
CHIP_PORTS = frozenset((0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1, 0x40, 0x41, 0x42, 0x43, 0x61))
IOAPIC_PAGE = 0xFEC0_0000 // PAGE

_UNDEFINED = (b"\x0f\x0b", b"\x0f\xb9", b"\x0f\xff")  # UD2, UD1, UD0: #UD is what the guest wants
_UD = 6


class Assist:
    """The software CPU behind one VM of the kernel engine. `counts`: instructions it was called for, by mnemonic.

    `enabled` switches it off (default on; `$KVMPY_ASSIST=0` is off where the program did not say). `stretch` is how
    many instructions it runs at most in one go. It costs nothing until the first instruction that KVM cannot run.
    """

    def __init__(self, vm: _kvm.Vm, enabled: bool | None = None, *, lead: bool = False) -> None:
        if enabled is None:
            enabled = os.environ.get("KVMPY_ASSIST", "1") != "0"
        self.enabled = enabled and vm.backend == "kvm"
        self._theirs = emulated.ring0(vm.kvm) if self.enabled and lead else None
        self.leads = self._theirs is not None
        self.counts: Counter[str] = Counter()
        self.stretch = STRETCH
        self._vm = vm
        self._lock = threading.RLock()  # slots, and the making of software vCPUs
        self._slots: dict[int, tuple[int, int, int, int]] = {}
        self._logged = False  # one of them has a dirty log
        self._software: _kvm.Vm | None = None
        self._partners: dict[int, Partner] = {}
        self._zap_lock = threading.Lock()
        self._zap_ram: Ram | None = None
        self._lot: ParkingLot | None = None
        self._leaders: dict[int, Lead] = {}
        self._zones: Counter[tuple[bool, int]] = Counter()  # (port?, address) of ioeventfds and coalesced writes
        self._closed = False

    def set_slot(self, slot: int, gpa: int, size: int, hva: int, flags: int) -> None:
        """Follow a memory slot of the VM: returns when the software CPU uses what was there before no more."""
        with self._lock:
            if size:
                self._slots[slot] = (gpa, size, hva, flags)
            elif self._slots.pop(slot, None) is None:
                return
            self._logged = any(at[3] & KVM_MEM_LOG_DIRTY_PAGES for at in self._slots.values())
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

    def exits(self, vcpu: Vcpu) -> dict[str, int]:
        """How many exits of each kind `vcpu` had, those of its software vCPU among them."""
        counts = Counter(vcpu.exit_counts)
        partner = self._partners.get(vcpu.id)
        if partner is not None:
            counts.update(partner.cpu.exit_counts)
        return dict(counts)

    # When it leads

    @property
    def steps(self) -> Counter[str]:
        """What the kernel's vCPUs were entered for: the exits of the software CPU they served, polls, sleeps in HLT."""
        with self._lock:
            return sum((leader.steps for leader in self._leaders.values()), Counter())

    def supported_cpuid(self) -> list[CpuidEntry2]:
        """What the guest's processor can do: the engine's list, or where the software CPU leads, its list."""
        if self._theirs is None:
            return self._vm.kvm.get_supported_cpuid()
        from kvmpy import tcg

        with contextlib.closing(_kvm.Kvm(tcg.engine())) as software:
            return emulated.cpuid(software.get_supported_cpuid(), self._theirs)

    def lead(self, vcpu: Vcpu, handlers: Handlers, memory: GuestMemory) -> Lead:
        """Who runs `vcpu`, instead of itself."""
        partner = self._partner(vcpu)
        with self._lock:
            leader = self._leaders.get(vcpu.id)
            if leader is not None:
                return leader
            if self._lot is None:
                sizes = next((e.eax for e in vcpu.cpuid if e.function == 0x8000_0008), 36)
                self._lot = ParkingLot(self._vm, self._vm.check_extension("NR_MEMSLOTS") - 2, sizes & 0xFF)
            vcpu.leader = partner.cpu
            leader = self._leaders[vcpu.id] = Lead(
                vcpu,
                partner,
                self._lot,
                stretch=self.stretch,
                in_kernel=self._in_kernel(handlers, partner),
                zap=self._zap,
                wrote=lambda: self._mark_dirty(memory),
            )
            return leader

    def zone(self, address: int, size: int, *, pio: bool, there: bool) -> None:
        """An ioeventfd or a zone of coalesced writes comes or goes: it is served in the kernel."""
        with self._lock:
            for at in range(address, address + max(size, 1)):
                self._zones[pio, at] += 1 if there else -1

    def wrote(self, gpa: int, size: int) -> None:
        """The host wrote guest memory: as Vm.wrote(), for the software CPU."""
        software = self._software
        if software is not None:
            software.wrote(gpa, size)

    def _in_kernel(self, handlers: Handlers, partner: Partner) -> Callable[[x.Exit], bool]:
        ports = {x.IoIn: handlers.io_in, x.IoOut: handlers.io_out}
        places = {x.MmioRead: handlers.mmio_read, x.MmioWrite: handlers.mmio_write}
        zones, cpu = self._zones, partner.cpu

        def in_kernel(exit: Any) -> bool:
            kind = type(exit)
            if kind in ports:
                return exit.port in CHIP_PORTS or exit.port in ports[kind] or zones[True, exit.port] > 0
            page = exit.addr // PAGE
            if page in (IOAPIC_PAGE, cpu.apic_base // PAGE):
                return True
            return places[kind].find(exit.addr) is not None or zones[False, exit.addr] > 0

        return in_kernel

    def close(self) -> None:
        """Free the software VM; nothing of the guest runs any more. Idempotent."""
        with self._lock:
            self._closed = True
            self._partners.clear()
            if self._software is not None:
                self._software.close()
                self._software.kvm.close()
                self._software = None
            self._leaders.clear()
            if self._zap_ram is not None:
                self._zap_ram.close()
                self._zap_ram = None
            if self._lot is not None:
                self._lot.close()
                self._lot = None

    def _count(self, instruction: bytes, bits: int) -> None:
        name = _mnemonic(instruction, bits)
        with self._lock:
            self.counts[name] += 1

    def _partner(self, vcpu: Vcpu) -> Partner:
        partner = self._partners.get(vcpu.id)
        if partner is not None:
            return partner
        with self._lock:
            if self._closed:
                raise BackendError("the VM is closed")
            if self._software is None:
                self._software = self._make()
            partner = self._partners[vcpu.id] = Partner(self._software, vcpu, leads=self.leads)
        return partner

    def _make(self) -> _kvm.Vm:
        from kvmpy import tcg

        kvm = _kvm.Kvm(tcg.engine())
        try:
            software = _kvm.Vm(kvm)
            # Whatever MSR an instruction names is KVM's: the instruction is left to it. When the software CPU leads,
            # what belongs to the processor is its own.
            reasons = KVM_MSR_EXIT_REASON_FILTER | KVM_MSR_EXIT_REASON_INVAL | KVM_MSR_EXIT_REASON_UNKNOWN
            software.enable_cap("X86_USER_SPACE_MSR", reasons)
            own = PROCESSOR_MSRS if self.leads else ((0, 0),)
            both = KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE
            software.set_msr_filter([(both, base, bytes([bits])) for base, bits in own], default_deny=True)
            for slot, (gpa, size, hva, flags) in self._slots.items():
                software.set_user_memory_region(slot, gpa, size, hva, flags)
        except BaseException:
            kvm.close()
            raise
        self._zap_ram = Ram.anonymous(PAGE)
        return software

    def _mark_dirty(self, memory: GuestMemory) -> None:
        """Pages the software CPU wrote go into the VM's dirty log as pages the host wrote."""
        if not self._logged:
            return
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


def _raise_ud(vcpu: Vcpu) -> None:
    events = vcpu.vcpu_events
    events.flags &= KVM_VCPUEVENT_VALID_SHADOW
    events.exception.injected, events.exception.nr, events.exception.has_error_code = 1, _UD, 0
    vcpu.vcpu_events = events


@lru_cache(maxsize=4096)
def _mnemonic(code: bytes, bits: int) -> str:
    """The instruction by name, prefixes left out: "cmpxchg16b"."""
    from kvmpy.disasm import LACKING, disassemble

    line = next(iter(disassemble(code, 0, bits, count=1)), "")
    if not code or LACKING in line:
        return code[:4].hex() or "unknown"
    words = line.split("  ", 2)[-1].split()
    return next((word for word in words if word not in ("lock", "rep", "repe", "repne")), "unknown")
