# SPDX-License-Identifier: Apache-2.0
"""The virtio-mmio transport (virtio 1.2, 4.2): registers, state machine, reset, queue reset, saved states."""

import os

import pytest
import virtio_rig
from virtio_rig import HEAP, Rig

import kvmpy
from kvmpy.irq import EventLine
from kvmpy.virtio import MmioTransport, Rng
from kvmpy.virtio import features as f
from kvmpy.virtio.device import IDLE, VirtioDevice
from kvmpy.virtio.testing import Driver


class Echo(VirtioDevice):
    """Gives back what it is sent, upside down; four bytes of configuration that can be written."""

    device_id = 42

    def __init__(self, threaded=False):
        super().__init__("echo", [8, 16], 0b101, b"\x01\x02\x03\x04\x05\x06", threaded=threaded)

    def serve(self, index):
        while (chain := self.queues[index].pop()) is not None:
            if chain.read() == b"raise":
                raise RuntimeError("the back end is on fire")
            chain.write(chain.read()[::-1])
            self.queues[index].push(chain)
        return IDLE

    def write_config(self, offset, size, value):
        if offset + size <= 4:
            self.put_config(offset, value.to_bytes(size, "little"), notify=False)


@pytest.fixture
def rig(threaded):
    with Rig(Echo(threaded)) as rig:
        yield rig


@pytest.mark.mmio_registers
def test_identity(rig):
    assert [rig.driver.read(offset) for offset in (0, 4, 8)] == [0x7472_6976, 2, 42]
    assert rig.driver.offered() == 0b101 | f.COMMON | (f.RING_PACKED if virtio_rig.PACKED else 0)
    rig.driver.write(0x14, 2)
    assert rig.driver.read(0x10) == 0
    assert [rig.driver.read(offset) for offset in (0xB0, 0xB4, 0xB8, 0xBC)] == [0xFFFF_FFFF] * 4


def test_requests_and_the_interrupt(rig):
    driver = rig.start()
    assert driver.queues[1].request([b"abc", b"def"], [4, 4]) == [b"fedc", b"ba\0\0"]
    assert rig.line.level
    assert driver.ack() == f.USED_BUFFER
    assert not rig.line.level and driver.read(0x60) == 0


@pytest.mark.mmio_registers
def test_configuration_space_has_every_width_and_an_end(rig):
    assert [rig.transport.read(0x100 + at, 1) for at in range(8)] == [1, 2, 3, 4, 5, 6, 0, 0]
    assert rig.driver.config(4, 2) == 0x0605 and rig.driver.config(4, 4) == 0x0605
    assert rig.driver.config(0, 8) == 0x0605_0403_0201
    assert rig.driver.config(0xEFF, 1) == 0 and rig.driver.config(0xEFC, 8) == 0
    rig.transport.write(0x101, 2, 0xBEEF)
    assert rig.driver.config(0, 4) == 0x04BE_EF01
    rig.transport.write(0x105, 2, 0xFFFF)  # over the end
    rig.transport.write(0xFFF, 1, 0xFF)
    assert rig.driver.config(0, 8) == 0x0605_04BE_EF01


def test_a_change_by_the_host_is_told_once_the_driver_is_ready(rig):
    generation = rig.driver.read(0xFC)
    rig.device.put_config(4, b"\x77")
    assert rig.driver.read(0xFC) != generation
    assert not rig.line.level, "nobody may be told before DRIVER_OK"
    rig.start()
    rig.device.put_config(4, b"\x78")
    assert rig.line.level and rig.driver.ack() == f.CONFIG_CHANGE
    assert rig.driver.config(4, 1) == 0x78


@pytest.mark.mmio_registers
@pytest.mark.parametrize("size", [1, 2, 8])
def test_registers_have_one_width(rig, size):
    for offset in range(0, 0x100, size):
        if offset % 4 or size != 4:
            assert rig.transport.read(offset, size) == 0
    rig.transport.write(0x70, size, f.ACKNOWLEDGE)
    assert rig.driver.status == 0


@pytest.mark.mmio_registers
def test_unaligned_registers_do_not_exist(rig):
    assert rig.transport.read(1, 4) == rig.transport.read(0x72, 4) == 0
    rig.transport.write(0x71, 4, 1)
    assert rig.driver.status == 0


def test_features_that_were_not_offered_are_refused(rig):
    assert not rig.driver.negotiate(0b10)
    assert rig.driver.status == f.ACKNOWLEDGE | f.DRIVER
    rig.driver.reset()
    assert rig.driver.negotiate(0b100)


