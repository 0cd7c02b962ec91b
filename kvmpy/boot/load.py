# SPDX-License-Identifier: Apache-2.0
"""load(): any image into guest memory, by what it is."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from dataclasses import dataclass

from kvmpy.arch import layout
from kvmpy.arch.entry import Entry
from kvmpy.boot import elf as elf_format
from kvmpy.boot import kaslr, linux, multiboot, pvh
from kvmpy.boot.e820 import E820Entry, memory_map
from kvmpy.boot.elf import Elf, load_segments, parse_elf
from kvmpy.boot.firmware import load_firmware
from kvmpy.boot.flat import enter_long, enter_protected, load_flat, stack
from kvmpy.boot.image import Image, Module, Source, compression, describe, read_image, read_modules
from kvmpy.boot.space import Space
from kvmpy.errors import BootError
from kvmpy.memory import GuestMemory

log = logging.getLogger("kvmpy.boot")

FORMATS = ("auto", "bzImage", "vmlinux", "PVH", "multiboot", "ELF", "flat", "firmware")


def load(
    image: Source,
    memory: GuestMemory,
    *,
    cmdline: str | bytes | None = None,
    initrd: Source | None = None,
    modules: Iterable[Module] = (),
    load_address: int | None = None,
    entry: int | None = None,
    mode: str | None = None,
    format: str = "auto",
    decompress: bool | None = False,
    rsdp: int = 0,
    reserved: Iterable[tuple[int, int]] = (),
    seed: int | None = None,
) -> Entry:
    """Put an image into guest memory and say how the first vCPU must start.

    image: a path, bytes or a binary file. cmdline: for kernels that take one. initrd: Linux' initial RAM
    disk; for multiboot and PVH it is the first module. modules: images, or (image, command line) pairs.
    load_address, entry, mode: for a flat image, guest addresses and "real", "protected" or "long" (default:
    real below 1 MiB, else protected). format: one of `FORMATS`; "auto" looks at the content, takes what has
    an address for a flat image, and never takes anything for firmware. decompress: unpack the vmlinux
    inside a bzImage and start that, and accept images packed with gzip, xz, bzip2, lzma, lz4 or zstd; None: start
    the vmlinux where that can be done, else leave it to the kernel.
    rsdp: where the ACPI tables begin, 0 to let the kernel look for them. reserved: further (address, size)
    ranges, in bytes, that the memory map declares taken. seed: where an unpacked kernel goes is chosen by it
    (deterministic machines), else at random.

    Nothing is written unless everything fits. Raises BootError with the numbers, and ValueError for arguments
    that do not go together.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, not {format!r}")
    source = read_image(image)
    if decompress:
        source = _unpacked(source)
    if format == "auto":
        format = detect(source, load_address)
    if format != "flat" and any(x is not None for x in (load_address, entry, mode)):
        raise ValueError(f"load_address, entry and mode are for flat images; {source} is {format}")
    space = Space(memory)
    if layout.ACPI_TABLES <= rsdp < layout.BIOS_AREA_END:
        space.claim(layout.ACPI_TABLES, layout.BIOS_AREA_END - layout.ACPI_TABLES, "the ACPI tables")
    limit = sum(size for _, size in space.ranges)
    job = _Job(
        image=source,
        space=space,
        map=memory_map(memory, reserved),
        cmdline=cmdline,
        initrd=None if initrd is None else read_image(initrd, "initrd", limit),
        modules=read_modules(modules, limit),
        rsdp=rsdp,
        decompress=decompress,
        seed=seed,
    )
    if format == "flat":
        result = job.flat(load_address, entry, mode)
    else:
        result = job.run(format)
    space.commit()
    log.info("%s: %s, entry %#x in %s mode %s", source, format, result.rip, result.mode, result.detail)
    return dataclasses.replace(result, format=format)


def detect(image: Image, load_address: int | None = None) -> str:
    """The format of an image by its content, one of `FORMATS`. Raises BootError when it is none."""
    data = image.data
    if load_address is not None:
        return "flat"
    if linux.is_bzimage(data):
        return "bzImage"
    if data.startswith(elf_format.MAGIC):
        elf = parse_elf(image)
        has_multiboot = multiboot.find_header(data) is not None
        # A kernel with both doors (Xen): as GRUB would start it.
        if pvh.pvh_entry(elf) is not None and not (has_multiboot and elf.bits == 32):
            return "PVH"
        if has_multiboot:
            return "multiboot"
        return "vmlinux" if elf.bits == 64 and linux_version(data) else "ELF"
    if multiboot.find_header(data) is not None:
        return "multiboot"
    hint = "; decompress=True unpacks it" if compression(data) else ""
    raise BootError(
        f"{image}: not a kernel (no bzImage, ELF or multiboot header) but {describe(data)}{hint}; "
        "a flat image needs a load address, firmware needs format='firmware'"
    )


