# SPDX-License-Identifier: Apache-2.0
# cython: auto_pickle=False, autotestdict=False, nonecheck=True
"""The statistics of a VM or vCPU: the binary file of KVM_GET_STATS_FD (api.rst 4.133), read by name."""

from collections import namedtuple

from cpython.bytearray cimport PyByteArray_AS_STRING
from libc.stddef cimport size_t
from libc.stdint cimport int16_t, uint16_t, uint32_t, uint64_t

from kvmpy._handle cimport Handle, error
from kvmpy._linux_kvm cimport *

cdef extern from "kvm_compat.h" nogil:
    """
    #define KVMPY_STATS_NAME offsetof(struct kvm_stats_desc, name)
    """
    enum: KVMPY_STATS_NAME
    struct kvm_stats_header:
        uint32_t flags
        uint32_t name_size
        uint32_t num_desc
        uint32_t id_offset
        uint32_t desc_offset
        uint32_t data_offset
    struct kvm_stats_desc:
        uint32_t flags
        int16_t exponent
        uint16_t size
        uint32_t offset
        uint32_t bucket_size
        char name[1]
    enum: KVM_STATS_TYPE_MASK, KVM_STATS_UNIT_MASK, KVM_STATS_BASE_MASK
    enum: KVM_STATS_TYPE_SHIFT, KVM_STATS_UNIT_SHIFT, KVM_STATS_BASE_SHIFT, KVM_STATS_BASE_POW2

cdef enum:
    FILE_MAX = 1 << 24      # no statistics file is anywhere near this

cdef tuple KINDS = ("cumulative", "instant", "peak", "linear histogram", "log histogram")
cdef tuple UNITS = ("", "bytes", "seconds", "cycles", "boolean")

Stat = namedtuple("Stat", "name kind unit base exponent size offset bucket_size", module=__name__)
Stat.__doc__ = "A statistic: its values are in `unit` times `base` to the power of `exponent`, `size` of them."


cdef class Stats(Handle):
    """The open statistics of a VM or vCPU: `stats` says what there is, read() gives the values."""

    def __init__(self, Handle owner not None):
        """Open the statistics of `owner` and read what they are (KVM_GET_STATS_FD)."""
        cdef kvm_stats_header *header
        cdef bytearray room, table
        cdef uint32_t i, name_size, count
        cdef const kvm_stats_desc *desc
        cdef size_t step
        cdef list stats = []
        owner.need(KVM_CAP_BINARY_STATS_FD, KVM_GET_STATS_FD)
        self.start(owner.engine, owner.call_nogil(KVM_GET_STATS_FD, 0), owner)
        room = self.take(sizeof(kvm_stats_header), 0)
        header = <kvm_stats_header *> PyByteArray_AS_STRING(room)
        name_size, count = header.name_size, header.num_desc
        self.data_offset = header.data_offset
        step = KVMPY_STATS_NAME + name_size
        if step * count > FILE_MAX:
            raise ValueError(f"the statistics say they have {count} descriptors of {step} bytes")
        self.id = self.take(name_size, header.id_offset).split(b"\0")[0].decode()
        table = self.take(step * count, header.desc_offset)
        for i in range(count):
            desc = <const kvm_stats_desc *> (PyByteArray_AS_STRING(table) + i * step)
            name = bytes(table[i * step + KVMPY_STATS_NAME:(i + 1) * step]).split(b"\0")[0].decode()
            stats.append(Stat(
                name,
                pick(KINDS, (desc.flags & KVM_STATS_TYPE_MASK) >> KVM_STATS_TYPE_SHIFT),
                pick(UNITS, (desc.flags & KVM_STATS_UNIT_MASK) >> KVM_STATS_UNIT_SHIFT),
                2 if desc.flags & KVM_STATS_BASE_MASK == KVM_STATS_BASE_POW2 else 10,
                desc.exponent, desc.size, desc.offset, desc.bucket_size,
            ))
            self.data_size = max(self.data_size, <size_t> desc.offset + 8 * <size_t> desc.size)
        if self.data_size > FILE_MAX:
            raise ValueError(f"the statistics say they have {self.data_size} bytes of data")
        self.stats = tuple(stats)

    cdef bytearray take(self, size_t size, size_t offset):
        """Exactly `size` bytes of the file."""
        cdef bytearray room
        cdef long count
        if size > FILE_MAX:
            raise ValueError(f"the statistics say they have {size} bytes")
        room = bytearray(size)
        self.enter()
        count = self.engine.pread(self.handle, PyByteArray_AS_STRING(room), size, offset)
        self.leave()
        if count < 0:
            raise error(count, KVM_GET_STATS_FD)
        if <size_t> count != size:
            raise ValueError(f"the statistics end {size - count} bytes too early")
        return room

    def read(self):
        """The values now: a dict of name to int, or to a list of ints for a histogram."""
        cdef bytearray data = self.take(self.data_size, self.data_offset)
        cdef const char *at = PyByteArray_AS_STRING(data)
        cdef size_t i
        cdef dict values = {}
        for stat in self.stats:
            numbers = [(<const uint64_t *> (at + <size_t> stat.offset))[i] for i in range(stat.size)]
            values[stat.name] = numbers[0] if stat.size == 1 else numbers
        return values


cdef str pick(tuple names, uint32_t number):
    return names[number] if number < <uint32_t> len(names) else f"unknown {number}"
