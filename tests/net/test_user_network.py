# SPDX-License-Identifier: Apache-2.0
"""The user-mode network with a real Linux as its guest: DHCP, echo, TCP and UDP both ways, DNS, policy."""

import contextlib
import errno
import hashlib
import os
import random
import select
import shutil
import socket
import struct
import threading
import time

import pytest
from net_rig import UDHCPC, guest_on

from kvmpy.errors import NetworkError
from kvmpy.net import Policy, Tap, UserNet
from kvmpy.net.namespace import inside, open_namespace

PEER = r"""
import hashlib, socket, sys, time
mode, host, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
if mode == "serve":
    listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    print("ready", flush=True)
    peer = listener.accept()[0]
else:
    peer = socket.create_connection((host, port), timeout=20)
if mode == "send":          # everything, half-close, then the answer
    peer.sendall(open(sys.argv[4], "rb").read())
    peer.shutdown(socket.SHUT_WR)
    print(peer.recv(100).decode())
elif mode in ("receive", "slow", "serve"):
    digest = hashlib.md5()
    if mode == "slow":
        time.sleep(1.5)
    while data := peer.recv(1 << 16):
        digest.update(data)
    peer.sendall(digest.hexdigest().encode())
elif mode == "wait":        # for what the other end does
    peer.sendall(b"hello")
    try:
        print("end" if not peer.recv(10) else "data")
    except ConnectionResetError:
        print("reset")
elif mode == "reset":
    import struct
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()
"""


@pytest.fixture
def net(namespace):
    """A user-mode network whose guest is the namespace."""
    with contextlib.ExitStack() as stack:

        def make(**options):
            net = UserNet(**{"dns": [], **options})
            stack.enter_context(guest_on(net, namespace, "eth0", "10.0.2.15/24"))
            namespace.run("ip", "route", "add", "default", "via", "10.0.2.2")
            return net

        yield make


@pytest.fixture(scope="module")
def data():
    return os.urandom(1 << 20) * 12


class Host:
    """A server of the host that the guest reaches as 10.0.2.2:7000."""

    def __init__(self, net):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(20)
        net.add_guest_forward(f"tcp::7000-127.0.0.1:{self.listener.getsockname()[1]}")

    def accept(self):
        peer = self.listener.accept()[0]
        peer.settimeout(60)  # frames are lost in one test, and the host may be busy
        return peer

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.listener.close()


def peer(namespace, *words):
    return namespace.start("python3", "-c", PEER, *words, stdout=-1)


def finish(guest):
    """Its output, when it ended well."""
    text = guest.communicate(timeout=60)[0]
    assert guest.returncode == 0, text
    return text.strip()


def receive_all(sock):
    digest = hashlib.md5()
    while part := sock.recv(1 << 16):
        digest.update(part)
    return digest.hexdigest()


def test_dhcp_client_of_busybox(namespace, tmp_path):
    if shutil.which("busybox") is None:
        pytest.skip("no busybox: install the package busybox-static")
    script = tmp_path / "script"
    script.write_text(UDHCPC)
    script.chmod(0o755)
    net = UserNet(dns=[], mtu=1400, domain="lab.test", hostname="guest")
    with guest_on(net, namespace):
        text = namespace.run("busybox", "udhcpc", "-i", "eth0", "-n", "-q", "-f", "-O", "hostname", "-s", str(script))
        assert "lease 10.0.2.15/24 router 10.0.2.2 dns 10.0.2.3 mtu 1400 domain lab.test hostname guest" in text
        again = namespace.run("busybox", "udhcpc", "-i", "eth0", "-n", "-q", "-f", "-r", "10.0.2.15", "-s", "/bin/true")
        assert "lease of 10.0.2.15 obtained" in again


def test_echo(net, namespace):
    if shutil.which("ping") is None:
        pytest.skip("no ping: install the package iputils-ping")
    net()
    text = namespace.run("ping", "-c", "2", "-i", "0.1", "-s", "3000", "10.0.2.2")  # in fragments
    assert "2 received" in text
    deadline = time.monotonic() + 10
    while "default via fe80::2" not in namespace.run("ip", "-6", "route") and time.monotonic() < deadline:
        time.sleep(0.1)
    while "tentative" in namespace.run("ip", "-6", "addr") and time.monotonic() < deadline:
        time.sleep(0.1)  # the guest makes sure that its addresses are its own (RFC 4862, 5.4)
    assert "2 received" in namespace.run("ping", "-c", "2", "-i", "0.1", "-W", "5", "fd00:6b76:6d70:7900::2")
    text = namespace.run("ping", "-c", "1", "-t", "1", "192.0.2.1", check=False)
    assert "Time to live exceeded" in text


