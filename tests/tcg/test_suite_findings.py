# SPDX-License-Identifier: Apache-2.0
"""What test suites of other projects found wrong here (docs/conformance.md), each as a guest of a few instructions."""

from __future__ import annotations

import pytest

import kvmpy
from kvmpy import Hlt, Regs

CODE, HANDLER, STACK, COUNT = 0x1000, 0x2000, 0x8000, 0x3000


def real_mode(vm, code, handlers):
    """A processor at `code` (hex) in 16-bit mode, with `handlers`: vector -> code (hex)."""
    vm.add_ram(0, size=0x10000)
    vm.memory.write(CODE, bytes.fromhex(code))
    for vector, handler in handlers.items():
        vm.memory.write(HANDLER + 0x100 * vector, bytes.fromhex(handler))
        vm.memory.put_u32(4 * vector, HANDLER + 0x100 * vector)
    vcpu = vm.create_vcpu()
    vcpu.enter_real_mode(CODE)
    vcpu.regs = Regs(rip=CODE, rsp=STACK, rflags=2)
    return vcpu


@pytest.fixture
def tcg():
    """A VM on the software CPU: what is tested here, the processor under a KVM may do in another way."""
    pytest.importorskip("kvmpy.tcg._tcg")
    with kvmpy.Vm("tcg") as vm:
        yield vm


@pytest.mark.parametrize(("sent", "taken"), [(1, 1), (2, 2), (3, 2)])
def test_two_nmis_can_wait(tcg, sent, taken):
    """kvm-unit-tests apic, "multiple nmi": on a processor the first would be running when the second comes."""
    vcpu = real_mode(tcg, "90 90 f4", {2: "ff060030 cf"})  # nop nop hlt;  inc word [0x3000]  iret
    for _ in range(sent):
        vcpu.nmi()
    assert isinstance(vcpu.run(), Hlt)
    assert tcg.memory.u16(COUNT) == taken


def test_waiting_nmis_are_part_of_the_state(tcg):
    vcpu = real_mode(tcg, "90 f4", {2: "ff060030 cf"})
    vcpu.nmi()
    vcpu.nmi()
    events = vcpu.vcpu_events
    assert events.nmi.pending == 2
    events.nmi.pending = 0
    events.flags = 1  # KVM_VCPUEVENT_VALID_NMI_PENDING
    vcpu.vcpu_events = events
    assert isinstance(vcpu.run(), Hlt)
    assert tcg.memory.u16(COUNT) == 0


# mov ax,WHERE   movzx eax,ax   mov dr0,eax   mov eax,DR7   mov dr7,eax
ARM = "b8{where} 0fb7c0 0f23c0 66b8{dr7} 0f23f8"
COUNT_DB = "ff060030 cf"  # inc word [0x3000]   iret


def arm(where, dr7):
    return ARM.format(where=where.to_bytes(2, "little").hex(), dr7=dr7.to_bytes(4, "little").hex())


def test_a_code_breakpoint_behind_mov_ss_is_passed_over(tcg):
    """kvm-unit-tests emulator, "#DB suppressed after MOV SS" (SDM vol. 3A, 6.8.3)."""
    head = bytes.fromhex(arm(0, 0x402))
    # mov ax,ss   mov ss,ax   1: nop   2: nop   hlt; the breakpoint is at 1, and for comparison at 2
    for behind, hits in ((4, 0), (5, 1)):
        code = arm(CODE + len(head) + behind, 0x402) + "8cd0 8ed0 90 90 f4"
        vm = kvmpy.Vm("tcg")
        with vm:
            vcpu = real_mode(vm, code, {1: "ff060030 6631c0 0f23f8 cf"})  # inc word [0x3000]  dr7 = 0  iret
            assert isinstance(vcpu.run(), Hlt)
            assert vm.memory.u16(COUNT) == hits


def test_one_db_for_icebp_and_the_data_breakpoint_of_mov_ss(tcg):
    """kvm-unit-tests debug, "MOV SS + watchpoint + ICEBP"."""
    # mov ss,[0x3100]   int1   hlt;  the handler adds up: inc word [0x3000]   mov eax,dr6   mov [0x3004],ax   iret
    code = arm(0x3100, 0x000F_0402) + "8e160031 f1 f4"
    vcpu = real_mode(tcg, code, {1: "ff060030 660f21f0 a30430 cf"})
    assert isinstance(vcpu.run(), Hlt)
    assert tcg.memory.u16(COUNT) == 1
    assert tcg.memory.u16(COUNT + 4) & 0xF == 1


def test_an_int_long_ago_hides_no_single_step(vm):
    """Linux selftests unwind_vdso: after INT in a handler, the next instruction under TF was not trapped."""
    # int 0x20   pushf   pop ax   or ah,1   push ax   popf   nop   nop   nop   and ah,~1   push ax   popf   hlt
    code = "cd20 9c 58 80cc01 50 9d 90 90 90 80e4fe 50 9d f4"
    vcpu = real_mode(vm, code, {0x20: "cf", 1: COUNT_DB})
    assert isinstance(vcpu.run(), Hlt)
    assert vm.memory.u16(COUNT) == 6  # three NOPs, AND, PUSH, POPF


def test_the_apic_id_comes_back_when_the_apic_is_enabled_again(vm):
    """kvm-unit-tests apic, "correct xapic id after reset"."""
    # 32-bit: mov dword [0xfee00020],0x05000000   mov ecx,0x1b   rdmsr   and ah,~8   wrmsr   or ah,8   wrmsr
    # mov eax,[0xfee00020]   out 0x10,eax
    code = "c7052000e0fe00000005 b91b000000 0f32 80e4f7 0f30 80cc08 0f30 a12000e0fe e710"
    vm.create_irqchip()
    vm.add_ram(0, size=0x10000)
    vm.memory.write(CODE, bytes.fromhex(code))
    vcpu = vm.create_vcpu()
    vcpu.enter_protected_mode(CODE, sp=STACK)
    exit = vcpu.run()
    assert isinstance(exit, kvmpy.IoOut), exit
    assert int.from_bytes(exit.data, "little") == 0


def test_a_return_to_ring_3_clears_the_rpl_of_null_selectors(tcg):
    """Linux selftests sigreturn: DS, ES, FS and GS of 1 to 3 are 0 after IRET to an outer level (SDM vol. 2)."""
    # 32-bit: lgdt [0x3000]   mov ax,3   mov ds,ax   mov fs,ax
    # push 0x23   push 0x8000   push 0x3002 (IOPL 3)   push 0x1b   push 0x2000   iret
    code = "0f011500300000 66b80300 8ed8 8ee0 6a23 6800800000 6802300000 6a1b 6800200000 cf"
    user = "8cd8 c1e010 668ce0 e710"  # mov eax,ds   shl eax,16   mov ax,fs   out 0x10,eax
    gdt = (0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF, 0x00CFFB000000FFFF, 0x00CFF3000000FFFF)
    tcg.add_ram(0, size=0x10000)
    tcg.memory.write(CODE, bytes.fromhex(code))
    tcg.memory.write(HANDLER, bytes.fromhex(user))
    tcg.memory.write(0x3000, (8 * len(gdt) - 1).to_bytes(2, "little") + (0x3010).to_bytes(4, "little"))
    tcg.memory.write(0x3010, b"".join(entry.to_bytes(8, "little") for entry in gdt))
    vcpu = tcg.create_vcpu()
    vcpu.enter_protected_mode(CODE, sp=STACK)
    exit = vcpu.run()
    assert isinstance(exit, kvmpy.IoOut), exit
    assert exit.data == bytes(4)
