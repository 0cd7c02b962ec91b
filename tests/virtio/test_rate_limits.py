# SPDX-License-Identifier: Apache-2.0
"""Rate limits: a bucket by itself, and what disks and cards do when it is empty. Times are compared with the bucket's
own arithmetic or not at all.
"""

import random
import socket
import time

import pytest
from test_virtio_blk import IN, OK, OUT, MemoryDisk, header
from virtio_rig import Rig

from kvmpy.net import PacketSocket
from kvmpy.virtio import Blk, Net, RateLimit
from kvmpy.virtio._queue import Limiter


def test_without_rates_nothing_waits():
    limiter = Limiter()
    assert all(limiter.take(1 << 40) == 0 for _ in range(1000))
    assert limiter.throttled == 0


def test_a_burst_goes_through_and_then_the_rate():
    limiter = Limiter()
    limiter.set(ops=10, op_burst=5)
    taken = 0
    while not limiter.take(0):
        taken += 1
    assert taken == 6, "five tokens, and one request may overdraw them"
    wait = limiter.take(0)
    assert 0 < wait <= 0.1
    assert limiter.throttled == 1, "one request waits, however often it asks"


def test_a_request_larger_than_the_burst_goes_through_and_is_paid_for():
    limiter = Limiter()
    limiter.set(bytes=1000, byte_burst=100)
    assert limiter.take(5000) == 0
    assert 4.5 < limiter.take(1) <= 4.9


def test_both_limits_hold_and_a_refused_request_costs_nothing():
    limiter = Limiter()
    limiter.set(bytes=1 << 40, ops=1, op_burst=1)
    assert [limiter.take(100) == 0 for _ in range(3)] == [True, True, False]
    limiter.set()
    assert limiter.take(100) == 0, "rates can be taken away while something waits"


def test_extreme_rates_do_not_overflow():
    rng = random.Random(4)
    limiter = Limiter()
    for _ in range(2000):
        limiter.set(*(rng.choice([0, 1, 1 << 40, (1 << 63) - 1]) for _ in range(4)))
        for _ in range(4):
            assert 0 <= limiter.take(rng.choice([0, 1, 512, 1 << 32])) < 1 << 34


@pytest.mark.parametrize("wrong", [{"bytes_per_second": -1}, {"burst_bytes": 1}, {"operations_per_second": 1 << 63}])
def test_limits_that_cannot_be(wrong):
    with pytest.raises(ValueError):
        RateLimit(**wrong)


def test_a_disk_keeps_its_rate_and_loses_nothing(threaded):
    disk = MemoryDisk()
    limit = RateLimit(operations_per_second=200, burst_operations=1)
    with Rig(Blk(disk, threaded=threaded, limit=limit)) as rig:
        queue = rig.start().queues[0]
        start = time.monotonic()
        for sector in range(20):
            queue.add([header(OUT, sector), bytes([sector]) * 512], [1])
        queue.kick()
        queue.wait(lambda: all(p.written is not None for p in queue.pending.values()))
        took = time.monotonic() - start
        assert took > 17 / 200, "two at once, eighteen at the rate"
        assert rig.device.stats()["throttled"] > 0
        assert disk.pread(0, 20 * 512) == b"".join(bytes([sector]) * 512 for sector in range(20))
        rig.device.limit = RateLimit()
        assert queue.request([header(IN, 7)], [512, 1]) == [bytes([7]) * 512, OK]


def test_a_reset_while_requests_wait_for_the_rate(threaded):
    with Rig(Blk(MemoryDisk(), threaded=threaded, limit=RateLimit(bytes_per_second=1, burst_bytes=1))) as rig:
        queue = rig.start().queues[0]
        for sector in range(8):
            queue.add([header(OUT, sector), b"z" * 512], [1])
        queue.kick()
        rig.driver.wait(lambda: rig.device.stats()["throttled"] == 1)
        rig.driver.reset()
        rig.device.limit = RateLimit()
        assert rig.start().queues[0].request([header(OUT, 9), b"y" * 512], [1]) == [OK]


def test_a_card_sends_and_receives_at_its_rate_in_order(threaded):
    ours, peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    slow = RateLimit(operations_per_second=200, burst_operations=1)
    with peer, Rig(Net(PacketSocket(ours), threaded=threaded, receive_limit=slow, transmit_limit=slow)) as rig:
        peer.settimeout(10)
        driver = rig.start()
        rx, tx = driver.queues[:2]
        frames = [bytes([number]) * 60 for number in range(16)]
        for frame in frames:
            rx.add([], [2048])
            tx.add([bytes(12) + frame])
            peer.send(frame)
        rx.kick()
        tx.kick()
        tx.wait(lambda: all(p.written is not None for p in tx.pending.values()))
        assert [peer.recv(2048) for _ in frames] == frames
        rx.wait(lambda: all(p.written is not None for p in rx.pending.values()))
        assert [rx.result(head)[0][12:72] for head in rx.pending] == frames
        stats = rig.device.stats()
        assert stats["rx_throttled"] > 0 and stats["tx_throttled"] > 0 and stats["rx_dropped"] == 0
