# SPDX-License-Identifier: Apache-2.0
"""Devices as one word of a command line: "disk.qcow2,format=qcow2,readonly=on"."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

SWITCH = {"on": True, "off": False}


def split(text: str) -> tuple[str, dict[str, str]]:
    """The first word, and the "key=value" words behind it; a comma in a value is doubled (",,").

    "key" alone means "key=on". Raises ValueError for an option that is given twice or has no name.
    """
    # A comma ends a word unless it is one of a pair.
    first, *rest = [word.replace(",,", ",") for word in re.findall(r"(?:^|,)((?:[^,]|,,)*)", text)]
    options: dict[str, str] = {}
    for word in rest:
        key, equals, value = word.partition("=")
        if not key:
            raise ValueError(f"{text!r}: an option is KEY=VALUE, not {word!r}")
        if key in options:
            raise ValueError(f"{text!r}: {key} is given twice")
        options[key] = value if equals else "on"
    return first, options


def switch(text: str) -> bool:
    """True for "on", False for "off". Raises ValueError."""
    if text not in SWITCH:
        raise ValueError(f"it is on or off, not {text!r}")
    return SWITCH[text]


def convert(text: str, options: Mapping[str, str], known: Mapping[str, Callable[[str], Any]]) -> dict[str, Any]:
    """The options as values, each made by the function that `known` has for it. Raises ValueError."""
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"{text!r}: no option {', '.join(unknown)}; there are {', '.join(known)}")
    values = {}
    for key, value in options.items():
        try:
            values[key] = known[key](value)
        except ValueError as error:
            raise ValueError(f"{text!r}: {key}: {error}") from error
    return values
