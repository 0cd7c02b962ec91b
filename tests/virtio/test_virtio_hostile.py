# SPDX-License-Identifier: Apache-2.0
"""What a hostile driver may try, as a table. After each: the process lives, memory outside the driver's heap is
untouched, and the device either asks for a reset or works, and works after a reset in any case.
"""

import errno
import random
import socket
import struct
import threading

import pytest
import virtio_rig
from test_virtio_blk import ALL, IN, OUT, MemoryDisk, header
from virtio_rig import HEAP, HIGH, HOLE, MIB, ROM, TOP, Rig

from kvmpy.chardev import Console
from kvmpy.net import PacketSocket
from kvmpy.virtio import Balloon, Blk, ConsoleDevice, Net, Port, SharedFolder, Vsock
from kvmpy.virtio import console as c
from kvmpy.virtio import features as f
from kvmpy.virtio import net as n

NEXT, WRITE, INDIRECT = 1, 2, 4


class Hostile(Rig):
    """A block device and shorthands."""

    def __init__(self, threaded):
        self.disk = MemoryDisk()
        super().__init__(Blk(self.disk, serial="x", threaded=threaded))

    def begin(self, wanted=ALL | f.INDIRECT_DESC):
        self.start(wanted)
        return self.driver.queues[0]

    def set_up(self, size=8, desc=HEAP, avail=HEAP + 0x1000, used=HEAP + 0x2000):
        """A queue by raw register values, up to DRIVER_OK."""
        d = self.driver
        d.reset()
        d.negotiate(0)
        d.write(0x30, 0)
        d.write(0x38, size & 0xFFFF_FFFF)
        for offset, value in ((0x80, desc), (0x90, avail), (0xA0, used)):
            d.write(offset, value & 0xFFFF_FFFF)
            d.write(offset + 4, value >> 32)
        d.write(0x44, 1)
        d.write(0x70, 15)
        d.write(0x50, 0)

    def chain(self, *descs, head=0):
        """Descriptors as they stand: (slot, addr, length, flags, next[, table])."""
        queue = self.begin()
        for desc in descs:
            queue.put_desc(*desc)
        queue.publish(head)
        queue.kick()
        return queue

    def blk(self, out, room):
        queue = self.begin()
        queue.add(out, room)
        queue.kick()
        return queue


DATA = HEAP + 0x8_0000
TABLE = HEAP + 0x9_0000
HDR = (0, DATA, 16, NEXT, 1)  # of zeros: a read of sector 0


def case_01_queue_sizes(r):
    for size in (0, 3, 257, 512, 0x8000, 0x1_0000, 0x1_0001, 0xFFFF_FFFF):
        if virtio_rig.PCI and size == 0x1_0001:
            continue  # its register has 16 bits
        r.set_up(size=size)
        assert r.driver.read(0x44) == 0 and r.driver.status & f.NEEDS_RESET


def case_02_selectors(r):
    r.begin()
    for number in (1, 0x7FFF, 0x1_0000, 0xFFFF_FFFF):
        r.driver.write(0x30, number)
        for offset in range(0, 0x100, 4):
            if offset != 0x70:
                r.driver.read(offset)
                r.driver.write(offset, number)
        r.driver.write(0x50, number)


def case_03_changes_after_start(r):
    queue = r.begin()
    r.driver.write(0x30, 0)
    for offset, value in ((0x38, 0x8000), (0x80, HOLE), (0x90, 1), (0xA0, ROM), (0x44, 1)):
        r.driver.write(offset, value)
    assert queue.request([header(IN)], [512, 1])[1] == b"\0"


def case_04_rings_nowhere(r):
    for place in (0x4_0001, HOLE - 16, HOLE, ROM, ROM + 0xFFF0, 0xD000_0000, TOP, (1 << 64) - 16, 1 << 63):
        for ring in ("desc", "avail", "used"):
            r.set_up(**{ring: place})
            if ring == "used" or place != ROM:  # the device only reads the others: they may be in ROM
                assert r.driver.status & f.NEEDS_RESET, (ring, place)
    r.set_up(desc=HEAP, avail=HEAP, used=HEAP)  # one on the other: in RAM, so allowed
    first = r.memory.read(0, 4096)
    r.set_up(desc=0, avail=0, used=0)  # address 0 is RAM like any other
    r.driver.write(0x70, 0)
    r.memory.write(0, first)


def case_05_status_and_resets(r):
    for value in (0xFF, 4, 8, 12, 64, 128, 15, 0, 15, 0x100, 0xFFFF_FFFF):
        r.driver.write(0x70, value)
    for _ in range(20):
        queue = r.begin()
        for number in range(8):
            queue.add([header(OUT, number), b"z" * 512], [1])
        queue.kick()
        r.driver.write(0x70, 0)
    assert not r.driver.negotiate(1 << 50)


