# SPDX-License-Identifier: Apache-2.0
"""Every state of a vCPU can be read, written and read again."""

from __future__ import annotations

import pytest

from kvmpy import _constants as c
from kvmpy._structs import CpuidEntry, CpuidEntry2, Fpu, Regs, Sregs, VcpuEvents, X86Mce, XenVcpuAttr, Xsave
from kvmpy.errors import CapabilityError, KvmError


def need(handle, name: str, use) -> None:
    """Skip if the engine lacks a capability, but only after it was named in a CapabilityError."""
    if not handle.vm.check_extension(name):
        with pytest.raises(CapabilityError) as caught:
            use()
        assert caught.value.capability == f"KVM_CAP_{name}"
        pytest.skip(f"no KVM_CAP_{name}")


def test_regs(vcpu):
    wanted = Regs(**{name: 0x1111_0000_0000_0000 + i for i, name in enumerate(Regs.layout.fields)})
    wanted.rflags = 0x202
    vcpu.regs = wanted
    assert vcpu.regs == wanted
    with pytest.raises(TypeError, match="KVM_SET_REGS: a Regs is needed, not Sregs"):
        vcpu.regs = Sregs()


def test_sregs(vcpu):
    sregs = vcpu.sregs
    assert (sregs.cs.selector, sregs.cs.base) == (0xF000, 0xFFFF_0000)  # reset state
    sregs.cs.base, sregs.cs.selector = 0x1_0000, 0x1000
    sregs.cr2 = 0x1234_5000
    vcpu.sregs = sregs
    assert vcpu.sregs.cs.base == 0x1_0000
    assert vcpu.sregs.cr2 == 0x1234_5000


def test_sregs_that_cannot_be_are_refused(vcpu):
    sregs = vcpu.sregs
    sregs.cr4 = 1 << 63
    with pytest.raises(KvmError, match="KVM_SET_SREGS") as caught:
        vcpu.sregs = sregs
    assert caught.value.ioctl == "KVM_SET_SREGS"


def test_sregs2(vcpu):
    need(vcpu, "SREGS2", lambda: vcpu.sregs2)
    sregs = vcpu.sregs2
    assert sregs.cs.base == 0xFFFF_0000
    sregs.gdt.base = 0x5000
    vcpu.sregs2 = sregs
    assert vcpu.sregs2.gdt.base == 0x5000


def test_fpu(vcpu):
    fpu = Fpu(fcw=0x37F, mxcsr=0x1F80)
    fpu.xmm[5] = bytes(range(16))
    vcpu.fpu = fpu
    assert vcpu.fpu.xmm[5] == bytes(range(16))
    assert vcpu.fpu.fcw == 0x37F


def test_xsave(vcpu):
    """Offsets: SDM volume 1, table 10-2 (legacy area) and 13.4.2 (XSTATE_BV)."""
    need(vcpu, "XSAVE", lambda: vcpu.xsave)
    area = bytearray(bytes(vcpu.xsave))
    assert len(area) == max(vcpu.vm.check_extension("XSAVE2"), 4096)
    area[512] |= 3  # x87 and SSE state are there
    area[176:192] = b"0123456789abcdef"  # XMM1
    vcpu.xsave = Xsave.from_bytes(area)
    assert vcpu.fpu.xmm[1] == b"0123456789abcdef"
    assert bytes(vcpu.xsave)[176:192] == b"0123456789abcdef"


def test_xsave2_of_another_size(fake):
    fake.capabilities.update({c.Cap.XSAVE: 1, c.Cap.XSAVE2: 8192})
    vcpu = fake.vcpu()
    assert len(vcpu.xsave) == 8192
    assert fake.calls[-1] == "KVM_GET_XSAVE2"
    with pytest.raises(ValueError, match="8192 bytes are needed, not 4096"):
        vcpu.xsave = Xsave()
    vcpu.xsave = Xsave(tail=bytes(4096))
    fake.capabilities[c.Cap.XSAVE2] = 0
    assert len(vcpu.xsave) == 4096
    assert fake.calls[-1] == "KVM_GET_XSAVE"


def test_xcrs(vcpu):
    need(vcpu, "XCRS", lambda: vcpu.xcrs)
    xcrs = vcpu.xcrs
    assert xcrs.xcrs[0].value & 1
    vcpu.xcrs = xcrs
    assert vcpu.xcrs == xcrs


def test_debugregs(vcpu):
    need(vcpu, "DEBUGREGS", lambda: vcpu.debugregs)
    debugregs = vcpu.debugregs
    debugregs.db = [0x1000, 0x2000, 0x3000, 0x4000]
    vcpu.debugregs = debugregs
    assert vcpu.debugregs.db == [0x1000, 0x2000, 0x3000, 0x4000]


