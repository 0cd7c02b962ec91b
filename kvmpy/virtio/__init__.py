# SPDX-License-Identifier: Apache-2.0
"""Virtio 1.2: split and packed virtqueues, the transports virtio-mmio and virtio-pci, the devices. See docs/virtio.md.

| device | is for |
|---|---|
| `Blk` | a disk of `kvmpy.block` |
| `Net` | packets over a back end of `kvmpy.net` |
| `ConsoleDevice` | consoles (hvc0) and named ports over `kvmpy.chardev` |
| `Rng` | entropy |
| `Balloon` | memory back to the host |
| `SharedFolder` | a folder of the host (virtio-fs) |
| `Vsock` | stream sockets between programs of host and guest |
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvmpy.virtio.balloon import Balloon as Balloon
    from kvmpy.virtio.blk import Blk as Blk
    from kvmpy.virtio.console import ConsoleDevice as ConsoleDevice
    from kvmpy.virtio.console import Port as Port
    from kvmpy.virtio.device import VirtioDevice as VirtioDevice
    from kvmpy.virtio.fs import SharedFolder as SharedFolder
    from kvmpy.virtio.limits import RateLimit as RateLimit
    from kvmpy.virtio.mmio import MmioTransport as MmioTransport
    from kvmpy.virtio.net import Net as Net
    from kvmpy.virtio.pci import PciTransport as PciTransport
    from kvmpy.virtio.rng import Rng as Rng
    from kvmpy.virtio.vsock import Vsock as Vsock

_WHERE = {
    "Balloon": "balloon",
    "Blk": "blk",
    "ConsoleDevice": "console",
    "Port": "console",
    "VirtioDevice": "device",
    "MmioTransport": "mmio",
    "Net": "net",
    "RateLimit": "limits",
    "PciTransport": "pci",
    "Rng": "rng",
    "SharedFolder": "fs",
    "Vsock": "vsock",
}

__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    # Loaded on first use: importing the package must stay cheap.
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    globals()[name] = value
    return value
