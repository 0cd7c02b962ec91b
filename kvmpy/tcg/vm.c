/* SPDX-License-Identifier: Apache-2.0
 *
 * A VM: its life, its ioctls, and stopping its vCPUs for a change of what they read without locks.
 */
#define _GNU_SOURCE
#include "vm.h"

#include <errno.h>
#include <linux/futex.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

/* ---- life ---- */

static int coalesced_init(struct tcg_vm *vm)
{
    pthread_mutex_init(&vm->coalesced.lock, NULL);
    vm->coalesced.fd = memfd_create("kvmpy-coalesced", MFD_CLOEXEC);
    if (vm->coalesced.fd < 0 || ftruncate(vm->coalesced.fd, PAGE_SIZE) < 0)
        return -errno;
    void *ring = mmap(NULL, PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, vm->coalesced.fd, 0);
    if (ring == MAP_FAILED)
        return -errno;
    vm->coalesced.ring = ring;
    return 0;
}

static void destroy(struct tcg_vm *vm)
{
    ticker_stop(vm);
    timers_stop(&vm->timers);
    irqfd_free(vm);
    for (unsigned i = 0; i < TCG_MAX_CPUS; i++) {
        struct vcpu *vcpu = atomic_load(&vm->vcpu[i]);
        if (vcpu)
            vcpu_destroy(vcpu);
    }
    io_free(vm);
    msr_filter_free(vm);
    memory_free(vm);
    free(vm->routes);
    if (vm->coalesced.ring)
        munmap(vm->coalesced.ring, PAGE_SIZE);
    if (vm->coalesced.fd >= 0)
        close(vm->coalesced.fd);
    pthread_mutex_destroy(&vm->coalesced.lock);
    pthread_mutex_destroy(&vm->chips_lock);
    pthread_mutex_destroy(&vm->slots_lock);
    pthread_mutex_destroy(&vm->lock);
    pthread_mutex_destroy(&vm->core.lock);
    free(vm);
}

int vm_create(struct tcg_vm **out, unsigned long type)
{
    if (type != KVM_X86_DEFAULT_VM)
        return -EINVAL;
    struct tcg_vm *vm = calloc(1, sizeof *vm);
    if (!vm)
        return -ENOMEM;
    atomic_init(&vm->references, 1);
    pthread_mutex_init(&vm->core.lock, NULL);
    pthread_mutex_init(&vm->lock, NULL);
    pthread_mutex_init(&vm->slots_lock, NULL);
    pthread_mutex_init(&vm->chips_lock, NULL);
    vm->coalesced.fd = -1;
    vm->tsc_khz = CLOCK_DEFAULT_TSC_KHZ;
    clock_init(&vm->clock, false);
    timers_init(&vm->timers, &vm->clock, &vm->chips_lock);
    irq_init(vm);
    int error = memory_init(vm);
    if (!error)
        error = coalesced_init(vm);
    if (error) {
        destroy(vm);
        return error;
    }
    *out = vm;
    return 0;
}

void vm_get(struct tcg_vm *vm)
{
    atomic_fetch_add(&vm->references, 1);
}

void vm_put(struct tcg_vm *vm)
{
    if (atomic_fetch_sub(&vm->references, 1) == 1)
        destroy(vm);
}

/* ---- stopping vCPUs ---- */

static void wait_outside(struct vcpu *vcpu)
{
    uint32_t epoch = atomic_load(&vcpu->epoch);
    if (!(epoch & 1))
        return;
    atomic_fetch_add(&vcpu->waiters, 1);
    cpu_request(&vcpu->cpu, CPU_REQ_EXIT);
    while (atomic_load(&vcpu->epoch) == epoch)
        syscall(SYS_futex, &vcpu->epoch, FUTEX_WAIT_PRIVATE, epoch, NULL, NULL, 0);
    atomic_fetch_sub(&vcpu->waiters, 1);
}

void vm_quiesce(struct tcg_vm *vm, uint32_t requests)
{
    for (unsigned i = 0; i < TCG_MAX_CPUS; i++) { /* ask all, then wait for each: they stop at the same time */
        struct vcpu *vcpu = atomic_load(&vm->vcpu[i]);
        if (vcpu && requests)
            cpu_request(&vcpu->cpu, requests);
        if (vcpu && (atomic_load(&vcpu->epoch) & 1))
            cpu_request(&vcpu->cpu, CPU_REQ_EXIT);
    }
    for (unsigned i = 0; i < TCG_MAX_CPUS; i++) {
        struct vcpu *vcpu = atomic_load(&vm->vcpu[i]);
        if (vcpu)
            wait_outside(vcpu);
    }
    __atomic_fetch_add(&vm->stats.vcpu_stops, 1, __ATOMIC_RELAXED);
}

/* ---- ioctls ---- */

static long set_region2(struct tcg_vm *vm, const struct kvm_userspace_memory_region2 *r)
{
    if (r->flags & KVM_MEM_GUEST_MEMFD)
        return -EINVAL; /* no private memory here */
    struct kvm_userspace_memory_region plain = {
        .slot = r->slot, .flags = r->flags, .guest_phys_addr = r->guest_phys_addr,
        .memory_size = r->memory_size, .userspace_addr = r->userspace_addr,
    };
    return memory_set_region(vm, &plain);
}

static long set_tsc_khz(struct tcg_vm *vm, uint32_t khz)
{
    if (!khz)
        khz = CLOCK_DEFAULT_TSC_KHZ;
    if (khz < CLOCK_MIN_TSC_KHZ || khz > CLOCK_MAX_TSC_KHZ)
        return -EINVAL;
    vm->tsc_khz = khz; /* of vCPUs made from now on */
    return 0;
}

