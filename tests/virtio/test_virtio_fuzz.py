# SPDX-License-Identifier: Apache-2.0
"""Random drivers with fixed seeds, in the test's own thread so that a failure repeats.

KVMPY_FUZZ_SECONDS=1800 makes each of them run that long with new seeds.
"""

import random
import socket
import struct
import tempfile
from pathlib import Path

import fuzzing
import pytest
from test_virtio_blk import ALL, MemoryDisk
from virtio_rig import HEAP, HEAP_END, HIGH, HOLE, ROM, TOP, UNNAMED, Rig

from kvmpy.chardev import Null
from kvmpy.net import PacketSocket
from kvmpy.virtio import Balloon, Blk, ConsoleDevice, Net, Port, Rng, SharedFolder, Vsock
from kvmpy.virtio import features as f
from kvmpy.virtio.testing import PackedQueue

REGISTERS = [0x14, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x64, 0x70, *range(0x80, 0xA8, 4), 0xC0]


def make_blk(memory):
    return Blk(MemoryDisk(65536), queues=2, threaded=False), []


def make_net(memory):
    ours, peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    peer.setblocking(False)
    return Net(PacketSocket(ours), threaded=False), [peer]


def make_console(memory):
    return ConsoleDevice([Port(Null()), Port(Null(), "a")], columns=80, rows=25, threaded=False), []


def make_rng(memory):
    return Rng(threaded=False), []


def make_balloon(memory):
    # A balloon may discard any page the guest names, canaries too: it gets memory of its own to do so.
    from virtio_rig import guest_memory

    return Balloon(guest_memory(), threaded=False), []


def make_vsock(memory):
    folder = tempfile.TemporaryDirectory()
    device = Vsock(3, f"{folder.name}/vsock", threaded=False)
    return device, [Closing(folder.cleanup)]


def make_fs(memory):
    folder = tempfile.TemporaryDirectory()
    (Path(folder.name) / "file").write_bytes(bytes(5000))
    return SharedFolder(folder.name, "tag", threaded=False), [Closing(folder.cleanup)]


class Closing:
    """In place of a socket to the outside: nothing comes and goes."""

    def __init__(self, close):
        self.close = close

    def send(self, data):
        raise BlockingIOError


MAKE = {
    "blk": make_blk, "net": make_net, "console": make_console, "rng": make_rng, "balloon": make_balloon,
    "vsock": make_vsock, "fs": make_fs,
}  # fmt: skip


def address(rng):
    near = rng.choice([HEAP, HEAP, HEAP, HEAP, HEAP_END - 64, HOLE - 32, ROM, HIGH, TOP, (1 << 64) - 64])
    if near in (HEAP, ROM):
        return near + rng.randrange(0x8000)
    return near + rng.randrange(64) if near != HIGH else HIGH - 1 - rng.randrange(64)


def length(rng):
    return rng.choice([0, 1, 2, 12, 15, 16, 17, 20, 512, 513, 528, 4096, rng.randrange(65536), rng.getrandbits(32)])


def in_heap(addr, size):
    return addr >= HEAP and addr + size <= HEAP_END


def random_requests(rng, driver):
    """Descriptors and rings of random content, somewhere near what would be right."""
    for queue in driver.queues:
        slots = min(queue.size, 16)
        for slot in range(slots):
            addr, size = address(rng), length(rng)
            flags = rng.choice([0, 1, 1, 2, 2, 3, 3, 4, 5, 6, rng.getrandbits(16)])
            if flags & 2 and not flags & 4 and not in_heap(addr, size):
                addr, size = HEAP + rng.randrange(0x8000), rng.choice([1, 16, 513, 4096])  # canaries stay sound
            if isinstance(queue, PackedQueue) and rng.random() < 0.9:
                flags = flags & ~0x8080 | rng.choice([0x80, 0x80, 0x80, 0x8000, 0x8080, 0])
            queue.put_desc(slot, addr, size, flags, rng.choice([rng.randrange(slots), rng.getrandbits(16)]))
        for entry in range(queue.size if queue.size < 32 else 32):
            head = rng.choice([rng.randrange(slots)] * 9 + [rng.getrandbits(16)])
            driver.memory.put_u16(queue.avail + 4 + 2 * (entry % queue.size), head)
        ahead = rng.choice([1, 2, 4, 8, 16, rng.getrandbits(16)])
        driver.memory.put_u16(queue.avail + 2, ahead & 0xFFFF)


