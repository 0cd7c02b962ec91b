# SPDX-License-Identifier: Apache-2.0
"""libkrun's kernel: no ACPI, no PCI, no 8250, no initramfs; drivers built in, devices named on the command line."""

import hashlib
import http.server
import re
import shutil
import subprocess
import threading

import pytest

from kvmpy import Machine, guests
from kvmpy.block import create_disk
from kvmpy.chardev import Console, Null
from kvmpy.cli import main
from kvmpy.net import UserNet

pytestmark = pytest.mark.guest
ENGINES = pytest.mark.parametrize("backend", ["tcg", pytest.param("kvm", marks=pytest.mark.slow)], indirect=True)

INIT = """#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox cat /proc/cmdline /proc/interrupts
echo "uptime $(/bin/busybox cut -d. -f1 /proc/uptime)"
/bin/busybox seq 100000 > /numbers
/bin/busybox sync
/bin/busybox mount -o remount,ro /
/bin/busybox reboot -f
"""


TRIAL = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/sbin:/bin:/usr/sbin:/usr/bin
mount -t proc proc /proc; mount -t devtmpfs dev /dev; mount -t tmpfs tmp /tmp
mkfs.ext4 -q /dev/vdb && mkdir /tmp/m && mount -t ext4 /dev/vdb /tmp/m
dd if=/dev/urandom of=/tmp/m/data bs=4096 count=300 2> /dev/null; umount /tmp/m
fsck.ext4 -f -n /dev/vdb > /dev/null && echo fsck-clean
mount -t ext4 /dev/vdb /tmp/m; md5sum < /tmp/m/data; umount /tmp/m
head -c 32 /dev/hwrng | wc -c
ip addr add 10.0.2.15/24 dev eth0; ip link set eth0 up
until ping -c 1 10.0.2.2 > /dev/null; do sleep 0.2; done; ping -c 2 10.0.2.2
wget -q -O - http://10.0.2.2/ | md5sum
sync; reboot -f
"""
CONTENT = bytes(range(256)) * 8192


class Page(http.server.BaseHTTPRequestHandler):
    """A server of the host."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT)

    def log_message(self, *words):
        pass


def root_image(folder, init, *archives):
    """An ext4 root file system with busybox, this init, and initramfs archives unpacked; its path."""
    busybox = guests.find("busybox")
    if guests.find("libkrunfw") is None or busybox is None:
        pytest.skip("libkrunfw or busybox is not in the cache: kvmpy guest get libkrunfw; kvmpy guest get busybox")
    if shutil.which("mke2fs") is None or shutil.which("debugfs") is None:
        pytest.skip("mke2fs and debugfs (Debian package e2fsprogs) are not installed")
    root = folder / "root"
    for name in ("bin", "sbin", "dev", "proc", "tmp"):
        (root / name).mkdir(parents=True)
    for archive in archives:
        if shutil.which("cpio") is None:
            pytest.skip("cpio is not installed")
        unpacked = subprocess.run(["gzip", "-dc", archive], capture_output=True, check=True).stdout
        subprocess.run(["cpio", "-idu", "--quiet"], input=unpacked, cwd=root, check=True)
    shutil.copy(busybox.file("program"), root / "bin/busybox")
    (root / "sbin/init").write_text(init)
    (root / "sbin/init").chmod(0o755)
    disk = folder / "disk"
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", root, disk, "32M"], check=True)
    return disk


def boot(backend, console, disks, words="", **options):
    """A machine without ACPI whose root is its first disk; hvc0 is `console`."""
    kernel = guests.find("libkrunfw")
    return Machine(
        kernel=kernel.kernel,
        memory="256M",
        backend=backend,
        acpi=False,
        console=Null(),
        hvc=console,
        cmdline=f"{kernel.cmdline} {words} root=/dev/vda rootfstype=ext4 rw",
        disks=disks,
        rng=True,
        **options,
    )


@ENGINES
def test_a_disk_and_hvc0_without_acpi(backend, tmp_path):
    disk = root_image(tmp_path, INIT)
    console = Console()
    with boot(backend, console, [f"{disk},format=raw"]) as machine:
        outcome = machine.wait(timeout=120)
    assert outcome.reason == "reset", console.transcript[-2000:]
    assert "virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6" in console.transcript
    assert "virtio2" in console.transcript, "three devices, each with an interrupt"
    subprocess.run(["e2fsck", "-f", "-n", disk], check=True, capture_output=True)
    numbers = subprocess.run(["debugfs", "-R", "cat /numbers", disk], check=True, capture_output=True).stdout
    assert numbers == b"".join(b"%d\n" % number for number in range(1, 100001))


@ENGINES
def test_file_systems_entropy_and_the_network(backend, tmp_path):
    """What Debian's kernels are asked to do, on qcow2 disks; everything comes by virtio-mmio without ACPI."""
    tools = guests.find("e2fsprogs")
    if tools is None:
        pytest.skip("e2fsprogs is not in the cache: kvmpy guest get e2fsprogs")
    raw = root_image(tmp_path, TRIAL, tools.initrd)
    root, disk = tmp_path / "root.qcow2", tmp_path / "disk.qcow2"
    assert main(["image", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(root)]) == 0
    create_disk(disk, "qcow2", 32 << 20)
    console = Console()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    host = threading.Thread(target=server.serve_forever, daemon=True)
    host.start()
    try:
        net = UserNet(guest_forwards=[f"tcp::80-127.0.0.1:{server.server_address[1]}"])
        disks = [f"{root},format=qcow2", f"{disk},format=qcow2"]
        with boot(backend, console, disks, "quiet", nets=[net]) as machine:
            outcome = machine.wait(timeout=200)
    finally:
        server.shutdown()
        host.join()
        server.server_close()
    text = console.transcript.replace("\r", "")
    assert outcome.reason == "reset", text[-2000:]
    assert "fsck-clean" in text and "2 packets received" in text and re.search("^32$", text, re.M), text[-2000:]
    written, fetched = re.findall("^([0-9a-f]{32})  -$", text, re.M)
    assert fetched == hashlib.md5(CONTENT).hexdigest()
    back = tmp_path / "back"
    assert main(["image", "convert", "-f", "qcow2", "-O", "raw", str(disk), str(back)]) == 0
    subprocess.run(["e2fsck", "-f", "-n", back], check=True, capture_output=True)
    data = subprocess.run(["debugfs", "-R", "cat /data", back], check=True, capture_output=True).stdout
    assert hashlib.md5(data).hexdigest() == written
