# SPDX-License-Identifier: Apache-2.0
# The engine door, the gate, and what the compiled layer reads of <linux/kvm.h>: by name, no number typed twice.

from libc.stdint cimport int16_t, int32_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t

cdef extern from "engine.h" nogil:
    const char *KVMPY_ENGINE_CAPSULE
    enum: KVMPY_ENGINE_VERSION
    ctypedef struct kvmpy_engine "struct kvmpy_engine":
        uint32_t version
        const char *name
        int (*open)(const char *path) noexcept nogil
        int (*close)(int handle) noexcept nogil
        long (*ioctl)(int handle, unsigned long request, uintptr_t arg) noexcept nogil
        void *(*map)(int handle, size_t size, uint64_t offset) noexcept nogil
        int (*unmap)(void *address, size_t size) noexcept nogil
        long (*pread)(int handle, void *buffer, size_t size, uint64_t offset) noexcept nogil
        void (*wrote)(int vm, uint64_t gpa, uint64_t size) noexcept nogil
        void (*kick)(int vcpu) noexcept nogil
    const kvmpy_engine kvmpy_kernel_engine

cdef extern from "gate.h" nogil:
    ctypedef int kvmpy_gate
    enum: GATE_BUSY, GATE_RUNNING, GATE_CLOSED
    int gate_enter(kvmpy_gate *gate)
    void gate_leave(kvmpy_gate *gate)
    int gate_take(kvmpy_gate *gate, int state)
    void gate_release(kvmpy_gate *gate, int state)
    int gate_state(kvmpy_gate *gate)

