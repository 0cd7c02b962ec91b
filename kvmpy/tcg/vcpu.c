/* SPDX-License-Identifier: Apache-2.0
 *
 * A vCPU: its life, the memory that user space maps, and its ioctls.
 *
 * An ioctl runs inside an epoch of its own (vm.h), like guest code does, so it may look at the slots. It takes no
 * lock that somebody holds while waiting for an epoch to end: chips_lock only.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "profile.h"
#include "vm.h"
#include "xstate.h"

/* ---- life ---- */

static int map_run(struct vcpu *vcpu)
{
    uint64_t ring = vcpu->vm->ring_bytes;
    vcpu->run_fd = memfd_create("kvmpy-vcpu", MFD_CLOEXEC);
    if (vcpu->run_fd < 0 || ftruncate(vcpu->run_fd, KVM_DIRTY_LOG_PAGE_OFFSET * PAGE_SIZE + ring) < 0)
        return -errno;
    void *run = mmap(NULL, 2 * PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->run_fd, 0);
    if (run == MAP_FAILED)
        return -errno;
    vcpu->run = run;
    if (ring) {
        void *at = mmap(NULL, ring, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->run_fd, KVM_DIRTY_LOG_PAGE_OFFSET * PAGE_SIZE);
        if (at == MAP_FAILED)
            return -errno;
        vcpu->ring = at;
        vcpu->ring_entries = ring / sizeof(struct kvm_dirty_gfn);
    }
    vcpu->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    return vcpu->wake_fd < 0 ? -errno : 0;
}

void vcpu_destroy(struct vcpu *vcpu)
{
    if (vcpu->has_apic) {
        pthread_mutex_lock(&vcpu->vm->chips_lock);
        lapic_free(&vcpu->apic);
        pthread_mutex_unlock(&vcpu->vm->chips_lock);
    }
    cpu_free(&vcpu->cpu);
    if (vcpu->ring)
        munmap(vcpu->ring, vcpu->vm->ring_bytes);
    if (vcpu->run)
        munmap(vcpu->run, 2 * PAGE_SIZE);
    if (vcpu->run_fd >= 0)
        close(vcpu->run_fd);
    if (vcpu->wake_fd >= 0)
        close(vcpu->wake_fd);
    free(vcpu->cpu.cpuid);
    pthread_mutex_destroy(&vcpu->lock);
    free(vcpu);
}

/* vm.lock held. */
int vcpu_create(struct tcg_vm *vm, uint32_t id, struct vcpu **out)
{
    if (atomic_load(&vm->vcpu[id]))
        return -EEXIST;
    if (vm->core.deterministic && vm->created)
        return -EINVAL; /* an order of two vCPUs would not repeat */
    struct vcpu *vcpu = aligned_alloc(64, (sizeof *vcpu + 63) & ~63ul);
    if (!vcpu)
        return -ENOMEM;
    memset(vcpu, 0, sizeof *vcpu);
    vcpu->vm = vm;
    vcpu->id = id;
    vcpu->run_fd = vcpu->wake_fd = -1;
    vcpu->extint_vector = -1;
    vcpu->tsc_khz = vm->tsc_khz;
    pthread_mutex_init(&vcpu->lock, NULL);
    int error = cpu_init(&vcpu->cpu, &vm->core, id);
    if (!error)
        error = map_run(vcpu);
    if (error) {
        vcpu_destroy(vcpu);
        return error;
    }
    bool bsp = id == vm->boot_cpu_id;
    vcpu->cpu.machine = vcpu;
    vcpu->cpu.immediate_exit = &vcpu->run->immediate_exit;
    vcpu->cpu.apic_base = APIC_DEFAULT_BASE | APIC_BASE_ENABLE | (bsp ? APIC_BASE_BSP : 0);
    msr_reset(vcpu);
    if (vm->has_lapics) {
        pthread_mutex_lock(&vm->chips_lock);
        lapic_init(&vcpu->apic, &vm->apics, id, bsp);
        vcpu->has_apic = true;
        atomic_store(&vm->vcpu[id], vcpu);
        if (vcpu->apic.intr) /* went up before anybody could be told */
            cpu_raise(&vcpu->cpu, LINE_INTR);
        pthread_mutex_unlock(&vm->chips_lock);
    } else {
        atomic_store(&vm->vcpu[id], vcpu);
    }
    atomic_store(&vcpu->mp_state, bsp || !vm->has_lapics ? KVM_MP_STATE_RUNNABLE : KVM_MP_STATE_UNINITIALIZED);
    vm->created++;
    *out = vcpu;
    return 0;
}

