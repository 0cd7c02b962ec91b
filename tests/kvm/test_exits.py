# SPDX-License-Identifier: Apache-2.0
"""Each exit that a tiny guest can provoke. Guests are real-mode code at 0x1000; assembly in the comments."""

from __future__ import annotations

import mmap
import os

import pytest

from kvmpy import _constants as c
from kvmpy import _kvm
from kvmpy._exits import (
    Debug,
    DirtyRingFull,
    Exit,
    Hlt,
    Hypercall,
    InternalError,
    IoapicEoi,
    IoIn,
    IoOut,
    IrqWindowOpen,
    MemoryFault,
    MmioRead,
    MmioWrite,
    RdMsr,
    Shutdown,
    TprAccess,
    WrMsr,
)
from kvmpy._structs import route_msi
from kvmpy.errors import StateError

from .conftest import Hung

# mov dx,0x3f8; mov al,'A'; out dx,al; hlt
OUT = "baf803 b041 ee f4"
# mov dx,0x60; in al,dx; hlt
IN = "ba6000 ec f4"


def test_io_out_has_port_data_and_value(guest):
    exit = guest(OUT).run()
    assert exit == IoOut(port=0x3F8, data=b"A", size=1, count=1)
    assert exit.value == 0x41
    match exit:
        case IoOut(0x3F8, b"A"):
            pass
        case _:
            pytest.fail(f"{exit} does not match by position")


@pytest.mark.parametrize(
    ("code", "size", "answer", "rax"),
    [
        ("ba6000 ec f4", 1, 0xA5, 0xA5),  # in al,dx
        ("ba6000 ed f4", 2, 0xA5C3, 0xA5C3),  # in ax,dx
        ("ba6000 66ed f4", 4, 0x1234_5678, 0x1234_5678),  # in eax,dx
        ("ba6000 ed f4", 2, b"\x01\x02", 0x0201),
    ],
)
def test_io_in_is_answered(guest, code, size, answer, rax):
    g = guest(code)
    exit = g.run()
    assert exit == IoIn(port=0x60, size=size, count=1)
    exit.answer(answer)
    assert g.run() == Hlt()
    assert g.vcpu.regs.rax == rax


def test_io_in_without_an_answer_reads_all_ones(guest):
    g = guest(IN)
    assert isinstance(g.run(), IoIn)
    g.run()
    assert g.vcpu.regs.rax & 0xFF == 0xFF


def test_string_output_comes_item_by_item_or_at_once(guest):
    # mov si,0x1800; mov dx,0x3f8; mov cx,2; rep outsw; hlt
    g = guest("be0018 baf803 b90200 f36f f4")
    g.memory[0x1800:0x1804] = b"abcd"
    data = b""
    while not isinstance(exit := g.run(), Hlt):
        assert isinstance(exit, IoOut)
        assert (exit.port, exit.size, len(exit.data)) == (0x3F8, 2, 2 * exit.count)
        data += exit.data
    assert data == b"abcd"


def test_string_input_is_answered_with_bytes(guest):
    # mov di,0x1800; mov dx,0x60; mov cx,3; rep insb; hlt
    g = guest("bf0018 ba6000 b90300 f36c f4")
    source = iter(b"xyz")
    while not isinstance(exit := g.run(), Hlt):
        assert isinstance(exit, IoIn)
        exit.answer(bytes(next(source) for _ in range(exit.count)))
    assert g.memory[0x1800:0x1803] == b"xyz"


def test_answer_checks_type_and_size(guest):
    exit = guest(IN).run()
    with pytest.raises(ValueError, match="does not fit in 1 bytes"):
        exit.answer(0x100)
    with pytest.raises(ValueError, match="does not fit"):
        exit.answer(-1)
    with pytest.raises(ValueError, match="1 bytes are needed, not 2"):
        exit.answer(b"ab")
    with pytest.raises(TypeError):
        exit.answer("a")