@pytest.mark.parametrize("offloads", [0, 1, 15])
def test_bytes_arrive_as_they_were_sent(net, namespace, data, tmp_path, offloads):
    with contextlib.ExitStack() as stack:
        made = net()
        host = stack.enter_context(Host(made))
        made.set_offloads(offloads)  # the switch between completes what the tap would not take
        want = hashlib.md5(data).hexdigest()
        (tmp_path / "data").write_bytes(data)
        guest = peer(namespace, "send", "10.0.2.2", "7000", str(tmp_path / "data"))
        with host.accept() as sock:
            assert receive_all(sock) == want
            sock.sendall(want.encode())
        assert finish(guest) == want

        guest = peer(namespace, "receive", "10.0.2.2", "7000")
        with host.accept() as sock:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)  # half-close: the answer still comes
            assert sock.recv(100).decode() == want
            assert sock.recv(1) == b""
        finish(guest)
        deadline = time.monotonic() + 5
        while made.stats()["tcp_flows"] and time.monotonic() < deadline:
            time.sleep(0.05)
        assert made.stats()["tcp_flows"] == 0
        assert made.stats()["malformed"] == 0


def test_a_slow_guest_holds_the_host_back(net, namespace, data):
    with Host(net()) as host:
        guest = peer(namespace, "slow", "10.0.2.2", "7000")
        with host.accept() as sock:
            sock.setblocking(False)
            sent, until = 0, time.monotonic() + 0.7
            while time.monotonic() < until:
                with contextlib.suppress(BlockingIOError):
                    sent += sock.send(data[sent : sent + 65536])
            assert sent < len(data), "buffers on the way are bounded"
            sock.settimeout(20)
            sock.sendall(data[sent:])
            sock.shutdown(socket.SHUT_WR)
            assert sock.recv(100).decode() == hashlib.md5(data).hexdigest()
        finish(guest)


def test_a_slow_host_holds_the_guest_back(net, namespace, data, tmp_path):
    (tmp_path / "data").write_bytes(data)
    made = net()
    with Host(made) as host:
        guest = peer(namespace, "send", "10.0.2.2", "7000", str(tmp_path / "data"))
        with host.accept() as sock:
            time.sleep(0.7)
            assert made.stats()["bytes_in"] < len(data)
            assert receive_all(sock) == hashlib.md5(data).hexdigest()
            sock.sendall(b"done")
        assert finish(guest) == "done"


def test_resets_pass_both_ways(net, namespace):
    with Host(net()) as host:
        guest = peer(namespace, "wait", "10.0.2.2", "7000")
        with host.accept() as sock:
            assert sock.recv(5) == b"hello"  # else it may be reset while it connects
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert finish(guest) == "reset"
        guest = peer(namespace, "reset", "10.0.2.2", "7000")
        with host.accept() as sock, pytest.raises(ConnectionResetError):
            sock.recv(1)
        finish(guest)


def test_connections_that_nobody_takes_are_refused(net, namespace):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    net(guest_forwards=[f"tcp::7001-127.0.0.1:{port}"])
    for target in ("10.0.2.2:7001", "10.0.2.2:22"):  # nobody listens; no forward
        host, _, number = target.partition(":")
        code = f"import socket\ntry: socket.create_connection(({host!r}, {number}), 5)\n"
        code += "except OSError as e: print(e.errno)"
        assert namespace.run("python3", "-c", code).strip() == "111"


def test_forward_to_the_guest(net, namespace, data):
    made = net(host_forwards=["tcp:127.0.0.1:0-:80"])
    guest = peer(namespace, "serve", "10.0.2.15", "80")
    assert guest.stdout.readline() == "ready\n"
    with socket.create_connection(("127.0.0.1", made.forwards[0].port), 20) as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(100).decode() == hashlib.md5(data).hexdigest()
    finish(guest)
    with (
        pytest.raises(ConnectionResetError),  # nobody serves any more
        socket.create_connection(("127.0.0.1", made.forwards[0].port), 20) as sock,
    ):
        sock.recv(1)
    made.remove_forward(made.forwards[0])
    assert made.forwards == []


