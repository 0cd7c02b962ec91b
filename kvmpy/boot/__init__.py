# SPDX-License-Identifier: Apache-2.0
"""Loaders: kernels and firmware into guest memory, and the tables that tell a guest about its machine.

load(image, memory, ...) -> Entry      any image by its content; bzImage, ELF, PVH, multiboot, flat, firmware
acpi, mptable, cpuid                   ACPI tables, MP table, what CPUID tells each vCPU
"""

from kvmpy.arch.entry import Entry as Entry
from kvmpy.boot.e820 import E820Entry as E820Entry
from kvmpy.boot.e820 import memory_map as memory_map
from kvmpy.boot.load import FORMATS as FORMATS
from kvmpy.boot.load import load as load
