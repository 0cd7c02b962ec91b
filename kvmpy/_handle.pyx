# SPDX-License-Identifier: Apache-2.0
# cython: auto_pickle=False, autotestdict=False, nonecheck=True
"""What Kvm, Vm, Vcpu and Device have in common: one checked door to the engine, capabilities, life and death."""

from errno import ENOSYS, ENXIO, EPERM
from weakref import ref

from cpython.bytearray cimport PyByteArray_AS_STRING
from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t, uintptr_t
from libc.string cimport memset

from kvmpy._linux_kvm cimport *
from kvmpy._structs cimport Struct

from kvmpy._constants import IOCTLS, Cap
from kvmpy.errors import CapabilityError, KvmError, StateError

cdef dict IOCTL_NAMES = {request: name for name, request in IOCTLS.items()}


cdef extern from "kvm_compat.h" nogil:
    struct kvm_enable_cap:
        uint32_t cap
        uint32_t flags
        uint64_t args[4]
    struct kvm_device_attr:
        uint32_t flags
        uint32_t group
        uint64_t attr
        uint64_t addr


cdef int capability_number(object cap) except -1:
    """A capability as its number: from Cap, int, "IRQCHIP" or "KVM_CAP_IRQCHIP"."""
    if isinstance(cap, str):
        try:
            return Cap[cap.removeprefix("KVM_CAP_")]
        except KeyError:
            raise ValueError(f"there is no KVM_CAP_{cap.removeprefix('KVM_CAP_')} on x86") from None
    if cap < 0:
        raise ValueError(f"there is no capability {cap}")
    return cap


cdef str capability_name(int number):
    try:
        return f"KVM_CAP_{Cap(number).name}"
    except ValueError:
        return f"capability {number}"


cdef object error(long code, unsigned long request):
    """The exception for a negative result."""
    return KvmError(-code, IOCTL_NAMES.get(request, f"ioctl {request:#x}"))


