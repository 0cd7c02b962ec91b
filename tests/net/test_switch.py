# SPDX-License-Identifier: Apache-2.0
"""The switch: where frames go, and what its ports take and do not take."""

import contextlib
import os
import select
import socket
import struct

import pytest

from kvmpy.errors import NetworkError, StateError
from kvmpy.net import PacketSocket, Switch

EVERYBODY = b"\xff" * 6
A, B, C = (bytes([0x52, 0x54, 0, 0, 0, n]) for n in (1, 2, 3))
PLAIN = bytes(12)


def frame(to, sender, text=b"hello"):
    return to + sender + b"\x88\xb5" + text.ljust(46, b"\0")


def send(port, data, header=PLAIN):
    os.write(port.fd, header + data)


def receive(port, wait=5.0):
    """The next frame, without its header; None: nothing came."""
    if not select.select([port.fd], [], [], wait)[0]:
        return None
    return os.read(port.fd, 70000)[12:]


@pytest.fixture
def switch():
    with Switch() as switch:
        yield switch


def test_it_learns_who_is_where(switch):
    first, second, third = (switch.port() for _ in range(3))
    send(first, frame(B, A))  # nobody knows B yet: to all
    assert receive(second) == frame(B, A) and receive(third) == frame(B, A)
    send(second, frame(A, B))
    assert receive(first) == frame(A, B)
    send(first, frame(B, A, b"again"))
    assert receive(second) == frame(B, A, b"again")
    assert receive(third, 0.1) is None and receive(first, 0) is None
    send(third, frame(EVERYBODY, C))
    assert receive(first) == receive(second) == frame(EVERYBODY, C)
    send(second, frame(B, B))  # back to where it came from: nowhere
    assert receive(first, 0.1) is None


def test_a_port_with_a_locked_address(switch):
    first, second = switch.port(mac=A), switch.port(mac="52:54:00:00:00:02")
    send(first, frame(B, C))
    send(first, frame(B, EVERYBODY))
    assert receive(second, 0.1) is None
    send(first, frame(B, A))
    assert receive(second) == frame(B, A)
    assert first.stats()["rx_spoofed"] == 2


def test_floods_are_limited():
    with Switch(flood_limit=5) as switch:
        first, second = switch.port(), switch.port()
        for number in range(40):
            send(first, frame(EVERYBODY, A, bytes([number])))
        count = 0
        while receive(second, 0.3) is not None:
            count += 1
        assert 5 <= count < 40
        assert first.stats()["flood_dropped"] == 40 - count


def test_many_addresses_behind_one_port_push_nobody_out(switch):
    first, second, third = (switch.port() for _ in range(3))
    send(second, frame(EVERYBODY, B))
    assert receive(first) and receive(third)
    for number in range(1500):
        sender = b"\x52\x55" + struct.pack(">I", number)
        send_when_possible(first, frame(sender, sender))
    for port in (second, third):
        while receive(port, 0.2) is not None:
            pass  # those that it did not learn went to all
    send(first, frame(B, A))
    assert receive(second) == frame(B, A) and receive(third, 0.1) is None, "B is known still"


def tcp_frame(payload, flags=0x18):
    """From A to B, with the sum of the pseudo header in its checksum field."""
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 40 + len(payload), 7, 0x4000, 64, 6, 0, b"\n\0\0\1", b"\n\0\0\2")
    ip = ip[:10] + struct.pack(">H", inet(ip)) + ip[12:]
    pseudo = b"\n\0\0\1\n\0\0\2" + struct.pack(">HH", 6, 20 + len(payload))
    tcp = struct.pack(">HHIIBBHHH", 1000, 80, 0x10000, 1, 5 << 4, flags, 500, ~inet(pseudo) & 0xFFFF, 0)
    return B + A + b"\x08\x00" + ip + tcp + payload


def inet(data):
    """RFC 1071."""
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def check_tcp(data):
    assert inet(data[14:34]) == 0
    segment = data[34 : 14 + struct.unpack(">H", data[16:18])[0]]
    assert inet(data[26:34] + struct.pack(">HH", 6, len(segment)) + segment) == 0
    return segment


