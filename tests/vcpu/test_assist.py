# SPDX-License-Identifier: Apache-2.0
"""The emulation assist: guests with instructions that a KVM may not emulate end as they do on the software CPU."""

import contextlib

import pytest

from kvmpy import Outcome, Vm
from kvmpy.errors import EmulationFailure
from kvmpy.memory import DirtyLog, Ram
from tests.conftest import why_not

CODE, DATA, STACK, SIZE = 0x1_0000, 0x3_0000, 0x2_0000, 0x20_0000
CR4_OSFXSR, CR4_OSXSAVE = 1 << 9, 1 << 18

CMPXCHG16B = "f0 48 0f c7 0c 25 00 00 03 00"  # lock cmpxchg16b [0x30000]
STORE_NEW = "bb 11000000 b9 22000000"  # mov ebx,0x11  mov ecx,0x22
HLT = "f4"

LONG = {
    "cmpxchg16b": STORE_NEW + CMPXCHG16B + HLT,
    "shlx": "b8 03000000 b9 04000000 c4e2f1f7d8" + HLT,  # mov eax,3  mov ecx,4  shlx rbx,rax,rcx
    "fninit": "dbe3 9b dd3c25 00000300" + HLT,  # fninit  fwait  fnstsw [0x30000]
    # fninit (power-on control words differ)  mov eax,7  xor edx,edx  xor ecx,ecx  xsetbv  xsave [0x30000]
    # mov byte [0x300a0],5  xrstor64 [0x30000]  movq rbx,xmm0
    "xrstor": "dbe3 b8 07000000 31d2 31c9 0f01d1 480fae2425 00000300 c60425 a0000300 05"
    "480fae2c25 00000300 66480f7ec3" + HLT,
}


@pytest.fixture(autouse=True)
def engines():
    """Both engines: one runs the guest, the other says how it must end."""
    for backend in ("kvm", "tcg"):
        if reason := why_not(backend):
            pytest.skip(f"{backend}: {reason}")


@pytest.fixture
def guest():
    """guest(backend, code) gives a VM with the code at 0x1_0000, ready to run; closed at the end."""
    vms = []

    def make(backend, code, bits=64, **options):
        vm = Vm(backend, **options)
        vms.append(vm)
        vm.add_ram(0, SIZE)
        vm.memory.write(CODE, bytes.fromhex(code))
        vcpu = vm.create_vcpu()
        vcpu.cpuid = vm.kvm.get_supported_cpuid()
        if bits == 64:
            vcpu.enter_long_mode(CODE, sp=STACK)
        else:
            vcpu.enter_protected_mode(CODE, sp=STACK)
        sregs = vcpu.sregs
        sregs.cr4 |= CR4_OSFXSR | CR4_OSXSAVE
        vcpu.sregs = sregs
        return vm

    yield make
    for vm in vms:
        vm.close()


def state(vm):
    vcpu = vm.vcpus[0]
    return vcpu.regs, vm.memory.read(DATA, 0x400), vm.memory.read(STACK - 64, 64)


def ends_alike(guest, code, prepare=lambda vm: None, bits=64):
    """Run on both engines; returns how often the assist was called for what."""
    ends = []
    for backend in ("kvm", "tcg"):
        vm = guest(backend, code, bits)
        prepare(vm)
        assert vm.run(timeout=60) == Outcome("halted", vcpu=0)
        ends.append(state(vm))
        if backend == "kvm":
            counts = dict(vm.assist.counts)
    assert ends[0] == ends[1]
    return counts


def needed(counts, name):
    """Skip, after all else was checked, where KVM did it alone."""
    if name not in counts:
        pytest.skip(f"this KVM runs {name} by itself; assisted: {counts}")
    assert counts[name] >= 1


@pytest.mark.parametrize("name", LONG)
def test_an_instruction_that_kvm_lacks(guest, name):
    needed(ends_alike(guest, LONG[name]), name)


def test_a_breakpoint_goes_through_the_guests_idt(guest):
    def idt(vm):
        handler = CODE + 0x100
        gate = handler & 0xFFFF | 8 << 16 | 0x8E00 << 32 | (handler >> 16) << 48
        vm.memory.write(DATA + 3 * 16, gate.to_bytes(16, "little"))
        vm.memory.write(handler, bytes.fromhex("bb 78563412 48cf"))  # mov ebx,0x12345678  iretq
        descriptors = 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF
        vm.memory.write(DATA + 0x300, b"".join(d.to_bytes(8, "little") for d in descriptors))
        vcpu = vm.vcpus[0]
        sregs = vcpu.sregs
        sregs.idt.base, sregs.idt.limit = DATA, 0xFF
        sregs.gdt.base, sregs.gdt.limit = DATA + 0x300, 23
        sregs.cs.selector, sregs.ss.selector = 8, 16
        vcpu.sregs = sregs

    counts = ends_alike(guest, "cc b9 07000000" + HLT, idt)  # int3  mov ecx,7
    needed(counts, "int3")


