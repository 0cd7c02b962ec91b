# SPDX-License-Identifier: Apache-2.0
"""Virtio devices of a machine, with tiny guests: where they are, how they stop, what is closed when."""

import io
from pathlib import Path

import pytest

from kvmpy import Drive, Machine
from kvmpy.arch import layout
from kvmpy.block import create_disk, open_disk
from kvmpy.chardev import Console
from kvmpy.net import PacketSocket
from kvmpy.virtio import Port, Rng
from kvmpy.virtio.testing import Driver

LONG = 30
FOREVER = "ebfe"
# 32-bit: mov eax,[0xd0000008] (DeviceID)  out 0xf4,al  hlt
DEVICE_ID = "a1080000d0 e6f4 f4"
# mov eax,0x80000800  mov dx,0xcf8  out dx,eax  mov dx,0xcfe  in al,dx (device id)  out 0xf4,al  hlt
PCI_ID = "b800080080 66baf80c ef 66bafe0c ec e6f4 f4"


@pytest.fixture
def machine(backend):
    """A factory of machines that run flat code; each is closed at the end."""
    made = []

    def make(code=FOREVER, **fields):
        options = {"memory": "8M", "load_address": 0x10_0000, "backend": backend} | fields
        made.append(Machine(kernel=io.BytesIO(bytes.fromhex(code)), **options))
        return made[-1]

    yield make
    for machine in made:
        machine.close()


@pytest.fixture
def image(tmp_path):
    create_disk(tmp_path / "disk", "qcow2", 1 << 20)
    return tmp_path / "disk"


def open_files():
    return set(Path("/proc/self/fd").iterdir())


def test_the_guest_finds_the_device(machine, image):
    assert machine(DEVICE_ID, disks=[f"{image},format=qcow2"]).run(timeout=LONG).code == 2 << 1 | 1


def test_the_guest_finds_the_device_on_pci(machine, image):
    m = machine(PCI_ID, disks=[f"{image},format=qcow2"], rng=True, transport="pci")
    assert m.run(timeout=LONG).code == 0x42 << 1 | 1
    ids = [m.vm.mmio.read(layout.PCI_ECAM + (slot << 15), 4) for slot in range(4)]
    assert ids == [0x0008_1B36, 0x1042_1AF4, 0x1044_1AF4, 0xFFFF_FFFF]
    assert m.vm.mmio.read(layout.PCI_ECAM + (2 << 15) + 0x10, 4) == 0xC000_8000, "placed before the guest starts"
    assert m.virtio.slots.cmdline == [] == m.virtio.slots.places


def test_a_firmware_finds_devices_on_pci_and_places_them_itself(backend, image):
    with_disk = {"disks": [f"{image},format=qcow2"]}
    by_mmio = with_disk | {"transport": "mmio"}
    for fields, pci in ((with_disk, True), ({}, False), ({"transport": "pci"}, True), (by_mmio, False)):
        m = Machine(firmware=io.BytesIO(b"\xf4" * 65536), memory="8M", backend=backend, **fields)
        m.vm.pio.write(0xCF8, 4, 0x8000_0000)
        assert m.vm.pio.read(0xCFC, 4) == (0x0008_1B36 if pci else 0xFFFF_FFFF)
        assert all(t.function.config.get(0x10, 4) == 0 for t in m.virtio.slots.transports if pci)
        m.close()


def test_every_device_has_its_place_and_name(machine, image, tmp_path):
    backend, peer = PacketSocket.pair()
    m = machine(
        disks=[Drive(image, "qcow2")],
        nets=[backend],
        hvc=[Port(Console(), console=True)],
        rng=True,
        balloon=True,
        vsock=(3, tmp_path / "vsock"),
        virtio=[lambda memory: Rng("another")],
    )
    names = ["blk0", "net0", "console", "rng", "balloon", "vsock", "another"]
    assert [device.name for device in m.virtio.devices] == names == list(m.stats()["virtio"])
    assert [place.gsi for place in m.virtio.slots.places] == [5, 6, 7, 10, 11, 16, 17]
    for number, device in enumerate(m.virtio.devices):
        base = layout.VIRTIO_MMIO + number * layout.VIRTIO_MMIO_SIZE
        assert m.vm.mmio.read(base + 8, 4) == device.device_id
    m.close()
    m.close()
    assert peer.recv(16) == b"", "the back end was closed"
    assert not (tmp_path / "vsock").exists()
    peer.close()


def test_there_is_an_end_of_places(machine):
    before = open_files()
    with pytest.raises(ValueError, match="rng13: 13 virtio-mmio devices"):
        machine(virtio=[lambda memory, n=n: Rng(f"rng{n}") for n in range(14)])
    assert open_files() == before


@pytest.mark.parametrize(
    "wrong",
    [{"nets": ["user,hostfwd=nonsense"]}, {"shares": ["/no/such/folder"]}, {"virtio": [lambda memory: 1 / 0]}],
)
def test_a_machine_that_cannot_be_made_leaves_nothing_open(machine, image, wrong):
    before = open_files()
    with pytest.raises((FileNotFoundError, ZeroDivisionError, ValueError)):
        machine(disks=[f"{image},format=qcow2"], rng=True, **wrong)
    assert open_files() == before
    open_disk(image, "qcow2").close()


def test_closing_writes_the_disk_and_lets_it_go(machine, image):
    m = machine(disks=[f"{image},format=qcow2"])
    driver = Driver(m.virtio.slots.transports[0], m.vm.memory, 0x20_0000)
    driver.start()
    header = (1).to_bytes(4, "little") + bytes(4) + (1).to_bytes(8, "little")
    assert driver.queues[0].request([header, b"kvmpy" * 102 + b"ab"], [1]) == [b"\0"]
    with pytest.raises(BlockingIOError):
        open_disk(image, "qcow2")
    assert m.stats()["virtio"]["blk0"]["writes"] == 1
    m.close()
    with open_disk(image, "qcow2") as disk:
        assert disk.pread(512, 5) == b"kvmpy"


def test_a_disk_of_the_caller_stays_open(machine, image):
    with open_disk(image, "qcow2") as disk:
        m = machine(disks=[disk])
        m.close()
        disk.pwrite(0, b"still open")


def test_a_paused_machine_does_nothing(machine):
    m = machine(rng=True)
    driver = Driver(m.virtio.slots.transports[0], m.vm.memory, 0x20_0000)
    m.start()
    driver.start()
    m.pause(LONG)
    head = driver.queues[0].add([], [32])
    driver.queues[0].kick()
    m.virtio.devices[0].resume()  # as saving its state ends with
    assert not any(worker.running for worker in m.virtio.devices[0].workers)
    assert driver.queues[0].take() == []
    m.resume()
    driver.queues[0].wait(lambda: driver.queues[0].pending[head].written == 32)
    m.stop()


def test_kernels_without_acpi_are_told_on_the_command_line(machine):
    slots = machine(rng=True, balloon=True).virtio.slots
    assert slots.cmdline == ["virtio_mmio.device=4K@0xd0000000:5", "virtio_mmio.device=4K@0xd0001000:6"]