def _unpacked(image: Image) -> Image:
    from kvmpy.boot.decompress import unpack  # the decompressors are slow to import, and few need them

    return unpack(image) if compression(image.data) else image


def linux_version(data: bytes) -> str:
    """The banner "Linux version ..." of an uncompressed kernel, or ""."""
    at = data.find(b"Linux version ")
    # Format strings have the same start: the banner of a kernel goes on with its number.
    while at >= 0 and not data[at + 14 : at + 15].isdigit():
        at = data.find(b"Linux version ", at + 1)
    if at < 0:
        return ""
    return data[at + 14 : at + 270].split(b"\n")[0].split(b"\0")[0].decode("ascii", "replace")


@dataclass(frozen=True, slots=True)
class _Job:
    """One call of load(): what every loader takes its own part of."""

    image: Image
    space: Space
    map: list[E820Entry]
    cmdline: str | bytes | None
    initrd: Image | None
    modules: list[tuple[Image, str]]
    rsdp: int
    decompress: bool | None
    seed: int | None

    def run(self, format: str) -> Entry:
        match format:
            case "bzImage":
                return self.bzimage()
            case "vmlinux":
                return self.vmlinux(parse_elf(self.image), None)
            case "PVH":
                return pvh.load_pvh(
                    parse_elf(self.image),
                    self.space,
                    memory_map=self.map,
                    cmdline=self.cmdline,
                    modules=self.all_modules(),
                    rsdp=self.rsdp,
                )
            case "multiboot":
                return multiboot.load_multiboot(
                    self.image,
                    self.space,
                    memory_map=self.map,
                    cmdline=self.cmdline,
                    modules=self.all_modules(),
                )
            case "ELF":
                self.takes_no_arguments("a plain ELF program")
                return self.elf(parse_elf(self.image))
            case _:
                self.takes_no_arguments("firmware")
                return load_firmware(self.image, self.space)

    def flat(self, load_address: int | None, entry: int | None, mode: str | None) -> Entry:
        if load_address is None:
            raise ValueError(f"{self.image}: a flat image needs a load address")
        self.takes_no_arguments("a flat image")
        start = load_address if entry is None else entry
        mode = mode or ("real" if start < layout.KERNEL else "protected")
        return load_flat(self.image, self.space, load_address=load_address, entry=entry, mode=mode)

    def bzimage(self) -> Entry:
        kernel = linux.parse_bzimage(self.image)
        if self.decompress or (self.decompress is None and kernel.is_64bit):
            from kvmpy.boot.decompress import unpack_kernel

            try:
                elf = parse_elf(unpack_kernel(kernel))
            except BootError as error:
                if self.decompress:
                    raise
                log.info("%s; the kernel unpacks itself", error)
            else:
                # Only the kernel's own loader can move it in physical memory.
                if self.decompress or self.space.is_free(elf.start, elf.end - elf.start):
                    return self.vmlinux(elf, kernel)
        self.takes_no_modules()
        result = linux.load_bzimage(
            kernel, self.space, memory_map=self.map, cmdline=self.cmdline, initrd=self.initrd, rsdp=self.rsdp
        )
        return dataclasses.replace(result, detail=kernel.version_text)

    def vmlinux(self, elf: Elf, header: linux.BzImage | None) -> Entry:
        self.takes_no_modules()
        distance = 0
        if header is not None and kaslr.wanted(self.cmdline):
            elf, distance = kaslr.randomize(elf, header, self.seed)
        result = linux.load_vmlinux(
            elf,
            self.space,
            memory_map=self.map,
            header=header,
            cmdline=self.cmdline,
            initrd=self.initrd,
            rsdp=self.rsdp,
            moved=distance != 0,
        )
        return dataclasses.replace(result, detail=linux_version(elf.image.data))

    def elf(self, elf: Elf) -> Entry:
        load_segments(elf, self.space)
        if elf.bits == 64:
            return enter_long(self.space, elf.physical_entry, stack(self.space))
        return enter_protected(self.space, elf.physical_entry, stack(self.space))

    def all_modules(self) -> list[tuple[Image, str]]:
        return [(self.initrd, ""), *self.modules] if self.initrd else self.modules

    def takes_no_modules(self) -> None:
        if self.modules:
            raise BootError(f"{self.image}: Linux takes one initrd, not modules ({len(self.modules)} given)")

    def takes_no_arguments(self, what: str) -> None:
        given = [name for name in ("cmdline", "initrd", "modules") if getattr(self, name)]
        if given:
            raise BootError(f"{self.image}: {what} cannot be given {' and '.join(given)}")