def test_answer_of_an_old_exit_is_refused(guest):
    g = guest(IN)
    old = g.run()
    assert old.current
    g.run()
    assert not old.current
    with pytest.raises(StateError, match="no longer the current exit"):
        old.answer(1)


def test_answer_after_close_is_refused(guest):
    g = guest(IN)
    exit = g.run()
    g.vm.close()
    assert not exit.current
    with pytest.raises(StateError):
        exit.answer(1)


def test_mmio_read_is_answered(guest):
    # mov eax,[0x10000]; hlt
    g = guest("67 66 a1 00000100 f4")
    exit = g.run()
    assert exit == MmioRead(addr=0x1_0000, size=4)
    exit.answer(0x1234_5678)
    g.run()
    assert g.vcpu.regs.rax == 0x1234_5678


def test_mmio_read_without_an_answer_gives_all_ones(guest):
    g = guest("67 66 a1 00000100 f4")
    g.run()
    g.run()
    assert g.vcpu.regs.rax == 0xFFFF_FFFF


def test_mmio_write_has_its_data(guest):
    # mov dword [0x10000],0x12345678; hlt
    exit = guest("67 66 c705 00000100 78563412 f4").run()
    assert exit == MmioWrite(addr=0x1_0000, data=bytes.fromhex("78563412"))
    assert (exit.size, exit.value) == (4, 0x1234_5678)


def test_hlt(guest):
    assert guest("f4").run() == Hlt()


def test_shutdown_is_a_triple_fault(guest):
    g = guest("0f0b")  # ud2
    g.protect()
    assert g.run() == Shutdown()


def test_single_step_gives_debug_after_each_instruction(guest):
    g = guest("b80100 bb0200 f4")  # mov ax,1; mov bx,2; hlt
    g.vcpu.set_guest_debug(c.KVM_GUESTDBG_ENABLE | c.KVM_GUESTDBG_SINGLESTEP)
    first = g.run()
    assert isinstance(first, Debug)
    assert (first.exception, first.pc) == (1, 0x1003)
    assert first.dr6 & 1 << 14  # BS
    assert g.run().pc == 0x1006


def test_hardware_breakpoint_gives_debug_at_its_address(guest):
    g = guest("b80100 bb0200 f4")
    control = c.KVM_GUESTDBG_ENABLE | c.KVM_GUESTDBG_USE_HW_BP
    g.vcpu.set_guest_debug(control, [0x1003, 0, 0, 0, 0, 0, 0, 0x402])
    exit = g.run()
    assert isinstance(exit, Debug)
    assert (exit.exception, exit.pc) == (1, 0x1003)
    assert g.vcpu.regs.rax & 0xFFFF == 1


def test_code_without_memory_is_an_internal_error_with_the_reason(guest):
    exit = guest("ea00000020").run()  # jmp 0x2000:0, where no memory is
    assert isinstance(exit, InternalError)
    assert exit.suberror == c.KVM_INTERNAL_ERROR_EMULATION
    assert exit.suberror_name == "emulation failure"
    assert "emulation failure" in repr(exit)


@pytest.fixture
def msr_exits(vm):
    vm.enable_cap("X86_USER_SPACE_MSR", c.KVM_MSR_EXIT_REASON_UNKNOWN | c.KVM_MSR_EXIT_REASON_FILTER)
    return vm


# mov ecx,0x12345678; rdmsr; hlt
RDMSR = "66b978563412 0f32 f4"
# mov ecx,0x12345678; mov eax,1; mov edx,2; wrmsr; hlt
WRMSR = "66b978563412 66b801000000 66ba02000000 0f30 f4"


def test_rdmsr_is_answered(msr_exits, guest):
    g = guest(RDMSR)
    exit = g.run()
    assert exit == RdMsr(index=0x1234_5678, why=c.KVM_MSR_EXIT_REASON_UNKNOWN)
    exit.answer(0x1111_2222_3333_4444)
    assert g.run() == Hlt()
    assert (g.vcpu.regs.rax, g.vcpu.regs.rdx) == (0x3333_4444, 0x1111_2222)


