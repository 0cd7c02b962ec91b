# SPDX-License-Identifier: Apache-2.0
"""A throw-away layer over a disk: writes go to memory or to an unnamed file, the disk below stays as it is.

The layer is a qcow2 image without a name, so it is the same code that keeps named overlays right.
"""

from __future__ import annotations

import os

from kvmpy.block.disk import Disk
from kvmpy.block.hostfile import HostFile
from kvmpy.block.qcow2.create import Qcow2Options, build_qcow2
from kvmpy.block.qcow2.image import Qcow2Disk


def open_overlay(base: Disk, folder: str | os.PathLike[str] | None = None, *, cluster_size: int = 65536) -> Qcow2Disk:
    """A writable disk with the content of `base`; what is written is gone when it closes, and `base` closes
    with it.

    The writes are kept in memory, or in an unnamed file in `folder`. `cluster_size` (bytes) is the unit of
    copying.
    """
    if folder is None:
        fd = os.memfd_create("kvmpy-overlay", os.MFD_CLOEXEC)
    else:
        fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    file = HostFile.adopt(fd, os.path.join(folder or "", "(overlay)"), readonly=False, lock=False)  # noqa: PTH118
    disk = build_qcow2(file, base.size, Qcow2Options(cluster_size=cluster_size), backing=base)
    disk._set_size(base.size)  # which need not be whole sectors
    return disk
