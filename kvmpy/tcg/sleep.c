/* SPDX-License-Identifier: Apache-2.0
 *
 * Sleeping in HLT and before SIPI, and noticing signals.
 *
 * KVM_RUN of a kernel sees a signal because it is the kernel. Here the thread blocks signals for the time of
 * KVM_RUN (except those that faults raise), so that none can slip in between a look and going to sleep:
 *  - a sleep is a ppoll() that unblocks them while it waits, so a signal ends it;
 *  - running guest code, a ticker thread makes each vCPU leave cpu_run() every 10 ms to ask sigpending(). Kicks of
 *    kvmpy do not wait for that: they set immediate_exit and come through engine.h's kick(). Where this engine leads
 *    (cpu_assist) it is every millisecond, for then interrupts and kicks come through the other engine.
 * At the end the old mask is back and the handlers run, then KVM_RUN returns -EINTR.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <poll.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "vm.h"

#define TICK_NS 10000000
#define LEADING_TICK_NS 1000000
#define IDLE_TICKS 50 /* then the ticker parks until a vCPU runs guest code */

/* The kernel's sigset_t: bit n-1 is signal n. glibc's own signals (32, 33) stay open, or setuid() elsewhere hangs. */
#define SIGNAL(n) (1ull << ((n) - 1))
#define NEVER_BLOCKED (SIGNAL(SIGILL) | SIGNAL(SIGTRAP) | SIGNAL(SIGBUS) | SIGNAL(SIGFPE) | SIGNAL(SIGSEGV) | SIGNAL(32) | SIGNAL(33))

static void set_mask(uint64_t mask, uint64_t *old)
{
    syscall(SYS_rt_sigprocmask, SIG_SETMASK, &mask, old, sizeof mask);
}

void signals_block(struct vcpu *vcpu, struct signals *signals)
{
    set_mask(~NEVER_BLOCKED, &signals->outside);
    signals->inside = vcpu->has_sigmask ? vcpu->sigmask : signals->outside;
}

void signals_restore(const struct signals *signals)
{
    set_mask(signals->outside, NULL);
}

bool signals_pending(const struct signals *signals)
{
    uint64_t pending = 0;
    syscall(SYS_rt_sigpending, &pending, sizeof pending);
    return pending & ~signals->inside;
}

bool sleep_until_woken(struct vcpu *vcpu, const struct signals *signals, bool (*awake)(struct vcpu *))
{
    struct pollfd wake = {.fd = vcpu->wake_fd, .events = POLLIN};
    bool interrupted = false;
    vcpu->stats.halt_sleeps++;
    while (!interrupted) {
        atomic_store(&vcpu->sleeping, 1);
        if (awake(vcpu) || vcpu->run->immediate_exit)
            break;
        long ready = syscall(SYS_ppoll, &wake, 1, NULL, &signals->inside, sizeof signals->inside);
        interrupted = ready < 0 && errno == EINTR;
        uint64_t count;
        if (ready > 0 && read(vcpu->wake_fd, &count, sizeof count) < 0 && errno != EAGAIN)
            interrupted = true;
    }
    atomic_store(&vcpu->sleeping, 0);
    return !interrupted;
}

/* ---- the ticker ---- */

/* Nobody may be left without a ticker: a vCPU makes its epoch odd and then looks at `parked`, the ticker sets `parked`
 * and then looks at the epochs, so one of them sees the other. */
static void park(struct tcg_vm *vm)
{
    struct ticker *ticker = &vm->ticker;
    atomic_store(&ticker->parked, 1);
    for (unsigned i = 0; i < TCG_MAX_CPUS; i++) {
        struct vcpu *vcpu = atomic_load(&vm->vcpu[i]);
        if (vcpu && (atomic_load(&vcpu->epoch) & 1))
            atomic_store(&ticker->parked, 0);
    }
    while (atomic_load(&ticker->parked) && !atomic_load(&ticker->stopping))
        syscall(SYS_futex, &ticker->parked, FUTEX_WAIT_PRIVATE, 1, NULL, NULL, 0);
}

static void *ticker_thread(void *opaque)
{
    struct tcg_vm *vm = opaque;
    uint32_t last[TCG_MAX_CPUS] = {0};
    unsigned idle = 0;
    while (!atomic_load(&vm->ticker.stopping)) {
        bool busy = false;
        for (unsigned i = 0; i < TCG_MAX_CPUS; i++) {
            struct vcpu *vcpu = atomic_load(&vm->vcpu[i]);
            uint32_t epoch = vcpu ? atomic_load(&vcpu->epoch) : 0;
            busy |= epoch != last[i] || (epoch & 1);
            if ((epoch & 1) && epoch == last[i]) /* the same stay for a whole tick */
                cpu_request(&vcpu->cpu, CPU_REQ_EXIT);
            last[i] = epoch;
        }
        idle = busy ? 0 : idle + 1;
        if (idle >= IDLE_TICKS) {
            park(vm);
            idle = 0;
        }
        const struct timespec tick = {.tv_nsec = atomic_load(&vm->ticker.leading) ? LEADING_TICK_NS : TICK_NS};
        syscall(SYS_futex, &vm->ticker.parked, FUTEX_WAIT_PRIVATE, 0, &tick, NULL, 0);
    }
    return NULL;
}

/* With the first KVM_RUN: a VM that never runs needs no thread. Outside epochs, for it takes vm.lock. */
void ticker_start(struct tcg_vm *vm)
{
    sigset_t all, old;
    if (likely(atomic_load_explicit(&vm->ticker.started, memory_order_acquire)))
        return;
    pthread_mutex_lock(&vm->lock);
    if (!atomic_load(&vm->ticker.started)) {
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &old);
        bool ok = !pthread_create(&vm->ticker.thread, NULL, ticker_thread, vm);
        pthread_sigmask(SIG_SETMASK, &old, NULL);
        atomic_store(&vm->ticker.started, ok);
    }
    pthread_mutex_unlock(&vm->lock);
}

/* In an epoch, each time guest code is entered: a long sleep inside one KVM_RUN parks the ticker. */
void ticker_unpark(struct tcg_vm *vm)
{
    if (unlikely(atomic_load(&vm->ticker.parked)) && atomic_exchange(&vm->ticker.parked, 0))
        syscall(SYS_futex, &vm->ticker.parked, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

void ticker_stop(struct tcg_vm *vm)
{
    if (!atomic_load(&vm->ticker.started))
        return;
    atomic_store(&vm->ticker.stopping, true);
    atomic_store(&vm->ticker.parked, 2); /* no tick begins any more: closing a VM need not wait for one */
    syscall(SYS_futex, &vm->ticker.parked, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
    pthread_join(vm->ticker.thread, NULL);
}
