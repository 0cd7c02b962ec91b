# SPDX-License-Identifier: Apache-2.0
"""VMDK, VMware's format (Virtual Disk Format 5.0): a descriptor and extents.

Read: monolithicSparse, streamOptimized, twoGbMaxExtentSparse, twoGbMaxExtentFlat, monolithicFlat. Written
and created: monolithicSparse. Not supported, and refused by name: parents (snapshots), ESX extents (VMFS,
COWD, SESPARSE), raw device mappings.

The descriptor names the files of the extents; they are opened as `Follow` allows.
"""

from __future__ import annotations

import os
import random
import re
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kvmpy.block._disk import RawCore
from kvmpy.block.disk import Disk, Extent, PythonDisk
from kvmpy.block.hostfile import HostFile
from kvmpy.block.policy import NOTHING, Follow
from kvmpy.block.vmdk_sparse import GRAIN, SparseExtent, write_sparse
from kvmpy.errors import ImageError

_MAX_DESCRIPTOR = 1 << 20
_MAX_EXTENTS = 4096
_MAX_SIZE = 1 << 62
_EXTENT = re.compile(r'(RW|RDONLY)\s+(\d{1,18})\s+([A-Z0-9]+)(?:\s+"([^"]*)"(?:\s+(\d{1,18}))?)?')
TYPES = (
    "monolithicSparse",
    "streamOptimized",
    "twoGbMaxExtentSparse",
    "twoGbMaxExtentFlat",
    "monolithicFlat",
)


class _Line(NamedTuple):
    sectors: int
    kind: str
    name: str
    offset: int  # sectors into the file, for FLAT


class Descriptor:
    """The text part: `key=value` lines and one line per extent."""

    def __init__(self, text: str) -> None:
        self.values: dict[str, str] = {}
        self.extents: list[_Line] = []
        for line in text.split("\0", 1)[0].splitlines():
            line = line.strip()
            found = _EXTENT.fullmatch(line)
            if found:
                _, sectors, kind, name, offset = found.groups()
                self.extents.append(_Line(int(sectors), kind, name or "", int(offset or 0)))
            elif line.split(maxsplit=1)[:1] in (["RW"], ["RDONLY"], ["NOACCESS"]):
                # Left out, it would move all that comes behind it.
                raise ImageError(f"the descriptor has an extent that makes no sense: {line[:80]!r}")
            elif "=" in line and not line.startswith("#"):
                key, value = line.split("=", 1)
                self.values[key.strip()] = value.strip().strip('"')
        if len(self.extents) > _MAX_EXTENTS:
            raise ImageError(f"the descriptor has {len(self.extents)} extents, the limit is {_MAX_EXTENTS}")
        if not self.extents:
            raise ImageError("the descriptor has no extents")
        self.type = self.values.get("createType", "")
        if self.type not in TYPES:
            raise ImageError(f"VMDK type {self.type!r} is not supported ({', '.join(TYPES)} are)")
        if self.values.get("parentCID", "ffffffff").lower() != "ffffffff":
            raise ImageError("VMDK images with a parent (snapshots) are not supported")

    def number(self, key: str) -> int:
        """A content ID; all ones (nobody) when it is none."""
        text = self.values.get(key, "")
        return int(text, 16) if re.fullmatch("[0-9a-fA-F]{1,8}", text) else 0xFFFF_FFFF


class VmdkDisk(PythonDisk):
    """An open VMDK image: extents one behind the other."""

    format = "vmdk"

    def __init__(self, file: HostFile, descriptor: Descriptor, extents: list[Disk]) -> None:
        super().__init__(sum(one.size for one in extents), file.readonly)
        self._file, self.descriptor, self._extents = file, descriptor, extents
        self._one_file = descriptor.type in ("monolithicSparse", "streamOptimized")
        self._starts: list[int] = []
        at = 0
        for one in extents:
            self._starts.append(at)
            at += one.size

    @property
    def path(self) -> str:
        """Where the file was opened."""
        return self._file.path

    @property
    def cluster_size(self) -> int:
        """Bytes of a grain."""
        first = self._extents[0] if self._extents else None
        return first.grain if isinstance(first, SparseExtent) else GRAIN

    @property
    def sparse(self) -> bool:
        """Has it grains at all?"""
        return any(isinstance(one, SparseExtent) for one in self._extents)

    @property
    def actual_size(self) -> int:
        """Bytes that all its files take up."""
        names: set[str] = set() if self._one_file else {line.name for line in self.descriptor.extents if line.name}
        paths = [Path(self.path), *(self._file.folder / name for name in names)]
        return sum(path.stat().st_blocks for path in paths) * 512

    def details(self) -> dict[str, Any]:
        """What `qemu-img info --output=json` has as format-specific data."""
        extents: list[dict[str, Any]] = []
        for line, one in zip(self.descriptor.extents, self._extents, strict=True):
            about: dict[str, Any] = {"virtual-size": one.size, "format": line.kind, "filename": self.path}
            if self._one_file:
                about["format"] = ""
            elif line.name:
                about["filename"] = os.path.join(os.path.dirname(self.path), line.name)  # noqa: PTH118, PTH120
            if isinstance(one, SparseExtent):
                about["cluster-size"] = one.grain
                if one.is_compressed:
                    about["compressed"] = True
            extents.append(about)
        ids = {"cid": self.descriptor.number("CID"), "parent-cid": self.descriptor.number("parentCID")}
        return {**ids, "create-type": self.descriptor.type, "extents": extents}

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[Disk, int, int]]:
        while length:
            i = bisect_right(self._starts, offset) - 1
            one, at = self._extents[i], offset - self._starts[i]
            n = min(length, one.size - at)
            yield one, at, n
            offset += n
            length -= n

    def _read(self, offset: int, out: memoryview) -> None:
        for one, at, n in self._pieces(offset, len(out)):
            one.pread_into(at, out[:n])
            out = out[n:]

    def _write(self, offset: int, data: memoryview) -> None:
        for one, at, n in self._pieces(offset, len(data)):
            one.pwrite(at, data[:n])
            data = data[n:]

    def _write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        for one, at, n in self._pieces(offset, length):
            one.write_zeroes(at, n, unmap)

    def _discard(self, offset: int, length: int) -> None:
        for one, at, n in self._pieces(offset, length):
            one.discard(at, n)

    def _flush(self) -> None:
        for one in self._extents:
            one.flush()

    def _status(self, offset: int, length: int) -> Extent:
        one, at, n = next(self._pieces(offset, length))
        return one.block_status(at, n)._replace(offset=offset)

    def _close(self) -> None:
        for one in self._extents:
            one.close()
        self._file.close()


