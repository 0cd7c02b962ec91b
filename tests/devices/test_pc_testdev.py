# SPDX-License-Identifier: Apache-2.0
"""The test device: its parts without a VM, and a machine whose guest uses all of them."""

from __future__ import annotations

import io

import pytest

from kvmpy import Machine, Outcome
from kvmpy.devices import PcTestdev
from kvmpy.irq import NullLine

LONG = 30
LINE = 5
VECTOR = 0x25

# 32-bit code at 1 MiB. It exits with 3 * 7, once line 5 has interrupted it: the handler at 0x80 does that.
GUEST = bytes.fromhex(
    "0f011d 60001000"  # lidt [0x100060]
    "b011 e620 b020 e621 b004 e621 b001 e621 b0df e621"  # PIC: vectors from 0x20, all masked but line 5
    "b007 e6e1 e4e0 84c0 7537"  # out 0xe1,7   in al,0xe0   test al,al   jnz wrong
    "66e5e0 88e3"  # in ax,0xe0   mov bl,ah
    "881d 100000ff 021d 100000ff 001d 100000ff"  # mov [0xff000010],bl   add bl,[same]   add [same],bl
    "8a1d 100000ff"  # mov bl,[same]
    "fb b001 66ba0520 ee f4"  # sti   mov dx,0x2005   out dx,al = 1   hlt
    "b000 e6f4 f4"  # wrong: mov al,0   out 0xf4,al   hlt
)
HANDLER = bytes.fromhex("88d8 e6f4 f4")  # mov al,bl   out 0xf4,al   hlt


def image():
    """The code; the IDT register at 0x60, the handler at 0x80, the IDT at 0x100 with one interrupt gate."""
    memory = bytearray(0x800)
    memory[: len(GUEST)] = GUEST
    assert len(GUEST) <= 0x60
    memory[0x60:0x66] = (0x7FF).to_bytes(2, "little") + (0x10_0100).to_bytes(4, "little")
    memory[0x80 : 0x80 + len(HANDLER)] = HANDLER
    gate = 0x0080 | 0x08 << 16 | 0x8E00 << 32 | 0x0010 << 48
    memory[0x100 + 8 * VECTOR : 0x108 + 8 * VECTOR] = gate.to_bytes(8, "little")
    return io.BytesIO(bytes(memory))


def test_a_guest_uses_latch_memory_and_lines(backend):
    with Machine(kernel=image(), load_address=0x10_0000, memory="8M", testdev=True, backend=backend) as machine:
        assert machine.wait(LONG) == Outcome("debug-exit", 21 << 1 | 1)


def test_without_it_nobody_answers(backend):
    with Machine(kernel=image(), load_address=0x10_0000, memory="8M", backend=backend) as machine:
        assert machine.wait(LONG) == Outcome("debug-exit", 1)


def device():
    lines = [NullLine() for _ in range(24)]
    return PcTestdev(lines), lines


def test_the_latch_is_read_in_pieces():
    parts, _ = device()
    parts.latch.write(0, 4, 0x1234_5678)
    assert [parts.latch.read(n, 1) for n in range(4)] == [0x78, 0x56, 0x34, 0x12]
    assert parts.latch.read(1, 2) == 0x3456
    assert parts.latch_bytes.read(0, 1) == 0x78


def test_a_write_over_several_line_ports_drives_each():
    parts, lines = device()
    parts.lines.write(11, 4, 1)
    parts.lines.write(22, 4, 0x01010101)  # two of them are past the end
    assert [n for n, line in enumerate(lines) if line.level] == [11, 22, 23]
    assert parts.lines.read(11, 2) == 1


def test_lines_that_do_not_change_are_not_driven():
    parts, lines = device()
    lines[4].set(True)  # another device on the same pin
    parts.lines.write(7, 1, 1)
    parts.lines.reset()
    assert lines[4].level and not lines[7].level


def test_memory_ends_where_it_ends():
    parts, _ = device()
    parts.memory.write(0xFFFC, 8, 0x1122_3344_5566_7788)
    assert parts.memory.read(0xFFFC, 4) == 0x5566_7788
    assert parts.memory.read(0xFFFE, 8) == 0x5566
    assert len(parts.memory.save()["data"]) == 0x1_0000


def test_flush_takes_a_page_address():
    parts, _ = device()
    parts.flush.write(0, 4, 0x1234_5678)
    parts.flush.write(1, 2, 0xFFFF)
    assert (parts.flush.page, parts.flush.read(0, 4)) == (0x1234_5000, 0)


@pytest.mark.parametrize(
    ("part", "broken"),
    [
        ("latch", {"version": 1, "data": b"123"}),
        ("flush", {"version": 1, "page": 0x123}),
        ("lines", {"version": 1, "high": [24]}),
        ("memory", {"version": 1, "data": b""}),
    ],
)
def test_states_come_back_and_broken_ones_are_refused(part, broken):
    parts, lines = device()
    parts.latch.write(0, 4, 0xCAFE)
    parts.flush.write(0, 4, 0x7000)
    parts.lines.write(3, 1, 1)
    parts.memory.write(8, 8, 99)
    saved = getattr(parts, part).save()
    with pytest.raises(ValueError, match=broken.keys() - {"version"} and next(iter(broken.keys() - {"version"}))):
        getattr(parts, part).load(broken)
    assert getattr(parts, part).save() == saved
    getattr(parts, part).reset()
    assert getattr(parts, part).save() != saved
    getattr(parts, part).load(saved)
    assert getattr(parts, part).save() == saved
    assert lines[3].level
