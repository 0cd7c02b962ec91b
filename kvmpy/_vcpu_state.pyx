# SPDX-License-Identifier: Apache-2.0
# cython: auto_pickle=False, autotestdict=False, nonecheck=True
"""The state of a vCPU: what KVM_GET_* and KVM_SET_* of a vCPU read and write."""

from errno import E2BIG, ENOENT
from collections import namedtuple

from libc.stddef cimport size_t
from libc.stdint cimport uint16_t, uint32_t, uint64_t, uintptr_t
from cpython.bytearray cimport PyByteArray_AS_STRING

from kvmpy._handle cimport Handle, error
from kvmpy._linux_kvm cimport *
from kvmpy._lists cimport get_cpuid, get_indices, get_msrs, pack, set_msrs
from kvmpy._structs cimport Struct, resize

from kvmpy._structs import (
    CpuidEntry, CpuidEntry2, Debugregs, Fpu, LapicState, MpState, NestedState, Regs, Sregs, Sregs2, Translation,
    VcpuEvents, X86Mce, Xcrs, Xsave, XenVcpuAttr,
)

cdef extern from "kvm_compat.h" nogil:
    struct kvm_one_reg:
        uint64_t id
        uint64_t addr

cdef extern from "tcg/profile.h" nogil:
    enum: KVMPY_CAP_TCG_PROFILE
    const unsigned long KVMPY_GET_HOST_CODE
    const unsigned long KVMPY_GET_HOST_NAME
    const unsigned long KVMPY_GET_HANDLER_CALLS
    struct kvmpy_host_code:
        uint64_t address
        uint64_t buffer
        uint32_t size
        uint32_t out_of_line
        uint64_t host
        uint32_t guest_bytes
        uint32_t insns
        uint16_t at[64]
    struct kvmpy_host_name:
        uint64_t address
        char name[56]
    struct kvmpy_handler_call:
        char name[24]
        uint64_t all
        uint64_t slow
    struct kvmpy_handler_calls:
        uint32_t count
        kvmpy_handler_call *call

HostCode = namedtuple("HostCode", "address code out_of_line guest_bytes starts", module=__name__)
HostCode.__doc__ = """Host code of a block: where it runs, its bytes, how many are out of line besides, the bytes of guest code that it is
of, and where the code of each guest instruction begins (empty when that was not recorded)."""

# Looked up once: these are on hot paths.
cdef type _Regs = Regs
cdef type _Sregs = Sregs


