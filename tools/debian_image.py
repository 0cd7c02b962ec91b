#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make a disk image with a Debian system that systemd starts up to a login prompt on the serial console.

Usage: debian_image.py OUTPUT [--format qcow2] [--suite bookworm] [--size 2G] [--include PACKAGE[,PACKAGE...]]

    tools/debian_image.py debian.qcow2 --include openssh-server
    kvmpy run debian-6.1 --memory 1G --disk debian.qcow2,format=qcow2 --append root=/dev/vda

root has no password. The system has no kernel: it starts with one of kvmpy's stock guests. Needs mmdebstrap and
e2fsprogs (Debian packages), not root: mmdebstrap then works in a user namespace.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from kvmpy.block import convert, create_disk, open_disk
from kvmpy.guests import sources
from kvmpy.machine import parse_size

PACKAGES = ("systemd-sysv", "udev", "dbus", "iproute2", "kmod")
# Run by mmdebstrap with the new system's root as $1, perhaps in a user namespace.
SETTINGS = (
    'passwd -R "$1" -d root',
    'echo kvmpy > "$1/etc/hostname"',
    'echo "/dev/vda / ext4 errors=remount-ro,discard 0 1" > "$1/etc/fstab"',
    'rm -f "$1/etc/machine-id" && touch "$1/etc/machine-id"',
    'rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/*',
)
FILE_SYSTEM = (
    "set -e",
    "work=$(mktemp -d)",
    'trap "umount $work; rmdir $work" EXIT',
    'mount --bind "$1" $work',  # without what is mounted in it
    "mke2fs -q -F -t ext4 -L root -E root_owner=0:0 -d $work {output}",
)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--format", default="qcow2", choices=("raw", "qcow2", "vdi", "vmdk"))
    parser.add_argument("--suite", default="bookworm")
    parser.add_argument("--size", default="2G", type=parse_size, help="of the disk (default 2G)")
    parser.add_argument("--include", default="", help="more packages, joined by commas")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="kvmpy-debian-") as work:
        Path(work).chmod(0o711)  # in a user namespace mmdebstrap is somebody else
        raw = Path(work, "root.img")
        bootstrap(raw, options.suite, options.size, [*PACKAGES, *filter(None, options.include.split(","))])
        create_disk(options.output, options.format, options.size)
        with open_disk(raw, "raw", readonly=True) as source, open_disk(options.output, options.format) as target:
            convert(source, target)
    print(f"{options.output}: {options.suite} in {options.output.stat().st_blocks * 512 >> 20} MiB", file=sys.stderr)
    return 0


def bootstrap(raw: Path, suite: str, size: int, packages: list[str]) -> None:
    """Write an ext4 file system of `size` bytes with the system to `raw`."""
    raw.touch()
    raw.chmod(0o666)
    os.truncate(raw, size)
    hooks = ("; ".join(SETTINGS), "; ".join(FILE_SYSTEM).format(output=shlex.quote(str(raw))))
    command = ["mmdebstrap", "--quiet", "--variant=minbase", "--format=null", f"--include={','.join(packages)}"]
    command += [f"--customize-hook={hook}" for hook in hooks]
    done = subprocess.run([*command, suite, "-", sources.find().mirror], stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise SystemExit(f"mmdebstrap failed with status {done.returncode}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
