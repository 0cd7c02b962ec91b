# SPDX-License-Identifier: Apache-2.0
"""The network device (virtio 1.2, 5.1) over a packet socket and over a tap interface."""

import contextlib
import os
import socket
import struct

import pytest
from virtio_rig import Rig

from kvmpy.net import PacketSocket, TapFd
from kvmpy.virtio import Net
from kvmpy.virtio import features as f
from kvmpy.virtio import net as n

RX, TX, CONTROL = 0, 1, 2
PLAIN = bytes(12)
OFFLOADS = n.CSUM | n.HOST_TSO4 | n.HOST_TSO6 | n.HOST_ECN


def frame(size=60, fill=0x42):
    return bytes.fromhex("525400123457 525400123456 88b5") + bytes([fill]) * (size - 14)


class Offloading(PacketSocket):
    """A packet socket whose frames carry the header, as a tap's do."""

    vnet_header = True
    offloads = 0x1F

    def __init__(self, sock):
        super().__init__(sock)
        self.asked = []

    def set_offloads(self, offloads):
        self.asked.append(offloads)


class Wire:
    def __init__(self, threaded, kind=PacketSocket, **options):
        ours, self.peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.peer.settimeout(10)
        self.backend = kind(ours)
        self.device = Net(self.backend, mac="52:54:00:12:34:56", threaded=threaded, **options)
        self.rig = Rig(self.device)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.rig.close()
        self.peer.close()

    def start(self, wanted=0, buffers=8, room=2048):
        driver = self.rig.start(wanted)
        self.heads = [driver.queues[RX].add([], [room]) for _ in range(buffers)]
        driver.queues[RX].kick()
        return driver

    def received(self, count):
        """The next `count` used receive buffers: (length, bytes)."""
        queue = self.rig.driver.queues[RX]
        found = []

        def enough():
            found.extend(queue.take())
            return len(found) >= count

        self.rig.driver.wait(enough)
        return [(size, b"".join(queue.result(head))[:size]) for head, size in found]


@pytest.fixture
def wire(threaded):
    with Wire(threaded) as wire:
        yield wire


def test_configuration_space(threaded):
    with Wire(threaded, mtu=1400) as wire:
        driver = wire.rig.driver
        assert driver.offered() & (n.MAC | n.MTU | n.STATUS | n.MRG_RXBUF | n.CTRL_VQ) == (
            n.MAC | n.MTU | n.STATUS | n.MRG_RXBUF | n.CTRL_VQ
        )
        assert not driver.offered() & (OFFLOADS | n.GUEST_CSUM), "no header on the wire, no offloads"
        assert driver.config(0, 8) & (1 << 48) - 1 == int.from_bytes(wire.device.mac, "little")
        assert driver.config(6, 2) == 1 and driver.config(10, 2) == 1400


@pytest.mark.parametrize(
    "mac", ["01:00:00:00:00:01", "00:00:00:00:00:00", "52:54:00", "x", "52:54:00:12:34:567", b"abc"]
)
def test_mac_addresses_of_no_card(mac):
    backend, peer = PacketSocket.pair()
    with contextlib.closing(backend), peer, pytest.raises(ValueError, match="MAC"):
        Net(backend, mac=mac)


def test_frames_go_out_without_the_header(wire):
    driver = wire.start()
    for size in (14, 60, 1514, 65000):
        driver.queues[TX].request([PLAIN[:5], PLAIN[5:] + frame(size)[:7], frame(size)[7:]])
        assert wire.peer.recv(70000) == frame(size)
    assert wire.device.stats()["tx_frames"] == 4


@pytest.mark.parametrize("wanted", [0, n.MRG_RXBUF, n.MRG_RXBUF | f.EVENT_IDX])
def test_frames_come_in_with_a_header(wire, wanted):
    wire.start(wanted)
    wire.peer.send(frame(60))
    wire.peer.send(frame(1514, 7))
    assert wire.received(2) == [(72, bytes(10) + b"\1\0" + frame(60)), (1526, bytes(10) + b"\1\0" + frame(1514, 7))]


def test_a_large_frame_is_merged_from_buffers(wire):
    driver = wire.start(n.MRG_RXBUF, buffers=6, room=1000)
    wire.peer.send(frame(3500))
    got = wire.received(4)
    assert [size for size, _ in got] == [1000, 1000, 1000, 512]
    data = b"".join(part for _, part in got)
    assert data == bytes(10) + b"\4\0" + frame(3500)
    assert driver.status == 15


