# SPDX-License-Identifier: Apache-2.0
"""Interrupts: chips, lines, messages, routes, eventfds, coalesced writes."""

from __future__ import annotations

import os

import pytest

from kvmpy import _constants as c
from kvmpy._exits import Hlt, IoOut, MmioWrite
from kvmpy._structs import MsrEntry, route_irqchip, route_msi
from kvmpy.errors import KvmError

from .conftest import wait_until
from .test_vm import need


@pytest.fixture
def eventfd():
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    yield fd
    os.close(fd)


def fired(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def test_irqchip_comes_before_vcpus(vm):
    vm.create_vcpu()
    with pytest.raises(KvmError, match="KVM_CREATE_IRQCHIP"):
        vm.create_irqchip()


def test_get_and_set_irqchip(chips):
    for number in (c.KVM_IRQCHIP_PIC_MASTER, c.KVM_IRQCHIP_PIC_SLAVE):
        chip = chips.get_irqchip(number)
        assert chip.chip_id == number
        chip.pic.imr = 0xA5
        chips.set_irqchip(chip)
        assert chips.get_irqchip(number).pic.imr == 0xA5
    ioapic = chips.get_irqchip(c.KVM_IRQCHIP_IOAPIC)
    assert ioapic.ioapic.base_address == 0xFEC0_0000
    ioapic.ioapic.redirtbl[3] = 0x1_0044
    chips.set_irqchip(ioapic)
    assert chips.get_irqchip(c.KVM_IRQCHIP_IOAPIC).ioapic.redirtbl[3] == 0x1_0044
    with pytest.raises(KvmError, match="KVM_GET_IRQCHIP"):
        chips.get_irqchip(9)


def test_irq_line_reaches_the_pic(chips):
    chips.irq_line(5, 1)
    assert chips.get_irqchip(c.KVM_IRQCHIP_PIC_MASTER).pic.irr & 1 << 5
    chips.irq_line(5, False)


def test_irq_line_without_a_chip_is_refused(vm):
    with pytest.raises(KvmError, match="KVM_IRQ_LINE"):
        vm.irq_line(5, 1)


def test_irq_line_status(chips):
    need(chips, "IRQ_INJECT_STATUS", lambda: chips.irq_line_status(5, 1))
    assert isinstance(chips.irq_line_status(5, 1), int)
    chips.irq_line_status(5, 0)


def test_pit2(chips):
    need(chips, "PIT2", chips.create_pit2)
    chips.create_pit2(c.KVM_PIT_SPEAKER_DUMMY)
    pit = chips.pit2
    pit.channels[2].count, pit.channels[2].mode = 0x1234, 3
    chips.pit2 = pit
    assert chips.pit2.channels[2].count == 0x1234
    chips.reinject_control(False)
    chips.reinject_control(True)
    with pytest.raises(KvmError, match="KVM_CREATE_PIT2: File exists"):
        chips.create_pit2()


def test_the_old_pit(chips):
    need(chips, "PIT", chips.create_pit)
    chips.create_pit()
    pit = chips.pit
    pit.channels[1].count = 77
    chips.pit = pit
    assert chips.pit.channels[1].count == 77


def test_pit_without_an_irqchip(vm):
    with pytest.raises(KvmError, match="KVM_CREATE_PIT2"):
        vm.create_pit2()


def enable_apic(vcpu) -> None:
    lapic = vcpu.lapic
    registers = bytearray(lapic.regs)
    registers[0xF0:0xF2] = (0x1FF).to_bytes(2, "little")
    lapic.regs = registers
    vcpu.lapic = lapic


def pending(vcpu) -> set[int]:
    """Vectors in the interrupt request register of the local APIC."""
    registers = vcpu.lapic.regs
    return {
        32 * word + bit
        for word in range(8)
        for bit in range(32)
        if int.from_bytes(registers[0x200 + 16 * word : 0x204 + 16 * word], "little") >> bit & 1
    }


def test_signal_msi(chips):
    need(chips, "SIGNAL_MSI", lambda: chips.signal_msi(0xFEE0_0000, 0x41))
    vcpu = chips.create_vcpu()
    enable_apic(vcpu)
    assert chips.signal_msi(0xFEE0_0000, 0x41)
    assert pending(vcpu) == {0x41}


def test_gsi_routing(chips):
    need(chips, "IRQ_ROUTING", lambda: chips.set_gsi_routing([]))
    vcpu = chips.create_vcpu()
    enable_apic(vcpu)
    routes = [route_irqchip(i, c.KVM_IRQCHIP_IOAPIC, i) for i in range(24)]
    chips.set_gsi_routing([*routes, route_msi(24, 0xFEE0_0000, 0x51)])
    chips.irq_line(24, 1)
    assert pending(vcpu) == {0x51}
    chips.set_gsi_routing([])
    with pytest.raises(TypeError, match="IrqRoutingEntry are needed, not MsrEntry"):
        chips.set_gsi_routing([MsrEntry()])
    with pytest.raises(KvmError, match="KVM_SET_GSI_ROUTING"):
        chips.set_gsi_routing([route_irqchip(0, 77, 0)])


def test_irqfd(chips, eventfd):
    need(chips, "IRQFD", lambda: chips.irqfd(eventfd, 24))
    vcpu = chips.create_vcpu()
    enable_apic(vcpu)
    chips.set_gsi_routing([route_msi(24, 0xFEE0_0000, 0x61)])
    chips.irqfd(eventfd, 24)
    with pytest.raises(KvmError, match="KVM_IRQFD"):
        chips.irqfd(eventfd, 24)  # an eventfd serves one GSI
    os.eventfd_write(eventfd, 1)
    wait_until(lambda: pending(vcpu) == {0x61})
    chips.irqfd(eventfd, 24, deassign=True)
    chips.set_gsi_routing([route_msi(24, 0xFEE0_0000, 0x62)])
    os.eventfd_write(eventfd, 1)
    assert pending(vcpu) == {0x61}


def test_irqfd_with_resample(chips, eventfd):
    need(chips, "IRQFD_RESAMPLE", lambda: chips.irqfd(eventfd, 5, resample=eventfd))
    resample = os.eventfd(0, os.EFD_NONBLOCK)
    with os.fdopen(resample, "rb", buffering=0) as held:  # an object with fileno() will do
        chips.irqfd(eventfd, 5, resample=held)
        os.eventfd_write(eventfd, 1)
        # The kernel may do this in a work queue.
        wait_until(lambda: chips.get_irqchip(c.KVM_IRQCHIP_PIC_MASTER).pic.irr & 1 << 5)
        chips.irqfd(eventfd, 5, deassign=True)


def test_irqfd_wants_an_eventfd(chips):
    with pytest.raises(KvmError, match="KVM_IRQFD"):
        chips.irqfd(2**31 - 1, 5)


def test_ioeventfd_of_a_port(vm, guest, eventfd):
    need(vm, "IOEVENTFD", lambda: vm.ioeventfd(eventfd, 0x80, 1, pio=True))
    vm.ioeventfd(eventfd, 0x80, 1, pio=True, datamatch=5)
    # mov dx,0x80; mov al,5; out dx,al; mov al,6; out dx,al; hlt
    g = guest("ba8000 b005 ee b006 ee f4")
    assert g.run() == IoOut(0x80, b"\6")  # the 5 made no exit
    assert fired(eventfd) == 1
    vm.ioeventfd(eventfd, 0x80, 1, pio=True, datamatch=5, deassign=True)
    with pytest.raises(KvmError, match="KVM_IOEVENTFD"):
        vm.ioeventfd(eventfd, 0x80, 1, pio=True, datamatch=5, deassign=True)


def test_ioeventfd_of_memory_and_any_length(vm, guest, eventfd):
    need(vm, "IOEVENTFD_ANY_LENGTH", lambda: vm.ioeventfd(eventfd, 0x1_0000))
    vm.ioeventfd(eventfd, 0x1_0000)
    # mov dword [0x10000],0x12345678; mov byte [0x10000],1; hlt
    g = guest("6766c7050000010078563412 67c6050000010001 f4")
    assert g.run() == Hlt()
    assert fired(eventfd) == 2


def test_hyperv_eventfd(vm, eventfd):
    need(vm, "HYPERV_EVENTFD", lambda: vm.hyperv_eventfd(1, eventfd))
    vm.hyperv_eventfd(1, eventfd)
    vm.hyperv_eventfd(1, deassign=True)


def test_hyperv_eventfd_reaches_the_engine(fake):
    import ctypes
    import struct

    seen = []
    fake.capabilities[c.Cap.HYPERV_EVENTFD] = 1
    fake.answers["KVM_HYPERV_EVENTFD"] = lambda at: seen.append(struct.unpack("<IiI", ctypes.string_at(at, 12))) or 0
    vm = fake.kvm.create_vm()
    vm.hyperv_eventfd(5, 17)
    vm.hyperv_eventfd(5, deassign=True)
    assert seen == [(5, 17, 0), (5, -1, 1)]


def test_coalesced_mmio_and_pio(vm, guest):
    need(vm, "COALESCED_MMIO", lambda: vm.register_coalesced_mmio(0x1_0000, 16))
    need(vm, "COALESCED_PIO", lambda: vm.register_coalesced_mmio(0x80, 1, pio=True))
    vm.register_coalesced_mmio(0x1_0000, 16)
    vm.register_coalesced_mmio(0x80, 1, pio=True)
    # mov dword [0x10000],0x12345678; mov dx,0x80; mov al,7; out dx,al; hlt
    g = guest("6766c7050000010078563412 ba8000 b007 ee f4")
    assert g.vcpu.coalesced() == []
    assert g.run() == Hlt()
    assert g.vcpu.coalesced() == [MmioWrite(0x1_0000, bytes.fromhex("78563412")), IoOut(0x80, b"\7")]
    assert g.vcpu.coalesced() == []
    vm.unregister_coalesced_mmio(0x1_0000, 16)
    vm.unregister_coalesced_mmio(0x80, 1, pio=True)
    g.vcpu.regs = type(g.vcpu.regs)(rip=0x1000, rflags=2)
    assert isinstance(g.run(), MmioWrite)


def test_coalesced_ring_wraps(vm, guest):
    need(vm, "COALESCED_PIO", lambda: vm.register_coalesced_mmio(0x80, 1, pio=True))
    vm.register_coalesced_mmio(0x80, 1, pio=True)
    # mov dx,0x80; mov cx,100; x: out dx,al; inc al; loop x; mov dx,0x80; mov cx,100; hlt; jmp x
    g = guest("ba8000 b96400 ee fec0 e2fb ba8000 b96400 f4 ebf2")
    values = []
    for _ in range(5):
        assert g.run() == Hlt()
        values += [write.data[0] for write in g.vcpu.coalesced()]
    assert values == [n & 0xFF for n in range(500)]


def test_a_full_coalesced_ring_exits(vm, guest):
    need(vm, "COALESCED_PIO", lambda: vm.register_coalesced_mmio(0x80, 1, pio=True))
    vm.register_coalesced_mmio(0x80, 1, pio=True)
    g = guest("ba8000 b92c01 ee fec0 e2fb f4")  # 300 times
    exit = g.run()
    assert isinstance(exit, IoOut)
    writes = g.vcpu.coalesced()
    assert [write.data[0] for write in writes] == list(range(len(writes)))
    assert exit.data[0] == len(writes)


def test_a_hostile_coalesced_ring_ends(fake):
    import ctypes

    fake.capabilities[c.Cap.COALESCED_MMIO] = 2
    vcpu = fake.vcpu()
    first, last = (ctypes.c_uint32.from_buffer(fake.run_page, 8192 + 4 * i) for i in range(2))
    first.value, last.value = 0xFFFF_FFFF, 3
    assert vcpu.coalesced() == []
    first.value, last.value = 169, 1
    ctypes.c_uint32.from_buffer(fake.run_page, 8192 + 8 + 169 * 24 + 8).value = 0xFFFF_FFFF  # its length
    assert [len(write.data) for write in vcpu.coalesced()] == [8, 0]
    assert first.value == 1


def test_interrupt_needs_no_chip(chips):
    vcpu = chips.create_vcpu()
    with pytest.raises(KvmError, match="KVM_INTERRUPT"):
        vcpu.interrupt(0x20)


def test_nmi_is_taken(vm, guest):
    g = guest("90 90 90 f4")
    need(vm, "USER_NMI", g.vcpu.nmi)
    g.memory[2 * 4 : 2 * 4 + 4] = bytes.fromhex("0018 0000")
    g.memory[0x1800] = 0xF4
    g.vcpu.nmi()
    assert g.run() == Hlt()
    assert g.vcpu.regs.rip == 0x1801


def test_smi(vcpu):
    need(vcpu.vm, "X86_SMM", vcpu.smi)
    vcpu.smi()
    assert vcpu.vcpu_events.smi.pending


def test_vapic(chips):
    vcpu = chips.create_vcpu()
    need(chips, "VAPIC", lambda: vcpu.set_vapic_addr(0))
    vcpu.set_vapic_addr(0)
    vcpu.tpr_access_reporting(False)


def test_kvmclock_ctrl_needs_a_guest_with_kvmclock(vcpu):
    need(vcpu.vm, "KVMCLOCK_CTRL", vcpu.kvmclock_ctrl)
    with pytest.raises(KvmError, match="KVM_KVMCLOCK_CTRL: Invalid argument"):
        vcpu.kvmclock_ctrl()


def test_enable_cap_of_a_vcpu(vcpu):
    need(vcpu.vm, "ENFORCE_PV_FEATURE_CPUID", lambda: vcpu.enable_cap("ENFORCE_PV_FEATURE_CPUID", 1))
    vcpu.enable_cap("ENFORCE_PV_FEATURE_CPUID", 1)
    with pytest.raises(KvmError, match="KVM_ENABLE_CAP"):
        vcpu.enable_cap("SPLIT_IRQCHIP", 24)  # a capability of the VM
