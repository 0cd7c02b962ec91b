# SPDX-License-Identifier: Apache-2.0
"""The ioctls of a VM, but for its interrupts: memory, dirty pages, time, filters, Xen, encryption."""

from __future__ import annotations

import mmap
import os

import pytest

from kvmpy import _constants as c
from kvmpy import _kvm
from kvmpy._exits import Hlt, MmioWrite
from kvmpy._structs import XenHvmAttr, XenHvmConfig
from kvmpy.errors import CapabilityError, KvmError, StateError

PAGE = 0x1000
# mov byte [0x2000],1; mov byte [0x4000],1; hlt
STORE = "c606002001 c606004001 f4"


def need(vm, name: str, use) -> None:
    """Skip if the engine lacks a capability, but only after it was named in a CapabilityError."""
    if not vm.check_extension(name):
        with pytest.raises(CapabilityError) as caught:
            use()
        assert caught.value.capability == f"KVM_CAP_{name}"
        pytest.skip(f"no KVM_CAP_{name}")


def bits(bitmap: bytes) -> set[int]:
    return {8 * i + bit for i, byte in enumerate(bitmap) for bit in range(8) if byte >> bit & 1}


def test_check_extension_of_the_vm(kvm, vm):
    assert vm.check_extension("IRQCHIP") == kvm.check_extension("IRQCHIP")
    assert vm.capabilities().keys() == kvm.capabilities().keys()


def test_enable_cap_checks_its_arguments(vm):
    with pytest.raises(ValueError, match="up to 4 arguments, not 5"):
        vm.enable_cap("SPLIT_IRQCHIP", 1, 2, 3, 4, 5)
    with pytest.raises(ValueError, match="no KVM_CAP_FOO"):
        vm.enable_cap("FOO")
    with pytest.raises(KvmError, match="KVM_ENABLE_CAP"):
        vm.enable_cap("SPLIT_IRQCHIP", 1 << 40)


def test_set_user_memory_region_moves_and_removes(vm, guest):
    g = guest("a00020 f4")  # mov al,[0x2000]; hlt
    g.memory[0x2000] = 0x77
    assert g.run() == Hlt()
    assert g.vcpu.regs.rax & 0xFF == 0x77
    vm.set_user_memory_region(0, 0, 0, 0)
    with pytest.raises(ValueError, match="no memory slot 0"):
        vm.get_dirty_log(0)


def test_overlapping_slots_are_refused(vm, guest):
    g = guest("f4")
    with pytest.raises(KvmError, match="KVM_SET_USER_MEMORY_REGION: File exists"):
        vm.set_user_memory_region(1, 0x1000, PAGE, _kvm.address_of(g.memory))


def test_read_only_slot_makes_writes_exits(vm, guest):
    need(vm, "READONLY_MEM", lambda: vm.enable_cap("READONLY_MEM"))
    g = guest("c606002001 f4")  # mov byte [0x2000],1; hlt
    vm.set_user_memory_region(0, 0, 0, 0)
    vm.set_user_memory_region(0, 0, 0x1_0000, _kvm.address_of(g.memory), c.KVM_MEM_READONLY)
    assert g.run() == MmioWrite(0x2000, b"\1")
    assert g.memory[0x2000] == 0


def test_set_user_memory_region2(vm, guest):
    need(vm, "USER_MEMORY2", lambda: vm.set_user_memory_region2(0, 0, 0, 0))
    g = guest("67a000000200 f4")  # mov al,[dword 0x20000]; hlt
    with mmap.mmap(-1, PAGE) as extra:
        extra[0] = 0x66
        vm.set_user_memory_region2(1, 0x2_0000, PAGE, _kvm.address_of(extra))
        assert g.run() == Hlt()
        vm.set_user_memory_region2(1, 0x2_0000, 0, 0)
    assert g.vcpu.regs.rax & 0xFF == 0x66