/* kvm_run and the PIO data, the coalesced ring of the VM, the dirty ring: three files in one range. */
void *vcpu_map(struct vcpu *vcpu, size_t size, uint64_t offset)
{
    const uint64_t ring_start = (uint64_t)KVM_DIRTY_LOG_PAGE_OFFSET * PAGE_SIZE;
    if (!size || (offset & (PAGE_SIZE - 1)))
        return (void *)(intptr_t)-EINVAL;
    size = (size + PAGE_SIZE - 1) & ~(size_t)(PAGE_SIZE - 1);
    bool run = offset < RUN_PAGES * PAGE_SIZE && size <= RUN_PAGES * PAGE_SIZE - offset;
    uint64_t ring_bytes = vcpu->vm->ring_bytes;
    bool ring = offset >= ring_start && offset - ring_start < ring_bytes && size <= ring_bytes - (offset - ring_start);
    if (!run && !ring)
        return (void *)(intptr_t)-EINVAL;
    uint8_t *base = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->run_fd, offset);
    if (base == MAP_FAILED)
        return (void *)(intptr_t)-errno;
    const uint64_t coalesced = KVM_COALESCED_MMIO_PAGE_OFFSET * PAGE_SIZE;
    if (run && offset + size > coalesced
        && mmap(base + (coalesced - offset), PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
                vcpu->vm->coalesced.fd, 0) == MAP_FAILED) {
        int error = errno;
        munmap(base, size);
        return (void *)(intptr_t)-error;
    }
    return base;
}

/* ---- from other threads ---- */

void vcpu_wake(struct vcpu *vcpu)
{
    if (atomic_exchange(&vcpu->sleeping, 0)) {
        uint64_t one = 1;
        ssize_t written = write(vcpu->wake_fd, &one, sizeof one);
        (void)written; /* EAGAIN only when it is signalled to the brim, so awake anyway */
    }
}

void vcpu_post(struct vcpu *vcpu, uint32_t event)
{
    atomic_fetch_or(&vcpu->events, event);
    cpu_request(&vcpu->cpu, CPU_REQ_EXIT);
    vcpu_wake(vcpu);
}

/* ---- ioctls ---- */

static long get_lapic(struct vcpu *vcpu, struct kvm_lapic_state *state)
{
    if (!vcpu->has_apic)
        return -EINVAL;
    pthread_mutex_lock(&vcpu->vm->chips_lock);
    lapic_get_state(&vcpu->apic, state);
    pthread_mutex_unlock(&vcpu->vm->chips_lock);
    return 0;
}

static long set_lapic(struct vcpu *vcpu, const struct kvm_lapic_state *state)
{
    if (!vcpu->has_apic)
        return -EINVAL;
    pthread_mutex_lock(&vcpu->vm->chips_lock);
    bool ok = lapic_set_state(&vcpu->apic, state);
    pthread_mutex_unlock(&vcpu->vm->chips_lock);
    return ok ? 0 : -EINVAL;
}

static long interrupt(struct vcpu *vcpu, uint32_t vector)
{
    struct cpu *c = &vcpu->cpu;
    if (vector >= KVM_NR_INTERRUPTS)
        return -EINVAL;
    if (!vcpu->has_apic) { /* user space is the PIC, and has seen that the guest can take it */
        c->inject.intr = true;
        c->inject.soft = false;
        c->inject.intr_vector = vector;
        cpu_request(c, CPU_REQ_LINES);
        return 0;
    }
    if (vcpu->vm->has_pic)
        return -ENXIO;
    if (vcpu->extint_vector >= 0)
        return -EEXIST;
    pthread_mutex_lock(&vcpu->vm->chips_lock);
    vcpu->extint_vector = vector;
    vcpu->apic.extint = true;
    lapic_update(&vcpu->apic);
    pthread_mutex_unlock(&vcpu->vm->chips_lock);
    return 0;
}

