# SPDX-License-Identifier: Apache-2.0
"""fw_cfg as firmware reads it: ports, directory, DMA."""

from __future__ import annotations

import struct

import pytest

from kvmpy.devices import FwCfg
from kvmpy.devices.fw_cfg import (
    CTL_ERROR,
    CTL_READ,
    CTL_SELECT,
    CTL_SKIP,
    CTL_WRITE,
    DATA,
    DMA_HIGH,
    DMA_LOW,
    KEY_FILE_DIR,
    KEY_FILE_FIRST,
    KEY_ID,
    KEY_NB_CPUS,
    KEY_RAM_SIZE,
    KEY_SIGNATURE,
    KEY_WRITE,
    SELECTOR,
)
from kvmpy.errors import GuestMemoryError

RAM = 0x1_0000
ACCESS = 0x100     # where the tests put their FWCfgDmaAccess
BUFFER = 0x1000


class Memory:
    """64 KiB of guest memory at 0."""

    def __init__(self):
        self.bytes = bytearray(RAM)

    def check(self, gpa, size):
        if gpa + size > RAM:
            raise GuestMemoryError("no memory", gpa, size, max(gpa, RAM))

    def read(self, gpa, size):
        self.check(gpa, size)
        return bytes(self.bytes[gpa : gpa + size])

    def write(self, gpa, data):
        self.check(gpa, len(data))
        self.bytes[gpa : gpa + len(data)] = data

    def fill(self, gpa, size, byte=0):
        self.check(gpa, size)
        self.bytes[gpa : gpa + size] = bytes([byte]) * size


class Pc:
    def __init__(self):
        self.memory = Memory()
        self.cfg = FwCfg(self.memory)

    def select(self, key):
        self.cfg.write(SELECTOR, 2, key)

    def read(self, count, key=None):
        if key is not None:
            self.select(key)
        return bytes(self.cfg.read(DATA, 1) for _ in range(count))

    def dma(self, control, length=0, address=BUFFER, key=0):
        """Run a transfer as a guest does; returns the control field afterwards."""
        self.memory.write(ACCESS, struct.pack(">IIQ", key << 16 | control, length, address))
        self.cfg.write(DMA_LOW, 4, int.from_bytes(ACCESS.to_bytes(4, "big"), "little"))
        return int.from_bytes(self.memory.read(ACCESS, 4), "big")

    def buffer(self, size):
        return self.memory.read(BUFFER, size)


@pytest.fixture
def pc():
    return Pc()


def test_signature_and_features(pc):
    assert pc.read(4, KEY_SIGNATURE) == b"QEMU"
    assert pc.read(4, KEY_ID) == b"\3\0\0\0"
    assert pc.cfg.read(DMA_HIGH, 8).to_bytes(8, "little") == b"QEMU CFG"
    assert pc.cfg.read(DMA_LOW, 4).to_bytes(4, "little") == b" CFG"


def test_without_memory_there_is_no_dma():
    cfg = FwCfg()
    cfg.write(SELECTOR, 2, KEY_ID)
    assert cfg.read(DATA, 1) == 1
    assert cfg.read(DMA_HIGH, 4) == 0
    cfg.write(DMA_LOW, 4, 0)


def test_numbers_are_little_endian_and_zeros_follow(pc):
    pc.cfg.add_u16(KEY_NB_CPUS, 0x1234)
    pc.cfg.add_u64(KEY_RAM_SIZE, 0x0102_0304_0506_0708)
    assert pc.read(4, KEY_NB_CPUS) == b"\x34\x12\0\0"
    assert pc.read(8, KEY_RAM_SIZE) == bytes([8, 7, 6, 5, 4, 3, 2, 1])


def test_key_that_does_not_exist_reads_zeros(pc):
    assert pc.read(4, 0x7777) == bytes(4)


def test_nothing_is_selected_after_reset(pc):
    pc.select(KEY_SIGNATURE)
    pc.cfg.reset()
    assert pc.read(4) == bytes(4)


def test_directory_is_sorted_by_name_and_leads_to_the_files(pc):
    pc.cfg.add_file("etc/zebra", b"stripes")
    pc.cfg.add_file("bootorder", b"ab")
    directory = pc.read(4 + 2 * 64, KEY_FILE_DIR)
    assert struct.unpack(">I", directory[:4]) == (2,)
    first = struct.unpack(">IHH56s", directory[4:68])
    second = struct.unpack(">IHH56s", directory[68:])
    assert (first[0], first[3].rstrip(b"\0")) == (2, b"bootorder")
    assert (second[0], second[3].rstrip(b"\0")) == (7, b"etc/zebra")
    assert pc.read(2, first[1]) == b"ab"
    assert pc.read(7, second[1]) == b"stripes"
    assert pc.cfg.files == ["bootorder", "etc/zebra"]


@pytest.mark.parametrize("name", ["", "x" * 56, "größe", "a\0b"])
def test_bad_file_name_is_refused(pc, name):
    with pytest.raises(ValueError, match="name"):
        pc.cfg.add_file(name, b"")


def test_second_file_of_the_same_name_is_refused(pc):
    pc.cfg.add_file("a", b"")
    with pytest.raises(ValueError, match="already"):
        pc.cfg.add_file("a", b"")


