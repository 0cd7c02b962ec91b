# SPDX-License-Identifier: Apache-2.0
"""Linux: bzImage by the 64-bit boot protocol (32-bit for i386 kernels), and a plain vmlinux the same way.

Source: the kernel's Documentation/arch/x86/boot.rst ("The Linux/x86 Boot Protocol"), zero-page.rst and
arch/x86/include/uapi/asm/bootparam.h. Field names are theirs.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

from kvmpy.arch import layout
from kvmpy.arch.entry import Entry
from kvmpy.boot.e820 import E820Entry
from kvmpy.boot.elf import Elf, load_segments
from kvmpy.boot.flat import MAPPED, enter_long, enter_protected
from kvmpy.boot.image import Image, describe
from kvmpy.boot.lowmem import CMDLINE_MAX, encode_cmdline, put_cmdline, write_bios_data
from kvmpy.boot.space import Space, align_up
from kvmpy.boot.structs import Layout
from kvmpy.errors import BootError

SETUP_HEADER = Layout(
    "setup_header",
    "u8 setup_sects; u16 root_flags; u32 syssize; u16 ram_size; u16 vid_mode; u16 root_dev; u16 boot_flag;"
    "u16 jump; u32 header; u16 version; u32 realmode_swtch; u16 start_sys_seg; u16 kernel_version;"
    "u8 type_of_loader; u8 loadflags; u16 setup_move_size; u32 code32_start; u32 ramdisk_image;"
    "u32 ramdisk_size; u32 bootsect_kludge; u16 heap_end_ptr; u8 ext_loader_ver; u8 ext_loader_type;"
    "u32 cmd_line_ptr; u32 initrd_addr_max; u32 kernel_alignment; u8 relocatable_kernel; u8 min_alignment;"
    "u16 xloadflags; u32 cmdline_size; u32 hardware_subarch; u64 hardware_subarch_data; u32 payload_offset;"
    "u32 payload_length; u64 setup_data; u64 pref_address; u32 init_size; u32 handover_offset;"
    "u32 kernel_info_offset",
)
HEADER_AT = 0x1F1
HDRS = 0x5372_6448  # "HdrS"
BOOT_FLAG = 0xAA55
SECTOR = 512

# loadflags and xloadflags.
KASLR_FLAG = 1 << 1  # loadflags: set by whoever moved the kernel
LOADED_HIGH = 1 << 0
XLF_KERNEL_64 = 1 << 0
XLF_CAN_BE_LOADED_ABOVE_4G = 1 << 1

LOADER_UNDEFINED = 0xFF  # type_of_loader: no assigned id
VID_MODE_NORMAL = 0xFFFF
OLDEST = 0x0206  # 2.06, Linux 2.6.22: says how long a command line may be
HAS_PAYLOAD = 0x0208
HAS_INIT_SIZE = 0x020A
HAS_XLOADFLAGS = 0x020C
ENTRY_64 = 0x200  # the 64-bit entry, from the start of the protected-mode kernel

# struct boot_params, outside its setup_header.
ACPI_RSDP_ADDR = 0x070
EXT_RAMDISK_IMAGE = 0x0C0
EXT_RAMDISK_SIZE = 0x0C4
EXT_CMD_LINE_PTR = 0x0C8
E820_ENTRIES = 0x1E8
HEADER_END_MAX = 0x290
E820_TABLE = 0x2D0
E820_MAX = 128
BOOT_PARAMS_SIZE = 0x1000

CODE, DATA = 0x10, 0x18  # __BOOT_CS and __BOOT_DS


class BzImage(NamedTuple):
    """A checked bzImage: its header, the raw header bytes for the zero page, the protected-mode kernel."""

    image: Image
    header: Any
    raw_header: bytes
    kernel: memoryview

    @property
    def is_64bit(self) -> bool:
        """Whether it has the 64-bit entry point."""
        return self.header.version >= HAS_XLOADFLAGS and bool(self.header.xloadflags & XLF_KERNEL_64)

    @property
    def cmdline_size(self) -> int:
        """The longest command line in bytes, without the NUL."""
        return min(int(self.header.cmdline_size), CMDLINE_MAX)

    @property
    def version_text(self) -> str:
        """The kernel's own version text, or "" when there is none."""
        start = self.header.kernel_version + 0x200
        if not self.header.kernel_version or start >= len(self.image.data) - len(self.kernel):
            return ""
        text = self.image.data[start : start + 256].split(b"\0")[0]
        return "".join(c if c.isprintable() else "?" for c in text.decode("ascii", "replace"))


