# SPDX-License-Identifier: Apache-2.0
"""Who made a bridge or a table of nftables: its name or alias says so, and whether that process is still there.

A tap goes with its descriptor, also when the process is killed. Bridges and tables stay; the next kvmpy removes
those whose maker is gone.
"""

from __future__ import annotations

import os
from pathlib import Path

PROC = Path("/proc")


def _start_time(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat, clock ticks since boot: with it a process number is unique. None: no such process."""
    try:
        stat = (PROC / str(pid) / "stat").read_text("utf-8", "replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the name before it may hold anything
    return None if fields[0] in "ZX" else int(fields[19])


def _place() -> int:
    """The process namespace: numbers of another one say nothing here."""
    return (PROC / "self/ns/pid").stat().st_ino


def mark() -> str:
    """This process as a word of letters, digits and underscores."""
    pid = os.getpid()
    return f"{pid}_{_start_time(pid)}_{_place()}"


def is_gone(word: str) -> bool:
    """Has the process of a `mark()` ended? False when that cannot be known."""
    parts = word.split("_")
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        return False
    pid, start, place = map(int, parts)
    return place == _place() and _start_time(pid) != start