def test_a_frame_waits_for_enough_buffers_and_nothing_is_lost(wire):
    driver = wire.start(n.MRG_RXBUF | f.EVENT_IDX, buffers=2, room=1000)
    wire.peer.send(frame(3500))
    wire.peer.send(frame(60))
    wire.rig.device.poll()
    assert driver.queues[RX].take() == []
    for _ in range(4):
        driver.queues[RX].add([], [1000])
    driver.queues[RX].kick()
    got = wire.received(5)
    assert b"".join(part for _, part in got) == bytes(10) + b"\4\0" + frame(3500) + bytes(10) + b"\1\0" + frame(60)


def test_a_frame_that_never_fits_is_dropped(wire):
    driver = wire.start(0, buffers=4, room=100)
    wire.peer.send(frame(500))
    wire.peer.send(frame(60))
    assert wire.received(1) == [(72, bytes(10) + b"\1\0" + frame(60))]
    assert wire.device.stats()["rx_dropped"] == 1
    assert driver.status == 15


def test_a_merged_frame_that_never_fits_is_dropped(wire):
    driver = wire.rig.start(n.MRG_RXBUF, 4)
    for _ in range(4):
        driver.queues[RX].add([], [100])
    driver.queues[RX].kick()
    wire.peer.send(frame(500))
    wire.peer.send(frame(60))
    assert wire.received(1) == [(72, bytes(10) + b"\1\0" + frame(60))]


@pytest.mark.parametrize(
    "out", [b"", b"x" * 11, PLAIN, PLAIN + b"x" * 13, PLAIN + b"x" * 65563, b"\1" + PLAIN[1:] + frame()]
)
def test_malformed_frames_are_dropped(wire, out):
    driver = wire.start()
    if not out:
        head = driver.queues[TX].add([], [64])
        driver.queues[TX].kick()
        driver.queues[TX].wait(lambda: driver.queues[TX].pending[head].written is not None)
    else:
        driver.queues[TX].request([out])
    driver.queues[TX].request([PLAIN + frame()])
    assert wire.peer.recv(70000) == frame()
    assert wire.device.stats()["malformed"] == 1


def vnet(flags=1, gso=1, hdr=54, size=1400, start=34, offset=16):
    return struct.pack("<BBHHHHH", flags, gso, hdr, size, start, offset, 0)


@pytest.mark.parametrize(
    ("features", "header", "good"),
    [
        (OFFLOADS, vnet(), True),
        (OFFLOADS, vnet(gso=0), True),
        (OFFLOADS, vnet(gso=0x81), True),
        (OFFLOADS, vnet(gso=4), True),
        (0, vnet(gso=0), False),
        (n.CSUM, vnet(), False),
        (n.CSUM | n.HOST_TSO4, vnet(gso=0x81), False),
        (OFFLOADS, vnet(flags=0), False),
        (OFFLOADS, vnet(flags=2, gso=0), False),
        (OFFLOADS, vnet(size=0), False),
        (OFFLOADS, vnet(gso=3), False),
        (OFFLOADS, vnet(gso=0x7F), False),
        (OFFLOADS, vnet(gso=0x80), False),
        (OFFLOADS, vnet(start=0xFFFF, offset=0xFFFF), False),
        (OFFLOADS, vnet(start=1499), False),
        (OFFLOADS, vnet(hdr=0xFFFF), False),
    ],
)
def test_only_negotiated_offloads_with_sound_headers_go_out(threaded, features, header, good):
    with Wire(threaded, Offloading) as wire:
        driver = wire.start(features)
        driver.queues[TX].request([header + frame(1514)])
        driver.queues[TX].request([PLAIN + frame(60)])
        seen = wire.peer.recv(70000)
        assert seen == (header if good else PLAIN) + (frame(1514) if good else frame(60))


