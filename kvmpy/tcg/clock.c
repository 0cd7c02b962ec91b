/* SPDX-License-Identifier: Apache-2.0 */
#include "clock.h"

#include <time.h>

#define NS_PER_S 1000000000ull

static uint64_t read_clock(clockid_t id)
{
    struct timespec now;
    clock_gettime(id, &now);
    return (uint64_t)now.tv_sec * NS_PER_S + now.tv_nsec;
}

uint64_t clock_host_monotonic(void)
{
    return read_clock(CLOCK_MONOTONIC);
}

uint64_t clock_host_wall(void)
{
    return read_clock(CLOCK_REALTIME);
}

void clock_init(struct clock *clock, bool manual)
{
    clock->manual = manual;
    atomic_init(&clock->manual_now, 0);
    atomic_init(&clock->kvmclock_offset, 0);
    clock->host_start = clock_host_monotonic();
}

uint64_t clock_now(const struct clock *clock)
{
    return clock->manual ? atomic_load(&clock->manual_now) : clock_host_monotonic() - clock->host_start;
}

uint64_t clock_ns_to_ticks(uint64_t ns, uint32_t khz)
{
    return (unsigned __int128)ns * khz / 1000000;
}

uint64_t clock_ticks_to_ns(uint64_t ticks, uint32_t khz)
{
    unsigned __int128 ns = ((unsigned __int128)ticks * 1000000 + khz - 1) / khz;
    return ns > UINT64_MAX ? UINT64_MAX : (uint64_t)ns;
}

void clock_pvclock_scale(uint32_t khz, uint32_t *mul, int8_t *shift)
{
    /* ns = ticks * 1e9 / Hz. Scale Hz by a power of two into (1e9, 2e9]: the fraction 1e9 / hz fits 32 bits. */
    uint64_t hz = (uint64_t)khz * 1000;
    int s = 0;
    while (hz > 2 * NS_PER_S) {
        hz >>= 1;
        s--;
    }
    while (hz <= NS_PER_S) {
        hz <<= 1;
        s++;
    }
    *mul = (uint32_t)(((unsigned __int128)NS_PER_S << 32) / hz);
    *shift = (int8_t)s;
}
