# SPDX-License-Identifier: Apache-2.0
"""Firmware: a ROM image that ends at 4 GiB, where the processor fetches its first instruction."""

from __future__ import annotations

from kvmpy.arch import entry as entries
from kvmpy.arch import layout
from kvmpy.arch.entry import Entry
from kvmpy.boot.image import Image
from kvmpy.boot.space import PAGE, Space, align_up
from kvmpy.errors import BootError
from kvmpy.memory import Ram

TOP = 1 << 32
LOW_TOP = 0x10_0000
SHADOW_MAX = 256 << 10  # SeaBIOS comes in 128 and 256 KiB and runs from this copy
ROM_MAX = 16 << 20  # down to 0xFF00_0000, above the pages that KVM needs for itself


def load_firmware(image: Image, space: Space) -> Entry:
    """Map a ROM image so that it ends at 4 GiB, read-only, and start at the reset vector 0xFFFF_FFF0.

    Its last 256 KiB are also copied to the end of the first MiB, where there is RAM: firmware jumps there
    with its first instruction, and chipsets shadow it there. An image that is no whole number of pages is
    filled up with 0xFF in front. Raises BootError, or what `GuestMemory.add` raises.
    """
    size = align_up(len(image.data), PAGE)
    if size > ROM_MAX:
        raise BootError(
            f"{image}: firmware of {len(image.data):#x} bytes; at most {ROM_MAX:#x} fit below 4 GiB"
        )
    if len(image.data) < TOP - layout.RESET_VECTOR:
        raise BootError(
            f"{image}: firmware of {len(image.data)} bytes does not reach down to the reset vector"
        )
    rom = image.data.rjust(size, b"\xff")
    shadow = rom[-SHADOW_MAX:]
    start = LOW_TOP - len(shadow)
    if any(a < LOW_TOP and start < a + n for a, n in space.ranges):
        space.claim(start, len(shadow), "the firmware's shadow")
        space.write(start, shadow)
    space.memory.add(TOP - size, Ram.from_bytes(rom), readonly=True, name="firmware")
    space.commit()
    return entries.reset()
