# SPDX-License-Identifier: Apache-2.0
"""What a directly booted guest is told of its machine: ACPI tables, MP table, CPUID."""

from __future__ import annotations

from collections.abc import Sequence

from kvmpy.arch import layout
from kvmpy.boot.acpi import AcpiConfig, PciHost, SerialPort, VirtioMmio, write_acpi
from kvmpy.boot.mptable import write_mptable
from kvmpy.machine.config import Config
from kvmpy.memory import GuestMemory


def write(
    config: Config, memory: GuestMemory, virtio_mmio: Sequence[VirtioMmio] = (), pci: PciHost | None = None
) -> int:
    """Write ACPI tables and an MP table for kernels without ACPI. Returns the RSDP's guest address."""
    processors = range(config.cpus)
    write_mptable(memory, processors)
    return write_acpi(
        memory,
        AcpiConfig(
            apic_ids=processors,
            serial=[SerialPort(layout.PORT_COM[0], layout.IRQ_COM[0])],
            keyboard=True,
            events=(layout.PORT_ACPI_EVENTS, layout.IRQ_SCI),
            virtio_mmio=virtio_mmio,
            pci=pci,
        ),
    )