cdef class Handle:
    """Base of Kvm, Vm, Vcpu and Device: an open handle of the engine."""

    def __cinit__(self):
        self.handle = -1
        self.gate = &self.own_gate
        self.children = set()

    cdef int start(self, const kvmpy_engine *engine, int handle, Handle parent) except -1:
        if self.handle >= 0:
            engine.close(handle)
            raise StateError(f"this {type(self).__name__} is open already")
        self.engine = engine
        self.handle = handle
        self.parent = parent
        if parent is not None:
            parent.children.add(ref(self, parent.children.discard))
        return 0

    # The door. Short ioctls keep the GIL: giving it up and getting it back costs more than they do, and under load
    # a whole switch interval.

    cdef int enter(self) except -1:
        cdef int blocked
        if self.handle < 0:
            raise StateError(f"{type(self).__name__} is closed")
        blocked = gate_enter(self.gate)
        if blocked:
            raise StateError(f"{type(self).__name__} is {'closed' if blocked & GATE_CLOSED else 'running'}")
        return 0

    cdef void leave(self) noexcept:
        gate_leave(self.gate)

    cdef long try_call(self, unsigned long request, uintptr_t arg) except? -1:
        """One ioctl; a negative result is -errno."""
        cdef long result
        self.enter()
        result = self.engine.ioctl(self.handle, request, arg)
        self.leave()
        return result

    cdef long call(self, unsigned long request, uintptr_t arg) except -1:
        """One ioctl that must succeed."""
        cdef long result = self.try_call(request, arg)
        if result < 0:
            raise error(result, request)
        return result

    cdef long try_call_nogil(self, unsigned long request, uintptr_t arg) except? -1:
        """The same for one that can take long; `arg` must point to memory that nobody moves meanwhile."""
        cdef long result
        self.enter()
        with nogil:
            result = self.engine.ioctl(self.handle, request, arg)
        self.leave()
        return result

    cdef long call_nogil(self, unsigned long request, uintptr_t arg) except -1:
        """One that must succeed and can take long."""
        cdef long result = self.try_call_nogil(request, arg)
        if result < 0:
            raise error(result, request)
        return result

    cdef object get(self, type cls, unsigned long request):
        """A structure that the engine fills."""
        cdef Struct made = cls.__new__(cls)
        self.call(request, <uintptr_t> made.pointer)
        return made

    cdef int put(self, type cls, object value, unsigned long request) except -1:
        """Give the engine a structure."""
        if not isinstance(value, cls):
            raise TypeError(f"{IOCTL_NAMES[request]}: a {cls.__name__} is needed, not {type(value).__name__}")
        self.call(request, <uintptr_t> (<Struct> value).pointer)
        return 0

    # Capabilities

    cdef long capability(self, int number) except -1:
        """KVM_CHECK_EXTENSION on this handle; overridden where a parent must answer."""
        return self.parent.capability(number)

    cdef int need(self, int number, unsigned long request) except -1:
        """CapabilityError unless the engine has the capability. What is there stays there, so it is asked once."""
        if number < 256 and self.known[number]:
            return 0
        if self.capability(number) <= 0:
            raise CapabilityError(ENOSYS, IOCTL_NAMES.get(request, "?"), capability_name(number))
        if number < 256:
            self.known[number] = 1
        return 0

    cdef int enable(self, int needs, object cap, tuple args, uint32_t flags) except -1:
        """KVM_ENABLE_CAP of a VM or vCPU, which itself needs a capability."""
        cdef kvm_enable_cap request
        cdef int number = capability_number(cap), i
        if len(args) > 4:
            raise ValueError(f"KVM_ENABLE_CAP takes up to 4 arguments, not {len(args)}")
        self.need(needs, KVM_ENABLE_CAP)
        self.need(number, KVM_ENABLE_CAP)
        memset(&request, 0, sizeof(request))
        request.cap, request.flags = number, flags
        for i in range(len(args)):
            request.args[i] = args[i]
        self.call_nogil(KVM_ENABLE_CAP, <uintptr_t> &request)
        return 0

    # Attributes: what KVM_*_DEVICE_ATTR of a system, VM, vCPU or device handle reads and writes

    cdef int attributes(self) except -1:
        """The capability that the attributes of this kind of handle need."""
        return KVM_CAP_DEVICE_CTRL

    cdef long attribute(self, unsigned long request, uint32_t group, uint64_t number, uintptr_t address) except? -1:
        cdef kvm_device_attr attr
        self.need(self.attributes(), request)
        attr.flags, attr.group, attr.attr, attr.addr = 0, group, number, address
        return self.try_call(request, <uintptr_t> &attr)

    def has_device_attr(self, group, attr):
        """Is there an attribute `attr` in `group` (KVM_HAS_DEVICE_ATTR, api.rst 4.81)?"""
        cdef long result = self.attribute(KVM_HAS_DEVICE_ATTR, group, attr, 0)
        if result < 0 and result not in (-ENXIO, -EPERM):
            raise error(result, KVM_HAS_DEVICE_ATTR)
        return result >= 0

    def get_device_attr(self, group, attr, size=8):
        """The `size` bytes of an attribute; how many it has stands with its device.

        KVM_GET_DEVICE_ATTR, api.rst 4.80.
        """
        # The kernel does not know our size: room for a page more than asked for costs nothing.
        cdef bytearray room = bytearray(size + 4096)
        cdef long result = self.attribute(KVM_GET_DEVICE_ATTR, group, attr, <uintptr_t> PyByteArray_AS_STRING(room))
        if result < 0:
            raise error(result, KVM_GET_DEVICE_ATTR)
        return bytes(room[:size])

    def set_device_attr(self, group, attr, data=b""):
        """Set an attribute from bytes (KVM_SET_DEVICE_ATTR, api.rst 4.80)."""
        cdef bytearray room = bytearray(data)
        cdef size_t size = len(room)
        room.extend(bytes(4096))  # as above
        cdef long result = self.attribute(
            KVM_SET_DEVICE_ATTR, group, attr, <uintptr_t> PyByteArray_AS_STRING(room) if size else 0)
        if result < 0:
            raise error(result, KVM_SET_DEVICE_ATTR)

    # Life and death

    @property
    def closed(self):
        """Has close() been called?"""
        return self.handle < 0

    @property
    def backend(self):
        """The engine's name: "kvm" or "tcg"."""
        return self.engine.name.decode() if self.engine != NULL else ""

    def fileno(self):
        """The engine's handle: a file descriptor on the kernel engine."""
        if self.handle < 0:
            raise StateError(f"{type(self).__name__} is closed")
        return self.handle

    cdef int finish(self) except -1:
        """Release what the handle owns besides itself; called once, with the gate closed."""
        return 0

    def close(self):
        """Close the children, then this; again does nothing.

        StateError while another thread is inside, e.g. a vCPU runs.
        """
        if self.handle < 0:
            return
        for weak in list(self.children):
            child = weak()
            if child is not None:
                child.close()
        if self.handle < 0:  # a child that owns its parent closed it
            return
        if gate_take(self.gate, GATE_CLOSED):
            raise StateError(f"{type(self).__name__} is in use by another thread; kick and join it first")
        self.shut()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def __dealloc__(self):
        # Nobody else can hold this handle now, nor be inside. Children hold their parents, so they are gone.
        if self.handle >= 0:
            self.engine.close(self.handle)
            self.handle = -1

    cdef int shut(self) except -1:
        cdef int handle = self.handle, result
        self.finish()
        self.handle = -1
        with nogil:
            result = self.engine.close(handle)
        if result < 0:
            raise error(result, 0)
        return 0
