# SPDX-License-Identifier: Apache-2.0
"""A stock Debian kernel mounts shared folders, and drives disks over packed rings and several queues."""

import errno
import hashlib
import random
import re
import subprocess

import pytest

from kvmpy import Drive, Machine, guests
from kvmpy.block import create_disk, open_disk
from kvmpy.chardev import Console
from kvmpy.guests.init import parameters
from kvmpy.virtio import Blk
from kvmpy.virtio import features as f

pytestmark = pytest.mark.guest
ENGINES = pytest.mark.parametrize("backend", ["tcg", pytest.param("kvm", marks=pytest.mark.slow)], indirect=True)
BOTH = pytest.mark.parametrize("transport", ["mmio", pytest.param("pci", marks=pytest.mark.slow)])

FILES = """mkdir /m /ro; mount -t virtiofs data /m || exit 9; mount -t virtiofs safe /ro || exit 8
md5sum < /m/big; cat /m/dir/hello; ls -l /m | wc -l
cp /m/big /m/copy; echo from the guest > /m/dir/reply; chmod 600 /m/dir/reply
mkdir -p /m/x/y/z; mv /m/dir/hello /m/x/y/z/
ln -s ../../secret /m/escape; cat /m/escape && echo ESCAPED; cat /m/../secret && echo ESCAPED
dd if=/m/big of=/m/tail bs=4096 skip=100 count=50 2> /dev/null; rm /m/gone
i=0; while [ $i -lt 60 ]; do echo $i > /m/x/$i; i=$((i+1)); done; rm /m/x/1?; ls /m/x | wc -l
echo 3 > /proc/sys/vm/drop_caches; md5sum < /m/copy
echo no > /ro/new 2> /dev/null && echo WROTE; rm -f /ro/kept 2> /dev/null; cat /ro/kept
df /m | tail -1 | grep -c data; umount /m && umount /ro && echo all-well"""

PACKED = """dmesg | grep -c "Packed Virtio Ring" ; dd if=/dev/vda of=/dev/null bs=64k 2> /dev/null
dd if=/dev/urandom of=/tmp/data bs=4096 count=256 2> /dev/null
dd if=/tmp/data of=/dev/vda bs=4096 conv=fsync 2> /dev/null
for n in 1 2 3 4; do dd if=/dev/vda of=/dev/null bs=4096 skip=$n count=200 iflag=direct 2> /dev/null & done; wait
echo 3 > /proc/sys/vm/drop_caches; md5sum < /tmp/data; dd if=/dev/vda bs=4096 count=256 2> /dev/null | md5sum
ls /sys/block/vda/mq | wc -l"""


@pytest.fixture
def guest():
    guest = guests.find("debian-6.1")
    if guest is None:
        pytest.skip("debian-6.1 is not in the cache: kvmpy guest get debian-6.1")
    return guest


def run(guest, backend, commands, modules, **options):
    """What the guest printed, and the counters of its devices."""
    console = Console()
    with Machine(
        kernel=guest.kernel,
        initrd=guest.initrd_modules,
        memory="256M",
        backend=backend,
        decompress=True,
        console=console,
        cmdline="console=ttyS0 nokaslr quiet " + parameters(commands, modules=("virtio_mmio", "virtio_pci", *modules)),
        **options,
    ) as machine:
        outcome = machine.wait(timeout=300)
        stats = machine.stats()["virtio"]
    assert outcome.reason == "poweroff", console.transcript[-2000:]
    return console.transcript.replace("\r", ""), stats


@ENGINES
@BOTH
def test_linux_works_in_shared_folders(guest, transport, backend, tmp_path):
    data = random.Random(9).randbytes(3_000_000)
    folder, safe = tmp_path / "share", tmp_path / "safe"
    (folder / "dir").mkdir(parents=True)
    safe.mkdir()
    (tmp_path / "secret").write_text("ESCAPED")
    (folder / "big").write_bytes(data)
    (folder / "gone").touch()
    (folder / "dir" / "hello").write_text("from the host\n")
    (safe / "kept").write_text("kept as it was\n")
    shares = [f"{folder},tag=data", f"{safe},tag=safe,readonly=on"]
    text, stats = run(guest, backend, FILES, ["virtiofs"], shares=shares, transport=transport)
    digest = hashlib.md5(data).hexdigest()
    assert text.count(digest) == 2 and "from the host" in text and "kept as it was" in text
    assert "all-well" in text and "ESCAPED" not in text and "WROTE" not in text
    assert re.search(r"^51$", text, re.M), "60 files and a folder, without ten of them"
    assert (folder / "copy").read_bytes() == data
    assert (folder / "tail").read_bytes() == data[409600 : 409600 + 204800]
    reply = folder / "dir" / "reply"
    assert reply.read_text() == "from the guest\n" and reply.stat().st_mode & 0o777 == 0o600
    assert (folder / "x" / "y" / "z" / "hello").read_text() == "from the host\n"
    assert not (folder / "gone").exists() and (folder / "escape").is_symlink()
    assert [path.name for path in safe.iterdir()] == ["kept"]
    assert stats["share0"]["written_bytes"] > 3_000_000 and stats["share0"]["open_files"] == 0


@ENGINES
@BOTH
def test_linux_drives_packed_rings_and_several_queues(guest, transport, backend, tmp_path):
    create_disk(tmp_path / "disk", "qcow2", 8 << 20)
    with open_disk(tmp_path / "disk", "qcow2") as disk:

        def packed(memory):
            device = Blk(disk, name="packed", queues=2)
            device.offer(f.RING_PACKED)
            return device

        text, stats = run(guest, backend, PACKED, ["virtio_blk"], cpus=2, virtio=[packed], transport=transport)
        first, second = re.findall(r"^([0-9a-f]{32})  -$", text, re.M)
        assert first == second == hashlib.md5(disk.pread(0, 1 << 20)).hexdigest()
    assert re.search(r"^2$", text, re.M), "two queues"
    assert stats["packed"]["errors"] == 0 and all(queue[0] > 0 for queue in stats["packed"]["queues"])


@ENGINES
@BOTH
def test_a_full_host_disk_is_an_io_error_and_an_event(guest, transport, backend, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "kvmpy-test", small]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    errors = []
    try:
        create_disk(small / "disk", "qcow2", 64 << 20)
        drive = Drive(small / "disk", "qcow2", on_error=errors.append)
        commands = """dd if=/dev/urandom of=/dev/vda bs=64k count=128 oflag=direct; echo "dd: $?"
dd if=/dev/vda of=/dev/null bs=64k count=16 iflag=direct 2> /dev/null && echo still-readable
dd if=/dev/zero of=/dev/vda bs=512 count=1 conv=fsync 2> /dev/null && echo still-flushed"""
        options = {"disks": [drive], "transport": transport}
        text, stats = run(guest, backend, commands, ["virtio_blk"], **options)
        assert "I/O error" in text and "dd: 1" in text and "still-readable" in text
        assert "still-flushed" in text, "what was accepted needs no more room"
        assert errors and set(errors) == {errno.ENOSPC} and stats["blk0"]["errors"] > 0
        if subprocess.run(["qemu-img", "--version"], capture_output=True, check=False).returncode == 0:
            words = ["qemu-img", "check", "-f", "qcow2", small / "disk"]
            check = subprocess.run(words, capture_output=True, check=False)
            assert check.returncode in (0, 3), check.stdout  # 3: clusters leaked, nothing else
    finally:
        subprocess.run(["umount", small], check=True)
