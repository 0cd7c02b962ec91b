# SPDX-License-Identifier: Apache-2.0
"""What commands share: text for terminals (colours only where they are wanted, columns that fit), a quick start."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator
from typing import TextIO

CODES = {"bold": "1", "red": "31", "green": "32", "yellow": "33", "dim": "2"}


def wants_colour(stream: TextIO) -> bool:
    """Colours for terminals only, and never with NO_COLOR set (no-color.org) or a dumb terminal."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, colour: str, stream: TextIO) -> str:
    """`text` in a colour of CODES, or as it is where colours are not wanted."""
    return f"\x1b[{CODES[colour]}m{text}\x1b[0m" if wants_colour(stream) else text


def width(stream: TextIO) -> int:
    """Columns to fill: the terminal's, at most 120; 100 for files and pipes."""
    return max(60, min(120, shutil.get_terminal_size((100, 24)).columns)) if stream.isatty() else 100


def fill(text: str, indent: int, columns: int) -> str:
    """Wrap text; lines after the first are indented by `indent` columns."""
    wrapped = textwrap.wrap(text, max(20, columns - indent), break_long_words=False, break_on_hyphens=False)
    return ("\n" + " " * indent).join(wrapped)


def tell(message: str) -> None:
    """A line for the user on stderr, marked with the program's name."""
    print(f"kvmpy: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """For start-up, whose objects stay: looking through them for garbage took a seventh of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
