# SPDX-License-Identifier: Apache-2.0
"""PCI: one bus of a PCI Express root bridge, its functions, their BARs, INTx pins and MSI-X vectors.

    bus = PciBus(vm.mmio, [GsiLine(vm, gsi) for gsi in (16, 17, 18, 19)])
    vm.pio.add(0xCF8, ConfigPorts(bus, reset_control)); vm.mmio.add(0xE000_0000, Ecam(bus))
    bus.plug(function)                                       # a PciFunction, in the next free slot
    bus.place_bars(0xC000_0000, 0x1000_0000)                 # as firmware does

Sources: PCI Local Bus Specification 3.0 (section numbers in the code), PCI Express Base Specification for ECAM.
"""

from kvmpy.pci.bus import PciBus as PciBus
from kvmpy.pci.config import ConfigSpace as ConfigSpace
from kvmpy.pci.function import PciFunction as PciFunction
from kvmpy.pci.msi import MsiRoutes as MsiRoutes
from kvmpy.pci.msix import Msix as Msix
from kvmpy.pci.ports import ConfigPorts as ConfigPorts
from kvmpy.pci.ports import Ecam as Ecam