def test_lapic(chips):
    vcpu = chips.create_vcpu(3)
    lapic = vcpu.lapic
    assert lapic.regs[0x20:0x24] == (3 << 24).to_bytes(4, "little")  # the id register has the APIC id
    registers = bytearray(lapic.regs)
    registers[0x80] = 0x20  # task priority
    lapic.regs = registers
    vcpu.lapic = lapic
    assert vcpu.lapic.regs[0x80] == 0x20


def test_lapic_without_a_chip_is_refused(vcpu):
    with pytest.raises(KvmError, match="KVM_GET_LAPIC"):
        _ = vcpu.lapic


def test_mp_state(chips):
    first, second = chips.create_vcpu(), chips.create_vcpu()
    assert first.mp_state == c.KVM_MP_STATE_RUNNABLE
    assert second.mp_state == c.KVM_MP_STATE_UNINITIALIZED
    second.mp_state = c.KVM_MP_STATE_HALTED
    assert second.mp_state == c.KVM_MP_STATE_HALTED
    with pytest.raises(KvmError, match="KVM_SET_MP_STATE"):
        second.mp_state = 1000


def test_vcpu_events(vcpu):
    need(vcpu, "VCPU_EVENTS", lambda: vcpu.vcpu_events)
    events = vcpu.vcpu_events
    events.nmi.masked = 1
    vcpu.vcpu_events = events
    assert vcpu.vcpu_events.nmi.masked == 1
    assert isinstance(events, VcpuEvents)


def test_cpuid(vcpu):
    assert vcpu.cpuid == []
    vcpu.cpuid = vcpu.vm.kvm.get_supported_cpuid()
    assert 1 in {entry.function for entry in vcpu.cpuid}
    with pytest.raises(TypeError, match="KVM_SET_CPUID2: CpuidEntry2 are needed, not CpuidEntry"):
        vcpu.cpuid = [CpuidEntry()]


def test_set_cpuid_of_the_old_form(vcpu):
    vcpu.set_cpuid([CpuidEntry(function=0, eax=1, ebx=0x1234), CpuidEntry(function=1, eax=0x600)])
    leaves = {entry.function: entry for entry in vcpu.cpuid}
    assert leaves[0].ebx == 0x1234
    assert leaves[1].eax == 0x600


def test_msrs(vcpu):
    vcpu.set_msrs({0x174: 0x10, 0x175: 0x8000, 0x176: 0x9000})
    assert vcpu.get_msrs([0x174, 0x175, 0x176]) == {0x174: 0x10, 0x175: 0x8000, 0x176: 0x9000}
    assert vcpu.get_msrs([]) == {}


def test_msr_that_is_refused_is_named(vcpu):
    with pytest.raises(KvmError, match="MSR 0x7fffffff cannot be read"):
        vcpu.get_msrs([0x174, 0x7FFF_FFFF, 0x175])
    with pytest.raises(KvmError, match="MSR 0x7fffffff cannot be set to 0x5"):
        vcpu.set_msrs({0x174: 0, 0x7FFF_FFFF: 5})


def test_more_msrs_than_go_at_once(vcpu):
    assert len(vcpu.get_msrs([0x174] * 300 + [0x175])) == 2


def test_all_msrs_of_the_index_list(vcpu):
    vcpu.cpuid = vcpu.vm.kvm.get_supported_cpuid()
    indices = vcpu.vm.kvm.get_msr_index_list()
    assert list(vcpu.get_msrs(indices)) == indices


def test_one_reg(vcpu):
    msr = c.KVM_REG_X86 | c.KVM_REG_SIZE_U64 | c.KVM_X86_REG_TYPE_MSR << 32 | 0x174
    need(vcpu, "ONE_REG", lambda: vcpu.get_one_reg(msr))
    vcpu.set_one_reg(msr, 0x55)
    assert vcpu.get_one_reg(msr) == 0x55
    assert vcpu.get_msrs([0x174]) == {0x174: 0x55}
    assert isinstance(vcpu.get_reg_list(), list)
    with pytest.raises(KvmError, match="KVM_GET_ONE_REG"):
        vcpu.get_one_reg(c.KVM_REG_X86 | c.KVM_REG_SIZE_U64 | 99 << 32)
    with pytest.raises(OverflowError):
        vcpu.set_one_reg(msr, 1 << 64)


