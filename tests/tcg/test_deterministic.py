# SPDX-License-Identifier: Apache-2.0
"""Deterministic mode: time is a count of instructions, so two runs see the same interrupts at the same points."""

from __future__ import annotations

from itertools import pairwise

import pytest

import kvmpy
from kvmpy import guests
from kvmpy.boot.cpuid import CpuidPolicy
from kvmpy.guests.init import parameters
from tests.conftest import why_not

# The master PIC at vector 0x20 with only IRQ 0 open; PIT counter 0 in mode 2 with 0x1000; sti; then count in AX.
CODE = bytes.fromhex(
    "b011e620 b020e621 b004e621 b001e621 b0fee621 b034e643 b000e640 b010e640 fb 83c001 ebfb".replace(" ", "")
)
# push ax; rdtsc; out 0x10, eax; EOI; pop ax; iret
HANDLER = bytes.fromhex("50 0f31 66e710 b020e620 58 cf".replace(" ", ""))


def run_once(seed):
    with kvmpy.Vm("tcg", deterministic=seed) as vm:
        vm.create_irqchip()
        vm.create_pit2()
        vm.add_ram(0, size=0x10000)
        vm.memory.write(0x1000, CODE)
        vm.memory.write(0x2000, HANDLER)
        vm.memory.put_u32(0x20 * 4, 0x2000)
        vcpu = vm.create_vcpu()
        vcpu.enter_real_mode(0x1000)
        regs = vcpu.regs
        regs.rsp = 0x8000
        vcpu.regs = regs
        return [(str(vcpu.run()), bytes(vcpu.regs)) for _ in range(20)]


def test_two_runs_are_the_same(requires_tcg):
    first = run_once(7)
    assert first == run_once(7)
    assert len({exit for exit, _ in first}) == 20  # time goes on


# x2APIC on, its timer at vector 0x20, divided by 1, 1000 ns from now; sti; then count in BX.
SHORT_TIMER = bytes.fromhex(
    "66b91b0000000f32660d000c00000f30 66b90f0800006631d266b8ff0100000f30 66b93208000066b8200000000f30"
    "66b93e08000066b80b0000000f30 66b93808000066b8e80300000f30 fb 43 ebfd"
)
# rdtsc; out 0x10, eax; EOI; the timer once more; iret
AGAIN = bytes.fromhex("0f3166e710 6631d26631c066b90b0800000f30 66b93808000066b8e80300000f30 cf")


def test_a_timer_that_is_set_while_running_comes_in_time(requires_tcg):
    with kvmpy.Vm("tcg", deterministic=1) as vm:
        vm.create_irqchip()
        vm.add_ram(0, size=0x10000)
        vm.memory.write(0x1000, SHORT_TIMER)
        vm.memory.write(0x2000, AGAIN)
        vm.memory.put_u32(0x20 * 4, 0x2000)
        vcpu = vm.create_vcpu()
        vcpu.cpuid = CpuidPolicy(vm.kvm.get_supported_cpuid(), "host").kvm_entries(0)
        vcpu.enter_real_mode(0x1000)
        regs = vcpu.regs
        regs.rsp = 0x8000
        vcpu.regs = regs
        at = [int.from_bytes(vcpu.run().data, "little") for _ in range(4)]
    between = [b - a for a, b in pairwise(at)]  # the handler is ten instructions
    assert all(1000 <= n <= 1020 for n in between), between


def test_only_one_vcpu(requires_tcg):
    with kvmpy.Vm("tcg", deterministic=1) as vm:
        vm.create_vcpu()
        with pytest.raises(OSError, match="KVM_CREATE_VCPU"):
            vm.create_vcpu()


@pytest.fixture
def requires_tcg():
    pytest.importorskip("kvmpy.tcg._tcg")


def test_the_option_of_vm_takes_the_software_cpu(requires_tcg):
    with kvmpy.Vm(deterministic=5) as vm:
        assert (vm.backend, vm.deterministic) == ("tcg", 5)
        assert vm.clock.clock == 0


def test_only_the_software_cpu(requires_tcg):
    if reason := why_not("kvm"):
        pytest.skip(f"kvm: {reason}")
    with pytest.raises(kvmpy.BackendError, match="only the software CPU"):
        kvmpy.Vm("kvm", deterministic=1)


def test_a_machine_has_one_processor():
    with pytest.raises(ValueError, match="one processor"):
        kvmpy.Machine(kernel="vmlinuz", cpus=2, deterministic=1)


def test_linux_boots_twice_the_same_way(requires_tcg):
    guest = guests.find("debian-6.1")
    if guest is None:
        pytest.skip("no debian-6.1 here; `kvmpy guest get debian-6.1` fetches it")
    command = parameters("cat /proc/uptime /proc/interrupts; date; od -N 16 /dev/urandom")

    def boot():
        words = f"{guest.cmdline} {command}"
        with kvmpy.Machine(kernel=guest.kernel, initrd=guest.initrd, cmdline=words, deterministic=3) as machine:
            assert machine.wait(300).reason == "poweroff"
            return machine.console.transcript, machine.vm.clock.clock

    first = boot()
    assert "exit status 0" in first[0]
    assert boot() == first  # times of the kernel's log, interrupts, random numbers, and the last instruction
