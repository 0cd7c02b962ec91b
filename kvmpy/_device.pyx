# SPDX-License-Identifier: Apache-2.0
# cython: auto_pickle=False, autotestdict=False, nonecheck=True
"""An in-kernel device made by KVM_CREATE_DEVICE; on x86 that is VFIO's link to KVM."""

from libc.stdint cimport int32_t, uint32_t, uintptr_t

from kvmpy._handle cimport Handle
from kvmpy._linux_kvm cimport *

cdef extern from "kvm_compat.h" nogil:
    struct kvm_create_device:
        uint32_t type
        uint32_t fd
        uint32_t flags
    enum: KVM_CREATE_DEVICE_TEST


cdef class Device(Handle):
    """A device in the kernel, made by Vm.create_device(); it is spoken to by its attributes."""

    cdef readonly int type          # KVM_DEV_TYPE_*

    def __init__(self, Handle vm not None, int type):
        """A device of `type`, e.g. KVM_DEV_TYPE_VFIO.

        KVM_CREATE_DEVICE, api.rst 4.79.
        """
        cdef kvm_create_device request
        vm.need(KVM_CAP_DEVICE_CTRL, KVM_CREATE_DEVICE)
        request.type, request.fd, request.flags = type, 0, 0
        vm.call_nogil(KVM_CREATE_DEVICE, <uintptr_t> &request)
        self.type = type
        self.start(vm.engine, request.fd, vm)

    @staticmethod
    def exists(Handle vm not None, int type):
        """Can `vm` have a device of `type`?

        KVM_CREATE_DEVICE with KVM_CREATE_DEVICE_TEST.
        """
        cdef kvm_create_device request
        vm.need(KVM_CAP_DEVICE_CTRL, KVM_CREATE_DEVICE)
        request.type, request.fd, request.flags = type, 0, KVM_CREATE_DEVICE_TEST
        return vm.try_call(KVM_CREATE_DEVICE, <uintptr_t> &request) >= 0

    @property
    def vm(self):
        """The Vm that the device belongs to."""
        return self.parent
