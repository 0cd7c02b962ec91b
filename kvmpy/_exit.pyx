# SPDX-License-Identifier: Apache-2.0
# cython: auto_pickle=False, autotestdict=False, nonecheck=True
"""The base of the exits, and the kvm_run area that an exit is answered in."""

cimport cython
from cpython.bytes cimport PyBytes_GET_SIZE
from libc.stddef cimport size_t

from kvmpy._linux_kvm cimport *

from kvmpy.errors import StateError

cdef extern from "kvm_compat.h" nogil:
    """
    _Static_assert(offsetof(struct kvm_run, kvm_valid_regs) == 8 * 36, "RUN_HEAD in _exit.pxd");
    """


@cython.no_gc
cdef class RunPage:
    """The kvm_run area of a vCPU."""


def _hex(value):
    return f"{value:#x}" if isinstance(value, int) and not isinstance(value, bool) and value > 9 else repr(value)


@cython.no_gc
cdef class Exit:
    """Base of all exits. `reason` is the KVM_EXIT_* number, `flags` is kvm_run.flags (KVM_RUN_X86_SMM, ...)."""

    __match_args__ = ()
    reason = KVM_EXIT_UNKNOWN

    def __repr__(self):
        parts = [f"{name}={_hex(getattr(self, name))}" for name in self.__match_args__]
        return f"{type(self).__name__}({', '.join(parts)})"

    def __eq__(self, other):
        if type(other) is not type(self):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in self.__match_args__)

    __hash__ = None

    @property
    def current(self):
        """Is this the exit that its vCPU stands at, so that it can be answered?"""
        return self.page is not None and self.page.run != NULL and self.page.generation == self.generation

    cdef kvm_run *claim(self) except? NULL:
        """kvm_run for writing an answer; NULL for an exit made by hand. Must be followed by release()."""
        if self.page is None:
            if self.generation:
                raise StateError("an exit of the history cannot be answered")
            return NULL
        cdef int blocked = gate_enter(&self.page.gate)
        if blocked or self.page.generation != self.generation:
            if not blocked:
                gate_leave(&self.page.gate)
            raise StateError(f"{type(self).__name__} is no longer the current exit of its vCPU")
        return self.page.run

    cdef void release(self) noexcept:
        if self.page is not None:
            gate_leave(&self.page.gate)


cdef bytes answer_bytes(object value, size_t size, size_t count, str what):
    """An answer as bytes: an int for one item, bytes for any number of them."""
    if isinstance(value, int):
        if count != 1:
            raise TypeError(f"{what}: {count} items are read at once: answer with {size * count} bytes")
        try:
            return (<object> value).to_bytes(size, "little")
        except OverflowError:
            raise ValueError(f"{what}: {value:#x} does not fit in {size} bytes") from None
    cdef bytes data = bytes(memoryview(value))
    if <size_t> PyBytes_GET_SIZE(data) != size * count:
        raise ValueError(f"{what}: {size * count} bytes are needed, not {PyBytes_GET_SIZE(data)}")
    return data
