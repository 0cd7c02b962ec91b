# SPDX-License-Identifier: Apache-2.0
"""The address map of a kvmpy machine: every magic address, with the reason for it.

    0x0000_0000  RAM (below 640 KiB: boot structures)      0xC000_0000  end of low RAM, start of the hole
    0x000A_0000  VGA hole, option ROMs, BIOS shadow         0xD000_0000  virtio-mmio devices
    0x0010_0000  RAM: the kernel                            0xE000_0000  PCI ECAM (256 MiB = 256 buses)
                                                            0xFEC0_0000  chips, TSS, BIOS ROM
    0x1_0000_0000  RAM above 4 GiB
"""

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

# Memory. The 1 GiB hole below 4 GiB holds every device window.
LOW_RAM_END = 0xC000_0000
HIGH_RAM_START = 0x1_0000_0000

# Below 1 MiB, for direct kernel boot.
GDT = 0x0500            # four descriptors; linux drops them at once
IDT = 0x0520            # an empty one
ZERO_PAGE = 0x7000      # struct boot_params (one page)
PVH_START_INFO = 0x6000
MULTIBOOT_INFO = 0x6000
BOOT_STACK = 0x8FF0
PAGE_TABLES = 0x9000    # PML4, PDPT, four PDs of 2 MiB pages: the first 4 GiB mapped one to one
CMDLINE = 0x2_0000      # up to 64 KiB
EBDA = 0x9_FC00         # the last KiB of low memory; its first word is its size in KiB
EBDA_SIZE = 0x400
MPTABLE = 0x9_FC00
VGA_START = 0xA_0000
ACPI_TABLES = 0xE_0000  # RSDP on a 16-byte boundary in 0xE_0000..0xF_FFFF (ACPI 6.5, 5.2.5.1)
ACPI_TABLES_END = 0xF_0000
BIOS_AREA = 0xF_0000    # where an MP table goes that is too large for the EBDA
BIOS_AREA_END = 0x10_0000
KERNEL = 0x10_0000

# Device windows.
VIRTIO_MMIO = 0xD000_0000
VIRTIO_MMIO_SIZE = 0x1000
PCI_ECAM = 0xE000_0000
PCI_MMIO_START = 0xC000_0000
PCI_MMIO_END = 0xD000_0000
IOAPIC = 0xFEC0_0000
LAPIC = 0xFEE0_0000
TESTDEV_MEMORY = 0xFF00_0000
KVM_IDENTITY_MAP = 0xFEFF_C000  # one page; KVM needs it for real mode on old Intel CPUs
KVM_TSS = 0xFEFF_D000           # three pages, likewise
RESET_VECTOR = 0xFFFF_FFF0

# Ports.
PORT_RTC = 0x70
PORT_POST = 0x80
PORT_KEYBOARD = 0x60
PORT_SYSTEM_CONTROL = 0x92
PORT_DEBUG_EXIT = 0xF4
PORT_TESTDEV_LATCH = 0xE0
PORT_TESTDEV_FLUSH = 0xE4
PORT_TESTDEV_BYTES = 0xE8
PORT_TESTDEV_LINES = 0x2000
PORT_DEBUGCON = 0xE9
PORT_SEABIOS_DEBUG = 0x402
PORT_COM = (0x3F8, 0x2F8, 0x3E8, 0x2E8)
PORT_FW_CFG = 0x510
PORT_ACPI = 0x600         # sleep control, sleep status
PORT_ACPI_EVENTS = 0x608  # the generic event device's register
PORT_PCI_ADDRESS = 0xCF8
PORT_PCI_DATA = 0xCFC
PORT_RESET = 0xCF9

# Interrupts (GSI = pin of the IOAPIC; below 16 also ISA IRQ).
IRQ_COM = (4, 3, 4, 3)
IRQ_KEYBOARD = 1
IRQ_RTC = 8
IRQ_SCI = 9
IOAPIC_PINS = 24
IRQ_PCI = (16, 17, 18, 19)  # INTA to INTD of slot 0
IRQ_VIRTIO = (5, 6, 7, 10, 11, *range(16, 24))  # of virtio-mmio devices, in this order
