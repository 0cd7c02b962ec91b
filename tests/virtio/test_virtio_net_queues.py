# SPDX-License-Identifier: Apache-2.0
"""Several queue pairs of a network card (virtio 1.2, 5.1.2, 5.1.6.5.5), over packet sockets and over a tap."""

import os
import socket

import pytest
from virtio_rig import Rig

from kvmpy.errors import NetworkError, StateError
from kvmpy.net import PacketSocket, Tap, TapFd
from kvmpy.virtio import Net
from kvmpy.virtio import net as n

PLAIN = bytes(12)
MQ = n.MQ | n.CTRL_VQ
PAIRS = 3


class Queue(PacketSocket):
    """A packet socket as one of several queues."""

    def __init__(self, sock):
        super().__init__(sock)
        self.active = True

    def set_active(self, active):
        self.active = active


@pytest.fixture
def rig(threaded):
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(PAIRS)]
    backends = [Queue(ours) for ours, _ in pairs]
    with Rig(Net(backends, threaded=threaded)) as rig:
        rig.backends = backends
        rig.peers = [peer for _, peer in pairs]
        for peer in rig.peers:
            peer.settimeout(10)
        yield rig
    for _, peer in pairs:
        peer.close()


def use(driver, count, control=2 * PAIRS):
    return driver.queues[control].request([bytes([4, 0]), count.to_bytes(2, "little")], [1])[0]


def frame(number):
    return bytes([number]) * 60


def test_configuration(rig):
    assert rig.driver.offered() & n.MQ
    assert rig.driver.config(8, 2) == PAIRS
    assert [rig.device.queues[i].max_size for i in range(2 * PAIRS + 1)] == [256] * 2 * PAIRS + [64]


def test_every_pair_moves_frames(rig):
    driver = rig.start(MQ)
    assert use(driver, PAIRS) == b"\0"
    for number, peer in enumerate(rig.peers):
        rx, tx = driver.queues[2 * number : 2 * number + 2]
        tx.request([PLAIN, frame(number)])
        assert peer.recv(2048) == frame(number)
        head = rx.add([], [2048])
        rx.kick()
        peer.send(frame(number + 100))
        rx.wait(lambda rx=rx, head=head: rx.pending[head].written is not None)
        assert rx.result(head)[0][12:72] == frame(number + 100)
    stats = rig.device.stats()
    assert stats["tx_frames"] == stats["rx_frames"] == PAIRS


def test_only_the_pairs_in_use_receive(rig):
    driver = rig.start(MQ)
    heads = []
    for number in range(PAIRS):
        queue = driver.queues[2 * number]
        heads.append(queue.add([], [2048]))
        queue.kick()
    rig.peers[1].send(frame(1))
    rig.peers[0].send(frame(0))
    driver.queues[0].wait(lambda: driver.queues[0].pending[heads[0]].written is not None)
    assert driver.queues[2].take() == [] and [one.active for one in rig.backends] == [True, False, False]
    assert use(driver, 2) == b"\0"
    driver.queues[2].wait(lambda: driver.queues[2].pending[heads[1]].written is not None)
    assert [one.active for one in rig.backends] == [True, True, False]
    rig.driver.reset()
    assert [one.active for one in rig.backends] == [True, False, False]


def test_numbers_of_pairs_that_cannot_be(rig):
    driver = rig.start(MQ)
    for count in (0, PAIRS + 1, 0xFFFF):
        assert use(driver, count) == b"\1"
    assert driver.queues[2 * PAIRS].request([bytes([4, 0, 1])], [1]) == [b"\1"]
    assert driver.queues[2 * PAIRS].request([bytes([4, 1, 1, 0])], [1]) == [b"\1"]
    assert driver.status == 15


def test_a_driver_without_mq_finds_the_control_queue_behind_the_first_pair(rig):
    driver = rig.start(n.CTRL_VQ | n.CTRL_MAC_ADDR, only=[0, 1, 2])
    assert driver.queues[2].request([bytes([1, 1]), bytes([2, 0, 0, 0, 0, 9])], [1]) == [b"\0"]
    assert driver.config(5, 1) == 9
    assert use(driver, 2, control=2) == b"\1"
    driver.queues[1].request([PLAIN, frame(7)])
    assert rig.peers[0].recv(2048) == frame(7)


