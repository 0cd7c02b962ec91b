# SPDX-License-Identifier: Apache-2.0
# cython: auto_pickle=False, autotestdict=False
"""The ioctls that carry a list behind a count: CPUID leaves, MSRs, indices."""

from errno import EINVAL

from cpython.bytearray cimport PyByteArray_AS_STRING
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcpy

from kvmpy._handle cimport Handle, error
from kvmpy._linux_kvm cimport *
from kvmpy._structs cimport Struct

from kvmpy._structs import CpuidEntry2
from kvmpy.errors import KvmError

cdef extern from "kvm_compat.h" nogil:
    struct kvm_msr_entry:
        uint32_t index
        uint32_t reserved
        uint64_t data
    struct kvm_msrs:
        uint32_t nmsrs
        kvm_msr_entry entries[1]

cdef enum:
    NO_E2BIG = -7
    LIST_MAX = 65536    # more entries than any list of KVM's
    MSRS_AT_ONCE = 128  # the kernel takes up to 256 (MAX_IO_MSRS)


cdef bytearray pack(object entries, type cls, size_t header, str what):
    """`entries`, structures of `cls`, behind a header of `header` bytes that starts with their number."""
    cdef list items = list(entries)
    cdef size_t size = cls.layout.size
    cdef bytearray room = bytearray(header + size * len(items))
    cdef char *at = PyByteArray_AS_STRING(room)
    (<uint32_t *> at)[0] = len(items)
    at += header
    for item in items:
        if not isinstance(item, cls):
            raise TypeError(f"{what}: {cls.__name__} are needed, not {type(item).__name__}")
        memcpy(at, (<Struct> item).pointer, size)
        at += size
    return room


cdef list unpack(bytearray room, type cls, size_t header, size_t count):
    cdef list items = []
    cdef Struct made
    cdef size_t i, size = cls.layout.size
    cdef const char *at = PyByteArray_AS_STRING(room) + header
    if header + count * size > <size_t> len(room):
        raise ValueError(f"the engine counts {count} entries, there is room for {(len(room) - header) // size}")
    for i in range(count):
        made = cls.__new__(cls)
        memcpy(made.pointer, at + i * size, size)
        items.append(made)
    return items


cdef list get_cpuid(Handle handle, unsigned long request):
    """A list of CPUID leaves; the kernel says E2BIG until there is room for all."""
    cdef size_t count = 64
    cdef bytearray room
    cdef long result
    while True:
        room = bytearray(8 + count * <size_t> CpuidEntry2.layout.size)
        (<uint32_t *> PyByteArray_AS_STRING(room))[0] = count
        result = handle.try_call(request, <uintptr_t> PyByteArray_AS_STRING(room))
        if result >= 0:
            return unpack(room, CpuidEntry2, 8, (<uint32_t *> PyByteArray_AS_STRING(room))[0])
        if result != NO_E2BIG or count >= LIST_MAX:
            raise error(result, request)
        count *= 2


cdef list get_indices(Handle handle, unsigned long request):
    """A list of MSR indices (u32 count, u32 each) or register ids (u64 count, u64 each)."""
    cdef bint wide = request == KVM_GET_REG_LIST
    cdef size_t item = 8 if wide else 4
    cdef uint64_t count = 0
    cdef bytearray room = bytearray(item)
    cdef char *at
    cdef long result
    cdef size_t i
    while True:
        at = PyByteArray_AS_STRING(room)
        result = handle.try_call(request, <uintptr_t> at)
        count = (<uint64_t *> at)[0] if wide else (<uint32_t *> at)[0]
        if result >= 0:
            break
        if result != NO_E2BIG or count > LIST_MAX or count * item < <size_t> len(room):
            raise error(result, request)
        room = bytearray(item * (1 + count))
        at = PyByteArray_AS_STRING(room)
        if wide:
            (<uint64_t *> at)[0] = count
        else:
            (<uint32_t *> at)[0] = count
    count = min(count, <uint64_t> (len(room) // item - 1))
    if wide:
        return [(<uint64_t *> at)[1 + i] for i in range(count)]
    return [(<uint32_t *> at)[1 + i] for i in range(count)]


cdef dict get_msrs(Handle handle, object indices):
    cdef list wanted = list(indices)
    cdef dict values = {}
    cdef bytearray room = bytearray(8 + sizeof(kvm_msr_entry) * min(len(wanted), MSRS_AT_ONCE))
    cdef kvm_msrs *msrs = <kvm_msrs *> PyByteArray_AS_STRING(room)
    cdef size_t start, i, count
    cdef long done
    for start in range(0, len(wanted), MSRS_AT_ONCE):
        count = min(len(wanted) - start, <size_t> MSRS_AT_ONCE)
        msrs.nmsrs = count
        for i in range(count):
            msrs.entries[i].index = wanted[start + i]
            msrs.entries[i].reserved = 0
        done = handle.call(KVM_GET_MSRS, <uintptr_t> msrs)
        if done < <long> count:
            raise KvmError(EINVAL, "KVM_GET_MSRS", f"MSR {wanted[start + done]:#x} cannot be read")
        for i in range(count):
            values[msrs.entries[i].index] = msrs.entries[i].data
    return values


cdef int set_msrs(Handle handle, object values) except -1:
    cdef list pairs = list(values.items())
    cdef bytearray room = bytearray(8 + sizeof(kvm_msr_entry) * min(len(pairs), MSRS_AT_ONCE))
    cdef kvm_msrs *msrs = <kvm_msrs *> PyByteArray_AS_STRING(room)
    cdef size_t start, i, count
    cdef long done
    for start in range(0, len(pairs), MSRS_AT_ONCE):
        count = min(len(pairs) - start, <size_t> MSRS_AT_ONCE)
        msrs.nmsrs = count
        for i in range(count):
            msrs.entries[i].index, msrs.entries[i].data = pairs[start + i]
            msrs.entries[i].reserved = 0
        done = handle.call(KVM_SET_MSRS, <uintptr_t> msrs)
        if done < <long> count:
            index, value = pairs[start + done]
            raise KvmError(EINVAL, "KVM_SET_MSRS", f"MSR {index:#x} cannot be set to {value:#x}")
    return 0
