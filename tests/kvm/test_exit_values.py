# SPDX-License-Identifier: Apache-2.0
"""Exits as values, and the decoding of every reason, also of those that this machine's KVM never gives."""

from __future__ import annotations

import struct

import pytest

from kvmpy import _constants as c
from kvmpy import _exits as x
from kvmpy.errors import KvmError, StateError

MASK64 = 0xFFFF_FFFF_FFFF_FFFF


def u64s(*words: int) -> bytes:
    return struct.pack(f"<{len(words)}Q", *words)


PLAIN = [
    (c.KVM_EXIT_HLT, x.Hlt),
    (c.KVM_EXIT_IRQ_WINDOW_OPEN, x.IrqWindowOpen),
    (c.KVM_EXIT_SHUTDOWN, x.Shutdown),
    (c.KVM_EXIT_INTR, x.Interrupted),
    (c.KVM_EXIT_SET_TPR, x.SetTpr),
    (c.KVM_EXIT_NMI, x.Nmi),
    (c.KVM_EXIT_WATCHDOG, x.Watchdog),
    (c.KVM_EXIT_DIRTY_RING_FULL, x.DirtyRingFull),
    (c.KVM_EXIT_AP_RESET_HOLD, x.ApResetHold),
    (c.KVM_EXIT_X86_BUS_LOCK, x.BusLock),
]

# reason, the union of kvm_run as <linux/kvm.h> has it, the exit
DECODED = [
    (c.KVM_EXIT_UNKNOWN, u64s(0x31), x.HwUnknown(0x31)),
    (c.KVM_EXIT_EXCEPTION, struct.pack("<II", 14, 2), x.GuestException(14, 2)),
    (c.KVM_EXIT_MMIO, struct.pack("<Q8sIB", 0xFED0_0000, b"abcdefgh", 8, 1), x.MmioWrite(0xFED0_0000, b"abcdefgh")),
    (c.KVM_EXIT_MMIO, struct.pack("<Q8sIB", 0xFED0_0000, b"", 2, 0), x.MmioRead(0xFED0_0000, 2)),
    # a length that no KVM gives: bounded all the same
    (c.KVM_EXIT_MMIO, struct.pack("<Q8sIB", 0, b"abcdefgh", 0xFFFF_FFFF, 1), x.MmioWrite(0, b"abcdefgh")),
    (c.KVM_EXIT_HYPERCALL, u64s(12, 1, 2, 3, 4, 5, 6, 0, 1), x.Hypercall(12, (1, 2, 3, 4, 5, 6), True)),
    (c.KVM_EXIT_HYPERCALL, u64s(12, 1, 2, 3, 4, 5, 6, 0, 0), x.Hypercall(12, (1, 2, 3, 4, 5, 6), False)),
    (c.KVM_EXIT_DEBUG, struct.pack("<IIQQQ", 3, 0, 0x1000, 0xFFFF_0FF0, 0x400), x.Debug(3, 0x1000, 0xFFFF_0FF0, 0x400)),
    (c.KVM_EXIT_FAIL_ENTRY, struct.pack("<QI", 0x8000_0021, 3), x.FailEntry(0x8000_0021, 3)),
    (c.KVM_EXIT_TPR_ACCESS, struct.pack("<QI", 0x1234, 1), x.TprAccess(0x1234, True)),
    (c.KVM_EXIT_INTERNAL_ERROR, struct.pack("<II", 3, 2) + u64s(7, 8), x.InternalError(3, (7, 8))),
    (c.KVM_EXIT_INTERNAL_ERROR, struct.pack("<II", 3, 0xFFFF) + u64s(*range(31)), x.InternalError(3, range(16))),
    (c.KVM_EXIT_SYSTEM_EVENT, struct.pack("<II", 3, 2) + u64s(1, 2), x.SystemEvent(3, (1, 2))),
    (c.KVM_EXIT_SYSTEM_EVENT, struct.pack("<II", 1, 0xFFFF) + u64s(*range(31)), x.SystemEvent(1, range(16))),
    (c.KVM_EXIT_IOAPIC_EOI, b"\x31", x.IoapicEoi(0x31)),
    (c.KVM_EXIT_X86_RDMSR, struct.pack("<B7xII", 0, 2, 0x10), x.RdMsr(0x10, 2)),
    (c.KVM_EXIT_X86_WRMSR, struct.pack("<B7xIIQ", 0, 4, 0x10, MASK64), x.WrMsr(0x10, MASK64, 4)),
    (c.KVM_EXIT_HYPERV, struct.pack("<IIIIQQQ", 1, 0, 0x4000_0080, 0, 1, 2, 3), x.HypervSynic(0x4000_0080, 1, 2, 3)),
    (c.KVM_EXIT_HYPERV, struct.pack("<II", 2, 0) + u64s(0x5C, 0, 8, 9), x.HypervHcall(0x5C, (8, 9))),
    (
        c.KVM_EXIT_HYPERV,
        struct.pack("<IIII", 3, 0, 0x4000_00F1, 0) + u64s(1, 0, 2, 3, 4),
        x.HypervSyndbg(0x4000_00F1, 1, 2, 3, 4),
    ),
    (c.KVM_EXIT_HYPERV, struct.pack("<I", 99), x.Unknown(c.KVM_EXIT_HYPERV)),
    (
        c.KVM_EXIT_XEN,
        struct.pack("<II", 1, 0) + struct.pack("<II", 1, 3) + u64s(17, 0, 1, 2, 3, 4, 5, 6),
        x.XenHcall(17, (1, 2, 3, 4, 5, 6), True, 3),
    ),
    (c.KVM_EXIT_NOTIFY, struct.pack("<I", 1), x.Notify(1)),
    (c.KVM_EXIT_MEMORY_FAULT, u64s(8, 0x1000, 0x2000), x.MemoryFault(0x1000, 0x2000, 8)),
    (c.KVM_EXIT_TDX, u64s(0, 0x10002, 0, 1, 2, 3, 4, 5), x.Tdx(0x10002, (1, 2, 3, 4, 5))),
    (c.KVM_EXIT_SNP_REQ_CERTS, u64s(0x3000, 2, 0), x.SnpReqCerts(0x3000, 2)),
    *[(reason, b"", cls()) for reason, cls in PLAIN],
]


