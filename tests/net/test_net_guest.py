# SPDX-License-Identifier: Apache-2.0
"""Debian's kernels on our networks: DHCP, echo, HTTP both ways, iperf, two guests over a switch, QEMU as the peer."""

import contextlib
import hashlib
import http.server
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from kvmpy import Machine, Nic, guests
from kvmpy.chardev import Console
from kvmpy.errors import NetworkError
from kvmpy.guests import initramfs
from kvmpy.guests.init import parameters
from kvmpy.net import StreamSocket, Switch, Tap, UserNet

pytestmark = pytest.mark.guest

MODULES = ("virtio_mmio", "virtio_pci", "virtio_net")
ENGINES = pytest.mark.parametrize("backend", ["tcg", pytest.param("kvm", marks=pytest.mark.slow)], indirect=True)
BOTH = pytest.mark.parametrize("transport", ["pci", pytest.param("mmio", marks=pytest.mark.slow)])


@pytest.fixture
def linux(request):
    """Makes a machine with Debian's kernel, on the software CPU unless the test is about engines."""
    backend = request.getfixturevalue("backend") if "backend" in request.fixturenames else "tcg"
    guest = guests.find("debian-6.1")
    if guest is None:
        pytest.skip("debian-6.1 is not in the cache: kvmpy guest get debian-6.1")
    with contextlib.ExitStack() as stack:

        def make(run, nets, transport="pci", cpus=1, more=b""):
            machine = Machine(
                kernel=guest.kernel,
                initrd=io.BytesIO(guest.initrd_modules.read_bytes() + more),
                memory="256M",
                cpus=cpus,
                backend=backend,
                transport=transport,
                nets=nets,
                console=Console(),
                cmdline="console=ttyS0 nokaslr quiet " + parameters(run, modules=MODULES),
            )
            stack.callback(machine.close)
            return machine

        make.guest = guest
        yield make


class Files(http.server.BaseHTTPRequestHandler):
    """A server of the host."""

    content = bytes(range(256)) * 8192  # 2 MiB

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *words):
        pass


@contextlib.contextmanager
def web_server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


MD5 = hashlib.md5(Files.content).hexdigest()