static long set_mp_state(struct vcpu *vcpu, uint32_t state)
{
    switch (state) {
    case KVM_MP_STATE_RUNNABLE:
        break;
    case KVM_MP_STATE_UNINITIALIZED:
    case KVM_MP_STATE_INIT_RECEIVED:
    case KVM_MP_STATE_HALTED:
    case KVM_MP_STATE_SIPI_RECEIVED:
        if (!vcpu->has_apic)
            return -EINVAL;
        break;
    default:
        return -EINVAL;
    }
    if (state == KVM_MP_STATE_SIPI_RECEIVED) {
        atomic_fetch_or(&vcpu->events, EVENT_SIPI);
        state = KVM_MP_STATE_INIT_RECEIVED;
    }
    atomic_store(&vcpu->mp_state, state);
    return 0;
}

static long set_tsc_khz(struct vcpu *vcpu, uint32_t khz)
{
    if (!khz)
        khz = CLOCK_DEFAULT_TSC_KHZ;
    if (khz < CLOCK_MIN_TSC_KHZ || khz > CLOCK_MAX_TSC_KHZ)
        return -EINVAL;
    uint64_t tsc = vcpu_tsc(vcpu); /* the count goes on from where it is, at another speed */
    vcpu->tsc_khz = khz;
    vcpu->tsc_offset = tsc - clock_ns_to_ticks(clock_now(&vcpu->vm->clock), khz);
    atomic_fetch_or(&vcpu->events, EVENT_CLOCK);
    return 0;
}

static long set_signal_mask(struct vcpu *vcpu, const struct kvm_signal_mask *mask)
{
    vcpu->has_sigmask = false;
    if (!mask)
        return 0;
    if (mask->len != sizeof vcpu->sigmask) /* the kernel's sigset_t */
        return -EINVAL;
    memcpy(&vcpu->sigmask, mask->sigset, sizeof vcpu->sigmask);
    vcpu->has_sigmask = true;
    return 0;
}

static long tsc_attribute(struct vcpu *vcpu, unsigned long request, const struct kvm_device_attr *attr)
{
    if (attr->group != KVM_VCPU_TSC_CTRL || attr->attr != KVM_VCPU_TSC_OFFSET)
        return -ENXIO;
    uint64_t *value = (uint64_t *)(uintptr_t)attr->addr;
    if (request == KVM_HAS_DEVICE_ATTR)
        return 0;
    if (!value)
        return -EFAULT;
    if (request == KVM_GET_DEVICE_ATTR)
        *value = vcpu->tsc_offset;
    else
        vcpu->tsc_offset = *value;
    return 0;
}

static void translate(struct vcpu *vcpu, struct kvm_translation *t)
{
    bool writable = false, user = false;
    uint64_t gpa = 0;
    t->valid = cpu_translate(&vcpu->cpu, t->linear_address, &gpa, &writable, &user);
    t->physical_address = t->valid ? gpa : UINT64_MAX;
    t->writeable = t->valid && writable;
    t->usermode = t->valid && user;
}

static long plain_ioctl(struct vcpu *vcpu, unsigned long request, uintptr_t arg)
{
    switch (request) {
    case KVM_NMI:
        cpu_nmi(&vcpu->cpu);
        return 0;
    case KVM_SET_TSC_KHZ:
        return set_tsc_khz(vcpu, arg);
    case KVM_GET_TSC_KHZ:
        return vcpu->tsc_khz;
    case KVM_KVMCLOCK_CTRL:
        if (!(vcpu->msr.system_time & 1))
            return -EINVAL;
        vcpu->guest_stopped = true;
        atomic_fetch_or(&vcpu->events, EVENT_CLOCK);
        return 0;
    case KVM_SET_SIGNAL_MASK:
        return set_signal_mask(vcpu, (const struct kvm_signal_mask *)arg);
    default:
        return -ENOTTY;
    }
}

static long enable_cap(struct vcpu *vcpu, const struct kvm_enable_cap *cap)
{
    const uint64_t known = ASSIST_PARTIAL | ASSIST_LEADS | ASSIST_KEEP;
    if (cap->cap == KVMPY_CAP_TCG_PROFILE && !cap->flags && cap->args[0] <= 1)
        return cpu_profile(&vcpu->cpu, cap->args[0]);
    if (cap->cap != KVMPY_CAP_TCG_ASSIST || cap->flags || !cap->args[0] || cap->args[0] > 1u << 31 || cap->args[2] & ~known)
        return -EINVAL;
    if (cap->args[1])
        xstate_carry(&vcpu->cpu, cap->args[1]);
    vcpu->pending_io = vcpu->pending_hypercall = false; /* the other engine goes on with what the last assist stopped at */
    vcpu->host_tsc = cap->args[2] & ASSIST_LEADS;
    if (vcpu->host_tsc) {
        vcpu->tsc_offset = cap->args[3];
        atomic_store(&vcpu->vm->ticker.leading, 1);
    }
    cpu_assist(&vcpu->cpu, cap->args[0], cap->args[2]);
    return 0;
}

