# SPDX-License-Identifier: Apache-2.0
"""The console (virtio 1.2, 5.3), the entropy device (5.4) and the balloon (5.5)."""

import struct

import pytest
from virtio_rig import HEAP, HEAP_END, HIGH, HOLE, ROM, Rig

from kvmpy.chardev import Console
from kvmpy.virtio import Balloon, ConsoleDevice, Port, Rng
from kvmpy.virtio import balloon as bal
from kvmpy.virtio import console as c
from kvmpy.virtio import features as f


def drain(driver, queue, heads, count):
    """The contents of the next `count` used buffers of `heads`."""
    found = []

    def enough():
        found.extend(queue.take())
        return len(found) >= count

    driver.wait(enough)
    return [b"".join(queue.result(head))[:size] for head, size in found]


def test_a_plain_console(threaded):
    host = Console()
    with Rig(ConsoleDevice(host, columns=80, rows=25, threaded=threaded)) as rig:
        assert rig.driver.offered() & (c.SIZE | c.MULTIPORT | c.EMERG_WRITE) == c.SIZE | c.EMERG_WRITE
        assert rig.driver.config(0, 2) == 80 and rig.driver.config(2, 2) == 25
        host.send("early ")
        driver = rig.start(c.SIZE)
        driver.queues[1].request([b"log", b"in: "])
        host.expect("login: ", timeout=60)
        heads = [driver.queues[0].add([], [8]) for _ in range(4)]
        driver.queues[0].kick()
        assert drain(driver, driver.queues[0], heads, 1) == [b"early "]
        host.send("a longer line\n")
        assert b"".join(drain(driver, driver.queues[0], heads, 2)) == b"a longer line\n"
        rig.device.resize(132, 50)
        assert rig.driver.config(0, 4) == 50 << 16 | 132


def test_emergency_write(threaded):
    host = Console()
    with Rig(ConsoleDevice(host, threaded=threaded)) as rig:
        for char in b"!\n":
            rig.driver.write_config(0x8, 4, char)
        host.expect("!\n", timeout=60)


def test_input_that_nobody_reads_is_bounded(threaded):
    host = Console()
    with Rig(ConsoleDevice(host, threaded=threaded)) as rig:
        rig.device.receive(0, b"x" * (c.MAX_INPUT + 5))
        rig.device.receive(0, b"y")
        assert rig.device.stats()["dropped"] == 6


class MultiPort:
    def __init__(self, threaded):
        self.hosts = [Console(), Console()]
        ports = [Port(self.hosts[0], console=True), Port(self.hosts[1], "org.kvmpy.agent")]
        self.rig = Rig(ConsoleDevice(ports, columns=80, rows=25, threaded=threaded))

    def start(self):
        driver = self.rig.start(c.MULTIPORT | c.SIZE)
        self.control = [driver.queues[2].add([], [64]) for _ in range(16)]
        driver.queues[2].kick()
        return driver

    def tell(self, port, event, value):
        self.rig.driver.queues[3].request([struct.pack("<IHH", port, event, value)])

    def told(self, count):
        data = drain(self.rig.driver, self.rig.driver.queues[2], self.control, count)
        return [(*struct.unpack_from("<IHH", part), part[8:]) for part in data]


@pytest.fixture
def multi(threaded):
    multi = MultiPort(threaded)
    yield multi
    multi.rig.close()


def test_ports_announce_themselves(multi):
    assert multi.rig.driver.config(4, 4) == 2
    driver = multi.start()
    multi.tell(0, c.DEVICE_READY, 1)
    assert multi.told(2) == [(0, c.DEVICE_ADD, 1, b""), (1, c.DEVICE_ADD, 1, b"")]
    multi.tell(0, c.PORT_READY, 1)
    assert multi.told(3) == [
        (0, c.CONSOLE_PORT, 1, b""),
        (0, c.RESIZE, 1, struct.pack("<HH", 25, 80)),
        (0, c.PORT_OPEN, 1, b""),
    ]
    multi.tell(1, c.PORT_READY, 1)
    assert multi.told(2) == [(1, c.PORT_NAME, 1, b"org.kvmpy.agent"), (1, c.PORT_OPEN, 1, b"")]
    # Input waits until the guest opens the port.
    multi.hosts[1].send("hello")
    heads = [driver.queues[4].add([], [64])]
    driver.queues[4].kick()
    multi.rig.device.poll()
    assert driver.queues[4].take() == []
    multi.tell(1, c.PORT_OPEN, 1)
    assert drain(driver, driver.queues[4], heads, 1) == [b"hello"]
    driver.queues[5].request([b"answer"])
    multi.hosts[1].expect("answer", timeout=60)
    multi.rig.device.resize(100, 40)
    assert multi.told(1) == [(0, c.RESIZE, 1, struct.pack("<HH", 40, 100))]


