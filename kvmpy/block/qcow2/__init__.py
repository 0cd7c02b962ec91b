# SPDX-License-Identifier: Apache-2.0
"""qcow2, versions 2 and 3: QEMU's copy-on-write format (QEMU docs/interop/qcow2.txt)."""

from kvmpy.block.qcow2.check import CheckResult as CheckResult
from kvmpy.block.qcow2.check import check as check
from kvmpy.block.qcow2.create import Qcow2Options as Qcow2Options
from kvmpy.block.qcow2.create import build_qcow2 as build_qcow2
from kvmpy.block.qcow2.create import create_qcow2 as create_qcow2
from kvmpy.block.qcow2.header import Header as Header
from kvmpy.block.qcow2.image import Qcow2Disk as Qcow2Disk
from kvmpy.block.qcow2.image import open_qcow2 as open_qcow2
from kvmpy.block.qcow2.snapshots import Snapshot as Snapshot
from kvmpy.block.qcow2.snapshots import Snapshots as Snapshots