def test_guest_memfd(vm):
    need(vm, "GUEST_MEMFD", lambda: vm.create_guest_memfd(PAGE))
    flags = c.GUEST_MEMFD_FLAG_MMAP | c.GUEST_MEMFD_FLAG_INIT_SHARED
    if vm.check_extension("GUEST_MEMFD_FLAGS") & flags != flags:
        flags = 0
    fd = vm.create_guest_memfd(4 * PAGE, flags)
    try:
        assert os.fstat(fd).st_size == 4 * PAGE
        with mmap.mmap(-1, PAGE) as shared:
            address = _kvm.address_of(shared)
            vm.set_user_memory_region2(3, 0x10_0000, PAGE, address, c.KVM_MEM_GUEST_MEMFD, fd, 2 * PAGE)
            with pytest.raises(KvmError):  # the same part of it twice
                vm.set_user_memory_region2(4, 0x20_0000, PAGE, address, c.KVM_MEM_GUEST_MEMFD, fd, 2 * PAGE)
            vm.set_user_memory_region2(3, 0x10_0000, 0, 0)
    finally:
        os.close(fd)
    with pytest.raises(KvmError, match="KVM_CREATE_GUEST_MEMFD"):
        vm.create_guest_memfd(PAGE + 1)


def test_set_memory_attributes(vm):
    need(vm, "MEMORY_ATTRIBUTES", lambda: vm.set_memory_attributes(0, PAGE, 0))
    vm.set_memory_attributes(0, PAGE, vm.check_extension("MEMORY_ATTRIBUTES"))
    vm.set_memory_attributes(0, PAGE, 0)


def test_pre_fault_memory(vm, guest):
    g = guest("f4")
    need(vm, "PRE_FAULT_MEMORY", lambda: g.vcpu.pre_fault_memory(0, PAGE))
    g.vcpu.pre_fault_memory(0, 0x1_0000)
    with pytest.raises(KvmError, match="KVM_PRE_FAULT_MEMORY"):
        g.vcpu.pre_fault_memory(1 << 40, PAGE)


def test_pre_fault_goes_on_where_the_engine_stopped(fake):
    import ctypes

    def step(address: int) -> int:
        gpa, size = (ctypes.c_uint64.from_address(address + 8 * i) for i in range(2))
        asked.append((gpa.value, size.value))
        if len(asked) == 2:
            return -4  # EINTR
        gpa.value, size.value = gpa.value + PAGE, size.value - PAGE
        return 0

    asked: list[tuple[int, int]] = []
    fake.capabilities[c.Cap.PRE_FAULT_MEMORY] = 1
    fake.answers["KVM_PRE_FAULT_MEMORY"] = step
    fake.vcpu().pre_fault_memory(0, 2 * PAGE)
    assert asked == [(0, 2 * PAGE), (PAGE, PAGE), (PAGE, PAGE)]


def test_wrote_reaches_an_engine_that_wants_it(fake, vm):
    machine = fake.kvm.create_vm()
    machine.wrote(0x1000, 5)
    assert fake.wrote == [(machine.fileno(), 0x1000, 5)]
    vm.wrote(0, 1)  # and one that does not


def test_get_dirty_log(vm, guest):
    g = guest(STORE)
    address = _kvm.address_of(g.memory)
    vm.set_user_memory_region(0, 0, 0x1_0000, address, c.KVM_MEM_LOG_DIRTY_PAGES)
    assert g.run() == Hlt()
    bitmap = vm.get_dirty_log(0)
    assert len(bitmap) == 8  # 16 pages, whole words
    assert bits(bitmap) == {2, 4}
    assert bits(vm.get_dirty_log(0)) == set()
    with pytest.raises(ValueError, match="no memory slot 9"):
        vm.get_dirty_log(9)


def test_get_dirty_log_of_a_slot_that_is_not_logged(vm, guest):
    guest("f4")
    with pytest.raises(KvmError, match="KVM_GET_DIRTY_LOG"):
        vm.get_dirty_log(0)


