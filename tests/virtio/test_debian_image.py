# SPDX-License-Identifier: Apache-2.0
"""A Debian system from the project's own script: systemd to a login prompt, a login, a clean shutdown."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvmpy import Machine, guests

pytestmark = [pytest.mark.guest, pytest.mark.slow]

TOOL = Path(__file__).resolve().parents[2] / "tools/debian_image.py"
BOOT = 300  # seconds; a busy host needs a good part of them


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    if shutil.which("mmdebstrap") is None:
        pytest.skip("mmdebstrap (Debian package mmdebstrap) is not installed")
    path = tmp_path_factory.mktemp("debian") / "debian.qcow2"
    done = subprocess.run([sys.executable, TOOL, path], capture_output=True, text=True, timeout=1800, check=False)
    if "apt-get update" in done.stderr:
        pytest.skip(f"the archive cannot be had: {done.stderr.strip()[-300:]}")
    assert done.returncode == 0, done.stderr[-2000:]
    return path


@pytest.mark.parametrize("transport", ["pci", "mmio"])
def test_systemd_starts_it_to_a_login_prompt(image, transport, backend, tmp_path):
    guest = guests.find("debian-6.1")
    if guest is None:
        pytest.skip("debian-6.1 is not in the cache: kvmpy guest get debian-6.1")
    disk = tmp_path / "disk.qcow2"
    shutil.copy(image, disk)
    with Machine(
        kernel=guest.kernel,
        initrd=guest.initrd_modules,
        memory="1G",
        backend=backend,
        decompress=True,
        cmdline=f"{guest.cmdline} root=/dev/vda quiet",
        disks=[f"{disk},format=qcow2"],
        transport=transport,
        rng=True,
    ) as machine:
        machine.console.expect("kvmpy login:", timeout=BOOT)
        machine.console.send_line("root")
        machine.console.expect("root@kvmpy:~#", timeout=BOOT)
        machine.console.send_line("systemctl is-system-running --wait; findmnt -no SOURCE,FSTYPE,OPTIONS /")
        machine.console.expect(re.compile(r"/dev/vda +ext4 +rw,"), timeout=BOOT)
        assert "running" in machine.console.transcript
        machine.console.send_line("date +%s > /root/now; systemctl poweroff")
        assert machine.wait(timeout=BOOT).reason == "poweroff"
    raw = tmp_path / "raw"
    convert = ["image", "convert", "-f", "qcow2", "-O", "raw", disk, raw]
    subprocess.run([sys.executable, "-m", "kvmpy", *convert], check=True)
    assert subprocess.run(["e2fsck", "-f", "-n", raw], capture_output=True, check=False).returncode == 0
    now = subprocess.run(["debugfs", "-R", "cat /root/now", raw], capture_output=True, check=True).stdout
    assert now.strip().isdigit()
