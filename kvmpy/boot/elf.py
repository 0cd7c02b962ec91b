# SPDX-License-Identifier: Apache-2.0
"""ELF programs, 32 and 64 bit (System V gABI, chapters 4 and 5): segments by physical address, and notes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvmpy.boot.image import Image, describe
from kvmpy.boot.space import Space
from kvmpy.boot.structs import Layout
from kvmpy.errors import BootError

MAGIC = b"\x7fELF"
CLASS32, CLASS64 = 1, 2
EM_386, EM_X86_64 = 3, 62
ET_EXEC, ET_DYN = 2, 3
PT_LOAD, PT_INTERP, PT_NOTE = 1, 3, 4
PF_X = 1

# A hostile file may name the same bytes many times: what one file can make us do is bounded.
MAX_PROGRAM_HEADERS = 256
MAX_NOTE_BYTES = 1 << 20

EHDR32 = Layout(
    "Elf32_Ehdr",
    "u8 e_ident[16]; u16 e_type; u16 e_machine; u32 e_version; u32 e_entry; u32 e_phoff; u32 e_shoff;"
    "u32 e_flags; u16 e_ehsize; u16 e_phentsize; u16 e_phnum; u16 e_shentsize; u16 e_shnum; u16 e_shstrndx",
)
EHDR64 = Layout(
    "Elf64_Ehdr",
    "u8 e_ident[16]; u16 e_type; u16 e_machine; u32 e_version; u64 e_entry; u64 e_phoff; u64 e_shoff;"
    "u32 e_flags; u16 e_ehsize; u16 e_phentsize; u16 e_phnum; u16 e_shentsize; u16 e_shnum; u16 e_shstrndx",
)
PHDR32 = Layout(
    "Elf32_Phdr",
    "u32 p_type; u32 p_offset; u32 p_vaddr; u32 p_paddr; u32 p_filesz; u32 p_memsz; u32 p_flags; u32 p_align",
)
PHDR64 = Layout(
    "Elf64_Phdr",
    "u32 p_type; u32 p_flags; u64 p_offset; u64 p_vaddr; u64 p_paddr; u64 p_filesz; u64 p_memsz; u64 p_align",
)
NHDR = Layout("Elf_Nhdr", "u32 n_namesz; u32 n_descsz; u32 n_type")


@dataclass(frozen=True, slots=True)
class Segment:
    """A PT_LOAD: `filesz` bytes at file offset `offset` go to `paddr`; up to `memsz` follow as zeros."""

    offset: int
    vaddr: int
    paddr: int
    filesz: int
    memsz: int
    executable: bool


@dataclass(frozen=True, slots=True)
class Elf:
    """A checked ELF program; `bits` is 32 or 64, `entry` is e_entry as it stands in the file."""

    image: Image
    bits: int
    entry: int
    segments: tuple[Segment, ...]
    notes: tuple[tuple[int, int, int], ...]  # (offset, size, alignment) of each PT_NOTE

    @property
    def start(self) -> int:
        """The lowest physical address."""
        return min(s.paddr for s in self.segments)

    @property
    def end(self) -> int:
        """The address after the highest physical one."""
        return max(s.paddr + s.memsz for s in self.segments)

    @property
    def physical_entry(self) -> int:
        """Where the program starts with paging off or mapped one to one.

        Kernels give e_entry as a virtual or as a physical address: one inside an executable segment's virtual
        range is virtual. Raises BootError when it is in no segment.
        """
        for s in self.segments:
            if s.executable and 0 <= self.entry - s.vaddr < s.memsz:
                return self.entry - s.vaddr + s.paddr
        if self.holds(self.entry):
            return self.entry
        ranges = ", ".join(f"[{s.paddr:#_x}, {s.paddr + s.memsz:#_x})" for s in self.segments)
        raise BootError(
            f"{self.image}: ELF entry {self.entry:#_x} is in no loaded segment; they are {ranges}"
        )

    def holds(self, address: int) -> bool:
        """Whether a loaded segment has the physical address."""
        return any(0 <= address - s.paddr < s.memsz for s in self.segments)


def parse_elf(image: Image) -> Elf:
    """Check the headers of an x86 ELF program. Raises BootError with what is wrong."""
    data = image.data
    if len(data) < 16 or not data.startswith(MAGIC):
        raise BootError(f"{image}: not an ELF file but {describe(data)}")
    if data[4] not in (CLASS32, CLASS64) or data[5] != 1:
        raise BootError(
            f"{image}: {describe(data)} (class {data[4]}, byte order {data[5]}) does not run on x86"
        )
    wide = data[4] == CLASS64
    header = (EHDR64 if wide else EHDR32).unpack(data, 0, str(image))
    phdr = PHDR64 if wide else PHDR32
    if header.e_machine not in (EM_386, EM_X86_64):
        raise BootError(f"{image}: {describe(data)}, not for x86")
    if header.e_type not in (ET_EXEC, ET_DYN):
        raise BootError(f"{image}: {describe(data)}; only programs can be started")
    if not 0 < header.e_phnum <= MAX_PROGRAM_HEADERS:
        raise BootError(
            f"{image}: {header.e_phnum} program headers; 1 to {MAX_PROGRAM_HEADERS} can be loaded"
        )
    if header.e_phentsize != phdr.size:
        raise BootError(f"{image}: program headers of {header.e_phentsize} bytes instead of {phdr.size}")
    segments, notes = [], []
    for index in range(header.e_phnum):
        p = phdr.unpack(data, header.e_phoff + index * phdr.size, str(image))
        if p.p_type == PT_INTERP:
            raise BootError(f"{image}: {describe(data)}, dynamically linked: it needs an operating system")
        if p.p_type == PT_NOTE and p.p_offset + p.p_filesz <= len(data):
            notes.append((p.p_offset, p.p_filesz, 8 if p.p_align == 8 else 4))
        elif p.p_type == PT_LOAD and p.p_memsz:
            what = f"{image}: program header {index}"
            if p.p_filesz > p.p_memsz:
                raise BootError(
                    f"{what}: {p.p_filesz:#x} bytes in the file but only {p.p_memsz:#x} in memory"
                )
            if p.p_offset + p.p_filesz > len(data):
                raise BootError(
                    f"{what}: bytes [{p.p_offset:#x}, {p.p_offset + p.p_filesz:#x}) are outside the file's "
                    f"{len(data):#x}; is it truncated?"
                )
            executable = bool(p.p_flags & PF_X)
            segments.append(Segment(p.p_offset, p.p_vaddr, p.p_paddr, p.p_filesz, p.p_memsz, executable))
    if not segments:
        raise BootError(f"{image}: an ELF program without anything to load (no PT_LOAD)")
    return Elf(image, 64 if wide else 32, header.e_entry, tuple(segments), tuple(notes))


def load_segments(elf: Elf, space: Space) -> None:
    """Claim and queue all PT_LOAD segments, with the rest of each zeroed. Raises BootError."""
    data = memoryview(elf.image.data)
    for s in elf.segments:
        space.claim(s.paddr, s.memsz, f"{elf.image} segment")
        space.write(s.paddr, data[s.offset : s.offset + s.filesz])
        space.zero(s.paddr + s.filesz, s.memsz - s.filesz)


def notes(elf: Elf) -> Iterator[tuple[bytes, int, bytes]]:
    """(name, type, description) of each ELF note (gABI chapter 5); a damaged one ends its segment."""
    budget = MAX_NOTE_BYTES
    data = elf.image.data
    for offset, size, alignment in elf.notes:
        end = offset + min(size, budget)
        budget -= end - offset
        while offset + NHDR.size <= end:
            n = NHDR.unpack(data, offset, str(elf.image))
            name_at = offset + NHDR.size
            desc_at = name_at + _pad(n.n_namesz, alignment)
            if desc_at + n.n_descsz > end:
                break
            name = data[name_at : name_at + n.n_namesz].rstrip(b"\0")
            yield name, n.n_type, data[desc_at : desc_at + n.n_descsz]
            offset = desc_at + _pad(n.n_descsz, alignment)


def _pad(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
