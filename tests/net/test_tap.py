# SPDX-License-Identifier: Apache-2.0
"""Taps in network namespaces: configuration, masquerading, and that nothing stays behind, not even after kill -9."""

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvmpy.errors import NetworkError
from kvmpy.net import Switch, Tap, TapFd, UserNet, owner
from kvmpy.net.tap import reclaim


@pytest.fixture
def tap(namespace):
    """Makes taps in the namespace."""
    if not Path("/dev/net/tun").exists():
        pytest.skip("no /dev/net/tun")

    def make(*args, **options):
        try:
            return Tap(*args, namespace=namespace.name, **options)
        except NetworkError as error:
            if "CAP_NET_ADMIN" in str(error):
                pytest.skip(str(error))
            raise

    return make


def links(namespace):
    return {link["ifname"]: link for link in json.loads(namespace.run("ip", "-j", "addr"))}


def tables(namespace):
    return namespace.run("nft", "list", "tables") if shutil.which("nft") else ""


needs_nft = pytest.mark.skipif(shutil.which("nft") is None, reason="no nft: install the package nftables")


def test_addresses_and_mtu(tap, namespace):
    with tap("guest0", addresses=["192.168.77.1/24", "fd00:77::1/64"], mtu=1400) as made:
        link = links(namespace)["guest0"]
        assert link["mtu"] == 1400 and "UP" in link["flags"]
        local = {(a["local"], a["prefixlen"]) for a in link["addr_info"]}
        assert {("192.168.77.1", 24), ("fd00:77::1", 64)} <= local
        assert made.vnet_header and made.name == "guest0" and os.get_blocking(made.fd) is False
        made.set_offloads(made.offloads)
    made.close()
    assert "guest0" not in links(namespace)


def test_names_by_number(tap, namespace):
    with tap() as first, tap() as second:
        assert {first.name, second.name} <= set(links(namespace))
        assert first.name.startswith("kvmpy") and first.name != second.name


def test_a_bridge_that_was_made_goes_with_its_last_tap(tap, namespace):
    first = tap("guest0", bridge="kvmpybr", addresses="192.168.77.1/24")
    second = tap("guest1", bridge="kvmpybr")
    found = links(namespace)
    assert found["guest0"]["master"] == found["guest1"]["master"] == "kvmpybr"
    assert found["kvmpybr"]["addr_info"][0]["local"] == "192.168.77.1"
    with pytest.raises(NetworkError, match="not kvmpy's to set"):
        tap("guest2", bridge="kvmpybr", addresses="192.168.78.1/24")
    assert "guest2" not in links(namespace)
    second.close()
    first.close()
    assert set(links(namespace)) == {"lo"}


def test_a_bridge_of_somebody_else_stays(tap, namespace):
    namespace.run("ip", "link", "add", "br0", "type", "bridge")
    tap("guest0", bridge="br0").close()
    assert set(links(namespace)) == {"lo", "br0"}


def test_an_interface_that_exists_is_used_and_stays(tap, namespace):
    namespace.run("ip", "tuntap", "add", "guest0", "mode", "tap", "vnet_hdr")
    namespace.run("ip", "link", "set", "guest0", "up")
    with tap("guest0"), pytest.raises(NetworkError, match="another process has it"):
        tap("guest0")
    assert "guest0" in links(namespace)


def test_several_queues(tap, namespace):
    with tap(queues=3) as made:
        assert len({queue.fd for queue in made.queues}) == 3
        assert {queue.name for queue in made.queues} == {made.name}


def test_who_knows_nothing_of_several_queues_gets_all_packets_from_the_first(tap, namespace):
    code = """
import socket
for port in range(7000, 7020):  # the kernel chooses queues by connection
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); sock.settimeout(20)
    sock.sendto(b"hello", ("10.0.2.2", 7000)); assert sock.recv(10) == b"there"
print("all")
"""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host, Switch() as switch:
        host.bind(("127.0.0.1", 0))
        host.settimeout(20)
        switch.connect(UserNet(dns=[], guest_forwards=[f"udp::7000-127.0.0.1:{host.getsockname()[1]}"]))
        switch.connect(tap("eth0", addresses="10.0.2.15/24", queues=4))
        guest = namespace.start("python3", "-c", code, stdout=-1)
        for _ in range(20):
            host.sendto(b"there", host.recvfrom(10)[1])
        assert guest.communicate(timeout=60)[0] == "all\n"


