# SPDX-License-Identifier: Apache-2.0
"""x86 registers: control bits by name, segment descriptors, identity page tables. Pure functions on integers.

Bits: SDM volume 3, 2.5 (CR0, CR4), 2.2.1 (EFER); volume 1, 3.4.3 (RFLAGS); AMD APM volume 2, 3.1.7 (EFER).
"""

from __future__ import annotations

import struct
from typing import NamedTuple

# CR0 (SDM volume 3, 2.5).
CR0_PE = 1 << 0   # protected mode
CR0_MP = 1 << 1   # WAIT/FWAIT trap together with TS
CR0_EM = 1 << 2   # no x87: its instructions trap
CR0_TS = 1 << 3   # task switched: the next x87/SSE instruction traps
CR0_ET = 1 << 4   # always one on every processor since the 486
CR0_NE = 1 << 5   # x87 errors are #MF, not IRQ 13
CR0_WP = 1 << 16  # ring 0 obeys read-only pages
CR0_AM = 1 << 18  # alignment checks possible
CR0_NW = 1 << 29
CR0_CD = 1 << 30
CR0_PG = 1 << 31  # paging

# CR4 (SDM volume 3, 2.5).
CR4_VME = 1 << 0
CR4_PVI = 1 << 1
CR4_TSD = 1 << 2
CR4_DE = 1 << 3
CR4_PSE = 1 << 4
CR4_PAE = 1 << 5
CR4_MCE = 1 << 6
CR4_PGE = 1 << 7
CR4_PCE = 1 << 8
CR4_OSFXSR = 1 << 9
CR4_OSXMMEXCPT = 1 << 10
CR4_UMIP = 1 << 11
CR4_LA57 = 1 << 12
CR4_VMXE = 1 << 13
CR4_SMXE = 1 << 14
CR4_FSGSBASE = 1 << 16
CR4_PCIDE = 1 << 17
CR4_OSXSAVE = 1 << 18
CR4_KL = 1 << 19
CR4_SMEP = 1 << 20
CR4_SMAP = 1 << 21
CR4_PKE = 1 << 22
CR4_CET = 1 << 23
CR4_PKS = 1 << 24
CR4_UINTR = 1 << 25
CR4_LASS = 1 << 27
CR4_LAM_SUP = 1 << 28

# EFER (SDM volume 3, 2.2.1; APM volume 2, 3.1.7).
EFER_SCE = 1 << 0   # SYSCALL/SYSRET
EFER_LME = 1 << 8   # long mode wanted
EFER_LMA = 1 << 10  # long mode active
EFER_NXE = 1 << 11  # no-execute pages
EFER_SVME = 1 << 12
EFER_LMSLE = 1 << 13
EFER_FFXSR = 1 << 14
EFER_TCE = 1 << 15

# RFLAGS (SDM volume 1, 3.4.3).
RFLAGS_CF = 1 << 0
RFLAGS_FIXED = 1 << 1  # always reads as one
RFLAGS_PF = 1 << 2
RFLAGS_AF = 1 << 4
RFLAGS_ZF = 1 << 6
RFLAGS_SF = 1 << 7
RFLAGS_TF = 1 << 8
RFLAGS_IF = 1 << 9
RFLAGS_DF = 1 << 10
RFLAGS_OF = 1 << 11
RFLAGS_IOPL = 3 << 12
RFLAGS_NT = 1 << 14
RFLAGS_RF = 1 << 16
RFLAGS_VM = 1 << 17
RFLAGS_AC = 1 << 18
RFLAGS_VIF = 1 << 19
RFLAGS_VIP = 1 << 20
RFLAGS_ID = 1 << 21

# Page table entries (SDM volume 3, 4.5.4).
PTE_PRESENT = 1 << 0
PTE_WRITE = 1 << 1
PTE_USER = 1 << 2
PTE_ACCESSED = 1 << 5
PTE_DIRTY = 1 << 6
PTE_LARGE = 1 << 7
PTE_GLOBAL = 1 << 8
PTE_NX = 1 << 63

PAGE_SIZE = 0x1000
LARGE_PAGE_SIZE = 0x20_0000
ENTRIES_PER_TABLE = 512

# Exception vectors (SDM volume 3, table 6-1).
EXCEPTIONS = {
    0: "#DE", 1: "#DB", 2: "NMI", 3: "#BP", 4: "#OF", 5: "#BR", 6: "#UD", 7: "#NM", 8: "#DF", 10: "#TS",
    11: "#NP", 12: "#SS", 13: "#GP", 14: "#PF", 16: "#MF", 17: "#AC", 18: "#MC", 19: "#XM", 20: "#VE",
    21: "#CP",
}  # fmt: skip


def _bits(prefix: str) -> dict[int, str]:
    """The single-bit constants of this module that start with `prefix`: {mask: name without the prefix}."""
    return {
        value: name.removeprefix(prefix)
        for name, value in globals().items()
        if name.startswith(prefix) and value & (value - 1) == 0
    }


_CR0_BITS = _bits("CR0_")
_CR4_BITS = _bits("CR4_")
_EFER_BITS = _bits("EFER_")
_RFLAGS_BITS = {mask: name for mask, name in _bits("RFLAGS_").items() if mask != RFLAGS_FIXED}


def _names(value: int, bits: dict[int, str]) -> list[str]:
    return [name for mask, name in bits.items() if value & mask]


def cr0_names(value: int) -> list[str]:
    """The names of the bits that are set in a CR0 value, lowest first, e.g. `["PE", "ET", "PG"]`."""
    return _names(value, _CR0_BITS)


