# SPDX-License-Identifier: Apache-2.0
"""The files by which SeaBIOS is configured through fw_cfg (SeaBIOS docs/Runtime_config.md).

    etc/e820          the memory map; without it SeaBIOS asks the RTC
    etc/sercon-port   the port of the UART that becomes the text console
    floppyimg/NAME    a floppy drive in memory, not in every build (Debian: bios.bin, bios-256k.bin)
"""

from __future__ import annotations

from collections.abc import Iterable
from struct import Struct

from kvmpy.devices.fw_cfg import KEY_MAX_CPUS, KEY_NB_CPUS, FwCfg

E820 = Struct("<QQI")    # address, size, type

SECTOR = 512
# Heads x tracks x sectors of the formats that SeaBIOS knows: 160K to 2.88M.
FLOPPY_SECTORS = tuple(
    heads * tracks * sectors
    for heads, tracks, sectors in (
        (1, 40, 8), (1, 40, 9), (2, 40, 8), (2, 40, 9), (2, 80, 9), (2, 80, 15), (2, 80, 18), (2, 80, 36),
    )
)
FLOPPY_SIZES = tuple(SECTOR * sectors for sectors in FLOPPY_SECTORS)
FLOPPY_1440K, FLOPPY_2880K = FLOPPY_SIZES[-2:]


def add_processors(fw_cfg: FwCfg, count: int) -> None:
    """Say how many processors there are. SeaBIOS waits until it has seen so many."""
    fw_cfg.add_u16(KEY_NB_CPUS, count)
    fw_cfg.add_u16(KEY_MAX_CPUS, count)


def add_memory_map(fw_cfg: FwCfg, entries: Iterable[tuple[int, int, int]]) -> None:
    """Give the memory map: (address, size, type) with sizes in bytes and types as in E820 (1 is RAM)."""
    fw_cfg.add_file("etc/e820", b"".join(E820.pack(*entry) for entry in entries))


def add_serial_console(fw_cfg: FwCfg, port: int) -> None:
    """Put the text console on the UART at `port`."""
    fw_cfg.add_file("etc/sercon-port", port.to_bytes(2, "little"))


def add_floppy(fw_cfg: FwCfg, image: bytes, name: str = "image") -> None:
    """Put `image` into a floppy drive in memory, from which SeaBIOS boots. ValueError: it is too big."""
    fw_cfg.add_file(f"floppyimg/{name}", whole_floppy(image))


def whole_floppy(image: bytes) -> bytes:
    """`image` with zeros up to the size of a floppy: SeaBIOS refuses any other size without a word.

    An image that is not as long as one of the formats is taken for the beginning of a 1.44 MB one, or of a
    2.88 MB one. Raises ValueError when it is longer than that.
    """
    if len(image) in FLOPPY_SIZES:
        return image
    if len(image) > FLOPPY_2880K:
        raise ValueError(f"a floppy has at most {FLOPPY_2880K} bytes, this image has {len(image)}")
    return image.ljust(FLOPPY_1440K if len(image) <= FLOPPY_1440K else FLOPPY_2880K, b"\0")