@pytest.mark.parametrize("key", [KEY_SIGNATURE, KEY_ID, KEY_FILE_DIR, KEY_FILE_FIRST, 0x4005, 0xC000, -1])
def test_keys_of_the_device_itself_and_of_files_cannot_be_set(pc, key):
    with pytest.raises(ValueError, match="key"):
        pc.cfg.add_bytes(key, b"")


def test_dma_read_selects_copies_and_fills_with_zeros(pc):
    key = pc.cfg.add_file("f", b"hello")
    pc.memory.fill(BUFFER, 16, 0xEE)
    assert pc.dma(CTL_SELECT | CTL_READ, 8, key=key) == 0
    assert pc.buffer(9) == b"hello\0\0\0\xee"


def test_dma_skip_moves_on_and_reads_continue(pc):
    key = pc.cfg.add_file("f", bytes(range(100)))
    assert pc.dma(CTL_SELECT | CTL_SKIP, 40, key=key) == 0
    assert pc.dma(CTL_READ, 10) == 0
    assert pc.buffer(10) == bytes(range(40, 50))
    assert pc.read(2) == bytes([50, 51])


def test_dma_address_in_two_halves_or_one_write(pc):
    pc.memory.write(ACCESS, struct.pack(">IIQ", CTL_SELECT | CTL_READ, 4, BUFFER))
    pc.cfg.write(DMA_HIGH, 4, 0)
    pc.cfg.write(DMA_LOW, 4, int.from_bytes(ACCESS.to_bytes(4, "big"), "little"))
    assert pc.buffer(4) == b"QEMU"
    pc.memory.fill(BUFFER, 4)
    pc.memory.write(ACCESS, struct.pack(">IIQ", CTL_SELECT | CTL_READ, 4, BUFFER))
    pc.cfg.write(DMA_HIGH, 8, int.from_bytes(ACCESS.to_bytes(8, "big"), "little"))
    assert pc.buffer(4) == b"QEMU"


def test_dma_high_half_counts_and_is_used_up(pc, caplog):
    pc.cfg.write(DMA_HIGH, 4, int.from_bytes((1).to_bytes(4, "big"), "little"))
    pc.cfg.write(DMA_LOW, 4, 0)
    assert "no memory" in caplog.text
    assert pc.dma(CTL_SELECT | CTL_READ, 4) == 0


@pytest.mark.parametrize("address", [RAM - 2, RAM, 1 << 40, (1 << 64) - 1])
def test_dma_that_leaves_memory_sets_the_error_bit(pc, address):
    assert pc.dma(CTL_SELECT | CTL_READ, 4, address) == CTL_ERROR


def test_dma_read_of_four_gigabytes_ends_where_memory_ends(pc):
    assert pc.dma(CTL_SELECT | CTL_READ, 0xFFFF_FFFF) == CTL_ERROR


def test_dma_write_changes_a_writable_file_and_tells(pc):
    seen = []
    key = pc.cfg.add_file("w", bytes(8), writable=True, on_write=seen.append)
    pc.memory.write(BUFFER, b"abcd")
    pc.dma(CTL_SELECT | CTL_SKIP, 2, key=key)
    assert pc.dma(CTL_WRITE, 4) == 0
    assert seen == [b"\0\0abcd\0\0"]
    assert pc.cfg.file("w") == b"\0\0abcd\0\0"
    assert pc.read(4, KEY_WRITE | key) == b"\0\0ab"
    pc.cfg.reset()
    assert pc.cfg.file("w") == bytes(8)


def test_dma_write_past_the_end_or_to_a_read_only_file_changes_nothing(pc):
    writable = pc.cfg.add_file("w", bytes(4), writable=True)
    fixed = pc.cfg.add_file("r", b"data")
    pc.memory.write(BUFFER, b"xxxxxxxx")
    assert pc.dma(CTL_SELECT | CTL_WRITE, 5, key=writable) == CTL_ERROR
    assert pc.dma(CTL_SELECT | CTL_WRITE, 4, key=fixed) == CTL_ERROR
    assert pc.dma(CTL_SELECT | CTL_WRITE, 4, key=0x7777) == CTL_ERROR
    assert (pc.cfg.file("w"), pc.cfg.file("r")) == (bytes(4), b"data")


def test_data_port_writes_are_ignored(pc):
    key = pc.cfg.add_file("w", b"data", writable=True)
    pc.select(KEY_WRITE | key)
    pc.cfg.write(DATA, 1, 0)
    assert pc.cfg.file("w") == b"data"


def test_saved_state_keeps_position_and_written_files(pc):
    key = pc.cfg.add_file("w", b"data", writable=True)
    pc.memory.write(BUFFER, b"DA")
    pc.dma(CTL_SELECT | CTL_WRITE, 2, key=key)
    other = Pc()
    other.cfg.add_file("w", b"data", writable=True)
    other.cfg.load(pc.cfg.save())
    assert other.read(2) == b"ta"
    assert other.cfg.file("w") == b"DAta"


def test_load_refuses_files_of_another_machine(pc):
    pc.cfg.add_file("w", b"data", writable=True)
    state = pc.cfg.save()
    for written in ([], [[KEY_FILE_FIRST, b"longer"]], [[0, b"data"]], [[KEY_FILE_FIRST, "data"]], {}, [7]):
        with pytest.raises(ValueError, match="fw_cfg"):
            pc.cfg.load({**state, "written": written})
    with pytest.raises(ValueError):
        Pc().cfg.load(state)
