# SPDX-License-Identifier: Apache-2.0
"""libkrun's kernel: no ACPI, no PCI, no 8250, no initramfs; drivers built in, devices named on the command line."""

import shutil
import subprocess

import pytest

from kvmpy import Machine, guests
from kvmpy.chardev import Console, Null

pytestmark = pytest.mark.guest

INIT = """#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox cat /proc/cmdline /proc/interrupts
echo "uptime $(/bin/busybox cut -d. -f1 /proc/uptime)"
/bin/busybox seq 100000 > /numbers
/bin/busybox sync
/bin/busybox mount -o remount,ro /
/bin/busybox reboot -f
"""


def test_a_disk_and_hvc0_without_acpi(tmp_path):
    kernel, busybox = guests.find("libkrunfw"), guests.find("busybox")
    if kernel is None or busybox is None:
        pytest.skip("libkrunfw or busybox is not in the cache: kvmpy guest get libkrunfw; kvmpy guest get busybox")
    if shutil.which("mke2fs") is None or shutil.which("debugfs") is None:
        pytest.skip("mke2fs and debugfs (Debian package e2fsprogs) are not installed")
    root = tmp_path / "root"
    for name in ("bin", "sbin", "dev", "proc"):
        (root / name).mkdir(parents=True)
    shutil.copy(busybox.file("program"), root / "bin/busybox")
    (root / "sbin/init").write_text(INIT)
    (root / "sbin/init").chmod(0o755)
    disk = tmp_path / "disk"
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", root, disk, "16M"], check=True)
    console = Console()
    with Machine(
        kernel=kernel.kernel,
        memory="256M",
        backend="tcg",
        acpi=False,
        console=Null(),
        hvc=console,
        cmdline=f"{kernel.cmdline} root=/dev/vda rootfstype=ext4 rw",
        disks=[f"{disk},format=raw"],
        rng=True,
    ) as machine:
        outcome = machine.wait(timeout=120)
    assert outcome.reason == "reset", console.transcript[-2000:]
    assert "virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6" in console.transcript
    assert "virtio2" in console.transcript, "three devices, each with an interrupt"
    subprocess.run(["e2fsck", "-f", "-n", disk], check=True, capture_output=True)
    numbers = subprocess.run(["debugfs", "-R", "cat /numbers", disk], check=True, capture_output=True).stdout
    assert numbers == b"".join(b"%d\n" % number for number in range(1, 100001))
