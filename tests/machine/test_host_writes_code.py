# SPDX-License-Identifier: Apache-2.0
"""The host writes over code that runs: the processor goes on with the new bytes, and not with what it translated."""

import random
import time

import pytest

from kvmpy import Machine

# again: mov al, 0x41; mov [0x2000], al; jmp again
LOOP = bytes.fromhex("b041 a20020 ebf9")
SEEN = 0x2000


def wait_for(memory, value):
    end = time.monotonic() + 20
    while memory.read(SEEN, 1)[0] != value:
        assert time.monotonic() < end, f"the guest still writes {memory.read(SEEN, 1)[0]:#x}, not {value:#x}"


@pytest.fixture
def machine(backend, tmp_path):
    image = tmp_path / "loop"
    image.write_bytes(LOOP)
    with Machine(
        kernel=image, image_format="flat", load_address=0x1000, entry=0x1000, mode="real", memory="8M", backend=backend
    ) as made:
        yield made


def test_one_byte_of_an_instruction(machine):
    memory = machine.vm.memory
    wait_for(memory, 0x41)
    for value in range(0x42, 0x7F):
        memory.write(0x1001, bytes([value]))
        wait_for(memory, value)


def test_among_many_writes_elsewhere(machine):
    """Pages without code are not looked at again; the one with code is, in whatever range it lies."""
    memory = machine.vm.memory
    rng = random.Random(3)
    for value in range(0x42, 0x60):
        for _ in range(20):
            memory.write(rng.randrange(0x10_0000, 0x70_0000), rng.randbytes(rng.choice([1, 64, 5000])))
        around = bytearray(memory.read(0x0F00, 0x1000))
        around[0x101] = value
        memory.write(0x0F00, bytes(around[:0x200]) if value % 2 else bytes(around[:0x1000]))
        wait_for(memory, value)


def test_a_device_writes_it(backend, tmp_path):
    """A disk is read over the code that runs."""
    from kvmpy.block import create_disk, open_disk
    from kvmpy.virtio.testing import Driver

    image, disk = tmp_path / "loop", tmp_path / "disk"
    image.write_bytes(LOOP)
    create_disk(disk, "raw", 1 << 20)
    with open_disk(disk, "raw") as opened:
        for sector in range(64):
            opened.pwrite(512 * sector, (bytes([0xB0, 0x42 + sector]) + LOOP[2:]).ljust(512, b"\xf4"))
    with Machine(
        kernel=image, image_format="flat", load_address=0x1000, entry=0x1000, mode="real", memory="8M", backend=backend,
        disks=[f"{disk},format=raw,readonly=on"],
    ) as machine:  # fmt: skip
        memory = machine.vm.memory
        driver = Driver(machine.virtio.slots.transports[0], memory, 0x20_0000)
        driver.start()
        queue = driver.queues[0]
        wait_for(memory, 0x41)
        for sector in range(64):
            driver.free_all()
            header = driver.buffer(bytes(8) + sector.to_bytes(8, "little"))
            status = driver.alloc(1)
            for slot, (addr, size, flags) in enumerate([(header, 16, 1), (0x1000, 512, 3), (status, 1, 2)]):
                queue.put_desc(slot, addr, size, flags, slot + 1)
            done = queue.last_used
            queue.publish(0)
            queue.kick()
            queue.wait(lambda done=done: queue.last_used != done)
            wait_for(memory, 0x42 + sector)