def test_reg_list_grows(fake):
    import ctypes

    def registers(address: int) -> int:
        words = (ctypes.c_uint64 * 4).from_address(address) if asked else ctypes.c_uint64.from_address(address)
        if not asked:
            words.value = 3
            asked.append(1)
            return -7  # E2BIG
        assert words[0] == 3
        words[1:4] = [5, 6, 7]
        return 0

    asked: list[int] = []
    fake.capabilities[c.Cap.ONE_REG] = 1
    fake.answers["KVM_GET_REG_LIST"] = registers
    assert fake.vcpu().get_reg_list() == [5, 6, 7]


def test_nested_state(vcpu):
    need(vcpu, "NESTED_STATE", lambda: vcpu.nested_state)
    state = vcpu.nested_state
    assert state.size <= vcpu.vm.check_extension("NESTED_STATE")
    vcpu.nested_state = state


def test_nested_state_has_the_size_that_the_engine_says(fake):
    import ctypes

    def get(address: int) -> int:
        assert ctypes.c_uint32.from_address(address + 4).value == 4224
        ctypes.c_uint32.from_address(address + 4).value = 1128
        ctypes.memset(address + 128, 0x5A, 1000)
        return 0

    fake.capabilities[c.Cap.NESTED_STATE] = 4224
    fake.answers["KVM_GET_NESTED_STATE"] = get
    vcpu = fake.vcpu()
    state = vcpu.nested_state
    assert (state.size, len(state), state.tail) == (1128, 1128, b"\x5a" * 1000)
    vcpu.nested_state = state
    state.size = 2000
    with pytest.raises(ValueError, match="it says 2000 bytes and has 1128"):
        vcpu.nested_state = state


def test_tsc_khz(vcpu):
    need(vcpu, "GET_TSC_KHZ", lambda: vcpu.tsc_khz)
    khz = vcpu.tsc_khz
    assert khz > 0
    need(vcpu, "TSC_CONTROL", lambda: setattr(vcpu, "tsc_khz", khz))
    vcpu.tsc_khz = khz
    assert vcpu.tsc_khz == khz


def test_translate(guest):
    vcpu = guest("f4").vcpu
    found = vcpu.translate(0x1234)
    assert (found.physical_address, found.valid) == (0x1234, 1)


def test_translate_through_page_tables(guest):
    g = guest("f4")
    g.enter_ring3()
    found = g.vcpu.translate(0x5678)
    assert (found.physical_address, found.valid) == (0x5678, 1)
    assert not g.vcpu.translate(1 << 40).valid


def test_mce(vcpu):
    need(vcpu, "MCE", lambda: vcpu.setup_mce(1))
    vcpu.setup_mce(10)
    assert vcpu.get_msrs([0x179])[0x179] & 0xFF == 10  # IA32_MCG_CAP
    vcpu.set_mce(X86Mce(bank=2, status=1 << 63, addr=0x1234))
    assert vcpu.get_msrs([0x40A])[0x40A] == 0x1234  # IA32_MC2_ADDR
    with pytest.raises(KvmError, match="KVM_X86_SETUP_MCE"):
        vcpu.setup_mce(255)


def test_xen_attributes(vcpu):
    need(vcpu, "XEN_HVM", lambda: vcpu.xen_vcpu_get_attr(c.KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID))
    attr = XenVcpuAttr(type=c.KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID, vcpu_id=5)
    vcpu.xen_vcpu_set_attr(attr)
    assert vcpu.xen_vcpu_get_attr(c.KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID).vcpu_id == 5


def test_supported_hv_cpuid(vcpu):
    need(vcpu, "HYPERV_CPUID", vcpu.get_supported_hv_cpuid)
    assert vcpu.get_supported_hv_cpuid()[0].function == 0x4000_0000


def test_vcpu_attributes(vcpu):
    need(vcpu, "VCPU_ATTRIBUTES", lambda: vcpu.has_device_attr(0, 0))
    assert vcpu.has_device_attr(c.KVM_VCPU_TSC_CTRL, c.KVM_VCPU_TSC_OFFSET)
    offset = vcpu.get_device_attr(c.KVM_VCPU_TSC_CTRL, c.KVM_VCPU_TSC_OFFSET)
    assert len(offset) == 8
    vcpu.set_device_attr(c.KVM_VCPU_TSC_CTRL, c.KVM_VCPU_TSC_OFFSET, offset)
    assert not vcpu.has_device_attr(99, 99)


def test_cpuid_leaves_are_structures():
    entry = CpuidEntry2(function=7, index=1, flags=c.KVM_CPUID_FLAG_SIGNIFCANT_INDEX)
    assert (entry.function, entry.index, entry.flags) == (7, 1, 1)