cdef extern from "kvm_compat.h" nogil:
    struct exit_io "__typeof__(((struct kvm_run *)0)->io)":
        uint8_t direction
        uint8_t size
        uint16_t port
        uint32_t count
        uint64_t data_offset
    struct exit_mmio "__typeof__(((struct kvm_run *)0)->mmio)":
        uint64_t phys_addr
        uint8_t data[8]
        uint32_t len
        uint8_t is_write
    struct kvm_debug_exit_arch:
        uint32_t exception
        uint64_t pc
        uint64_t dr6
        uint64_t dr7
    struct exit_debug "__typeof__(((struct kvm_run *)0)->debug)":
        kvm_debug_exit_arch arch
    struct exit_hw "__typeof__(((struct kvm_run *)0)->hw)":
        uint64_t hardware_exit_reason
    struct exit_fail_entry "__typeof__(((struct kvm_run *)0)->fail_entry)":
        uint64_t hardware_entry_failure_reason
        uint32_t cpu
    struct exit_ex "__typeof__(((struct kvm_run *)0)->ex)":
        uint32_t exception
        uint32_t error_code
    struct exit_tpr_access "__typeof__(((struct kvm_run *)0)->tpr_access)":
        uint64_t rip
        uint32_t is_write
    struct exit_internal "__typeof__(((struct kvm_run *)0)->internal)":
        uint32_t suberror
        uint32_t ndata
        uint64_t data[16]
    struct exit_system_event "__typeof__(((struct kvm_run *)0)->system_event)":
        uint32_t type
        uint32_t ndata
        uint64_t data[16]
    struct exit_eoi "__typeof__(((struct kvm_run *)0)->eoi)":
        uint8_t vector
    struct exit_msr "__typeof__(((struct kvm_run *)0)->msr)":
        uint8_t error
        uint32_t reason
        uint32_t index
        uint64_t data
    struct exit_notify "__typeof__(((struct kvm_run *)0)->notify)":
        uint32_t flags
    struct hyperv_synic "__typeof__(((struct kvm_hyperv_exit *)0)->u.synic)":
        uint32_t msr
        uint64_t control
        uint64_t evt_page
        uint64_t msg_page
    struct hyperv_hcall "__typeof__(((struct kvm_hyperv_exit *)0)->u.hcall)":
        uint64_t input
        uint64_t result
        uint64_t params[2]
    struct hyperv_syndbg "__typeof__(((struct kvm_hyperv_exit *)0)->u.syndbg)":
        uint32_t msr
        uint64_t control
        uint64_t status
        uint64_t send_page
        uint64_t recv_page
        uint64_t pending_page
    union hyperv_u "__typeof__(((struct kvm_hyperv_exit *)0)->u)":
        hyperv_synic synic
        hyperv_hcall hcall
        hyperv_syndbg syndbg
    struct kvm_hyperv_exit:
        uint32_t type
        hyperv_u u
    struct xen_hcall "__typeof__(((struct kvm_xen_exit *)0)->u.hcall)":
        uint32_t longmode
        uint32_t cpl
        uint64_t input
        uint64_t result
        uint64_t params[6]
    union xen_u "__typeof__(((struct kvm_xen_exit *)0)->u)":
        xen_hcall hcall
    struct kvm_xen_exit:
        uint32_t type
        xen_u u
    struct kvmpy_exit_memory_fault:
        uint64_t flags
        uint64_t gpa
        uint64_t size
    struct kvmpy_exit_emulation_failure:
        uint64_t flags
        uint8_t insn_size
        uint8_t insn_bytes[15]
    struct kvmpy_exit_hypercall:
        uint64_t nr
        uint64_t args[6]
        uint64_t ret
        uint64_t flags
    struct kvmpy_exit_tdx:
        uint64_t flags
        uint64_t nr
        uint64_t ret
        uint64_t data[5]
    struct kvmpy_exit_snp_req_certs:
        uint64_t gpa
        uint64_t npages
        uint64_t ret
    union sync_area "__typeof__(((struct kvm_run *)0)->s)":
        char padding[2048]
    struct kvm_run:
        uint8_t request_interrupt_window
        uint8_t immediate_exit
        uint32_t exit_reason
        uint8_t ready_for_interrupt_injection
        uint8_t if_flag
        uint16_t flags
        uint64_t cr8
        uint64_t apic_base
        exit_hw hw
        exit_fail_entry fail_entry
        exit_ex ex
        exit_io io
        exit_debug debug
        exit_mmio mmio
        exit_tpr_access tpr_access
        exit_internal internal
        exit_system_event system_event
        exit_eoi eoi
        kvm_hyperv_exit hyperv
        exit_msr msr
        kvm_xen_exit xen
        exit_notify notify
        uint64_t kvm_valid_regs
        uint64_t kvm_dirty_regs
        sync_area s
    enum:
        KVM_EXIT_UNKNOWN, KVM_EXIT_EXCEPTION, KVM_EXIT_IO, KVM_EXIT_HYPERCALL, KVM_EXIT_DEBUG, KVM_EXIT_HLT
        KVM_EXIT_MMIO, KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_SHUTDOWN, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_INTR
        KVM_EXIT_SET_TPR, KVM_EXIT_TPR_ACCESS, KVM_EXIT_NMI, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_WATCHDOG
        KVM_EXIT_SYSTEM_EVENT, KVM_EXIT_IOAPIC_EOI, KVM_EXIT_HYPERV, KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR
        KVM_EXIT_DIRTY_RING_FULL, KVM_EXIT_AP_RESET_HOLD, KVM_EXIT_X86_BUS_LOCK, KVM_EXIT_XEN, KVM_EXIT_NOTIFY
        KVM_EXIT_MEMORY_FAULT, KVM_EXIT_TDX, KVM_EXIT_SNP_REQ_CERTS
        KVM_EXIT_S390_SIEIC, KVM_EXIT_S390_RESET, KVM_EXIT_DCR, KVM_EXIT_OSI, KVM_EXIT_PAPR_HCALL
        KVM_EXIT_S390_UCONTROL, KVM_EXIT_S390_TSCH, KVM_EXIT_EPR, KVM_EXIT_S390_STSI, KVM_EXIT_ARM_NISV
        KVM_EXIT_RISCV_SBI, KVM_EXIT_RISCV_CSR, KVM_EXIT_LOONGARCH_IOCSR, KVM_EXIT_ARM_SEA, KVM_EXIT_ARM_LDST64B
        KVM_EXIT_IO_IN, KVM_EXIT_IO_OUT
        KVM_EXIT_HYPERV_SYNIC, KVM_EXIT_HYPERV_HCALL, KVM_EXIT_HYPERV_SYNDBG, KVM_EXIT_XEN_HCALL
        KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_SIMUL_EX, KVM_INTERNAL_ERROR_DELIVERY_EV
        KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON
        KVM_MSR_EXIT_REASON_INVAL, KVM_MSR_EXIT_REASON_UNKNOWN, KVM_MSR_EXIT_REASON_FILTER
        KVM_SYSTEM_EVENT_SHUTDOWN, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_WAKEUP
        KVM_SYSTEM_EVENT_SUSPEND, KVM_SYSTEM_EVENT_SEV_TERM, KVM_SYSTEM_EVENT_TDX_FATAL
        KVM_NOTIFY_CONTEXT_INVALID, KVM_RUN_X86_SMM, KVM_RUN_X86_BUS_LOCK, KVM_RUN_X86_GUEST_MODE
        KVM_COALESCED_MMIO_PAGE_OFFSET, KVM_DIRTY_LOG_PAGE_OFFSET
    uint64_t KVM_REG_SIZE_MASK
    enum: KVM_REG_SIZE_SHIFT
    uint64_t KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
    uint64_t KVM_MEMORY_EXIT_FLAG_PRIVATE, KVM_EXIT_HYPERCALL_LONG_MODE

