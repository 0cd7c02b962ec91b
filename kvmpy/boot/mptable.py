# SPDX-License-Identifier: Apache-2.0
"""The MP table: processors and interrupts for systems without ACPI (Intel MultiProcessor Spec. 1.4)."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from kvmpy.arch import layout
from kvmpy.errors import BootError
from kvmpy.memory import GuestMemory

SPEC_REVISION = 4  # 1.4
OEM_ID = b"KVMPY   "
PRODUCT_ID = b"KVMPYVM     "
APIC_VERSION = 0x14  # integrated local APIC; the IOAPIC's register says 0x11
IOAPIC_VERSION = 0x11
ISA_INTERRUPTS = 16
BROADCAST = 0xFF

PROCESSOR_SIZE = 20
TABLES_SIZE = 16 + 44 + 8 + 8 + 15 * 8 + 2 * 8  # all but the processors

# Entry types (4.3).
PROCESSOR, BUS, IOAPIC, IO_INTERRUPT, LOCAL_INTERRUPT = range(5)
CPU_ENABLED, CPU_BOOT = 1, 2
INT, NMI, SMI, EXTINT = range(4)


def write_mptable(
    memory: GuestMemory,
    apic_ids: Sequence[int] = (0,),
    *,
    address: int | None = None,
    ioapic_id: int | None = None,
    signature: int = 0,
    features: int = 0,
) -> int:
    """Write the floating pointer and the configuration table; returns their guest address.

    apic_ids: of all processors, the first one boots; 8 bits each. address: where systems look (4), that is a
    16-byte boundary in the EBDA or in 0xF_0000..0xF_FFFF; default: the EBDA when the table fits there, else
    0xF_0000. ioapic_id: default the first free id. signature, features: CPUID leaf 1, EAX and EDX. Raises
    BootError when it does not fit.
    """
    if address is None:
        small = TABLES_SIZE + len(apic_ids) * PROCESSOR_SIZE <= layout.EBDA_SIZE
        address = layout.MPTABLE if small else layout.BIOS_AREA
    table = build_mptable(
        apic_ids, address=address, ioapic_id=ioapic_id, signature=signature, features=features
    )
    in_ebda = layout.EBDA <= address < layout.EBDA + layout.EBDA_SIZE
    limit = layout.EBDA + layout.EBDA_SIZE if in_ebda else layout.BIOS_AREA_END
    if address + len(table) > limit:
        raise BootError(
            f"the MP table of {len(apic_ids)} processors has {len(table)} bytes; "
            f"{limit - address} fit from {address:#_x}"
        )
    memory.write(address, table)
    return address


def build_mptable(
    apic_ids: Sequence[int],
    *,
    address: int = layout.MPTABLE,
    ioapic_id: int | None = None,
    signature: int = 0,
    features: int = 0,
) -> bytes:
    """The floating pointer (4.1) and, right after it, the configuration table (4.2, 4.3) for `address`."""
    if address % 16:
        raise ValueError(f"the MP floating pointer lies on a 16-byte boundary, not at {address:#x}")
    ids = list(apic_ids)
    if not ids or len(set(ids)) != len(ids) or not all(0 <= i < BROADCAST for i in ids):
        raise ValueError(f"the MP table takes different 8-bit APIC ids below {BROADCAST}, not {ids}")
    if ioapic_id is None:
        ioapic_id = next(i for i in range(BROADCAST + 1) if i not in ids and i > min(ids))
    entries = [
        struct.pack(
            "<BBBBII8x",
            PROCESSOR,
            apic_id,
            APIC_VERSION,
            CPU_ENABLED | (CPU_BOOT if index == 0 else 0),
            signature,
            features,
        )
        for index, apic_id in enumerate(ids)
    ]
    entries.append(struct.pack("<BB6s", BUS, 0, b"ISA   "))
    entries.append(struct.pack("<BBBBI", IOAPIC, ioapic_id, IOAPIC_VERSION, 1, layout.IOAPIC))
    # IRQ 2 is the cascade of the 8259s and reaches no pin. Polarity and trigger: as the bus has them.
    entries += [
        struct.pack("<BBHBBBB", IO_INTERRUPT, INT, 0, 0, irq, ioapic_id, irq)
        for irq in range(ISA_INTERRUPTS)
        if irq != 2
    ]
    # LINT0 has the 8259, LINT1 the NMI line, on every processor.
    entries.append(struct.pack("<BBHBBBB", LOCAL_INTERRUPT, EXTINT, 0, 0, 0, BROADCAST, 0))
    entries.append(struct.pack("<BBHBBBB", LOCAL_INTERRUPT, NMI, 0, 0, 0, BROADCAST, 1))
    body = b"".join(entries)
    table = bytearray(
        struct.pack(
            "<4sHBB8s12sIHHIHBB",
            b"PCMP",
            44 + len(body),
            SPEC_REVISION,
            0,
            OEM_ID,
            PRODUCT_ID,
            0,
            0,
            len(entries),
            layout.LAPIC,
            0,
            0,
            0,
        )
        + body
    )
    table[7] = -sum(table) & 0xFF
    # Feature byte 1 is 0: the configuration table counts. Feature byte 2: no IMCR, virtual wire mode.
    pointer = bytearray(struct.pack("<4sIBBB5x", b"_MP_", address + 16, 1, SPEC_REVISION, 0))
    pointer[10] = -sum(pointer) & 0xFF
    return bytes(pointer + table)
