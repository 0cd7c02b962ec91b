# SPDX-License-Identifier: Apache-2.0
"""Framed streams: the format, and those who speak it."""

import hashlib
import os
import random
import select
import shutil
import socket
import struct
import subprocess
import time

import pytest
from net_rig import UDHCPC, guest_on

from kvmpy.errors import NetworkError
from kvmpy.net import StreamSocket

FRAME = bytes.fromhex("ffffffffffff 525400000001 88b5") + bytes(46)


def framed(*frames):
    return b"".join(struct.pack(">I", len(frame)) + frame for frame in frames)


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    theirs.settimeout(5)
    with StreamSocket(ours) as backend, theirs:
        yield backend, theirs


def receive(backend, wait=5.0):
    if not select.select([backend.fd], [], [], wait)[0]:
        return None
    return os.read(backend.fd, 70000)


def test_frames_to_the_peer(pair):
    backend, peer = pair
    os.write(backend.fd, bytes(12) + FRAME)
    os.write(backend.fd, bytes(12) + FRAME[:14] + bytes(9000))
    want = framed(FRAME, FRAME[:14] + bytes(9000))
    got = b""
    while len(got) < len(want):
        got += peer.recv(65536)
    assert got == want


def test_frames_from_the_peer_however_they_are_cut(pair):
    backend, peer = pair
    choice = random.Random(5)
    frames = [FRAME[:14] + choice.randbytes(choice.choice([46, 100, 1500, 30000, 65535])) for _ in range(60)]
    stream = framed(*frames[:30], b"short", *frames[30:])
    sent = 0
    for want in frames:
        while not select.select([backend.fd], [], [], 0)[0] and sent < len(stream):
            sent += peer.send(stream[sent : sent + choice.choice([1, 3, 4, 5, 1000, 70000])])
            select.select([backend.fd], [], [], 0.001)
        data = receive(backend)
        assert data == bytes(10) + b"\1\0" + want
    assert backend.stats()["rx_malformed"] == 1


def test_nonsense_ends_the_connection(pair):
    backend, peer = pair
    peer.sendall(struct.pack(">I", 1 << 20) + bytes(100))
    assert peer.recv(1) == b""
    assert receive(backend) == b"", "the cable is out"
    assert not backend.connected


def test_nothing_is_lost_when_the_peer_is_slow(pair):
    backend, peer = pair
    sent, got = 0, b""
    while sent < 3000:
        try:
            os.write(backend.fd, bytes(12) + FRAME[:14] + struct.pack(">I", sent) + bytes(1400))
            sent += 1
        except BlockingIOError:
            got += peer.recv(1 << 20)
    size = 4 + 14 + 4 + 1400
    while len(got) < 3000 * size:
        got += peer.recv(1 << 20)
    numbers = [struct.unpack_from(">I", got, at + 18)[0] for at in range(0, len(got), size)]
    assert numbers == list(range(3000))


def test_two_of_ours_by_path(tmp_path):
    path = tmp_path / "wire"
    with pytest.raises(NetworkError, match="nobody at"):
        StreamSocket(path)
    with StreamSocket(path, listen=True) as server, pytest.raises(NetworkError, match="Address already in use"):
        StreamSocket(path, listen=True)
    assert not path.exists()
    with StreamSocket(path, reconnect=0.05) as client:
        assert not client.connected
        for _ in range(2):  # the server comes and goes
            with StreamSocket(path, listen=True) as server:
                deadline = time.monotonic() + 60
                while not (client.connected and server.connected) and time.monotonic() < deadline:
                    time.sleep(0.01)
                os.write(client.fd, bytes(12) + FRAME)
                assert receive(server)[12:] == FRAME
                os.write(server.fd, bytes(12) + FRAME)
                assert receive(client)[12:] == FRAME


def test_by_tcp():
    with StreamSocket(("127.0.0.1", 0), listen=True) as server:
        port = server._listener.getsockname()[1]
        with StreamSocket(("127.0.0.1", port)) as client:
            os.write(client.fd, bytes(12) + FRAME)
            assert receive(server)[12:] == FRAME


@pytest.mark.parametrize("options", [{"listen": True, "reconnect": 1.0}, {"reconnect": 0.0}])
def test_wrong_arguments(tmp_path, options):
    with pytest.raises(ValueError, match="reconnect"):
        StreamSocket(tmp_path / "x", **options)


def test_passt_leads_to_the_host(namespace):
    """passt -F speaks the format on one end of a socket pair; it is a network of its own behind it."""
    passt = shutil.which("passt")
    if passt is None:
        pytest.skip("no passt: install the package passt")
    ours, theirs = socket.socketpair()
    with theirs:
        fd = str(theirs.fileno())
        process = subprocess.Popen(
            [passt, "-f", "-F", fd, "-a", "10.0.9.15", "-n", "24", "-g", "10.0.9.2", "-4", "--runas", "0", "-t", "none",
             "-u", "none", "--no-dhcp-dns"],
            pass_fds=[theirs.fileno()], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
    try:
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            guest_on(StreamSocket(ours), namespace, "eth0", "10.0.9.15/24"),
        ):
            server.settimeout(20)
            port = server.getsockname()[1]
            code = f"import socket; s = socket.create_connection(('10.0.9.2', {port}), 10); s.sendall(b'through passt')"
            try:
                namespace.run("python3", "-c", code)
            except AssertionError:
                if process.poll() is not None:
                    pytest.skip(f"passt does not run here: {process.stderr.read().decode()}")
                raise
            with server.accept()[0] as peer:
                assert peer.recv(100) == b"through passt"
    finally:
        process.kill()
        process.communicate()


def test_gvproxy_leads_to_the_host(namespace, tmp_path):
    """`-listen-qemu` speaks the format; 192.168.127.254 is the host's loopback behind it. Lease, question and TCP."""
    gvproxy = os.environ.get("KVMPY_GVPROXY") or shutil.which("gvproxy")
    if gvproxy is None:
        pytest.skip("no gvproxy: Debian has none; name one with KVMPY_GVPROXY")
    path = tmp_path / "wire"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]  # it always forwards one to the guest
    process = subprocess.Popen(
        [gvproxy, "-listen-qemu", f"unix://{path}", "-ssh-port", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            guest_on(StreamSocket(path, reconnect=0.1), namespace, "eth0"),
        ):
            server.settimeout(20)
            script = tmp_path / "udhcpc"
            script.write_text(UDHCPC)
            script.chmod(0o755)
            lease = namespace.run("busybox", "udhcpc", "-f", "-q", "-n", "-t", "20", "-i", "eth0", "-s", str(script))
            assert "lease 192.168.127." in lease and "router 192.168.127.1" in lease, lease
            asked = namespace.run("busybox", "nslookup", "gateway.containers.internal", "192.168.127.1", check=False)
            assert "192.168.127.1" in asked.partition("Name:")[2], asked
            data = random.Random(8).randbytes(2_000_000)
            where = ("192.168.127.254", server.getsockname()[1])
            code = (
                f"import hashlib, socket; s = socket.create_connection({where}, 20); got = b''\n"
                f"while len(got) < {len(data)}: got += s.recv(1 << 20)\n"
                "s.sendall(hashlib.md5(got).hexdigest().encode())"
            )
            guest = namespace.start("python3", "-c", code)
            with server.accept()[0] as peer:
                peer.settimeout(20)
                peer.sendall(data)
                assert peer.recv(100) == hashlib.md5(data).hexdigest().encode()
            assert guest.wait(20) == 0
    finally:
        process.kill()
        process.communicate()
