# SPDX-License-Identifier: Apache-2.0
"""Guest memory: what backs it (`Ram`), access by guest address (`GuestMemory`), which pages were written."""

from kvmpy.memory.dirty import DirtyLog as DirtyLog
from kvmpy.memory.dirty import DirtyPages as DirtyPages
from kvmpy.memory.dirty import DirtyRing as DirtyRing
from kvmpy.memory.dirty import DirtySource as DirtySource
from kvmpy.memory.guest import GuestMemory as GuestMemory
from kvmpy.memory.ram import HugePages as HugePages
from kvmpy.memory.ram import Ram as Ram
from kvmpy.memory.regions import Region as Region
