# SPDX-License-Identifier: Apache-2.0
"""Images as users give them (paths, bytes, open files) and what an image that is no kernel looks like."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from kvmpy.errors import BootError

Source = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO
Module = Source | tuple[Source, str]

MAX_IMAGE = 2 << 30  # a vmlinux with debug information is about 1 GiB


@dataclass(frozen=True, slots=True)
class Image:
    """A whole file in memory; `name` is its path, or what it is when it came as bytes.

    `data` may be a bytearray (an unpacked kernel is 50 MB, not to be copied for its type); nobody changes it.
    """

    name: str
    data: bytes

    def __str__(self) -> str:
        return self.name


def read_image(source: Source, what: str = "kernel", limit: int = MAX_IMAGE) -> Image:
    """The bytes of `source`; `what` names it in errors, `limit` is its largest size in bytes.

    Raises BootError when it cannot be read, is empty or too large.
    """
    name = what
    try:
        if isinstance(source, (bytes, bytearray, memoryview)):
            data = bytes(source)
        elif isinstance(source, (str, os.PathLike)):
            path = Path(source)
            name = f"{what} {path}"
            data = _read_file(path, name, limit)
        else:
            name = f"{what} {getattr(source, 'name', '')}".rstrip()
            data = source.read(limit + 1)
            if not isinstance(data, bytes):
                raise TypeError(f"{name}: open the file in binary mode")
    except OSError as e:
        raise BootError(f"{name}: {e.strerror or e}") from e
    if len(data) > limit:
        raise BootError(f"{name}: larger than {limit:#x} bytes")
    if not data:
        raise BootError(f"{name}: empty")
    return Image(name, data)


def _read_file(path: Path, name: str, limit: int) -> bytes:
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        if stat.S_ISCHR(status.st_mode):
            raise BootError(f"{name}: a character device, not a file")
        if status.st_size > limit:
            raise BootError(f"{name}: {status.st_size:#x} bytes, more than the {limit:#x} that can be loaded")
        return file.read(limit + 1)


def read_modules(modules: Iterable[Module], limit: int = MAX_IMAGE) -> list[tuple[Image, str]]:
    """Each module as its image and its command line; a module without one has its own path there."""
    result = []
    for number, module in enumerate(modules):
        source, text = module if isinstance(module, tuple) else (module, None)
        image = read_image(source, f"module {number}", limit)
        if text is None:
            text = os.fspath(source) if isinstance(source, (str, os.PathLike)) else ""
        result.append((image, text))
    return result


_MAGICS = (
    # (offset, bytes, what it is)
    (0, b"\x1f\x8b", "gzip data"),
    (0, b"BZh", "bzip2 data"),
    (0, b"\xfd7zXZ\0", "xz data"),
    (0, b"\x28\xb5\x2f\xfd", "zstd data"),
    (0, b"\x04\x22\x4d\x18", "LZ4 data"),
    (0, b"\x02\x21\x4c\x18", "LZ4 data (legacy frame)"),
    (0, b"\x89LZO\0", "lzop data"),
    (0, b"\x5d\0\0", "LZMA data"),
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"070701", "a cpio archive (an initramfs?)"),
    (0, b"070702", "a cpio archive (an initramfs?)"),
    (0, b"QFI\xfb", "a qcow2 disk image"),
    (0, b"KDMV", "a VMDK disk image"),
    (64, b"\x7f\x10\xda\xbe", "a VDI disk image"),
    (0, b"conectix", "a VHD disk image"),
    (0, b"hsqs", "a squashfs file system"),
    (0, b"!<arch>\n", "a Debian package or ar archive"),
    (0, b"\xed\xab\xee\xdb", "an RPM package"),
    (257, b"ustar", "a tar archive"),
    (56, b"ARM\x64", "a Linux Image for aarch64"),
    (0, b"\x27\x05\x19\x56", "a U-Boot image"),
    (0, b"\xd0\x0d\xfe\xed", "a device tree"),
    (0x8001, b"CD001", "an ISO 9660 CD image"),
    (0x438, b"\x53\xef", "an ext2/3/4 file system"),
    (0, b"MZ", "a PE/EFI program"),
    (0, b"#!", "a script"),
)

_MACHINES = {
    2: "sparc", 3: "i386", 8: "mips", 20: "ppc", 21: "ppc64", 22: "s390", 40: "arm", 43: "sparc64",
    62: "x86-64", 183: "aarch64", 243: "riscv", 258: "loongarch",
}  # fmt: skip
_ELF_TYPES = {1: "object file", 2: "program", 3: "shared object", 4: "core dump"}


COMPRESSIONS = {
    "gzip": b"\x1f\x8b",
    "bzip2": b"BZh",
    "xz": b"\xfd7zXZ\0",
    "lzma": b"\x5d\0\0",
    "lz4": b"\x02\x21\x4c\x18",  # the legacy frame, the one that kernels use
    "zstd": b"\x28\xb5\x2f\xfd",
}


def compression(data: bytes | memoryview) -> str | None:
    """The name of the compression that the data starts like, among those that can be unpacked, or None."""
    return next((name for name, magic in COMPRESSIONS.items() if data[: len(magic)] == magic), None)


def describe(data: bytes) -> str:
    """What a file seems to be, for the message that it is no kernel, e.g. "gzip data"."""
    if not data:
        return "an empty file"
    if not data.strip(b"\0"):
        return f"{len(data)} zero bytes"
    if data.startswith(b"\x7fELF"):
        return _describe_elf(data)
    for offset, magic, name in _MAGICS:
        if data.startswith(magic, offset):
            return name
    head = data[:256]
    if all(9 <= byte <= 13 or 32 <= byte < 127 for byte in head):
        return f"text starting with {head.splitlines()[0][:40].decode()!r}" if head.strip() else "blank text"
    if data[0x1FE:0x200] == b"\x55\xaa":
        return "a boot sector or partitioned disk image"
    return f"{len(data)} bytes starting with {data[:8].hex(' ')}"


def _describe_elf(data: bytes) -> str:
    if len(data) < 20:
        return "a truncated ELF file"
    order = "big" if data[5] == 2 else "little"
    kind = int.from_bytes(data[16:18], order)  # type: ignore[arg-type]
    number = int.from_bytes(data[18:20], order)  # type: ignore[arg-type]
    bits = {1: "32-bit ", 2: "64-bit "}.get(data[4], "")
    return f"a {bits}ELF {_ELF_TYPES.get(kind, 'file')} for {_MACHINES.get(number, f'machine {number}')}"
