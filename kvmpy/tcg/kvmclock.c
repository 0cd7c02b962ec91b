/* SPDX-License-Identifier: Apache-2.0
 *
 * kvm-clock (Documentation/virt/kvm/x86/msr.rst): pages in guest memory from which the guest computes time
 * out of its TSC. TSC and kvm-clock derive from one clock at fixed rates, so every vCPU gets the same
 * line through the same point (the VM's birth): the clock is stable across vCPUs to the nanosecond, and the
 * page changes only with the TSC, the rate or KVM_SET_CLOCK.
 */
#include <errno.h>

#include "vm.h"

#define ENABLED 1ull
#define NS_PER_S 1000000000ull

static uint64_t kvmclock_now(const struct tcg_vm *vm)
{
    return clock_now(&vm->clock) + atomic_load(&vm->clock.kvmclock_offset);
}

static void write_versioned(struct vcpu *vcpu, uint64_t gpa, uint32_t *version, void *page, size_t size)
{
    uint32_t *first = page; /* both structures begin with the version; odd while it changes */
    *first = *version + 1;
    if (!memory_write(vcpu, gpa, first, sizeof *first))
        return; /* not memory: the guest's own mistake */
    atomic_thread_fence(memory_order_release);
    memory_write(vcpu, gpa + sizeof *first, first + 1, size - sizeof *first);
    atomic_thread_fence(memory_order_release);
    *version += 2;
    memory_write(vcpu, gpa, version, sizeof *version);
}

void kvmclock_update(struct vcpu *vcpu)
{
    uint64_t msr = vcpu->msr.system_time;
    if (!(msr & ENABLED))
        return;
    struct pvclock_time page = {
        .tsc_timestamp = vcpu->tsc_offset, /* the TSC at clock 0 */
        .system_time = atomic_load(&vcpu->vm->clock.kvmclock_offset),
        .flags = PVCLOCK_TSC_STABLE | (vcpu->guest_stopped ? PVCLOCK_GUEST_STOPPED : 0),
    };
    vcpu->guest_stopped = false;
    clock_pvclock_scale(vcpu->tsc_khz, &page.tsc_to_system_mul, &page.tsc_shift);
    write_versioned(vcpu, msr & ~ENABLED, &vcpu->clock_version, &page, sizeof page);
}

static void write_wall_clock(struct vcpu *vcpu, uint64_t gpa)
{
    struct tcg_vm *vm = vcpu->vm;
    uint64_t boot = (vm->clock.manual ? vm->wall_start : clock_host_wall() - clock_now(&vm->clock))
                  - atomic_load(&vm->clock.kvmclock_offset);
    struct pvclock_wall page = {.sec = boot / NS_PER_S, .nsec = boot % NS_PER_S};
    uint32_t version = 0;
    memory_read(vcpu, gpa, &version, sizeof version);
    version &= ~1u; /* a first-time page may hold anything */
    write_versioned(vcpu, gpa, &version, &page, sizeof page);
}

bool kvmclock_write_msr(struct vcpu *vcpu, bool system_time, uint64_t value)
{
    if (system_time) {
        vcpu->msr.system_time = value;
        kvmclock_update(vcpu);
    } else {
        vcpu->msr.wall_clock = value;
        if (value)
            write_wall_clock(vcpu, value);
    }
    return true;
}

void kvmclock_refresh(struct tcg_vm *vm)
{
    for (unsigned i = 0; i < TCG_MAX_CPUS; i++) {
        struct vcpu *vcpu = atomic_load(&vm->vcpu[i]);
        if (vcpu)
            vcpu_post(vcpu, EVENT_CLOCK);
    }
}

long kvmclock_get(struct tcg_vm *vm, struct kvm_clock_data *data)
{
    uint64_t wall = vm->clock.manual ? vm->wall_start + clock_now(&vm->clock) : clock_host_wall();
    *data = (struct kvm_clock_data){
        .clock = kvmclock_now(vm), .realtime = wall, .flags = KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME,
    };
    return 0;
}

long kvmclock_set(struct tcg_vm *vm, const struct kvm_clock_data *data)
{
    if (data->flags & ~(KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC))
        return -EINVAL;
    uint64_t clock = data->clock;
    if (data->flags & KVM_CLOCK_REALTIME) { /* the guest was away meanwhile */
        uint64_t now = clock_host_wall();
        if (now > data->realtime)
            clock += now - data->realtime;
    }
    atomic_store(&vm->clock.kvmclock_offset, (int64_t)(clock - clock_now(&vm->clock)));
    kvmclock_refresh(vm);
    return 0;
}