@needs_nft
def test_masquerading_leads_out_and_is_removed(tap, namespace, other_namespace):
    """guest - tap - namespace - veth - other namespace, which has no way back to the guest's address."""
    namespace.run("ip", "link", "add", "up0", "type", "veth", "peer", "name", "eth0", "netns", other_namespace.name)
    namespace.run("ip", "addr", "add", "198.51.100.1/24", "dev", "up0")
    namespace.run("ip", "link", "set", "up0", "up")
    other_namespace.run("ip", "addr", "add", "198.51.100.2/24", "dev", "eth0")
    other_namespace.run("ip", "link", "set", "eth0", "up")
    forwarding = ("cat", "/proc/sys/net/ipv4/ip_forward")
    assert namespace.run(*forwarding).strip() == "0"
    with tap("guest0", addresses="192.168.77.1/24", masquerade=True):
        assert namespace.run(*forwarding).strip() == "1" and "kvmpy_" in tables(namespace)
        with tap("guest1", addresses="192.168.78.1/24", masquerade=True):
            pass
        assert namespace.run(*forwarding).strip() == "1"
        # A guest, by hand: a second namespace behind the tap would be a switch; an address on the tap will do.
        namespace.run("ip", "addr", "add", "192.168.77.9/32", "dev", "lo")
        code = "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('192.168.77.9', 0));"
        code += "s.settimeout(10); s.sendto(b'hello', ('198.51.100.2', 4000)); print(s.recv(100).decode())"
        server = "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('198.51.100.2', 4000));"
        server += "print('ready', flush=True); data, where = s.recvfrom(10); s.sendto(where[0].encode(), where)"
        process = other_namespace.start("python3", "-c", server, stdout=-1)
        assert process.stdout.readline() == "ready\n"
        assert namespace.run("python3", "-c", code).strip() == "198.51.100.1"
        process.communicate(timeout=60)
    assert namespace.run(*forwarding).strip() == "0" and "kvmpy_" not in tables(namespace)


VICTIM = """
import sys, time
from kvmpy.net import Tap
place = dict(namespace=sys.argv[1], bridge="kvmpybr", addresses="192.168.77.1/24")
tap = Tap("guest0", **place, masquerade=sys.argv[2] == "yes")
print(tap._guard._shell.pid, flush=True)
time.sleep(60)
"""
FORWARDING = ("cat", "/proc/sys/net/ipv4/ip_forward")


@pytest.fixture
def victim(tap, namespace):
    """Starts a process that has a tap in a bridge of its own, masqueraded where nft is; (process, pid of its guard)."""
    tap().close()  # skips where taps cannot be made

    def start():
        masquerade = "yes" if shutil.which("nft") else "no"
        words = [sys.executable, "-c", VICTIM, namespace.name, masquerade]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        guard = int(process.stdout.readline())
        assert {"guest0", "kvmpybr"} <= set(links(namespace))
        assert ("kvmpy_" in tables(namespace)) == (masquerade == "yes")
        return process, guard

    return start


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)


