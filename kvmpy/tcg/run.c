/* SPDX-License-Identifier: Apache-2.0
 *
 * KVM_RUN: the loop around cpu_run().
 *
 * One turn: take in what others asked for (INIT, SIPI), sleep if halted, look at signals and at the reasons to leave
 * that stand before the guest runs (dirty ring full, interrupt window open), run guest code, and make of the core's
 * reason to stop either an exit or another turn. Guest code runs inside an epoch (vm.h).
 */
#include <errno.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "vm.h"

enum { AGAIN = 1 }; /* beside 0 (an exit stands in kvm_run) and -errno */

void run_enter_epoch(struct vcpu *vcpu)
{
    atomic_fetch_add(&vcpu->epoch, 1);
}

void run_leave_epoch(struct vcpu *vcpu)
{
    atomic_fetch_add(&vcpu->epoch, 1);
    if (unlikely(atomic_load(&vcpu->waiters)))
        syscall(SYS_futex, &vcpu->epoch, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
}

/* ---- what others asked for ---- */

static void take_init(struct vcpu *vcpu)
{
    struct tcg_vm *vm = vcpu->vm;
    cpu_reset(&vcpu->cpu, true);
    vcpu->pending_io = false;
    pthread_mutex_lock(&vm->chips_lock);
    lapic_reset(&vcpu->apic);
    pthread_mutex_unlock(&vm->chips_lock);
    bool bsp = vcpu->cpu.apic_base & APIC_BASE_BSP;
    atomic_store(&vcpu->mp_state, bsp ? KVM_MP_STATE_RUNNABLE : KVM_MP_STATE_INIT_RECEIVED);
}

static void take_sipi(struct vcpu *vcpu)
{
    struct cpu *c = &vcpu->cpu;
    uint32_t vector = atomic_load(&vcpu->sipi_vector) & 0xFF;
    c->seg[SEG_CS].sel = vector << 8;
    c->seg[SEG_CS].base = vector << 12;
    c->rip = 0;
    cpu_update(c);
    atomic_store(&vcpu->mp_state, KVM_MP_STATE_RUNNABLE);
}

/* INIT first, then SIPI: both may have come while this vCPU was busy. */
static void take_events(struct vcpu *vcpu)
{
    uint32_t events = atomic_load(&vcpu->events);
    if (likely(!(events & (EVENT_INIT | EVENT_SIPI | EVENT_UNHALT))))
        return;
    events = atomic_fetch_and(&vcpu->events, ~(EVENT_INIT | EVENT_SIPI | EVENT_UNHALT));
    if (events & EVENT_INIT)
        take_init(vcpu);
    if ((events & EVENT_SIPI) && atomic_load(&vcpu->mp_state) == KVM_MP_STATE_INIT_RECEIVED)
        take_sipi(vcpu); /* anywhere else a SIPI means nothing */
    if ((events & EVENT_UNHALT) && atomic_load(&vcpu->mp_state) == KVM_MP_STATE_HALTED)
        atomic_store(&vcpu->mp_state, KVM_MP_STATE_RUNNABLE);
}

uint32_t run_mp_state(struct vcpu *vcpu)
{
    take_events(vcpu);
    return atomic_load(&vcpu->mp_state);
}

/* ---- sleeping ---- */

static bool interrupt_would_wake(struct vcpu *vcpu)
{
    const struct cpu *c = &vcpu->cpu;
    uint32_t lines = atomic_load(&c->lines);
    if (c->inject.exc || c->inject.intr || c->inject.nmi || vcpu->triple_fault)
        return true;
    return ((lines & LINE_NMI) && !c->nmi_masked) || ((lines & LINE_INTR) && (c->sysflags & FL_IF));
}

static bool awake(struct vcpu *vcpu)
{
    uint32_t events = atomic_load(&vcpu->events);
    if (events & (EVENT_INIT | EVENT_SIPI | EVENT_UNHALT))
        return true;
    return atomic_load(&vcpu->mp_state) == KVM_MP_STATE_HALTED && interrupt_would_wake(vcpu);
}

static bool mwait_over(struct vcpu *vcpu)
{
    const struct cpu *c = &vcpu->cpu;
    return !atomic_load(&c->monitor) || atomic_load(&vcpu->events) || interrupt_would_wake(vcpu)
        || (c->mwait_break && (atomic_load(&c->lines) & LINE_INTR));
}

/* The instruction is complete, so whatever ends the sleep, the guest goes on behind it. */
static long mwait(struct vcpu *vcpu, const struct signals *signals)
{
    bool woken = !vcpu->has_apic || time_skip(vcpu) || sleep_until_woken(vcpu, signals, mwait_over);
    atomic_store(&vcpu->cpu.monitor, 0);
    if (woken)
        return AGAIN;
    vcpu->run->exit_reason = KVM_EXIT_INTR;
    vcpu->stats.signal_exits++;
    return -EINTR;
}

static long sleep_if_halted(struct vcpu *vcpu, const struct signals *signals)
{
    take_events(vcpu);
    while (atomic_load(&vcpu->mp_state) != KVM_MP_STATE_RUNNABLE) {
        if (vcpu->run->immediate_exit)
            return -EINTR;
        if (!awake(vcpu) && !time_skip(vcpu) && !sleep_until_woken(vcpu, signals, awake)) {
            vcpu->run->exit_reason = KVM_EXIT_INTR;
            vcpu->stats.signal_exits++;
            return -EINTR;
        }
        take_events(vcpu);
        if (atomic_load(&vcpu->mp_state) == KVM_MP_STATE_HALTED && interrupt_would_wake(vcpu))
            atomic_store(&vcpu->mp_state, KVM_MP_STATE_RUNNABLE);
    }
    return AGAIN;
}

/* ---- reasons to leave before the guest runs ---- */

static long leave(struct vcpu *vcpu, uint32_t reason)
{
    vcpu->run->exit_reason = reason;
    return 0;
}

static bool user_space_wants_window(const struct vcpu *vcpu)
{
    if (!vcpu->run->request_interrupt_window || vcpu->vm->has_pic)
        return false;
    return !vcpu->has_apic || (vcpu->extint_vector < 0 && lapic_accepts_pic(&vcpu->apic));
}

/* A state that no processor enters a guest with (SDM vol. 3C, 27.3.1), as far as KVM_SET_SREGS lets it through. */
static bool enterable(const struct cpu *c)
{
    bool long_mode = c->efer & EFER_LMA;
    if (long_mode && (c->sysflags & FL_VM))
        return false;
    return !(long_mode && (c->seg[SEG_CS].attr & ATTR_L) && (c->seg[SEG_CS].attr & ATTR_DB));
}

static long check_before(struct vcpu *vcpu, const struct signals *signals, bool look_at_signals)
{
    struct kvm_run *run = vcpu->run;
    uint32_t events = atomic_load(&vcpu->events);
    if (events & EVENT_EOI_EXIT) {
        atomic_fetch_and(&vcpu->events, ~EVENT_EOI_EXIT);
        run->eoi.vector = vcpu->eoi_vector;
        return leave(vcpu, KVM_EXIT_IOAPIC_EOI);
    }
    if (events & EVENT_SET_TPR) {
        atomic_fetch_and(&vcpu->events, ~EVENT_SET_TPR);
        return leave(vcpu, KVM_EXIT_SET_TPR);
    }
    if (vcpu->triple_fault) {
        vcpu->triple_fault = false;
        return leave(vcpu, KVM_EXIT_SHUTDOWN);
    }
    if (run->immediate_exit)
        return -EINTR;
    if (look_at_signals && signals_pending(signals)) {
        run->exit_reason = KVM_EXIT_INTR;
        vcpu->stats.signal_exits++;
        return -EINTR;
    }
    if (ring_soft_full(vcpu))
        return leave(vcpu, KVM_EXIT_DIRTY_RING_FULL);
    vcpu->cpu.want_window = user_space_wants_window(vcpu);
    if (vcpu->cpu.want_window && !vcpu->cpu.inject.exc && cpu_interruptible(&vcpu->cpu)) {
        vcpu->stats.irq_window_exits++;
        return leave(vcpu, KVM_EXIT_IRQ_WINDOW_OPEN);
    }
    if (!enterable(&vcpu->cpu)) {
        run->fail_entry.hardware_entry_failure_reason = 0x80000021; /* VMX: invalid guest state */
        run->fail_entry.cpu = 0xFFFFFFFF;
        return leave(vcpu, KVM_EXIT_FAIL_ENTRY);
    }
    return AGAIN;
}

/* ---- guest code ---- */

static enum tcg_stop enter(struct vcpu *vcpu)
{
    run_enter_epoch(vcpu);
    ticker_unpark(vcpu->vm);
    if (unlikely(atomic_load(&vcpu->events) & EVENT_CLOCK)) {
        atomic_fetch_and(&vcpu->events, ~EVENT_CLOCK);
        kvmclock_update(vcpu);
    }
    vapic_load(vcpu);
    time_plan(vcpu);
    enum tcg_stop stop = cpu_run(&vcpu->cpu);
    time_sync(vcpu);
    vapic_store(vcpu);
    if (unlikely(stop == TCG_STOP_ERROR))
        exit_error(vcpu); /* looks at guest memory */
    run_leave_epoch(vcpu);
    return stop;
}

static long halt(struct vcpu *vcpu)
{
    vcpu->stats.halt_exits++;
    if (!vcpu->has_apic)
        return leave(vcpu, KVM_EXIT_HLT);
    atomic_store(&vcpu->mp_state, KVM_MP_STATE_HALTED);
    return AGAIN;
}

static long after(struct vcpu *vcpu, enum tcg_stop stop)
{
    vcpu->stats.exits++;
    switch (stop) {
    case TCG_STOP_IO:
        if (unlikely(vapic_exit(vcpu)))
            return 0;
        exit_io(vcpu);
        return 0;
    case TCG_STOP_HLT:
        return halt(vcpu);
    case TCG_STOP_SHUTDOWN:
        return leave(vcpu, KVM_EXIT_SHUTDOWN);
    case TCG_STOP_DEBUG:
        exit_debug(vcpu);
        return 0;
    case TCG_STOP_WINDOW:
        vcpu->stats.irq_window_exits++;
        return leave(vcpu, KVM_EXIT_IRQ_WINDOW_OPEN);
    case TCG_STOP_HYPERCALL:
        exit_hypercall(vcpu);
        return 0;
    case TCG_STOP_ERROR:
        return 0;
    case TCG_STOP_HANDBACK:
        return leave(vcpu, vcpu->cpu.assist_left ? KVM_EXIT_UNKNOWN : KVM_EXIT_INTR);
    case TCG_STOP_MWAIT:
        vcpu->stats.halt_exits++;
        return AGAIN;
    case TCG_STOP_CANCEL:
        vcpu->stats.request_exits++;
        if (vcpu->cpu.assist_left && vcpu->cpu.assist_leads && !vcpu->run->immediate_exit)
            return leave(vcpu, KVM_EXIT_INTR);
        return AGAIN;
    }
    return AGAIN;
}

static long run_loop(struct vcpu *vcpu, const struct signals *signals)
{
    /* An access that was answered finishes first, whatever else there is: immediate_exit means "after that". */
    bool completing = vcpu->cpu.io.state == IO_DONE, cancelled = false;
    for (;;) {
        long result = AGAIN;
        if (!completing) {
            result = sleep_if_halted(vcpu, signals);
            if (result == AGAIN)
                result = check_before(vcpu, signals, cancelled);
            if (result != AGAIN)
                return result;
        } else if (vcpu->run->immediate_exit) {
            cpu_request(&vcpu->cpu, CPU_REQ_EXIT);
        }
        enum tcg_stop stop = enter(vcpu);
        completing = false;
        cancelled = stop == TCG_STOP_CANCEL;
        result = after(vcpu, stop);
        if (stop == TCG_STOP_MWAIT)
            result = mwait(vcpu, signals);
        if (result != AGAIN)
            return result;
    }
}

long run_vcpu(struct vcpu *vcpu)
{
    struct signals signals;
    vcpu->has_run = true;
    vcpu->run->flags = 0;
    ticker_start(vcpu->vm);
    signals_block(vcpu, &signals);
    run_enter_epoch(vcpu);
    long result = exit_load(vcpu);
    exit_complete(vcpu);
    run_leave_epoch(vcpu);
    if (!result)
        result = run_loop(vcpu, &signals);
    exit_save(vcpu);
    signals_restore(&signals);
    return result;
}
