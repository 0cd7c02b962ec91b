# SPDX-License-Identifier: Apache-2.0
"""The vCPU that users see: KVM's own, with ways to put it into a processor mode."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

from kvmpy import _kvm
from kvmpy._exits import Exit
from kvmpy._structs import CpuidEntry2
from kvmpy.arch import entry as entries
from kvmpy.arch import layout
from kvmpy.arch.entry import Entry
from kvmpy.arch.x86 import identity_page_tables
from kvmpy.memory import GuestMemory
from kvmpy.vcpu import modes

_CPUID: Any = _kvm.Vcpu.cpuid


class Vcpu(_kvm.Vcpu):
    """One virtual processor. `run()` returns its next exit; registers are properties."""

    @property
    def memory(self) -> GuestMemory:
        """The guest memory of the VM."""
        memory: GuestMemory = cast(Any, self.vm).memory  # the VM is a kvmpy.Vm, which this layer does not know
        return memory

    leader: _kvm.Vcpu | None = None  # the software vCPU that runs the guest instead of this one (lead.py)

    @property
    def history(self) -> list[Exit]:
        """The last 16 exits, oldest first, for reports: the software CPU's where it leads. They cannot be answered."""
        return super().history if self.leader is None or self.debug is not None else self.leader.history

    debug: tuple[int, Sequence[int]] | None = None  # what set_guest_debug() was told last, for the assist

    announced: Sequence[CpuidEntry2] | None = None  # the CPUID table as it was set

    @property
    def cpuid(self) -> list[CpuidEntry2]:
        """The CPUID table (KVM_GET_CPUID2, KVM_SET_CPUID2, api.rst 4.20)."""
        table: list[CpuidEntry2] = _CPUID.__get__(self)
        return table

    @cpuid.setter
    def cpuid(self, entries: Iterable[CpuidEntry2]) -> None:
        entries = list(entries)
        _CPUID.__set__(self, entries)
        self.announced = entries

    def set_guest_debug(self, control: int, debugreg: Iterable[int] = ()) -> None:
        """Single-step and breakpoints, as KVM_SET_GUEST_DEBUG (api.rst 4.87)."""
        debugreg = tuple(debugreg)
        super().set_guest_debug(control, debugreg)
        self.debug = (control, debugreg) if control else None

    def enter(self, entry: Entry) -> None:
        """Set the registers to start at `entry` (from a loader, or `kvmpy.arch.entry`)."""
        self.sregs = modes.special_registers(self.sregs, entry)
        self.regs = modes.general_registers(entry)

    def enter_real_mode(self, ip: int, *, cs: int = 0, ds: int = 0, sp: int = 0) -> None:
        """Start in 16-bit real mode at `cs`:`ip` with all data segments at `ds` (paragraphs) and SP = `sp`."""
        self.enter(entries.real(ip, cs=cs, ds=ds, registers={"rsp": sp}))

    def enter_protected_mode(self, ip: int, *, sp: int = 0) -> None:
        """Start in flat 32-bit protected mode, ring 0, paging off, at `ip` with ESP = `sp`."""
        self.enter(modes.protected(ip, sp=sp))

    def enter_long_mode(
        self, ip: int, *, sp: int = 0, page_tables: int = layout.PAGE_TABLES, ring: int = 0
    ) -> None:
        """Start in 64-bit mode at `ip` with RSP = `sp`, in ring 0 or 3.

        Six pages of page tables that map the first 4 GiB one to one (2 MiB pages, open to ring 3 too) are
        written to guest memory at `page_tables`.
        """
        self.memory.write(page_tables, identity_page_tables(page_tables))
        self.enter(modes.long(ip, cr3=page_tables, sp=sp, ring=ring))

    def describe(self) -> str:
        """Registers, code at RIP and the last exits as text, for people; the vCPU must not be running."""
        from kvmpy.vcpu.report import describe

        return describe(self)