def test_a_forward_waits_for_a_guest_that_boots(namespace):
    net = UserNet(dns=[], host_forwards=["tcp::0-:80"])
    port = net.forwards[0].port
    with guest_on(net, namespace), socket.create_connection(("127.0.0.1", port), 20) as sock:
        sock.sendall(b"early")
        sock.shutdown(socket.SHUT_WR)
        namespace.run("ip", "addr", "add", "10.0.2.15/24", "dev", "eth0")
        guest = peer(namespace, "serve", "10.0.2.15", "80")
        sock.settimeout(20)
        # The first SYN may have met a guest without a server: then it says so, as any host would.
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(100).decode() in (hashlib.md5(b"early").hexdigest(), "")
        guest.kill()
        guest.communicate()


def test_datagrams_both_ways_and_in_fragments(net, namespace):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host:
        host.bind(("127.0.0.1", 0))
        host.settimeout(20)
        made = net(
            guest_forwards=[f"udp::7000-127.0.0.1:{host.getsockname()[1]}"], host_forwards=["udp:127.0.0.1:0-:7002"]
        )
        code = """
import socket
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind(("10.0.2.15", 7002)); sock.settimeout(20)
sock.sendto(b"x" * 9000, ("10.0.2.2", 7000))
data, where = sock.recvfrom(65536); print(len(data), where, flush=True)
data, where = sock.recvfrom(65536); sock.sendto(data[::-1], where); print(where[0])
"""
        guest = namespace.start("python3", "-c", code, stdout=-1)
        got, where = host.recvfrom(65536)
        assert got == b"x" * 9000
        host.sendto(b"y" * 8000, where)
        assert guest.stdout.readline().strip() == "8000 ('10.0.2.2', 7000)"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(20)
            client.sendto(b"abc", ("127.0.0.1", made.forwards[0].port))
            assert client.recv(100) == b"cba"
        assert finish(guest) == "10.0.2.2"


OUTSIDE = "2001:db8::7"
SIX = """
import socket
listener = socket.create_server((HOST, 7000), family=socket.AF_INET6)
datagrams = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
datagrams.bind((HOST, 7000))
print("ready", flush=True)
peer = listener.accept()[0]
count = 0
while data := peer.recv(1 << 16):
    count += len(data)
    peer.sendall(data)
peer.close()
data, where = datagrams.recvfrom(65536)
datagrams.sendto(data[::-1], where)
print(count, len(data))
"""
SIX_GUEST = """
import os, socket, threading
content = os.urandom(3 << 20)
peer = socket.create_connection((HOST, 7000), timeout=20)
def send():
    peer.sendall(content)
    peer.shutdown(socket.SHUT_WR)
sender = threading.Thread(target=send); sender.start()
back = b"".join(iter(lambda: peer.recv(1 << 16), b""))
sender.join()
sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM); sock.settimeout(20)
sock.sendto(b"ab" * 600, (HOST, 7000))
data, where = sock.recvfrom(65536)
print(back == content, data == b"ba" * 600, where[:2])
refused = socket.socket(socket.AF_INET6, socket.SOCK_STREAM); refused.settimeout(20)
print(refused.connect_ex((HOST, 7001)))
"""


def test_ipv6_leads_to_hosts_beyond_the_gateway(namespace, other_namespace):
    """The network's own sockets are in a second namespace, whose host is the world."""
    other_namespace.run("ip", "addr", "add", f"{OUTSIDE}/128", "dev", "lo")
    server = other_namespace.start("python3", "-c", f"HOST = {OUTSIDE!r}{SIX}", stdout=-1)
    assert server.stdout.readline() == "ready\n"
    place = open_namespace(other_namespace.name)
    try:
        net = inside(place, lambda: UserNet(dns=[]))
    finally:
        os.close(place)
    with guest_on(net, namespace):
        namespace.run("ip", "link", "set", "eth0", "up")
        deadline = time.monotonic() + 20
        while "default via fe80::2" not in namespace.run("ip", "-6", "route") or (
            "tentative" in namespace.run("ip", "-6", "addr")
        ):
            assert time.monotonic() < deadline, namespace.run("ip", "-6", "addr")
            time.sleep(0.1)
        guest = namespace.start("python3", "-c", f"HOST = {OUTSIDE!r}{SIX_GUEST}", stdout=-1)
        assert finish(guest).splitlines() == [f"True True ('{OUTSIDE}', 7000)", str(errno.ECONNREFUSED)]
        assert finish(server) == f"{3 << 20} 1200"


