# SPDX-License-Identifier: Apache-2.0
"""`kvmpy guest`: stock kernels and firmware from Debian's packages."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from kvmpy import guests
from kvmpy.cli import status
from kvmpy.cli.text import fill, paint, tell, width

ABSENT = "(not here)"

EPILOG = """\
examples:
  kvmpy guest list
  kvmpy guest get debian-6.1 seabios grub-floppy
  kvmpy guest get debian-6.1 --deb linux-image-6.1.0-37-cloud-amd64.deb --deb busybox-static.deb
  kvmpy guest path debian-6.1               the directory
  kvmpy guest path debian-6.1 kernel        one file of it

Guests are kept in $KVMPY_CACHE, else $XDG_CACHE_HOME/kvmpy, else ~/.cache/kvmpy. Getting one needs apt and a
Debian mirror (the host's own sources are used where there are any), but no root and nothing is installed.
"""


def add_parser(commands: Any) -> None:
    """Add `guest` to the command line."""
    parser = commands.add_parser(
        "guest",
        help="get stock kernels and firmware, list them, find their files",
        description="Stock guests from Debian's packages: kernels with an initramfs, BIOSes, boot floppies.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    get = actions.add_parser("get", help="get guests, from the cache or from Debian", allow_abbrev=False)
    every = ", ".join(guests.NAMES)
    get.add_argument("names", nargs="+", metavar="NAME", choices=guests.NAMES, help=every)
    get.add_argument("--deb", action="append", default=[], metavar="FILE", help="a package given by hand")
    get.add_argument("--update", action="store_true", help="look for a newer version")
    get.add_argument("--mirror", metavar="URL", help="a Debian archive to use instead of the host's")
    get.add_argument("-q", "--quiet", action="store_true", help="no progress on stderr")
    get.set_defaults(function=_get)

    listing = actions.add_parser("list", help="list them, and which are in the cache", allow_abbrev=False)
    listing.add_argument("--json", action="store_true", help="print one JSON object")
    listing.set_defaults(function=_list)

    path = actions.add_parser("path", help="print where a guest's files are", allow_abbrev=False)
    path.add_argument("name", metavar="NAME", choices=guests.NAMES)
    path.add_argument("role", nargs="?", metavar="FILE", help="kernel, initrd, bios, floppy, ...")
    path.set_defaults(function=_path)

    remove = actions.add_parser("remove", help="remove guests from the cache", allow_abbrev=False)
    remove.add_argument("names", nargs="+", metavar="NAME", choices=guests.NAMES)
    remove.set_defaults(function=_remove)


def _get(options: argparse.Namespace) -> int:
    if options.deb and len(options.names) > 1:
        tell("--deb is for one guest at a time")
        return status.USAGE
    for path in options.deb:
        if not Path(path).is_file():
            tell(f"{path}: there is no such file")
            return status.USAGE
    for name in options.names:
        progress = (lambda line: None) if options.quiet else tell
        guest = guests.get(
            name, debs=options.deb, update=options.update, mirror=options.mirror, progress=progress
        )
        print(f"{guest.name} {guest.version} {guest.directory}")
    return status.OK


def _list(options: argparse.Namespace) -> int:
    found = {name: guests.find(name) for name in guests.NAMES}
    if options.json:
        print(json.dumps({name: _as_dict(name, guest) for name, guest in found.items()}, indent=2))
        return status.OK
    names = max(map(len, found))
    versions = max(len(guest.version) if guest else len(ABSENT) for guest in found.values())
    for name, guest in found.items():
        version = f"{guest.version if guest else ABSENT:<{versions}}"
        state = paint(version, "green" if guest else "dim", sys.stdout)
        summary = fill(guests.RECIPES[name].summary, names + versions + 4, width(sys.stdout))
        print(f"{name:<{names}}  {state}  {summary}")
    return status.OK


def _as_dict(name: str, guest: guests.Guest | None) -> dict[str, Any]:
    entry: dict[str, Any] = {"summary": guests.RECIPES[name].summary, "cached": guest is not None}
    if guest is not None:
        entry |= {
            "version": guest.version,
            "directory": str(guest.directory),
            "cmdline": guest.cmdline,
            "files": {role: str(path) for role, path in guest.files.items()},
            "licences": {origin.package: origin.licence for origin in guest.packages},
        }
    return entry


def _path(options: argparse.Namespace) -> int:
    guest = guests.find(options.name)
    if guest is None:
        tell(f"guest {options.name} is not in the cache; get it with: kvmpy guest get {options.name}")
        return status.UNAVAILABLE
    if options.role is None:
        print(guest.directory)
        return status.OK
    try:
        print(guest.file(options.role))
    except LookupError as error:
        tell(str(error))
        return status.USAGE
    return status.OK


def _remove(options: argparse.Namespace) -> int:
    for name in options.names:
        print(f"{name} {'removed' if guests.remove(name) else 'was not there'}")
    return status.OK