def case_06_widths(r):
    r.begin()
    for offset in range(0, 0x1000, 1):
        if not 0x70 <= offset < 0x74:
            for size in (1, 2, 4, 8):
                r.transport.read(offset, size)
                if offset >= 0x100 or size != 4:
                    r.transport.write(offset, size, (1 << 8 * size) - 1)


def case_07_notify_storm(r):
    r.driver.reset()
    for _ in range(2000):
        r.driver.write(0x50, 0)
    r.driver.write(0x64, 0xFFFF_FFFF)
    r.driver.negotiate(0)
    for _ in range(2000):
        r.driver.write(0x50, 0)


def case_08_index_ahead(r):
    for ahead in (257, 0x8000, 0xFFFF):
        queue = r.begin()
        r.memory.put_u16(queue.avail + 2, ahead)
        queue.kick()
        r.driver.wait(lambda: r.driver.status & f.NEEDS_RESET)


def case_09_loops(r):
    for descs, head in (
        ([(0, DATA, 16, NEXT, 0)], 0),
        ([(0, DATA, 16, NEXT, 1), (1, DATA, 16, NEXT, 0)], 0),
        ([(0, DATA, 16, NEXT, 256)], 0),
        ([(0, DATA, 16, NEXT, 0xFFFF)], 0),
        ([], 256),
        ([], 0xFFFF),
        ([(i, DATA, 1, NEXT, (i + 1) % 256) for i in range(256)], 0),
    ):
        r.chain(*descs, head=head)
        r.driver.wait(lambda: r.driver.status & f.NEEDS_RESET)


def case_10_same_head_twice(r):
    queue = r.begin()
    queue.put_desc(0, DATA, 16, NEXT, 1)
    queue.put_desc(1, DATA + 0x1000, 513, WRITE, 0)
    queue.publish(0)
    queue.publish(0)
    queue.kick()  # each is done before the next is taken: twice the same work is no harm
    r.driver.wait(lambda: len(queue.take()) >= 0 and queue.last_used == 2)


def case_11_indirect(r):
    for outer, inner in (
        ((0, TABLE, 0, INDIRECT, 0), ()),
        ((0, TABLE, 24, INDIRECT, 0), ()),
        ((0, TABLE, 16 << 16, INDIRECT, 0), ()),
        ((0, TABLE, 0xFFFF_FFF0, INDIRECT, 0), ()),
        ((0, TABLE, 16, INDIRECT, 0), ((0, TABLE, 16, INDIRECT, 0, TABLE),)),
        ((0, TABLE, 16, INDIRECT | NEXT, 1), ()),
        ((0, HOLE - 16, 32, INDIRECT, 0), ()),
        ((0, HOLE, 16, INDIRECT, 0), ()),
        ((0, TABLE, 32, INDIRECT, 0), ((0, DATA, 16, NEXT, 0, TABLE),)),
    ):
        r.chain(outer, *inner)
        r.driver.wait(lambda: r.driver.status & f.NEEDS_RESET)
    queue = r.begin()
    queue.put_desc(0, queue.used, 160, INDIRECT, 0)  # a table that is the used ring
    queue.publish(0)
    queue.kick()


def case_12_unknown_flags(r):
    for flags in (8, 0x80, 0x8000, 0xFFF8):
        r.chain((0, DATA, 16, flags, 0))
        r.driver.wait(lambda: r.driver.status & f.NEEDS_RESET)
    queue = r.begin(ALL)  # INDIRECT not negotiated
    queue.put_desc(0, TABLE, 16, INDIRECT, 0)
    queue.publish(0)
    queue.kick()
    r.driver.wait(lambda: r.driver.status & f.NEEDS_RESET)


def case_13_lengths(r):
    for desc in ((1, DATA, 0, WRITE, 0), (1, DATA, 0xFFFF_FFFF, WRITE, 0), (1, (1 << 64) - 8, 16, WRITE, 0)):
        r.chain(HDR, desc)
        r.driver.wait(lambda: r.driver.status & f.NEEDS_RESET)


def case_14_places(r):
    for addr in (HOLE - 8, HOLE, ROM, ROM - 8, HIGH - 8, HIGH + MIB - 8, TOP, 0xD000_0000, 1 << 52):
        r.chain(HDR, (1, addr, 513, WRITE, 0))
        r.driver.wait(lambda: r.driver.status & f.NEEDS_RESET)


def case_15_directions(r):
    for descs in (
        [(0, DATA, 16, NEXT | WRITE, 1), (1, DATA, 1, 0, 0)],
        [(0, DATA, 16, WRITE, 0)],
        [(0, DATA, 17, 0, 0)],
        [(0, DATA, 15, NEXT, 1), (1, DATA, 1, WRITE, 0)],
    ):
        r.chain(*descs)
        r.driver.wait(lambda: r.driver.status & f.NEEDS_RESET)


