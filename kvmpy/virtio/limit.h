/* SPDX-License-Identifier: Apache-2.0
 *
 * Rate limits of a device: bytes and operations per second, each with a burst, shared by all its queues.
 *
 * A token bucket kept as the time at which it would be full again (the "virtual scheduling" of ITU-T I.371): no timer
 * refills it, and nothing is lost to rounding. A request is let through while the bucket is not overdrawn, whatever its
 * size, and may overdraw it: so a request larger than the burst is slow, not stuck.
 */
#ifndef KVMPY_VIRTIO_LIMIT_H
#define KVMPY_VIRTIO_LIMIT_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

struct rate {
    uint64_t per_second; /* 0: no limit */
    uint64_t burst;      /* nanoseconds of it that may be used at once */
    uint64_t full_at;    /* CLOCK_MONOTONIC nanoseconds */
    uint64_t rest;       /* of the last division */
};

struct rate_limit {
    pthread_mutex_t lock;
    struct rate bytes, ops;
    uint64_t throttled; /* requests that had to wait */
    bool waiting;       /* ... one of which is counted already */
};

void limit_init(struct rate_limit *);
/* Rates per second (0: none) and bursts in bytes and operations (0: a tenth of a second). */
void limit_set(struct rate_limit *, uint64_t bytes, uint64_t byte_burst, uint64_t ops, uint64_t op_burst);
/* May a request of so many bytes begin now? 0: yes, and it is counted; else the nanoseconds until it may. */
uint64_t limit_take(struct rate_limit *, uint64_t bytes);

#endif
