# SPDX-License-Identifier: Apache-2.0
"""Where KVM emulates ring 0 the software CPU leads: guests end as without KVM, but the chips are the kernel's."""

import threading

import pytest

from kvmpy import Interrupted, IoOut, Outcome, Vm
from kvmpy.boot.cpuid import CpuidPolicy
from kvmpy.errors import GuestShutdown
from kvmpy.memory import DirtyLog
from kvmpy.vcpu.parking import ParkingLot
from tests.conftest import why_not

CODE, DATA, STACK, SIZE = 0x1_0000, 0x3_0000, 0x2_0000, 0x20_0000
USER, ENTRY, HANDLER = CODE + 0x100, CODE + 0x200, CODE + 0x300
GDT, IDT, TSS = DATA + 0x800, DATA + 0x1000, DATA + 0x4000
KERNEL_CODE, KERNEL_DATA, USER_CODE = 0x10, 0x18, 0x30  # and user data at 0x28, as SYSRET wants it
DESCRIPTORS = (0, 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0, 0x00CFF3000000FFFF, 0x00AFFB000000FFFF)
STAR, LSTAR, FMASK, KERNEL_GS_BASE = 0xC000_0081, 0xC000_0082, 0xC000_0084, 0xC000_0102
IF, IRQ, PIC_BASE = 1 << 9, 4, 0x20
DONE = "b02a e6f4"  # mov al,42  out 0xf4,al


@pytest.fixture
def guest():
    """guest(code, ...) gives a VM with chips in which the software CPU leads; `engine` "tcg" the same without KVM."""
    vms = []

    def make(code, *more, engine="kvm", idt=(), **registers):
        if reason := why_not("kvm"):
            pytest.skip(f"kvm: {reason}")
        vm = Vm(engine, lead=True)
        vms.append(vm)
        if engine == "kvm" and not vm.assist.leads:
            pytest.skip("this KVM does not emulate ring 0")
        vm.create_irqchip()
        vm.create_pit2()
        vm.add_ram(0, SIZE)
        for at, text in ((CODE, code), *more):
            vm.memory.write(at, bytes.fromhex(text))
        vm.memory.write(GDT, b"".join(d.to_bytes(8, "little") for d in DESCRIPTORS))
        vm.memory.write(TSS + 4, (STACK - 0x1000).to_bytes(8, "little"))
        for vector, at in idt:
            gate = at & 0xFFFF | KERNEL_CODE << 16 | 0xEE00 << 32 | (at >> 16) << 48
            vm.memory.write(IDT + 16 * vector, gate.to_bytes(16, "little"))
        vcpu = vm.create_vcpu()
        vcpu.cpuid = CpuidPolicy(vm.assist.supported_cpuid()).kvm_entries(0)
        vcpu.enter_long_mode(CODE, sp=STACK)
        sregs = vcpu.sregs
        sregs.gdt.base, sregs.gdt.limit = GDT, len(DESCRIPTORS) * 8 - 1
        sregs.idt.base, sregs.idt.limit = IDT, 0xFFF
        sregs.tr.base, sregs.tr.limit, sregs.tr.selector = TSS, 0x67, 0x40
        sregs.cs.selector, sregs.ss.selector = KERNEL_CODE, KERNEL_DATA
        sregs.efer |= 1
        sregs.cr4 |= 1 << 9
        vcpu.sregs = sregs
        regs = vcpu.regs
        for name, value in registers.items():
            setattr(regs, name, value)
        vcpu.regs = regs
        vcpu.set_msrs({STAR: 0x20 << 48 | KERNEL_CODE << 32, LSTAR: ENTRY, FMASK: 0x4_7700, KERNEL_GS_BASE: 0x123_4000})
        vm.on_io_out(0xF4)(lambda exit: Outcome("done", exit.value))
        return vm

    yield make
    for vm in vms:
        vm.close()


def finish(vm):
    assert vm.run(timeout=60) == Outcome("done", 42)
    vcpu = vm.vcpus[0]
    regs = vcpu.regs
    regs.rip = ENTRY  # behind the OUT or at it: as the engine likes
    return regs, vcpu.sregs.cs, vcpu.sregs.ss, vm.memory.read(DATA, 0x400)


