# SPDX-License-Identifier: Apache-2.0
"""PVH: an ELF kernel with a 32-bit entry named in a Xen note, and its start info.

Source: Xen's docs/misc/pvh.pandoc and public/arch-x86/hvm/start_info.h; note 18 in public/elfnote.h.
"""

from __future__ import annotations

from kvmpy.arch import layout
from kvmpy.arch.entry import Entry
from kvmpy.boot.e820 import E820Entry
from kvmpy.boot.elf import Elf, load_segments, notes
from kvmpy.boot.flat import enter_protected
from kvmpy.boot.image import Image
from kvmpy.boot.lowmem import encode_cmdline, put_cmdline, write_bios_data
from kvmpy.boot.space import Space
from kvmpy.boot.structs import Layout
from kvmpy.errors import BootError

XEN_ELFNOTE_PHYS32_ENTRY = 18
START_MAGIC = 0x336E_C578  # "xEn3" with bit 7 of the E set
VERSION = 1  # of the start info: the one with a memory map

START_INFO = Layout(
    "hvm_start_info",
    "u32 magic; u32 version; u32 flags; u32 nr_modules; u64 modlist_paddr; u64 cmdline_paddr; u64 rsdp_paddr;"
    "u64 memmap_paddr; u32 memmap_entries; u32 reserved",
)
MODLIST_ENTRY = Layout("hvm_modlist_entry", "u64 paddr; u64 size; u64 cmdline_paddr; u64 reserved")
MEMMAP_ENTRY = Layout("hvm_memmap_table_entry", "u64 addr; u64 size; u32 type; u32 reserved")

LIMIT = 1 << 32  # the guest starts in 32-bit mode


def pvh_entry(elf: Elf) -> int | None:
    """The physical entry that the PVH note names, or None when there is no such note."""
    for name, kind, description in notes(elf):
        if name == b"Xen" and kind == XEN_ELFNOTE_PHYS32_ENTRY and len(description) in (4, 8):
            return int.from_bytes(description, "little")
    return None


def load_pvh(
    elf: Elf,
    space: Space,
    *,
    memory_map: list[E820Entry],
    cmdline: str | bytes | None = None,
    modules: list[tuple[Image, str]] | None = None,
    rsdp: int = 0,
) -> Entry:
    """Load a kernel with a PVH note; EBX points to `struct hvm_start_info`.

    The first of `modules` is what Linux takes for its initrd. `rsdp` is the address of the ACPI root
    pointer, or 0. Raises BootError.
    """
    image = elf.image
    rip = pvh_entry(elf)
    if rip is None:
        raise BootError(f"{image}: no PVH entry (no Xen note of type {XEN_ELFNOTE_PHYS32_ENTRY})")
    if rip >= LIMIT or not elf.holds(rip):
        raise BootError(f"{image}: PVH entry {rip:#_x} is not in a segment below 4 GiB")
    load_segments(elf, space)
    # Rooms of the fixed address map first, then the parts that may go anywhere.
    modules = modules or []
    strings = [text.encode() + b"\0" for _, text in modules]
    size = START_INFO.size + len(modules) * MODLIST_ENTRY.size + len(memory_map) * MEMMAP_ENTRY.size
    info = space.near(layout.PVH_START_INFO, size + sum(map(len, strings)), "the PVH start info", limit=LIMIT)
    entry = enter_protected(space, rip, {"rbx": info})
    write_bios_data(space)
    line = put_cmdline(space, encode_cmdline(cmdline))

    modlist = info + START_INFO.size
    memmap = modlist + len(modules) * MODLIST_ENTRY.size
    text_at = info + size
    entries = b""
    for (module, _), text in zip(modules, strings, strict=True):
        at = space.highest(len(module.data), str(module), limit=min(LIMIT, layout.LOW_RAM_END))
        space.write(at, module.data)
        entries += MODLIST_ENTRY.pack(paddr=at, size=len(module.data), cmdline_paddr=text_at)
        text_at += len(text)
    table = b"".join(MEMMAP_ENTRY.pack(addr=e.start, size=e.size, type=e.type) for e in memory_map)
    head = START_INFO.pack(
        magic=START_MAGIC,
        version=VERSION,
        nr_modules=len(modules),
        modlist_paddr=modlist if modules else 0,
        cmdline_paddr=line,
        rsdp_paddr=rsdp,
        memmap_paddr=memmap,
        memmap_entries=len(memory_map),
    )
    space.write(info, head + entries + table + b"".join(strings))
    return entry
