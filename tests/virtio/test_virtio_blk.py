# SPDX-License-Identifier: Apache-2.0
"""The block device (virtio 1.2, 5.2) over disks of kvmpy.block."""

import errno
import os
import random
import struct

import pytest
from virtio_rig import Rig

from kvmpy import errors as kvmpy_errors
from kvmpy.block import create_disk, open_disk
from kvmpy.block.disk import PythonDisk
from kvmpy.virtio import Blk
from kvmpy.virtio import blk as b
from kvmpy.virtio import features as f

MIB = 1 << 20
IN, OUT, FLUSH, GET_ID, DISCARD, ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = b"\0", b"\1", b"\2"
ALL = b.SEG_MAX | b.BLK_SIZE | b.TOPOLOGY | b.FLUSH | b.CONFIG_WCE | b.DISCARD | b.WRITE_ZEROES


class MemoryDisk(PythonDisk):
    """A disk in Python that counts flushes and fails on demand."""

    def __init__(self, size=MIB, readonly=False):
        super().__init__(size, readonly)
        self.data = bytearray(size)
        self.fail = None
        self.log = []

    def _act(self, what):
        self.log.append(what)
        if self.fail is not None:
            raise OSError(self.fail, os.strerror(self.fail))

    def _read(self, offset, out):
        self._act("read")
        out[:] = self.data[offset : offset + len(out)]

    def _write(self, offset, data):
        self._act("write")
        self.data[offset : offset + len(data)] = data

    def _flush(self):
        self._act("flush")

    def _close(self):
        pass


def header(kind, sector=0):
    return struct.pack("<IIQ", kind, 0, sector)


@pytest.fixture(params=["raw", "qcow2", "python"])
def disk(request, tmp_path):
    if request.param == "python":
        yield MemoryDisk()
        return
    create_disk(tmp_path / "disk", request.param, MIB)
    with open_disk(tmp_path / "disk", request.param) as disk:
        yield disk


@pytest.fixture
def rig(disk, threaded):
    with Rig(Blk(disk, serial="kvmpy-0001", threaded=threaded)) as rig:
        yield rig


def test_configuration_space(rig):
    config = rig.driver.config
    assert config(0, 8) == MIB // 512
    assert config(12, 4) == 254
    assert config(20, 4) == 512
    assert (config(24, 1), config(25, 1), config(26, 2), config(28, 4)) == (3, 0, 1, 0)
    assert config(32, 1) == 1
    assert config(34, 2) == 1
    assert [config(at, 4) for at in range(36, 56, 4)] == [1 << 22, 32, 8, 1 << 22, 32]
    assert config(56, 1) == 1
    assert rig.driver.offered() & ALL == ALL and not rig.driver.offered() & b.RO


@pytest.mark.parametrize("wanted", [ALL, ALL | f.EVENT_IDX, ALL | f.EVENT_IDX | f.INDIRECT_DESC])
def test_what_is_written_is_read(rig, disk, wanted):
    queue = rig.start(wanted).queues[0]
    indirect = bool(wanted & f.INDIRECT_DESC)
    data = random.Random(1).randbytes(8192)
    assert queue.request([header(OUT, 5), data[:1000], data[1000:]], [1], indirect=indirect) == [OK]
    assert disk.pread(5 * 512, 8192) == data
    assert queue.request([header(IN, 6)], [512, 6656, 1], indirect=indirect) == [data[512:1024], data[1024:7680], OK]
    assert rig.device.stats()["reads"] == 1 and rig.device.stats()["written_bytes"] == 8192


def test_no_assumption_about_how_a_request_is_cut(rig, disk):
    queue = rig.start(ALL).queues[0]
    whole = header(OUT, 1) + bytes(range(256)) * 2
    assert queue.request([whole[:1], whole[1:15], whole[15:100], whole[100:]], [1]) == [OK]
    assert disk.pread(512, 512) == whole[16:]
    reply = queue.request([header(IN, 1)[:9], header(IN, 1)[9:]], [100, 413])  # the status ends the data
    assert b"".join(reply) == whole[16:] + OK


def test_the_used_length_is_what_was_written(rig):
    queue = rig.start(ALL).queues[0]
    for out, room, length in (
        ([header(IN)], [512, 1], 513),
        ([header(OUT), bytes(512)], [1], 1),
        ([header(FLUSH)], [1], 1),
        ([header(IN, MIB)], [512, 1], 0),  # only the status, which lies behind a gap
    ):
        head = queue.add(out, room)
        queue.kick()
        queue.wait(lambda head=head: queue.pending[head].written is not None)
        assert queue.pending[head].written == length