static long state_ioctl(struct vcpu *vcpu, unsigned long request, void *p)
{
    switch (request) {
    case KVM_GET_REGS:
        state_get_regs(vcpu, p);
        return 0;
    case KVM_SET_REGS:
        state_set_regs(vcpu, p);
        return 0;
    case KVM_GET_SREGS:
        state_get_sregs(vcpu, p);
        return 0;
    case KVM_SET_SREGS:
        return state_set_sregs(vcpu, p);
    case KVM_GET_SREGS2:
        state_get_sregs2(vcpu, p);
        return 0;
    case KVM_SET_SREGS2:
        return state_set_sregs2(vcpu, p);
    case KVM_GET_FPU:
        state_get_fpu(vcpu, p);
        return 0;
    case KVM_SET_FPU:
        state_set_fpu(vcpu, p);
        return 0;
    case KVM_GET_XSAVE:
    case KVM_GET_XSAVE2:
        state_get_xsave(vcpu, p);
        return 0;
    case KVM_SET_XSAVE:
        return state_set_xsave(vcpu, p);
    case KVM_GET_XCRS:
        state_get_xcrs(vcpu, p);
        return 0;
    case KVM_SET_XCRS:
        return state_set_xcrs(vcpu, p);
    case KVM_GET_DEBUGREGS:
        state_get_debugregs(vcpu, p);
        return 0;
    case KVM_SET_DEBUGREGS:
        return state_set_debugregs(vcpu, p);
    case KVM_GET_VCPU_EVENTS:
        state_get_events(vcpu, p);
        return 0;
    case KVM_SET_VCPU_EVENTS:
        return state_set_events(vcpu, p);
    case KVM_SET_GUEST_DEBUG:
        return state_set_guest_debug(vcpu, p);
    case KVM_GET_MSRS:
        return msr_get_many(vcpu, (uintptr_t)p);
    case KVM_SET_MSRS:
        return msr_set_many(vcpu, (uintptr_t)p);
    case KVM_SET_CPUID2:
        return cpuid_set(vcpu, (uintptr_t)p);
    case KVM_SET_CPUID:
        return cpuid_set_old(vcpu, (uintptr_t)p);
    case KVM_GET_CPUID2:
        return cpuid_get(vcpu, (uintptr_t)p);
    case KVM_GET_LAPIC:
        return get_lapic(vcpu, p);
    case KVM_SET_LAPIC:
        return set_lapic(vcpu, p);
    case KVM_GET_MP_STATE:
        ((struct kvm_mp_state *)p)->mp_state = run_mp_state(vcpu);
        return 0;
    case KVM_SET_MP_STATE:
        return set_mp_state(vcpu, ((const struct kvm_mp_state *)p)->mp_state);
    case KVM_INTERRUPT:
        return interrupt(vcpu, ((const struct kvm_interrupt *)p)->irq);
    case KVM_TPR_ACCESS_REPORTING:
        return vapic_set_reporting(vcpu, p);
    case KVM_SET_VAPIC_ADDR:
        return vapic_set_address(vcpu, p);
    case KVM_TRANSLATE:
        translate(vcpu, p);
        return 0;
    case KVM_HAS_DEVICE_ATTR:
    case KVM_GET_DEVICE_ATTR:
    case KVM_SET_DEVICE_ATTR:
        return tsc_attribute(vcpu, request, p);
    case KVM_ENABLE_CAP:
        return enable_cap(vcpu, p);
    default:
        return cpu_profile_ioctl(&vcpu->cpu, request, p);
    }
}

long vcpu_ioctl(struct vcpu *vcpu, unsigned long request, uintptr_t arg)
{
    pthread_mutex_lock(&vcpu->lock);
    long result;
    if (request == KVM_RUN) {
        result = arg ? -EINVAL : run_vcpu(vcpu);
    } else {
        run_enter_epoch(vcpu);
        result = plain_ioctl(vcpu, request, arg);
        if (result == -ENOTTY)
            result = arg ? state_ioctl(vcpu, request, (void *)arg) : -EFAULT;
        run_leave_epoch(vcpu);
    }
    pthread_mutex_unlock(&vcpu->lock);
    return result;
}
