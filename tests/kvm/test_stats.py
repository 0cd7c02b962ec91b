# SPDX-License-Identifier: Apache-2.0
"""The statistics file of KVM_GET_STATS_FD."""

from __future__ import annotations

import struct

import pytest

from kvmpy._constants import Cap
from kvmpy._exits import IoOut
from kvmpy.errors import KvmError, StateError

from .test_vm import need


def test_vm_statistics(vm):
    need(vm, "BINARY_STATS_FD", vm.stats)
    with vm.stats() as stats:
        values = stats.read()
        assert stats.id.startswith("kvm-")
        assert list(values) == [stat.name for stat in stats.stats]
        assert all(stat.kind and stat.base in (2, 10) for stat in stats.stats)
    with pytest.raises(StateError):
        stats.read()


def test_vcpu_statistics_count_exits(vm, guest):
    g = guest("ba8000 ee ebfd")  # mov dx,0x80; x: out dx,al; jmp x
    need(vm, "BINARY_STATS_FD", g.vcpu.stats)
    stats = g.vcpu.stats()
    assert stats.id.endswith("/vcpu-0")
    before = stats.read()
    for _ in range(10):
        assert isinstance(g.run(), IoOut)
    after = stats.read()
    # An engine that emulates ring 0 counts instructions instead of exits.
    assert any(after[name] >= before[name] + 10 for name in ("io_exits", "insn_emulation") if name in before)
    g.vcpu.close()
    assert stats.closed


def test_a_halt_poll_histogram_is_a_list(vm, vcpu):
    need(vm, "BINARY_STATS_FD", vcpu.stats)
    stats = vcpu.stats()
    for stat in stats.stats:
        value = stats.read()[stat.name]
        assert isinstance(value, list if stat.size > 1 else int)


def file(descriptors: list[tuple], data: list[int], name_size: int = 16, count: int | None = None) -> bytes:
    id_at, desc_at = 24, 24 + name_size
    desc = b"".join(
        struct.pack("<IhHII", flags, exponent, size, offset, bucket) + name.encode().ljust(name_size, b"\0")
        for name, flags, exponent, size, offset, bucket in descriptors
    )
    count = len(descriptors) if count is None else count
    header = struct.pack("<6I", 0, name_size, count, id_at, desc_at, desc_at + len(desc))
    return header + b"kvm-1".ljust(name_size, b"\0") + desc + struct.pack(f"<{len(data)}Q", *data)


@pytest.fixture
def opened(fake):
    fake.capabilities[Cap.BINARY_STATS_FD] = 1
    return fake.kvm.create_vm()


def test_the_file_is_parsed(fake, opened):
    fake.stats = file(
        [
            ("exits", 0x000, 0, 1, 0, 0),
            ("pages", 0x111, 20, 1, 8, 0),  # instant, 2^20 bytes
            ("wait", 0x024, -9, 3, 16, 0),  # log histogram of nanoseconds
            ("linear", 0x043, 0, 2, 40, 5),
            ("newer", 0x0F9, 0, 1, 56, 0),
        ],
        [7, 3, 1, 2, 3, 4, 5, 6],
    )
    stats = opened.stats()
    assert stats.id == "kvm-1"
    assert stats.read() == {"exits": 7, "pages": 3, "wait": [1, 2, 3], "linear": [4, 5], "newer": 6}
    exits, pages, wait, linear, newer = stats.stats
    assert (exits.kind, exits.unit, exits.base, exits.exponent) == ("cumulative", "", 10, 0)
    assert (pages.kind, pages.unit, pages.base, pages.exponent) == ("instant", "bytes", 2, 20)
    assert (wait.kind, wait.unit, wait.exponent, wait.size) == ("log histogram", "seconds", -9, 3)
    assert (linear.kind, linear.unit, linear.bucket_size) == ("linear histogram", "boolean", 5)
    assert (newer.kind, newer.unit) == ("unknown 9", "unknown 15")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (file([("a", 0, 0, 1, 0, 0)], [1], count=0xFFFF_FFFF), "descriptors"),
        (file([("a", 0, 0, 1, 0, 0)], [1])[:40], "end .* too early"),
        (file([("a", 0, 0, 1, 0xFFFF_FFF0, 0)], [1]), "bytes of data"),
        (struct.pack("<6I", 0, 0xFFFF_FFFF, 1, 24, 48, 96), "descriptors"),
    ],
)
def test_a_broken_file_is_refused(fake, opened, broken, message):
    fake.stats = broken
    with pytest.raises(ValueError, match=message):
        opened.stats()


def test_a_file_that_cannot_be_read(fake, opened):
    with pytest.raises(KvmError, match="KVM_GET_STATS_FD: Bad file descriptor"):
        opened.stats()
