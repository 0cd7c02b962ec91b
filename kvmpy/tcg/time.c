/* SPDX-License-Identifier: Apache-2.0
 *
 * Deterministic mode: an instruction is a nanosecond. The clock is the number of instructions that the one vCPU has
 * run plus the time it slept through; timers fire between instructions at counts that do not depend on the
 * host; HLT jumps to the next timer. Two runs with the same inputs are the same, instruction by instruction.
 * (What comes from outside, an irqfd or an ioctl, comes when it comes.)
 */
#include <errno.h>

#include "vm.h"

#define WALL_START 1577836800000000000ull /* 2020-01-01, in nanoseconds: any fixed date will do */

void time_sync(struct vcpu *vcpu)
{
    struct tcg_vm *vm = vcpu->vm;
    if (unlikely(vm->clock.manual))
        atomic_store(&vm->clock.manual_now, vm->skipped + cpu_insns(&vcpu->cpu));
}

void time_plan(struct vcpu *vcpu)
{
    struct tcg_vm *vm = vcpu->vm;
    if (likely(!vm->clock.manual))
        return;
    time_sync(vcpu);
    pthread_mutex_lock(&vm->chips_lock);
    timers_run(&vm->timers, clock_now(&vm->clock));
    uint64_t next = timers_next(&vm->timers);
    pthread_mutex_unlock(&vm->chips_lock);
    vcpu->cpu.deadline = next == TIMER_NEVER ? UINT64_MAX : next - vm->skipped;
}

bool time_skip(struct vcpu *vcpu)
{
    struct tcg_vm *vm = vcpu->vm;
    if (!vm->clock.manual)
        return false;
    time_sync(vcpu);
    pthread_mutex_lock(&vm->chips_lock);
    uint64_t now = clock_now(&vm->clock), next = timers_next(&vm->timers);
    if (next != TIMER_NEVER) {
        if (next > now)
            vm->skipped += next - now;
        time_sync(vcpu);
        timers_run(&vm->timers, clock_now(&vm->clock));
    }
    pthread_mutex_unlock(&vm->chips_lock);
    return next != TIMER_NEVER;
}

/* A timer was set earlier than planned: come back and plan again. */
static void plan_again(void *opaque)
{
    struct tcg_vm *vm = opaque;
    for (unsigned i = 0; i < TCG_MAX_CPUS; i++) {
        struct vcpu *vcpu = atomic_load(&vm->vcpu[i]);
        if (vcpu)
            cpu_request(&vcpu->cpu, CPU_REQ_EXIT);
    }
}

/* vm.lock held. */
long time_make_deterministic(struct tcg_vm *vm, uint64_t seed)
{
    if (vm->created || vm->has_lapics)
        return -EINVAL; /* the first thing to say of a VM */
    pthread_mutex_lock(&vm->chips_lock);
    clock_init(&vm->clock, true);
    vm->timers.deterministic_wake = plan_again;
    vm->timers.opaque = vm;
    vm->wall_start = WALL_START;
    pthread_mutex_unlock(&vm->chips_lock);
    vm->core.deterministic = true;
    vm->core.seed = seed;
    return 0;
}
