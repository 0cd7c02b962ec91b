/* SPDX-License-Identifier: Apache-2.0
 *
 * See limit.h.
 */
#include "limit.h"

#include <string.h>
#include <time.h>

#define SECOND 1000000000ull
#define SHORTEST 1000000ull /* ns of burst: workers wake up to a millisecond */

void limit_init(struct rate_limit *limit)
{
    memset(limit, 0, sizeof(*limit));
    pthread_mutex_init(&limit->lock, NULL);
}

static void set(struct rate *rate, uint64_t per_second, uint64_t burst)
{
    memset(rate, 0, sizeof(*rate));
    rate->per_second = per_second;
    if (!per_second)
        return;
    unsigned __int128 ns = burst ? (unsigned __int128)burst * SECOND / per_second : SECOND / 10;
    const uint64_t longest = 3600 * SECOND;
    rate->burst = ns > longest ? longest : ns < SHORTEST ? SHORTEST : (uint64_t)ns;
}

void limit_set(struct rate_limit *limit, uint64_t bytes, uint64_t byte_burst, uint64_t ops, uint64_t op_burst)
{
    pthread_mutex_lock(&limit->lock);
    set(&limit->bytes, bytes, byte_burst);
    set(&limit->ops, ops, op_burst);
    pthread_mutex_unlock(&limit->lock);
}

static uint64_t delay(const struct rate *rate, uint64_t now)
{
    return rate->per_second && rate->full_at > now + rate->burst ? rate->full_at - now - rate->burst : 0;
}

static void charge(struct rate *rate, uint64_t amount, uint64_t now)
{
    if (!rate->per_second)
        return;
    if (rate->full_at < now) {
        rate->full_at = now;
        rate->rest = 0;
    }
    unsigned __int128 cost = (unsigned __int128)amount * SECOND + rate->rest;
    rate->full_at += (uint64_t)(cost / rate->per_second);
    rate->rest = (uint64_t)(cost % rate->per_second);
}

uint64_t limit_take(struct rate_limit *limit, uint64_t bytes)
{
    if (!limit)
        return 0;
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    uint64_t now = ts.tv_sec * SECOND + ts.tv_nsec;
    pthread_mutex_lock(&limit->lock);
    uint64_t a = delay(&limit->bytes, now), b = delay(&limit->ops, now), wait = a > b ? a : b;
    if (!wait) {
        charge(&limit->bytes, bytes, now);
        charge(&limit->ops, 1, now);
    }
    limit->throttled += wait && !limit->waiting;
    limit->waiting = wait;
    pthread_mutex_unlock(&limit->lock);
    return wait;
}