def is_bzimage(data: bytes) -> bool:
    """Whether the file has a Linux setup header ("HdrS")."""
    return data[0x202:0x206] == HDRS.to_bytes(4, "little") and data[0x1FE:0x200] == b"\x55\xaa"


def parse_bzimage(image: Image) -> BzImage:
    """Check the setup header of a bzImage. Raises BootError with what is wrong."""
    data = image.data
    if not is_bzimage(data):
        raise BootError(f"{image}: no Linux kernel (no HdrS at 0x202) but {describe(data)}")
    # Old headers are shorter; what follows them in the file is code, and no field of it is used.
    header = SETUP_HEADER.unpack(
        data[: HEADER_AT + SETUP_HEADER.size].ljust(HEADER_END_MAX, b"\0"), HEADER_AT, str(image)
    )
    version = f"{header.version >> 8}.{header.version & 0xFF:02}"
    if header.version < OLDEST:
        raise BootError(f"{image}: boot protocol {version}; 2.06 (Linux 2.6.22) or later is needed")
    if not header.loadflags & LOADED_HIGH:
        raise BootError(f"{image}: a zImage, loaded low; only bzImage kernels can be started")
    setup_size = ((header.setup_sects or 4) + 1) * SECTOR
    kernel = memoryview(data)[setup_size:]
    # Signatures may follow, so the file may be longer than it says; syssize is rounded up to 16 bytes.
    if header.syssize == 0 or len(kernel) + 15 < header.syssize * 16:
        raise BootError(
            f"{image}: truncated: the header promises {setup_size} bytes of setup and "
            f"{header.syssize * 16} of kernel, the file has {len(data)}"
        )
    end = min(0x202 + data[0x201], HEADER_END_MAX, setup_size)
    return BzImage(image, header, data[HEADER_AT:end], kernel)


def load_bzimage(
    kernel: BzImage,
    space: Space,
    *,
    memory_map: list[E820Entry],
    cmdline: str | bytes | None = None,
    initrd: Image | None = None,
    rsdp: int = 0,
) -> Entry:
    """Place a bzImage, its zero page, command line and initrd. Raises BootError.

    The kernel goes to its preferred address, or above it when that is taken and the kernel is relocatable.
    RSI (ESI) points to `struct boot_params`.
    """
    line = encode_cmdline(cmdline, kernel.cmdline_size)
    start = _place_kernel(kernel, space)
    space.write(start, kernel.kernel)
    if kernel.is_64bit:
        entry = enter_long(space, start + ENTRY_64, {"rsi": layout.ZERO_PAGE}, code=CODE, data=DATA)
    else:
        entry = enter_protected(space, start, {"rsi": layout.ZERO_PAGE}, code=CODE, data=DATA)
    _finish(kernel, space, start, memory_map, line, initrd, rsdp)
    return entry


def load_vmlinux(
    elf: Elf,
    space: Space,
    *,
    memory_map: list[E820Entry],
    header: BzImage | None = None,
    cmdline: str | bytes | None = None,
    initrd: Image | None = None,
    rsdp: int = 0,
    moved: bool = False,
) -> Entry:
    """Place a 64-bit vmlinux and start it as its own decompressor would: 64-bit mode, RSI = boot_params.

    `header` is the bzImage that it was unpacked from, if any; `moved`: its virtual address is random, and the kernel
    shall choose its other addresses at random too. Raises BootError.
    """
    if elf.bits != 64:
        raise BootError(f"{elf.image}: a 32-bit vmlinux can only be started from its bzImage")
    line = encode_cmdline(cmdline, header.cmdline_size if header else 2047)
    load_segments(elf, space)
    entry = enter_long(space, elf.physical_entry, {"rsi": layout.ZERO_PAGE}, code=CODE, data=DATA)
    _finish(header or _no_header(elf.image), space, elf.start, memory_map, line, initrd, rsdp, moved=moved)
    return entry


def _no_header(image: Image) -> BzImage:
    """The header of a kernel that has none: what Linux checks in it, and no limit of its own."""
    raw = SETUP_HEADER.pack(
        boot_flag=BOOT_FLAG,
        header=HDRS,
        version=0x020F,
        loadflags=LOADED_HIGH,
        initrd_addr_max=0x7FFF_FFFF,
        kernel_alignment=0x20_0000,
        xloadflags=XLF_KERNEL_64 | XLF_CAN_BE_LOADED_ABOVE_4G,
        cmdline_size=2047,
    )
    return BzImage(image, SETUP_HEADER.unpack(raw, 0, str(image)), raw, memoryview(b""))


