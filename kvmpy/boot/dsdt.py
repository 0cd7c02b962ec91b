# SPDX-License-Identifier: Apache-2.0
"""The DSDT: the devices of a machine that cannot be found by probing, in AML (ACPI 6.5, chapters 6 and 9)."""

from __future__ import annotations

from kvmpy.arch import layout
from kvmpy.boot import aml
from kvmpy.boot.acpi import S5_TYPE, AcpiConfig, PciHost, SerialPort, VirtioMmio, table

OSC_PCI = "33DB4D5B-1FF7-401C-9657-7441C03DD766"  # PCI Firmware Specification 3.2, 4.5.1
# Bits of the generic event device's register; kvmpy.devices.acpi_reduced has the same.
EVENT_POWER_BUTTON = 0x02
EVENT_SLEEP_BUTTON = 0x04
STATUS_CHANGED = 0x80  # notification of a button that was pressed (5.6.6)


def dsdt(config: AcpiConfig) -> bytes:
    """The DSDT for `config`; integers are 64 bits (revision 2)."""
    devices = [
        *(_processor(uid) for uid in range(len(config.apic_ids))),
        *(_serial(index, port) for index, port in enumerate(config.serial)),
        *([_rtc()] if config.rtc else []),
        *([_keyboard()] if config.keyboard else []),
        *(_virtio_mmio(index, device) for index, device in enumerate(config.virtio_mmio)),
        *([_pci(config.pci), _ecam(config.pci)] if config.pci else []),
        *(_events(*config.events) if config.events else []),
    ]
    s5 = aml.Name("\\_S5_", aml.Package(S5_TYPE, 0, 0, 0))
    return table(b"DSDT", 2, aml.Scope("\\_SB_", *devices) + s5)


def _processor(uid: int) -> bytes:
    # Processor devices pair with MADT entries by _UID (8.4).
    return aml.Device(f"C{uid:03X}", aml.Name("_HID", "ACPI0007"), aml.Name("_UID", uid))


def _serial(index: int, serial: SerialPort) -> bytes:
    return aml.Device(
        f"COM{index + 1}",
        aml.Name("_HID", aml.EisaId("PNP0501")),
        aml.Name("_UID", index + 1),
        aml.Name("_CRS", aml.ResourceTemplate(aml.IO(serial.port, 8), aml.Interrupt(serial.gsi, edge=True))),
    )


def _rtc() -> bytes:
    return aml.Device(
        "RTC_",
        aml.Name("_HID", aml.EisaId("PNP0B00")),
        aml.Name(
            "_CRS", aml.ResourceTemplate(aml.IO(layout.PORT_RTC, 2), aml.Interrupt(layout.IRQ_RTC, edge=True))
        ),
    )


def _keyboard() -> bytes:
    port = layout.PORT_KEYBOARD
    return aml.Device(
        "KBD_",
        aml.Name("_HID", aml.EisaId("PNP0303")),
        aml.Name(
            "_CRS",
            aml.ResourceTemplate(
                aml.IO(port, 1), aml.IO(port + 4, 1), aml.Interrupt(layout.IRQ_KEYBOARD, edge=True)
            ),
        ),
    )


def _virtio_mmio(index: int, device: VirtioMmio) -> bytes:
    return aml.Device(
        f"V{index:03X}",
        aml.Name("_HID", "LNRO0005"),  # the id that Linux' virtio_mmio driver and QEMU use
        aml.Name("_UID", index),
        aml.Name("_CCA", 1),  # DMA is coherent (6.2.17)
        aml.Name(
            "_CRS",
            aml.ResourceTemplate(
                aml.Memory32Fixed(device.base, device.size),
                aml.Interrupt(device.gsi, edge=device.edge, shared=not device.edge),
            ),
        ),
    )


