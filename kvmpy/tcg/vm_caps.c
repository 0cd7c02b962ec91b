/* SPDX-License-Identifier: Apache-2.0
 *
 * What KVM_CHECK_EXTENSION answers: exactly what this engine does, nothing that is merely accepted. And
 * KVM_ENABLE_CAP of a VM.
 */
#include <errno.h>
#include <unistd.h>

#include "profile.h"
#include "vm.h"

#define QUIRKS KVM_X86_QUIRK_LINT0_REENABLED /* those whose disabling changes something here */
#define MSR_EXIT_REASONS (KVM_MSR_EXIT_REASON_INVAL | KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_FILTER)
#define DIRTY_PROTECT_FLAGS (KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET)
#define X2APIC_FLAGS (KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK)
#define HYPERCALLS (1u << 12) /* KVM_HC_MAP_GPA_RANGE, the only one that may go to user space */

long check_extension(struct tcg_vm *vm, unsigned long capability)
{
    switch (capability) {
    case KVM_CAP_IRQCHIP: case KVM_CAP_HLT: case KVM_CAP_USER_MEMORY: case KVM_CAP_USER_MEMORY2: case KVM_CAP_SET_TSS_ADDR:
    case KVM_CAP_EXT_CPUID: case KVM_CAP_CLOCKSOURCE: case KVM_CAP_PIT: case KVM_CAP_NOP_IO_DELAY: case KVM_CAP_MP_STATE:
    case KVM_CAP_SYNC_MMU: case KVM_CAP_DESTROY_MEMORY_REGION_WORKS: case KVM_CAP_USER_NMI: case KVM_CAP_SET_GUEST_DEBUG:
    case KVM_CAP_REINJECT_CONTROL: case KVM_CAP_IRQ_INJECT_STATUS: case KVM_CAP_JOIN_MEMORY_REGIONS_WORKS:
    case KVM_CAP_IRQFD: case KVM_CAP_IRQFD_RESAMPLE: case KVM_CAP_PIT2: case KVM_CAP_SET_BOOT_CPU_ID:
    case KVM_CAP_PIT_STATE2: case KVM_CAP_IOEVENTFD: case KVM_CAP_SET_IDENTITY_MAP_ADDR: case KVM_CAP_INTERNAL_ERROR_DATA:
    case KVM_CAP_VCPU_EVENTS: case KVM_CAP_INTR_SHADOW: case KVM_CAP_DEBUGREGS: case KVM_CAP_X86_ROBUST_SINGLESTEP:
    case KVM_CAP_ENABLE_CAP: case KVM_CAP_ENABLE_CAP_VM: case KVM_CAP_CHECK_EXTENSION_VM: case KVM_CAP_XSAVE:
    case KVM_CAP_XCRS: case KVM_CAP_TSC_CONTROL: case KVM_CAP_VM_TSC_CONTROL: case KVM_CAP_GET_TSC_KHZ:
    case KVM_CAP_TSC_DEADLINE_TIMER: case KVM_CAP_KVMCLOCK_CTRL: case KVM_CAP_SIGNAL_MSI: case KVM_CAP_READONLY_MEM:
    case KVM_CAP_IOAPIC_POLARITY_IGNORED: case KVM_CAP_IOEVENTFD_NO_LENGTH: case KVM_CAP_IOEVENTFD_ANY_LENGTH:
    case KVM_CAP_DISABLE_QUIRKS: case KVM_CAP_SPLIT_IRQCHIP: case KVM_CAP_IMMEDIATE_EXIT: case KVM_CAP_GET_MSR_FEATURES:
    case KVM_CAP_COALESCED_PIO: case KVM_CAP_EXCEPTION_PAYLOAD: case KVM_CAP_X86_MSR_FILTER: case KVM_CAP_SREGS2:
    case KVM_CAP_BINARY_STATS_FD: case KVM_CAP_X86_TRIPLE_FAULT_EVENT: case KVM_CAP_MULTI_ADDRESS_SPACE:
    case KVM_CAP_VCPU_ATTRIBUTES: case KVM_CAP_VAPIC:
        return 1;
    case KVM_CAP_NR_VCPUS:
        return sysconf(_SC_NPROCESSORS_ONLN);
    case KVM_CAP_MAX_VCPUS:
    case KVM_CAP_MAX_VCPU_ID:
        return TCG_MAX_CPUS;
    case KVM_CAP_NR_MEMSLOTS:
        return MAX_SLOTS;
    case KVM_CAP_COALESCED_MMIO:
        return KVM_COALESCED_MMIO_PAGE_OFFSET;
    case KVM_CAP_IRQ_ROUTING:
        return MAX_GSI;
    case KVM_CAP_ADJUST_CLOCK:
        return KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME;
    case KVM_CAP_SYNC_REGS:
        return KVM_SYNC_X86_VALID_FIELDS;
    case KVM_CAP_X2APIC_API:
        return X2APIC_FLAGS;
    case KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2:
        return DIRTY_PROTECT_FLAGS;
    case KVM_CAP_X86_USER_SPACE_MSR:
        return MSR_EXIT_REASONS;
    case KVM_CAP_DIRTY_LOG_RING:
    case KVM_CAP_DIRTY_LOG_RING_ACQ_REL:
        return MAX_DIRTY_RING * sizeof(struct kvm_dirty_gfn);
    case KVM_CAP_SET_GUEST_DEBUG2:
        return KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_USE_SW_BP | KVM_GUESTDBG_USE_HW_BP
             | KVM_GUESTDBG_INJECT_DB | KVM_GUESTDBG_INJECT_BP | KVM_GUESTDBG_BLOCKIRQ;
    case KVM_CAP_EXIT_HYPERCALL:
        return HYPERCALLS;
    case KVM_CAP_XSAVE2:
        return sizeof(struct kvm_xsave);
    case KVM_CAP_DISABLE_QUIRKS2:
        return QUIRKS;
    case KVMPY_CAP_TCG_DETERMINISTIC:
    case KVMPY_CAP_TCG_ASSIST:
    case KVMPY_CAP_TCG_PROFILE:
        return 1;
    default:
        (void)vm; /* every VM can do the same */
        return 0;
    }
}