def test_control_messages_of_no_port(multi):
    driver = multi.start()
    for message in (b"", b"\0" * 7, b"\xff" * 8, struct.pack("<IHH", 0xFFFF_FFFF, c.PORT_READY, 1), bytes(4096)):
        driver.queues[3].request([message] if message else [b"x"])
    for event in (*range(10), 0xFFFF):
        multi.tell(2, event, 1) if event else None
        multi.tell(0, event, 7)
    for _ in range(2000):  # a guest that asks and never listens
        driver.free_all()
        multi.tell(0, c.DEVICE_READY, 1)
    assert len(multi.rig.device._messages) <= c.MAX_CONTROL
    assert driver.status == 15


def test_a_control_buffer_that_is_too_small(multi):
    driver = multi.rig.start(c.MULTIPORT)
    driver.queues[2].add([], [4])
    driver.queues[2].kick()
    driver.queues[3].add([struct.pack("<IHH", 0, c.DEVICE_READY, 1)])
    driver.queues[3].kick()
    driver.wait(lambda: driver.status & f.NEEDS_RESET)


def test_a_saved_console_keeps_its_ports(multi, threaded):
    multi.start()
    multi.tell(0, c.DEVICE_READY, 1)
    multi.told(2)
    multi.tell(1, c.PORT_OPEN, 1)
    multi.rig.device.receive(0, b"typed")
    state = multi.rig.transport.save()
    other = MultiPort(threaded)
    with other.rig as rig:
        rig.memory.write(HEAP, multi.rig.memory.read(HEAP, HEAP_END - HEAP))
        rig.transport.load(state)
        assert [port.guest_open for port in rig.device.ports] == [False, True]
        assert rig.device.ports[0].waiting == b"typed"
        with pytest.raises(ValueError, match="cut off"):
            rig.transport.load({**state, "device": {**state["device"], "waiting": b"\xff\xff\xff\xff"}})


def test_entropy(threaded):
    with Rig(Rng(threaded=threaded)) as rig:
        queue = rig.start(f.EVENT_IDX).queues[0]
        a, b = queue.request([], [64, 64])
        assert len({a, b, bytes(64)}) == 3
        head = queue.add([], [100_000])
        queue.kick()
        queue.wait(lambda: queue.pending[head].written is not None)
        assert queue.pending[head].written == 65536, "bounded"
        queue.add([b"seed"], [8])
        queue.kick()
        rig.driver.wait(lambda: rig.driver.status & f.NEEDS_RESET)


@pytest.fixture
def balloon(threaded):
    from virtio_rig import guest_memory

    memory = guest_memory()
    with Rig(Balloon(memory, threaded=threaded), memory) as rig:
        yield rig


def test_inflated_pages_go_back_to_the_host(balloon):
    driver = balloon.start(bal.STATS_VQ | bal.PAGE_REPORTING | bal.DEFLATE_ON_OOM)
    balloon.device.target = 3 * 4096
    assert driver.config(0, 4) == 3 and driver.ack() & f.CONFIG_CHANGE
    assert balloon.memory.read(0x5000, 1) != b"\0"
    driver.queues[0].request([struct.pack("<5I", 5, 7, 6, 6, (HIGH >> 12) + 1)])
    for page in (0x5000, 0x6000, 0x7000, HIGH + 0x1000):
        assert balloon.memory.read(page, 4096) == bytes(4096)
    assert balloon.memory.read(0x4FFF, 1) == balloon.memory.read(0x8000, 1) == b"\xa5"
    balloon.driver.write_config(0x4, 4, 3)
    assert balloon.device.actual == 3 * 4096 and balloon.device.discarded == 4 * 4096
    driver.queues[1].request([struct.pack("<I", 5)])


def test_pages_that_are_no_ram_are_counted_and_left_alone(balloon):
    driver = balloon.start()
    before = balloon.canary()
    driver.queues[0].request([struct.pack("<4I", HOLE >> 12, ROM >> 12, 0xFFFF_FFFF, 0xFFFF_FFFE) + b"odd"])
    assert balloon.device.refused == 4 and balloon.canary() == before
    assert driver.status == 15


def test_statistics(balloon):
    driver = balloon.start(bal.STATS_VQ)
    queue = driver.queues[2]
    head = queue.add([struct.pack("<HQHQHQ", 4, 1000, 5, 2000, 99, 1) + b"x"])
    queue.kick()
    driver.wait(lambda: balloon.device.statistics != {})
    assert balloon.device.statistics == {"free_memory": 1000, "total_memory": 2000}
    assert queue.take() == []
    balloon.device.request_statistics()
    queue.wait(lambda: queue.pending[head].written is not None)
    assert balloon.device.stats()["guest_free_memory"] == 1000


@pytest.mark.split_ring
def test_reported_pages(balloon):
    driver = balloon.start(bal.PAGE_REPORTING)
    queue = driver.queues[2]  # without statistics the numbering has no gap
    queue.put_desc(0, 0x1_0800, 0x3000, 2, 0)
    queue.publish(0)
    queue.kick()
    driver.wait(lambda: bool(queue.take()))
    assert balloon.device.discarded == 0x2000
    assert balloon.memory.read(0x1_1000, 0x2000) == bytes(0x2000) and balloon.memory.read(0x1_0FFF, 1) == b"\xa5"