def test_clear_dirty_log(vm, guest):
    need(vm, "MANUAL_DIRTY_LOG_PROTECT2", lambda: vm.clear_dirty_log(0, b""))
    vm.enable_cap("MANUAL_DIRTY_LOG_PROTECT2", c.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE)
    g = guest(STORE)
    address = _kvm.address_of(g.memory)
    vm.set_user_memory_region(0, 0, 0x1_0000, address, c.KVM_MEM_LOG_DIRTY_PAGES)
    g.run()
    assert bits(vm.get_dirty_log(0)) == {2, 4}
    assert bits(vm.get_dirty_log(0)) == {2, 4}  # reading does not clear any more
    vm.clear_dirty_log(0, bytes([1 << 2, 0]), num_pages=16)
    assert bits(vm.get_dirty_log(0)) == {4}
    vm.clear_dirty_log(0, vm.get_dirty_log(0))
    assert bits(vm.get_dirty_log(0)) == set()
    with pytest.raises(ValueError, match="16 pages need 2 bytes of bitmap, not 1"):
        vm.clear_dirty_log(0, b"\1", num_pages=16)
    with pytest.raises(ValueError, match="has 16 pages, not 64"):
        vm.clear_dirty_log(0, b"\1", first_page=64)


def test_tss_and_identity_map(vm):
    need(vm, "SET_TSS_ADDR", lambda: vm.set_tss_addr(0xFEFF_D000))
    vm.set_identity_map_addr(0xFEFF_C000)
    vm.set_tss_addr(0xFEFF_D000)


def test_identity_map_after_a_vcpu_is_refused(vm):
    need(vm, "SET_IDENTITY_MAP_ADDR", lambda: vm.set_identity_map_addr(0xFEFF_C000))
    vm.create_vcpu()
    with pytest.raises(KvmError, match="KVM_SET_IDENTITY_MAP_ADDR"):
        vm.set_identity_map_addr(0xFEFF_C000)


def test_set_boot_cpu_id(vm):
    need(vm, "SET_BOOT_CPU_ID", lambda: vm.set_boot_cpu_id(1))
    vm.create_irqchip()
    vm.set_boot_cpu_id(1)
    first, second = vm.create_vcpu(0), vm.create_vcpu(1)
    assert first.mp_state == c.KVM_MP_STATE_UNINITIALIZED
    assert second.mp_state == c.KVM_MP_STATE_RUNNABLE
    with pytest.raises(KvmError, match="KVM_SET_BOOT_CPU_ID"):
        vm.set_boot_cpu_id(0)


def test_nr_mmu_pages(vm):
    need(vm, "MMU_SHADOW_CACHE_CONTROL", lambda: vm.nr_mmu_pages)
    vm.nr_mmu_pages = 1024
    try:
        assert vm.nr_mmu_pages == 1024
    except KvmError as e:  # current kernels can set it, but no longer tell it
        assert e.ioctl == "KVM_GET_NR_MMU_PAGES"
    with pytest.raises(KvmError, match="KVM_SET_NR_MMU_PAGES"):
        vm.nr_mmu_pages = 1


def test_clock(vm):
    need(vm, "ADJUST_CLOCK", lambda: vm.clock)
    clock = vm.clock
    clock.clock, clock.flags = 10**18, 0
    vm.clock = clock
    assert vm.clock.clock >= 10**18


def test_tsc_khz_of_the_vm(vm):
    need(vm, "VM_TSC_CONTROL", lambda: vm.tsc_khz)
    khz = vm.tsc_khz
    vm.tsc_khz = khz
    assert vm.tsc_khz == khz


def test_msr_filter(vm):
    need(vm, "X86_MSR_FILTER", lambda: vm.set_msr_filter([]))
    both = c.KVM_MSR_FILTER_READ | c.KVM_MSR_FILTER_WRITE
    vm.set_msr_filter([(both, 0x174, b"\xff"), (c.KVM_MSR_FILTER_READ, 0xC000_0080, b"\1")], default_deny=True)
    vm.set_msr_filter([])
    with pytest.raises(ValueError, match="at most 16 ranges"):
        vm.set_msr_filter([(both, 0x10, b"\1")] * 17)
    with pytest.raises(KvmError, match="KVM_X86_SET_MSR_FILTER"):
        vm.set_msr_filter([], default_deny=True)


def test_pmu_event_filter(vm):
    need(vm, "PMU_EVENT_FILTER", lambda: vm.set_pmu_event_filter([], c.KVM_PMU_EVENT_ALLOW))
    vm.set_pmu_event_filter([0x3C, 0xC0], c.KVM_PMU_EVENT_ALLOW, fixed_counter_bitmap=1)
    with pytest.raises(KvmError, match="KVM_SET_PMU_EVENT_FILTER"):
        vm.set_pmu_event_filter([0x3C], action=99)


