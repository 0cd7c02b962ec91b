# SPDX-License-Identifier: Apache-2.0
"""Stock guests from Debian's packages: real kernels and firmware to try kvmpy on, without root.

    guest = kvmpy.guests.get("debian-6.1")       # downloads once, then comes from the cache
    Machine(kernel=guest.kernel, initrd=guest.initrd, cmdline=guest.cmdline)

    guest = kvmpy.guests.find("debian-6.1")      # the cache only: a Guest or None

Nothing of this is part of kvmpy: each guest keeps its own licence, see `guest.json` beside its files.
"""

from __future__ import annotations

from kvmpy.guests import initramfs
from kvmpy.guests.errors import GuestUnavailableError, PackageError
from kvmpy.guests.guest import Guest, Origin, verify
from kvmpy.guests.init import EXIT_STATUS, READY, parameters
from kvmpy.guests.network import DHCP
from kvmpy.guests.recipes import RECIPES, Recipe
from kvmpy.guests.store import cache_directory, find, get, remove

NAMES = tuple(RECIPES)

__all__ = [
    "DHCP",
    "EXIT_STATUS",
    "NAMES",
    "READY",
    "RECIPES",
    "Guest",
    "GuestUnavailableError",
    "Origin",
    "PackageError",
    "Recipe",
    "cache_directory",
    "find",
    "get",
    "initramfs",
    "parameters",
    "remove",
    "verify",
]
