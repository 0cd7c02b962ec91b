# SPDX-License-Identifier: Apache-2.0
"""Stock Debian kernels drive the devices: their own modules, ACPI, interrupts by irqfd, kicks by ioeventfd."""

import contextlib
import io
import os
import random
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kvmpy import Drive, Machine, guests
from kvmpy.block import create_disk, open_disk
from kvmpy.block.hostfile import HostFile
from kvmpy.block.qcow2 import check
from kvmpy.chardev import Console
from kvmpy.cli import main
from kvmpy.guests.init import parameters
from kvmpy.net import PacketSocket
from kvmpy.virtio import Balloon, Port

pytestmark = pytest.mark.guest
ENGINES = pytest.mark.parametrize("backend", ["tcg", pytest.param("kvm", marks=pytest.mark.slow)], indirect=True)

MODULES = ("virtio_mmio", "virtio_pci", "virtio_blk", "virtio_net", "virtio_rng", "virtio_balloon", "virtio_console")
TRIAL = """cat /sys/block/vda/serial; echo; mkfs.ext4 -q /dev/vda && mkdir /m && mount /dev/vda /m
dd if=/dev/urandom of=/m/data bs=4096 count=300 2> /dev/null; umount /m; fsck.ext4 -f -n /dev/vda || exit 1
mount /dev/vda /m; md5sum < /m/data; umount /m
ip addr add 10.0.0.2/24 dev eth0; ip link set eth0 up; arping -c 3 -w 10 -f -I eth0 10.0.0.1
head -c 32 /dev/hwrng | wc -c; echo through-hvc0 > /dev/hvc0; echo through-the-port > /dev/vport2p1; sync"""


def answer_arp(sock: socket.socket) -> None:
    """The host at 10.0.0.1; ends when the guest's card is gone."""
    mac = bytes.fromhex("525400000001")
    while True:
        try:
            frame = sock.recv(65536)
        except OSError:
            return
        if not frame:
            return
        if frame[12:14] == b"\x08\x06" and frame[38:42] == bytes([10, 0, 0, 1]):
            reply = struct.pack("!HHBBH", 1, 0x800, 6, 4, 2) + mac + frame[38:42] + frame[22:32]
            sock.send(frame[6:12] + mac + b"\x08\x06" + reply)


@pytest.mark.parametrize("name", ["debian-6.1", pytest.param("debian-6.12", marks=pytest.mark.slow)])
@pytest.mark.parametrize("transport", ["mmio", "pci"])
def test_linux_uses_every_device(name, transport, backend, tmp_path):
    guest = guests.find(name)
    if guest is None:
        pytest.skip(f"{name} is not in the cache: kvmpy guest get {name}")
    tools = guests.find("e2fsprogs")
    if tools is None:
        pytest.skip("e2fsprogs is not in the cache: kvmpy guest get e2fsprogs")
    create_disk(tmp_path / "disk", "qcow2", 32 << 20)
    console, hvc, port = Console(), Console(), Console()
    wire, peer = PacketSocket.pair()
    host = threading.Thread(target=answer_arp, args=(peer,), daemon=True)
    host.start()
    with open_disk(tmp_path / "disk", "qcow2") as disk:
        with Machine(
            kernel=guest.kernel,
            initrd=io.BytesIO(guest.initrd_modules.read_bytes() + tools.initrd.read_bytes()),
            memory="256M",
            backend=backend,
            decompress=True,
            console=console,
            cmdline="console=ttyS0 nokaslr quiet " + parameters(TRIAL, modules=MODULES),
            disks=[Drive(disk, serial="kvmpy-disk")],
            nets=[wire],
            hvc=[Port(hvc, console=True), Port(port, "agent")],
            rng=True,
            balloon=True,
            transport=transport,
        ) as machine:
            outcome = machine.wait(timeout=300)
            stats = machine.stats()["virtio"]
        assert outcome.reason == "poweroff", console.transcript[-2000:]
        text = console.transcript
        assert "kvmpy-disk" in text and "exit status 0" in text
        assert "Received 1 response" in text
        assert re.search(r"^32\r?$", text, re.M), "entropy"
        digest = re.search(r"^([0-9a-f]{32})  -\r?$", text, re.M)[1]
        hvc.expect("through-hvc0", timeout=60)
        port.expect("through-the-port", timeout=60)
        assert stats["blk0"]["flushes"] > 0 and stats["blk0"]["errors"] == 0
    assert main(["image", "convert", "-f", "qcow2", "-O", "raw", f"{tmp_path}/disk", f"{tmp_path}/raw"]) == 0
    host.join(60)
    peer.close()
    if shutil.which("e2fsck") and shutil.which("debugfs"):
        subprocess.run(["e2fsck", "-f", "-n", tmp_path / "raw"], check=True, capture_output=True)
        data = subprocess.run(["debugfs", "-R", "cat /data", tmp_path / "raw"], check=True, capture_output=True).stdout
        assert subprocess.run(["md5sum"], input=data, capture_output=True, check=True).stdout.decode()[:32] == digest


