# SPDX-License-Identifier: Apache-2.0
"""How the first vCPU must be set so that a loaded image starts: the result of every loader."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvmpy.arch import x86
from kvmpy.arch.x86 import SegmentFields

_DATA_SEGMENTS = ("ds", "es", "fs", "gs", "ss")
Registers = Mapping[str, int]
MODES = ("real", "protected", "long", "reset")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """The state in which the first vCPU starts an image. All tables it names are in guest memory already.

    `mode` is "real", "protected", "long" or "reset" (as the processor leaves RESET); `registers` are general
    registers that are not zero, by their names in `struct kvm_regs`; `segments` are the eight segment
    registers by their names in `struct kvm_sregs`; `gdt` and `idt` are (base, limit).
    """

    mode: str
    rip: int
    registers: Registers = field(default_factory=dict)
    segments: Mapping[str, SegmentFields] = field(default_factory=dict)
    cr0: int = x86.CR0_ET
    cr3: int = 0
    cr4: int = 0
    efer: int = 0
    rflags: int = x86.RFLAGS_FIXED
    gdt: tuple[int, int] = (0, 0xFFFF)
    idt: tuple[int, int] = (0, 0xFFFF)
    format: str = ""  # what the image was, e.g. "bzImage", "PVH", "multiboot", "ELF", "flat", "firmware"
    detail: str = ""  # for people, e.g. the kernel's own version text


def real(rip: int, *, cs: int = 0, ds: int = 0, registers: Registers | None = None) -> Entry:
    """Real mode at `cs`:`rip`, data segments at `ds` (paragraphs of 16 bytes), the IVT at 0."""
    _range("cs", cs, 0xFFFF)
    _range("ds", ds, 0xFFFF)
    _range("ip", rip, 0xFFFF)
    code = SegmentFields(base=cs << 4, limit=0xFFFF, selector=cs, type=x86.TYPE_CODE)
    data = SegmentFields(base=ds << 4, limit=0xFFFF, selector=ds, type=x86.TYPE_DATA)
    segments = _segments(code, data, x86.TYPE_BUSY_TSS16, 0xFFFF)
    return Entry(mode="real", rip=rip, registers=registers or {}, segments=segments, idt=(0, 0x3FF))


def reset() -> Entry:
    """The state after RESET: the first instruction is at 0xFFFF_FFF0 (SDM volume 3, 10.1.1 and 10.1.4)."""
    code = SegmentFields(base=0xFFFF_0000, limit=0xFFFF, selector=0xF000, type=x86.TYPE_CODE)
    data = SegmentFields(limit=0xFFFF, type=x86.TYPE_DATA)
    segments = _segments(code, data, x86.TYPE_BUSY_TSS, 0xFFFF)
    return Entry(mode="reset", rip=0xFFF0, segments=segments, cr0=x86.CR0_ET | x86.CR0_NW | x86.CR0_CD)


def protected(
    rip: int, *, gdt: int, code: int = 0x08, data: int = 0x10, registers: Registers | None = None
) -> Entry:
    """32-bit protected mode at `rip`, ring 0, paging off, flat segments; `gdt` is where `flat_gdt()` was put.

    `code` and `data` are selectors.
    """
    _range("eip", rip, 0xFFFF_FFFF)
    return Entry(
        mode="protected",
        rip=rip,
        registers=registers or {},
        segments=_flat(x86.CODE32, code, data),
        cr0=x86.CR0_PE | x86.CR0_ET,
        gdt=(gdt, GDT_SIZE - 1),
        idt=(0, 0),
    )


def long(
    rip: int, *, gdt: int, cr3: int, code: int = 0x08, data: int = 0x10, registers: Registers | None = None
) -> Entry:
    """64-bit mode at `rip`, ring 0, flat segments; `cr3`: the page tables, `gdt`: the `flat_gdt()`."""
    _range("rip", rip, 0xFFFF_FFFF_FFFF_FFFF)
    return Entry(
        mode="long",
        rip=rip,
        registers=registers or {},
        segments=_flat(x86.CODE64, code, data),
        cr0=x86.CR0_PE | x86.CR0_ET | x86.CR0_PG,
        cr3=cr3,
        cr4=x86.CR4_PAE,
        efer=x86.EFER_LME | x86.EFER_LMA,
        gdt=(gdt, GDT_SIZE - 1),
        idt=(0, 0),
    )


GDT_SIZE = 4 * 8


def flat_gdt(*, long_mode: bool, code: int = 0x08, data: int = 0x10) -> bytes:
    """Four descriptors with flat ring 0 segments at the selectors `code` and `data` (0x08, 0x10 or 0x18)."""
    slots = {code: x86.CODE64 if long_mode else x86.CODE32, data: x86.DATA32}
    if len(slots) != 2 or not slots.keys() <= {0x08, 0x10, 0x18}:
        raise ValueError(f"selectors must be two of 0x08, 0x10, 0x18, not {code:#x} and {data:#x}")
    return b"".join(x86.pack_descriptor(slots[s]) if s in slots else bytes(8) for s in range(0, GDT_SIZE, 8))


def _flat(code_segment: SegmentFields, code: int, data: int) -> dict[str, SegmentFields]:
    data_segment = x86.DATA32._replace(selector=data)
    return _segments(code_segment._replace(selector=code), data_segment, x86.TYPE_BUSY_TSS, 0x67)


def _segments(code: SegmentFields, data: SegmentFields, tss: int, tss_limit: int) -> dict[str, SegmentFields]:
    # TR must be present and busy or VM entry fails on real processors (SDM volume 3, 27.3.1.2).
    return {
        "cs": code,
        **dict.fromkeys(_DATA_SEGMENTS, data),
        "tr": SegmentFields(limit=tss_limit, type=tss, s=0),
        "ldt": SegmentFields(limit=0xFFFF, type=x86.TYPE_LDT, s=0),
    }


def _range(name: str, value: int, largest: int) -> None:
    if not 0 <= value <= largest:
        raise ValueError(f"{name} must be 0..{largest:#x}, not {value:#x}")
