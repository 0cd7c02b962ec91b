# SPDX-License-Identifier: Apache-2.0
"""Running the `kvmpy` command as a user does."""

from __future__ import annotations

import os
import subprocess
import sys

# Small guests in 16-bit real mode, loaded at 0x1000.
#                          mov dx,3f8; mov al,'4'; out dx,al; mov al,\n; out dx,al
PRINT_FOUR = bytes.fromhex("baf803 b034 ee b00a ee")
#                          mov dx,600; mov al,(5<<2)|(1<<5); out dx,al; jmp $
POWER_OFF = bytes.fromhex("ba0006 b034 ee ebfe")
#                          mov ax,21; out f4,ax; jmp $    -> status (21 << 1) | 1
DEBUG_EXIT = bytes.fromhex("b81500 e7f4 ebfe")
#                          mov dx,cf9; mov al,6; out dx,al; jmp $
RESET = bytes.fromhex("baf90c b006 ee ebfe")
#                          jmp $
SPIN = bytes.fromhex("ebfe")

# 32-bit: the same, then ud2 without an interrupt table, which is a triple fault.
PRINT_FOUR_32 = b"\x66" + PRINT_FOUR
TRIPLE_FAULT_32 = bytes.fromhex("0f0b")

# again: mov dx,3fd; in al,dx; test al,1; jz again;
#        mov dx,3f8; in al,dx; cmp al,'q'; je off; out dx,al; jmp again; off: power off
ECHO = bytes.fromhex("bafd03 ec a801 74f8 baf803 ec 3c71 7403 ee ebed") + POWER_OFF


def kvmpy(*words: str | os.PathLike[str], timeout: float = 120, **options):
    """Run the command; the finished process, with text output."""
    return subprocess.run(
        [sys.executable, "-m", "kvmpy", *map(str, words)], check=False,
        capture_output=True, text=True, timeout=timeout, **({"stdin": subprocess.DEVNULL} | options),
    )  # fmt: skip