@pytest.mark.parametrize("size", [1, 1000, 1001, 5000, 60000])
def test_what_a_receiver_does_not_take_is_done_for_it(switch, size):
    """Checksums and segmentation (virtio 1.2, 5.1.6.2)."""
    first, second = switch.port(), switch.port()
    payload = os.urandom(size)
    header = struct.pack("<BBHHHHH", 1, 1 if size > 1000 else 0, 54, 1000, 34, 16, 0)
    second.set_offloads(0)
    send(first, tcp_frame(payload, 0x19), header)
    got, sequence = b"", 0x10000
    while len(got) < size:
        data = receive(second)
        segment = check_tcp(data)
        assert struct.unpack(">I", segment[4:8])[0] == sequence + len(got)
        got += segment[20:]
        assert segment[13] == (0x19 if len(got) == size else 0x10), "FIN and PSH only at the end"
        assert len(segment) <= 1020
    assert got == payload
    second.set_offloads(3)  # it takes both: as it is
    send(first, tcp_frame(payload), header)
    assert select.select([second.fd], [], [], 5)[0]
    assert os.read(second.fd, 70000) == header[:10] + b"\1\0" + tcp_frame(payload)


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<BBHHHHH", 1, 1, 54, 0, 34, 16, 0),
        struct.pack("<BBHHHHH", 1, 1, 54, 1, 34, 16, 0),
        struct.pack("<BBHHHHH", 1, 4, 54, 1000, 34, 16, 0),
        struct.pack("<BBHHHHH", 1, 1, 54, 1000, 35, 16, 0),
        struct.pack("<BBHHHHH", 1, 3, 54, 1000, 34, 6, 0),
        struct.pack("<BBHHHHH", 1, 0, 54, 0, 0xFFFF, 0xFFFF, 0),
        struct.pack("<BBHHHHH", 1, 0x7F, 54, 1000, 34, 16, 0),
    ],
)
def test_headers_that_do_not_fit_their_frame_are_dropped(switch, header):
    first, second = switch.port(), switch.port()
    second.set_offloads(0)
    send(first, tcp_frame(bytes(3000)), header)
    send(first, frame(B, A))
    assert receive(second) == frame(B, A)


def test_a_port_that_stands_still_holds_up_nobody(switch):
    first, second, third = (switch.port() for _ in range(3))
    for port, mac in ((second, B), (third, C)):
        send(port, frame(A, mac))
    assert receive(first) and receive(first)
    for port in (second, third):
        while receive(port, 0.05) is not None:
            pass
    for _ in range(20000):  # B never reads
        with contextlib.suppress(BlockingIOError):
            send(first, frame(B, A, bytes(1400)))
    send_when_possible(first, frame(C, A))
    assert receive(third) == frame(C, A)
    assert second.stats()["tx_dropped"] > 0


def send_when_possible(port, data):
    assert select.select([], [port.fd], [], 10)[1]
    send(port, data)


def test_uplinks_without_a_header(switch):
    backend, peer = PacketSocket.pair()
    switch.connect(backend)
    port = switch.port()
    with peer:
        peer.settimeout(5)
        header = struct.pack("<BBHHHHH", 1, 0, 0, 0, 34, 16, 0)
        send(port, tcp_frame(b"x"), header)
        check_tcp(peer.recv(2000))
        peer.send(frame(A, B))
        assert receive(port) == frame(A, B)


def test_all_ports_taken_and_given_back(switch):
    ports = [switch.port() for _ in range(64)]
    with pytest.raises(NetworkError, match="no port left"):
        switch.port()
    ports[3].close()
    ports[3].close()
    switch.port()


def test_a_guest_that_hangs_up(switch):
    first, second = switch.port(), switch.port()
    with socket.socket(fileno=os.dup(first.fd)) as end:
        end.shutdown(socket.SHUT_RDWR)
    send(second, frame(EVERYBODY, B))
    assert receive(second, 0.1) is None


def test_closed(switch):
    switch.close()
    with pytest.raises(StateError):
        switch.port()


@pytest.mark.parametrize("mac", ["", "52:54", "01:00:00:00:00:01"])
def test_addresses_that_cannot_be_locked(switch, mac):
    with pytest.raises(ValueError):
        switch.port(mac=mac)
