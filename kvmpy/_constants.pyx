# SPDX-License-Identifier: Apache-2.0
# cython: autotestdict=False
"""The numbers of <linux/kvm.h> by their own names: KVM_MEM_READONLY, ...; `Cap.IRQCHIP`; `IOCTLS` by name."""

from enum import IntEnum

from libc.stdint cimport uint64_t

cdef extern from "constants.h" nogil:
    struct kvmpy_constant:
        const char *name
        uint64_t value
    const kvmpy_constant kvmpy_capabilities[1]
    const kvmpy_constant kvmpy_ioctls[1]
    const kvmpy_constant kvmpy_constants[1]
    enum: KVMPY_CAPABILITY_COUNT, KVMPY_IOCTL_COUNT, KVMPY_CONSTANT_COUNT


cdef dict table(const kvmpy_constant *rows, size_t count):
    cdef size_t i
    return {rows[i].name.decode(): rows[i].value for i in range(count)}


cdef dict caps = table(kvmpy_capabilities, KVMPY_CAPABILITY_COUNT)

Cap = IntEnum("Cap", {name.removeprefix("KVM_CAP_"): value for name, value in caps.items()}, module=__name__)
Cap.__doc__ = "KVM_CAP_* by name: Cap.IRQCHIP is KVM_CAP_IRQCHIP."

IOCTLS = table(kvmpy_ioctls, KVMPY_IOCTL_COUNT)

globals().update(table(kvmpy_constants, KVMPY_CONSTANT_COUNT))
