# SPDX-License-Identifier: Apache-2.0
from kvmpy.block._disk import CoreDisk
from kvmpy.block.disk import Disk

class PyCore(CoreDisk):
    def __init__(self, target: Disk) -> None: ...

def as_core(disk: Disk) -> CoreDisk: ...