cdef extern from "kvm_compat.h" nogil:
    unsigned long \
        KVM_GET_API_VERSION, KVM_CREATE_VM, KVM_GET_MSR_INDEX_LIST, KVM_CHECK_EXTENSION, KVM_GET_VCPU_MMAP_SIZE, \
        KVM_GET_SUPPORTED_CPUID, KVM_GET_EMULATED_CPUID, KVM_GET_MSR_FEATURE_INDEX_LIST, KVM_CREATE_VCPU, \
        KVM_GET_DIRTY_LOG, KVM_SET_NR_MMU_PAGES, KVM_GET_NR_MMU_PAGES, KVM_SET_USER_MEMORY_REGION, \
        KVM_SET_TSS_ADDR, KVM_SET_IDENTITY_MAP_ADDR, KVM_SET_USER_MEMORY_REGION2, KVM_CREATE_IRQCHIP, \
        KVM_IRQ_LINE, KVM_GET_IRQCHIP, KVM_SET_IRQCHIP, KVM_CREATE_PIT, KVM_GET_PIT, KVM_SET_PIT, \
        KVM_IRQ_LINE_STATUS, KVM_REGISTER_COALESCED_MMIO, KVM_UNREGISTER_COALESCED_MMIO, KVM_SET_GSI_ROUTING, \
        KVM_REINJECT_CONTROL, KVM_IRQFD, KVM_CREATE_PIT2, KVM_SET_BOOT_CPU_ID, KVM_IOEVENTFD, \
        KVM_XEN_HVM_CONFIG, KVM_SET_CLOCK, KVM_GET_CLOCK, KVM_GET_PIT2, KVM_SET_PIT2, KVM_SET_TSC_KHZ, \
        KVM_GET_TSC_KHZ, KVM_SIGNAL_MSI, KVM_SET_PMU_EVENT_FILTER, KVM_CREATE_DEVICE, KVM_SET_DEVICE_ATTR, \
        KVM_GET_DEVICE_ATTR, KVM_HAS_DEVICE_ATTR, KVM_RUN, KVM_GET_REGS, KVM_SET_REGS, KVM_GET_SREGS, \
        KVM_SET_SREGS, KVM_TRANSLATE, KVM_INTERRUPT, KVM_GET_MSRS, KVM_SET_MSRS, KVM_SET_CPUID, \
        KVM_SET_SIGNAL_MASK, KVM_GET_FPU, KVM_SET_FPU, KVM_GET_LAPIC, KVM_SET_LAPIC, KVM_SET_CPUID2, \
        KVM_GET_CPUID2, KVM_TPR_ACCESS_REPORTING, KVM_SET_VAPIC_ADDR, KVM_GET_MP_STATE, KVM_SET_MP_STATE, \
        KVM_NMI, KVM_SET_GUEST_DEBUG, KVM_X86_SETUP_MCE, KVM_X86_GET_MCE_CAP_SUPPORTED, KVM_X86_SET_MCE, \
        KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS, KVM_GET_DEBUGREGS, KVM_SET_DEBUGREGS, KVM_ENABLE_CAP, \
        KVM_GET_XSAVE, KVM_SET_XSAVE, KVM_GET_XCRS, KVM_SET_XCRS, KVM_GET_ONE_REG, KVM_SET_ONE_REG, \
        KVM_KVMCLOCK_CTRL, KVM_GET_REG_LIST, KVM_SMI, KVM_MEMORY_ENCRYPT_OP, KVM_MEMORY_ENCRYPT_REG_REGION, \
        KVM_MEMORY_ENCRYPT_UNREG_REGION, KVM_HYPERV_EVENTFD, KVM_GET_NESTED_STATE, KVM_SET_NESTED_STATE, \
        KVM_CLEAR_DIRTY_LOG, KVM_GET_SUPPORTED_HV_CPUID, KVM_X86_SET_MSR_FILTER, KVM_RESET_DIRTY_RINGS, \
        KVM_XEN_HVM_GET_ATTR, KVM_XEN_HVM_SET_ATTR, KVM_XEN_VCPU_GET_ATTR, KVM_XEN_VCPU_SET_ATTR, \
        KVM_XEN_HVM_EVTCHN_SEND, KVM_GET_SREGS2, KVM_SET_SREGS2, KVM_GET_STATS_FD, KVM_GET_XSAVE2, \
        KVM_SET_MEMORY_ATTRIBUTES, KVM_CREATE_GUEST_MEMFD, KVM_PRE_FAULT_MEMORY