def test_receive_offloads_are_what_the_driver_takes(threaded):
    with Wire(threaded, Offloading) as wire:
        driver = wire.start(n.GUEST_CSUM | n.GUEST_TSO4 | n.CTRL_VQ | n.CTRL_GUEST_OFFLOADS)
        assert wire.backend.asked[-1] == 3
        ctrl = driver.queues[CONTROL]
        assert ctrl.request([b"\5\0", struct.pack("<Q", n.GUEST_CSUM)], [1]) == [b"\0"]
        assert wire.backend.asked[-1] == 1
        assert ctrl.request([b"\5\0", struct.pack("<Q", n.GUEST_TSO6)], [1]) == [b"\1"]
        driver.reset()
        assert wire.backend.asked[-1] == 0


@pytest.mark.parametrize("features", [n.HOST_TSO4, n.GUEST_TSO4, n.CTRL_RX, n.CSUM | n.HOST_ECN])
def test_features_need_others(threaded, features):
    with Wire(threaded, Offloading) as wire:
        assert not wire.rig.driver.negotiate(features)


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        (b"\0\0\1", b"\0"), (b"\0\1\0", b"\0"), (b"\0\2\1", b"\1"), (b"\0\0", b"\1"), (b"\0\0\2", b"\1"),
        (b"\1\1\x52\x54\0\1\2\3", b"\0"), (b"\1\1\x52\x54\0\1\2", b"\1"),
        (b"\1\0" + bytes(8), b"\0"), (b"\1\0" + b"\1\0\0\0" + b"abcdef" + bytes(4), b"\0"),
        (b"\1\0" + b"\xff\xff\xff\xff", b"\1"), (b"\1\0" + bytes(9), b"\1"), (b"\1\0" + bytes(7), b"\1"),
        (b"\4\0\1\0", b"\1"), (b"\xff\xff", b"\1"), (b"\1\0" + bytes(5000), b"\1"),
    ],
)  # fmt: skip
def test_control_commands(wire, command, answer):
    driver = wire.start(n.CTRL_VQ | n.CTRL_RX | n.CTRL_MAC_ADDR)
    assert driver.queues[CONTROL].request([command], [1]) == [answer]
    if command[:2] == b"\1\1" and answer == b"\0":
        assert bytes(driver.config(at, 1) for at in range(6)) == command[2:]
        driver.reset()
        assert bytes(driver.config(at, 1) for at in range(6)) == wire.device.mac


def test_the_other_end_hangs_up(wire):
    driver = wire.start()
    wire.peer.close()
    driver.wait(lambda: driver.config(6, 2) == 0)
    assert driver.status == 15
    wire.start()
    assert driver.config(6, 2) == 0, "the cable stays out"


def test_a_slow_receiver_holds_frames_back_in_order(wire):
    driver = wire.start()
    queue = driver.queues[TX]
    heads = [queue.add([PLAIN + frame(1000, number)]) for number in range(250)]
    queue.kick()
    seen = [wire.peer.recv(70000)[14]]
    wire.peer.settimeout(0.01)
    while len(seen) < 250:
        with contextlib.suppress(TimeoutError):
            seen.append(wire.peer.recv(70000)[14])
        wire.rig.device.poll()
    assert seen == list(range(250))
    queue.wait(lambda: all(queue.pending[head].written is not None for head in heads))


def test_a_tap_interface(threaded):
    """Through the kernel: a frame from the guest is seen on the interface, one sent to it reaches the guest."""
    try:
        backend = TapFd.open(f"kvmpyt{os.getpid() % 100000}")
    except OSError as error:
        pytest.skip(f"no tap interface: {error}")
    from pyroute2 import IPRoute

    with IPRoute() as ip, Rig(Net(backend, threaded=threaded)) as rig:
        index = ip.link_lookup(ifname=backend.name)[0]
        ip.link("set", index=index, state="up")
        driver = rig.start(n.CSUM | n.HOST_TSO4 | n.GUEST_CSUM | n.GUEST_TSO4 | n.MRG_RXBUF)
        for _ in range(64):
            driver.queues[RX].add([], [2048])
        driver.queues[RX].kick()
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88B5)) as wire:
            wire.bind((backend.name, 0x88B5))
            wire.settimeout(10)
            driver.queues[TX].request([PLAIN + frame(100)])
            assert wire.recv(2000) == frame(100)
            wire.send(frame(200, 9))
            seen = []

            def arrived():
                for head, size in driver.queues[RX].take():
                    seen.append(driver.queues[RX].result(head)[0][12:size])
                return frame(200, 9) in seen

            driver.wait(arrived)
