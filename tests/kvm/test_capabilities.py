# SPDX-License-Identifier: Apache-2.0
"""A missing capability is a CapabilityError that names it, before any ioctl; tried on an engine that has none."""

from __future__ import annotations

import pytest

from kvmpy import _constants as c
from kvmpy import _structs as s
from kvmpy.errors import CapabilityError, KvmError

# what to do with (kvm, vm, vcpu), the ioctl it would use, the capability that it needs
CALLS = [
    (lambda kvm, vm, vcpu: kvm.get_supported_cpuid(), "KVM_GET_SUPPORTED_CPUID", "EXT_CPUID"),
    (lambda kvm, vm, vcpu: kvm.get_emulated_cpuid(), "KVM_GET_EMULATED_CPUID", "EXT_EMUL_CPUID"),
    (lambda kvm, vm, vcpu: kvm.get_supported_hv_cpuid(), "KVM_GET_SUPPORTED_HV_CPUID", "SYS_HYPERV_CPUID"),
    (lambda kvm, vm, vcpu: kvm.get_msr_feature_index_list(), "KVM_GET_MSR_FEATURE_INDEX_LIST", "GET_MSR_FEATURES"),
    (lambda kvm, vm, vcpu: kvm.get_msrs([]), "KVM_GET_MSRS", "GET_MSR_FEATURES"),
    (lambda kvm, vm, vcpu: kvm.mce_cap_supported, "KVM_X86_GET_MCE_CAP_SUPPORTED", "MCE"),
    (lambda kvm, vm, vcpu: kvm.has_device_attr(0, 0), "KVM_HAS_DEVICE_ATTR", "SYS_ATTRIBUTES"),
    (lambda kvm, vm, vcpu: vm.has_device_attr(0, 0), "KVM_HAS_DEVICE_ATTR", "VM_ATTRIBUTES"),
    (lambda kvm, vm, vcpu: vcpu.has_device_attr(0, 0), "KVM_HAS_DEVICE_ATTR", "VCPU_ATTRIBUTES"),
    (lambda kvm, vm, vcpu: vcpu.get_device_attr(0, 0), "KVM_GET_DEVICE_ATTR", "VCPU_ATTRIBUTES"),
    (lambda kvm, vm, vcpu: vcpu.set_device_attr(0, 0), "KVM_SET_DEVICE_ATTR", "VCPU_ATTRIBUTES"),
    (lambda kvm, vm, vcpu: vm.enable_cap("SPLIT_IRQCHIP", 24), "KVM_ENABLE_CAP", "ENABLE_CAP_VM"),
    (lambda kvm, vm, vcpu: vcpu.enable_cap("HYPERV_SYNIC"), "KVM_ENABLE_CAP", "ENABLE_CAP"),
    (lambda kvm, vm, vcpu: vm.set_boot_cpu_id(0), "KVM_SET_BOOT_CPU_ID", "SET_BOOT_CPU_ID"),
    (lambda kvm, vm, vcpu: vm.create_device(4), "KVM_CREATE_DEVICE", "DEVICE_CTRL"),
    (lambda kvm, vm, vcpu: vm.has_device(4), "KVM_CREATE_DEVICE", "DEVICE_CTRL"),
    (lambda kvm, vm, vcpu: vm.set_user_memory_region2(0, 0, 0, 0), "KVM_SET_USER_MEMORY_REGION2", "USER_MEMORY2"),
    (lambda kvm, vm, vcpu: vm.create_guest_memfd(4096), "KVM_CREATE_GUEST_MEMFD", "GUEST_MEMFD"),
    (lambda kvm, vm, vcpu: vm.set_memory_attributes(0, 4096, 0), "KVM_SET_MEMORY_ATTRIBUTES", "MEMORY_ATTRIBUTES"),
    (lambda kvm, vm, vcpu: vm.clear_dirty_log(0, b""), "KVM_CLEAR_DIRTY_LOG", "MANUAL_DIRTY_LOG_PROTECT2"),
    (lambda kvm, vm, vcpu: vm.reset_dirty_rings(), "KVM_RESET_DIRTY_RINGS", "DIRTY_LOG_RING"),
    (lambda kvm, vm, vcpu: vm.set_tss_addr(0), "KVM_SET_TSS_ADDR", "SET_TSS_ADDR"),
    (lambda kvm, vm, vcpu: vm.set_identity_map_addr(0), "KVM_SET_IDENTITY_MAP_ADDR", "SET_IDENTITY_MAP_ADDR"),
    (lambda kvm, vm, vcpu: vm.nr_mmu_pages, "KVM_GET_NR_MMU_PAGES", "MMU_SHADOW_CACHE_CONTROL"),
    (lambda kvm, vm, vcpu: setattr(vm, "nr_mmu_pages", 64), "KVM_SET_NR_MMU_PAGES", "MMU_SHADOW_CACHE_CONTROL"),
    (lambda kvm, vm, vcpu: vm.clock, "KVM_GET_CLOCK", "ADJUST_CLOCK"),
    (lambda kvm, vm, vcpu: setattr(vm, "clock", s.ClockData()), "KVM_SET_CLOCK", "ADJUST_CLOCK"),
    (lambda kvm, vm, vcpu: vm.tsc_khz, "KVM_GET_TSC_KHZ", "VM_TSC_CONTROL"),
    (lambda kvm, vm, vcpu: setattr(vm, "tsc_khz", 1), "KVM_SET_TSC_KHZ", "VM_TSC_CONTROL"),
    (lambda kvm, vm, vcpu: vm.set_msr_filter([]), "KVM_X86_SET_MSR_FILTER", "X86_MSR_FILTER"),
    (lambda kvm, vm, vcpu: vm.set_pmu_event_filter([], 0), "KVM_SET_PMU_EVENT_FILTER", "PMU_EVENT_FILTER"),
    (lambda kvm, vm, vcpu: vm.xen_hvm_config(s.XenHvmConfig()), "KVM_XEN_HVM_CONFIG", "XEN_HVM"),
    (lambda kvm, vm, vcpu: vm.xen_hvm_get_attr(0), "KVM_XEN_HVM_GET_ATTR", "XEN_HVM"),
    (lambda kvm, vm, vcpu: vm.xen_hvm_set_attr(s.XenHvmAttr()), "KVM_XEN_HVM_SET_ATTR", "XEN_HVM"),
    (lambda kvm, vm, vcpu: vm.xen_hvm_evtchn_send(1, 0), "KVM_XEN_HVM_EVTCHN_SEND", "XEN_HVM"),
    (lambda kvm, vm, vcpu: vm.stats(), "KVM_GET_STATS_FD", "BINARY_STATS_FD"),
    (lambda kvm, vm, vcpu: vm.create_irqchip(), "KVM_CREATE_IRQCHIP", "IRQCHIP"),
    (lambda kvm, vm, vcpu: vm.get_irqchip(0), "KVM_GET_IRQCHIP", "IRQCHIP"),
    (lambda kvm, vm, vcpu: vm.set_irqchip(s.Irqchip()), "KVM_SET_IRQCHIP", "IRQCHIP"),
    (lambda kvm, vm, vcpu: vm.create_pit(), "KVM_CREATE_PIT", "PIT"),
    (lambda kvm, vm, vcpu: vm.pit, "KVM_GET_PIT", "PIT"),
    (lambda kvm, vm, vcpu: setattr(vm, "pit", s.PitState()), "KVM_SET_PIT", "PIT"),
    (lambda kvm, vm, vcpu: vm.create_pit2(), "KVM_CREATE_PIT2", "PIT2"),
    (lambda kvm, vm, vcpu: vm.pit2, "KVM_GET_PIT2", "PIT_STATE2"),
    (lambda kvm, vm, vcpu: setattr(vm, "pit2", s.PitState2()), "KVM_SET_PIT2", "PIT_STATE2"),
    (lambda kvm, vm, vcpu: vm.reinject_control(True), "KVM_REINJECT_CONTROL", "REINJECT_CONTROL"),
    (lambda kvm, vm, vcpu: vm.irq_line_status(0, 0), "KVM_IRQ_LINE_STATUS", "IRQ_INJECT_STATUS"),
    (lambda kvm, vm, vcpu: vm.signal_msi(0, 0), "KVM_SIGNAL_MSI", "SIGNAL_MSI"),
    (lambda kvm, vm, vcpu: vm.set_gsi_routing([]), "KVM_SET_GSI_ROUTING", "IRQ_ROUTING"),
    (lambda kvm, vm, vcpu: vm.irqfd(0, 0), "KVM_IRQFD", "IRQFD"),
    (lambda kvm, vm, vcpu: vm.ioeventfd(0, 0, 1), "KVM_IOEVENTFD", "IOEVENTFD"),
    (lambda kvm, vm, vcpu: vm.hyperv_eventfd(1), "KVM_HYPERV_EVENTFD", "HYPERV_EVENTFD"),
    (lambda kvm, vm, vcpu: vm.register_coalesced_mmio(0, 1), "KVM_REGISTER_COALESCED_MMIO", "COALESCED_MMIO"),
    (lambda kvm, vm, vcpu: vm.unregister_coalesced_mmio(0, 1), "KVM_UNREGISTER_COALESCED_MMIO", "COALESCED_MMIO"),
    (lambda kvm, vm, vcpu: vm.register_coalesced_mmio(0, 1, pio=True), "KVM_REGISTER_COALESCED_MMIO", "COALESCED_PIO"),
    (lambda kvm, vm, vcpu: vcpu.sregs2, "KVM_GET_SREGS2", "SREGS2"),
    (lambda kvm, vm, vcpu: setattr(vcpu, "sregs2", s.Sregs2()), "KVM_SET_SREGS2", "SREGS2"),
    (lambda kvm, vm, vcpu: vcpu.xsave, "KVM_GET_XSAVE", "XSAVE"),
    (lambda kvm, vm, vcpu: setattr(vcpu, "xsave", s.Xsave()), "KVM_SET_XSAVE", "XSAVE"),
    (lambda kvm, vm, vcpu: vcpu.xcrs, "KVM_GET_XCRS", "XCRS"),
    (lambda kvm, vm, vcpu: setattr(vcpu, "xcrs", s.Xcrs()), "KVM_SET_XCRS", "XCRS"),
    (lambda kvm, vm, vcpu: vcpu.debugregs, "KVM_GET_DEBUGREGS", "DEBUGREGS"),
    (lambda kvm, vm, vcpu: setattr(vcpu, "debugregs", s.Debugregs()), "KVM_SET_DEBUGREGS", "DEBUGREGS"),
    (lambda kvm, vm, vcpu: vcpu.lapic, "KVM_GET_LAPIC", "IRQCHIP"),
    (lambda kvm, vm, vcpu: setattr(vcpu, "lapic", s.LapicState()), "KVM_SET_LAPIC", "IRQCHIP"),
    (lambda kvm, vm, vcpu: vcpu.mp_state, "KVM_GET_MP_STATE", "MP_STATE"),
    (lambda kvm, vm, vcpu: setattr(vcpu, "mp_state", 0), "KVM_SET_MP_STATE", "MP_STATE"),
    (lambda kvm, vm, vcpu: vcpu.vcpu_events, "KVM_GET_VCPU_EVENTS", "VCPU_EVENTS"),
    (lambda kvm, vm, vcpu: setattr(vcpu, "vcpu_events", s.VcpuEvents()), "KVM_SET_VCPU_EVENTS", "VCPU_EVENTS"),
    (lambda kvm, vm, vcpu: vcpu.cpuid, "KVM_GET_CPUID2", "EXT_CPUID"),
    (lambda kvm, vm, vcpu: setattr(vcpu, "cpuid", []), "KVM_SET_CPUID2", "EXT_CPUID"),
    (lambda kvm, vm, vcpu: vcpu.get_reg_list(), "KVM_GET_REG_LIST", "ONE_REG"),
    (lambda kvm, vm, vcpu: vcpu.get_one_reg(0), "KVM_GET_ONE_REG", "ONE_REG"),
    (lambda kvm, vm, vcpu: vcpu.set_one_reg(0, 0), "KVM_SET_ONE_REG", "ONE_REG"),
    (lambda kvm, vm, vcpu: vcpu.nested_state, "KVM_GET_NESTED_STATE", "NESTED_STATE"),
    (lambda kvm, vm, vcpu: setattr(vcpu, "nested_state", s.NestedState()), "KVM_SET_NESTED_STATE", "NESTED_STATE"),
    (lambda kvm, vm, vcpu: vcpu.tsc_khz, "KVM_GET_TSC_KHZ", "GET_TSC_KHZ"),
    (lambda kvm, vm, vcpu: setattr(vcpu, "tsc_khz", 1), "KVM_SET_TSC_KHZ", "TSC_CONTROL"),
    (lambda kvm, vm, vcpu: vcpu.setup_mce(0), "KVM_X86_SETUP_MCE", "MCE"),
    (lambda kvm, vm, vcpu: vcpu.set_mce(s.X86Mce()), "KVM_X86_SET_MCE", "MCE"),
    (lambda kvm, vm, vcpu: vcpu.xen_vcpu_get_attr(0), "KVM_XEN_VCPU_GET_ATTR", "XEN_HVM"),
    (lambda kvm, vm, vcpu: vcpu.xen_vcpu_set_attr(s.XenVcpuAttr()), "KVM_XEN_VCPU_SET_ATTR", "XEN_HVM"),
    (lambda kvm, vm, vcpu: vcpu.get_supported_hv_cpuid(), "KVM_GET_SUPPORTED_HV_CPUID", "HYPERV_CPUID"),
    (lambda kvm, vm, vcpu: vcpu.nmi(), "KVM_NMI", "USER_NMI"),
    (lambda kvm, vm, vcpu: vcpu.smi(), "KVM_SMI", "X86_SMM"),
    (lambda kvm, vm, vcpu: vcpu.set_guest_debug(0), "KVM_SET_GUEST_DEBUG", "SET_GUEST_DEBUG"),
    (lambda kvm, vm, vcpu: vcpu.tpr_access_reporting(True), "KVM_TPR_ACCESS_REPORTING", "VAPIC"),
    (lambda kvm, vm, vcpu: vcpu.set_vapic_addr(0), "KVM_SET_VAPIC_ADDR", "VAPIC"),
    (lambda kvm, vm, vcpu: vcpu.kvmclock_ctrl(), "KVM_KVMCLOCK_CTRL", "KVMCLOCK_CTRL"),
    (lambda kvm, vm, vcpu: vcpu.pre_fault_memory(0, 4096), "KVM_PRE_FAULT_MEMORY", "PRE_FAULT_MEMORY"),
    (lambda kvm, vm, vcpu: vcpu.coalesced(), "KVM_REGISTER_COALESCED_MMIO", "COALESCED_MMIO"),
    (lambda kvm, vm, vcpu: vcpu.stats(), "KVM_GET_STATS_FD", "BINARY_STATS_FD"),
]


