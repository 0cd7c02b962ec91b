# SPDX-License-Identifier: Apache-2.0
"""The virtio-pci transport (virtio 1.2, 4.1): capabilities, structures, MSI-X and INTx, the window, saved states."""

import random

import pytest
import virtio_rig
from test_virtio_mmio import Echo
from virtio_rig import HEAP, Rig

import kvmpy
from kvmpy.irq import NullLine
from kvmpy.pci import MsiRoutes, PciBus
from kvmpy.pci import config as c
from kvmpy.virtio import PciTransport, Rng, pci
from kvmpy.virtio import features as f
from kvmpy.virtio.testing_pci import PciDriver

WINDOW = 0xC000_0000
NO_VECTOR = 0xFFFF


@pytest.fixture(params=[True, False], ids=["threads", "inline"])
def rig(request, monkeypatch):
    monkeypatch.setattr(virtio_rig, "PCI", True)
    with Rig(Echo(request.param)) as rig:
        yield rig


def structures(function):
    """{kind: (BAR, offset, length, capability's offset)} as a driver finds them."""
    found = {}
    at = function.read_config(c.CAPABILITIES, 1)
    while at:
        if function.read_config(at, 1) == pci.VENDOR_SPECIFIC:
            kind, bar = function.read_config(at + 3, 1), function.read_config(at + 4, 1)
            found[kind] = (bar, function.read_config(at + 8, 4), function.read_config(at + 12, 4), at)
        at = function.read_config(at + 1, 1)
    return found


def test_identity_and_capabilities(rig):
    function = rig.transport.function
    assert function.read_config(0, 4) == 0x106A_1AF4 and function.read_config(8, 1) == 1, "Echo is device 42"
    found = structures(function)
    assert set(found) == {1, 2, 3, 4, 5}
    for kind in (1, 2, 3, 4):
        bar, offset, length, at = found[kind]
        assert bar == 0 and offset + length <= pci.BAR_SIZE
        assert function.read_config(at + 2, 1) == (20 if kind == 2 else 16)
    assert found[4][2] == 6, "its configuration space"
    assert found[2][2] == 8 and function.read_config(found[2][3] + 16, 4) == 4, "two queues, four bytes each"
    assert function.msix_at and function.read_config(function.msix_at + 2, 2) == 2, "three vectors"


def test_intx_and_isr(rig):
    driver = rig.start()
    assert driver.queues[1].request([b"abc"], [3]) == [b"cba"]
    driver.wait(lambda: rig.line.level)
    assert rig.transport.function.read_config(c.STATUS, 2) & c.INTX_STATUS
    assert rig.transport.read(pci.ISR + 1, 1) == 0, "only its own byte acknowledges"
    assert rig.line.level and rig.transport.read(pci.ISR, 1) == f.USED_BUFFER
    assert not rig.line.level and rig.transport.read(pci.ISR, 1) == 0
    rig.device.put_config(4, b"\x09")
    assert rig.transport.read(pci.ISR, 1) == f.CONFIG_CHANGE


def test_msix(rig):
    driver = rig.driver
    driver.start()
    driver.use_msix()
    assert driver.queues[1].request([b"abc"], [3]) == [b"cba"]
    driver.wait(lambda: rig.messages.sent)
    assert rig.messages.sent == [(0xFEE0_0000, 0x42)]
    rig.device.put_config(4, b"\x09")
    assert rig.messages.sent[-1] == (0xFEE0_0000, 0x40)
    assert not rig.line.level and rig.transport.read(pci.ISR, 1) == 0, "no pin beside messages"
    driver.write(0x30, 0)
    rig.transport.write(pci.COMMON + 0x1A, 2, NO_VECTOR)
    sent = len(rig.messages.sent)
    driver.queues[0].request([b"a"], [1])
    assert len(rig.messages.sent) == sent
    rig.close()
    assert rig.messages.open == 0


def test_vectors_that_do_not_exist_are_none(rig):
    for register in (0x10, 0x1A):
        assert rig.transport.read(pci.COMMON + register, 2) == NO_VECTOR
        rig.transport.write(pci.COMMON + register, 2, 2)
        assert rig.transport.read(pci.COMMON + register, 2) == 2
        rig.transport.write(pci.COMMON + register, 2, 3)
        assert rig.transport.read(pci.COMMON + register, 2) == NO_VECTOR
        rig.transport.write(pci.COMMON + register, 2, 2)
    rig.driver.write(0x30, 5)
    rig.transport.write(pci.COMMON + 0x1A, 2, 1)
    assert rig.transport.read(pci.COMMON + 0x1A, 2) == NO_VECTOR, "no such queue"
    rig.driver.reset()
    assert rig.transport.read(pci.COMMON + 0x10, 2) == rig.transport.read(pci.COMMON + 0x1A, 2) == NO_VECTOR