def test_serial_number(rig):
    queue = rig.start(ALL).queues[0]
    assert queue.request([header(GET_ID)], [20, 1]) == [b"kvmpy-0001".ljust(20, b"\0"), OK]
    for room in (1, 7, 19):
        assert queue.request([header(GET_ID)], [room, 1])[0] == b"kvmpy-0001".ljust(20, b"\0")[:room]


def test_zeroes_and_discards(rig, disk):
    queue = rig.start(ALL).queues[0]
    disk.pwrite(0, b"\xff" * 65536)
    ranges = struct.pack("<QIIQII", 1, 1, 0, 16, 8, 1)
    assert queue.request([header(ZEROES), ranges], [1]) == [OK]
    assert disk.pread(0, 16 * 512 + 4097) == b"\xff" * 512 + bytes(512) + b"\xff" * 7168 + bytes(4096) + b"\xff"
    assert queue.request([header(DISCARD), struct.pack("<QII", 64, 64, 0)], [1]) == [OK]
    for kind, bad, status in (
        (DISCARD, struct.pack("<QII", 0, 1, 1), UNSUPP),  # unmap has no meaning there
        (ZEROES, struct.pack("<QII", 0, 1, 2), UNSUPP),
        (ZEROES, struct.pack("<QII", MIB // 512, 1, 0), IOERR),
        (ZEROES, struct.pack("<QII", (1 << 64) - 1, 2, 0), IOERR),
        (DISCARD, struct.pack("<QII", 0, 0xFFFF_FFFF, 0), IOERR),
        (DISCARD, struct.pack("<QII", 0, 1, 0) * 33, IOERR),
        (DISCARD, b"short", IOERR),
        (DISCARD, b"", IOERR),
    ):
        assert queue.request([header(kind), *([bad] if bad else [])], [1]) == [status], (kind, bad)
    # One bad range among good ones: nothing happens.
    both = struct.pack("<QII", 40, 1, 0) + struct.pack("<QII", MIB, 1, 0)
    assert queue.request([header(ZEROES), both], [1]) == [IOERR]
    assert disk.pread(40 * 512, 512) == b"\xff" * 512


@pytest.mark.parametrize(
    ("kind", "sector", "size", "status"),
    [
        (IN, MIB // 512, 512, IOERR),
        (IN, MIB // 512 - 1, 1024, IOERR),
        (IN, (1 << 64) - 1, 512, IOERR),
        (IN, 1 << 55, 512, IOERR),
        (IN, 0, 511, IOERR),
        (IN, 0, 0, OK),
        (IN, MIB // 512, 0, OK),
        (7, 0, 512, UNSUPP),
        (0xFFFF_FFFF, 0, 512, UNSUPP),
        (0x8000_0001, 0, 512, UNSUPP),
    ],
)
def test_requests_that_cannot_be(rig, kind, sector, size, status):
    queue = rig.start(ALL).queues[0]
    reply = queue.request([header(kind, sector)], [size, 1] if size else [1])
    assert reply[-1] == status


def test_a_read_only_disk(disk, threaded):
    with Rig(Blk(disk, readonly=True, threaded=threaded)) as rig:
        offered = rig.driver.offered()
        assert offered & b.RO and not offered & (b.DISCARD | b.WRITE_ZEROES)
        queue = rig.start(b.RO | b.FLUSH).queues[0]
        assert queue.request([header(OUT), b"x" * 512], [1]) == [IOERR]
        assert queue.request([header(ZEROES), struct.pack("<QII", 0, 1, 0)], [1]) == [UNSUPP]
        assert queue.request([header(IN)], [512, 1]) == [bytes(512), OK]


@pytest.mark.parametrize(
    ("features", "wce", "flushed"),
    [(b.FLUSH, None, False), (0, None, True), (b.FLUSH | b.CONFIG_WCE, 1, False), (b.FLUSH | b.CONFIG_WCE, 0, True)],
)
def test_cache_modes(threaded, features, wce, flushed):
    disk = MemoryDisk()
    with Rig(Blk(disk, threaded=threaded)) as rig:
        queue = rig.start(features).queues[0]
        if wce is not None:
            rig.driver.write_config(0x20, 1, wce)
            assert rig.driver.config(32, 1) == wce
        assert queue.request([header(OUT), b"x" * 512], [1]) == [OK]
        assert ("flush" in disk.log) is flushed
        assert queue.request([header(FLUSH)], [1]) == [OK if features & b.FLUSH else UNSUPP]
        rig.driver.reset()
        assert rig.driver.config(32, 1) == 1


def test_the_cache_mode_has_two_values(rig):
    rig.driver.write_config(0x20, 1, 0)
    assert rig.driver.config(32, 1) == 1, "not negotiated"
    rig.start(ALL)
    rig.driver.write_config(0x20, 1, 2)
    rig.driver.write_config(0x20, 2, 0)
    rig.driver.write_config(0x0, 8, 0)
    assert rig.driver.config(32, 1) == 1 and rig.driver.config(0, 8) == MIB // 512


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_a_failing_host_is_an_io_error_for_the_guest_and_an_event_for_us(threaded, error):
    disk, seen = MemoryDisk(), []
    with Rig(Blk(disk, on_error=seen.append, threaded=threaded)) as rig:
        queue = rig.start(ALL).queues[0]
        disk.fail = error
        assert queue.request([header(OUT), b"x" * 512], [1]) == [IOERR]
        assert queue.request([header(IN)], [512, 1])[1] == IOERR
        assert queue.request([header(FLUSH)], [1]) == [IOERR]
        disk.fail = None
        assert queue.request([header(OUT), b"x" * 512], [1]) == [OK]
        rig.driver.wait(lambda: len(seen) == 3)
        assert seen == [error] * 3
        assert rig.driver.status == 15


@pytest.mark.parametrize(("out", "room"), [([b"x" * 15], [1]), ([header(IN)], []), ([], [512, 1])])
def test_no_room_for_header_or_status_breaks_the_device(rig, out, room):
    queue = rig.start(ALL).queues[0]
    queue.add(out, room)
    queue.kick()
    rig.driver.wait(lambda: rig.driver.status & f.NEEDS_RESET)
    assert rig.start(ALL).queues[0].request([header(IN)], [512, 1]) == [bytes(512), OK]


def test_several_queues_at_once(disk, threaded):
    with Rig(Blk(disk, queues=4, threaded=threaded)) as rig:
        assert rig.driver.offered() & b.MQ and rig.driver.config(34, 2) == 4
        driver = rig.start(ALL | b.MQ | f.EVENT_IDX, 64)
        heads = {}
        for number in range(20):
            for queue in driver.queues:
                sector = number * 4 + queue.index
                heads[queue.index, number] = queue.add([header(OUT, sector), bytes([sector]) * 512], [1])
        for queue in driver.queues:
            queue.kick()
        for queue in driver.queues:
            queue.wait(lambda queue=queue: not any(p.written is None for p in queue.pending.values()))
        assert disk.pread(0, 80 * 512) == b"".join(bytes([sector]) * 512 for sector in range(80))


def test_the_disk_cannot_be_closed_under_the_device(tmp_path, threaded):
    create_disk(tmp_path / "disk", "raw", MIB)
    disk = open_disk(tmp_path / "disk", "raw")
    with Rig(Blk(disk, threaded=threaded)), pytest.raises(kvmpy_errors.StateError):
        disk.close()
    disk.close()


def test_a_resized_disk_is_told(tmp_path, threaded):
    create_disk(tmp_path / "disk", "raw", MIB)
    with open_disk(tmp_path / "disk", "raw") as disk, Rig(Blk(disk, threaded=threaded)) as rig:
        queue = rig.start(ALL).queues[0]
        disk.resize(2 * MIB)
        rig.device.resized()
        assert rig.driver.config(0, 8) == 2 * MIB // 512
        assert rig.driver.ack() == f.CONFIG_CHANGE
        assert queue.request([header(IN, MIB // 512)], [512, 1]) == [bytes(512), OK]


def test_random_requests_against_a_bytearray(rig, disk):
    """Whatever is done, the disk is what a plain array would be."""
    rng = random.Random(7)
    driver = rig.start(ALL | f.INDIRECT_DESC | f.EVENT_IDX)
    queue, model = driver.queues[0], bytearray(MIB)
    for _ in range(300):
        driver.free_all()
        kind = rng.choice([IN, IN, OUT, OUT, ZEROES, FLUSH])
        count = rng.randint(1, 40)
        sector = rng.randrange(MIB // 512 - count)
        at, size = sector * 512, count * 512
        indirect = rng.random() < 0.5
        if kind == OUT:
            data = rng.randbytes(size)
            cut = rng.randrange(size)
            parts = [part for part in (data[:cut], data[cut:]) if part]
            assert queue.request([header(OUT, sector), *parts], [1], indirect=indirect) == [OK]
            model[at : at + size] = data
        elif kind == IN:
            reply = queue.request([header(IN, sector)], [size, 1], indirect=indirect)
            assert reply == [bytes(model[at : at + size]), OK]
        elif kind == ZEROES:
            one = struct.pack("<QII", sector, count, rng.randint(0, 1))
            assert queue.request([header(ZEROES), one], [1], indirect=indirect) == [OK]
            model[at : at + size] = bytes(size)
        else:
            assert queue.request([header(FLUSH)], [1], indirect=indirect) == [OK]
    assert disk.pread(0, MIB) == model