@ENGINES
def test_the_example_with_disks(backend):
    if guests.find("debian-6.1") is None:
        pytest.skip("debian-6.1 is not in the cache: kvmpy guest get debian-6.1")
    example = Path(__file__).resolve().parents[2] / "examples/linux_disk.py"
    done = subprocess.run(
        [sys.executable, example, "pci"], env=os.environ | {"KVMPY_BACKEND": backend},
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    for promise in (
        f"{backend} engine, virtio-pci",
        "this disk is example, 131072 sectors",
        "read-only: hello, guest",
        "Operation not permitted",
        "the image has an ext file system: True",
    ):
        assert promise in done.stdout


@pytest.mark.slow
@ENGINES
def test_each_processor_has_its_queue_and_vector(backend, tmp_path):
    guest = guests.find("debian-6.12")
    if guest is None:
        pytest.skip("debian-6.12 is not in the cache: kvmpy guest get debian-6.12")
    create_disk(tmp_path / "disk", "raw", 8 << 20)
    trial = """for cpu in 0 1; do
taskset -c $cpu dd if=/dev/zero of=/dev/vda bs=64k count=32 oflag=direct 2> /dev/null
done
grep 'virtio0-req' /proc/interrupts"""
    with Machine(
        kernel=guest.kernel,
        initrd=guest.initrd_modules,
        memory="256M",
        cpus=2,
        backend=backend,
        decompress=True,
        cmdline="console=ttyS0 quiet " + parameters(trial),
        disks=[f"{tmp_path}/disk,format=raw,queues=2"],
        transport="pci",
    ) as machine:
        assert machine.wait(timeout=300).reason == "poweroff"
        text = machine.console.transcript
    lines = [line.split() for line in text.splitlines() if "virtio0-req." in line and "MSI" in line]
    counts = [[int(word) for word in words[1:3]] for words in lines]
    assert len(counts) == 2 and counts[0][0] > 0 and counts[1][1] > 0, text[-2000:]


@contextlib.contextmanager
def balloon_guest(run, backend, transport):
    """A Linux with a balloon runs commands: (machine, balloon, console)."""
    guest = guests.find("debian-6.1")
    if guest is None:
        pytest.skip("debian-6.1 is not in the cache: kvmpy guest get debian-6.1")
    console = Console()
    with Machine(
        kernel=guest.kernel,
        initrd=guest.initrd_modules,
        memory="256M",
        backend=backend,
        console=console,
        balloon=True,
        transport=transport,
        cmdline="console=ttyS0 quiet " + parameters(run, modules=("virtio_mmio", "virtio_pci", "virtio_balloon")),
    ) as machine:
        (balloon,) = (one for one in machine.virtio.devices if isinstance(one, Balloon))
        yield machine, balloon, console


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["mmio", "pci"])
@ENGINES
def test_a_balloon_takes_memory_and_gives_it_back_when_the_guest_has_none_left(transport, backend):
    run = """echo ready; read line; mkdir /t; mount -t tmpfs -o size=100% none /t
dd if=/dev/zero of=/t/file bs=1M count=150 && echo filled; read line"""
    with balloon_guest(run, backend, transport) as (machine, balloon, console):
        console.expect("ready", timeout=120)
        for size in (160 << 20, 32 << 20, 160 << 20):
            balloon.target = size
            wait_for(lambda size=size: balloon.actual == size)
        assert balloon.discarded >= 160 << 20
        asked = dict(balloon.statistics)
        balloon.request_statistics()
        wait_for(lambda: balloon.statistics != asked)
        assert 0 < balloon.statistics["free_memory"] < 96 << 20
        console.send_line("go")
        console.expect("filled", timeout=120)
        assert balloon.actual < 160 << 20, "it let some go"
        console.send_line("end")
        assert machine.wait(60).reason == "poweroff"


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["mmio", "pci"])
@ENGINES
def test_free_pages_are_reported_and_go_back_to_the_host(transport, backend):
    run = """mkdir /t; mount -t tmpfs -o size=100% none /t
echo ready; read line; dd if=/dev/zero of=/t/file bs=1M count=128 2> /dev/null; echo filled
read line; rm /t/file; echo freed; read line
dd if=/dev/urandom of=/t/file bs=1M count=100 2> /dev/null; md5sum < /t/file; md5sum < /t/file"""
    with balloon_guest(run, backend, transport) as (machine, balloon, console):
        console.expect("ready", timeout=120)
        console.send_line("fill")
        console.expect("filled", timeout=120)
        before, full = balloon.discarded, resident()
        console.send_line("free")
        console.expect("freed", timeout=60)
        wait_for(lambda: balloon.discarded >= before + (100 << 20))
        assert resident() < full - (80 << 20), "the host has them again"
        console.send_line("use them again")
        assert machine.wait(120).reason == "poweroff"
    first, second = re.findall("^([0-9a-f]{32})  -", console.transcript, re.M)
    assert first == second and balloon.refused == 0 and balloon.actual == 0