@pytest.mark.parametrize(("call", "ioctl", "capability"), CALLS, ids=lambda v: v if isinstance(v, str) else "")
def test_a_missing_capability_is_named_before_the_ioctl(fake, call, ioctl, capability):
    vm = fake.kvm.create_vm()
    vcpu = vm.create_vcpu()
    with pytest.raises(CapabilityError) as caught:
        call(fake.kvm, vm, vcpu)
    assert caught.value.capability == f"KVM_CAP_{capability}"
    assert caught.value.ioctl == ioctl
    assert f"{ioctl}: " in str(caught.value)
    assert f"needs KVM_CAP_{capability}" in str(caught.value)
    assert ioctl not in fake.calls


def test_the_capability_to_enable_is_needed_too(fake):
    fake.capabilities[c.Cap.ENABLE_CAP_VM] = 1
    with pytest.raises(CapabilityError, match="needs KVM_CAP_X86_BUS_LOCK_EXIT"):
        fake.kvm.create_vm().enable_cap("X86_BUS_LOCK_EXIT", c.KVM_BUS_LOCK_DETECTION_EXIT)
    assert "KVM_ENABLE_CAP" not in fake.calls


def test_a_capability_that_is_there_is_asked_for_once(fake):
    fake.capabilities[c.Cap.MP_STATE] = 1
    vcpu = fake.vcpu()
    fake.calls.clear()
    for _ in range(3):
        _ = vcpu.mp_state
    assert fake.calls.count("KVM_CHECK_EXTENSION") == 1


def test_a_refused_ioctl_is_named(fake):
    fake.answers["KVM_GET_REGS"] = -5
    with pytest.raises(KvmError, match="KVM_GET_REGS: Input/output error") as caught:
        _ = fake.vcpu().regs
    assert (caught.value.errno, caught.value.ioctl) == (5, "KVM_GET_REGS")


def test_capabilities_that_are_enabled_reach_the_engine(fake):
    import ctypes
    import struct

    seen = []
    fake.capabilities.update({c.Cap.ENABLE_CAP_VM: 1, c.Cap.X86_NOTIFY_VMEXIT: 1})
    fake.answers["KVM_ENABLE_CAP"] = lambda at: seen.append(struct.unpack("<II4Q", ctypes.string_at(at, 40))) or 0
    fake.kvm.create_vm().enable_cap("X86_NOTIFY_VMEXIT", 1, 2, 3, 4, flags=9)
    assert seen == [(c.Cap.X86_NOTIFY_VMEXIT, 9, 1, 2, 3, 4)]
