# SPDX-License-Identifier: Apache-2.0
"""Networks as words: `--net KIND[:NAME][,KEY=VALUE...]`, and rules of the user-mode network's policy."""

import os
import select
import socket

import pytest

from kvmpy import Nic
from kvmpy.errors import NetworkError
from kvmpy.net import HostForward, Pcap, Policy, Rule, StreamSocket, UserNet
from kvmpy.net.user.policy import TCP, UDP
from kvmpy.net.words import open_backend


def test_user_mode_with_everything():
    nic = Nic.parse(
        "user,hostfwd=tcp::0-:80,hostfwd=udp:127.0.0.1:0-:53,guestfwd=tcp:10.9.0.100:80-127.0.0.1:8080,allow=*.a.test,"
        "allow=tcp:b.test:1-9,deny=[fd00::]/8,dns=127.0.0.1:5353,network=10.9.0.0/24,ipv6=off,domain=a.test,mtu=9000"
    )
    net = nic.open()
    with net:
        assert isinstance(net, UserNet) and net.mtu == 9000 and str(net.guest) == "10.9.0.15"
        assert [forward.guest_port for forward in net.forwards] == [80, 53]
        assert [str(rule) for rule in net.policy.rules] == [
            "deny fd00::/8", "allow *.a.test", "allow tcp b.test 1-9"
        ]  # fmt: skip
        assert not net.policy.allows_the_rest


def test_a_capture_around_it(tmp_path):
    with Nic.parse(f"user,pcap={tmp_path / 'file'},snaplen=100").open() as net:
        assert isinstance(net, Pcap)
    assert (tmp_path / "file").stat().st_size == 24


def test_streams(tmp_path):
    with (
        open_backend("stream", str(tmp_path / "wire"), {"listen": "on"}) as server,
        open_backend("stream", str(tmp_path / "wire"), {}) as client,
    ):
        assert isinstance(server, StreamSocket) and client.connected
    with socket.create_server(("127.0.0.1", 0)) as peer:
        open_backend("stream", f"127.0.0.1:{peer.getsockname()[1]}", {}).close()


def test_a_switch_by_its_name():
    first, second = (Nic.parse("switch:lan").open() for _ in range(2))
    other = Nic.parse("switch:elsewhere,lock=52:54:00:00:00:01").open()
    frame = b"\xff" * 6 + bytes.fromhex("525400000001 88b5") + bytes(46)
    os.write(first.fd, bytes(12) + frame)
    assert select.select([second.fd], [], [], 5)[0]
    assert os.read(second.fd, 1000)[12:] == frame
    assert not select.select([other.fd], [], [], 0.05)[0]
    for port in (first, second, other):
        port.close()
        port.close()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("user:name", "no name"),
        ("user,speed=9", "no option speed"),
        ("user,rest=maybe", "allow or deny"),
        ("user,ipv6=perhaps", "on or off"),
        ("user,hostfwd=80", "tcp|udp"),
        ("user,snaplen=9", "goes with pcap"),
        ("stream", "needs a PATH"),
        ("stream:/x,reconnect=soon", "number of seconds"),
        ("tap:x,address=nowhere", "address of the host"),
        ("switch:a,lock=zz", "fromhex|MAC"),
        ("user,mtu=100", "MTU"),
    ],
)
def test_words_that_are_refused(text, why):
    with pytest.raises(ValueError, match=why):
        Nic.parse(text).open()


def test_what_cannot_be_had(tmp_path):
    with pytest.raises(NetworkError, match="nobody at"):
        Nic.parse(f"stream:{tmp_path / 'x'}").open()


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("any", Rule.parse("allow", "any")),
        ("tcp:Example.TEST:443", Rule(True, None, "example.test", TCP, (443, 443))),
        ("*.example.test:1-9", Rule(True, None, ".example.test", TCP | UDP, (1, 9))),
    ],
)
def test_rules(text, rule):
    assert Rule.parse("allow", text) == rule


@pytest.mark.parametrize(
    "text",
    ["", "tcp:", "10.0.0.0/33", "10.0.0.1/8", "a b", "icmp:a:5", "x:0", "x:9-1", "x:70000", "*.", "[::1", "a" * 300],
)
def test_rules_that_are_none(text):
    with pytest.raises(ValueError):
        Rule.parse("deny", text)


def test_the_rest_of_a_policy():
    assert Policy().allows_the_rest and Policy.of(deny=["10.0.0.0/8"]).allows_the_rest
    assert not Policy.of(allow=["a.test"]).allows_the_rest
    assert Policy.of(allow=["a.test"]).rules[0].allow and Policy(otherwise=False).allows_the_rest is False


def test_forwards_as_qemu_writes_them():
    forward = HostForward.parse("tcp::8080-10.0.2.15:80")
    assert (str(forward.address), forward.port, str(forward.guest), forward.guest_port) == (
        "127.0.0.1",
        8080,
        "10.0.2.15",
        80,
    )
    assert str(HostForward.parse("udp:[::1]:53-:53").address) == "::1"
