# SPDX-License-Identifier: Apache-2.0
# cython: auto_pickle=False, autotestdict=False, nonecheck=True
"""A virtual machine: its memory, its vCPUs and what concerns all of it. Its interrupt chips are in _vm_irq.pyx."""

from threading import Lock

from cpython.bytearray cimport PyByteArray_AS_STRING
from libc.stddef cimport size_t
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memset

from kvmpy._handle cimport Handle, capability_number, error
from kvmpy._linux_kvm cimport *
from kvmpy._structs cimport Struct
from kvmpy._vm_irq cimport VmIrq

from kvmpy._constants import Cap
from kvmpy._device import Device
from kvmpy._stats import Stats
from kvmpy._structs import ClockData, XenHvmAttr, XenHvmConfig
from kvmpy._vcpu import Vcpu
from kvmpy.errors import StateError

cdef extern from "kvm_compat.h" nogil:
    """
    #define KVMPY_PMU_FILTER_HEAD offsetof(struct kvm_pmu_event_filter, events)
    """
    struct kvm_userspace_memory_region:
        uint32_t slot
        uint32_t flags
        uint64_t guest_phys_addr
        uint64_t memory_size
        uint64_t userspace_addr
    struct kvm_userspace_memory_region2:
        uint32_t slot
        uint32_t flags
        uint64_t guest_phys_addr
        uint64_t memory_size
        uint64_t userspace_addr
        uint64_t guest_memfd_offset
        uint32_t guest_memfd
    struct kvm_dirty_log:
        uint32_t slot
        void *dirty_bitmap
    struct kvm_clear_dirty_log:
        uint32_t slot
        uint32_t num_pages
        uint64_t first_page
        void *dirty_bitmap
    struct kvm_memory_attributes:
        uint64_t address
        uint64_t size
        uint64_t attributes
        uint64_t flags
    struct kvm_create_guest_memfd:
        uint64_t size
        uint64_t flags
    struct kvm_enc_region:
        uint64_t addr
        uint64_t size
    struct kvm_msr_filter_range:
        uint32_t flags
        uint32_t nmsrs
        uint32_t base
        uint8_t *bitmap
    struct kvm_msr_filter:
        uint32_t flags
        kvm_msr_filter_range ranges[16]
    struct kvm_pmu_event_filter:
        uint32_t action
        uint32_t nevents
        uint32_t fixed_counter_bitmap
        uint32_t flags
        uint64_t events[1]
    struct kvm_irq_routing_xen_evtchn:
        uint32_t port
        uint32_t vcpu
        uint32_t priority
    enum: KVM_MSR_FILTER_MAX_RANGES, KVM_MSR_FILTER_DEFAULT_DENY, KVM_MSR_FILTER_DEFAULT_ALLOW
    enum: KVMPY_PMU_FILTER_HEAD

cdef enum:
    PAGE = 4096
    DIRTY_ENTRY = 16        # sizeof(struct kvm_dirty_gfn)
    ENCRYPT_COMMAND = 24    # sizeof(struct kvm_sev_cmd), sizeof(struct kvm_tdx_cmd)