class Resolver(threading.Thread):
    """A DNS server that knows one name."""

    def __init__(self):
        super().__init__(daemon=True)
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.bind(("127.0.0.1", 0))
        self.address = self.sock.getsockname()
        self.asked = []
        self.start()

    def run(self):
        while True:
            question, client = self.sock.recvfrom(1024)
            if not question:
                return
            self.asked.append(question)
            answer = question[:2] + b"\x81\x80\0\1\0\1\0\0\0\0" + question[12:]
            self.sock.sendto(answer + b"\xc0\x0c\0\1\0\1\0\0\0\5\0\4" + bytes([203, 0, 113, 7]), client)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.sock.sendto(b"", self.address)
        self.join()
        self.sock.close()


ASK = """
import socket, sys
for name in sys.argv[1:]:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); sock.settimeout(20)
    labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split("."))
    sock.sendto(b"ab\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0" + labels + b"\\0\\0\\1\\0\\1", ("10.0.2.3", 53))
    print(sock.recv(512).hex())
"""


def test_names_and_policy(net, namespace):
    decisions = []
    policy = Policy.of(allow=["*.good.test", "tcp:198.51.100.0/24:80-81"], deny=["bad.good.test"])
    with Resolver() as resolver:
        made = net(dns=[resolver.address], policy=policy, on_decision=decisions.append)
        text = namespace.run("python3", "-c", ASK, "www.GOOD.test", "bad.good.test", "other.test").split()
        answers = [bytes.fromhex(word) for word in text]
        assert [answer[3] & 15 for answer in answers] == [0, 5, 5]  # no error, refused
        assert answers[0].endswith(bytes([203, 0, 113, 7])) and len(resolver.asked) == 1
        try_it = "import socket\ns = socket.socket()\ns.settimeout(0.3)\n"
        try_it += "import sys\ntry: s.connect((sys.argv[1], int(sys.argv[2])))\nexcept OSError as e: print(e.errno)"
        # Nobody is at these addresses: what matters is the decision.
        for address, port in (("203.0.113.7", 443), ("203.0.113.8", 443), ("198.51.100.9", 81), ("198.51.100.9", 82)):
            namespace.run("python3", "-c", try_it, address, str(port))
        for address in ("127.0.0.1", "169.254.169.254"):
            namespace.run("ip", "route", "replace", f"{address}/32", "via", "10.0.2.2", check=False)
        namespace.run("python3", "-c", try_it, "169.254.169.254", "80")
        deadline = time.monotonic() + 10
        while len(decisions) < 8 and time.monotonic() < deadline:
            time.sleep(0.02)
    seen = [(d.peer[0], d.peer[1], d.allowed, d.reason, d.name) for d in decisions if d.protocol != "icmp"]
    assert seen == [
        ("10.0.2.3", 53, True, "rule", "www.good.test"),
        ("10.0.2.3", 53, False, "rule", "bad.good.test"),
        ("10.0.2.3", 53, False, "default", "other.test"),
        ("203.0.113.7", 443, True, "rule", ""),
        ("203.0.113.8", 443, False, "default", ""),
        ("198.51.100.9", 81, True, "rule", ""),
        ("198.51.100.9", 82, False, "default", ""),
        ("169.254.169.254", 80, False, "special address", ""),
    ]
    assert str(decisions[1]).startswith("denied dns 10.0.2.15:") and made.stats()["unlogged"] == 0


def test_flows_are_bounded(net, namespace):
    made = net(max_tcp=4)
    with Host(made) as host:
        code = """
import socket
socks, refused = [], 0
for _ in range(10):
    try: socks.append(socket.create_connection(("10.0.2.2", 7000), 5))
    except ConnectionRefusedError: refused += 1
print(len(socks), refused)
"""
        host.listener.listen(20)
        assert namespace.run("python3", "-c", code).strip() == "4 6"