def case_16_changes_while_we_look(r):
    queue = r.begin()
    stop = threading.Event()

    def flip():
        rng = random.Random(16)
        while not stop.is_set():
            queue.put_desc(
                1, rng.choice([DATA, HOLE, ROM, TOP]), rng.choice([1, 513, 1 << 31]), rng.choice([2, 0, 3]), 1
            )
            r.memory.write(DATA, header(rng.choice([IN, OUT, 13, 99]), rng.choice([0, 1 << 60])))

    other = threading.Thread(target=flip)
    other.start()
    try:
        for _ in range(200):
            if r.driver.status & f.NEEDS_RESET:
                queue = r.begin()
            queue.put_desc(0, DATA, 16, NEXT, 1)
            queue.publish(0)
            queue.kick()
    finally:
        stop.set()
        other.join()


def case_17_used_length(r):
    queue = r.begin()
    for out, room in (([header(IN, 1 << 40)], [512, 1]), ([header(8)], [4, 1]), ([header(IN)], [511, 1])):
        head = queue.add(out, room)
        queue.kick()
        queue.wait(lambda head=head: queue.pending[head].written is not None)
        assert queue.pending[head].written <= sum(room)


def case_18_in_flight(r):
    queue = r.begin()
    for number in range(128):
        queue.add([header(4)], [1])
        if number % 16 == 15:
            queue.kick()
    queue.wait(lambda: all(p.written is not None for p in queue.pending.values()))
    assert r.device.queues[0].in_flight == 0


def case_19_block_requests(r):
    queue = r.begin()
    rng = random.Random(19)
    for _ in range(200):
        r.driver.free_all()
        kind = rng.choice([IN, OUT, 4, 8, 11, 13, 2, 1 << 31, rng.getrandbits(32)])
        sector = rng.choice([0, 2047, 2048, (1 << 64) - 1, 1 << 55, rng.getrandbits(64)])
        body = [rng.randbytes(rng.choice([1, 16, 511, 512, 16 * 40]))] if rng.random() < 0.7 else []
        reply = queue.request([header(kind, sector), *body], [rng.choice([1, 20, 512, 4096]), 1])
        assert reply[-1] in (b"\0", b"\1", b"\2")


CASES = {name: case for name, case in globals().items() if name.startswith("case_")}
SPLIT_ONLY = {"case_08_index_ahead", "case_10_same_head_twice"}  # test_packed_ring.py has their like


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.split_ring) if name in SPLIT_ONLY else name for name in CASES]
)
def test_a_hostile_driver_of_a_block_device(name, threaded):
    with Hostile(threaded) as rig:
        before = rig.canary()
        CASES[name](rig)
        rig.device.poll()
        assert rig.driver.status & ~0xFF == 0
        queue = rig.begin()
        rig.memory.write(DATA, header(IN))
        assert queue.request([header(OUT, 3), b"alive" + bytes(507)], [1]) == [b"\0"]
        assert queue.request([header(IN, 3)], [512, 1]) == [b"alive" + bytes(507), b"\0"]
        rig.driver.reset()
        assert rig.canary() == before


def test_case_20_hostile_packets(threaded):
    ours, peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with peer, Rig(Net(PacketSocket(ours), threaded=threaded)) as rig:
        before = rig.canary()
        rng = random.Random(20)
        driver = rig.start(n.MRG_RXBUF | n.CTRL_VQ | n.CTRL_RX | n.CTRL_MAC_ADDR)
        for number in range(150):
            if number % 50 == 0:
                driver = rig.start(n.MRG_RXBUF | n.CTRL_VQ | n.CTRL_RX | n.CTRL_MAC_ADDR)
            for _ in range(2):
                if len(driver.queues[0].free) > 4:
                    driver.queues[0].add([], [rng.choice([12, 13, 64, 1526])])
            if len(driver.queues[1].free) > 4:
                driver.queues[1].add(
                    [rng.randbytes(rng.choice([1, 11, 12, 25, 26, 80]))], [8] if rng.random() < 0.1 else []
                )
            if len(driver.queues[2].free) > 4:
                driver.queues[2].add([rng.randbytes(rng.choice([2, 3, 6, 8, 10, 30]))], [1])
            peer.setblocking(False)
            try:
                peer.send(rng.randbytes(rng.choice([1, 14, 60, 1514, 9000])))
                peer.recv(70000)
            except BlockingIOError:
                pass
            for queue in driver.queues:
                queue.kick()
                queue.take()
            driver._next = max(driver._heap, driver._next if driver._next < HEAP + 0xC_0000 else driver._heap)
        rig.device.poll()
        driver = rig.start()
        frame = bytes(12) + b"f" * 60
        driver.queues[1].request([frame])
        driver.reset()
        assert rig.canary() == before


