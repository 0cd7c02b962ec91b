# SPDX-License-Identifier: Apache-2.0
"""Deterministic mode: time is a count of instructions, so two runs see the same interrupts at the same points."""

from __future__ import annotations

import pytest

import kvmpy

DETERMINISTIC = 0x6B760001  # KVMPY_CAP_TCG_DETERMINISTIC in tcg/vm.h
# The master PIC at vector 0x20 with only IRQ 0 open; PIT counter 0 in mode 2 with 0x1000; sti; then count in AX.
CODE = bytes.fromhex(
    "b011e620 b020e621 b004e621 b001e621 b0fee621 b034e643 b000e640 b010e640 fb 83c001 ebfb".replace(" ", "")
)
# push ax; rdtsc; out 0x10, eax; EOI; pop ax; iret
HANDLER = bytes.fromhex("50 0f31 66e710 b020e620 58 cf".replace(" ", ""))


def run_once(seed):
    with kvmpy.Vm("tcg") as vm:
        vm.enable_cap(DETERMINISTIC, seed)
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


def test_only_one_vcpu(requires_tcg):
    with kvmpy.Vm("tcg") as vm:
        vm.enable_cap(DETERMINISTIC, 1)
        vm.create_vcpu()
        with pytest.raises(OSError, match="KVM_CREATE_VCPU"):
            vm.create_vcpu()


@pytest.fixture
def requires_tcg():
    pytest.importorskip("kvmpy.tcg._tcg")
