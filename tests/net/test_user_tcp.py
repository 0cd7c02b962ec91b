# SPDX-License-Identifier: Apache-2.0
"""TCP of the user-mode network, frame by frame: what a guest is told of holes, and what is sent to it again."""

import contextlib
import os
import select
import socket
import struct
import time
from typing import NamedTuple

import pytest

from kvmpy.net import UserNet

FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
GUEST, GATEWAY = bytes.fromhex("525400000001"), bytes.fromhex("52550a000202")
ME, HOST = bytes([10, 0, 2, 15]), bytes([10, 0, 2, 2])
UNSUMMED = b"\x02" + bytes(11)  # VIRTIO_NET_HDR_F_DATA_VALID: the sums count as right
MSS = 1000
OPTIONS = struct.pack(">BBHBBBB", 2, 4, MSS, 1, 3, 3, 0)
PERMITTED = b"\1\1\4\2"


class Segment(NamedTuple):
    seq: int
    ack: int
    flags: int
    window: int
    options: dict[int, bytes]
    data: bytes

    @property
    def blocks(self):
        words = struct.unpack(f">{len(self.options.get(5, b'')) // 4}I", self.options.get(5, b""))
        return list(zip(words[::2], words[1::2], strict=True))


def options_of(data):
    options = {}
    while data and data[0]:
        if data[0] == 1:
            data = data[1:]
        else:
            assert 2 <= data[1] <= len(data)
            options[data[0]] = data[2 : data[1]]
            data = data[data[1] :]
    return options


class Guest:
    """One connection of a guest that does just what it is told. Its numbers, and those of its peer, count from 0."""

    def __init__(self, net):
        self.fd = net.fd
        self.mine, self.theirs, self.port, self.there = 0xFFFFFF00, 0, 3000, 7000  # they wrap soon
        net.set_offloads(0)

    def frame(self, kind, data):
        os.write(self.fd, UNSUMMED + GATEWAY + GUEST + struct.pack(">H", kind) + data)

    def send(self, flags, seq=0, ack=0, data=b"", *, options=b"", window=65535):
        head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 40 + len(options) + len(data), 7, 0, 64, 6, 0, ME, HOST)
        head = head[:10] + struct.pack(">H", 0xFFFF ^ _folded(head)) + head[12:]
        numbers = (self.mine + seq) % (1 << 32), (self.theirs + ack) % (1 << 32)
        size = (5 + len(options) // 4) << 4
        tcp = struct.pack(">HHIIBBHHH", self.port, self.there, *numbers, size, flags, window, 0, 0)
        self.frame(0x800, head + tcp + options + data)

    def sack(self, ack, *blocks, seq=0):
        words = [(self.theirs + word) % (1 << 32) for block in blocks for word in block]
        self.send(ACK, seq, ack, options=bytes([1, 1, 5, 2 + 4 * len(words)]) + struct.pack(f">{len(words)}I", *words))

    def arp(self):
        self.frame(0x806, b"\0\1\x08\0\6\4\0\1" + GUEST + ME + bytes(6) + HOST)

    def receive(self, seconds=20):
        """The next segment; None: there came none."""
        until = time.monotonic() + seconds
        while select.select([self.fd], [], [], max(until - time.monotonic(), 0))[0]:
            packet = os.read(self.fd, 70000)[26:]
            if packet[9] != 6 or packet[:1] != b"\x45":
                continue
            tcp = packet[20 : int.from_bytes(packet[2:4], "big")]
            size = (tcp[12] >> 4) * 4
            self.port, self.there = struct.unpack(">HH", tcp[2:4] + tcp[:2])
            seq, ack = struct.unpack(">II", tcp[4:12])
            if tcp[13] & SYN:
                self.theirs = seq
            options = options_of(tcp[20:size])
            blocks = struct.unpack(f">{len(options.get(5, b'')) // 4}I", options.get(5, b""))
            if blocks:
                options[5] = struct.pack(f">{len(blocks)}I", *((word - self.mine) % (1 << 32) for word in blocks))
            numbers = (seq - self.theirs) % (1 << 32), (ack - self.mine) % (1 << 32)
            return Segment(*numbers, tcp[13], int.from_bytes(tcp[14:16], "big"), options, tcp[size:])
        return None

    def data(self, count):
        """So many segments with data: where they begin."""
        found = []
        while len(found) < count:
            segment = self.receive()
            assert segment, found
            if segment.data:
                found.append(segment.seq)
        return found

    def quiet(self):
        """What was sent before has been answered."""
        self.send(ACK, 1 << 20)  # beyond the window: it makes the network answer
        while (segment := self.receive()) and segment.data:
            yield segment.seq

    def hello(self, options=PERMITTED, wait=0.0):
        """The handshake; the options of the answer. A guest that takes its time is not suspected early of a loss."""
        self.send(SYN, options=OPTIONS + options)
        answer = self.receive()
        assert (answer.flags, answer.ack) == (SYN | ACK, 1)
        time.sleep(wait)
        self.send(ACK, 1, 1)
        return answer.options


def _folded(head):
    total = sum(struct.unpack(f">{len(head) // 2}H", head))
    return (total & 0xFFFF) + (total >> 16)


@pytest.fixture
def net():
    with UserNet(dns=[]) as net:
        yield net


@pytest.fixture
def guest(net):
    return Guest(net)


@pytest.fixture
def host(net):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)
        net.add_guest_forward(f"tcp::7000-127.0.0.1:{listener.getsockname()[1]}")
        yield listener