def test_case_21_hostile_sockets(threaded, tmp_path):
    """More of it is in test_virtio_vsock.py."""
    rng = random.Random(21)
    with Rig(Vsock(3, tmp_path / "vsock", threaded=threaded)) as rig, socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "vsock_7"))
        server.listen(4)
        before = rig.canary()
        for _ in range(6):
            driver = rig.start()
            rx, tx = driver.queues[:2]
            for _ in range(16):
                rx.add([], [rng.choice([44, 64, 4096])])
            rx.kick()
            for port in range(80):  # thousands of ports, unknown operations, credits and lengths of any size
                driver._next = max(driver._heap, driver._next if driver._next < HEAP + 0xC_0000 else driver._heap)
                sizes = (rng.choice([0, 5, 0xFFFF_FFFF]), rng.choice([0, 1 << 20, 0xFFFF_FFFF]), rng.getrandbits(32))
                head = (rng.choice([3, 3, 3, 4]), rng.choice([2, 2, 9]), port, rng.choice([7, 7, 8]), sizes[0])
                op = rng.choice([1, 1, 2, 3, 4, 5, 5, 6, 7, 99])
                packet = struct.pack("<QQIIIHHIII", *head, rng.choice([1, 1, 2]), op, rng.randrange(4), *sizes[1:])
                tx.add([packet + b"x" * rng.choice([0, 5, 5])])
                if len(tx.free) < 4 or port == 79:
                    break
            tx.kick()
            rig.device.poll()
            assert rig.device.stats()["open"] <= 256
        driver = rig.start()
        driver.queues[1].request([struct.pack("<QQIIIHHIII", 3, 2, 9, 8, 0, 1, 6, 0, 0, 0)])
        driver.reset()
        assert rig.device.stats()["open"] == 0 and rig.canary() == before


@pytest.mark.parametrize("name", [b"..", b"../outside", b"/etc/passwd", b"link/file", b"."])
def test_case_23_paths_out_of_a_shared_folder(threaded, tmp_path, name):
    """More of it is in test_shared_folder.py."""
    (tmp_path / "share").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "share" / "link").symlink_to("../outside")
    with Rig(SharedFolder(tmp_path / "share", "tag", threaded=threaded)) as rig:
        queue = rig.start().queues[1]

        def ask(op, node, body):
            header = struct.pack("<IIQQIII4x", 40 + len(body), op, 1, node, 0, 0, 0)
            return -struct.unpack_from("<Ii", queue.request([header + body], [256])[0])[1]

        assert ask(26, 0, struct.pack("<IIII", 7, 31, 0, 0)) == 0
        assert ask(1, 1, name + b"\0") == errno.EINVAL  # LOOKUP
        assert ask(35, 1, struct.pack("<II8x", 2, 0o644) + name + b"\0") == errno.EINVAL  # CREATE
        assert ask(9, 1, bytes(8) + name + b"\0") == errno.EINVAL  # MKDIR
        assert ask(1, 1, b"link\0") == 0 and ask(1, 2, b"file\0") == errno.ENOTDIR
        assert list((tmp_path / "outside").iterdir()) == []


def test_case_22_hostile_ports_and_page_numbers(threaded):
    rng = random.Random(22)
    hosts = [Console(), Console()]
    with Rig(ConsoleDevice([Port(host) for host in hosts], threaded=threaded)) as rig:
        before = rig.canary()
        driver = rig.start(c.MULTIPORT)
        for _ in range(300):
            driver.free_all()
            queue = driver.queues[rng.choice([1, 3, 3, 5])]
            queue.request([struct.pack("<IHH", rng.choice([0, 1, 2, 1 << 31]), rng.randrange(10), rng.randrange(3))])
        assert driver.status == 15
        driver.reset()
        assert rig.canary() == before
    with Rig(ConsoleDevice(Console(), threaded=threaded)) as rig:
        balloon_rig(threaded, rng)


def balloon_rig(threaded, rng):
    from virtio_rig import guest_memory

    memory = guest_memory()
    with Rig(Balloon(memory, threaded=threaded), memory) as rig:
        driver = rig.start(size=16)
        queue = driver.queues[0]
        for _ in range(50):
            driver.free_all()
            pages = [rng.choice([HOLE >> 12, ROM >> 12, 0xFFFF_FFFF, rng.getrandbits(32) | 1 << 31]) for _ in range(64)]
            queue.request([struct.pack("<64I", *pages)])
        assert rig.device.discarded == 0
        # The page that the ring itself lies in: the guest loses its own ring, we lose nothing.
        queue.add([struct.pack("<I", queue.desc >> 12)])
        queue.kick()
        rig.device.poll()
        assert rig.start(size=16).queues[0].request([struct.pack("<I", HOLE >> 12)]) == []
