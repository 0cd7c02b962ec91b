# SPDX-License-Identifier: Apache-2.0
"""The formats by name: opening, making and, for reading only, recognising images."""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from kvmpy.block.disk import Disk
from kvmpy.block.hostfile import HostFile
from kvmpy.block.nbd import NbdDisk
from kvmpy.block.policy import NOTHING, Follow
from kvmpy.block.qcow2.create import Qcow2Options, create_qcow2
from kvmpy.block.qcow2.image import open_qcow2
from kvmpy.block.raw import create_raw, open_raw
from kvmpy.block.vdi import create_vdi, open_vdi
from kvmpy.block.vmdk import create_vmdk, open_vmdk
from kvmpy.errors import ImageError

FORMATS = ("raw", "qcow2", "vdi", "vmdk", "nbd")
_MAGIC = (  # offset, bytes, name
    (0, b"QFI\xfb", "qcow2"),
    (0, b"KDMV", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0x40, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (0, b"COWD", "vmdk (ESX COWD)"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"QED\0", "qed"),
    (0, b"LUKS\xba\xbe", "luks"),
)


def probe_format(path: str | os.PathLike[str]) -> str:
    """The format that the first bytes of a file look like; "raw" if like none.

    Only for looking at a file: whoever can write into a raw disk can make it look like any format
    (CVE-2008-2004).
    """
    with HostFile.open(path, readonly=True, lock=False) as file:
        head = file.pread_some(0, 512)
    return next((name for at, magic, name in _MAGIC if head[at : at + len(magic)] == magic), "raw")


def open_disk(
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    readonly: bool = False,
    follow: Follow = NOTHING,
    lock: bool = True,
    unsafe: bool = False,
    discard: bool = True,
    backing: bool = True,
) -> Disk:
    """Open a disk image.

    `format` is one of FORMATS; it may be left out only with `readonly`, as probing what a guest can write
    is not safe. For "nbd" `path` is the server's Unix socket, or nbd+unix:///EXPORT?socket=PATH. `follow`
    says which files the image may name (backing files, data files, extents); by default none. `lock`:
    refuse an image that somebody else is writing, or using if we write. `unsafe`: flushes do not wait for
    the host's disk. `discard`: give freed space back to the host. `backing=False`: leave a backing file
    out, its clusters read as zero.

    Raises ImageError (damaged, unsupported, or not allowed to be followed), OSError (BlockingIOError: in
    use), ValueError (format).
    """
    if format is None:
        if not readonly:
            raise ValueError("a disk that is opened for writing needs its format named")
        format = probe_format(path)
    if format == "nbd":
        return _open_nbd(os.fspath(path), readonly)
    if format not in FORMATS:
        raise ImageError(f"format {format!r} is not supported ({', '.join(FORMATS)} are; qemu-nbd can serve others)")
    return _open(HostFile.open(path, readonly, lock), format, follow, unsafe, discard, backing)


def _open_nbd(path: str, readonly: bool) -> NbdDisk:
    if not path.startswith("nbd+unix://"):
        return NbdDisk(path, readonly=readonly)
    parts = urlsplit(path)
    sockets = parse_qs(parts.query).get("socket", [])
    if parts.netloc or len(sockets) != 1:
        raise ValueError(f"{path!r} is not of the form nbd+unix:///EXPORT?socket=PATH")
    return NbdDisk(sockets[0], unquote(parts.path[1:]), readonly=readonly)


def _open(file: HostFile, format: str, follow: Follow, unsafe: bool, discard: bool, backing: bool) -> Disk:
    if format == "raw":
        return open_raw(file, unsafe=unsafe, discard=discard)
    if format == "qcow2":
        return open_qcow2(
            file,
            follow=follow,
            open_backing=_open_backing,
            unsafe=unsafe,
            discard=discard,
            no_backing=not backing,
        )
    if format == "vdi":
        return open_vdi(file)
    return open_vmdk(file, follow=follow)


def _open_backing(name: str, format: str, overlay: HostFile, follow: Follow) -> Disk:
    """The backing file that the image in `overlay` names, read-only."""
    deeper = follow.deeper()
    if format not in FORMATS or format == "nbd":
        raise ImageError(f"the backing file {name!r} has format {format!r}, which is not supported")
    return _open(follow.open(name, overlay.folder, True, "backing file"), format, deeper, False, True, True)


def create_disk(path: str | os.PathLike[str], format: str, size: int, **options: Any) -> None:
    """Make an image of `size` bytes. Options are qemu-img's: for qcow2 those of Qcow2Options, for raw
    `preallocation`, for vdi `static`.
    """
    if size < 0:
        raise ValueError(f"size {size} is negative")
    known = creation_options(format)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"format {format} has no option {', '.join(unknown)} (it has: {', '.join(known) or 'none'})")
    if format == "qcow2":
        create_qcow2(path, size, Qcow2Options(**options))
    elif format == "raw":
        create_raw(path, size, **options)
    elif format == "vdi":
        create_vdi(path, size, **options)
    else:
        create_vmdk(path, size)


def creation_options(format: str) -> dict[str, Any]:
    """The creation options of a format, with their defaults; ValueError if images of it cannot be made."""
    known: dict[str, dict[str, Any]] = {
        "raw": {"preallocation": "off"},
        "qcow2": {one.name: one.default for one in fields(Qcow2Options)},
        "vdi": {"static": False},
        "vmdk": {},
    }
    if format not in known:
        raise ValueError(f"images of format {format!r} cannot be made ({', '.join(known)} can)")
    return known[format]