def cr4_names(value: int) -> list[str]:
    """The names of the bits that are set in a CR4 value, lowest first."""
    return _names(value, _CR4_BITS)


def efer_names(value: int) -> list[str]:
    """The names of the bits that are set in an EFER value, lowest first."""
    return _names(value, _EFER_BITS)


def rflags_names(value: int) -> list[str]:
    """The names of the flags that are set in an RFLAGS value, lowest first; a nonzero IOPL is `IOPL=n`."""
    names = _names(value, _RFLAGS_BITS)
    iopl = (value & RFLAGS_IOPL) >> 12
    return [*names, f"IOPL={iopl}"] if iopl else names


class SegmentFields(NamedTuple):
    """A segment register with its hidden part, in the words of `struct kvm_segment`; `limit` is in bytes."""

    base: int = 0
    limit: int = 0
    selector: int = 0
    type: int = 0
    present: int = 1
    dpl: int = 0
    db: int = 0
    s: int = 1
    l: int = 0  # noqa: E741 - the manuals' and KVM's name of the bit
    g: int = 0
    avl: int = 0


# Segment types (SDM volume 3, tables 3-1 and 3-2); the accessed bit is set so that loading one never writes.
TYPE_DATA = 3   # read/write
TYPE_CODE = 11  # execute/read
TYPE_LDT = 2
TYPE_BUSY_TSS16 = 3
TYPE_TSS = 9    # available, 32-bit or 64-bit
TYPE_BUSY_TSS = 11

CODE32 = SegmentFields(limit=0xFFFF_FFFF, type=TYPE_CODE, db=1, g=1)
CODE64 = SegmentFields(limit=0xFFFF_FFFF, type=TYPE_CODE, l=1, g=1)
DATA32 = SegmentFields(limit=0xFFFF_FFFF, type=TYPE_DATA, db=1, g=1)
TSS = SegmentFields(limit=0x67, type=TYPE_BUSY_TSS, s=0)


def pack_descriptor(segment: SegmentFields) -> bytes:
    """The eight bytes of the descriptor that describes `segment` (SDM volume 3, 3.4.5).

    With `g` set the limit is stored in 4 KiB units, so its low 12 bits must be ones. Raises ValueError for
    what a descriptor cannot say: a base above 4 GiB, or a limit that does not fit its granularity.
    """
    if not 0 <= segment.base <= 0xFFFF_FFFF:
        raise ValueError(f"a descriptor holds a 32-bit base, not {segment.base:#x}")
    limit = segment.limit
    if segment.g:
        if limit & 0xFFF != 0xFFF:
            raise ValueError(f"limit {limit:#x} is not a whole number of 4 KiB units")
        limit >>= 12
    if not 0 <= limit <= 0xF_FFFF:
        raise ValueError(f"a descriptor holds a 20-bit limit, not {limit:#x}")
    access = segment.type | segment.s << 4 | segment.dpl << 5 | segment.present << 7
    flags = segment.avl | segment.l << 1 | segment.db << 2 | segment.g << 3
    return struct.pack(
        "<HHBBBB",
        limit & 0xFFFF,
        segment.base & 0xFFFF,
        segment.base >> 16 & 0xFF,
        access,
        limit >> 16 | flags << 4,
        segment.base >> 24,
    )


def unpack_descriptor(raw: bytes, selector: int = 0) -> SegmentFields:
    """What a segment register holds after loading descriptor `raw` with `selector` (SDM volume 3, 3.4.5)."""
    low, base_low, base_mid, access, high, base_high = struct.unpack("<HHBBBB", raw)
    limit = low | (high & 0xF) << 16
    if high & 0x80:
        limit = limit << 12 | 0xFFF
    return SegmentFields(
        base=base_low | base_mid << 16 | base_high << 24,
        limit=limit,
        selector=selector,
        type=access & 0xF,
        s=access >> 4 & 1,
        dpl=access >> 5 & 3,
        present=access >> 7,
        avl=high >> 4 & 1,
        l=high >> 5 & 1,
        db=high >> 6 & 1,
        g=high >> 7,
    )


def identity_page_tables(base: int, size: int = 4 << 30) -> bytes:
    """4-level page tables, to be put at guest address `base`, that map [0, size) one to one.

    `base` must be page aligned; `size` is in bytes, a whole number of 2 MiB pages, at most 512 GiB. Pages are
    writable, executable and open to ring 3. Returns the PML4, the PDPT, then a page directory per GiB:
    `2 + size / 1 GiB` pages, six for the usual 4 GiB. CR3 is `base`. (SDM volume 3, 4.5.)
    """
    if base % PAGE_SIZE:
        raise ValueError(f"page tables must start on a page boundary, not at {base:#x}")
    if not 0 < size <= 512 << 30 or size % LARGE_PAGE_SIZE:
        raise ValueError(f"can map up to 512 GiB in units of 2 MiB, not {size:#x} bytes")
    large_pages = size // LARGE_PAGE_SIZE
    directories = -(-large_pages // ENTRIES_PER_TABLE)
    table = PTE_PRESENT | PTE_WRITE | PTE_USER
    page = table | PTE_LARGE
    pml4 = [base + PAGE_SIZE | table]
    pdpt = [base + (2 + i) * PAGE_SIZE | table for i in range(directories)]
    pages = [i * LARGE_PAGE_SIZE | page for i in range(large_pages)]
    return b"".join(_table(entries) for entries in (pml4, pdpt, pages))


def _table(entries: list[int]) -> bytes:
    raw = struct.pack(f"<{len(entries)}Q", *entries)
    return raw.ljust(-(-len(raw) // PAGE_SIZE) * PAGE_SIZE, b"\0")