static long enable_dirty_ring(struct tcg_vm *vm, uint64_t bytes)
{
    const uint64_t entry = sizeof(struct kvm_dirty_gfn);
    if (!bytes || (bytes & (bytes - 1)) || bytes < PAGE_SIZE)
        return -EINVAL;
    if (bytes > MAX_DIRTY_RING * entry)
        return -E2BIG;
    if (vm->ring_bytes || vm->created)
        return -EINVAL;
    vm->ring_bytes = bytes;
    return 0;
}

/* vm.lock held. */
long vm_enable_cap(struct tcg_vm *vm, const struct kvm_enable_cap *cap)
{
    uint64_t arg = cap->args[0];
    if (cap->flags)
        return -EINVAL;
    switch (cap->cap) {
    case KVM_CAP_SPLIT_IRQCHIP:
        return arg > KVM_IOAPIC_NUM_PINS ? -EINVAL : irq_create_split(vm, arg);
    case KVM_CAP_X2APIC_API:
        if (arg & ~(uint64_t)X2APIC_FLAGS)
            return -EINVAL;
        pthread_mutex_lock(&vm->chips_lock);
        vm->apics.ids_32bit |= !!(arg & KVM_X2APIC_API_USE_32BIT_IDS);
        vm->apics.no_broadcast_quirk |= !!(arg & KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK);
        pthread_mutex_unlock(&vm->chips_lock);
        return 0;
    case KVM_CAP_DISABLE_QUIRKS2:
        if (arg & ~(uint64_t)QUIRKS)
            return -EINVAL;
        /* fall through */
    case KVM_CAP_DISABLE_QUIRKS:
        pthread_mutex_lock(&vm->chips_lock);
        vm->apics.lint0_stays_masked = arg & KVM_X86_QUIRK_LINT0_REENABLED;
        pthread_mutex_unlock(&vm->chips_lock);
        return 0;
    case KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2:
        if ((arg & ~(uint64_t)DIRTY_PROTECT_FLAGS) || arg == KVM_DIRTY_LOG_INITIALLY_SET)
            return -EINVAL;
        pthread_mutex_lock(&vm->slots_lock);
        vm->manual_protect = arg;
        pthread_mutex_unlock(&vm->slots_lock);
        return 0;
    case KVM_CAP_DIRTY_LOG_RING:
    case KVM_CAP_DIRTY_LOG_RING_ACQ_REL:
        return enable_dirty_ring(vm, arg);
    case KVM_CAP_X86_USER_SPACE_MSR:
        if (arg & ~(uint64_t)MSR_EXIT_REASONS)
            return -EINVAL;
        atomic_store(&vm->msr_exit_reasons, arg);
        return 0;
    case KVM_CAP_EXIT_HYPERCALL:
        if (arg & ~(uint64_t)HYPERCALLS)
            return -EINVAL;
        atomic_store(&vm->hypercall_exits, arg);
        return 0;
    case KVMPY_CAP_TCG_DETERMINISTIC:
        return time_make_deterministic(vm, arg);
    case KVM_CAP_EXCEPTION_PAYLOAD:
        vm->exception_payload = arg;
        return 0;
    case KVM_CAP_X86_TRIPLE_FAULT_EVENT:
        vm->triple_fault_event = arg;
        return 0;
    default:
        return -EINVAL;
    }
}