@pytest.mark.parametrize(("reason", "union", "expected"), DECODED, ids=lambda value: repr(value)[:40])
def test_every_reason_is_decoded(fake, reason, union, expected):
    fake.exits_with(reason, union)
    vcpu = fake.vcpu()
    exit = vcpu.run()
    assert exit == expected
    assert exit.reason == reason
    assert vcpu.history == [expected]


def test_every_exit_of_the_header_has_a_class_or_a_name():
    decoded = {reason for reason, _, _ in DECODED} | {c.KVM_EXIT_IO}
    kinds = ("KVM_EXIT_IO_", "KVM_EXIT_HYPERV_", "KVM_EXIT_XEN_", "KVM_EXIT_HYPERCALL_")
    for name, reason in vars(c).items():
        if name.startswith("KVM_EXIT_") and not name.startswith(kinds) and reason not in decoded:
            assert x.Unknown(reason).name == name


def test_an_unknown_reason_is_a_value_too(fake):
    fake.exits_with(0xABCD)
    exit = fake.vcpu().run()
    assert exit == x.Unknown(0xABCD)
    assert exit.reason == 0xABCD
    assert repr(exit) == "Unknown(43981: KVM_EXIT_43981)"


def io(direction: int, size: int, port: int, count: int, offset: int = 4096) -> bytes:
    return struct.pack("<BBHIQ", direction, size, port, count, offset)


def test_string_output_at_once(fake):
    fake.exits_with(c.KVM_EXIT_IO, io(1, 2, 0x3F8, 20), bytes(range(40)))
    vcpu = fake.vcpu()
    exit = vcpu.run()
    assert exit == x.IoOut(0x3F8, bytes(range(40)), 2, 20)
    assert exit.value == 0x0100
    assert vcpu.history == [x.IoOut(0x3F8, bytes(range(16)), 2, 20)]  # a history has the beginning


def test_string_input_at_once(fake):
    fake.exits_with(c.KVM_EXIT_IO, io(0, 2, 0x1F0, 3))
    vcpu = fake.vcpu()
    exit = vcpu.run()
    assert exit == x.IoIn(0x1F0, 2, 3)
    assert bytes(fake.run_page[4096:4102]) == b"\xff" * 6
    with pytest.raises(TypeError, match="answer with 6 bytes"):
        exit.answer(1)
    with pytest.raises(ValueError, match="6 bytes are needed, not 5"):
        exit.answer(b"12345")
    exit.answer(b"abcdef")
    assert bytes(fake.run_page[4096:4102]) == b"abcdef"
    assert exit.answered == b"abcdef"


@pytest.mark.parametrize(
    ("size", "count", "offset"), [(4, 0xFFFF_FFFF, 4096), (4, 1, 3 * 4096 - 3), (1, 1, (1 << 64) - 1), (255, 4096, 0)]
)
def test_port_data_outside_kvm_run_is_refused(fake, size, count, offset):
    fake.exits_with(c.KVM_EXIT_IO, io(1, size, 0x80, count, offset))
    vcpu = fake.vcpu()
    with pytest.raises(StateError, match="outside kvm_run"):
        vcpu.run()
    assert not vcpu.running