def test_what_commands_set_survives_a_restore(rig):
    driver = rig.start(MQ | n.CTRL_MAC_ADDR)
    assert use(driver, 2) == b"\0"
    assert driver.queues[-1].request([bytes([1, 1]), bytes([2, 0, 0, 0, 0, 9])], [1]) == [b"\0"]
    state = rig.transport.save()
    driver.write(0x70, 0)  # a reset
    assert [one.active for one in rig.backends] == [True, False, False]
    rig.transport.load(state)
    assert [one.active for one in rig.backends] == [True, True, False]
    assert driver.config(5, 1) == 9
    rig.peers[1].send(frame(3))
    head = driver.queues[2].add([], [2048])
    driver.queues[2].kick()
    driver.queues[2].wait(lambda: driver.queues[2].pending[head].written is not None)
    for key, wrong in (("pairs", 4), ("pairs", 0), ("mac", b"short"), ("offloads", 1)):
        with pytest.raises(ValueError):
            rig.transport.load({**state, "device": {**state["device"], key: wrong}})


def test_one_pair_that_ends_takes_the_link_down(rig):
    driver = rig.start(MQ | n.STATUS)
    assert use(driver, PAIRS) == b"\0"
    rig.peers[1].close()
    driver.queues[2].add([], [2048])
    driver.queues[2].kick()
    driver.wait(lambda: driver.config(6, 2) == 0)
    driver.queues[1].request([PLAIN, frame(1)])
    assert rig.peers[0].recv(2048) == frame(1), "the others go on"


def test_queues_of_a_tap(threaded):
    try:
        taps = TapFd.open_queues(f"kvq{os.getpid() % 100000}", 2)
    except OSError as error:
        pytest.skip(f"no tap interface: {error}")
    with Rig(Net(taps, threaded=threaded)) as rig:
        driver = rig.start(MQ)
        assert use(driver, 2, control=4) == b"\0" and use(driver, 1, control=4) == b"\0"
        driver.queues[1].request([PLAIN, frame(1)])  # the interface is down: dropped, not fatal
        assert driver.status == 15


def test_the_queues_of_a_tap_make_the_pairs_of_its_card(threaded):
    try:
        tap = Tap(f"kvq{os.getpid() % 100000}", queues=2)
    except NetworkError as error:
        pytest.skip(str(error))
    with Rig(Net(tap, threaded=threaded)) as rig:
        driver = rig.start(MQ)
        assert driver.config(8, 2) == 2
        assert use(driver, 2, control=4) == b"\0"
        for queue in (1, 3):
            driver.queues[queue].request([PLAIN, b"\xff" * 6 + bytes(54)])
        assert rig.device.stats()["tx_frames"] == 2
    assert tap.fd == -1 and tap.name not in dict(socket.if_nameindex()).values()


def test_a_network_that_is_closed_before_its_card_takes_the_cable_out(threaded):
    """The numbers of its descriptors may be other files' by then."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    backend = PacketSocket(ours)
    number = backend.fd
    reader, writer = os.pipe()
    with Rig(Net(backend, threaded=threaded)) as rig:
        driver = rig.start(n.STATUS)
        backend.close()
        os.dup2(writer, number)
        theirs.close()
        driver.queues[0].add([], [2048])
        driver.queues[0].kick()
        driver.wait(lambda: driver.config(6, 2) == 0)
        driver.queues[1].add([PLAIN, frame(1)], [])
        driver.queues[1].kick()
        rig.device.poll()
    os.close(writer)
    os.close(number)
    assert os.read(reader, 1) == b"", "nothing of the guest's went there"
    os.close(reader)
    with pytest.raises(StateError, match="closed"):
        Net(backend)


def test_back_ends_that_do_not_fit_together():
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
    one, two = (Queue(ours) for ours, _ in pairs)
    two.vnet_header = True
    with pytest.raises(ValueError, match="same offloads"):
        Net([one, two])
    with pytest.raises(ValueError, match="1 to 16"):
        Net([])
    for ours, peer in pairs:
        ours.close()
        peer.close()