def test_what_a_killed_process_left_is_removed_by_its_guard(victim, namespace):
    process, guard = victim()
    kill(process)
    assert "guest0" not in links(namespace), "a tap goes with its process"
    deadline = time.monotonic() + 60
    while Path(f"/proc/{guard}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert set(links(namespace)) == {"lo"} and "kvmpy_" not in tables(namespace)
    assert namespace.run(*FORWARDING).strip() == "0"


def test_what_a_killed_process_and_its_guard_left_is_removed_by_the_next(tap, victim, namespace):
    process, guard = victim()
    with tap("guest1"):  # the other one lives: nothing of it is touched
        assert {"guest0", "kvmpybr"} <= set(links(namespace))
    os.kill(guard, signal.SIGKILL)
    kill(process)
    assert "kvmpybr" in links(namespace)
    assert ("kvmpy_" in tables(namespace)) == (shutil.which("nft") is not None)
    tap().close()
    assert set(links(namespace)) == {"lo"} and "kvmpy_" not in tables(namespace)
    assert namespace.run(*FORWARDING).strip() == "0"


@needs_nft
def test_the_guard_of_a_killed_process_harms_nobody_who_comes_meanwhile(tap, victim, namespace):
    for pause in (0, 0.05, 0.2):
        process, guard = victim()
        kill(process)
        time.sleep(pause)
        with tap("guest0", bridge="kvmpybr", addresses="192.168.77.1/24", masquerade=True):
            deadline = time.monotonic() + 60
            while Path(f"/proc/{guard}").exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            assert {"guest0", "kvmpybr"} <= set(links(namespace))
            assert "kvmpy_" in tables(namespace) and namespace.run(*FORWARDING).strip() == "1"
        assert set(links(namespace)) == {"lo"} and namespace.run(*FORWARDING).strip() == "0"


def test_a_guard_goes_with_its_tap(tap):
    with tap("guest0", bridge="kvmpybr") as made:
        guard = made._guard._shell.pid
        assert Path(f"/proc/{guard}").exists()
    assert not Path(f"/proc/{guard}").exists()
    with tap() as plain:
        assert plain._guard is None


def test_owners():
    assert not owner.is_gone(owner.mark())
    pid, start, place = owner.mark().split("_")
    assert owner.is_gone(f"{pid}_{int(start) + 1}_{place}"), "the number was used again"
    assert not owner.is_gone(f"{pid}_{int(start) + 1}_1"), "another process namespace: nothing is known"
    assert not owner.is_gone("nonsense")


def test_macvtap(namespace):
    """Made by hand; its descriptor is a back end. The other end of the wire is asked for its address, and answers."""
    namespace.run("ip", "link", "add", "base0", "type", "veth", "peer", "name", "base1")
    error = namespace.run("ip", "link", "add", "link", "base0", "name", "mac0", "type", "macvtap", check=False)
    if error:
        pytest.skip(f"this kernel makes no macvtap: {error.strip()}")
    index = links(namespace)["mac0"]["ifindex"]
    try:
        fd = os.open(f"/dev/tap{index}", os.O_RDWR)
    except OSError as error:
        pytest.skip(f"/dev/tap{index}: {error.strerror}")
    with TapFd(fd) as made:
        made.set_offloads(made.offloads)
        namespace.run("ip", "addr", "add", "192.168.7.1/24", "dev", "base1")
        for name in ("base0", "base1", "mac0"):
            namespace.run("ip", "link", "set", name, "up")
        mac = bytes.fromhex(links(namespace)["mac0"]["address"].replace(":", ""))
        asked = bytes([0, 1, 8, 0, 6, 4, 0, 1]) + mac + bytes([192, 168, 7, 2]) + bytes(6) + bytes([192, 168, 7, 1])
        os.write(made.fd, bytes(12) + b"\xff" * 6 + mac + b"\x08\x06" + asked)
        poll = select.poll()
        poll.register(made.fd, select.POLLIN)
        answer = b""
        while answer[24:26] != b"\x08\x06" and poll.poll(10_000):  # there may be frames of IPv6's before it
            answer = os.read(made.fd, 2048)
        there = bytes.fromhex(links(namespace)["base1"]["address"].replace(":", ""))
        assert answer[12:24] == mac + there and answer[32:38] == b"\0\2" + there[:4], "a reply (RFC 826)"


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"name": "x" * 16}, ValueError, "1 to 15 bytes"),
        ({"name": "a/b"}, ValueError, "slashes"),
        ({"addresses": "192.168.1.1"}, ValueError, "has a prefix"),
        ({"addresses": "guest"}, ValueError, "is like"),
        ({"masquerade": True}, ValueError, "needs addresses"),
        ({"mtu": 10}, ValueError, "MTU"),
        ({"queues": 0}, ValueError, "queues"),
        ({"namespace": "not-there"}, NetworkError, "ip netns add not-there"),
    ],
)
def test_wrong_arguments(options, error, text):
    with pytest.raises(error, match=text):
        Tap(**options)


def test_reclaim_here_is_harmless():
    if os.geteuid():
        pytest.skip("needs root")
    assert isinstance(reclaim(), list)
