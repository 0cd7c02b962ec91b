/* SPDX-License-Identifier: Apache-2.0 */
#include "timer.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <time.h>

void timers_init(struct timers *timers, struct clock *clock, pthread_mutex_t *lock)
{
    memset(timers, 0, sizeof *timers);
    timers->clock = clock;
    timers->lock = lock;
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&timers->changed, &attributes);
    pthread_condattr_destroy(&attributes);
}

void timer_add(struct timers *timers, struct timer *timer, void (*fire)(void *, uint64_t), void *opaque)
{
    timer->deadline = TIMER_NEVER;
    timer->fire = fire;
    timer->opaque = opaque;
    timer->next = timers->first;
    timers->first = timer;
}

void timer_remove(struct timers *timers, struct timer *timer)
{
    for (struct timer **link = &timers->first; *link; link = &(*link)->next) {
        if (*link == timer) {
            *link = timer->next;
            return;
        }
    }
}

uint64_t timers_next(const struct timers *timers)
{
    uint64_t next = TIMER_NEVER;
    for (const struct timer *t = timers->first; t; t = t->next)
        if (t->deadline < next)
            next = t->deadline;
    return next;
}

void timer_arm(struct timers *timers, struct timer *timer, uint64_t deadline)
{
    uint64_t before = timers_next(timers);
    timer->deadline = deadline;
    if (deadline >= before)
        return; /* the thread wakes early enough; a deadline that moved back costs one idle wake-up */
    if (timers->clock->manual) {
        if (timers->deterministic_wake)
            timers->deterministic_wake(timers->opaque);
    } else {
        pthread_cond_signal(&timers->changed);
    }
}

void timer_cancel(struct timer *timer)
{
    timer->deadline = TIMER_NEVER;
}

void timers_run(struct timers *timers, uint64_t now)
{
    /* A callback may arm timers again; a periodic one always lands in the future, so this ends. */
    for (;;) {
        struct timer *due = NULL;
        for (struct timer *t = timers->first; t; t = t->next)
            if (t->deadline <= now && (!due || t->deadline < due->deadline))
                due = t;
        if (!due)
            return;
        uint64_t deadline = due->deadline;
        due->deadline = TIMER_NEVER;
        due->fire(due->opaque, deadline);
    }
}

static void *timer_thread(void *opaque)
{
    struct timers *timers = opaque;
    pthread_mutex_lock(timers->lock);
    while (!timers->stopping) {
        timers_run(timers, clock_now(timers->clock));
        uint64_t next = timers_next(timers);
        if (next == TIMER_NEVER || timers->clock->manual) {
            pthread_cond_wait(&timers->changed, timers->lock);
            continue;
        }
        uint64_t host = timers->clock->host_start;
        host = next > UINT64_MAX / 4 ? UINT64_MAX / 4 : host + next; /* a deadline in 100 years is never */
        struct timespec until = {.tv_sec = host / 1000000000u, .tv_nsec = host % 1000000000u};
        pthread_cond_timedwait(&timers->changed, timers->lock, &until);
    }
    pthread_mutex_unlock(timers->lock);
    return NULL;
}

int timers_start(struct timers *timers)
{
    /* Threads of the engine take no signals: those are for the threads that user code knows. */
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int error = pthread_create(&timers->thread, NULL, timer_thread, timers);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    timers->started = !error;
    return -error;
}

void timers_stop(struct timers *timers)
{
    if (timers->started) {
        pthread_mutex_lock(timers->lock);
        timers->stopping = true;
        pthread_cond_signal(&timers->changed);
        pthread_mutex_unlock(timers->lock);
        pthread_join(timers->thread, NULL);
        timers->started = false;
    }
    pthread_cond_destroy(&timers->changed);
}
