# SPDX-License-Identifier: Apache-2.0
"""The socket device (virtio 1.2, 5.10): a guest's stack written by hand against Unix sockets of the host."""

import contextlib
import random
import socket

import pytest
from virtio_rig import Rig

from kvmpy.virtio import Vsock
from kvmpy.virtio import features as f
from kvmpy.virtio import vsock as v

CID = 5
PORT = 1024  # of the host
GUEST = 7000


class Guest:
    """The guest's driver: packets out, packets in."""

    def __init__(self, path, threaded):
        self.path = str(path / "vsock")
        self.device = Vsock(CID, self.path, threaded=threaded)
        self.rig = Rig(self.device)
        self.driver = self.rig.start()
        self.rx, self.tx = self.driver.queues[:2]
        self.heads = []
        self.inbox = []
        self.refill(32)

    def refill(self, count):
        for _ in range(count):
            self.rx.add([], [4096])
        self.rx.kick()

    def send(
        self, op, data=b"", *, host=PORT, guest=GUEST, size=None, flags=0, src=CID, dst=2, kind=1, room=1 << 20, done=0
    ):
        size = len(data) if size is None else size
        header = v.HEADER.pack(src, dst, guest, host, size, kind, op, flags, room, done)
        self.tx.request([header, data] if data else [header])

    def poll(self):
        for head, size in self.rx.take():
            packet = b"".join(self.rx.result(head))[:size]
            fields = v.HEADER.unpack(packet[:44])
            self.inbox.append((fields[6], fields[2], fields[3], fields[7], packet[44:]))
            self.rx.add([], [4096])
        self.rx.kick()

    def next(self):
        """(op, host port, guest port, flags, data) of the next packet."""

        def some():
            self.poll()
            return bool(self.inbox)

        self.driver.wait(some)
        return self.inbox.pop(0)

    def data(self, size):
        got = b""
        while len(got) < size:
            op, _, _, _, data = self.next()
            assert op == v.RW
            got += data
        return got


@pytest.fixture
def guest(tmp_path, threaded):
    guest = Guest(tmp_path, threaded)
    yield guest
    guest.rig.close()


@contextlib.contextmanager
def listener(guest, port=PORT):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(f"{guest.path}_{port}")
        server.listen()
        server.settimeout(10)
        yield server


def accept(guest, server):
    guest.send(v.REQUEST)
    sock, _ = server.accept()
    sock.settimeout(10)
    assert guest.next() == (v.RESPONSE, PORT, GUEST, 0, b"")
    return sock


def test_configuration(guest):
    assert guest.driver.config(0, 8) == CID


def test_from_the_guest(guest):
    with listener(guest) as server, accept(guest, server) as sock:
        guest.send(v.RW, b"hello ")
        guest.send(v.RW, b"host")
        assert sock.recv(6) + sock.recv(10) == b"hello host"
        sock.sendall(b"hello guest")
        assert guest.data(11) == b"hello guest"
        guest.send(v.SHUTDOWN, flags=3)
        assert guest.next() == (v.RST, PORT, GUEST, 0, b"")
        assert sock.recv(1) == b""
    assert guest.device.stats()["open"] == 0


def connect(guest, port=80):
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.settimeout(10)
    client.connect(guest.path)
    client.sendall(b"CONNECT %d\n" % port)
    op, host_port, guest_port, _, _ = guest.next()
    assert (op, guest_port) == (v.REQUEST, port)
    return client, host_port


def test_from_the_host(guest):
    client, port = connect(guest)
    with client:
        guest.send(v.RESPONSE, host=port, guest=80)
        assert client.recv(100) == b"OK %d\n" % port
        client.sendall(b"GET")
        assert guest.data(3) == b"GET"
        guest.send(v.RW, b"200", host=port, guest=80)
        assert client.recv(3) == b"200"
        client.shutdown(socket.SHUT_WR)
        assert guest.next() == (v.SHUTDOWN, port, 80, v.NO_SEND, b"")
        guest.send(v.RW, b"bye", host=port, guest=80)  # the other half is still open
        assert client.recv(3) == b"bye"
        guest.send(v.RST, host=port, guest=80)
        assert client.recv(1) == b""


def test_nobody_listens_in_the_guest(guest):
    client, port = connect(guest)
    with client:
        guest.send(v.RST, host=port, guest=80)
        assert client.recv(1) == b""


@pytest.mark.parametrize("greeting", [b"GET / HTTP/1.0\n", b"CONNECT x\n", b"CONNECT 4294967295\n", b"C" * 100, b"\n"])
def test_bad_greetings(guest, greeting):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(10)
        client.connect(guest.path)
        client.sendall(greeting)
        guest.device.poll()
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""
    assert guest.device.stats()["connections"] == 0


