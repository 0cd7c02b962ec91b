# SPDX-License-Identifier: Apache-2.0
"""ACPI tables for a machine without fixed ACPI hardware (ACPI 6.5, chapters 4.1, 5.2 and 6).

RSDP, RSDT, XSDT, hardware-reduced FADT, MADT, DSDT, and MCFG when there is PCI. Kernels that know no other
way find their processors, IOAPIC and virtio-mmio devices here. The DSDT is written by `dsdt.py`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvmpy.arch import layout
from kvmpy.errors import BootError
from kvmpy.memory import GuestMemory

OEM_ID = b"KVMPY "
OEM_TABLE_ID = b"KVMPYVM "
CREATOR_ID = b"KVPY"
REVISION = 1
HEADER_SIZE = 36

S5_TYPE = 5  # SLP_TYP of "soft off", in \_S5 and in the sleep register
RESET_VALUE = 0x06  # to the reset control port: full reset (bit 1 chooses, bit 2 does it)

# FADT flags (table 5.10) and boot architecture flags (table 5.11).
WBINVD = 1 << 0
PROC_C1 = 1 << 2
PWR_BUTTON = 1 << 4  # a control method device, or none
SLP_BUTTON = 1 << 5
RESET_REG_SUP = 1 << 10
HEADLESS = 1 << 12
HW_REDUCED_ACPI = 1 << 20
LEGACY_DEVICES = 1 << 0
HAS_8042 = 1 << 1
NO_VGA = 1 << 2
NO_CMOS_RTC = 1 << 5

PCAT_COMPAT = 1 << 0  # MADT: there are two 8259 as well


class SerialPort(NamedTuple):
    """A 16550 at `port`, its interrupt at `gsi`."""

    port: int
    gsi: int


class VirtioMmio(NamedTuple):
    """A virtio-mmio transport: guest address and size of its registers, GSI, edge or level."""

    base: int
    size: int
    gsi: int
    edge: bool = True


class Override(NamedTuple):
    """ISA interrupt `irq` arrives at `gsi`; flags as in 5.2.12.5 (0: as the bus has it)."""

    irq: int
    gsi: int
    flags: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PciHost:
    """A PCI Express root bridge.

    Its ECAM for `buses` buses, (start, size) windows for BARs, the GSIs of INTA to INTD of slot 0.
    """

    ecam: int = layout.PCI_ECAM
    buses: int = 256
    mmio: tuple[int, int] = (layout.PCI_MMIO_START, layout.PCI_MMIO_END - layout.PCI_MMIO_START)
    mmio64: tuple[int, int] | None = None
    gsis: tuple[int, int, int, int] = (16, 17, 18, 19)


@dataclass(frozen=True, slots=True, kw_only=True)
class AcpiConfig:
    """What the tables say of a machine.

    apic_ids: of all processors, the first one boots. serial: 16550 ports. rtc, keyboard: whether there is a
    CMOS clock, an i8042. virtio_mmio, pci: as they say. sleep_port: control and status register. reset_port:
    takes RESET_VALUE. events: (port, gsi) of the generic event device's register, for the power button.
    ioapic_id, overrides: the IOAPIC's id; ISA interrupts that arrive elsewhere. extra: whole further tables.
    """

    apic_ids: Sequence[int] = (0,)
    serial: Sequence[SerialPort] = (SerialPort(layout.PORT_COM[0], layout.IRQ_COM[0]),)
    rtc: bool = True
    keyboard: bool = False
    virtio_mmio: Sequence[VirtioMmio] = ()
    pci: PciHost | None = None
    sleep_port: int = layout.PORT_ACPI
    reset_port: int = layout.PORT_RESET
    events: tuple[int, int] | None = None
    ioapic_id: int = 0
    overrides: Sequence[Override] = ()
    extra: Sequence[bytes] = ()


class AcpiTables(NamedTuple):
    """All tables as they lie in guest memory from `address`; the RSDP is at `rsdp`."""

    address: int
    data: bytes
    rsdp: int


def write_acpi(memory: GuestMemory, config: AcpiConfig, address: int = layout.ACPI_TABLES) -> int:
    """Write the tables to guest memory; returns the RSDP's address. Raises BootError when they do not fit."""
    tables = build_acpi(config, address)
    end = address + len(tables.data)
    if layout.ACPI_TABLES <= address < layout.ACPI_TABLES_END < end:
        room = layout.ACPI_TABLES_END - address
        raise BootError(
            f"ACPI tables of {len(tables.data):#x} bytes do not fit into {room:#x} from {address:#_x}"
        )
    memory.write(address, tables.data)
    return tables.rsdp