def test_wrmsr_is_accepted(msr_exits, guest):
    g = guest(WRMSR)
    exit = g.run()
    assert exit == WrMsr(index=0x1234_5678, data=0x2_0000_0001, why=c.KVM_MSR_EXIT_REASON_UNKNOWN)
    exit.answer()
    assert g.run() == Hlt()


@pytest.mark.parametrize("code", [RDMSR, WRMSR])
@pytest.mark.parametrize("said", [True, False])
def test_failed_msr_access_raises_gp(msr_exits, guest, code, said):
    g = guest(code)
    g.memory[13 * 4 : 13 * 4 + 4] = bytes.fromhex("0018 0000")  # #GP goes to 0:0x1800
    g.memory[0x1800] = 0xF4
    exit = g.run()
    if said:
        exit.fail()
    assert g.run() == Hlt()
    assert g.vcpu.regs.rip == 0x1801


def test_filtered_msr_exits(msr_exits, guest):
    # mov ecx,0x174 (IA32_SYSENTER_CS); rdmsr; hlt
    g = guest("66b974010000 0f32 f4")
    msr_exits.set_msr_filter([(c.KVM_MSR_FILTER_READ, 0x174, bytes(1))])
    assert g.run() == RdMsr(index=0x174, why=c.KVM_MSR_EXIT_REASON_FILTER)


def test_interrupt_window(guest):
    # sti; nop; nop; jmp $
    g = guest("fb 90 90 ebfe")
    g.memory[0x20 * 4 : 0x20 * 4 + 4] = bytes.fromhex("0018 0000")
    g.memory[0x1800] = 0xF4
    g.vcpu.request_interrupt_window = True
    assert g.run() == IrqWindowOpen()
    assert g.vcpu.ready_for_interrupt_injection
    assert g.vcpu.if_flag
    g.vcpu.request_interrupt_window = False
    g.vcpu.interrupt(0x20)
    assert g.run() == Hlt()
    assert g.vcpu.regs.rip == 0x1801


def test_hypercall_is_answered(backend, vm, guest):
    KVM_HC_MAP_GPA_RANGE = 12  # noqa: N806  (linux/kvm_para.h: the one that user space may take)
    if not vm.check_extension("EXIT_HYPERCALL"):
        pytest.skip("no KVM_CAP_EXIT_HYPERCALL")
    vm.enable_cap("EXIT_HYPERCALL", 1 << KVM_HC_MAP_GPA_RANGE)
    # mov eax,12; mov ebx,0x1000; mov ecx,1; xor edx,edx; xor esi,esi; vmcall; hlt
    g = guest("66b80c000000 66bb00100000 66b901000000 6631d2 6631f6 0f01c1 f4")
    try:
        exit = g.run(hang=2)
    except Hung:
        if backend == "kvm":
            pytest.skip("this KVM emulates ring 0 and its emulator does not get past VMCALL (kvm_pvm)")
        raise
    assert isinstance(exit, Hypercall)
    assert (exit.nr, exit.args[:2], exit.longmode) == (KVM_HC_MAP_GPA_RANGE, (0x1000, 1), False)
    exit.answer(0)
    assert g.run() == Hlt()
    assert g.vcpu.regs.rax == 0


def test_tpr_access_is_reported(chips, guest):
    g = guest("6667a18000e0fe ebfe")  # mov eax,[dword 0xfee00080]; jmp $
    if not chips.check_extension("VAPIC"):
        pytest.skip("no KVM_CAP_VAPIC")
    g.vcpu.tpr_access_reporting(True)
    assert g.run() == TprAccess(rip=0x1000, is_write=False)


