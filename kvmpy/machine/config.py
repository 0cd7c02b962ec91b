# SPDX-License-Identifier: Apache-2.0
"""What a machine is made of: plain values, checked when given."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from kvmpy.arch.layout import MIB
from kvmpy.block import Disk
from kvmpy.chardev import CharBackend
from kvmpy.clock import Clock, HostClock
from kvmpy.machine.drives import Drive
from kvmpy.machine.nics import Nic
from kvmpy.machine.shares import Share
from kvmpy.machine.words import parse_size as parse_size
from kvmpy.memory import GuestMemory, HugePages
from kvmpy.net import NetBackend
from kvmpy.virtio import Port, VirtioDevice

Path = str | os.PathLike[str]
Module = Path | tuple[Path, str]

SMALLEST = MIB
MOST_CPUS = 254  # xAPIC ids 0..254, 255 is broadcast


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A machine's configuration. Sizes are bytes or text like "512M".

    memory: guest RAM. cpus: how many. backend: "auto", "kvm" or "tcg". assist: whether
    the software CPU runs what KVM cannot emulate (None: yes, unless $KVMPY_ASSIST is 0). deterministic: a seed; time
    is counted in instructions, so that two runs are the same (software CPU, one processor; see `kvmpy.Vm`). cpu: CPUID
    policy, e.g. "host,-avx2".
    kernel, initrd, cmdline, modules: what to boot directly; firmware: a BIOS ROM instead. image_format,
    load_address, entry, mode: how to load an image that does not say it itself. decompress: unpack a kernel on the host
    (None: a bzImage on the software CPU, which is slower at it). acpi: make ACPI tables.
    huge_pages: None, "thp", "2M" or "1G". console: where COM1 goes (default a `Console` in memory);
    debugcon: where port 0xE9 and SeaBIOS's 0x402 go. fw_cfg: extra files for firmware. floppy: an image that
    SeaBIOS boots from memory. triple_fault: "error" or "reset", what a triple fault means. testdev: the device
    that hypervisor test programs expect (`kvmpy.devices.PcTestdev`).

    Virtio devices: disks: each a `Drive`, an open `kvmpy.block.Disk`, or text such as "root.qcow2,format=qcow2".
    nets: each a `Nic`, a back end of `kvmpy.net`, or text such as "tap:tap0". shares: each a `Share` or text. hvc:
    where
    hvc0 goes, or several `virtio.Port`s. rng: entropy. balloon: memory that the guest gives back. vsock: (CID, path
    of the Unix sockets), see `virtio.Vsock`. virtio: functions of guest memory that make further devices. transport:
    "mmio" or "pci", how the guest finds them; default "pci" with a firmware, which looks nowhere else, or "mmio".
    """

    memory: int | str = 512 * MIB
    cpus: int = 1
    backend: str = "auto"
    assist: bool | None = None
    deterministic: int | None = None
    cpu: str = "host"
    kernel: Path | None = None
    initrd: Path | None = None
    cmdline: str = ""
    modules: Sequence[Module] = ()
    firmware: Path | None = None
    floppy: Path | None = None
    image_format: str = "auto"
    load_address: int | None = None
    entry: int | None = None
    mode: str | None = None
    decompress: bool | None = None
    acpi: bool = True
    huge_pages: HugePages | None = None
    console: CharBackend | None = None
    debugcon: CharBackend | None = None
    fw_cfg: Mapping[str, bytes] = field(default_factory=dict)
    triple_fault: str = "error"
    testdev: bool = False
    clock: Clock = field(default_factory=HostClock)
    disks: Sequence[Drive | Disk | str] = ()
    nets: Sequence[Nic | NetBackend | str] = ()
    shares: Sequence[Share | str] = ()
    hvc: CharBackend | Sequence[Port] | None = None
    rng: bool = False
    balloon: bool = False
    vsock: tuple[int, Path] | None = None
    virtio: Sequence[Callable[[GuestMemory], VirtioDevice]] = ()
    transport: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "memory", parse_size(self.memory))
        if self.ram < SMALLEST or self.ram % MIB:
            raise ValueError(f"memory must be a whole number of MiB, at least 1 MiB, not {self.ram:#x} bytes")
        if not 1 <= self.cpus <= MOST_CPUS:
            raise ValueError(f"cpus must be 1..{MOST_CPUS}, not {self.cpus}")
        if (self.kernel is None) == (self.firmware is None):
            raise ValueError("a machine boots either a kernel or a firmware: give exactly one of them")
        if self.kernel is None and (self.initrd is not None or self.modules or self.cmdline):
            raise ValueError("initrd, modules and cmdline go with a kernel, not with a firmware")
        if self.floppy is not None and self.firmware is None:
            raise ValueError("a floppy needs a firmware that boots from it, such as SeaBIOS")
        if self.deterministic is not None and self.cpus != 1:
            raise ValueError(f"a deterministic machine has one processor, not {self.cpus}")
        if self.triple_fault not in ("error", "reset"):
            raise ValueError(f'triple_fault is "error" or "reset", not {self.triple_fault!r}')
        if self.transport not in (None, "mmio", "pci"):
            raise ValueError(f'transport is "mmio" or "pci", not {self.transport!r}')
        for field_name in ("disks", "nets", "shares"):
            if isinstance(getattr(self, field_name), str):
                raise ValueError(f"{field_name} is a list, such as [{getattr(self, field_name)!r}]")
        self.drives, self.nics, self.folders  # noqa: B018 - they raise what is wrong with them

    @property
    def ram(self) -> int:
        """Guest RAM in bytes."""
        assert isinstance(self.memory, int)
        return self.memory

    @property
    def pci(self) -> bool:
        """Whether the machine has a PCI bus."""
        devices = self.disks or self.nets or self.shares or self.hvc or self.rng or self.balloon or self.vsock
        wanted = bool(devices or self.virtio)
        return self.transport == "pci" or (self.transport is None and self.firmware is not None and wanted)

    @property
    def drives(self) -> list[Drive]:
        """The disks, each as a `Drive`."""
        return [_made(Drive, disk) for disk in self.disks]

    @property
    def nics(self) -> list[Nic]:
        """The networks, each as a `Nic`."""
        return [_made(Nic, net) for net in self.nets]

    @property
    def folders(self) -> list[Share]:
        """The shared folders, each as a `Share`."""
        return [_made(Share, share) for share in self.shares]


D = TypeVar("D", Drive, Nic, Share)


def _made(kind: type[D], item: Any) -> D:
    """What a user gave for a device: the device itself, a word of the command line, or what it is made from."""
    if isinstance(item, kind):
        return item
    return kind.parse(item) if isinstance(item, str) else kind(item)