def test_iret_in_protected_mode(guest):
    def gdt(vm):
        descriptors = 0, 0x00CF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF
        vm.memory.write(DATA, b"".join(d.to_bytes(8, "little") for d in descriptors))
        vcpu = vm.vcpus[0]
        sregs = vcpu.sregs
        sregs.gdt.base, sregs.gdt.limit = DATA, 23
        sregs.cs.selector, sregs.ss.selector = 8, 16
        vcpu.sregs = sregs

    # pushfd  push 8  push 0x10020  iretd; at 0x10020: mov ebx,5  hlt
    code = "9c 6a08 68 20000100 cf"
    code += "90" * (0x20 - len(bytes.fromhex(code))) + "bb 05000000" + HLT
    counts = ends_alike(guest, code, gdt, bits=32)
    if not counts:
        pytest.skip("this KVM runs a 32-bit iret by itself")
    assert sum(counts.values()) == 1


def test_it_hands_back_before_a_port(guest):
    vm = guest("kvm", STORE_NEW + CMPXCHG16B + "b8 5a000000 e680 b8 5b000000 e680" + HLT)
    seen = []
    vm.on_io_out(0x80)(lambda exit: seen.append(exit.value))
    assert vm.run(timeout=60) == Outcome("halted", vcpu=0)
    assert seen == [0x5A, 0x5B]  # each once


def test_a_loop_longer_than_a_stretch_is_finished(guest):
    # mov edi,100; again: cmpxchg16b  dec edi  jnz again
    vm = guest("kvm", "bf 64000000" + STORE_NEW + CMPXCHG16B + "ffcf 75f2" + HLT)
    vm.assist.stretch = 7
    assert vm.run(timeout=60) == Outcome("halted", vcpu=0)
    assert vm.vcpus[0].regs.rdi == 0
    needed(vm.assist.counts, "cmpxchg16b")
    assert vm.assist.counts["cmpxchg16b"] > 1


def test_kvm_sees_page_tables_that_the_assist_changed(guest):
    # cmpxchg16b; map 2 MiB at 0x40000000 to frame 0 by a store to its page directory; invlpg; read through it
    code = STORE_NEW + CMPXCHG16B + "48c70425 00000400 83000000 0f013c25 00000040 8b1c25 00000340" + HLT
    # mov qword [0x40000],0x83  invlpg [0x40000000]  mov ebx,[0x40030000]

    def page_directory(vm):
        pdpt = vm.vcpus[0].sregs.cr3 + 0x1000
        vm.memory.write(pdpt + 8, (0x4_0003).to_bytes(8, "little"))

    ends_alike(guest, code, page_directory)


def test_written_pages_are_in_the_dirty_log(guest):
    vm = guest("kvm", STORE_NEW + CMPXCHG16B + HLT)
    vm.memory.start_dirty_log(DirtyLog(vm))
    vm.run(timeout=60)
    assert DATA in vm.memory.collect_dirty()
    assert vm.memory.read(DATA, 16) == (0x22 << 64 | 0x11).to_bytes(16, "little")


def test_slots_that_come_later_are_known(guest):
    vm = guest("kvm", STORE_NEW + CMPXCHG16B + HLT)
    vm.run(timeout=60)
    needed(vm.assist.counts, "cmpxchg16b")
    region = vm.add_ram(0x100_0000, 0x1000)
    vm.memory.write(0x100_0000, bytes.fromhex(STORE_NEW + CMPXCHG16B + HLT))
    vm.vcpus[0].enter_long_mode(0x100_0000, sp=STACK)
    assert vm.run(timeout=60) == Outcome("halted", vcpu=0)
    assert vm.assist.counts["cmpxchg16b"] == 2
    vm.memory.remove(region)


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_switched_off_it_is_a_failure_with_a_report(guest, how, monkeypatch):
    if how == "environment":
        monkeypatch.setenv("KVMPY_ASSIST", "0")
        vm = guest("kvm", CMPXCHG16B + HLT)
    else:
        vm = guest("kvm", CMPXCHG16B + HLT, assist=False)
    try:
        vm.run(timeout=60)
    except EmulationFailure as error:
        assert "cmpxchg16b" in error.report
        assert not vm.assist.counts
    else:
        pytest.skip("this KVM runs cmpxchg16b by itself")