def test_a_port_that_is_taken():
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(NetworkError, match="cannot be forwarded: Address already in use"),
    ):
        UserNet(host_forwards=[f"tcp::{taken.getsockname()[1]}-:80"])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"network": "10.0.2.0/30"}, "prefix"),
        ({"mtu": 500}, "MTU"),
        ({"host_forwards": ["tcp:8080"]}, "forward to the guest"),
        ({"host_forwards": ["tcp::1-192.0.2.1:80"]}, "no address of a guest"),
        ({"guest_forwards": ["udp::1-unix:/x"]}, "datagrams"),
        ({"guest_forwards": ["tcp:192.0.2.1:80-127.0.0.1:80"]}, "not in the guest's network"),
        ({"dns": ["nowhere"]}, "nowhere"),
        ({"hostname": "a b"}, "not a name"),
        ({"max_tcp": 0}, "limit"),
    ],
)
def test_wrong_arguments(options, text):
    with pytest.raises(ValueError, match=text):
        UserNet(**options)


def fates(seed):
    """Of each 25 frames one is lost: True."""
    choice = random.Random(seed)
    while True:
        lost = choice.randrange(25)
        yield from (number == lost for number in range(25))


class Lossy(threading.Thread):
    """Carries frames between a guest's tap and a network, and loses some: of each way and size always the same ones."""

    def __init__(self, net, tap, offloads, seed):
        super().__init__(daemon=True)
        self.ends = {net.fd: tap.fd, tap.fd: net.fd}
        self.way = {net.fd: "to the guest", tap.fd: "from it"}
        kinds = [(way, much) for way in self.way.values() for much in (False, True)]
        self.fates = {kind: fates(f"{seed} {kind}") for kind in kinds}
        self.lost = dict.fromkeys(kinds, 0)
        self.stopped = False
        for end in (net, tap):
            end.set_offloads(offloads)
        self.start()

    def run(self):
        while not self.stopped:
            for fd in select.select(list(self.ends), [], [], 0.05)[0]:
                with contextlib.suppress(BlockingIOError):
                    frame = os.read(fd, 70000)
                    kind = self.way[fd], len(frame) > 1000
                    if next(self.fates[kind]):
                        self.lost[kind] += 1
                    else:
                        os.write(self.ends[fd], frame)  # with no room it is lost, too


SEEDS = [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 21))]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("way", "offloads", "sack", "megabytes"),  # enough for some dozens of frames of both kinds
    [("receive", 0, 1, 1), ("receive", 15, 1, 2), ("receive", 0, 0, 1), ("send", 0, 1, 1), ("send", 15, 1, 4)],
)
def test_lost_frames_are_sent_again(namespace, tmp_path, way, offloads, sack, megabytes, seed):
    data = os.urandom(1 << 20) * megabytes
    want = hashlib.md5(data).hexdigest()
    (tmp_path / "data").write_bytes(data)
    namespace.run("sysctl", "-q", f"net.ipv4.tcp_sack={sack}")
    try:
        tap = Tap("eth0", namespace=namespace.name, addresses="10.0.2.15/24")
    except NetworkError as error:
        pytest.skip(str(error))
    with tap, UserNet(dns=[]) as net, Host(net) as host:
        wire = Lossy(net, tap, offloads, seed)
        try:
            guest = peer(namespace, way, "10.0.2.2", "7000", str(tmp_path / "data"))
            with host.accept() as sock:
                if way == "receive":
                    sock.sendall(data)
                    sock.shutdown(socket.SHUT_WR)
                    assert sock.recv(100).decode() == want
                else:
                    assert receive_all(sock) == want
                    sock.sendall(b"done")
            assert finish(guest) == ("done" if way == "send" else "")
            counts = net.stats()
        finally:
            wire.stopped = True
            wire.join()
    if way == "receive":
        assert wire.lost["to the guest", True] > 0 and counts["tcp_retransmitted"] > 0
    else:
        assert wire.lost["from it", True] > 0 and counts["tcp_out_of_order"] > 0
