/* SPDX-License-Identifier: Apache-2.0
 *
 * Signals while the main thread runs a guest. Python's handlers in C only set a flag, at which the main thread looks
 * before KVM_RUN and when a signal ends it. A signal that comes between this look and KVM_RUN ends nothing, nor does one
 * that the kernel gives to another thread: Ctrl-C would be without effect until the guest exits by itself. So a thread of
 * our own nudges the main thread out of a KVM_RUN that lasts, ten times a second, to look again.
 */
#ifndef KVMPY_NUDGE_H
#define KVMPY_NUDGE_H

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { NUDGE_MS = 100, NUDGE_IDLE = 20 /* such times without a run, then it parks */ };

static struct {
    _Atomic uint32_t runs;   /* odd: the main thread is in KVM_RUN */
    _Atomic uint32_t parked;
    pid_t process;           /* that has the thread; the main thread's id too */
    int signal;
} kvmpy_nudge;

static void nudge_park(void)
{
    atomic_store(&kvmpy_nudge.parked, 1);
    if (!(atomic_load(&kvmpy_nudge.runs) & 1)) /* else the main thread may have looked at `parked` before */
        syscall(SYS_futex, &kvmpy_nudge.parked, FUTEX_WAIT_PRIVATE, 1, NULL, NULL, 0);
    atomic_store(&kvmpy_nudge.parked, 0);
}

static void *nudge_thread(void *unused)
{
    uint32_t last = 0, idle = 0;
    for (;;) {
        struct timespec pause = {.tv_nsec = NUDGE_MS * 1000000l};
        nanosleep(&pause, NULL);
        uint32_t now = atomic_load(&kvmpy_nudge.runs);
        if ((now & 1) && now == last)
            syscall(SYS_tgkill, kvmpy_nudge.process, kvmpy_nudge.process, kvmpy_nudge.signal);
        idle = now == last && !(now & 1) ? idle + 1 : 0;
        last = now;
        if (idle == NUDGE_IDLE)
            nudge_park();
    }
    return unused;
}

/* A forked child has no such thread. */
static inline void nudge_after_fork(void)
{
    kvmpy_nudge.process = 0;
    atomic_store(&kvmpy_nudge.runs, 0);
    atomic_store(&kvmpy_nudge.parked, 0);
}

/* In the main thread, before its first run: 0 or -errno. */
static inline int nudge_start(int signal)
{
    if (kvmpy_nudge.process)
        return 0;
    pthread_t thread;
    sigset_t all, old;
    kvmpy_nudge.process = getpid();
    kvmpy_nudge.signal = signal;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old); /* signals are for the threads that Python knows */
    int error = pthread_create(&thread, NULL, nudge_thread, NULL);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (error)
        kvmpy_nudge.process = 0;
    else
        pthread_detach(thread);
    return -error;
}

/* Around a KVM_RUN of the main thread. */
static inline void nudge_begin(void)
{
    atomic_fetch_add(&kvmpy_nudge.runs, 1);
    if (__builtin_expect(atomic_load(&kvmpy_nudge.parked), 0)) {
        atomic_store(&kvmpy_nudge.parked, 0);
        syscall(SYS_futex, &kvmpy_nudge.parked, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
    }
}
static inline void nudge_end(void)
{
    atomic_fetch_add(&kvmpy_nudge.runs, 1);
}

#endif
