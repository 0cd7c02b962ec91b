#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A disk between host and guest: Linux makes a file system on a qcow2 image, and the host sees what it wrote.

Usage: linux_disk.py [mmio|pci]; the guest's packages are fetched on first use, and cached.
"""

import sys
import tempfile
from pathlib import Path

from kvmpy import Drive, Machine, guests
from kvmpy.block import create_disk, open_disk
from kvmpy.chardev import Stdio

COMMAND = """\
mke2fs /dev/vda > /dev/null 2>&1 && mount -t ext4 /dev/vda /mnt && uname -sr > /mnt/kernel && umount /mnt
echo "this disk is $(cat /sys/block/vda/serial), $(cat /sys/block/vda/size) sectors, $(readlink /sys/block/vda/device)"
echo "the other is read-only: $(head -c 12 /dev/vdb); $(dd if=/dev/zero of=/dev/vdb count=1 2>&1 | head -1)"
"""


def main(transport: str = "mmio") -> int:
    guest = guests.get("debian-6.1", progress=lambda text: print(text, file=sys.stderr))
    with tempfile.TemporaryDirectory() as folder:
        image, notes = Path(folder, "disk.qcow2"), Path(folder, "notes.raw")
        create_disk(image, "qcow2", 64 << 20)
        notes.write_bytes(b"hello, guest".ljust(4096, b"\n"))
        machine = Machine(
            kernel=guest.kernel,
            initrd=guest.initrd_modules,  # with the drivers
            memory="256M",
            cmdline=f"{guest.cmdline} quiet {guests.parameters(COMMAND)}",
            console=Stdio(),
            disks=[Drive(image, format="qcow2", serial="example"), Drive(notes, readonly=True)],
            transport=transport,
        )
        print(f"{machine.backend} engine, virtio-{transport}\n")
        with machine:
            machine.wait()
            counts = machine.stats()["virtio"]["blk0"]
        print(f"\nrequests: {counts['requests']}, bytes written: {counts['written_bytes']}")
        with open_disk(image, "qcow2", readonly=True) as disk:
            magic = int.from_bytes(disk.pread(1024 + 56, 2), "little")  # ext2's superblock
            print(f"the image has an ext file system: {magic == 0xEF53}, and {image.stat().st_size >> 10} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
