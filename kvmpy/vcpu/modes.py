# SPDX-License-Identifier: Apache-2.0
"""Putting a processor into a mode: from an `Entry` (kvmpy/arch/entry.py) to KVM's special registers."""

from __future__ import annotations

from dataclasses import replace

from kvmpy._structs import Regs, Segment, Sregs
from kvmpy.arch import entry as entries
from kvmpy.arch.entry import Entry
from kvmpy.arch.x86 import SegmentFields


def special_registers(sregs: Sregs, entry: Entry) -> Sregs:
    """Set `sregs` as `entry` says; what it does not name (APIC base, CR8) stays. Returns `sregs`."""
    for name, fields in entry.segments.items():
        _set(getattr(sregs, name), fields)
    sregs.cr0 = entry.cr0
    sregs.cr3 = entry.cr3
    sregs.cr4 = entry.cr4
    sregs.efer = entry.efer
    sregs.gdt.base, sregs.gdt.limit = entry.gdt
    sregs.idt.base, sregs.idt.limit = entry.idt
    return sregs


def general_registers(entry: Entry) -> Regs:
    """The general registers that `entry` starts with."""
    return Regs(rip=entry.rip, rflags=entry.rflags, **entry.registers)


def protected(ip: int, *, sp: int = 0) -> Entry:
    """Flat 32-bit protected mode without a descriptor table in memory: the guest loads its own, if it wants one."""
    return replace(entries.protected(ip, gdt=0, registers={"rsp": sp}), gdt=(0, 0))


def long(ip: int, *, cr3: int, sp: int = 0, ring: int = 0) -> Entry:
    """64-bit mode in ring 0 or 3 without a descriptor table in memory."""
    if ring not in (0, 3):
        raise ValueError(f"ring must be 0 or 3, not {ring}")
    entry = replace(entries.long(ip, gdt=0, cr3=cr3, registers={"rsp": sp}), gdt=(0, 0))
    if ring == 0:
        return entry
    segments = {
        name: fields._replace(dpl=3, selector=fields.selector | 3) if fields.s else fields
        for name, fields in entry.segments.items()
    }
    return replace(entry, segments=segments)


def _set(segment: Segment, fields: SegmentFields) -> None:
    for name, value in fields._asdict().items():
        setattr(segment, name, value)
    segment.unusable = 0
