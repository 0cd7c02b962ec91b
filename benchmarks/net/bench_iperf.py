# SPDX-License-Identifier: Apache-2.0
"""TCP of a guest beside QEMU's, both on their software CPU: iperf3 over a tap and over the user-mode network.

    python benchmarks/net/bench_iperf.py [--rounds 3] [--seconds 4] [--guest debian-6.1] [--only tap|user] [--json]

Same kernel, same initramfs, 256 MiB, one processor, virtio-net-pci. The host's side is an iperf3 server: for the tap in
a network namespace (needs root), for the user-mode network on the host's loopback. QEMU's user-mode network is
libslirp. The median of the rounds, ours and QEMU's in turn; rates are what the receiver saw.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from kvmpy import Machine, guests
from kvmpy.chardev import Console
from kvmpy.guests import initramfs
from kvmpy.guests.init import parameters
from kvmpy.net import NetBackend, Tap, UserNet

SPACE = "kvmpybench"
HOST = {"tap": "192.168.77.1", "user": "10.0.2.2"}
GUEST = {"tap": "192.168.77.2/24", "user": "10.0.2.15/24"}
MODULES = ("virtio_pci", "virtio_net")


def root_with_iperf(guest: guests.Guest, out: Path) -> Path:
    """The guest's initramfs and a second archive behind it, with the host's iperf3 and its libraries."""
    program = shutil.which("iperf3")
    if program is None:
        raise SystemExit("no iperf3: install the package iperf3")
    text = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    entries: dict[str, initramfs.Source] = {"usr/bin/iperf3": initramfs.File(Path(program).read_bytes(), 0o755)}
    for name in re.findall(r"(/\S+) \(0x", text):
        entries[name.lstrip("/")] = initramfs.File(Path(name).read_bytes(), 0o755)
    target = out / "initrd.gz"
    target.write_bytes(guest.initrd_modules.read_bytes() + initramfs.build(entries))
    return target


def script(kind: str, port: int, seconds: int) -> str:
    run = f"iperf3 -c {HOST[kind]} -p {port} -t {seconds} -f m"
    return (
        f"ip addr add {GUEST[kind]} dev eth0; ip link set eth0 up; sleep 1\n"
        f"echo SEND; {run} | grep receiver; sleep 1; echo RECEIVE; {run} -R | grep receiver"
    )


def rates(text: str) -> tuple[float, float]:
    """Mbit/s from the guest and to it."""
    found = re.search(r"SEND.*?([\d.]+) Mbits/sec.*?RECEIVE.*?([\d.]+) Mbits/sec", text, re.S)
    if found is None:
        raise SystemExit(f"no rates in the guest's output:\n{text[-2000:]}")
    return float(found[1]), float(found[2])


def ours(kind: str, guest: guests.Guest, initrd: Path, port: int, seconds: int) -> tuple[float, float]:
    backend: NetBackend
    if kind == "tap":
        backend = Tap("guest0", namespace=SPACE, addresses=f"{HOST['tap']}/24")
    else:
        backend = UserNet(guest_forwards=[f"tcp::{port}-127.0.0.1:{port}"])
    cmdline = "console=ttyS0 nokaslr quiet " + parameters(script(kind, port, seconds), modules=MODULES)
    console = Console()
    machine = Machine(kernel=guest.kernel, initrd=initrd, memory="256M", backend="tcg", transport="pci",
                      nets=[backend], console=console, cmdline=cmdline)  # fmt: skip
    try:
        machine.run(timeout=180)
    finally:
        machine.close()
    return rates(console.transcript)


def qemus(kind: str, guest: guests.Guest, initrd: Path, port: int, seconds: int) -> tuple[float, float]:
    words = parameters(script(kind, port, seconds), modules=MODULES, reboot=True)
    command = [
        *("qemu-system-x86_64", "-M", "q35,accel=tcg", "-cpu", "max", "-m", "256", "-nodefaults", "-no-reboot"),
        *("-display", "none", "-serial", "stdio", "-kernel", str(guest.kernel), "-initrd", str(initrd)),
        *("-append", f"console=ttyS0 nokaslr quiet panic=-1 {words}", "-device", "virtio-net-pci,netdev=n"),
    ]
    if kind == "tap":
        inside = ["ip", "netns", "exec", SPACE]
        subprocess.run([*inside, "ip", "tuntap", "add", "guest0", "mode", "tap", "vnet_hdr"], check=True)
        subprocess.run([*inside, "ip", "addr", "add", f"{HOST['tap']}/24", "dev", "guest0"], check=True)
        subprocess.run([*inside, "ip", "link", "set", "guest0", "up"], check=True)
        command = [*inside, *command, "-netdev", "tap,id=n,ifname=guest0,script=no,downscript=no"]
    else:
        command += ["-netdev", "user,id=n"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=180, stdin=subprocess.DEVNULL, check=True
        )
    finally:
        if kind == "tap":
            subprocess.run([*inside, "ip", "link", "del", "guest0"], check=True)
    return rates(done.stdout)


@contextlib.contextmanager
def server(kind: str) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    inside = ["ip", "netns", "exec", SPACE] if kind == "tap" else []
    if kind == "tap":
        subprocess.run(["ip", "netns", "add", SPACE], check=True)
    process = subprocess.Popen([*inside, "iperf3", "-s", "-p", str(port)], stdout=subprocess.DEVNULL)
    try:
        time.sleep(0.5)
        yield port
    finally:
        process.kill()
        process.wait()
        if kind == "tap":
            subprocess.run(["ip", "netns", "del", SPACE], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=4)
    parser.add_argument("--guest", default="debian-6.1")
    parser.add_argument("--only", choices=("tap", "user"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    guest = guests.get(options.guest)
    rows = []
    with tempfile.TemporaryDirectory() as room:
        initrd = root_with_iperf(guest, Path(room))
        for kind in ("tap", "user"):
            if options.only not in (None, kind):
                continue
            with server(kind) as port:
                pairs = [
                    (
                        ours(kind, guest, initrd, port, options.seconds),
                        qemus(kind, guest, initrd, port, options.seconds),
                    )
                    for _ in range(options.rounds)
                ]
            for index, direction in enumerate(("guest to host", "host to guest")):
                mine = statistics.median(pair[0][index] for pair in pairs)
                theirs = statistics.median(pair[1][index] for pair in pairs)
                rows.append(
                    {"network": kind, "direction": direction, "kvmpy": mine, "qemu": theirs, "ratio": mine / theirs}
                )
    if options.json:
        print(json.dumps(rows, indent=1))
        return 0
    print("| network | direction | kvmpy, Mbit/s | QEMU, Mbit/s | ours / QEMU |\n|---|---|---|---|---|")
    for row in rows:
        print("| {network} | {direction} | {kvmpy:.0f} | {qemu:.0f} | {ratio:.2f} |".format(**row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