def fetch(url, seconds=90):
    """A file of the guest's server, which may not be up yet."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=seconds) as answer:
                return answer.read()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def ended(machine):
    outcome = machine.wait(120)
    text = machine.console.transcript
    assert outcome.reason == "poweroff" and "exit status 0" in text, text[-3000:]
    return text


@ENGINES
@BOTH
def test_user_mode_network(linux, backend, transport):
    with (
        web_server() as port,
        UserNet(guest_forwards=[f"tcp::80-127.0.0.1:{port}"], host_forwards=["tcp::0-:8080"]) as net,
    ):
        run = guests.DHCP + (
            "ping -c 2 10.0.2.2 && wget -q -O /file http://10.0.2.2/ && md5sum /file || exit 1\n"
            "mkdir /www; cp /file /www/file; httpd -p 8080 -h /www\n"
            "while [ ! -e /www/cgi-bin/done ]; do read -t 1 answer && break; done"
        )
        machine = linux(run, [net], transport)
        machine.start()
        data = fetch(f"http://127.0.0.1:{net.forwards[0].port}/file")
        assert hashlib.md5(data).hexdigest() == MD5
        machine.console.send_line("enough")
        text = ended(machine)
        assert "2 packets received" in text and MD5 in text
        stats = machine.stats()
        assert stats["networks"]["net0"]["tcp_opened"] >= 2
        assert 'kvmpy_network_tcp_opened_total{device="net0"}' in stats.prometheus()


@ENGINES
@BOTH
def test_two_processors_use_two_queues_of_a_tap(linux, backend, namespace, transport):
    words = f"tap:guest0,netns={namespace.name},address=192.168.77.1/24,queues=2"
    run = (
        "ls -d /sys/class/net/eth0/queues/*\n"
        "ip addr add 192.168.77.2/24 dev eth0; ip link set eth0 up\n"
        "for cpu in 1 2; do taskset $cpu ping -c 3 192.168.77.1 || exit 1; done"
    )
    try:
        machine = linux(run, [words], transport, cpus=2)
    except NetworkError as error:
        pytest.skip(str(error))
    with machine:
        text = ended(machine)
        assert text.count("3 packets received") == 2
        for name in ("rx-0", "rx-1", "tx-0", "tx-1"):
            assert f"queues/{name}" in text
        requests = [queue[0] for queue in machine.stats()["virtio"]["net0"]["queues"]]
        assert min(requests[1:4:2]) >= 3, "each processor sends through its own queue"
        # The tap learns from what is sent which queue a flow's answers go to; the first ones may go anywhere.
        assert min(requests[0:4:2]) >= 1 and sum(requests[0:4:2]) >= 6
    assert "guest0" not in namespace.run("ip", "link")


@ENGINES
@BOTH
def test_tap_in_a_namespace(linux, backend, transport, namespace, tmp_path):
    try:
        tap = Tap("guest0", namespace=namespace.name, addresses="192.168.77.1/24")
    except NetworkError as error:
        pytest.skip(str(error))
    run = (
        "ip addr add 192.168.77.2/24 dev eth0; ip link set eth0 up\n"
        "mkdir /www; dd if=/dev/urandom of=/www/file bs=64k count=64 2> /dev/null; md5sum /www/file\n"
        "ping -c 2 192.168.77.1 && httpd -p 80 -h /www && read answer\n"
        "wget -q -O - http://192.168.77.1:8000/file | md5sum"
    )
    machine = linux(run, [tap], transport)
    machine.start()
    (tmp_path / "file").write_bytes(Files.content)
    words = ("8000", "--bind", "192.168.77.1", "--directory", str(tmp_path))
    server = namespace.start("python3", "-u", "-m", "http.server", *words, stdout=-1, stderr=-2)
    try:
        assert "Serving" in server.stdout.readline()
        fetch_it = "import hashlib, sys, urllib.request as u; "
        fetch_it += "print(hashlib.md5(u.urlopen('http://192.168.77.2/file', timeout=60).read()).hexdigest())"
        machine.console.expect("2 packets received", timeout=90)
        deadline = time.monotonic() + 60
        while True:
            digest = namespace.run("python3", "-c", fetch_it, check=False).strip().splitlines()[-1]
            if re.fullmatch("[0-9a-f]{32}", digest) or time.monotonic() > deadline:
                break
            time.sleep(0.3)
        machine.console.send_line("enough")
        text = ended(machine)
        assert f"{digest}  /www/file" in text and f"{MD5}  -" in text
    finally:
        server.kill()
        server.communicate()


@ENGINES
@BOTH
def test_two_guests_over_the_switch(linux, backend, transport):
    with Switch() as switch:
        send = (
            "ip addr add 10.5.0.1/24 dev eth0; ip link set eth0 up; mkdir /www\n"
            "dd if=/dev/urandom of=/www/file bs=64k count=64 2> /dev/null; md5sum < /www/file\n"
            "httpd -p 8000 -h /www; read answer; ping -c 2 10.5.0.2"
        )
        take = (
            "ip addr add 10.5.0.2/24 dev eth0; ip link set eth0 up\n"
            "until wget -q -O /file http://10.5.0.1:8000/file; do sleep 0.2; done\n"
            "md5sum < /file; read answer"
        )
        machines = [linux(run, [Nic(switch.port(mac=mac), mac=mac)], transport) for run, mac in
                    ((send, "52:54:00:00:00:01"), (take, "52:54:00:00:00:02"))]  # fmt: skip
        for machine in machines:
            machine.start()
        machines[1].console.expect("  -", timeout=120)
        machines[0].console.send_line("enough")
        first = ended(machines[0])
        machines[1].console.send_line("enough")
        second = ended(machines[1])
        digests = [re.search(r"^([0-9a-f]{32})  -", text, re.M)[1] for text in (first, second)]
        assert digests[0] == digests[1] and "2 packets received" in first


@pytest.fixture(scope="module")
def iperf():
    """An archive with the host's iperf3 and its libraries, to put behind an initramfs."""
    program = shutil.which("iperf3")
    if program is None:
        pytest.skip("no iperf3: install the package iperf3")
    needs = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    entries = {"usr/bin/iperf3": initramfs.File(Path(program).read_bytes(), 0o755)}
    for name in re.findall(r"(/\S+) \(0x", needs):
        entries[name.lstrip("/")] = initramfs.File(Path(name).read_bytes(), 0o755)
    return initramfs.build(entries)