def alike(guest, *code, **options):
    """Ends with the same registers and memory on the software CPU with and without the kernel's machine."""
    ends = [finish(guest(*code, engine=engine, **options)) for engine in ("kvm", "tcg")]
    assert ends[0] == ends[1]
    return ends[0][0]


def unmask(vm):
    """IRQ 4 is an edge of the PIC, at vector 0x24."""
    chip = vm.get_irqchip(0)
    chip.pic.imr, chip.pic.irq_base = 0xFF & ~(1 << IRQ), PIC_BASE
    vm.set_irqchip(chip)


def edge(vm):
    vm.irq_line(IRQ, 0)
    vm.irq_line(IRQ, 1)


# mov ecx,USER  mov r11d,2  swapgs  sysretq  /  push 0x2b  push STACK  push 2  push 0x33  push USER  iretq
LEAVES = {"sysret": "b900010100 41bb02000000 0f01f8 480f07", "iret": "6a2b 6800000200 6a02 6a33 6800010100 48cf"}
COME = "0f01f8 83ff32"  # swapgs  cmp edi,50
IN_CHIP = "e440"  # in al,0x40: the PIT's counter, one step of the kernel's vCPU


@pytest.mark.parametrize("stretch", [1, 2, 3, 4, 5, 7, 11, 400_000])
@pytest.mark.parametrize("step", ["kernel", "entry", "nowhere"])
@pytest.mark.parametrize("way", LEAVES)
def test_ring_3_comes_back_by_syscall(guest, way, step, stretch):
    """Handed over to KVM and back at every place; kvm_pvm itself goes on at LSTAR in ring 3."""
    kernel = (IN_CHIP if step == "kernel" else "") + LEAVES[way]
    swap = COME if way == "sysret" else COME.removeprefix("0f01f8")
    entry = (IN_CHIP if step == "entry" else "") + swap
    at = ENTRY + len(bytes.fromhex(entry)) + 6
    entry += "0f82" + ((CODE - at) & 0xFFFF_FFFF).to_bytes(4, "little").hex() + DONE
    vm = guest(kernel, (USER, "ffc7 eb00 0f05"), (ENTRY, entry))  # inc edi  jmp +0  syscall
    vm.assist.stretch = stretch
    regs, cs, ss, _ = finish(vm)
    assert (regs.rdi, cs.selector, cs.dpl, ss.dpl) == (50, KERNEL_CODE, 0, 0)
    assert vm.assist.steps["IoIn"] == (0 if step == "nowhere" else 50)


def test_exceptions_of_ring_3_arrive(guest):
    # int 0x80  ud2  mov rax,[0x100000000], which is not mapped; the handlers count in rsi and go on behind it
    user = "cd80 0f0b 48a10000000001000000 0f05"
    past_ud2, past_load = "48ffc6 4883042402 48cf", "48ffc6 4883c408 488304240a 48cf"  # the latter: an error code too
    regs = alike(
        guest, LEAVES["iret"], (USER, user), (ENTRY, DONE),
        (HANDLER, past_ud2), (HANDLER + 0x40, past_load), (HANDLER + 0x80, "48ffc6 48cf"),
        idt=((6, HANDLER), (14, HANDLER + 0x40), (0x80, HANDLER + 0x80)),
    )  # fmt: skip
    assert regs.rsi == 3


def test_the_guest_sees_the_cpuid_it_was_given(guest):
    # mov eax,7  xor ecx,ecx  cpuid, in ring 0: no AVX-512, whatever the host has
    regs = finish(guest("b807000000 31c9 0fa2 4189d8" + DONE))[0]  # mov r8d,ebx
    assert not regs.r8 >> 16 & 1
    vm = guest("b801000000 0fa2 4189c8" + DONE)  # mov r8d,ecx
    assert finish(vm)[0].r8 >> 31 & 1  # a hypervisor
    assert "RdMsr" not in vm.assist.steps