cdef class VcpuState(Handle):
    """The registers and the other state of a vCPU. Not while it runs: then StateError."""

    @property
    def regs(self):
        """General registers, RIP and RFLAGS.

        KVM_GET_REGS, KVM_SET_REGS, api.rst 4.11, 4.12.
        """
        return self.get(_Regs, KVM_GET_REGS)

    @regs.setter
    def regs(self, value):
        self.put(_Regs, value, KVM_SET_REGS)

    @property
    def sregs(self):
        """Segments, tables and control registers.

        KVM_GET_SREGS, KVM_SET_SREGS, api.rst 4.13, 4.14.
        """
        return self.get(_Sregs, KVM_GET_SREGS)

    @sregs.setter
    def sregs(self, value):
        self.put(_Sregs, value, KVM_SET_SREGS)

    @property
    def sregs2(self):
        """The same with the PAE page directory pointers.

        KVM_GET_SREGS2, KVM_SET_SREGS2, api.rst 4.131, 4.132; needs KVM_CAP_SREGS2.
        """
        self.need(KVM_CAP_SREGS2, KVM_GET_SREGS2)
        return self.get(Sregs2, KVM_GET_SREGS2)

    @sregs2.setter
    def sregs2(self, value):
        self.need(KVM_CAP_SREGS2, KVM_SET_SREGS2)
        self.put(Sregs2, value, KVM_SET_SREGS2)

    @property
    def fpu(self):
        """x87 and SSE registers.

        KVM_GET_FPU, KVM_SET_FPU, api.rst 4.22, 4.23.
        """
        return self.get(Fpu, KVM_GET_FPU)

    @fpu.setter
    def fpu(self, value):
        self.put(Fpu, value, KVM_SET_FPU)

    @property
    def xsave(self):
        """The extended state in the processor's XSAVE format.

        KVM_GET_XSAVE2 or KVM_GET_XSAVE, KVM_SET_XSAVE; needs KVM_CAP_XSAVE.

        Its size is 4096 bytes, or more when features were enabled with arch_prctl (api.rst 4.42, 4.43, 4.134).
        """
        cdef Struct area = Xsave.__new__(Xsave)
        cdef long size = self.capability(KVM_CAP_XSAVE2)
        if size > 0:
            if <size_t> size > area.size:
                resize(area, size)
            self.call(KVM_GET_XSAVE2, <uintptr_t> area.pointer)
        else:
            self.need(KVM_CAP_XSAVE, KVM_GET_XSAVE)
            self.call(KVM_GET_XSAVE, <uintptr_t> area.pointer)
        return area

    @xsave.setter
    def xsave(self, value):
        self.need(KVM_CAP_XSAVE, KVM_SET_XSAVE)
        cdef long size = self.capability(KVM_CAP_XSAVE2)
        # The kernel reads as much as it would write: less than that would be read from beyond the buffer.
        if isinstance(value, Xsave) and <long> (<Struct> value).size < size:
            raise ValueError(f"KVM_SET_XSAVE: {size} bytes are needed, not {(<Struct> value).size}")
        self.put(Xsave, value, KVM_SET_XSAVE)

    @property
    def xcrs(self):
        """Extended control registers, XCR0.

        KVM_GET_XCRS, KVM_SET_XCRS, api.rst 4.44, 4.45; needs KVM_CAP_XCRS.
        """
        self.need(KVM_CAP_XCRS, KVM_GET_XCRS)
        return self.get(Xcrs, KVM_GET_XCRS)

    @xcrs.setter
    def xcrs(self, value):
        self.need(KVM_CAP_XCRS, KVM_SET_XCRS)
        self.put(Xcrs, value, KVM_SET_XCRS)

    @property
    def debugregs(self):
        """DR0-3, DR6, DR7 of the guest.

        KVM_GET_DEBUGREGS, KVM_SET_DEBUGREGS, api.rst 4.33, 4.34; needs KVM_CAP_DEBUGREGS.
        """
        self.need(KVM_CAP_DEBUGREGS, KVM_GET_DEBUGREGS)
        return self.get(Debugregs, KVM_GET_DEBUGREGS)

    @debugregs.setter
    def debugregs(self, value):
        self.need(KVM_CAP_DEBUGREGS, KVM_SET_DEBUGREGS)
        self.put(Debugregs, value, KVM_SET_DEBUGREGS)

    @property
    def lapic(self):
        """The registers of the in-kernel local APIC.

        KVM_GET_LAPIC, KVM_SET_LAPIC, api.rst 4.57, 4.58; needs KVM_CAP_IRQCHIP.
        """
        self.need(KVM_CAP_IRQCHIP, KVM_GET_LAPIC)
        return self.get(LapicState, KVM_GET_LAPIC)

    @lapic.setter
    def lapic(self, value):
        self.need(KVM_CAP_IRQCHIP, KVM_SET_LAPIC)
        self.put(LapicState, value, KVM_SET_LAPIC)

    @property
    def mp_state(self):
        """KVM_MP_STATE_*: running, halted, waiting for SIPI, ....

        KVM_GET_MP_STATE, KVM_SET_MP_STATE, api.rst 4.38, 4.39; needs KVM_CAP_MP_STATE.
        """
        self.need(KVM_CAP_MP_STATE, KVM_GET_MP_STATE)
        return self.get(MpState, KVM_GET_MP_STATE).mp_state

    @mp_state.setter
    def mp_state(self, uint32_t value):
        self.need(KVM_CAP_MP_STATE, KVM_SET_MP_STATE)
        self.put(MpState, MpState(mp_state=value), KVM_SET_MP_STATE)

    @property
    def vcpu_events(self):
        """Pending exceptions, interrupts, NMI, SMI.

        KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS, api.rst 4.31, 4.32; needs KVM_CAP_VCPU_EVENTS.
        """
        self.need(KVM_CAP_VCPU_EVENTS, KVM_GET_VCPU_EVENTS)
        return self.get(VcpuEvents, KVM_GET_VCPU_EVENTS)

    @vcpu_events.setter
    def vcpu_events(self, value):
        self.need(KVM_CAP_VCPU_EVENTS, KVM_SET_VCPU_EVENTS)
        self.put(VcpuEvents, value, KVM_SET_VCPU_EVENTS)

    @property
    def cpuid(self):
        """What CPUID shows the guest, a list of CpuidEntry2.

        KVM_GET_CPUID2, KVM_SET_CPUID2, api.rst 4.20; needs KVM_CAP_EXT_CPUID.
        """
        self.need(KVM_CAP_EXT_CPUID, KVM_GET_CPUID2)
        return get_cpuid(self, KVM_GET_CPUID2)

    @cpuid.setter
    def cpuid(self, entries):
        self.need(KVM_CAP_EXT_CPUID, KVM_SET_CPUID2)
        cdef bytearray room = pack(entries, CpuidEntry2, 8, "KVM_SET_CPUID2")
        self.call(KVM_SET_CPUID2, <uintptr_t> PyByteArray_AS_STRING(room))

    def set_cpuid(self, entries):
        """The old form without subleaves, a list of CpuidEntry; prefer `cpuid`.

        KVM_SET_CPUID, api.rst 4.20.
        """
        cdef bytearray room = pack(entries, CpuidEntry, 8, "KVM_SET_CPUID")
        self.call(KVM_SET_CPUID, <uintptr_t> PyByteArray_AS_STRING(room))

    def get_msrs(self, indices):
        """The MSRs `indices` as a dict of index to value.

        KVM_GET_MSRS, api.rst 4.18.

        KvmError names the first that cannot be read. Kvm.get_msr_index_list() has those that can.
        """
        return get_msrs(self, indices)

    def set_msrs(self, values):
        """Set MSRs from a mapping of index to value; KvmError names the first refused.

        KVM_SET_MSRS, api.rst 4.19.
        """
        set_msrs(self, values)

    def get_reg_list(self):
        """The ids of the registers that get_one_reg() knows, except MSRs.

        KVM_GET_REG_LIST, api.rst 4.84; needs KVM_CAP_ONE_REG.
        """
        self.need(KVM_CAP_ONE_REG, KVM_GET_REG_LIST)
        return get_indices(self, KVM_GET_REG_LIST)

    def get_one_reg(self, uint64_t id):
        """The register `id` (KVM_REG_X86 | size | type << 32 | index) as an int.

        KVM_GET_ONE_REG, api.rst 4.69; needs KVM_CAP_ONE_REG.
        """
        cdef kvm_one_reg reg
        cdef bytearray value = bytearray(1 << ((id & KVM_REG_SIZE_MASK) >> KVM_REG_SIZE_SHIFT))
        self.need(KVM_CAP_ONE_REG, KVM_GET_ONE_REG)
        reg.id, reg.addr = id, <uintptr_t> PyByteArray_AS_STRING(value)
        self.call(KVM_GET_ONE_REG, <uintptr_t> &reg)
        return int.from_bytes(value, "little")

    def set_one_reg(self, uint64_t id, value):
        """Set the register `id`.

        KVM_SET_ONE_REG, api.rst 4.68; needs KVM_CAP_ONE_REG.
        """
        cdef kvm_one_reg reg
        cdef bytearray room = bytearray(value.to_bytes(1 << ((id & KVM_REG_SIZE_MASK) >> KVM_REG_SIZE_SHIFT), "little"))
        self.need(KVM_CAP_ONE_REG, KVM_SET_ONE_REG)
        reg.id, reg.addr = id, <uintptr_t> PyByteArray_AS_STRING(room)
        self.call(KVM_SET_ONE_REG, <uintptr_t> &reg)

    @property
    def nested_state(self):
        """The state of nested virtualisation.

        KVM_GET_NESTED_STATE, KVM_SET_NESTED_STATE, api.rst 4.114, 4.115; needs KVM_CAP_NESTED_STATE.
        """
        self.need(KVM_CAP_NESTED_STATE, KVM_GET_NESTED_STATE)
        cdef Struct room = NestedState.__new__(NestedState)
        resize(room, max(self.capability(KVM_CAP_NESTED_STATE), <long> room.size))
        (<object> room).size = room.size
        self.call(KVM_GET_NESTED_STATE, <uintptr_t> room.pointer)
        return NestedState.from_bytes(bytes(room)[:max((<object> room).size, <long> NestedState.layout.size)])

    @nested_state.setter
    def nested_state(self, value):
        self.need(KVM_CAP_NESTED_STATE, KVM_SET_NESTED_STATE)
        if isinstance(value, NestedState) and value.size > (<Struct> value).size:
            raise ValueError(f"KVM_SET_NESTED_STATE: it says {value.size} bytes and has {(<Struct> value).size}")
        self.put(NestedState, value, KVM_SET_NESTED_STATE)

    @property
    def tsc_khz(self):
        """The frequency of the guest's TSC in kHz.

        KVM_GET_TSC_KHZ, KVM_SET_TSC_KHZ, api.rst 4.56, 4.55; needs KVM_CAP_GET_TSC_KHZ.
        """
        self.need(KVM_CAP_GET_TSC_KHZ, KVM_GET_TSC_KHZ)
        return self.call(KVM_GET_TSC_KHZ, 0)

    @tsc_khz.setter
    def tsc_khz(self, unsigned long khz):
        self.need(KVM_CAP_TSC_CONTROL, KVM_SET_TSC_KHZ)
        self.call(KVM_SET_TSC_KHZ, khz)

    def translate(self, uint64_t address):
        """Walk the guest's page tables for linear `address`: a Translation.

        KVM_TRANSLATE, api.rst 4.15.
        """
        walk = Translation(linear_address=address)
        self.call(KVM_TRANSLATE, <uintptr_t> (<Struct> walk).pointer)
        return walk

    def profile(self, bint on):
        """Count calls of the interpreter's handlers by host code, and record which instruction host code is of, or stop.

        The software CPU's own (tcg/profile.h).
        """
        self.enable(KVM_CAP_ENABLE_CAP, KVMPY_CAP_TCG_PROFILE, (on,), 0)

    def host_code(self, uint64_t address):
        """The host code of the block at linear `address`: a HostCode, or None where there is none.

        The software CPU's own (tcg/profile.h).
        """
        cdef kvmpy_host_code found
        cdef bytearray room = bytearray(4096)
        cdef long result
        self.need(KVMPY_CAP_TCG_PROFILE, KVMPY_GET_HOST_CODE)
        while True:
            found.address, found.size = address, <uint32_t> len(room)
            found.buffer = <uintptr_t> PyByteArray_AS_STRING(room)
            result = self.try_call(KVMPY_GET_HOST_CODE, <uintptr_t> &found)
            if result == -ENOENT:
                return None
            if result < 0:
                raise error(result, KVMPY_GET_HOST_CODE)
            if found.size <= <uint32_t> len(room):
                break
            room = bytearray(found.size)
        starts = tuple([found.at[i] for i in range(min(found.insns, <uint32_t> 64))])
        return HostCode(found.host, bytes(room[:found.size]), found.out_of_line, found.guest_bytes, starts)

    def host_name(self, uint64_t address):
        """What an address in host code means, as text; "" where it is nothing known.

        The software CPU's own (tcg/profile.h).
        """
        cdef kvmpy_host_name found
        cdef long result
        self.need(KVMPY_CAP_TCG_PROFILE, KVMPY_GET_HOST_NAME)
        found.address = address
        result = self.try_call(KVMPY_GET_HOST_NAME, <uintptr_t> &found)
        if result < 0 and result != -ENOENT:
            raise error(result, KVMPY_GET_HOST_NAME)
        return found.name.decode() if result == 0 else ""

    def handler_calls(self):
        """How often host code called handlers since profile(True): name to (as a whole, out of line).

        The software CPU's own (tcg/profile.h).
        """
        cdef kvmpy_handler_calls *found
        cdef kvmpy_handler_call *call
        cdef bytearray room
        cdef uint32_t i, count = 256
        cdef long result = -E2BIG
        cdef dict calls = {}
        self.need(KVMPY_CAP_TCG_PROFILE, KVMPY_GET_HANDLER_CALLS)
        while result == -E2BIG:
            room = bytearray(sizeof(uint64_t) + count * sizeof(kvmpy_handler_call))
            found = <kvmpy_handler_calls *> PyByteArray_AS_STRING(room)
            found.count = count
            result = self.try_call(KVMPY_GET_HANDLER_CALLS, <uintptr_t> found)
            count = found.count
        if result == -ENOENT:
            return calls
        if result < 0:
            raise error(result, KVMPY_GET_HANDLER_CALLS)
        for i in range(count):  # several lines of the table have one name
            call = &found.call[i]
            whole, slow = calls.get(call.name.decode(), (0, 0))
            calls[call.name.decode()] = whole + call.all, slow + call.slow
        return calls

    def setup_mce(self, uint64_t mcg_cap):
        """Give the guest machine check banks as in MCG_CAP.

        KVM_X86_SETUP_MCE, api.rst 4.105; needs KVM_CAP_MCE.
        """
        self.need(KVM_CAP_MCE, KVM_X86_SETUP_MCE)
        self.call(KVM_X86_SETUP_MCE, <uintptr_t> &mcg_cap)

    def set_mce(self, event):
        """Inject a machine check, an X86Mce.

        KVM_X86_SET_MCE, api.rst 4.106; needs KVM_CAP_MCE.
        """
        self.need(KVM_CAP_MCE, KVM_X86_SET_MCE)
        self.put(X86Mce, event, KVM_X86_SET_MCE)

    def xen_vcpu_get_attr(self, int type):
        """The Xen attribute KVM_XEN_VCPU_ATTR_TYPE_* as a XenVcpuAttr.

        KVM_XEN_VCPU_GET_ATTR, api.rst 4.129; needs KVM_CAP_XEN_HVM.
        """
        self.need(KVM_CAP_XEN_HVM, KVM_XEN_VCPU_GET_ATTR)
        attr = XenVcpuAttr(type=type)
        self.put(XenVcpuAttr, attr, KVM_XEN_VCPU_GET_ATTR)
        return attr

    def xen_vcpu_set_attr(self, attr):
        """Set a Xen attribute.

        KVM_XEN_VCPU_SET_ATTR, api.rst 4.128; needs KVM_CAP_XEN_HVM.
        """
        self.need(KVM_CAP_XEN_HVM, KVM_XEN_VCPU_SET_ATTR)
        self.put(XenVcpuAttr, attr, KVM_XEN_VCPU_SET_ATTR)

    def get_supported_hv_cpuid(self):
        """The Hyper-V CPUID leaves that KVM can offer this vCPU.

        KVM_GET_SUPPORTED_HV_CPUID, api.rst 4.118; needs KVM_CAP_HYPERV_CPUID.
        """
        self.need(KVM_CAP_HYPERV_CPUID, KVM_GET_SUPPORTED_HV_CPUID)
        return get_cpuid(self, KVM_GET_SUPPORTED_HV_CPUID)