def _pci(pci: PciHost) -> bytes:
    start, size = pci.mmio
    windows = [
        aml.WordBusNumber(0, pci.buses - 1),
        aml.IO(layout.PORT_PCI_ADDRESS, 8),
        aml.WordIO(0x0000, layout.PORT_PCI_ADDRESS - 1),
        aml.WordIO(layout.PORT_PCI_ADDRESS + 8, 0xFFFF),
        aml.DWordMemory(start, start + size - 1),
    ]
    if pci.mmio64:
        start, size = pci.mmio64
        windows.append(aml.QWordMemory(start, start + size - 1))
    # (address, pin, source, GSI) for any function of each slot (6.2.13); pins turn with the slot as on PCs.
    routes = [
        aml.Package(slot << 16 | 0xFFFF, pin, 0, pci.gsis[(slot + pin) % 4])
        for slot in range(32)
        for pin in range(4)
    ]
    return aml.Device(
        "PCI0",
        aml.Name("_HID", aml.EisaId("PNP0A08")),
        aml.Name("_CID", aml.EisaId("PNP0A03")),
        aml.Name("_UID", 0),
        aml.Name("_SEG", 0),
        aml.Name("_BBN", 0),
        aml.Name("_CCA", 1),
        aml.Name("_CRS", aml.ResourceTemplate(*windows)),
        aml.Name("_PRT", aml.Package(*routes)),
        _osc(),
    )


def _osc() -> bytes:
    """_OSC (6.2.11): the system takes over all PCI Express features, as no firmware runs beside it."""
    first, third = aml.name_string("CDW1"), aml.name_string("CDW3")
    return aml.Method(
        "_OSC",
        4,
        aml.CreateDWordField(aml.ARG3, 0, "CDW1"),
        aml.If(
            aml.LEqual(aml.ARG0, aml.ToUUID(OSC_PCI)),
            aml.CreateDWordField(aml.ARG3, 8, "CDW3"),
            aml.And(third, 0x3F, aml.LOCAL0),
            aml.If(aml.LNotEqual(aml.ARG1, aml.ONE), aml.Or(first, 0x08, first)),     # unknown revision
            aml.If(aml.LNotEqual(third, aml.LOCAL0), aml.Or(first, 0x10, first)),     # something was refused
            aml.Store(aml.LOCAL0, third),
        ),
        aml.Else(aml.Or(first, 0x04, first)),                                         # unknown UUID
        aml.Return(aml.ARG3),
        serialized=True,
    )  # fmt: skip


def _ecam(pci: PciHost) -> bytes:
    # MCFG alone does not reserve the range (PCI Firmware Specification 3.2, 4.1.2).
    end = pci.ecam + (pci.buses << 20) - 1
    return aml.Device(
        "MRES",
        aml.Name("_HID", aml.EisaId("PNP0C02")),
        aml.Name("_CRS", aml.ResourceTemplate(aml.Memory32Fixed(pci.ecam, end - pci.ecam + 1))),
    )


def _events(port: int, gsi: int) -> list[bytes]:
    """The generic event device (5.6.9) and the buttons that it reports."""
    status = aml.name_string("ESTS")
    return [
        aml.Device("PWRB", aml.Name("_HID", aml.EisaId("PNP0C0C"))),
        aml.Device("SLPB", aml.Name("_HID", aml.EisaId("PNP0C0E"))),
        aml.Device(
            "GED_",
            aml.Name("_HID", "ACPI0013"),
            aml.Name("_CRS", aml.ResourceTemplate(aml.Interrupt(gsi, edge=False))),
            aml.OperationRegion("EREG", aml.SYSTEM_IO, port, 4),
            aml.Field("EREG", aml.DWORD_ACCESS, ("ESTS", 32)),
            aml.Method(
                "_EVT",
                1,
                aml.Store(status, aml.LOCAL0),  # reading takes the events away
                aml.If(aml.And(aml.LOCAL0, EVENT_POWER_BUTTON), aml.Notify("PWRB", STATUS_CHANGED)),
                aml.If(aml.And(aml.LOCAL0, EVENT_SLEEP_BUTTON), aml.Notify("SLPB", STATUS_CHANGED)),
                serialized=True,
            ),
        ),
    ]