@pytest.mark.parametrize("ring", [0, 3])
def test_an_interrupt_of_the_chips_ends_an_endless_loop(guest, ring):
    loop = "fb ebfe" if ring == 0 else LEAVES["iret"].replace("6a02", "6802020000")
    vm = guest(loop, (USER, "ebfe"), (HANDLER, "bb07000000" + DONE), idt=((PIC_BASE + IRQ, HANDLER),))
    unmask(vm)
    timer = threading.Timer(0.05, edge, (vm,))
    timer.start()
    regs, cs, *_ = finish(vm)
    timer.join()
    assert (regs.rbx, cs.dpl) == (7, 0)
    frame = vm.memory.read((STACK if ring == 0 else STACK - 0x1000) - 40, 40)
    assert int.from_bytes(frame[8:16], "little") == (KERNEL_CODE, 0, 0, USER_CODE | 3)[ring]
    assert int.from_bytes(frame[16:24], "little") & IF


def test_an_interrupt_waits_until_the_guest_takes_it(guest):
    # cli: count 20 million; sti; nop: the interrupt comes then and not before
    code = "fa b9002d3101 ffc9 75fc 89c8 fb 90 ebfe"
    vm = guest(code, (HANDLER, "89cb" + DONE), idt=((PIC_BASE + IRQ, HANDLER),))
    unmask(vm)
    edge(vm)
    regs = finish(vm)[0]
    assert regs.rbx == 0


def test_hlt_sleeps_until_an_interrupt(guest):
    vm = guest("fb f4 ffc7" + DONE, (HANDLER, "bb07000000 48cf"), idt=((PIC_BASE + IRQ, HANDLER),))
    unmask(vm)
    timer = threading.Timer(0.05, edge, (vm,))
    timer.start()
    regs = finish(vm)[0]
    timer.join()
    assert (regs.rbx, regs.rdi) == (7, 1)


def test_an_interrupt_is_not_replaced_by_the_next(guest, monkeypatch):
    # sti; again: cmp ebx,1  jne again  cmp edi,1  jne again; IRQ 4 counts in rbx, IRQ 3 in rdi
    vm = guest(
        "fb 83fb01 75fb 83ff01 75f6" + DONE, (HANDLER, "ffc3 48cf"), (HANDLER + 0x40, "ffc7 48cf"),
        idt=((PIC_BASE + IRQ, HANDLER), (PIC_BASE + 3, HANDLER + 0x40)),
    )  # fmt: skip
    unmask(vm)
    chip = vm.get_irqchip(0)
    chip.pic.imr &= ~(1 << 3)
    vm.set_irqchip(chip)
    seen = []

    def vector(lot, registers):
        found = real(lot, registers)
        if found is not None and not seen:  # the software CPU is stopped before it takes it, and a higher one comes
            vm.assist.lead(vm.vcpus[0], vm.handlers, vm.memory)._cpu.immediate_exit = True
            vm.irq_line(3, 1)
        seen.extend([] if found is None else [found])
        return found

    real = ParkingLot.vector
    monkeypatch.setattr(ParkingLot, "vector", vector)
    edge(vm)
    finish(vm)
    assert seen == [PIC_BASE + IRQ, PIC_BASE + 3]


def test_an_nmi_arrives_once(guest):
    # count NMIs; the second comes only after the IRET of the first
    vm = guest("ebfe", (HANDLER, "ffc3 83fb02 7402 48cf" + DONE), idt=((2, HANDLER),))
    vm.start()
    vm.pause()
    for _ in range(2):
        vm.vcpus[0].nmi()
    vm.resume()
    assert vm.wait(30) == Outcome("done", 42)
    vm.join()
    assert vm.vcpus[0].regs.rbx == 2