ANSWERS = [
    (c.KVM_EXIT_MMIO, struct.pack("<Q8sIB", 0, b"", 4, 0), lambda e: e.answer(0x11223344), (8, b"\x44\x33\x22\x11")),
    (c.KVM_EXIT_HYPERCALL, b"", lambda e: e.answer(7), (56, u64s(7))),
    (c.KVM_EXIT_HYPERV, struct.pack("<I", 2), lambda e: e.answer(7), (16, u64s(7))),
    (c.KVM_EXIT_HYPERV, struct.pack("<I", 3), lambda e: e.answer(7), (24, u64s(7))),
    (c.KVM_EXIT_XEN, struct.pack("<I", 1), lambda e: e.answer(7), (24, u64s(7))),
    (c.KVM_EXIT_TDX, b"", lambda e: e.answer(7, (1, 2, 3, 4, 5)), (16, u64s(7, 1, 2, 3, 4, 5))),
    (c.KVM_EXIT_SNP_REQ_CERTS, u64s(0, 9), lambda e: e.answer(5, 3), (8, u64s(3, 5))),
    (c.KVM_EXIT_X86_RDMSR, b"", lambda e: e.answer(7), (0, b"\0")),
    (c.KVM_EXIT_X86_RDMSR, b"", lambda e: e.answer(7), (16, u64s(7))),
    (c.KVM_EXIT_X86_RDMSR, b"", lambda e: e.fail(), (0, b"\1")),
    (c.KVM_EXIT_X86_RDMSR, b"", lambda e: None, (0, b"\1")),
    (c.KVM_EXIT_X86_WRMSR, b"", lambda e: e.answer(), (0, b"\0")),
    (c.KVM_EXIT_X86_WRMSR, b"", lambda e: e.fail(), (0, b"\1")),
    (c.KVM_EXIT_X86_WRMSR, b"", lambda e: None, (0, b"\1")),
]


@pytest.mark.parametrize(("reason", "union", "answer", "written"), ANSWERS)
def test_answers_stand_where_the_kernel_reads_them(fake, reason, union, answer, written):
    fake.exits_with(reason, union)
    vcpu = fake.vcpu()
    exit = vcpu.run()
    answer(exit)
    offset, expected = written
    assert fake.union(offset, len(expected)) == expected


def test_instruction_of_an_emulation_failure(fake):
    union = struct.pack("<IIQB15s", 1, 4, c.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, 3, b"\x0f\x01\xc1xyz")
    fake.exits_with(c.KVM_EXIT_INTERNAL_ERROR, union)
    exit = fake.vcpu().run()
    assert exit.instruction == b"\x0f\x01\xc1"
    assert repr(exit).startswith("InternalError(1: emulation failure, instruction=0f 01 c1, data=[")


def test_memory_fault_comes_with_an_error_code(fake):
    def run(_: int) -> int:
        fake.run_page[8:12] = c.KVM_EXIT_MEMORY_FAULT.to_bytes(4, "little")
        fake.run_page[32:56] = u64s(8, 0x5000, 0x1000)
        return -14  # EFAULT

    fake.answers["KVM_RUN"] = run
    exit = fake.vcpu().run()
    assert exit == x.MemoryFault(0x5000, 0x1000, 8)
    assert exit.private


def test_a_stale_reason_does_not_hide_an_error(fake):
    fake.exits_with(c.KVM_EXIT_MEMORY_FAULT, u64s(8, 0, 0))
    vcpu = fake.vcpu()
    vcpu.run()
    fake.answers["KVM_RUN"] = -14
    with pytest.raises(KvmError, match="KVM_RUN: Bad address"):
        vcpu.run()
    assert not vcpu.running


def test_exits_made_by_hand_remember_their_answer():
    read = x.MmioRead(0x1000, 4)
    read.answer(5)
    assert read.answered == b"\5\0\0\0"
    msr = x.RdMsr(0x10)
    assert msr.answered is None
    msr.answer(7)
    assert msr.answered == 7


def test_repr_is_short_and_hex():
    assert repr(x.IoIn(0x3F8, 1)) == "IoIn(port=0x3f8, size=1, count=1)"
    assert repr(x.MmioWrite(0xFED0_0000, b"\1")) == "MmioWrite(addr=0xfed00000, data=b'\\x01')"
    assert repr(x.Hlt()) == "Hlt()"
    assert x.SystemEvent(3).name == "crash"
    assert x.InternalError(9).suberror_name == "suberror 9"


def test_exits_compare_by_value_and_kind():
    assert x.Hlt() == x.Hlt()
    assert x.Hlt() != x.Shutdown()
    assert x.IoIn(1, 1) != x.IoIn(2, 1)
    with pytest.raises(TypeError):
        hash(x.Hlt())
    with pytest.raises(AttributeError):
        x.IoIn(1, 1).port = 2


def test_exits_are_counted_by_kind(fake):
    vcpu = fake.vcpu()
    assert vcpu.exit_counts == {}
    fake.exits_with(c.KVM_EXIT_IO, io(1, 1, 0x80, 1))
    vcpu.run()
    vcpu.run()
    fake.exits_with(c.KVM_EXIT_IO, io(0, 1, 0x80, 1))
    vcpu.run()
    fake.exits_with(0xFFFF_FFFF)
    vcpu.run()
    assert vcpu.exit_counts == {"IoOut": 2, "IoIn": 1, "Unknown": 1}
    assert vcpu.exit_count == 4
