# SPDX-License-Identifier: Apache-2.0
"""`kvmpy version`: kvmpy and what it stands on."""

from __future__ import annotations

import argparse
import json
import platform
from importlib import metadata
from typing import Any

from kvmpy._version import __version__
from kvmpy.cli import status

PACKAGES = ("cffi", "ioctl-opt", "pyroute2", "iced-x86")


def add_parser(commands: Any) -> None:
    """Add `version` to the command line."""
    parser = commands.add_parser(
        "version", help="print the versions of kvmpy and what it uses", description="Print versions."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(function=run)


def run(options: argparse.Namespace) -> int:
    """Print versions; one per line, or JSON."""
    versions: dict[str, str | None] = {
        "kvmpy": __version__,
        "python": platform.python_version(),
        "linux": platform.release(),
    }
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    if options.json:
        print(json.dumps(versions))
    else:
        for name, version in versions.items():
            print(f"{name:<10} {version or 'not installed'}")
    return status.OK