def test_a_driver_of_before_1_0_is_refused(rig):
    rig.driver.write(0x70, f.ACKNOWLEDGE | f.DRIVER)
    rig.driver.write(0x70, f.ACKNOWLEDGE | f.DRIVER | f.FEATURES_OK)
    assert not rig.driver.status & f.FEATURES_OK


def test_features_are_fixed_by_features_ok(rig):
    rig.driver.negotiate(0b100)
    rig.driver.write(0x24, 0)
    rig.driver.write(0x20, 0b001)
    rig.driver.write(0x70, 15)
    assert rig.device.driver_features == f.VERSION_1 | 0b100


def test_the_order_of_the_status_bits(rig):
    for value in (f.DRIVER_OK, f.FEATURES_OK, f.ACKNOWLEDGE | f.FEATURES_OK):
        rig.driver.write(0x70, value)
        assert not rig.driver.status & (f.DRIVER_OK | f.FEATURES_OK)
        rig.driver.reset()
    rig.driver.negotiate(0)
    rig.driver.write(0x70, f.ACKNOWLEDGE)  # bits go only by a reset
    assert rig.driver.status == f.ACKNOWLEDGE | f.DRIVER | f.FEATURES_OK
    rig.driver.reset()
    assert rig.driver.status == 0 and not rig.device.active
    # FEATURES_OK must have been seen before DRIVER_OK.
    rig.driver.write(0x70, f.ACKNOWLEDGE | f.DRIVER)
    rig.driver.write(0x24, 1)
    rig.driver.write(0x20, 1)
    rig.driver.write(0x70, 15)
    assert not rig.driver.status & f.DRIVER_OK


def test_queues_are_set_up_between_features_ok_and_driver_ok(rig):
    rig.driver.write(0x30, 0)
    rig.driver.write(0x38, 8)
    rig.driver.write(0x44, 1)
    assert rig.driver.read(0x44) == 0
    driver = rig.start(only=[0])
    driver.write(0x30, 1)
    driver.write(0x38, 8)
    driver.write(0x44, 1)
    assert driver.read(0x44) == 0, "too late"
    driver.write(0x30, 0)
    driver.write(0x38, 4)
    driver.write(0x80, 0)
    assert driver.queues[0].request([b"ab"], [2]) == [b"ba"], "a running queue keeps its rings"


def test_a_queue_that_does_not_exist(rig):
    rig.driver.negotiate(0)
    for number in (2, 0x8000, 0xFFFF_FFFF):
        rig.driver.write(0x30, number)
        assert rig.driver.read(0x34) == 0 and rig.driver.read(0x44) == 0
        for offset in (0x38, 0x44, 0x80, 0x84, 0xC0, 0x50):
            rig.driver.write(offset, 1)
        rig.driver.write(0x50, number)
    assert rig.driver.status == f.ACKNOWLEDGE | f.DRIVER | f.FEATURES_OK


def test_kicks_before_driver_ok_wait_for_it(rig):
    driver = rig.driver
    driver.reset()
    driver.negotiate(0)
    driver.queues = [driver.setup_queue(0)]
    head = driver.queues[0].add([b"ab"], [2])
    for _ in range(100):
        driver.queues[0].kick()
    assert driver.queues[0].take() == []
    driver.write(0x70, 15)
    driver.queues[0].wait(lambda: driver.queues[0].pending[head].written is not None)
    assert driver.queues[0].result(head) == [b"ba"]


def test_needs_reset_and_back(rig):
    driver = rig.start()
    driver.queues[0].put_desc(0, 0, 0, 0, 0)
    driver.queues[0].publish(0)
    driver.queues[0].kick()
    driver.wait(lambda: driver.status & f.NEEDS_RESET)
    assert driver.ack() & f.CONFIG_CHANGE
    rig.start()
    assert driver.status == 15
    assert driver.queues[0].request([b"ab"], [2]) == [b"ba"]


def test_an_exception_in_a_device_stops_the_device_alone(rig, caplog):
    driver = rig.start()
    driver.queues[0].add([b"raise"], [8])
    driver.queues[0].kick()
    driver.wait(lambda: driver.status & f.NEEDS_RESET)
    assert "on fire" in caplog.text
    rig.start()
    assert driver.queues[0].request([b"ab"], [2]) == [b"ba"]


def test_queue_reset(rig):
    driver = rig.start(f.RING_RESET)
    assert driver.queues[0].request([b"ab"], [2]) == [b"ba"]
    driver.write(0x30, 0)
    driver.write(0xC0, 1)
    assert driver.read(0xC0) == 0 and driver.read(0x44) == 0
    assert driver.queues[1].request([b"cd"], [2]) == [b"dc"], "the other queue goes on"
    again = driver.setup_queue(0, 4)
    assert driver.read(0x44) == 1
    assert again.request([b"xyz"], [3]) == [b"zyx"]


