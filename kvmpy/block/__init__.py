# SPDX-License-Identifier: Apache-2.0
"""Disk images: raw, qcow2, vdi, vmdk, overlays and NBD. Usable without a virtual machine.

with open_disk("disk.qcow2", "qcow2", follow=Follow("/images")) as disk:
    disk.pwrite(0, b"boot")
    disk.flush()
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kvmpy.block.disk import Disk as Disk
from kvmpy.block.disk import DiskStats as DiskStats
from kvmpy.block.disk import Extent as Extent

if TYPE_CHECKING:
    from kvmpy.block._disk import CoreDisk as CoreDisk
    from kvmpy.block._python import as_core as as_core
    from kvmpy.block.convert import convert as convert
    from kvmpy.block.formats import FORMATS as FORMATS
    from kvmpy.block.formats import create_disk as create_disk
    from kvmpy.block.formats import open_disk as open_disk
    from kvmpy.block.formats import probe_format as probe_format
    from kvmpy.block.nbd import NbdDisk as NbdDisk
    from kvmpy.block.overlay import open_overlay as open_overlay
    from kvmpy.block.policy import Follow as Follow
    from kvmpy.block.qcow2 import Qcow2Disk as Qcow2Disk
    from kvmpy.block.qcow2 import Qcow2Options as Qcow2Options
    from kvmpy.block.qcow2 import check as check

_WHERE = {
    "CoreDisk": "_disk",
    "as_core": "_python",
    "convert": "convert",
    "FORMATS": "formats",
    "create_disk": "formats",
    "open_disk": "formats",
    "probe_format": "formats",
    "NbdDisk": "nbd",
    "open_overlay": "overlay",
    "Follow": "policy",
    "Qcow2Disk": "qcow2",
    "Qcow2Options": "qcow2",
    "check": "qcow2",
}

__all__ = ["Disk", "DiskStats", "Extent", *_WHERE]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    # Loaded on first use: importing the package must stay cheap.
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    globals()[name] = value
    return value