/* Set-up requests, one at a time. */
static long locked_ioctl(struct tcg_vm *vm, unsigned long request, uintptr_t arg)
{
    switch (request) {
    case KVM_CREATE_IRQCHIP:
        return irq_create_chip(vm);
    case KVM_CREATE_PIT:
        return irq_create_pit(vm, &(struct kvm_pit_config){.flags = KVM_PIT_SPEAKER_DUMMY});
    case KVM_CREATE_PIT2:
        return arg ? irq_create_pit(vm, (const struct kvm_pit_config *)arg) : -EFAULT;
    case KVM_SET_GSI_ROUTING: {
        const struct kvm_irq_routing *routing = (const struct kvm_irq_routing *)arg;
        return arg ? irq_set_routing(vm, routing, routing->entries) : -EFAULT;
    }
    case KVM_IRQFD:
        return arg ? irqfd_ioctl(vm, (const struct kvm_irqfd *)arg) : -EFAULT;
    case KVM_IOEVENTFD:
        return arg ? ioeventfd_ioctl(vm, (const struct kvm_ioeventfd *)arg) : -EFAULT;
    case KVM_REGISTER_COALESCED_MMIO:
    case KVM_UNREGISTER_COALESCED_MMIO:
        return arg ? coalesced_zone(vm, (const struct kvm_coalesced_mmio_zone *)arg, request == KVM_REGISTER_COALESCED_MMIO)
                   : -EFAULT;
    case KVM_SET_BOOT_CPU_ID:
        if (vm->created)
            return -EBUSY;
        vm->boot_cpu_id = arg;
        return 0;
    case KVM_SET_TSS_ADDR: /* for real mode on old Intel processors; here real mode is real */
        return arg > (uint32_t)(-3 * PAGE_SIZE) ? -EINVAL : 0;
    case KVM_SET_IDENTITY_MAP_ADDR:
        return !arg ? -EFAULT : vm->created ? -EINVAL : 0;
    case KVM_SET_TSC_KHZ:
        return set_tsc_khz(vm, arg);
    case KVM_GET_TSC_KHZ:
        return vm->tsc_khz;
    case KVM_ENABLE_CAP:
        return arg ? vm_enable_cap(vm, (const struct kvm_enable_cap *)arg) : -EFAULT;
    case KVM_X86_SET_MSR_FILTER:
        return msr_set_filter(vm, arg);
    default:
        return -ENOTTY;
    }
}

static long set_irq_line(struct tcg_vm *vm, struct kvm_irq_level *line, bool want_status)
{
    int status;
    long error = irq_line(vm, line->irq, line->level, &status);
    if (!error && want_status)
        line->status = status;
    return error;
}

static long get_pit(struct tcg_vm *vm, struct kvm_pit_state *out)
{
    struct kvm_pit_state2 state;
    long error = irq_get_pit(vm, &state);
    if (!error)
        memcpy(out->channels, state.channels, sizeof out->channels);
    return error;
}

static long set_pit(struct tcg_vm *vm, const struct kvm_pit_state *in)
{
    struct kvm_pit_state2 state;
    long error = irq_get_pit(vm, &state); /* the old structure has no flags: keep them */
    if (error)
        return error;
    memcpy(state.channels, in->channels, sizeof state.channels);
    return irq_set_pit(vm, &state);
}

long vm_ioctl(struct tcg_vm *vm, unsigned long request, uintptr_t arg)
{
    switch (request) {
    case KVM_CHECK_EXTENSION:
        return check_extension(vm, arg);
    case KVM_RESET_DIRTY_RINGS:
        return memory_reset_rings(vm);
    case KVM_CREATE_DEVICE: /* no device types (VFIO and the like) */
        return -ENODEV;
    }
    void *p = (void *)arg;
    if (p) {
        switch (request) {
        case KVM_SET_USER_MEMORY_REGION:
            return memory_set_region(vm, p);
        case KVM_SET_USER_MEMORY_REGION2:
            return set_region2(vm, p);
        case KVM_GET_DIRTY_LOG:
            return memory_get_dirty_log(vm, p);
        case KVM_CLEAR_DIRTY_LOG:
            return memory_clear_dirty_log(vm, p);
        case KVM_IRQ_LINE:
        case KVM_IRQ_LINE_STATUS:
            return set_irq_line(vm, p, request == KVM_IRQ_LINE_STATUS);
        case KVM_SIGNAL_MSI:
            return irq_signal_msi(vm, p);
        case KVM_GET_IRQCHIP:
            return irq_get_chip(vm, p);
        case KVM_SET_IRQCHIP:
            return irq_set_chip(vm, p);
        case KVM_GET_PIT:
            return get_pit(vm, p);
        case KVM_SET_PIT:
            return set_pit(vm, p);
        case KVM_GET_PIT2:
            return irq_get_pit(vm, p);
        case KVM_SET_PIT2:
            return irq_set_pit(vm, p);
        case KVM_REINJECT_CONTROL:
            return irq_reinject(vm, p);
        case KVM_GET_CLOCK:
            return kvmclock_get(vm, p);
        case KVM_SET_CLOCK:
            return kvmclock_set(vm, p);
        }
    }
    pthread_mutex_lock(&vm->lock);
    long result = locked_ioctl(vm, request, arg);
    pthread_mutex_unlock(&vm->lock);
    return result;
}