cdef class Vm(VmIrq):
    """A virtual machine, made by Kvm.create_vm(): memory slots, chips, vCPUs.

    `vcpu_class` is what create_vcpu() makes; a subclass may name its own.
    """

    vcpu_class = Vcpu

    def __cinit__(self):
        self.ids = set()
        self.slots = {}
        self.slots_lock = Lock()

    def __init__(self, Handle kvm not None, unsigned long type=0):
        """A machine of `type` (KVM_X86_DEFAULT_VM, ...) on an open `kvm`.

        KVM_CREATE_VM, api.rst 4.2.
        """
        self.start(kvm.engine, kvm.call_nogil(KVM_CREATE_VM, type), kvm)

    @property
    def kvm(self):
        """The Kvm that this machine belongs to."""
        return self.parent

    # Capabilities

    cdef long capability(self, int number) except -1:
        return self.call(KVM_CHECK_EXTENSION, number)

    cdef int attributes(self) except -1:
        return KVM_CAP_VM_ATTRIBUTES

    def check_extension(self, cap):
        """What this machine offers of a capability: 0 for nothing.

        KVM_CHECK_EXTENSION, api.rst 4.4.
        """
        return self.capability(capability_number(cap))

    def capabilities(self):
        """Every capability by name, with what check_extension() says of it."""
        return {cap.name: self.capability(cap) for cap in Cap}

    def enable_cap(self, cap, *args, flags=0):
        """Enable a capability of the machine, with up to 4 arguments.

        KVM_ENABLE_CAP, api.rst 4.37 and section 7; needs KVM_CAP_ENABLE_CAP_VM.

        E.g. enable_cap("SPLIT_IRQCHIP", 24), enable_cap(Cap.X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_FILTER).
        """
        self.enable(KVM_CAP_ENABLE_CAP_VM, cap, args, flags)

    # vCPUs and devices

    def create_vcpu(self, id=None):
        """A new vCPU with APIC id `id` (None: the first free one), an instance of `vcpu_class`.

        KVM_CREATE_VCPU, api.rst 4.7.
        """
        if id is None:
            # An id stays taken when its vCPU is closed, until the VM is.
            taken = self.ids | {vcpu.id for vcpu in self.vcpus}
            id = next(i for i in range(len(taken) + 1) if i not in taken)
        vcpu = self.vcpu_class(self, id)
        self.ids.add(id)
        return vcpu

    @property
    def vcpus(self):
        """The open vCPUs in the order of their ids."""
        alive = [weak() for weak in list(self.children)]
        return sorted((v for v in alive if isinstance(v, Vcpu) and not v.closed), key=lambda vcpu: vcpu.id)

    def set_boot_cpu_id(self, unsigned long id):
        """Which vCPU is the bootstrap processor, before any is created.

        KVM_SET_BOOT_CPU_ID, api.rst 4.41; needs KVM_CAP_SET_BOOT_CPU_ID.
        """
        self.need(KVM_CAP_SET_BOOT_CPU_ID, KVM_SET_BOOT_CPU_ID)
        self.call(KVM_SET_BOOT_CPU_ID, id)

    def create_device(self, int type):
        """An in-kernel device of `type`, KVM_DEV_TYPE_VFIO: a Device.

        KVM_CREATE_DEVICE, api.rst 4.79.
        """
        return Device(self, type)

    def has_device(self, int type):
        """Could create_device() make a device of `type`?

        KVM_CREATE_DEVICE_TEST.
        """
        return Device.exists(self, type)

    # Memory slots

    def set_user_memory_region(self, uint32_t slot, uint64_t gpa, uint64_t size, uintptr_t hva, uint32_t flags=0):
        """Put host memory [hva, hva + size) at guest address `gpa` as `slot`.

        KVM_SET_USER_MEMORY_REGION, api.rst 4.35.

        `size` 0 removes the slot. `flags` are KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY. The caller keeps the host
        memory mapped as long as the slot is there.
        """
        cdef kvm_userspace_memory_region region
        region.slot, region.flags = slot, flags
        region.guest_phys_addr, region.memory_size, region.userspace_addr = gpa, size, hva
        with self.slots_lock:
            self.call_nogil(KVM_SET_USER_MEMORY_REGION, <uintptr_t> &region)
            self.note_slot(slot, size)

    def set_user_memory_region2(self, uint32_t slot, uint64_t gpa, uint64_t size, uintptr_t hva, uint32_t flags=0,
                                int guest_memfd=-1, uint64_t guest_memfd_offset=0):
        """The same with private memory from a guest_memfd.

        KVM_SET_USER_MEMORY_REGION2, api.rst 4.140; needs KVM_CAP_USER_MEMORY2.
        """
        cdef kvm_userspace_memory_region2 region
        self.need(KVM_CAP_USER_MEMORY2, KVM_SET_USER_MEMORY_REGION2)
        memset(&region, 0, sizeof(region))
        region.slot, region.flags = slot, flags
        region.guest_phys_addr, region.memory_size, region.userspace_addr = gpa, size, hva
        region.guest_memfd_offset = guest_memfd_offset
        region.guest_memfd = <uint32_t> guest_memfd if guest_memfd >= 0 else 0
        with self.slots_lock:
            self.call_nogil(KVM_SET_USER_MEMORY_REGION2, <uintptr_t> &region)
            self.note_slot(slot, size)

    cdef int note_slot(self, uint32_t slot, uint64_t size) except -1:
        if size:
            self.slots[slot] = size
        else:
            self.slots.pop(slot, None)
        return 0

    def create_guest_memfd(self, uint64_t size, uint64_t flags=0):
        """A file descriptor of guest memory that the host cannot see.

        KVM_CREATE_GUEST_MEMFD, api.rst 4.142; needs KVM_CAP_GUEST_MEMFD.

        The caller closes it. `flags` are GUEST_MEMFD_FLAG_* that KVM_CAP_GUEST_MEMFD_FLAGS offers.
        """
        cdef kvm_create_guest_memfd request
        self.need(KVM_CAP_GUEST_MEMFD, KVM_CREATE_GUEST_MEMFD)
        memset(&request, 0, sizeof(request))
        request.size, request.flags = size, flags
        return self.call_nogil(KVM_CREATE_GUEST_MEMFD, <uintptr_t> &request)

    def set_memory_attributes(self, uint64_t gpa, uint64_t size, uint64_t attributes):
        """Make [gpa, gpa + size) private (KVM_MEMORY_ATTRIBUTE_PRIVATE) or shared, 0.

        KVM_SET_MEMORY_ATTRIBUTES, api.rst 4.141; needs KVM_CAP_MEMORY_ATTRIBUTES.
        """
        cdef kvm_memory_attributes request
        self.need(KVM_CAP_MEMORY_ATTRIBUTES, KVM_SET_MEMORY_ATTRIBUTES)
        request.address, request.size, request.attributes, request.flags = gpa, size, attributes, 0
        self.call_nogil(KVM_SET_MEMORY_ATTRIBUTES, <uintptr_t> &request)

    @property
    def must_be_told(self):
        """Does the engine keep what it made of guest memory, so that it must hear of writes by the host (`wrote`)?"""
        return self.engine.wrote != NULL

    def wrote(self, uint64_t gpa, uint64_t size):
        """Tell the engine that the host wrote guest memory [gpa, gpa + size); the kernel's needs no telling."""
        self.enter()
        if self.engine.wrote != NULL:
            self.engine.wrote(self.handle, gpa, size)
        self.leave()

    # Dirty pages

    def get_dirty_log(self, uint32_t slot):
        """The bitmap of pages of `slot` written since last time, bit 0 of byte 0 first.

        KVM_GET_DIRTY_LOG, api.rst 4.8.
        """
        cdef kvm_dirty_log request
        cdef bytearray bitmap
        with self.slots_lock:  # the slot must not change its size meanwhile
            bitmap = bytearray(self.bitmap_size(slot))
            request.slot, request.dirty_bitmap = slot, PyByteArray_AS_STRING(bitmap)
            self.call_nogil(KVM_GET_DIRTY_LOG, <uintptr_t> &request)
        return bitmap

    cdef size_t bitmap_size(self, uint32_t slot) except? 0:
        """Bytes of a slot's dirty bitmap: the kernel writes whole 64-bit words."""
        if slot not in self.slots:
            raise ValueError(f"there is no memory slot {slot}")
        cdef uint64_t pages = self.slots[slot] // PAGE
        return (pages + 63) // 64 * 8

    def clear_dirty_log(self, uint32_t slot, bitmap, uint64_t first_page=0, num_pages=None):
        """Protect again the pages that are set in `bitmap`.

        KVM_CLEAR_DIRTY_LOG, api.rst 4.117; needs KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.

        `first_page`, a multiple of 64, is the page of its bit 0; `num_pages` is by default all that it has. Needs
        enable_cap("MANUAL_DIRTY_LOG_PROTECT2", KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE).
        """
        cdef kvm_clear_dirty_log request
        cdef bytearray bits = bytearray(bitmap)
        cdef uint64_t pages
        self.need(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CLEAR_DIRTY_LOG)
        with self.slots_lock:
            self.bitmap_size(slot)
            pages = self.slots[slot] // PAGE
            if first_page > pages:
                raise ValueError(f"slot {slot} has {pages} pages, not {first_page}")
            pages = min(pages - first_page, <uint64_t> len(bits) * 8) if num_pages is None else num_pages
            if (pages + 7) // 8 > <uint64_t> len(bits):
                raise ValueError(f"{pages} pages need {(pages + 7) // 8} bytes of bitmap, not {len(bits)}")
            bits.extend(bytes(8))  # the kernel reads whole words
            request.slot, request.first_page, request.num_pages = slot, first_page, pages
            request.dirty_bitmap = PyByteArray_AS_STRING(bits)
            self.call_nogil(KVM_CLEAR_DIRTY_LOG, <uintptr_t> &request)

    def enable_dirty_ring(self, uint32_t entries=4096):
        """Give each vCPU a ring of `entries`, a power of two, for Vcpu.collect_dirty(); before any vCPU.

        KVM_CAP_DIRTY_LOG_RING_ACQ_REL or KVM_CAP_DIRTY_LOG_RING, api.rst 7.36.
        """
        cdef int cap = KVM_CAP_DIRTY_LOG_RING_ACQ_REL
        if not entries or entries & (entries - 1):
            raise ValueError(f"a dirty ring has a power of two of entries, not {entries}")
        if self.vcpus:
            raise StateError("dirty rings must be enabled before the first vCPU")
        if self.capability(cap) <= 0:
            cap = KVM_CAP_DIRTY_LOG_RING
        self.enable(KVM_CAP_ENABLE_CAP_VM, cap, (entries * DIRTY_ENTRY,), 0)
        self.ring_size = entries

    def reset_dirty_rings(self):
        """Protect again all pages that collect_dirty() took; returns how many.

        KVM_RESET_DIRTY_RINGS, api.rst 7.36; needs KVM_CAP_DIRTY_LOG_RING.
        """
        if not self.ring_size:
            self.need(KVM_CAP_DIRTY_LOG_RING, KVM_RESET_DIRTY_RINGS)
            raise StateError("the VM has no dirty rings: enable_dirty_ring() comes first")
        return self.call_nogil(KVM_RESET_DIRTY_RINGS, 0)

    # MMU

    def set_tss_addr(self, uint64_t gpa):
        """Three pages below 4 GiB for real mode on old Intel processors.

        KVM_SET_TSS_ADDR, api.rst 4.36; needs KVM_CAP_SET_TSS_ADDR.
        """
        self.need(KVM_CAP_SET_TSS_ADDR, KVM_SET_TSS_ADDR)
        self.call_nogil(KVM_SET_TSS_ADDR, gpa)

    def set_identity_map_addr(self, uint64_t gpa):
        """One page for the same purpose, before any vCPU; 0: the default.

        KVM_SET_IDENTITY_MAP_ADDR, api.rst 4.40; needs KVM_CAP_SET_IDENTITY_MAP_ADDR.
        """
        self.need(KVM_CAP_SET_IDENTITY_MAP_ADDR, KVM_SET_IDENTITY_MAP_ADDR)
        self.call(KVM_SET_IDENTITY_MAP_ADDR, <uintptr_t> &gpa)

    @property
    def nr_mmu_pages(self):
        """How many shadow pages KVM may use.

        KVM_GET_NR_MMU_PAGES, deprecated, and KVM_SET_NR_MMU_PAGES; needs KVM_CAP_MMU_SHADOW_CACHE_CONTROL.
        """
        self.need(KVM_CAP_MMU_SHADOW_CACHE_CONTROL, KVM_GET_NR_MMU_PAGES)
        return self.call(KVM_GET_NR_MMU_PAGES, 0)

    @nr_mmu_pages.setter
    def nr_mmu_pages(self, unsigned long pages):
        self.need(KVM_CAP_MMU_SHADOW_CACHE_CONTROL, KVM_SET_NR_MMU_PAGES)
        self.call_nogil(KVM_SET_NR_MMU_PAGES, pages)

    # Time

    @property
    def clock(self):
        """The guest's kvmclock, a ClockData.

        KVM_GET_CLOCK, KVM_SET_CLOCK, api.rst 4.29, 4.30; needs KVM_CAP_ADJUST_CLOCK.
        """
        self.need(KVM_CAP_ADJUST_CLOCK, KVM_GET_CLOCK)
        return self.get(ClockData, KVM_GET_CLOCK)

    @clock.setter
    def clock(self, value):
        self.need(KVM_CAP_ADJUST_CLOCK, KVM_SET_CLOCK)
        self.put(ClockData, value, KVM_SET_CLOCK)

    @property
    def tsc_khz(self):
        """The TSC frequency that new vCPUs get, in kHz.

        KVM_GET_TSC_KHZ, KVM_SET_TSC_KHZ, api.rst 4.56, 4.55; needs KVM_CAP_VM_TSC_CONTROL.
        """
        self.need(KVM_CAP_VM_TSC_CONTROL, KVM_GET_TSC_KHZ)
        return self.call(KVM_GET_TSC_KHZ, 0)

    @tsc_khz.setter
    def tsc_khz(self, unsigned long khz):
        self.need(KVM_CAP_VM_TSC_CONTROL, KVM_SET_TSC_KHZ)
        self.call(KVM_SET_TSC_KHZ, khz)

    # Filters

    def set_msr_filter(self, ranges, bint default_deny=False):
        """Which MSRs the guest may access; no ranges: all.

        KVM_X86_SET_MSR_FILTER, api.rst 4.97; needs KVM_CAP_X86_MSR_FILTER.

        `ranges` are up to 16 (flags, base, bitmap): KVM_MSR_FILTER_READ, KVM_MSR_FILTER_WRITE or both, the first MSR,
        and bytes with a bit for each MSR, 1 to allow. What is denied is an exit if KVM_CAP_X86_USER_SPACE_MSR has
        KVM_MSR_EXIT_REASON_FILTER, else #GP.
        """
        cdef kvm_msr_filter request
        cdef list bitmaps = []
        cdef bytearray bits
        cdef int i = 0
        self.need(KVM_CAP_X86_MSR_FILTER, KVM_X86_SET_MSR_FILTER)
        memset(&request, 0, sizeof(request))
        request.flags = KVM_MSR_FILTER_DEFAULT_DENY if default_deny else KVM_MSR_FILTER_DEFAULT_ALLOW
        for flags, base, bitmap in ranges:
            if i == KVM_MSR_FILTER_MAX_RANGES:
                raise ValueError(f"KVM_X86_SET_MSR_FILTER: at most {KVM_MSR_FILTER_MAX_RANGES} ranges")
            bits = bytearray(bitmap)
            request.ranges[i].flags, request.ranges[i].base, request.ranges[i].nmsrs = flags, base, len(bits) * 8
            bits.extend(bytes(8))  # the kernel reads whole words
            request.ranges[i].bitmap = <uint8_t *> PyByteArray_AS_STRING(bits)
            bitmaps.append(bits)
            i += 1
        self.call_nogil(KVM_X86_SET_MSR_FILTER, <uintptr_t> &request)

    def set_pmu_event_filter(self, events, uint32_t action, uint32_t fixed_counter_bitmap=0, uint32_t flags=0):
        """Which performance events the guest may count.

        KVM_SET_PMU_EVENT_FILTER, api.rst 4.120; needs KVM_CAP_PMU_EVENT_FILTER.

        `action` is KVM_PMU_EVENT_ALLOW or KVM_PMU_EVENT_DENY for the list `events` of ints.
        """
        cdef list numbers = list(events)
        cdef bytearray room = bytearray(KVMPY_PMU_FILTER_HEAD + 8 * len(numbers))
        cdef kvm_pmu_event_filter *request = <kvm_pmu_event_filter *> PyByteArray_AS_STRING(room)
        cdef size_t i
        self.need(KVM_CAP_PMU_EVENT_FILTER, KVM_SET_PMU_EVENT_FILTER)
        request.action, request.nevents, request.flags = action, len(numbers), flags
        request.fixed_counter_bitmap = fixed_counter_bitmap
        for i in range(len(numbers)):
            request.events[i] = numbers[i]
        self.call_nogil(KVM_SET_PMU_EVENT_FILTER, <uintptr_t> request)

    # Confidential guests

    def memory_encrypt_op(self, command):
        """Pass a raw SEV or TDX command, a writable buffer with struct kvm_sev_cmd or kvm_tdx_cmd.

        KVM_MEMORY_ENCRYPT_OP.

        None asks whether there is SEV at all: KvmError if not (api.rst 4.110).
        """
        cdef uint8_t[::1] view
        if command is None:
            return self.call_nogil(KVM_MEMORY_ENCRYPT_OP, 0)
        view = command
        if view.shape[0] < ENCRYPT_COMMAND:
            raise ValueError(f"KVM_MEMORY_ENCRYPT_OP: {ENCRYPT_COMMAND} bytes are needed, not {view.shape[0]}")
        return self.call_nogil(KVM_MEMORY_ENCRYPT_OP, <uintptr_t> &view[0])

    def memory_encrypt_reg_region(self, uintptr_t hva, uint64_t size):
        """Pin host memory that may hold encrypted guest pages.

        KVM_MEMORY_ENCRYPT_REG_REGION, api.rst 4.111.
        """
        cdef kvm_enc_region region
        region.addr, region.size = hva, size
        self.call_nogil(KVM_MEMORY_ENCRYPT_REG_REGION, <uintptr_t> &region)

    def memory_encrypt_unreg_region(self, uintptr_t hva, uint64_t size):
        """Undo memory_encrypt_reg_region().

        KVM_MEMORY_ENCRYPT_UNREG_REGION, api.rst 4.112.
        """
        cdef kvm_enc_region region
        region.addr, region.size = hva, size
        self.call_nogil(KVM_MEMORY_ENCRYPT_UNREG_REGION, <uintptr_t> &region)

    # Xen

    def xen_hvm_config(self, config):
        """Set up Xen hypercalls from an XenHvmConfig.

        KVM_XEN_HVM_CONFIG, api.rst 4.28; needs KVM_CAP_XEN_HVM.
        """
        self.need(KVM_CAP_XEN_HVM, KVM_XEN_HVM_CONFIG)
        self.put(XenHvmConfig, config, KVM_XEN_HVM_CONFIG)

    def xen_hvm_get_attr(self, int type):
        """The Xen attribute KVM_XEN_ATTR_TYPE_* as an XenHvmAttr.

        KVM_XEN_HVM_GET_ATTR, api.rst 4.127; needs KVM_CAP_XEN_HVM.
        """
        self.need(KVM_CAP_XEN_HVM, KVM_XEN_HVM_GET_ATTR)
        attr = XenHvmAttr(type=type)
        self.put(XenHvmAttr, attr, KVM_XEN_HVM_GET_ATTR)
        return attr

    def xen_hvm_set_attr(self, attr):
        """Set a Xen attribute.

        KVM_XEN_HVM_SET_ATTR, api.rst 4.126; needs KVM_CAP_XEN_HVM.
        """
        self.need(KVM_CAP_XEN_HVM, KVM_XEN_HVM_SET_ATTR)
        self.put(XenHvmAttr, attr, KVM_XEN_HVM_SET_ATTR)

    def xen_hvm_evtchn_send(self, uint32_t port, uint32_t vcpu, uint32_t priority=0xFFFF_FFFF):
        """Raise a Xen event channel; the default priority is 2-level.

        KVM_XEN_HVM_EVTCHN_SEND, api.rst 4.135; needs KVM_CAP_XEN_HVM.
        """
        cdef kvm_irq_routing_xen_evtchn event
        self.need(KVM_CAP_XEN_HVM, KVM_XEN_HVM_EVTCHN_SEND)
        event.port, event.vcpu, event.priority = port, vcpu, priority
        return self.call(KVM_XEN_HVM_EVTCHN_SEND, <uintptr_t> &event)

    def stats(self):
        """Open the statistics of this machine: a Stats.

        KVM_GET_STATS_FD, api.rst 4.133.
        """
        return Stats(self)
