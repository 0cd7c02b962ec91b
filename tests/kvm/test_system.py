# SPDX-License-Identifier: Apache-2.0
"""The ioctls of the system handle."""

from __future__ import annotations

import mmap

import pytest

from kvmpy import _kvm
from kvmpy._constants import Cap
from kvmpy._structs import CpuidEntry2
from kvmpy.errors import BackendError, CapabilityError, KvmError

from .fake_engine import FakeEngine


def test_get_api_version(kvm):
    assert kvm.api_version == 12


def test_backend_names_the_engine(backend, kvm):
    assert kvm.backend == backend
    assert kvm.create_vm().create_vcpu().backend == backend


def test_check_extension_takes_names_numbers_and_members(kvm):
    assert kvm.check_extension("IRQCHIP") == kvm.check_extension("KVM_CAP_IRQCHIP")
    assert kvm.check_extension(Cap.IRQCHIP) == kvm.check_extension(0)
    assert kvm.check_extension(Cap.USER_MEMORY) > 0
    assert kvm.check_extension(60_000) == 0
    with pytest.raises(ValueError, match="no KVM_CAP_NONSENSE on x86"):
        kvm.check_extension("NONSENSE")


def test_capabilities_has_them_all(kvm):
    capabilities = kvm.capabilities()
    assert list(capabilities) == [cap.name for cap in Cap]
    assert all(capabilities[cap.name] == kvm.check_extension(cap) for cap in (Cap.IRQCHIP, Cap.NR_MEMSLOTS))


def test_get_vcpu_mmap_size(kvm):
    assert kvm.vcpu_mmap_size >= 2 * mmap.PAGESIZE
    assert kvm.vcpu_mmap_size % mmap.PAGESIZE == 0


def test_get_supported_cpuid(kvm):
    entries = kvm.get_supported_cpuid()
    assert all(isinstance(entry, CpuidEntry2) for entry in entries)
    by_function = {entry.function: entry for entry in entries}
    assert by_function[0].eax >= 1
    assert by_function[1].edx & 1  # an FPU


def test_get_emulated_cpuid(kvm):
    if not kvm.check_extension("EXT_EMUL_CPUID"):
        pytest.skip("no KVM_CAP_EXT_EMUL_CPUID")
    assert {0, 1} <= {entry.function for entry in kvm.get_emulated_cpuid()}


def test_get_supported_hv_cpuid(kvm):
    if not kvm.check_extension("SYS_HYPERV_CPUID"):
        with pytest.raises(CapabilityError, match="KVM_CAP_SYS_HYPERV_CPUID"):
            kvm.get_supported_hv_cpuid()
        pytest.skip("no KVM_CAP_SYS_HYPERV_CPUID")
    assert kvm.get_supported_hv_cpuid()[0].function == 0x4000_0000


def test_a_long_cpuid_list_is_asked_for_again_with_more_room(fake):
    asked = []

    def supported(address: int) -> int:
        import ctypes

        count = ctypes.c_uint32.from_address(address)
        asked.append(count.value)
        if count.value < 200:
            return -7  # E2BIG
        count.value = 200
        return 0

    fake.capabilities[Cap.EXT_CPUID] = 1
    fake.answers["KVM_GET_SUPPORTED_CPUID"] = supported
    assert len(fake.kvm.get_supported_cpuid()) == 200
    assert asked == [64, 128, 256]


def test_an_engine_that_lies_about_a_count_is_caught(fake):
    import ctypes

    def supported(address: int) -> int:
        ctypes.c_uint32.from_address(address).value = 1 << 30
        return 0

    fake.capabilities[Cap.EXT_CPUID] = 1
    fake.answers["KVM_GET_SUPPORTED_CPUID"] = supported
    with pytest.raises(ValueError, match="counts 1073741824 entries"):
        fake.kvm.get_supported_cpuid()


def test_get_msr_index_list(kvm):
    indices = kvm.get_msr_index_list()
    assert 0x10 in indices  # IA32_TIME_STAMP_COUNTER
    assert len(set(indices)) == len(indices)


def test_get_msr_feature_index_list_and_get_msrs(kvm):
    if not kvm.check_extension("GET_MSR_FEATURES"):
        pytest.skip("no KVM_CAP_GET_MSR_FEATURES")
    indices = kvm.get_msr_feature_index_list()
    assert set(kvm.get_msrs(indices)) == set(indices)
    with pytest.raises(KvmError, match=r"KVM_GET_MSRS.*0x7fffffff"):
        kvm.get_msrs([0x7FFF_FFFF])


def test_mce_cap_supported(kvm):
    if not kvm.check_extension("MCE"):
        pytest.skip("no KVM_CAP_MCE")
    assert kvm.mce_cap_supported >= 0


def test_system_attributes(kvm):
    if not kvm.check_extension("SYS_ATTRIBUTES"):
        with pytest.raises(CapabilityError, match="KVM_CAP_SYS_ATTRIBUTES"):
            kvm.has_device_attr(0, 0)
        pytest.skip("no KVM_CAP_SYS_ATTRIBUTES")
    assert kvm.has_device_attr(0, 0)  # KVM_X86_XCOMP_GUEST_SUPP
    assert not kvm.has_device_attr(0, 12345)
    xcr0 = int.from_bytes(kvm.get_device_attr(0, 0), "little")
    assert xcr0 & 1  # x87 state
    with pytest.raises(KvmError, match="KVM_GET_DEVICE_ATTR"):
        kvm.get_device_attr(0, 12345)


def test_create_vm_refuses_types_that_are_not_there(kvm):
    with pytest.raises(KvmError, match="KVM_CREATE_VM"):
        kvm.create_vm(0x7777)


def test_a_device_node_that_is_missing(tmp_path):
    with pytest.raises(KvmError, match="open: No such file") as caught:
        _kvm.Kvm(path=tmp_path / "kvm")
    assert caught.value.errno == 2


def test_a_wrong_capsule_or_version_is_refused():
    with pytest.raises(ValueError):
        _kvm.Kvm(engine=object())
    with FakeEngine(version=99) as fake, pytest.raises(BackendError, match="version 99"):
        _ = fake.kvm
    with FakeEngine() as fake:
        fake.answers["KVM_GET_API_VERSION"] = 11
        with pytest.raises(BackendError, match="API version 11"):
            _ = fake.kvm
        assert fake.closed


def test_address_of():
    buffer = bytearray(16)
    with memoryview(buffer) as view:
        assert _kvm.address_of(view[4:]) == _kvm.address_of(buffer) + 4
    with pytest.raises((BufferError, TypeError, ValueError)):
        _kvm.address_of(b"read only")
    assert _kvm.address_of(b"read only", writable=False) > 0
