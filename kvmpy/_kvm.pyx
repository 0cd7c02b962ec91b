# SPDX-License-Identifier: Apache-2.0
# cython: auto_pickle=False, autotestdict=False, nonecheck=True
"""The KVM API (Documentation/virt/kvm/api.rst): a method or property per ioctl of Kvm, Vm, Vcpu and Device."""

from os import fsencode

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.stdint cimport uint64_t, uintptr_t

from kvmpy._handle cimport Handle, capability_number
from kvmpy._linux_kvm cimport *
from kvmpy._lists cimport get_cpuid, get_indices, get_msrs

from kvmpy._constants import Cap
from kvmpy._device import Device
from kvmpy._stats import Stat, Stats
from kvmpy._vcpu_state import HostCode
from kvmpy._vcpu import Vcpu
from kvmpy._vm import Vm
from kvmpy.errors import BackendError, KvmError

globals()["Handle"] = Handle  # a cimported name is not yet an attribute of the module


cdef class Kvm(Handle):
    """The KVM subsystem: /dev/kvm, or another engine that speaks its ABI."""

    vm_class = Vm

    def __init__(self, engine=None, path=None):
        """Open `engine`: None for the kernel's (at `path`, normally /dev/kvm), else a "kvmpy.engine" capsule."""
        cdef const kvmpy_engine *door = &kvmpy_kernel_engine
        cdef bytes encoded = None if path is None else fsencode(path)
        cdef int handle
        if engine is not None:
            door = <const kvmpy_engine *> PyCapsule_GetPointer(engine, KVMPY_ENGINE_CAPSULE)
            if door.version != KVMPY_ENGINE_VERSION:
                raise BackendError(f"the engine has version {door.version}, kvmpy speaks {KVMPY_ENGINE_VERSION}")
        handle = door.open(<const char *> encoded if encoded is not None else NULL)
        if handle < 0:
            raise KvmError(-handle, "open", path or "/dev/kvm")
        self.start(door, handle, None)
        self.engine_capsule = engine
        if self.call(KVM_GET_API_VERSION, 0) != 12:
            raise BackendError(f"KVM API version {self.api_version}, kvmpy needs 12")

    @property
    def api_version(self):
        """12 since Linux 2.6.22.

        KVM_GET_API_VERSION, api.rst 4.1.
        """
        return self.call(KVM_GET_API_VERSION, 0)

    cdef long capability(self, int number) except -1:
        return self.call(KVM_CHECK_EXTENSION, number)

    cdef int attributes(self) except -1:
        return KVM_CAP_SYS_ATTRIBUTES

    def check_extension(self, cap):
        """What the engine offers of a capability: 0 for nothing.

        KVM_CHECK_EXTENSION, api.rst 4.4.

        `cap` is a Cap, a number, or a name: "IRQCHIP".
        """
        return self.capability(capability_number(cap))

    def capabilities(self):
        """Every capability by name, with what check_extension() says of it."""
        return {cap.name: self.capability(cap) for cap in Cap}

    @property
    def vcpu_mmap_size(self):
        """Bytes of a vCPU's kvm_run area.

        KVM_GET_VCPU_MMAP_SIZE, api.rst 4.5.
        """
        return self.call(KVM_GET_VCPU_MMAP_SIZE, 0)

    def get_supported_cpuid(self):
        """The CPUID leaves that this host and KVM support, a list of CpuidEntry2.

        KVM_GET_SUPPORTED_CPUID, api.rst 4.46; needs KVM_CAP_EXT_CPUID.
        """
        self.need(KVM_CAP_EXT_CPUID, KVM_GET_SUPPORTED_CPUID)
        return get_cpuid(self, KVM_GET_SUPPORTED_CPUID)

    def get_emulated_cpuid(self):
        """The CPUID leaves of what KVM emulates in software.

        KVM_GET_EMULATED_CPUID, api.rst 4.88; needs KVM_CAP_EXT_EMUL_CPUID.
        """
        self.need(KVM_CAP_EXT_EMUL_CPUID, KVM_GET_EMULATED_CPUID)
        return get_cpuid(self, KVM_GET_EMULATED_CPUID)

    def get_supported_hv_cpuid(self):
        """The Hyper-V CPUID leaves that KVM can offer.

        KVM_GET_SUPPORTED_HV_CPUID, api.rst 4.118; needs KVM_CAP_SYS_HYPERV_CPUID.
        """
        self.need(KVM_CAP_SYS_HYPERV_CPUID, KVM_GET_SUPPORTED_HV_CPUID)
        return get_cpuid(self, KVM_GET_SUPPORTED_HV_CPUID)

    def get_msr_index_list(self):
        """The MSRs of a guest that Vcpu.get_msrs() knows.

        KVM_GET_MSR_INDEX_LIST, api.rst 4.3.
        """
        return get_indices(self, KVM_GET_MSR_INDEX_LIST)

    def get_msr_feature_index_list(self):
        """The MSRs that describe features of the host, for get_msrs() here.

        KVM_GET_MSR_FEATURE_INDEX_LIST, api.rst 4.3; needs KVM_CAP_GET_MSR_FEATURES.
        """
        self.need(KVM_CAP_GET_MSR_FEATURES, KVM_GET_MSR_FEATURE_INDEX_LIST)
        return get_indices(self, KVM_GET_MSR_FEATURE_INDEX_LIST)

    def get_msrs(self, indices):
        """Feature MSRs of the host as a dict of index to value.

        KVM_GET_MSRS, api.rst 4.18; needs KVM_CAP_GET_MSR_FEATURES.
        """
        self.need(KVM_CAP_GET_MSR_FEATURES, KVM_GET_MSRS)
        return get_msrs(self, indices)

    @property
    def mce_cap_supported(self):
        """The MCG_CAP bits that Vcpu.setup_mce() may use.

        KVM_X86_GET_MCE_CAP_SUPPORTED, api.rst 4.104; needs KVM_CAP_MCE.
        """
        cdef uint64_t bits = 0
        self.need(KVM_CAP_MCE, KVM_X86_GET_MCE_CAP_SUPPORTED)
        self.call(KVM_X86_GET_MCE_CAP_SUPPORTED, <uintptr_t> &bits)
        return bits

    def create_vm(self, unsigned long type=0):
        """A new virtual machine, an instance of `vm_class`.

        KVM_CREATE_VM, api.rst 4.2.
        """
        return self.vm_class(self, type)


def address_of(buffer, *, writable=True):
    """The host address of `buffer`, for memory slots and device attributes; the caller keeps the buffer alive."""
    cdef Py_buffer view
    PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE if writable else PyBUF_SIMPLE)
    try:
        return <uintptr_t> view.buf
    finally:
        PyBuffer_Release(&view)