@pytest.mark.mmio_registers
def test_a_stopped_queue_is_not_touched(rig):
    driver = rig.start()
    driver.write(0x30, 0)
    driver.write(0x44, 0)
    assert driver.read(0x44) == 0
    driver.queues[0].add([b"ab"], [2])
    driver.queues[0].kick()
    assert driver.queues[1].request([b"cd"], [2]) == [b"dc"]
    assert driver.queues[0].take() == []


def test_reset_storms(rig):
    driver = rig.driver
    for _ in range(50):
        rig.start()
        for _ in range(4):
            driver.queues[0].add([b"ab"], [2])
        driver.queues[0].kick()
        driver.reset()
        assert driver.status == 0 and driver.read(0x60) == 0 and not rig.line.level
    rig.start()
    assert driver.queues[0].request([b"ab"], [2]) == [b"ba"]


def test_nothing_is_written_after_a_reset(rig):
    rig.start()
    driver = rig.driver
    for _ in range(20):
        rig.start()
        for _ in range(2):
            driver.queues[1].add([b"ab" * 100], [200])
        driver.queues[1].kick()
        driver.write(0x70, 0)
        before = rig.memory.read(HEAP, 0x8000)
        rig.device.poll()
        assert rig.memory.read(HEAP, 0x8000) == before


@pytest.mark.mmio_registers
def test_acknowledging_one_of_two_causes_makes_another_edge(rig):
    rig.start()
    rig.transport.queue_interrupt(0)
    rig.transport.config_interrupt()
    edges = rig.line.edges
    rig.driver.write(0x64, f.USED_BUFFER)
    assert rig.line.edges == edges + 1 and rig.line.level
    rig.driver.write(0x64, 0xFFFF_FFFC)  # bits that are not set
    assert rig.driver.read(0x60) == f.CONFIG_CHANGE
    rig.driver.write(0x64, f.CONFIG_CHANGE)
    assert not rig.line.level


def test_a_saved_device_goes_on_elsewhere(rig, threaded):
    driver = rig.start(f.EVENT_IDX)
    for number in range(20):
        assert driver.queues[0].request([b"%02d" % number], [2]) == [(b"%02d" % number)[::-1]]
    state = rig.transport.save()
    assert driver.queues[0].request([b"ab"], [2]) == [b"ba"], "saving disturbs nothing"
    state = rig.transport.save()
    with Rig(Echo(threaded), rig.memory) as other:
        other.transport.load(state)
        assert other.transport.save() == state
        driver.transport = other.transport
        assert driver.status == 15
        assert driver.queues[0].request([b"cd"], [2]) == [b"dc"]
        driver.transport = rig.transport


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", 2), ("status", 256), ("status", "x"), ("status", 4), ("interrupt", 4), ("driver_features", 2),
        ("selectors", [1]), ("generation", -1), ("device", {}), ("device", None), ("queues", [0] * 15),
        ("queues", [8, 1, 0, HEAP + 1, HEAP, HEAP, 0, 0] + [0] * 8), ("queues", [8, 2] + [0] * 14),
        ("queues", [8, 1, 0, HEAP, HEAP, HEAP, 65536, 0] + [0] * 8),
        ("more", 1),
    ],
)  # fmt: skip
def test_damaged_states_are_refused(rig, key, value):
    rig.start()
    state = {**rig.transport.save(), key: value}
    with pytest.raises(ValueError, match=r"."):
        rig.transport.load(state)
    assert rig.start().queues[0].request([b"ab"], [2]) == [b"ba"]


def test_ioeventfd_and_irqfd(vm):
    """On an engine: a kick is a write to an ioeventfd address, the interrupt goes out through an eventfd."""
    vm.add_ram(0, 4 << 20)
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    base = 0xD000_0000
    transport = MmioTransport(Rng(), vm.memory, EventLine(fd))
    vm.mmio.add(base, transport)
    transport.connect_kicks(vm, base)
    driver = Driver(transport, vm.memory, 1 << 20)
    driver.start()
    head = driver.queues[0].add([], [32])
    # mov dword [0xD0000050], 0 in protected mode with flat segments; then halt.
    vm.memory.write(0x1000, b"\xc7\x05" + (base + 0x50).to_bytes(4, "little") + bytes(4) + b"\xf4")
    vcpu = vm.create_vcpu()
    vcpu.enter_protected_mode(0x1000)
    assert isinstance(vcpu.run(), kvmpy.Hlt), "the kick was no exit"
    driver.queues[0].wait(lambda: driver.queues[0].pending[head].written == 32)
    driver.wait(lambda: driver.read(0x60) == 1)
    assert os.eventfd_read(fd) == 1
    transport.close()
    transport.close()
    os.close(fd)