@contextlib.contextmanager
def accepted(host):
    sock = host.accept()[0]
    sock.settimeout(20)
    with sock:
        yield sock


@pytest.mark.parametrize("offered", [PERMITTED, b""])
def test_sack_is_permitted_when_the_guest_offers_it(guest, host, offered):
    options = guest.hello(offered)
    assert options.get(4) == (b"" if offered else None)
    assert 2 in options and 3 in options
    guest.send(ACK, 101, 1, bytes(100))
    assert len(guest.receive().blocks) == bool(offered)


def test_sack_is_offered_to_a_guest_that_listens(guest, net):
    forward = net.add_forward("tcp:127.0.0.1:0-:80")
    guest.arp()
    with socket.create_connection(("127.0.0.1", forward.port)):
        segment = guest.receive()
    assert segment.flags == SYN and segment.options[4] == b""


def test_holes_are_told_newest_first(guest, host, net):
    data = os.urandom(1200)
    guest.hello()

    def send(number):
        guest.send(ACK, 1 + number * 100, 1, data[number * 100 : number * 100 + 100])
        answer = guest.receive()
        assert answer.flags == ACK and (answer.ack - 1) % 100 == 0
        return (answer.ack - 1) // 100, [((at - 1) // 100, (end - 1) // 100) for at, end in answer.blocks]

    with accepted(host) as sock:
        assert send(1) == (0, [(1, 2)])
        assert send(3) == (0, [(3, 4), (1, 2)])
        assert send(1) == (0, [(1, 2), (3, 4)])
        assert send(5) == (0, [(5, 6), (1, 2), (3, 4)])
        assert send(2) == (0, [(1, 4), (5, 6)])
        assert send(0) == (4, [(5, 6)])
        assert send(9) == (4, [(9, 10), (5, 6)])
        assert send(7) == (4, [(7, 8), (9, 10), (5, 6)])
        assert send(11) == (4, [(11, 12), (7, 8), (9, 10), (5, 6)])
        assert send(4) == (6, [(11, 12), (7, 8), (9, 10)])
        assert send(8) == (6, [(7, 10), (11, 12)])
        assert send(10) == (6, [(7, 12)])
        assert send(6) == (12, [])
        assert sock.recv(1200, socket.MSG_WAITALL) == data
    assert net.stats()["tcp_out_of_order"] == 10


def test_more_holes_than_are_kept_and_a_fin_behind_them(guest, host):
    data = os.urandom(5000)
    guest.hello()
    with accepted(host) as sock:
        for number in range(1, 50, 2):
            last = FIN if number == 49 else 0
            guest.send(ACK | last, 1 + number * 100, 1, data[number * 100 : number * 100 + 100])
            assert guest.receive().ack == 1
        guest.send(ACK, 1, 1, data[:4900])  # some are kept, some were not; the FIN was seen
        assert guest.receive().ack == 4901
        guest.send(ACK, 4901, 1, data[4900:])
        assert guest.receive().ack == 5002
        assert sock.recv(6000, socket.MSG_WAITALL) == data


