# SPDX-License-Identifier: Apache-2.0
"""The devices of a PC: registers plus an interrupt pin, one file each.

A device knows no base address, no engine and no thread (docs/design.md); `tests/devices/` runs all of them
without a VM. Those with deadlines (`Rtc`, `AcpiPm`) are driven by `Timers`.

What a guest can try, and what it meets:

    any value, offset and access size     every access has a defined answer and raises nothing
    input that nobody reads, keys         queues have a limit, what does not fit is refused or logged
    fw_cfg DMA anywhere, of any length    goes through guest memory, which refuses what is outside of it
    log messages without end              a device logs ten warnings that a guest can cause, then none
    a saved state made by an attacker     `load()` checks type and range of every value before it takes any
"""

from kvmpy.devices.acpi_pm import AcpiPm
from kvmpy.devices.acpi_reduced import GenericEvents, SleepRegisters
from kvmpy.devices.base import ByteRegisters, StateReader, Window
from kvmpy.devices.debug_exit import DebugExit
from kvmpy.devices.debugcon import DebugCon
from kvmpy.devices.fw_cfg import FwCfg
from kvmpy.devices.i8042 import I8042
from kvmpy.devices.no_pci import NoPci
from kvmpy.devices.pc_testdev import PcTestdev
from kvmpy.devices.port92 import Port92
from kvmpy.devices.post import PostCode
from kvmpy.devices.reset_control import ResetControl
from kvmpy.devices.rtc import Rtc
from kvmpy.devices.serial import Serial
from kvmpy.devices.timers import Timers

__all__ = [
    "I8042",
    "AcpiPm",
    "ByteRegisters",
    "DebugCon",
    "DebugExit",
    "FwCfg",
    "GenericEvents",
    "NoPci",
    "PcTestdev",
    "Port92",
    "PostCode",
    "ResetControl",
    "Rtc",
    "Serial",
    "SleepRegisters",
    "StateReader",
    "Timers",
    "Window",
]