class ZeroDisk(PythonDisk):
    """An extent that is not stored: zeroes."""

    def __init__(self, size: int) -> None:
        super().__init__(size, readonly=True)

    def _read(self, offset: int, out: memoryview) -> None:
        out[:] = bytes(len(out))

    def _status(self, offset: int, length: int) -> Extent:
        return Extent(offset, length, data=False, zero=True, allocated=True)

    def _close(self) -> None:
        pass


def open_vmdk(file: HostFile, *, follow: Follow = NOTHING) -> VmdkDisk:
    """The disk in `file` and the files it names, all of which it closes in the end; ImageError if it cannot
    be used.
    """
    extents: list[Disk] = []
    try:
        if file.pread_some(0, 4) == b"KDMV":
            own = SparseExtent(file)
            extents.append(own)
            descriptor = Descriptor(own.descriptor.decode("latin-1"))
            if descriptor.type not in ("monolithicSparse", "streamOptimized"):
                raise ImageError(f"this is one extent of a {descriptor.type} image; open its descriptor file")
            if len(descriptor.extents) != 1:
                raise ImageError(f"a {descriptor.type} image has one extent, not {len(descriptor.extents)}")
        else:
            if file.size > _MAX_DESCRIPTOR:
                raise ImageError("not a VMDK image: no sparse extent, and too large for a descriptor", 0)
            text = file.pread_some(0, _MAX_DESCRIPTOR).decode("latin-1")
            if not text.lstrip().startswith("# Disk DescriptorFile"):
                raise ImageError("not a VMDK image: neither a sparse extent nor a descriptor", 0)
            descriptor = Descriptor(text)
            if not file.readonly:
                raise ImageError(f"VMDK images of type {descriptor.type} can only be read")
            deeper = follow.deeper()
            size = sum(line.sectors for line in descriptor.extents) * 512
            if size >= _MAX_SIZE:
                raise ImageError(f"a disk of {size} bytes is too large")
            for line in descriptor.extents:
                extents.append(_open_extent(line, file.folder, deeper))
        return VmdkDisk(file, descriptor, extents)
    except BaseException:
        for one in extents:
            one.close()
        file.close()
        raise


def _open_extent(line: _Line, folder: Path, follow: Follow) -> Disk:
    size = line.sectors * 512
    if line.kind == "ZERO":
        return ZeroDisk(size)
    if line.kind not in ("FLAT", "SPARSE"):
        raise ImageError(f"VMDK extents of kind {line.kind} are not supported")
    file = follow.open(line.name, folder, True, "extent")
    if line.kind == "FLAT":
        start = line.offset * 512
        if start + size > file.size:
            have = file.size
            file.close()
            raise ImageError(f"extent {line.name!r} has {have} bytes, the descriptor says {start + size}")
        return RawCore(file.fd, start, size, True, owner=(file,))
    try:
        extent = SparseExtent(file)
    except BaseException:
        file.close()
        raise
    if extent.size < size:
        extent.close()
        raise ImageError(f"extent {line.name!r} maps {extent.size} bytes, the descriptor says {size}")
    extent.limit(size)
    return extent


def create_vmdk(path: str | os.PathLike[str], size: int) -> None:
    """A new monolithicSparse image of `size` bytes (rounded up to 512)."""
    sectors = -(-size // 512)
    cylinders = min(sectors // (16 * 63), 16383)
    text = f"""# Disk DescriptorFile
version=1
CID={random.SystemRandom().randrange(0xFFFFFFFE):08x}
parentCID=ffffffff
createType="monolithicSparse"

# Extent description
RW {sectors} SPARSE "{Path(path).name.replace('"', "_")}"

# The Disk Data Base
#DDB

ddb.virtualHWVersion = "4"
ddb.geometry.cylinders = "{cylinders}"
ddb.geometry.heads = "16"
ddb.geometry.sectors = "63"
ddb.adapterType = "ide"
"""
    with HostFile.create(path) as file:
        write_sparse(file, sectors, text.encode("latin-1", "replace"))
        file.sync()
