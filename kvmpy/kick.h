/* SPDX-License-Identifier: Apache-2.0
 *
 * Kicking a vCPU out of KVM_RUN from another thread. Two means, because each alone loses a race: immediate_exit
 * stops a KVM_RUN that has not yet begun, a signal stops one that has.
 */
#ifndef KVMPY_KICK_H
#define KVMPY_KICK_H

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "engine.h"
#include "kvm_compat.h"

/* Whom a kick meets. */
typedef struct {
    _Atomic int thread;  /* that is in KVM_RUN, or 0 */
    _Atomic int kickers; /* that have looked at `thread` and may send it a signal */
    _Atomic int kicked;  /* this KVM_RUN has its signal: more of them would only keep the thread busy */
} kvmpy_target;

/* Set by the signal handler of this thread: tells a late kick signal from one of somebody else. */
static __thread volatile sig_atomic_t kvmpy_kick_seen;

static void kvmpy_on_kick(int signal)
{
    (void)signal;
    kvmpy_kick_seen = 1;
}

/* Claim the first realtime signal that nobody uses; -errno if all are taken.
 * No SA_RESTART: KVM_RUN must return EINTR. */
static inline int kick_install(void)
{
    for (int number = SIGRTMIN; number <= SIGRTMAX; number++) {
        struct sigaction old, mine;
        if (sigaction(number, NULL, &old) < 0 || (old.sa_flags & SA_SIGINFO) || old.sa_handler != SIG_DFL)
            continue;
        memset(&mine, 0, sizeof mine);
        mine.sa_handler = kvmpy_on_kick;
        sigemptyset(&mine.sa_mask);
        return sigaction(number, &mine, NULL) < 0 ? -errno : number;
    }
    return -EBUSY;
}

/* Make the current KVM_RUN, or else the next one, return -EINTR.
 * immediate_exit goes first: whoever is not yet inside the ioctl will see it there, whoever is has a target. */
static inline void kick_send(const struct kvmpy_engine *engine, int handle, struct kvm_run *run, kvmpy_target *target, int signal)
{
    __atomic_store_n(&run->immediate_exit, 1, __ATOMIC_SEQ_CST);
    if (engine->kick)
        engine->kick(handle);
    atomic_fetch_add(&target->kickers, 1);
    int thread = atomic_load(&target->thread);
    if (thread && !atomic_exchange(&target->kicked, 1))
        syscall(SYS_tgkill, getpid(), thread, signal);
    atomic_fetch_sub(&target->kickers, 1);
}

static __thread int kvmpy_thread, kvmpy_process;

/* Is this the process' first thread, in which Python runs signal handlers? */
static inline bool in_main_thread(void)
{
    if (!kvmpy_thread) {
        kvmpy_thread = (int)syscall(SYS_gettid);
        kvmpy_process = getpid();
    }
    return kvmpy_thread == kvmpy_process;
}

/* A forked child has one thread, with a new id. */
static inline void kick_after_fork(void)
{
    kvmpy_thread = 0;
}

/* One KVM_RUN. Returns what the engine returned; *kicked says whether an -EINTR was a kick.
 * A kick signal that arrives after its kick was already answered through immediate_exit is not a second kick:
 * then the guest is simply entered again. */
static inline long run_once(const struct kvmpy_engine *engine, int handle, struct kvm_run *run,
                            kvmpy_target *target, int *kicked)
{
    long result;

    in_main_thread();
    run->exit_reason = KVM_EXIT_UNKNOWN; /* so that an error that fills kvm_run can be told from a stale exit */
    kvmpy_kick_seen = 0;
    atomic_store(&target->kicked, 0); /* a kick before this has set immediate_exit: KVM_RUN will see it */
    atomic_store(&target->thread, kvmpy_thread);
    do
        result = engine->ioctl(handle, KVM_RUN, 0);
    while (result == -EAGAIN); /* an application processor that just left wait-for-SIPI */
    atomic_store(&target->thread, 0);
    while (atomic_load(&target->kickers)) /* their signals are for this KVM_RUN, not for what comes after it */
        sched_yield();
    *kicked = result == -EINTR && __atomic_exchange_n(&run->immediate_exit, 0, __ATOMIC_SEQ_CST);
    return result;
}

/* After an -EINTR that was no kick: was it only a late kick signal? */
static inline bool kick_was_late(void)
{
    bool late = kvmpy_kick_seen;
    kvmpy_kick_seen = 0;
    return late;
}

#endif
