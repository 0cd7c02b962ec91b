# SPDX-License-Identifier: Apache-2.0
"""Flat images: bytes that are put at an address and started in a given processor mode."""

from __future__ import annotations

from kvmpy.arch import entry as entries
from kvmpy.arch import layout
from kvmpy.arch.entry import GDT_SIZE, Entry, Registers, flat_gdt
from kvmpy.arch.x86 import identity_page_tables
from kvmpy.boot.image import Image
from kvmpy.boot.space import Space
from kvmpy.errors import BootError

LOW_END = 0x10_0000
MAPPED = 4 << 30
PAGE_TABLES_SIZE = 6 * 0x1000


def load_flat(image: Image, space: Space, *, load_address: int, entry: int | None, mode: str) -> Entry:
    """Put a flat image at `load_address` and start it at `entry` (default: its first byte) in `mode`.

    mode: "real" (the entry must be below 1 MiB; CS is the paragraph of the load address where that is
    needed), "protected" (32-bit, flat segments, paging off) or "long" (64-bit, 4 GiB mapped one to one).
    The stack pointer is `layout.BOOT_STACK` where there is RAM, else 0. Raises BootError.
    """
    if load_address < 0:
        raise BootError(f"{image}: load address {load_address:#x} is negative")
    start = load_address if entry is None else entry
    space.claim(load_address, len(image.data), str(image))
    if not load_address <= start < load_address + len(image.data):
        end = load_address + len(image.data)
        raise BootError(f"{image}: entry {start:#_x} is outside the image at [{load_address:#_x}, {end:#_x})")
    space.write(load_address, image.data)
    if mode == "real":
        return _real(image, space, load_address, start)
    if mode == "protected":
        return enter_protected(space, start, stack(space))
    if mode == "long":
        return enter_long(space, start, stack(space))
    raise ValueError(f'mode must be "real", "protected" or "long", not {mode!r}')


def _real(image: Image, space: Space, load_address: int, start: int) -> Entry:
    if start >= LOW_END:
        raise BootError(
            f"{image}: entry {start:#_x} is out of reach of real mode, which ends at {LOW_END:#_x}"
        )
    # Below 64 KiB segment 0 reaches everything, as for a boot sector at 0:7C00.
    segment = 0 if start < 0x1_0000 else load_address >> 4
    if start - (segment << 4) > 0xFFFF:
        raise BootError(
            f"{image}: entry {start:#_x} is more than 64 KiB above the load address {load_address:#_x}"
        )
    registers = stack(space) if segment == 0 else {}
    return entries.real(start - (segment << 4), cs=segment, ds=segment, registers=registers)


def stack(space: Space) -> Registers:
    """RSP for an image that sets up no stack of its own: `layout.BOOT_STACK` when that is free RAM."""
    return {"rsp": layout.BOOT_STACK} if space.is_free(layout.BOOT_STACK - 0x100, 0x100) else {}


def enter_protected(
    space: Space, rip: int, registers: Registers, *, code: int = 0x08, data: int = 0x10
) -> Entry:
    """An entry in flat 32-bit protected mode; puts a GDT into guest memory."""
    gdt = space.near(layout.GDT, GDT_SIZE, "the GDT", limit=1 << 32)
    space.write(gdt, flat_gdt(long_mode=False, code=code, data=data))
    return entries.protected(rip, gdt=gdt, code=code, data=data, registers=registers)


def enter_long(space: Space, rip: int, registers: Registers, *, code: int = 0x08, data: int = 0x10) -> Entry:
    """An entry in flat 64-bit mode; puts a GDT and identity page tables of 4 GiB into guest memory."""
    if rip >= MAPPED:
        raise BootError(f"entry {rip:#_x} is not mapped: page tables reach to {MAPPED:#_x}")
    gdt = space.near(layout.GDT, GDT_SIZE, "the GDT", limit=1 << 32)
    space.write(gdt, flat_gdt(long_mode=True, code=code, data=data))
    tables = space.near(layout.PAGE_TABLES, PAGE_TABLES_SIZE, "the page tables", limit=1 << 32)
    space.write(tables, identity_page_tables(tables))
    return entries.long(rip, gdt=gdt, cr3=tables, code=code, data=data, registers=registers)