WRITER = """i=1; while true; do yes "n$i" | head -c 65536 > /block
dd if=/block of=/dev/vda bs=64k seek=$((i*37%16000)) conv=fsync 2> /dev/null; echo flushed $i; i=$((i+1)); done"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_what_a_guest_flushed_is_there_after_kill_9(seed, tmp_path):
    """Of `kvmpy run`, at a random moment of a guest's writes and flushes; test_crash.py does it without a guest."""
    if guests.find("debian-6.1") is None:
        pytest.skip("debian-6.1 is not in the cache: kvmpy guest get debian-6.1")
    choice = random.Random(seed)
    path = tmp_path / "disk"
    create_disk(path, "qcow2", 1 << 30)
    words = [sys.executable, "-m", "kvmpy", "run", "debian-6.1", "--disk", f"{path},format=qcow2", "--run", WRITER]
    environment = os.environ | {"KVMPY_BACKEND": "tcg"}
    with subprocess.Popen(words, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        text, wanted = b"", choice.randrange(5, 60)
        while text.count(b"\nflushed ") < wanted:
            part = os.read(process.stdout.fileno(), 65536)
            assert part, text[-2000:]
            text += part
        time.sleep(choice.random() * 0.2)
        process.kill()
        text += process.stdout.read()
    last = int(re.findall(rb"\nflushed (\d+)\r?\n", text)[-1])
    with HostFile.open(path) as file:
        result = check(file)
    assert not result.check_errors and not result.corruptions, result
    with open_disk(path, "qcow2") as disk:
        for number in range(1, last + 1):
            expected = (b"n%d\n" % number * 65536)[:65536]
            assert disk.pread(number * 37 % 16000 * 65536, 65536) == expected, f"{number} of {last}"


def resident():
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
