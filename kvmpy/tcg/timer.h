/* SPDX-License-Identifier: Apache-2.0
 *
 * Deadlines of the chips, and the thread that keeps them. All of it, the callbacks too, runs under the
 * VM's chips lock, so a timer that was cancelled or moved never fires late. A handful of timers exist
 * (one per LAPIC, one for the PIT): a list is enough.
 */
#ifndef KVMPY_TCG_TIMER_H
#define KVMPY_TCG_TIMER_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "clock.h"

#define TIMER_NEVER UINT64_MAX

struct timer {
    struct timer *next;
    uint64_t deadline; /* clock_now() at which it fires; TIMER_NEVER: not armed */
    void (*fire)(void *opaque, uint64_t deadline);
    void *opaque;
};

struct timers {
    struct clock *clock;
    pthread_mutex_t *lock; /* the chips lock */
    struct timer *first;
    pthread_cond_t changed; /* the earliest deadline moved */
    pthread_t thread;
    bool started, stopping;
    void (*deterministic_wake)(void *opaque); /* manual clock: tells the vCPU that a deadline changed; may be NULL */
    void *opaque;
};

void timers_init(struct timers *timers, struct clock *clock, pthread_mutex_t *lock);
int timers_start(struct timers *timers); /* the thread; lock not held. 0 or -errno */
void timers_stop(struct timers *timers); /* lock not held */

/* All with the chips lock held. */
void timer_add(struct timers *timers, struct timer *timer, void (*fire)(void *, uint64_t), void *opaque);
void timer_remove(struct timers *timers, struct timer *timer);
void timer_arm(struct timers *timers, struct timer *timer, uint64_t deadline);
void timer_cancel(struct timer *timer);
uint64_t timers_next(const struct timers *timers);
void timers_run(struct timers *timers, uint64_t now); /* fires all that are due */

#endif
