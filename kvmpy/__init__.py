# SPDX-License-Identifier: Apache-2.0
"""kvmpy: micro-VMs inside Python, on the kernel's KVM or on kvmpy's own software CPU.

    Vm, Vcpu        KVM's machine and processor, with guest memory, buses, handlers, threads
    Machine         a whole PC that boots a kernel or a firmware, with disks (Drive), networks (Nic), folders (Share)
    Hlt, IoOut ...  exits: what `vcpu.run()` returns, to `match`
    Regs, Sregs ... the kernel's structures
    errors          `kvmpy.errors` draws the tree

`kvmpy.aio` waits for machines in asyncio, `kvmpy.guests` gets stock guests, `kvmpy.doctor` examines the host,
`kvmpy.block` reads and writes disk images. Importing opens nothing. A program to start from is examples/hello.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmpy._constants import Cap
from kvmpy._exits import (
    ApResetHold,
    BusLock,
    Debug,
    DirtyRingFull,
    Exit,
    FailEntry,
    GuestException,
    Hlt,
    HwUnknown,
    Hypercall,
    HypervHcall,
    HypervSyndbg,
    HypervSynic,
    InternalError,
    Interrupted,
    IoapicEoi,
    IoIn,
    IoOut,
    IrqWindowOpen,
    MemoryFault,
    MmioRead,
    MmioWrite,
    Nmi,
    Notify,
    RdMsr,
    SetTpr,
    Shutdown,
    SnpReqCerts,
    SystemEvent,
    Tdx,
    TprAccess,
    Unknown,
    Watchdog,
    WrMsr,
    XenHcall,
)
from kvmpy._structs import (
    ClockData,
    CpuidEntry2,
    Debugregs,
    Dtable,
    Fpu,
    GuestDebug,
    Irqchip,
    IrqRoutingEntry,
    LapicState,
    MpState,
    MsrEntry,
    PitState2,
    Regs,
    Segment,
    Sregs,
    Sregs2,
    Struct,
    Translation,
    VcpuEvents,
    Xcrs,
    Xsave,
)
from kvmpy._version import __version__
from kvmpy.bus import Bus, Device
from kvmpy.engines import Kvm, open_kvm
from kvmpy.errors import (
    BackendError,
    BootError,
    CapabilityError,
    EmulationFailure,
    EntryFailure,
    GuestError,
    GuestMemoryError,
    GuestShutdown,
    ImageError,
    KvmError,
    KvmpyError,
    NetworkError,
    OverlapError,
    StateError,
    UnexpectedExit,
    UnsupportedError,
)
from kvmpy.irq import GsiLine
from kvmpy.memory import GuestMemory, Ram
from kvmpy.vcpu import Outcome, Vcpu
from kvmpy.vm import Vm

if TYPE_CHECKING:
    from kvmpy.machine import Config, Drive, Machine, Nic, Share

__all__ = [
    "ApResetHold",
    "BackendError",
    "BootError",
    "Bus",
    "BusLock",
    "Cap",
    "CapabilityError",
    "ClockData",
    "Config",
    "CpuidEntry2",
    "Debug",
    "Debugregs",
    "Device",
    "DirtyRingFull",
    "Drive",
    "Dtable",
    "EmulationFailure",
    "EntryFailure",
    "Exit",
    "FailEntry",
    "Fpu",
    "GsiLine",
    "GuestDebug",
    "GuestError",
    "GuestException",
    "GuestMemory",
    "GuestMemoryError",
    "GuestShutdown",
    "Hlt",
    "HwUnknown",
    "Hypercall",
    "HypervHcall",
    "HypervSyndbg",
    "HypervSynic",
    "ImageError",
    "InternalError",
    "Interrupted",
    "IoIn",
    "IoOut",
    "IoapicEoi",
    "IrqRoutingEntry",
    "IrqWindowOpen",
    "Irqchip",
    "Kvm",
    "KvmError",
    "KvmpyError",
    "LapicState",
    "Machine",
    "MemoryFault",
    "MmioRead",
    "MmioWrite",
    "MpState",
    "MsrEntry",
    "NetworkError",
    "Nic",
    "Nmi",
    "Notify",
    "Outcome",
    "OverlapError",
    "PitState2",
    "Ram",
    "RdMsr",
    "Regs",
    "Segment",
    "SetTpr",
    "Share",
    "Shutdown",
    "SnpReqCerts",
    "Sregs",
    "Sregs2",
    "StateError",
    "Struct",
    "SystemEvent",
    "Tdx",
    "TprAccess",
    "Translation",
    "UnexpectedExit",
    "Unknown",
    "UnsupportedError",
    "Vcpu",
    "VcpuEvents",
    "Vm",
    "Watchdog",
    "WrMsr",
    "Xcrs",
    "XenHcall",
    "Xsave",
    "__version__",
    "open_kvm",
]

_LAZY = ("Config", "Drive", "Machine", "Nic", "Share")  # loaders and devices, which a bare Vm does not need


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from kvmpy import machine

        globals()[name] = getattr(machine, name)
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