def test_the_guest_is_given_no_more_than_it_has_room_for(guest):
    with listener(guest) as server:
        guest.send(v.REQUEST, room=1000)
        sock, _ = server.accept()
        with sock:
            guest.next()
            sock.sendall(bytes(range(250)) * 8)
            assert guest.data(1000) == bytes(range(250)) * 4
            guest.device.poll()
            guest.poll()
            assert guest.inbox == []
            guest.send(v.CREDIT_UPDATE, room=1000, done=1000)
            assert guest.data(1000) == bytes(range(250)) * 4


def test_the_guest_learns_what_was_taken(guest):
    with listener(guest) as server, accept(guest, server) as sock:
        total = 0
        for _ in range(64):
            guest.driver.free_all() if not guest.rx.pending else None
            guest.send(v.RW, b"x" * 2048)
            while total < 2048:
                total += len(sock.recv(4096))
            total -= 2048
        assert guest.next()[0] == v.CREDIT_UPDATE
        guest.send(v.CREDIT_REQUEST)
        assert guest.next()[0] == v.CREDIT_UPDATE


def test_more_than_the_credit_ends_the_connection(guest):
    with listener(guest) as server, accept(guest, server) as sock:
        ops = []
        for _ in range(1000):
            guest.driver._next = guest.driver._heap + 0x4_0000
            guest.send(v.RW, b"x" * 65536)  # nobody reads
            guest.poll()
            ops = [packet[0] for packet in guest.inbox]
            if v.RST in ops:
                break
        assert v.RST in ops
        assert sock.recv(1) == b"x"


@pytest.mark.parametrize(
    ("packet", "answer"),
    [
        ({"op": v.REQUEST, "host": 9}, v.RST),  # nobody listens
        ({"op": v.RW, "data": b"x"}, v.RST),
        ({"op": 99}, v.RST),
        ({"op": v.REQUEST, "kind": 2}, v.RST),
        ({"op": v.REQUEST, "dst": 3}, v.RST),
        ({"op": v.RW, "size": 0xFFFF_FFFF}, v.RST),
        ({"op": v.RST}, None),
        ({"op": v.REQUEST, "src": 4}, None),
    ],
)
def test_packets_that_belong_to_nothing(guest, packet, answer):
    guest.send(**packet)
    guest.device.poll()
    if answer is not None:
        assert guest.next()[0] == answer
    assert guest.device.stats()["open"] == 0 and guest.driver.status == 15


def test_connections_are_bounded_and_a_reset_ends_them(guest):
    with listener(guest) as server:
        server.listen(4096)
        for number in range(v.MAX_CONNECTIONS + 20):
            guest.driver._next = guest.driver._heap + 0x4_0000
            guest.send(v.REQUEST, guest=number)
            guest.poll()
        assert guest.device.stats()["open"] <= v.MAX_CONNECTIONS
        guest.driver.reset()
        assert guest.device.stats()["open"] == 0


def test_random_packets(guest):
    """Whatever the guest says, the device lives, and its messages stay bounded."""
    rng = random.Random(21)
    before = guest.rig.canary()
    with listener(guest):
        for _ in range(1500):
            guest.driver._next = guest.driver._heap + 0x4_0000
            data = rng.randbytes(rng.choice([0, 0, 1, 100, 5000]))
            guest.send(
                rng.randrange(10),
                data,
                host=rng.choice([PORT, PORT, 9, rng.getrandbits(32)]),
                guest=rng.randrange(8),
                size=rng.choice([len(data), len(data), 0, rng.getrandbits(32)]),
                flags=rng.randrange(5),
                room=rng.choice([0, 4096, 1 << 32 - 1]) & 0xFFFF_FFFF,
                done=rng.getrandbits(32),
            )
            if rng.random() < 0.7:
                guest.poll()
            assert len(guest.device._messages) <= v.MAX_MESSAGES + 2 * v.MAX_CONNECTIONS
    assert guest.driver.status == 15 and guest.rig.canary() == before


def test_a_packet_without_a_header_breaks_the_device(guest):
    guest.tx.add([b"short"])
    guest.tx.kick()
    guest.driver.wait(lambda: guest.driver.status & f.NEEDS_RESET)


def test_a_restored_guest_is_told_that_its_connections_are_gone(guest):
    event = guest.driver.queues[2]
    head = event.add([], [4])
    event.kick()
    guest.device.poll()
    state = guest.rig.transport.save()
    guest.rig.transport.load(state)
    event.wait(lambda: event.pending[head].written == 4)
    assert event.result(head) == [v.TRANSPORT_RESET]


def test_the_server_socket_goes_with_the_device(tmp_path):
    guest = Guest(tmp_path, False)
    assert (tmp_path / "vsock").exists()
    guest.rig.close()
    assert not (tmp_path / "vsock").exists()