def random_registers(rng, driver):
    for _ in range(rng.randrange(30)):
        offset = rng.choice([*REGISTERS, rng.randrange(0x1000)])
        size = rng.choice([4, 4, 4, 1, 2, 8])
        value = rng.choice([0, 1, 2, 3, 8, 11, 15, 64, 128, 256, HEAP, HEAP + 4096, rng.getrandbits(64)])
        if offset in (0x80, 0x90, 0xA0):  # rings in the heap or nowhere: the device may write where a used ring is
            value = rng.choice([HEAP, HEAP + 4096, HEAP + 1, 1 << 31])
        if offset in (0x84, 0x94, 0xA4):
            value = rng.choice([0, 0, 2, 0xFFFF_FFFF])
        driver.transport.write(offset, size, value & (1 << 8 * size) - 1)
        assert 0 <= driver.transport.read(offset, size) < 1 << 64


def random_table(rng, memory):
    """Bytes that are an indirect table, a header, page numbers, a control message ..."""
    for _ in range(4):
        data = b"".join(
            struct.pack(
                "<QIHH", HEAP + rng.randrange(0x8000), length(rng) & 0xFFFF, rng.choice([0, 1, 2, 3]), rng.randrange(8)
            )
            for _ in range(8)
        )
        memory.write(HEAP + 0x4000 + rng.randrange(0x4000), rng.choice([data, rng.randbytes(64), bytes(64)]))


@pytest.mark.parametrize("kind", MAKE)
def test_random_drivers(kind, ring):
    from virtio_rig import guest_memory

    memory = guest_memory()
    device, extra = MAKE[kind](memory)
    device.warn._left = 0
    with Rig(device, memory) as rig:
        before = rig.canary(UNNAMED)
        for seed in fuzzing.seeds(120):
            rng = random.Random(seed)
            driver = rig.driver
            wanted = device.features if rng.random() < 0.8 else f.EVENT_IDX
            wanted &= ~(rng.getrandbits(64) if rng.random() < 0.2 else 0)
            try:
                rig.start(wanted & ~f.RING_PACKED, rng.choice([None, 1, 4, 16]))
            except ValueError:
                continue  # features that need others
            random_table(rng, memory)
            random_requests(rng, driver)
            for peer in extra:
                for _ in range(rng.randrange(4)):
                    try:
                        peer.send(rng.randbytes(rng.choice([1, 60, 1514, 9000])))
                        peer.recv(70000)
                    except BlockingIOError:
                        break
            for index in range(len(driver.queues)):
                driver.write(0x50, index)
            if rng.random() < 0.5:
                random_registers(rng, driver)
            state = rig.transport.save()
            if rng.random() < 0.3:
                rig.transport.load(state)
            for queue in device.queues:
                assert queue.in_flight <= queue.max_size, seed
            assert rig.driver.status in range(256), seed
        driver.reset()
        assert driver.status == 0
        assert rig.canary(UNNAMED) == before
        driver.start()
        assert driver.status == 15
    for peer in extra:
        peer.close()


def test_random_states_are_refused_or_loaded():
    with Rig(Blk(MemoryDisk(65536), threaded=False)) as rig:
        before = rig.canary()
        rig.start(ALL)
        state = rig.transport.save()
        loaded = 0
        for seed in fuzzing.seeds(120):
            rng = random.Random(seed)
            broken = dict(state)
            key = rng.choice(list(broken))
            broken[key] = rng.choice(
                [None, -1, 0, 15, 1 << 64, "x", [], [rng.getrandbits(64) for _ in range(8)], {}, b""]
            )
            try:
                rig.transport.load(broken)
                loaded += 1
            except ValueError:
                pass
        assert loaded > 0
        rig.start(ALL)
        assert rig.driver.status == 15 and rig.canary() == before
