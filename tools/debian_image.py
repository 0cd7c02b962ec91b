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
import subprocess
import sys
import tempfile
from pathlib import Path

from kvmpy.block import convert, create_disk, open_disk
from kvmpy.guests import sources
from kvmpy.machine import parse_size

PACKAGES = ("systemd-sysv", "udev", "dbus", "iproute2", "kmod")
CHUNK = 1 << 20
# Run by mmdebstrap with the new system's root as $1. What they say goes to stderr: stdout is the file system.
SETTINGS = """\
exec >&2
passwd -R "$1" -d root
echo 'kvmpy' > "$1/etc/hostname"
echo '/dev/vda / ext4 errors=remount-ro,discard 0 1' > "$1/etc/fstab"
rm -f "$1/etc/machine-id" && touch "$1/etc/machine-id"
"""
FILE_SYSTEM = """\
set -e
mkdir "$TMPDIR/root"
mount --bind "$1" "$TMPDIR/root"  # without what is mounted in it
trap 'umount "$TMPDIR/root"' EXIT
mke2fs -q -t ext4 -L root -E root_owner=0:0 -d "$TMPDIR/root" "$TMPDIR/root.img" {kib}k >&2
cat "$TMPDIR/root.img"
"""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--format", default="qcow2", choices=("raw", "qcow2", "vdi", "vmdk"))
    parser.add_argument("--suite", default="bookworm")
    parser.add_argument("--size", default="2G", type=parse_size, help="of the disk (default 2G)")
    parser.add_argument("--include", default="", help="more packages, joined by commas")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.output.absolute().parent, prefix=".debian-") as work:
        raw = Path(work, "root.img")
        bootstrap(raw, options.suite, options.size, [*PACKAGES, *filter(None, options.include.split(","))])
        create_disk(options.output, options.format, options.size)
        with open_disk(raw, "raw", readonly=True) as source, open_disk(options.output, options.format) as target:
            convert(source, target)
    print(f"{options.output}: {options.suite} in {options.output.stat().st_blocks * 512 >> 20} MiB", file=sys.stderr)
    return 0


def bootstrap(raw: Path, suite: str, size: int, packages: list[str]) -> None:
    """Write an ext4 file system of `size` bytes with the system to `raw`."""
    hooks = (SETTINGS, FILE_SYSTEM.format(kib=size >> 10))
    command = ["mmdebstrap", "--quiet", "--variant=minbase", "--format=null", f"--include={','.join(packages)}"]
    command += [f"--customize-hook={hook}" for hook in hooks]
    command += [suite, "-", sources.find().mirror]
    environment = os.environ | {"SOURCE_DATE_EPOCH": os.environ.get("SOURCE_DATE_EPOCH", "0")}
    with raw.open("wb") as out, subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        while chunk := process.stdout.read(CHUNK):
            if chunk.count(0) == len(chunk):
                out.seek(len(chunk), os.SEEK_CUR)  # a hole
            else:
                out.write(chunk)
        out.truncate()
    if process.returncode or raw.stat().st_size != size:
        raise SystemExit(f"mmdebstrap failed with status {process.returncode}, {raw.stat().st_size} bytes")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