def test_queues_have_their_largest_size_until_told_otherwise(rig):
    driver = rig.driver
    driver.negotiate(0)
    for number, size in enumerate((8, 16)):
        driver.write(0x30, number)
        assert driver.read(0x34) == size
        assert rig.transport.read(pci.COMMON + 0x1E, 2) == number
    driver.write(0x38, 4)
    assert driver.read(0x34) == 4
    queue = driver.setup_queue(1, 4)
    rings = [rig.transport.read(pci.COMMON + at, 4) for at in (0x20, 0x28, 0x30)]
    assert rings == [queue.desc, queue.avail, queue.used]
    driver.write(0x44, 0)
    assert driver.read(0x44) == 1, "a queue is not taken away so"
    driver.reset()
    driver.write(0x30, 1)
    assert (driver.read(0x34), driver.read(0x44)) == (16, 0)


def test_queue_reset_takes_the_vector(rig):
    driver = rig.start(f.RING_RESET)
    driver.use_msix()
    driver.write(0x30, 0)
    driver.write(0xC0, 1)
    assert driver.read(0xC0) == driver.read(0x44) == 0
    assert rig.transport.read(pci.COMMON + 0x1A, 2) == NO_VECTOR
    assert driver.queues[1].request([b"cd"], [2]) == [b"dc"], "the other queue goes on"
    assert driver.setup_queue(0, 4).request([b"xyz"], [3]) == [b"zyx"]


def test_registers_have_one_width(rig):
    common = set(rig.transport._common_reads)
    for offset in range(0x60):
        for size in (1, 2, 4, 8):
            if (offset, size) not in common:
                assert rig.transport.read(offset, size) == 0
    for size in (2, 4, 8):
        rig.transport.write(pci.COMMON + 0x14, size, f.ACKNOWLEDGE)
        assert rig.driver.status == 0


def test_the_window_in_configuration_space(rig):
    """Firmware without the BAR mapped: features are read, the status is written (4.1.4.9)."""
    function, at = rig.transport.function, structures(rig.transport.function)[5][3]

    def window(offset, length, bar=0):
        for field, size, value in ((4, 1, bar), (8, 4, offset), (12, 4, length)):
            function.write_config(at + field, size, value)

    window(pci.COMMON + 0x14, 1)
    function.write_config(at + 16, 4, f.ACKNOWLEDGE)
    assert rig.driver.status == f.ACKNOWLEDGE and function.read_config(at + 16, 1) == f.ACKNOWLEDGE
    window(pci.COMMON + 0, 4)
    function.write_config(at + 16, 4, 1)
    window(pci.COMMON + 4, 4)
    assert function.read_config(at + 16, 4) == rig.device.features >> 32
    window(pci.DEVICE + 4, 2)
    assert function.read_config(at + 16, 4) & 0xFFFF == 0x0605
    nowhere = ((0x14, 3, 0), (0x14, 0, 0), (0x15, 2, 0), (pci.BAR_SIZE, 4, 0), (0xFFFF_FFFC, 4, 0), (0x14, 1, 1))
    for offset, length, bar in nowhere:
        window(offset, length, bar)
        function.write_config(at + 16, 4, 0)
        function.read_config(at + 16, 4)
        assert rig.driver.status == f.ACKNOWLEDGE, (offset, length, bar)


def test_kicks_go_to_the_queue_of_their_address(rig):
    driver = rig.start()
    head = driver.queues[1].add([b"ab"], [2])
    rig.transport.write(pci.NOTIFY + 4, 2, 0)  # the value does not count
    driver.queues[1].wait(lambda: driver.queues[1].pending[head].written == 2)
    for offset in (pci.NOTIFY + 1, pci.NOTIFY + 8, pci.NOTIFY + 0xFFC, pci.BAR_SIZE - 4):
        for size in (1, 2, 4, 8):
            rig.transport.write(offset, size, 1)
            assert rig.transport.read(offset, size) == 0
    assert driver.status == 15


