# SPDX-License-Identifier: Apache-2.0
"""What kernels that are booted without a BIOS still look for below 1 MiB, and their command line."""

from __future__ import annotations

from kvmpy.arch import layout
from kvmpy.boot.space import Space
from kvmpy.errors import BootError

CMDLINE_MAX = 0xFFFF  # the 64 KiB of the address map without the NUL

# BIOS data area (the IBM PC's, kept by every BIOS since).
BDA = 0x400
BDA_EBDA_SEGMENT = 0x40E
BDA_BASE_MEMORY = 0x413  # KiB below the EBDA


def write_bios_data(space: Space) -> None:
    """Say in the BIOS data area where the EBDA is; where there is no RAM there, nothing is done.

    Kernels find the end of base memory, and an MP table or RSDP in the EBDA, by it.
    """
    if space.is_free(BDA, 0x100):
        space.claim(BDA, 0x100, "the BIOS data area")
        space.write(BDA_EBDA_SEGMENT, (layout.EBDA >> 4).to_bytes(2, "little"))
        space.write(BDA_BASE_MEMORY, (layout.EBDA >> 10).to_bytes(2, "little"))


def encode_cmdline(cmdline: str | bytes | None, limit: int = CMDLINE_MAX) -> bytes:
    """The command line as bytes without the NUL. Raises BootError when it is longer than `limit` bytes."""
    raw = cmdline.encode() if isinstance(cmdline, str) else bytes(cmdline or b"")
    if len(raw) > limit:
        raise BootError(f"the command line has {len(raw)} bytes; this kernel takes at most {limit}")
    if b"\0" in raw:
        raise BootError(f"the command line has a NUL character at byte {raw.index(0)}")
    return raw


def put_cmdline(space: Space, raw: bytes) -> int:
    """Place a command line and its NUL; returns its guest address."""
    at = space.near(layout.CMDLINE, len(raw) + 1, "the command line", limit=1 << 32)
    space.write(at, raw + b"\0")
    return at
