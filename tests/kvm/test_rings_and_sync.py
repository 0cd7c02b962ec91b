# SPDX-License-Identifier: Apache-2.0
"""What KVM shares with a vCPU in memory: the dirty ring, the synced registers, the fields of kvm_run."""

from __future__ import annotations

import ctypes
import struct

import pytest

from kvmpy import _constants as c
from kvmpy import _kvm
from kvmpy._exits import Hlt, IoOut
from kvmpy._structs import Regs, SyncRegs
from kvmpy.errors import CapabilityError, KvmError, StateError

from .test_vm import need


def test_dirty_ring(vm, guest):
    need(vm, "DIRTY_LOG_RING", lambda: vm.enable_dirty_ring(1024))
    vm.enable_dirty_ring(1024)
    assert vm.ring_size == 1024
    g = guest("c606002001 c606004001 f4")  # mov byte [0x2000],1; mov byte [0x4000],1; hlt
    vm.set_user_memory_region(0, 0, 0x1_0000, _kvm.address_of(g.memory), c.KVM_MEM_LOG_DIRTY_PAGES)
    assert g.run() == Hlt()
    assert {(0, 2), (0, 4)} <= set(g.vcpu.collect_dirty())
    assert g.vcpu.collect_dirty() == []
    assert vm.reset_dirty_rings() >= 2
    assert vm.reset_dirty_rings() == 0


def test_dirty_ring_is_enabled_before_the_vcpus(vm):
    need(vm, "DIRTY_LOG_RING", lambda: vm.enable_dirty_ring(1024))
    for entries in (0, 1000):
        with pytest.raises(ValueError, match="power of two"):
            vm.enable_dirty_ring(entries)
    vcpu = vm.create_vcpu()
    with pytest.raises(StateError, match="before the first vCPU"):
        vm.enable_dirty_ring(1024)
    with pytest.raises(StateError, match="no dirty rings"):
        vcpu.collect_dirty()
    with pytest.raises(StateError, match="no dirty rings"):
        vm.reset_dirty_rings()


def test_dirty_ring_that_is_too_big_is_refused(vm):
    need(vm, "DIRTY_LOG_RING", lambda: vm.enable_dirty_ring(1024))
    with pytest.raises(KvmError, match="KVM_ENABLE_CAP"):
        vm.enable_dirty_ring(1 << 20)
    assert vm.ring_size == 0


def test_dirty_entries_are_taken_in_order_and_marked(fake):
    """An entry is dirty (1), then harvested (2); what is not dirty ends the harvest (api.rst 7.36)."""
    fake.capabilities.update({c.Cap.DIRTY_LOG_RING: 1 << 16, c.Cap.ENABLE_CAP_VM: 1})
    vm = fake.kvm.create_vm()
    vm.enable_dirty_ring(4)
    vcpu = vm.create_vcpu()

    def put(index: int, flags: int, slot: int, page: int) -> None:
        ctypes.memmove(ctypes.addressof(fake.ring) + 16 * index, struct.pack("<IIQ", flags, slot, page), 16)

    def flags(index: int) -> int:
        return ctypes.c_uint32.from_buffer(fake.ring, 16 * index).value

    put(0, 1, 0, 5)
    put(1, 1, 1, 6)
    put(3, 1, 0, 8)
    assert vcpu.collect_dirty() == [(0, 5), (1, 6)]
    assert [flags(i) for i in range(4)] == [2, 2, 0, 1]
    put(2, 1, 2, 7)
    put(0, 1, 0, 9)  # reset by the kernel and dirty again
    assert vcpu.collect_dirty() == [(2, 7), (0, 8), (0, 9)]
    assert vcpu.collect_dirty() == []


def test_dirty_ring_prefers_the_ordered_flavour(fake):
    fake.capabilities.update(
        {c.Cap.DIRTY_LOG_RING: 1, c.Cap.DIRTY_LOG_RING_ACQ_REL: 1, c.Cap.ENABLE_CAP_VM: 1}
    )
    enabled = []
    fake.answers["KVM_ENABLE_CAP"] = lambda at: enabled.append(struct.unpack("<IIQ", ctypes.string_at(at, 16))) or 0
    fake.kvm.create_vm().enable_dirty_ring(64)
    assert enabled == [(c.Cap.DIRTY_LOG_RING_ACQ_REL, 0, 64 * 16)]


def test_sync_regs_save_the_ioctls(vm, guest):
    # mov ax,5; mov dx,0x80; out dx,al; hlt
    g = guest("b80500 ba8000 ee f4")
    need(vm, "SYNC_REGS", lambda: setattr(g.vcpu, "sync_valid_regs", 1))
    vcpu = g.vcpu
    vcpu.sync_valid_regs = c.KVM_SYNC_X86_REGS | c.KVM_SYNC_X86_SREGS | c.KVM_SYNC_X86_EVENTS
    assert vcpu.sync_valid_regs == 7
    assert g.run() == IoOut(0x80, b"\5")
    synced = vcpu.sync_regs
    assert synced.regs.rax == 5
    assert synced.sregs.ds.limit == 0xFFFF_FFFF
    synced.regs.rip = 0x1000  # once more
    vcpu.sync_regs = synced
    vcpu.sync_dirty_regs = c.KVM_SYNC_X86_REGS
    assert g.run() == IoOut(0x80, b"\5")
    assert vcpu.sync_dirty_regs == 0
    with pytest.raises(ValueError, match="KVM_CAP_SYNC_REGS offers 0x7, not 0x107"):
        vcpu.sync_valid_regs = 0x107
    with pytest.raises(TypeError, match="a SyncRegs is needed, not Regs"):
        vcpu.sync_regs = Regs()
    assert isinstance(synced, SyncRegs)


def test_fields_of_kvm_run(vcpu):
    for name in ("immediate_exit", "request_interrupt_window"):
        assert getattr(vcpu, name) is False
        setattr(vcpu, name, True)
        assert getattr(vcpu, name) is True
    vcpu.cr8 = 5
    assert vcpu.cr8 == 5
    vcpu.apic_base = 0xFEE0_0900
    assert vcpu.apic_base == 0xFEE0_0900
    assert vcpu.run_flags == 0
    with pytest.raises(AttributeError):
        vcpu.run_flags = 1


def test_sync_regs_of_an_engine_without_them(fake):
    vcpu = fake.vcpu()
    with pytest.raises(CapabilityError, match="KVM_CAP_SYNC_REGS"):
        vcpu.sync_valid_regs = 1