def test_a_handler_for_the_exit_comes_first(guest):
    from kvmpy import InternalError

    vm = guest("kvm", CMPXCHG16B + HLT)
    vm.on_exit(InternalError)(lambda exit: Outcome("mine"))
    outcome = vm.run(timeout=60)
    if outcome.reason == "halted":
        pytest.skip("this KVM runs cmpxchg16b by itself")
    assert outcome == Outcome("mine")
    assert not vm.assist.counts


def test_slots_of_the_second_ioctl_are_known_too(guest):
    vm = guest("kvm", STORE_NEW + CMPXCHG16B + HLT)
    if not vm.check_extension("USER_MEMORY2"):
        pytest.skip("no KVM_CAP_USER_MEMORY2")
    code = bytes.fromhex(STORE_NEW + CMPXCHG16B + HLT)
    with contextlib.closing(Ram.from_bytes(code.ljust(0x1000, b"\x90"))) as ram:
        vm.set_user_memory_region2(30, 0x100_0000, 0x1000, ram.address)
        vm.vcpus[0].enter_long_mode(0x100_0000, sp=STACK)
        assert vm.run(timeout=60) == Outcome("halted", vcpu=0)
        needed(vm.assist.counts, "cmpxchg16b")
        vm.set_user_memory_region2(30, 0x100_0000, 0, 0)


def test_two_processors_are_assisted_at_once(guest):
    # Each: mov edi,50; again: lock cmpxchg16b [rbp] (RBP: a place of its own)  add [0x30100],1 with LOCK  dec edi  jnz
    again = "f0 480fc74d00 f0 83042500010300 01 ffcf 75ee"
    vm = guest("kvm", "bf 32000000" + again + HLT)
    first = vm.vcpus[0]
    second = vm.create_vcpu()
    second.cpuid = vm.kvm.get_supported_cpuid()
    second.enter_long_mode(CODE, sp=STACK - 0x1000)
    for vcpu, place in ((first, DATA), (second, DATA + 0x40)):
        regs = vcpu.regs
        regs.rbp, regs.rbx = place, 7
        vcpu.regs = regs
    vm.assist.stretch = 3
    runs = [vm.run(timeout=60)]
    if vm.vcpus[1].regs.rdi:
        runs.append(vm.run(timeout=60))
    assert all(outcome.reason == "halted" for outcome in runs)
    assert vm.memory.read(DATA + 0x100, 4) == (100).to_bytes(4, "little")
    needed(vm.assist.counts, "cmpxchg16b")


AVX512 = 0xE6  # XCR0: SSE, AVX, opmask, both halves of the upper registers


def test_avx512_state_goes_through_the_assist(guest):
    """The XSAVE family runs in the assist, and what it only carries comes through unchanged."""
    # fninit  mov eax,0xe7  xor edx,edx  xor ecx,ecx  xsetbv  cmpxchg16b  xsave64 [0x31000]  xrstor64 [0x31000]
    # xsavec64 [0x33000]  hlt
    area = "480fae2425 00100300 480fae2c25 00100300 480fc72425 00300300"
    code = "dbe3 b8 e7000000 31d2 31c9 0f01d1" + STORE_NEW + CMPXCHG16B + "b8 e7000000 31d2" + area + HLT
    vm = guest("kvm", code)
    leaf = next(e for e in vm.kvm.get_supported_cpuid() if e.function == 0xD and e.index == 0)
    if leaf.eax & AVX512 != AVX512:
        pytest.skip("this processor has no AVX-512")
    vcpu = vm.vcpus[0]
    places = {e.index: e for e in vm.kvm.get_supported_cpuid() if e.function == 0xD and e.index in (5, 6, 7)}
    xcrs = vcpu.xcrs
    xcrs.nr_xcrs, xcrs.xcrs[0].value = 1, 0xE7
    vcpu.xcrs = xcrs
    raw = bytearray(bytes(vcpu.xsave))
    raw[512] |= 0xE7
    for index, place in places.items():
        raw[place.ebx : place.ebx + place.eax] = bytes((index * 16 + i) & 0xFF for i in range(place.eax))
    vcpu.xsave = type(vcpu.xsave).from_bytes(bytes(raw))
    assert vm.run(timeout=60) == Outcome("halted", vcpu=0)
    for place in places.values():
        at = slice(place.ebx, place.ebx + place.eax)
        assert bytes(vcpu.xsave)[at] == raw[at]
        assert vm.memory.read(DATA + 0x1000 + place.ebx, place.eax) == raw[at]
    compact = vm.memory.read(DATA + 0x3000, 0x1000)
    assert int.from_bytes(compact[520:528], "little") == 1 << 63 | 0xE7
    assert compact[832 : 832 + places[5].eax] == raw[places[5].ebx : places[5].ebx + places[5].eax]