def test_a_saved_device_goes_on_elsewhere(rig):
    driver = rig.driver
    rig.bus.place_bars(WINDOW, 1 << 28)
    rig.transport.function.write_config(c.COMMAND, 2, c.MEMORY_SPACE | c.BUS_MASTER)
    driver.start(f.EVENT_IDX)
    driver.use_msix()
    for number in range(20):
        assert driver.queues[0].request([b"%02d" % number], [2]) == [(b"%02d" % number)[::-1]]
    state = rig.transport.save()
    with Rig(Echo(rig.device.workers[0].threaded), rig.memory) as other:
        other.transport.load(state)
        assert other.transport.save() == state
        assert other.mmio.read(WINDOW + 0x14, 1) == 15
        driver.transport = driver.pci = other.transport
        assert driver.queues[0].request([b"cd"], [2]) == [b"dc"]
        driver.wait(lambda: other.messages.sent)
        assert other.messages.sent == [(0xFEE0_0000, 0x41)]
        driver.transport = driver.pci = rig.transport


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", 2), ("isr", 4), ("vectors", [0]), ("vectors", [3, 0]), ("config_vector", 3), ("config_vector", -1),
        ("pci", None), ("pci", {}), ("status", 256), ("queues", [0] * 15), ("device", {}), ("more", 1),
        ("queues", [8, 1, 0, HEAP + 1, HEAP, HEAP, 0, 0] + [0] * 8),
    ],
)  # fmt: skip
def test_damaged_states_are_refused(rig, key, value):
    rig.start()
    state = {**rig.transport.save(), key: value}
    with pytest.raises(ValueError, match=r"."):
        rig.transport.load(state)
    assert rig.start().queues[0].request([b"ab"], [2]) == [b"ba"]


def test_hostile_accesses(rig):
    """Every offset and size of the BAR and of configuration space, in any order; then a driver starts over."""
    rng = random.Random(3)
    function = rig.transport.function
    canary = rig.canary()
    for _ in range(6000):
        size = rng.choice([1, 2, 4, 8])
        value = rng.choice([0, 1, 2, 4, 11, 15, 128, NO_VECTOR, HEAP, (1 << 64) - 1, rng.getrandbits(64)])
        value &= (1 << 8 * size) - 1
        if rng.random() < 0.6:
            anywhere = (range(0x40), range(pci.TABLE, pci.PENDING), range(pci.BAR_SIZE))
            offset = rng.choice(rng.choice(anywhere))
            if offset in range(0x20, 0x38):  # rings in the heap or nowhere
                value = rng.choice([HEAP, HEAP + 1, 0]) & (1 << 8 * size) - 1 if offset % 8 == 0 else 0
            rig.transport.write(offset, size, value)
            assert 0 <= rig.transport.read(offset, size) < 1 << 64
        else:
            offset = rng.choice([c.COMMAND, c.BAR0, function.msix_at + 2, function.window + 16, rng.randrange(256)])
            function.write_config(offset, size, value)
            assert 0 <= function.read_config(offset, size) < 1 << 64
    assert rig.canary() == canary
    function.reset()
    assert rig.start().queues[0].request([b"ab"], [2]) == [b"ba"]
    assert rig.transport.function.bars[0].base is None


def test_there_is_a_limit_of_queues():
    class Wide(Rng):
        def __init__(self):
            super().__init__()
            self.queues = self.queues * 256

    device = Wide()
    with pytest.raises(ValueError, match="256 queues, virtio-pci here has room for 255"):
        PciTransport(device, virtio_rig.guest_memory(), virtio_rig.Messages())
    device.close()


def test_ioeventfd_and_irqfd(vm):
    """On an engine: kicks are no exits wherever the BAR is, and the interrupt is a message to the processor."""
    vm.create_irqchip()
    vm.add_ram(0, 4 << 20)
    bus = PciBus(vm.mmio, [NullLine()] * 4)
    transport = PciTransport(Rng(), vm.memory, MsiRoutes(vm), vm)
    bus.plug(transport.function)
    bus.place_bars(WINDOW, 1 << 28)
    transport.function.write_config(c.COMMAND, 2, c.MEMORY_SPACE)
    driver = PciDriver(transport, vm.memory, 1 << 20)
    driver.start()
    driver.use_msix()
    vcpu = vm.create_vcpu()
    lapic = vcpu.lapic
    lapic.regs = bytes(lapic.regs[:0xF0]) + (0x1FF).to_bytes(4, "little") + bytes(lapic.regs[0xF4:])
    vcpu.lapic = lapic
    queue = driver.queues[0]
    for base in (WINDOW, 0xC123_0000):
        transport.function.write_config(c.BAR0, 4, base)
        head = queue.add([], [32])
        # mov word [base + 0x3000], 0; mov al, 1; out 0xf4, al (an exit that tells us that the kick was none)
        kick = b"\x66\xc7\x05" + (base + pci.NOTIFY).to_bytes(4, "little") + bytes(2) + b"\xb0\x01\xe6\xf4"
        vm.memory.write(0x1000, kick)
        vcpu.enter_protected_mode(0x1000)
        assert isinstance(vcpu.run(), kvmpy.IoOut), "the kick was no exit"
        queue.wait(lambda head=head: queue.pending[head].written == 32)
        driver.wait(lambda: vcpu.lapic.regs[0x220] & 2)  # vector 0x41 is requested
    transport.close()
    transport.close()