def test_memory_encryption_is_passed_on(fake):
    vm = fake.kvm.create_vm()
    command = bytearray(24)

    def fill(address: int) -> int:
        import ctypes

        assert address == _kvm.address_of(command)
        ctypes.c_uint32.from_address(address + 16).value = 7
        return 0

    fake.answers["KVM_MEMORY_ENCRYPT_OP"] = fill
    vm.memory_encrypt_op(command)
    assert command[16] == 7
    vm.memory_encrypt_reg_region(0x1000, 0x2000)
    vm.memory_encrypt_unreg_region(0x1000, 0x2000)
    assert fake.calls[-3:] == [
        "KVM_MEMORY_ENCRYPT_OP",
        "KVM_MEMORY_ENCRYPT_REG_REGION",
        "KVM_MEMORY_ENCRYPT_UNREG_REGION",
    ]
    vcpu = vm.create_vcpu()
    vcpu.memory_encrypt_op(command)
    for handle in vm, vcpu:
        with pytest.raises(ValueError, match="24 bytes are needed, not 23"):
            handle.memory_encrypt_op(bytearray(23))
    fake.answers["KVM_MEMORY_ENCRYPT_OP"] = -25
    with pytest.raises(KvmError, match="KVM_MEMORY_ENCRYPT_OP: Inappropriate ioctl"):
        vm.memory_encrypt_op(None)
    with pytest.raises(BufferError):
        vm.memory_encrypt_op(b"read only")


def test_xen(vm):
    need(vm, "XEN_HVM", lambda: vm.xen_hvm_config(XenHvmConfig()))
    vm.xen_hvm_config(XenHvmConfig(msr=0x4000_0000, flags=c.KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL))
    vm.xen_hvm_set_attr(XenHvmAttr(type=c.KVM_XEN_ATTR_TYPE_LONG_MODE, long_mode=1))
    assert vm.xen_hvm_get_attr(c.KVM_XEN_ATTR_TYPE_LONG_MODE).long_mode == 1


def test_xen_event_channel_without_xen(vm):
    if vm.check_extension("XEN_HVM"):
        with pytest.raises(KvmError):
            vm.xen_hvm_evtchn_send(1, 0)
    else:
        with pytest.raises(CapabilityError, match="KVM_CAP_XEN_HVM"):
            vm.xen_hvm_evtchn_send(1, 0)


def test_devices(vm):
    need(vm, "DEVICE_CTRL", lambda: vm.create_device(c.KVM_DEV_TYPE_VFIO))
    assert not vm.has_device(0x7777)
    with pytest.raises(KvmError, match="KVM_CREATE_DEVICE"):
        vm.create_device(0x7777)
    if not vm.has_device(c.KVM_DEV_TYPE_VFIO):
        pytest.skip("no VFIO device")
    with vm.create_device(c.KVM_DEV_TYPE_VFIO) as device:
        assert device.type == c.KVM_DEV_TYPE_VFIO
        assert device.vm is vm
        assert device.has_device_attr(c.KVM_DEV_VFIO_FILE, c.KVM_DEV_VFIO_FILE_ADD)
        assert not device.has_device_attr(99, 0)
        with pytest.raises(KvmError, match="KVM_SET_DEVICE_ATTR"):
            device.set_device_attr(c.KVM_DEV_VFIO_FILE, c.KVM_DEV_VFIO_FILE_ADD, (2**31 - 1).to_bytes(4, "little"))
    assert device.closed
    with pytest.raises(StateError):
        device.has_device_attr(0, 0)


def test_device_of_another_engine(fake):
    import ctypes

    def create(address: int) -> int:
        ctypes.c_uint32.from_address(address + 4).value = 1777
        return 0

    def get(address: int) -> int:
        ctypes.memmove(ctypes.c_uint64.from_address(address + 16).value, b"value!!!", 8)
        return 0

    fake.capabilities[c.Cap.DEVICE_CTRL] = 1
    fake.answers.update(KVM_CREATE_DEVICE=create, KVM_GET_DEVICE_ATTR=get)
    vm = fake.kvm.create_vm()
    device = vm.create_device(4)
    assert device.fileno() == 1777
    assert device.get_device_attr(1, 2, 5) == b"value"
    vm.close()
    assert 1777 in fake.closed