cdef extern from "kvm_compat.h" nogil:
    enum:
        KVM_CAP_IRQCHIP, KVM_CAP_HLT, KVM_CAP_MMU_SHADOW_CACHE_CONTROL, KVM_CAP_USER_MEMORY
        KVM_CAP_SET_TSS_ADDR, KVM_CAP_VAPIC, KVM_CAP_EXT_CPUID, KVM_CAP_CLOCKSOURCE, KVM_CAP_NR_VCPUS
        KVM_CAP_NR_MEMSLOTS, KVM_CAP_PIT, KVM_CAP_NOP_IO_DELAY, KVM_CAP_PV_MMU, KVM_CAP_MP_STATE
        KVM_CAP_COALESCED_MMIO, KVM_CAP_SYNC_MMU, KVM_CAP_IOMMU, KVM_CAP_DESTROY_MEMORY_REGION_WORKS
        KVM_CAP_USER_NMI, KVM_CAP_SET_GUEST_DEBUG, KVM_CAP_REINJECT_CONTROL, KVM_CAP_IRQ_ROUTING
        KVM_CAP_IRQ_INJECT_STATUS, KVM_CAP_ASSIGN_DEV_IRQ, KVM_CAP_JOIN_MEMORY_REGIONS_WORKS, KVM_CAP_MCE
        KVM_CAP_IRQFD, KVM_CAP_PIT2, KVM_CAP_SET_BOOT_CPU_ID, KVM_CAP_PIT_STATE2, KVM_CAP_IOEVENTFD
        KVM_CAP_SET_IDENTITY_MAP_ADDR, KVM_CAP_XEN_HVM, KVM_CAP_ADJUST_CLOCK, KVM_CAP_INTERNAL_ERROR_DATA
        KVM_CAP_VCPU_EVENTS, KVM_CAP_HYPERV, KVM_CAP_HYPERV_VAPIC, KVM_CAP_HYPERV_SPIN, KVM_CAP_PCI_SEGMENT
        KVM_CAP_INTR_SHADOW, KVM_CAP_DEBUGREGS, KVM_CAP_X86_ROBUST_SINGLESTEP, KVM_CAP_ENABLE_CAP
        KVM_CAP_XSAVE, KVM_CAP_XCRS, KVM_CAP_ASYNC_PF, KVM_CAP_TSC_CONTROL, KVM_CAP_GET_TSC_KHZ
        KVM_CAP_MAX_VCPUS, KVM_CAP_ONE_REG, KVM_CAP_TSC_DEADLINE_TIMER, KVM_CAP_SYNC_REGS, KVM_CAP_PCI_2_3
        KVM_CAP_KVMCLOCK_CTRL, KVM_CAP_SIGNAL_MSI, KVM_CAP_READONLY_MEM, KVM_CAP_IRQFD_RESAMPLE
        KVM_CAP_DEVICE_CTRL, KVM_CAP_EXT_EMUL_CPUID, KVM_CAP_HYPERV_TIME, KVM_CAP_IOAPIC_POLARITY_IGNORED
        KVM_CAP_ENABLE_CAP_VM, KVM_CAP_IOEVENTFD_NO_LENGTH, KVM_CAP_VM_ATTRIBUTES, KVM_CAP_CHECK_EXTENSION_VM
        KVM_CAP_DISABLE_QUIRKS, KVM_CAP_X86_SMM, KVM_CAP_MULTI_ADDRESS_SPACE, KVM_CAP_GUEST_DEBUG_HW_BPS
        KVM_CAP_GUEST_DEBUG_HW_WPS, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_IOEVENTFD_ANY_LENGTH, KVM_CAP_HYPERV_SYNIC
        KVM_CAP_VCPU_ATTRIBUTES, KVM_CAP_MAX_VCPU_ID, KVM_CAP_X2APIC_API, KVM_CAP_MSI_DEVID
        KVM_CAP_IMMEDIATE_EXIT, KVM_CAP_X86_DISABLE_EXITS, KVM_CAP_HYPERV_SYNIC2, KVM_CAP_HYPERV_VP_INDEX
        KVM_CAP_GET_MSR_FEATURES, KVM_CAP_HYPERV_EVENTFD, KVM_CAP_HYPERV_TLBFLUSH, KVM_CAP_NESTED_STATE
        KVM_CAP_MSR_PLATFORM_INFO, KVM_CAP_HYPERV_SEND_IPI, KVM_CAP_COALESCED_PIO
        KVM_CAP_HYPERV_ENLIGHTENED_VMCS, KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT
        KVM_CAP_HYPERV_CPUID, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CAP_PMU_EVENT_FILTER
        KVM_CAP_HYPERV_DIRECT_TLBFLUSH, KVM_CAP_HALT_POLL, KVM_CAP_ASYNC_PF_INT, KVM_CAP_LAST_CPU
        KVM_CAP_SMALLER_MAXPHYADDR, KVM_CAP_STEAL_TIME, KVM_CAP_X86_USER_SPACE_MSR, KVM_CAP_X86_MSR_FILTER
        KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KVM_CAP_SYS_HYPERV_CPUID, KVM_CAP_DIRTY_LOG_RING
        KVM_CAP_X86_BUS_LOCK_EXIT, KVM_CAP_SET_GUEST_DEBUG2, KVM_CAP_SGX_ATTRIBUTE
        KVM_CAP_VM_COPY_ENC_CONTEXT_FROM, KVM_CAP_PTP_KVM, KVM_CAP_HYPERV_ENFORCE_CPUID, KVM_CAP_SREGS2
        KVM_CAP_EXIT_HYPERCALL, KVM_CAP_BINARY_STATS_FD, KVM_CAP_EXIT_ON_EMULATION_FAILURE
        KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM, KVM_CAP_VM_GPA_BITS, KVM_CAP_XSAVE2, KVM_CAP_SYS_ATTRIBUTES
        KVM_CAP_PMU_CAPABILITY, KVM_CAP_DISABLE_QUIRKS2, KVM_CAP_VM_TSC_CONTROL, KVM_CAP_SYSTEM_EVENT_DATA
        KVM_CAP_X86_TRIPLE_FAULT_EVENT, KVM_CAP_X86_NOTIFY_VMEXIT, KVM_CAP_VM_DISABLE_NX_HUGE_PAGES
        KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP, KVM_CAP_PMU_EVENT_MASKED_EVENTS
        KVM_CAP_USER_MEMORY2, KVM_CAP_MEMORY_FAULT_INFO, KVM_CAP_MEMORY_ATTRIBUTES, KVM_CAP_GUEST_MEMFD
        KVM_CAP_VM_TYPES, KVM_CAP_PRE_FAULT_MEMORY, KVM_CAP_X86_APIC_BUS_CYCLES_NS, KVM_CAP_X86_GUEST_MODE
        KVM_CAP_GUEST_MEMFD_FLAGS
