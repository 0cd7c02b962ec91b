# SPDX-License-Identifier: Apache-2.0
"""Fixtures for the KVM layer: an open engine, a bare VM, tiny real-mode guests, and an engine that only plays one."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvmpy import _kvm
from kvmpy._structs import Regs
from kvmpy.arch.x86 import identity_page_tables
from kvmpy.engines import open_kvm
from kvmpy.vcpu import modes

from .fake_engine import FakeEngine

CODE = 0x1000
HANG = 60  # seconds


@pytest.fixture
def kvm(backend: str) -> Iterator[_kvm.Kvm]:
    """An open engine."""
    with open_kvm(backend) as kvm:
        yield kvm


@pytest.fixture
def vm(kvm: _kvm.Kvm) -> _kvm.Vm:
    """A VM without memory, chips and vCPUs."""
    return kvm.create_vm()


@pytest.fixture
def vcpu(vm: _kvm.Vm) -> _kvm.Vcpu:
    """A vCPU without memory."""
    return vm.create_vcpu()


@pytest.fixture
def chips(vm: _kvm.Vm) -> _kvm.Vm:
    """A VM with in-kernel chips."""
    vm.create_irqchip()
    return vm


class Hung(AssertionError):
    """A guest that should have made an exit did not."""


class Guest:
    """A vCPU in real mode with flat 4 GiB data segments, and its memory at guest address 0."""

    def __init__(self, vm: _kvm.Vm, code: bytes, *, size: int = 0x1_0000, slot: int = 0) -> None:
        self.vm = vm
        self.memory = mmap.mmap(-1, size)
        self.memory[CODE : CODE + len(code)] = code
        vm.set_user_memory_region(slot, 0, size, _kvm.address_of(self.memory))
        self.vcpu = vm.create_vcpu()
        sregs = self.vcpu.sregs
        sregs.cs.base = sregs.cs.selector = 0
        for segment in (sregs.ds, sregs.es, sregs.ss):
            segment.limit, segment.g = 0xFFFF_FFFF, 1
        self.vcpu.sregs = sregs
        self.vcpu.regs = Regs(rip=CODE, rsp=0x8000, rflags=2)

    def protect(self) -> None:
        """Go to flat 32-bit protected mode without an IDT: any exception is a triple fault."""
        sregs = self.vcpu.sregs
        sregs.cr0 |= 1
        sregs.idt.limit = 0
        sregs.cs.db = sregs.cs.g = 1
        sregs.cs.limit, sregs.cs.selector = 0xFFFF_FFFF, 8
        for segment in (sregs.ds, sregs.es, sregs.ss):
            segment.selector, segment.db = 16, 1
        self.vcpu.sregs = sregs

    def enter_ring3(self) -> None:
        """Go to 64-bit mode in ring 3, with page tables at 0x9000 that map 4 GiB one to one."""
        tables = identity_page_tables(0x9000)
        self.memory[0x9000 : 0x9000 + len(tables)] = tables
        entry = modes.long(CODE, cr3=0x9000, sp=0x8000, ring=3)
        self.vcpu.sregs = modes.special_registers(self.vcpu.sregs, entry)
        self.vcpu.regs = modes.general_registers(entry)

    def run(self, hang: float = HANG) -> Any:
        """Run to the next exit; a guest that makes none in `hang` seconds raises instead of hanging the test."""
        hung = threading.Event()
        watchdog = threading.Timer(hang, lambda: (hung.set(), self.vcpu.kick()))
        watchdog.start()
        try:
            exit = self.vcpu.run()
        finally:
            watchdog.cancel()
        if hung.is_set():
            raise Hung(f"the guest made no exit in {hang} s; it is at {self.vcpu.regs.rip:#x}")
        return exit


@pytest.fixture
def guest(vm: _kvm.Vm) -> Callable[..., Guest]:
    """Make a guest in `vm` from its code."""
    guests: list[Guest] = []  # memory must outlive its slot

    def make(code: str, **options: int) -> Guest:
        guests.append(Guest(vm, bytes.fromhex(code), **options))
        return guests[-1]

    return make


def wait_until(condition: Callable[[], object]) -> None:
    """Wait for something that another thread or the kernel does."""
    pause = threading.Event()
    for _ in range(12_000):
        if condition():
            return
        pause.wait(0.005)
    pytest.fail("it did not happen in a minute")


@pytest.fixture
def fake() -> Iterator[FakeEngine]:
    """An engine that answers what the test tells it to."""
    with FakeEngine() as engine:
        yield engine
