# SPDX-License-Identifier: Apache-2.0
"""The virtio devices of a machine: made from its configuration, plugged into a transport, closed in the right order."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any, Protocol

from kvmpy.arch import layout
from kvmpy.boot.acpi import PciHost, VirtioMmio
from kvmpy.irq import EventLine
from kvmpy.machine.config import Config
from kvmpy.pci import Ecam, MsiRoutes, PciBus
from kvmpy.virtio import Balloon, ConsoleDevice, MmioTransport, PciTransport, Rng, VirtioDevice, Vsock
from kvmpy.virtio.transport import VirtioTransport
from kvmpy.vm import Vm


class Slots(Protocol):
    """Where devices are plugged in: a transport for each, with its addresses and interrupts.

    `places` and `host` are what ACPI says of them, `cmdline` is what kernels without ACPI are told.
    """

    places: list[VirtioMmio]
    host: PciHost | None

    @property
    def transports(self) -> Sequence[VirtioTransport]:
        """One for each device, in the order of plugging."""
        ...

    @property
    def cmdline(self) -> list[str]:
        """Words of the kernel's command line."""
        ...

    def plug(self, device: VirtioDevice) -> None:
        """Give `device` a transport; it is closed by `close()`. Raises ValueError when there is no room."""
        ...

    def close(self) -> None:
        """Close all transports and their devices; the VM is still open, its processors have stopped."""
        ...


class MmioSlots:
    """virtio-mmio: a page of registers and a GSI for each device, kicks by ioeventfd, interrupts by irqfd."""

    host: PciHost | None = None

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._undo = contextlib.ExitStack()
        self.places: list[VirtioMmio] = []
        self.transports: list[MmioTransport] = []

    def plug(self, device: VirtioDevice) -> None:
        """Put `device` at the next free address. Raises ValueError when all GSIs are taken."""
        index = len(self.places)
        if index >= len(layout.IRQ_VIRTIO):
            raise ValueError(
                f"{device.name}: {len(layout.IRQ_VIRTIO)} virtio-mmio devices have an interrupt each, this is one more"
            )
        base = layout.VIRTIO_MMIO + index * layout.VIRTIO_MMIO_SIZE
        gsi = layout.IRQ_VIRTIO[index]
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._undo.callback(os.close, fd)
        self._vm.irqfd(fd, gsi)
        transport = MmioTransport(device, self._vm.memory, EventLine(fd))
        self._undo.callback(transport.close)
        self._vm.mmio.add(base, transport)
        transport.connect_kicks(self._vm, base)
        self.transports.append(transport)
        self.places.append(VirtioMmio(base, layout.VIRTIO_MMIO_SIZE, gsi))

    @property
    def cmdline(self) -> list[str]:
        """What kernels with CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES want to be told."""
        return [f"virtio_mmio.device={place.size >> 10}K@{place.base:#x}:{place.gsi}" for place in self.places]

    def close(self) -> None:
        """See `Slots`."""
        self._undo.close()


class PciSlots:
    """virtio-pci: a slot of the PCI bus for each device, kicks by ioeventfd, interrupts by irqfd (MSI-X) or a pin."""

    def __init__(self, vm: Vm, bus: PciBus, *, firmware: bool) -> None:
        """firmware: it places the BARs, and would not know of ECAM."""
        self._vm = vm
        self._bus = bus
        self._msi = MsiRoutes(vm)
        self._undo = contextlib.ExitStack()
        self._firmware = firmware
        self.places: list[VirtioMmio] = []
        self.host: PciHost | None = None if firmware else PciHost(buses=1, gsis=layout.IRQ_PCI)
        self.cmdline: list[str] = []
        self.transports: list[PciTransport] = []
        if not firmware:
            vm.mmio.add(layout.PCI_ECAM, Ecam(bus))

    def plug(self, device: VirtioDevice) -> None:
        """Put `device` into the next free slot. Raises ValueError when there is none."""
        transport = PciTransport(device, self._vm.memory, self._msi, self._vm)
        self._undo.callback(transport.close)
        self._bus.plug(transport.function)
        self.transports.append(transport)
        if not self._firmware:
            self._bus.place_bars(layout.PCI_MMIO_START, layout.PCI_MMIO_END - layout.PCI_MMIO_START)

    def close(self) -> None:
        """See `Slots`."""
        self._undo.close()


class Virtio:
    """The devices that `config` asks for: disks, nics, shares, console, rng, balloon, vsock, others, in this order."""

    def __init__(self, config: Config, vm: Vm, bus: PciBus | None) -> None:
        self.devices: list[VirtioDevice] = []
        self.slots: Slots = (
            MmioSlots(vm) if bus is None else PciSlots(vm, bus, firmware=config.firmware is not None)
        )
        self._memory = vm.memory
        self._undo = contextlib.ExitStack()  # what devices use and do not close
        try:
            self._plug_all(config)
        except BaseException:
            self.close()
            raise

    def _plug_all(self, config: Config) -> None:
        for number, drive in enumerate(config.drives):
            disk = drive.open()
            if drive.owned:
                self._undo.callback(disk.close)
            self._plug(drive.device(disk, f"blk{number}"))
        for number, nic in enumerate(config.nics):
            backend = nic.open()
            try:
                card = nic.device(backend, f"net{number}")
            except BaseException:
                backend.close()
                raise
            self._plug(card)
        for number, share in enumerate(config.folders):
            self._plug(share.device(f"share{number}"))
        if config.hvc is not None:
            self._plug(ConsoleDevice(config.hvc))
        if config.rng:
            self._plug(Rng())
        if config.balloon:
            self._plug(Balloon(self._memory))
        if config.vsock is not None:
            self._plug(Vsock(*config.vsock))
        for make in config.virtio:
            self._plug(make(self._memory))

    def _plug(self, device: VirtioDevice) -> None:
        try:
            self.slots.plug(device)
        except BaseException:
            device.close()
            raise
        self.devices.append(device)

    def pause(self) -> None:
        """No device touches guest memory from now on; the processors are paused already."""
        for device in self.devices:
            device.pause()

    def resume(self) -> None:
        """Go on after `pause()`."""
        for device in self.devices:
            device.unpause()

    def stats(self) -> dict[str, dict[str, Any]]:
        """Live counters of each device, by its name."""
        return {device.name: device.stats() for device in self.devices}

    def close(self) -> None:
        """Close the devices, then the disks. Idempotent. Raises what a disk raises that cannot be closed cleanly."""
        with self._undo:
            self.slots.close()