def iperf_client(address, host, port):
    run = f"iperf3 -c {host} -p {port} -t 2 -f m"
    return (
        f"ip addr add {address} dev eth0; ip link set eth0 up; until ping -c 1 {host} > /dev/null; do sleep 0.2; done\n"
        f"{run} > /log && grep receiver /log; sleep 1; {run} -R > /log && grep receiver /log || cat /log"
    )


def check_rates(machine):
    """Both directions moved data: how fast is for the benchmarks to say."""
    machine.start()
    text = ended(machine)
    assert [float(rate) > 1 for rate in re.findall(r"([\d.]+) Mbits/sec +receiver", text)] == [True, True], text[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["pci", "mmio"])
def test_iperf_over_a_tap(linux, transport, namespace, iperf):
    try:
        tap = Tap("guest0", namespace=namespace.name, addresses="192.168.77.1/24")
    except NetworkError as error:
        pytest.skip(str(error))
    server = namespace.start("iperf3", "-s", stdout=subprocess.DEVNULL)
    try:
        check_rates(linux(iperf_client("192.168.77.2/24", "192.168.77.1", 5201), [tap], transport, more=iperf))
    finally:
        server.kill()
        server.wait()


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["pci", "mmio"])
def test_iperf_over_user_mode(linux, transport, iperf):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen(["iperf3", "-s", "-B", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL)
    try:
        net = UserNet(guest_forwards=[f"tcp::5201-127.0.0.1:{port}"])
        check_rates(linux(iperf_client("10.0.2.15/24", "10.0.2.2", 5201), [net], transport, more=iperf))
    finally:
        server.kill()
        server.wait()


@pytest.mark.slow
@pytest.mark.parametrize("server", ["off", "on"])
def test_a_guest_of_qemu_on_our_network(linux, tmp_path, server):
    """QEMU's `-netdev stream` is plugged into our switch, whose uplink is the user-mode network."""
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        pytest.skip("no qemu-system-x86_64: install the package qemu-system-x86")
    if "stream" not in subprocess.run([qemu, "-netdev", "help"], capture_output=True, text=True, check=True).stdout:
        pytest.skip("this QEMU has no -netdev stream: 7.2 has it")
    run = guests.DHCP + "ping -c 2 10.0.2.2 && wget -q -O - http://10.0.2.2/ | md5sum; sleep 1"
    path = tmp_path / "wire"
    with web_server() as port, Switch() as switch:
        switch.connect(UserNet(guest_forwards=[f"tcp::80-127.0.0.1:{port}"]))
        switch.connect(StreamSocket(path, **({"listen": True} if server == "off" else {"reconnect": 0.1})))
        words = parameters(run, modules=MODULES, reboot=True)
        done = subprocess.run(
            [qemu, "-M", "q35,accel=tcg", "-cpu", "max", "-m", "256", "-nodefaults", "-display", "none", "-no-reboot",
             "-serial", "stdio", "-kernel", linux.guest.kernel, "-initrd", linux.guest.initrd_modules,
             "-append", f"console=ttyS0 nokaslr quiet panic=-1 {words}",
             "-netdev", f"stream,id=n,server={server},addr.type=unix,addr.path={path}",
             "-device", "virtio-net-pci,netdev=n"],
            capture_output=True, text=True, timeout=180, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    assert "2 packets received" in done.stdout and MD5 in done.stdout, done.stdout[-3000:] + done.stderr


@pytest.mark.slow
def test_the_example(linux):
    example = Path(__file__).resolve().parents[2] / "examples/web_server.py"
    environment = os.environ | {"KVMPY_BACKEND": "tcg"}
    done = subprocess.run(
        [sys.executable, example], env=environment, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "says: Linux kvmpy 6.1" in done.stdout and "the run ended: poweroff" in done.stdout
