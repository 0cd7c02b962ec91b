# SPDX-License-Identifier: Apache-2.0
"""Interrupts of the kernel's chips for a guest that the software CPU runs: the kernel's vCPU stands in for it.

Nothing in KVM's interface says which interrupt a local APIC would deliver now: it is found when the vCPU enters the
guest. So the vCPU is parked in an address space of its own, a few pages high above the guest's memory: a loop, an IDT
whose 256 gates lead to 256 places, a stack. One single step there, and RIP says whether an interrupt was delivered and
which; a HLT is the same with KVM_SET_MP_STATE before it. The local APIC sees an interrupt that was accepted as ever.

The guest can reach these pages only by an instruction that KVM runs for it, and can spoil nothing but its own
interrupts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmpy import _kvm
from kvmpy._constants import KVM_VCPUEVENT_VALID_SHADOW
from kvmpy._structs import Regs, SyncRegs
from kvmpy.arch import x86
from kvmpy.memory import Ram

if TYPE_CHECKING:
    from kvmpy._structs import Sregs

PAGE = 4096
CODE, DATA = 8, 16  # selectors
SPACE = 0x1_0000  # of guest physical addresses, the last ones: page tables, IDT, gates' places, GDT with code, stack
TABLES, IDT, PLACES, GDT, STACK, PAGES = 0, 4, 5, 6, 7, 8
PLACE = 16  # bytes
LOOP = 0x100  # of the page with the GDT
PRESENT_WRITABLE = 3
INTERRUPT_GATE = 0x8E00


class ParkingLot:
    """The pages, in a memory slot of the VM."""

    def __init__(self, vm: _kvm.Vm, slot: int, physical_bits: int) -> None:
        self.base = base = (1 << min(physical_bits, 46)) - SPACE
        self.code = base + GDT * PAGE + LOOP
        self._places = base + PLACES * PAGE
        self._ram = Ram.anonymous(PAGES * PAGE)
        try:
            self._ram.write(0, self._pages())
            _kvm.Vm.set_user_memory_region(vm, slot, base, PAGES * PAGE, self._ram.address)
        except BaseException:
            self._ram.close()
            raise

    def _pages(self) -> bytes:
        pages = bytearray(PAGES * PAGE)

        def put(page: int, index: int, value: int) -> None:
            at = page * PAGE + index * 8
            pages[at : at + 8] = value.to_bytes(8, "little")

        for level in range(3):
            put(level, self.base >> 39 - 9 * level & 511, self.base + (level + 1) * PAGE | PRESENT_WRITABLE)
        for page in range(PAGES):
            put(3, (self.base >> 12 & 511) + page, self.base + page * PAGE | PRESENT_WRITABLE)
        for vector in range(256):
            at = self._places + vector * PLACE
            put(IDT, 2 * vector, at & 0xFFFF | CODE << 16 | INTERRUPT_GATE << 32 | (at >> 16 & 0xFFFF) << 48)
            put(IDT, 2 * vector + 1, at >> 32)
        pages[PLACES * PAGE : (PLACES + 1) * PAGE] = b"\x90" * PAGE
        descriptors = bytes(8) + x86.pack_descriptor(x86.CODE64) + x86.pack_descriptor(x86.DATA32)
        pages[GDT * PAGE : GDT * PAGE + len(descriptors)] = descriptors
        pages[GDT * PAGE + LOOP : GDT * PAGE + LOOP + 2] = b"\xeb\xfe"  # jmp to itself
        return bytes(pages)

    def registers(self, sregs: Sregs) -> SyncRegs:
        """What a vCPU is parked with; `sregs` are its own, of which the APIC base and the task priority stay."""
        for name, fields in (("cs", x86.CODE64._replace(selector=CODE)), ("ss", x86.DATA32._replace(selector=DATA))):
            segment = getattr(sregs, name)
            for field, value in fields._asdict().items():
                setattr(segment, field, value)
            segment.unusable = 0
        sregs.cr0 = x86.CR0_PE | x86.CR0_ET | x86.CR0_PG | x86.CR0_NE
        sregs.cr3 = self.base
        sregs.cr4 = x86.CR4_PAE
        sregs.efer = x86.EFER_LME | x86.EFER_LMA
        sregs.idt.base, sregs.idt.limit = self.base + IDT * PAGE, PAGE - 1
        sregs.gdt.base, sregs.gdt.limit = self.base + GDT * PAGE, 3 * 8 - 1
        sregs.interrupt_bitmap = [0] * 4
        parked = SyncRegs(regs=Regs(rip=self.code, rsp=self.base + (STACK + 1) * PAGE), sregs=sregs)
        parked.events.flags = KVM_VCPUEVENT_VALID_SHADOW
        return parked

    def vector(self, seen: Any) -> int | None:
        """Which interrupt a parked vCPU was given, from its registers."""
        place: int = seen.regs.rip - self._places
        if 0 <= place < PAGE:
            return place // PLACE
        if seen.events.interrupt.injected:  # accepted, and a signal came before it was delivered
            return int(seen.events.interrupt.nr)
        return None

    def close(self) -> None:
        """Free the pages; the VM is closed or going to be."""
        self._ram.close()

