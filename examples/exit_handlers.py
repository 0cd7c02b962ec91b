#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Hypervisor tests with pytest: does exit handling do what it should? Run: pytest examples/exit_handlers.py"""

import pytest

from kvmpy import GuestShutdown, OverlapError, Vm


@pytest.fixture
def vm():
    with Vm() as vm:
        vm.add_ram(0x1000, size=0x1000)
        vm.create_vcpu().enter_protected_mode(0x1000)
        yield vm


def test_a_port_write_reaches_its_handler(vm):
    vm.memory.write(0x1000, bytes.fromhex("b02a e680 f4"))  # mov al,42  out 0x80,al  hlt
    seen = []

    @vm.on_io_out(0x80)
    def post_code(exit):
        seen.append((exit.size, exit.value))

    assert vm.run(timeout=5).reason == "halted"
    assert seen == [(1, 42)]


def test_the_guest_gets_what_the_handler_answers(vm):
    vm.memory.write(0x1000, bytes.fromhex("e580 f4"))  # in eax,0x80  hlt

    @vm.on_io_in(0x80)
    def read(exit):
        return 0x1234_5678

    vm.run(timeout=5)
    assert vm.vcpus[0].regs.rax == 0x1234_5678


def test_an_exception_in_a_handler_comes_out_of_run(vm):
    vm.memory.write(0x1000, bytes.fromhex("e680 ebfe"))  # out 0x80,al  jmp $

    @vm.on_io_out(0x80)
    def broken(exit):
        raise RuntimeError("handler bug")

    with pytest.raises(RuntimeError, match="handler bug"):
        vm.run(timeout=5)


def test_two_owners_of_a_port_are_refused_by_name(vm):
    vm.on_io_out(0x80)(lambda exit: None)
    with pytest.raises(OverlapError, match="lambda"):
        vm.on_io_out(0x80)(print)


def test_a_triple_fault_explains_itself(vm):
    vm.memory.write(0x1000, bytes.fromhex("0f0b"))  # ud2, and there is no IDT
    with pytest.raises(GuestShutdown) as caught:
        vm.run(timeout=5)
    assert "ud2" in caught.value.report
    assert "rip 0000000000001000" in caught.value.report
