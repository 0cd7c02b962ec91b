# SPDX-License-Identifier: Apache-2.0
"""Linux at a random virtual address (KASLR), for kernels that are unpacked on the host.

A kernel that unpacks itself moves itself: behind its ELF file, in the same payload, are tables of the numbers that
hold addresses (arch/x86/boot/compressed/misc.c, handle_relocations). Here the host does the same. The physical
address stays the preferred one.

    0, numbers of 64 bits ..., [0, 32-bit numbers from which the distance is subtracted ...,] 0, 32-bit numbers ...

Each entry is the low half of a virtual address in the kernel's image. Kernels since 6.15 have no middle table.
"""

from __future__ import annotations

import array
import random
from dataclasses import dataclass, replace
from typing import cast

from kvmpy.boot.elf import EHDR64, Elf
from kvmpy.boot.image import Image
from kvmpy.boot.linux import BzImage
from kvmpy.errors import BootError

START_KERNEL_MAP = 0xFFFF_FFFF_8000_0000  # the virtual address of physical 0, without an offset
IMAGE_SIZE = 1 << 30  # what the kernel reserves behind it for itself (KERNEL_IMAGE_SIZE)
ENTRY = 4


@dataclass(frozen=True, slots=True)
class Relocations:
    """File offset and number of entries of each table; `inverse` is empty where there is none."""

    wide: tuple[int, int]
    inverse: tuple[int, int]
    narrow: tuple[int, int]


def find_relocations(elf: Elf) -> Relocations | None:
    """The tables behind an ELF file that came out of a bzImage; None when the kernel cannot be moved."""
    data = elf.image.data
    header = EHDR64.unpack(data, 0, str(elf.image))
    start = header.e_shoff + header.e_shentsize * header.e_shnum  # section headers are the last of a vmlinux
    size = len(data) - start
    if not header.e_shoff or size < 2 * ENTRY or size % ENTRY:
        return None
    entries = array.array("I", data[start:])
    if entries.itemsize != ENTRY or entries[0] != 0:
        return None
    bounds = [0]
    while len(bounds) <= 3:
        try:
            bounds.append(entries.index(0, bounds[-1] + 1))
        except ValueError:
            break
    if len(bounds) not in (2, 3):
        return None
    tables = [
        (start + ENTRY * (first + 1), last - first - 1)
        for first, last in zip(bounds, [*bounds[1:], len(entries)], strict=True)
    ]
    return Relocations(tables[0], tables[1] if len(tables) == 3 else (0, 0), tables[-1])


def slots(elf: Elf, kernel: BzImage) -> int:
    """How many places there are to choose from; 1 when the kernel cannot or must not be moved."""
    alignment: int = kernel.header.kernel_alignment
    if not kernel.header.relocatable_kernel or alignment < 1 << 12:
        return 1
    size: int = max(elf.end - elf.start, kernel.header.init_size)
    return max(1 + (IMAGE_SIZE - elf.start - size) // alignment, 1)


def wanted(cmdline: str | bytes | None) -> bool:
    """Whether the command line lets the kernel be moved: it does unless it says `nokaslr`."""
    line = cmdline if isinstance(cmdline, bytes) else (cmdline or "").encode()
    return b"nokaslr" not in line.split()


def randomize(elf: Elf, kernel: BzImage, seed: int | None = None) -> tuple[Elf, int]:
    """Move a kernel to a random virtual address. Returns it and the distance in bytes, 0 when it stayed.

    The same `seed` chooses the same address; without one nobody can tell.
    Raises BootError for tables that lead outside the kernel.
    """
    tables = find_relocations(elf)
    below = (random.SystemRandom() if seed is None else random.Random(seed)).randrange
    distance = below(slots(elf, kernel)) * kernel.header.kernel_alignment if tables else 0
    return (move(elf, tables, distance), distance) if tables and distance else (elf, 0)


def move(elf: Elf, tables: Relocations, distance: int) -> Elf:
    """The kernel for a virtual address `distance` bytes higher; the old one must not be used on. Raises BootError."""
    from kvmpy.boot._relocate import relocate

    held: object = elf.image.data
    data = held if isinstance(held, bytearray) else bytearray(elf.image.data)
    segments = [(s.paddr, s.filesz, s.offset) for s in elf.segments]
    mask = (1 << 64) - 1
    try:
        for (at, count), width, delta in (
            (tables.narrow, 4, distance),
            (tables.inverse, 4, -distance & mask),
            (tables.wide, 8, distance),
        ):
            relocate(data, segments, at, count, START_KERNEL_MAP, width, delta)
    except ValueError as error:
        raise BootError(f"{elf.image}: {error}") from error
    return replace(elf, image=Image(elf.image.name, cast(bytes, data)))