def build_acpi(config: AcpiConfig, address: int = layout.ACPI_TABLES) -> AcpiTables:
    """All tables, linked for guest address `address` (16-byte aligned). The RSDP comes first."""
    from kvmpy.boot.dsdt import dsdt

    if address % 16:
        raise ValueError(f"the RSDP lies on a 16-byte boundary, not at {address:#x} (5.2.5.1)")
    blob = bytearray(64)  # the RSDP's place

    def put(table: bytes) -> int:
        at = address + len(blob)
        blob.extend(table.ljust(-(-len(table) // 16) * 16, b"\0"))
        return at

    dsdt_at = put(dsdt(config))
    tables = [fadt(config, dsdt_at), madt(config), *([mcfg(config.pci)] if config.pci else []), *config.extra]
    addresses = [put(t) for t in tables]
    rsdt_at = put(table(b"RSDT", 1, struct.pack(f"<{len(addresses)}I", *addresses)))
    xsdt_at = put(table(b"XSDT", 1, struct.pack(f"<{len(addresses)}Q", *addresses)))
    blob[:36] = rsdp(rsdt_at, xsdt_at)
    return AcpiTables(address, bytes(blob), address)


def checksum(data: bytes | bytearray) -> int:
    """The byte that makes the sum of all bytes zero."""
    return -sum(data) & 0xFF


def table(signature: bytes, revision: int, body: bytes) -> bytes:
    """A table: the header of 36 bytes (table 5.4) with its checksum, then `body`."""
    size = HEADER_SIZE + len(body)
    makers = (OEM_ID, OEM_TABLE_ID, REVISION, CREATOR_ID, REVISION)
    raw = bytearray(struct.pack("<4sIBB6s8sI4sI", signature, size, revision, 0, *makers) + body)
    raw[9] = checksum(raw)
    return bytes(raw)


def rsdp(rsdt: int, xsdt: int) -> bytes:
    """The root pointer of ACPI 2.0 and later (table 5.3); its first 20 bytes are that of ACPI 1.0."""
    raw = bytearray(struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, OEM_ID, 2, rsdt, 36, xsdt, 0))
    raw[8] = checksum(raw[:20])
    raw[32] = checksum(raw)
    return bytes(raw)


def _register(port: int) -> bytes:
    """A one-byte I/O port as a Generic Address Structure (table 5.1)."""
    return struct.pack("<BBBBQ", 1, 8, 0, 1, port)


def fadt(config: AcpiConfig, dsdt_address: int) -> bytes:
    """The hardware-reduced FADT (tables 5.9, 4.1): sleep and reset registers instead of fixed hardware."""
    boot = LEGACY_DEVICES | NO_VGA | (HAS_8042 if config.keyboard else 0) | (0 if config.rtc else NO_CMOS_RTC)
    flags = WBINVD | PROC_C1 | PWR_BUTTON | SLP_BUTTON | RESET_REG_SUP | HEADLESS | HW_REDUCED_ACPI
    body = bytearray(276 - HEADER_SIZE)

    def put(offset: int, code: str, *values: int | bytes) -> None:
        struct.pack_into("<" + code, body, offset - HEADER_SIZE, *values)

    put(40, "I", dsdt_address)
    put(109, "H", boot)
    put(112, "I", flags)
    put(116, "12s", _register(config.reset_port))
    put(128, "B", RESET_VALUE)
    put(131, "B", 5)  # FADT minor version: ACPI 6.5
    put(140, "Q", dsdt_address)
    put(244, "12s", _register(config.sleep_port))
    put(256, "12s", _register(config.sleep_port + 1))
    put(268, "8s", b"KVM     ")
    return table(b"FACP", 6, bytes(body))


def madt(config: AcpiConfig) -> bytes:
    """Processors, IOAPIC, interrupt overrides and the NMI line (5.2.12). A processor's UID is its index."""
    body = struct.pack("<II", layout.LAPIC, PCAT_COMPAT)
    enabled = 1
    for uid, apic_id in enumerate(config.apic_ids):
        # A local APIC entry holds 8 bits, and 255 is the broadcast id (5.2.12.12).
        if apic_id < 255 and uid < 255:
            body += struct.pack("<BBBBI", 0, 8, uid, apic_id, enabled)
        else:
            body += struct.pack("<BBHIII", 9, 16, 0, apic_id, enabled, uid)
    body += struct.pack("<BBBBII", 1, 12, config.ioapic_id, 0, layout.IOAPIC, 0)
    for o in config.overrides:
        body += struct.pack("<BBBBIH", 2, 10, 0, o.irq, o.gsi, o.flags)
    # NMIs arrive at LINT1 of every processor.
    body += struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1)
    if any(apic_id >= 255 for apic_id in config.apic_ids):
        body += struct.pack("<BBHIB3x", 0xA, 12, 0, 0xFFFF_FFFF, 1)
    return table(b"APIC", 5, body)


def mcfg(pci: PciHost) -> bytes:
    """Where PCI configuration space is in memory (PCI Firmware Specification 3.2, 4.1.2)."""
    return table(b"MCFG", 1, struct.pack("<8xQHBBI", pci.ecam, 0, 0, pci.buses - 1, 0))