def test_ioapic_eoi_of_a_user_space_ioapic(vm, guest):
    vm.enable_cap("SPLIT_IRQCHIP", 24)
    # sti; jmp $; at 0x1010: mov dword [0xfee000b0],0 (EOI); jmp $
    g = guest("fb ebfe" + "90" * 13 + "6667c705b000e0fe00000000 ebfe")
    g.memory[0x30 * 4 : 0x30 * 4 + 4] = bytes.fromhex("1010 0000")
    # Level triggered (bit 15) vector 0x30: KVM tells the end of it to whoever plays the IOAPIC.
    vm.set_gsi_routing([route_msi(5, 0xFEE0_0000, 0x8030)])
    lapic = g.vcpu.lapic
    registers = bytearray(lapic.regs)
    registers[0xF0:0xF2] = (0x1FF).to_bytes(2, "little")  # spurious vector register: software enable
    lapic.regs = registers
    g.vcpu.lapic = lapic
    assert vm.signal_msi(0xFEE0_0000, 0x8030)
    assert g.run() == IoapicEoi(vector=0x30)


def test_full_dirty_ring_exits(vm, guest):
    if not vm.check_extension("DIRTY_LOG_RING_ACQ_REL"):
        pytest.skip("no KVM_CAP_DIRTY_LOG_RING")
    vm.enable_dirty_ring(1024)
    # mov edi,0x100000; x: mov [rdi],al; add edi,0x1000; cmp edi,0x600000; jb x; mov [0x7000000],al
    g = guest("bf00001000 8807 81c700100000 81ff00006000 72f0 88042500000007", size=0x60_0000)
    g.enter_ring3()  # where ring 0 is emulated, KVM may dirty more pages at a time than the ring holds
    vm.set_user_memory_region(0, 0, 0x60_0000, _kvm.address_of(g.memory), c.KVM_MEM_LOG_DIRTY_PAGES)
    pages = []
    while (exit := g.run()) == DirtyRingFull():
        pages += g.vcpu.collect_dirty()
        assert vm.reset_dirty_rings() > 0
    assert isinstance(exit, MmioWrite)
    pages += g.vcpu.collect_dirty()
    assert {(0, page) for page in range(0x100, 0x600)} <= set(pages)


def test_guest_memory_that_is_gone_is_a_memory_fault(vm, guest):
    flags = c.GUEST_MEMFD_FLAG_MMAP | c.GUEST_MEMFD_FLAG_INIT_SHARED
    if vm.check_extension("GUEST_MEMFD_FLAGS") & flags != flags:
        pytest.skip("no KVM_CAP_GUEST_MEMFD_FLAGS")
    # mov al,[0x20000]; hlt  (64-bit, in ring 3: ring 0 may be emulated, which does not fault)
    g = guest("8a042500000200 f4")
    g.enter_ring3()
    with mmap.mmap(-1, 0x1000) as shared:
        memfd = vm.create_guest_memfd(0x1000, flags)
        address = _kvm.address_of(shared)
        vm.set_user_memory_region2(1, 0x2_0000, 0x1000, address, c.KVM_MEM_GUEST_MEMFD, memfd)
        os.close(memfd)  # and with it the memory
        exit = g.run()
    assert exit == MemoryFault(gpa=0x2_0000, size=0x1000, fault_flags=0)
    assert not exit.private


def test_history_keeps_the_last_16_exits(guest):
    # mov dx,0x80; x: out dx,al; inc al; jmp x
    g = guest("ba8000 ee fec0 ebfb")
    for _ in range(20):
        g.run()
    history = g.vcpu.history
    assert [exit.data for exit in history] == [bytes([n]) for n in range(4, 20)]
    assert g.vcpu.exit_count == 20
    assert all(isinstance(exit, Exit) for exit in history)


def test_exits_of_the_history_cannot_be_answered(guest):
    g = guest(IN)
    g.run()
    (exit,) = g.vcpu.history
    assert exit == IoIn(port=0x60, size=1, count=1)
    with pytest.raises(StateError, match="history"):
        exit.answer(1)