def test_what_is_kept_ends_with_the_window(guest, host):
    guest.hello()
    with accepted(host):
        guest.send(ACK, 1, 1, b"x")
        answer = guest.receive()
        edge = answer.ack + (answer.window << 4)
        guest.send(ACK | FIN, edge - 50, 1, bytes(100))  # a FIN behind it counts as little
        assert guest.receive().blocks == [(edge - 50, edge)]
        guest.send(ACK, edge, 1, bytes(100))
        assert guest.receive().blocks == [(edge - 50, edge)]
        guest.send(ACK, edge - 200, 1, bytes(100))
        assert guest.receive().blocks == [(edge - 200, edge - 100), (edge - 50, edge)]


@pytest.fixture
def sent(guest, host):
    """A connection on which twenty segments came from the host, and its socket there. Nothing is answered yet."""

    def make(options):
        guest.hello(options, wait=0.5)
        sock = stack.enter_context(accepted(host))
        sock.sendall(bytes(20 * MSS))
        assert guest.data(20) == list(range(1, 20 * MSS, MSS))
        return sock

    with contextlib.ExitStack() as stack:
        yield make


def test_only_what_the_guest_lacks_is_sent_again(guest, sent, net):
    sock = sent(PERMITTED)
    one = [1 + MSS * number for number in range(22)]
    guest.sack(one[2], (one[3], one[5]))  # much may be on its way still: the window is smaller now
    assert guest.data(1) == [one[2]]
    assert not list(guest.quiet())
    guest.sack(one[2], (one[9], one[20]), (one[6], one[8]), (one[3], one[5]))
    assert guest.data(2) == [one[5], one[8]]
    assert not list(guest.quiet())
    guest.sack(one[5], (one[6], one[8]), (one[9], one[20]))  # the first arrived, the others are on their way
    assert not list(guest.quiet())
    sock.sendall(bytes(2 * MSS))
    assert guest.data(2) == one[20:]
    guest.sack(one[5], (one[6], one[8]), (one[9], one[21]))  # what was sent later is there: they are lost once more
    assert guest.data(2) == [one[5], one[8]]
    guest.send(ACK, 1, one[21] + MSS)
    assert not list(guest.quiet())
    assert net.stats()["tcp_retransmitted"] == 5


def test_a_guest_without_sack_gets_the_next_one_with_each_partial_answer(guest, sent, net):
    sent(b"")
    one = [1 + MSS * number for number in range(21)]
    guest.send(ACK, 1, one[2])
    for _ in range(2):
        guest.send(ACK, 1, one[2])
        assert not list(guest.quiet())
    guest.send(ACK, 1, one[2])
    assert guest.data(1) == [one[2]]
    guest.send(ACK, 1, one[5])
    assert guest.data(1) == [one[5]]
    guest.send(ACK, 1, one[20])
    assert not list(guest.quiet())
    assert net.stats()["tcp_retransmitted"] == 2


def test_lies_about_holes_do_nothing(guest, sent, net):
    sent(PERMITTED)
    one = [1 + MSS * number for number in range(22)]
    guest.send(ACK, 1, one[10])
    guest.sack(one[10], (one[2], one[3]))  # it has been acknowledged
    guest.sack(one[10], (one[12], one[11]), (one[12], one[12]))
    guest.sack(one[10], (one[12], one[20] + 1))  # it was never sent
    guest.sack(one[10], (one[12] + (1 << 31), one[13] + (1 << 31)))
    for options in (b"\1\1\5\x22" + bytes(8), b"\5\0", b"\5\2\1\1", b"\1\1\5\7" + bytes(8), b"\1\1\1\5"):
        guest.send(ACK, 1, one[9], options=options + bytes(-len(options) % 4))
    assert not list(guest.quiet())
    assert net.stats()["tcp_retransmitted"] == 0
    guest.send(ACK, 1, one[20])
    assert not list(guest.quiet())


def test_what_the_guest_threw_away_is_sent_again_by_the_timer(guest, sent):
    sent(PERMITTED)
    one = [1 + MSS * number for number in range(21)]
    guest.sack(one[0], (one[1], one[20]))
    assert guest.data(2) == [one[0], one[0]]  # at once, and when nothing more is heard ...
    assert guest.data(4) == one[1:5]  # ... all that is not acknowledged