def test_a_paused_vcpu_has_its_whole_state(guest):
    # again: inc rdi  movq xmm0,rdi  cmp rbx,7  jne again
    vm = guest("48ffc7 66480f6ec7 4883fb07 75f2" + DONE)
    vm.start()
    for _ in range(5):
        vm.pause()
        vcpu = vm.vcpus[0]
        regs = vcpu.regs
        assert CODE <= regs.rip < CODE + 16
        seen = int.from_bytes(bytes(vcpu.xsave)[160:168], "little")
        assert regs.rdi - seen in (0, 1)
        vm.resume()
    vm.pause()
    regs = vm.vcpus[0].regs
    regs.rbx = 7
    vm.vcpus[0].regs = regs
    vm.resume()
    assert vm.wait(30) == Outcome("done", 42)


def test_a_pause_forgets_no_code(guest):
    vm = guest("ffc7 83fb07 75f9" + DONE)  # again: inc edi  cmp ebx,7  jne again
    vm.start()
    vm.pause()
    vcpu = vm.vcpus[0]
    vm.resume()
    vm.pause()
    decoded = vcpu.leader.stats().read()["blocks"]
    for _ in range(20):
        vm.resume()
        vm.pause()
    assert vcpu.leader.stats().read()["blocks"] <= decoded + 2  # where it is paused, a block may begin
    regs = vcpu.regs
    regs.rbx = 7
    vcpu.regs = regs
    vm.resume()
    assert vm.wait(30) == Outcome("done", 42)


def test_a_pause_in_hlt_goes_on_sleeping(guest):
    vm = guest("fb f4 ffc7" + DONE, (HANDLER, "bb07000000 48cf"), idt=((PIC_BASE + IRQ, HANDLER),))
    unmask(vm)
    vm.start()
    for _ in range(3):
        vm.pause()
        assert vm.vcpus[0].regs.rdi == 0
        vm.resume()
    edge(vm)
    assert vm.wait(30) == Outcome("done", 42)
    vm.join()
    assert vm.vcpus[0].regs.rbx == 7


def test_a_handler_sees_and_changes_registers(guest):
    vm = guest("bf05000000 b001 e680 ffc7" + DONE)  # mov edi,5  mov al,1  out 0x80,al  inc edi
    seen = []

    def handler(exit):
        vcpu = vm.vcpus[0]
        regs = vcpu.regs
        seen.append(regs.rdi)
        regs.rdi = 100
        vcpu.regs = regs

    vm.on_io_out(0x80)(handler)
    assert finish(vm)[0].rdi == 101
    assert seen == [5]


def test_a_device_on_the_bus_needs_no_step_of_kvm(guest):
    vm = guest("b90a000000 b041 e680 e480 ffc9 75f8" + DONE)  # ten times: out 0x80,al  in al,0x80
    written = []
    vm.pio.claim(0x80, 1, "box", read=lambda *_: 0x41, write=lambda offset, size, value: written.append(value))
    finish(vm)
    assert written == [0x41] * 10
    assert not {"IoIn"} & set(vm.assist.steps)


def test_msr_handlers_are_asked(guest):
    vm = guest("b9000000c2 0f32 0f30" + DONE)  # mov ecx,0xc2000000  rdmsr  wrmsr
    seen = []
    vm.on_msr_read(0xC200_0000)(lambda exit: 0x1234)
    vm.on_msr_write(0xC200_0000)(lambda exit: seen.append(exit.data))
    finish(vm)
    assert seen == [0x1234]


def test_an_msr_that_is_not_there_faults_with_the_right_flags(guest):
    """The frame of a fault that KVM raises in its step is the guest's own, IF and all."""
    # sti  mov ecx,0xc3000000  rdmsr
    vm = guest("fb b9000000c3 0f32", (HANDLER, "488b5c2418" + DONE), idt=((13, HANDLER),))  # mov rbx,[rsp+24]: RFLAGS
    assert finish(vm)[0].rbx & IF


def test_a_guest_that_steps_itself_steps_over_the_chips_too(guest):
    # pushfq  or dword [rsp],0x100  popfq  in al,0x40  nop  nop  DONE; #DB counts in rbx
    code = "9c 810c2400010000 9d" + IN_CHIP + "90 90 9c 812424fffeffff 9d" + DONE
    ends = []
    for engine in ("kvm", "tcg"):
        vm = guest(code, (HANDLER, "ffc3 48cf"), idt=((1, HANDLER),), engine=engine)
        ends.append(finish(vm)[0].rbx)
    assert ends[0] == ends[1]
    assert ends[0] >= 4