def _place_kernel(kernel: BzImage, space: Space) -> int:
    """Claim the memory that the kernel needs until it is unpacked and running; returns the load address."""
    header, what = kernel.header, str(kernel.image)
    size = len(kernel.kernel)
    preferred, alignment = layout.KERNEL, header.kernel_alignment
    if header.version >= HAS_INIT_SIZE:
        size = max(size, header.init_size)
        preferred = header.pref_address
    if preferred + size > MAPPED:
        raise BootError(f"{what} wants [{preferred:#_x}, {preferred + size:#_x}), which ends above 4 GiB")
    if not header.relocatable_kernel:
        return space.claim(preferred, size, what)
    if alignment == 0 or alignment & (alignment - 1):
        raise BootError(f"{what}: kernel_alignment {alignment:#x} is not a power of two")
    start = align_up(preferred, alignment)
    if space.is_free(start, size):
        return space.claim(start, size, what)
    # Never below the preferred address: the kernel would move itself up to it, into memory nobody checked.
    return space.lowest(size, what, start=start, limit=1 << 32, align=alignment)


def _finish(
    kernel: BzImage,
    space: Space,
    start: int,
    memory_map: list[E820Entry],
    line: bytes,
    initrd: Image | None,
    rsdp: int,
    *,
    moved: bool = False,
) -> None:
    """Place the initrd, the command line and the zero page that names them."""
    space.claim(layout.ZERO_PAGE, BOOT_PARAMS_SIZE, "the zero page")
    write_bios_data(space)
    line_at = put_cmdline(space, line)
    initrd_at, initrd_size = 0, 0
    if initrd is not None:
        initrd_at, initrd_size = _place_initrd(kernel, space, initrd), len(initrd.data)
        space.write(initrd_at, initrd.data)

    page = bytearray(BOOT_PARAMS_SIZE)
    page[HEADER_AT : HEADER_AT + len(kernel.raw_header)] = kernel.raw_header

    def put(field: str, value: int, code: str = "<I") -> None:
        struct.pack_into(code, page, HEADER_AT + SETUP_HEADER.offsets[field], value)

    put("type_of_loader", LOADER_UNDEFINED, "<B")
    put("loadflags", kernel.header.loadflags & ~KASLR_FLAG | (KASLR_FLAG if moved else 0), "<B")
    put("vid_mode", VID_MODE_NORMAL, "<H")
    put("code32_start", start & 0xFFFF_FFFF)
    put("cmd_line_ptr", line_at & 0xFFFF_FFFF)
    put("ramdisk_image", initrd_at & 0xFFFF_FFFF)
    put("ramdisk_size", initrd_size & 0xFFFF_FFFF)
    if kernel.header.version >= 0x0209:
        put("setup_data", 0, "<Q")
    if kernel.header.version >= 0x0207:
        put("hardware_subarch", 0)  # a PC
    struct.pack_into("<I", page, EXT_CMD_LINE_PTR, line_at >> 32)
    struct.pack_into("<I", page, EXT_RAMDISK_IMAGE, initrd_at >> 32)
    struct.pack_into("<I", page, EXT_RAMDISK_SIZE, initrd_size >> 32)
    struct.pack_into("<Q", page, ACPI_RSDP_ADDR, rsdp)
    if len(memory_map) > E820_MAX:
        raise BootError(f"guest memory has {len(memory_map)} ranges; the zero page holds {E820_MAX}")
    page[E820_ENTRIES] = len(memory_map)
    for index, e in enumerate(memory_map):
        struct.pack_into("<QQI", page, E820_TABLE + 20 * index, e.start, e.size, e.type)
    space.write(layout.ZERO_PAGE, bytes(page))


def _place_initrd(kernel: BzImage, space: Space, initrd: Image) -> int:
    """Claim the highest place that the kernel can reach; returns its address."""
    header = kernel.header
    limit = min(header.initrd_addr_max + 1, layout.LOW_RAM_END)
    size = len(initrd.data)
    above_4g = header.version >= HAS_XLOADFLAGS and header.xloadflags & XLF_CAN_BE_LOADED_ABOVE_4G
    try:
        return space.highest(size, str(initrd), start=layout.KERNEL, limit=limit)
    except BootError:
        if not (above_4g and kernel.is_64bit):
            raise
    return space.highest(size, str(initrd), start=layout.KERNEL)
