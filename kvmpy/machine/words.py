# SPDX-License-Identifier: Apache-2.0
"""Devices as one word of a command line: "disk.qcow2,format=qcow2,readonly=on"."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from kvmpy.arch.layout import GIB, KIB, MIB
from kvmpy.virtio import RateLimit

# bytes and operations (for a network card frames) per second; sizes may have K, M or G behind them
LIMITS = {
    "bps": "bytes_per_second",
    "iops": "operations_per_second",
    "bps_burst": "burst_bytes",
    "iops_burst": "burst_operations",
}
_UNITS = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": GIB << 10}
SWITCH = {"on": True, "off": False}


def split(text: str, many: Collection[str] = ()) -> tuple[str, dict[str, str]]:
    """The first word, and the "key=value" words behind it; a comma in a value is doubled (",,").

    "key" alone means "key=on". Options of `many` may be repeated; their values are lines then. Raises ValueError for
    an option that is given twice or has no name.
    """
    # A comma ends a word unless it is one of a pair.
    first, *rest = [word.replace(",,", ",") for word in re.findall(r"(?:^|,)((?:[^,]|,,)*)", text)]
    options: dict[str, str] = {}
    for word in rest:
        key, equals, value = word.partition("=")
        if not key:
            raise ValueError(f"{text!r}: an option is KEY=VALUE, not {word!r}")
        if key in options and key in many:
            options[key] += "\n" + value
            continue
        if key in options:
            raise ValueError(f"{text!r}: {key} is given twice")
        options[key] = value if equals else "on"
    return first, options


def parse_size(text: str | int) -> int:
    """Bytes from a number or "512M"-like text (K, M, G, T are powers of 1024). Raises ValueError."""
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*(\d+)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"a size is a number with K, M, G or T behind it, such as 512M, not {text!r}")
    return int(match[1]) * _UNITS[match[2].upper()]


def take_limit(text: str, options: dict[str, str]) -> RateLimit:
    """Take the options bps, iops, bps_burst and iops_burst, if they are there, out of `options`. Raises ValueError."""
    own = {key: options.pop(key) for key in LIMITS if key in options}
    values = convert(text, own, dict.fromkeys(LIMITS, parse_size))
    return RateLimit(**{LIMITS[key]: value for key, value in values.items()})


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