def test_the_tsc_is_that_of_the_kernels_kvm(guest):
    # rdtsc -> r8; rdmsr IA32_TSC (KVM's) -> r9; rdtsc -> r10
    whole = "48c1e220 4809d0"
    code = f"0f31 {whole} 4989c0 b910000000 0f32 {whole} 4989c1 0f31 {whole} 4989c2" + DONE
    regs = finish(guest(code))[0]
    assert regs.r8 < regs.r9 < regs.r10


def test_code_that_the_host_writes_is_run(guest):
    # again: call USER  jmp again; USER: ret, later DONE
    vm = guest("e8fb000000 ebf9", (USER, "c3"))
    vm.start()
    vm.pause()
    vm.memory.write(USER, bytes.fromhex(DONE))
    vm.resume()
    assert vm.wait(30) == Outcome("done", 42)


def test_written_pages_are_in_the_dirty_log(guest):
    vm = guest("c6042500000400 07" + DONE)  # mov byte [0x40000],7
    vm.memory.start_dirty_log(DirtyLog(vm))
    finish(vm)
    assert 0x4_0000 in vm.memory.collect_dirty()


def test_a_triple_fault_is_reported_with_its_state(guest):
    vm = guest("bf07000000 0f0b")  # mov edi,7  ud2, and no gate
    with pytest.raises(GuestShutdown) as caught:
        vm.run(timeout=60)
    assert "ud2" in caught.value.report
    assert vm.vcpus[0].regs.rdi == 7


def test_it_leads_only_where_it_was_asked_to(guest):
    guest(DONE)
    with Vm("kvm") as vm, Vm("kvm", assist=False, lead=True) as off, Vm("tcg", lead=True) as software:
        assert not vm.assist.leads
        assert not off.assist.leads
        assert not software.assist.leads
        assert vm.assist.supported_cpuid() == vm.kvm.get_supported_cpuid()


def test_a_vcpu_run_by_hand_is_kvms_own_again(guest):
    vm = guest("b90a000000 e680 ffc9 75fa" + DONE)  # ten times: out 0x80,al
    vm.on_io_out(0x80)(lambda exit: Outcome("once"))
    assert vm.run(timeout=60) == Outcome("once")
    exits = [vm.vcpus[0].run() for _ in range(2)]
    assert exits == [IoOut(0x80, b"\0")] * 2
    vm.vcpus[0].kick()
    assert vm.vcpus[0].run() == Interrupted()


def test_code_that_kvm_wrote_when_run_by_hand_is_run(guest):
    # again: call USER  out 0x80,al  jmp again; writer: mov byte [USER],0x90  out 0x81,al  jmp again
    writer = "c604250001010090 e681 e979ffffff"
    vm = guest("e8fb000000 e680 ebf7", (CODE + 0x78, writer), (USER, "c3" + DONE))
    vm.on_io_out(0x80)(lambda exit: Outcome("once"))
    assert vm.run(timeout=30) == Outcome("once")
    vcpu = vm.vcpus[0]
    regs = vcpu.regs
    regs.rip = CODE + 0x78
    vcpu.regs = regs
    assert vcpu.run() == IoOut(0x81, b"\0")  # there is a NOP now where the software CPU knows a RET
    assert vm.run(timeout=30) == Outcome("done", 42)


def test_only_features_with_state_need_kvms_consent(guest):
    """KVM's table may have BMI2 and lack LZCNT: a guest that finds the one uses the other."""
    vm = guest(DONE)
    with Vm("tcg") as software:
        own = CpuidPolicy(software.kvm.get_supported_cpuid()).features
    given = CpuidPolicy(vm.assist.supported_cpuid()).features
    assert {"abm", "bmi1", "bmi2", "avx2", "popcnt"} & own <= given
    assert not {"avx512f", "amx_tile", "kvm_pv_eoi", "kvm_pv_tlb_flush"} & given
