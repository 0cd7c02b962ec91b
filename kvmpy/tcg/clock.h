/* SPDX-License-Identifier: Apache-2.0
 *
 * The one clock of a VM. Guest TSC, kvm-clock, LAPIC timers and PIT all derive from `clock_now()`:
 * nanoseconds since the VM was made. It follows CLOCK_MONOTONIC, or, in deterministic mode, the number of
 * instructions run (and jumps to the next timer while every vCPU sleeps).
 */
#ifndef KVMPY_TCG_CLOCK_H
#define KVMPY_TCG_CLOCK_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

/* 1 GHz unless KVM_SET_TSC_KHZ says otherwise: a TSC tick is then a nanosecond, near the speed of the core. */
#define CLOCK_DEFAULT_TSC_KHZ 1000000u
#define CLOCK_MIN_TSC_KHZ 1000u
#define CLOCK_MAX_TSC_KHZ 100000000u

struct clock {
    uint64_t host_start;          /* CLOCK_MONOTONIC at the VM's birth */
    bool manual;                  /* deterministic, or a test: `manual_now` is the time */
    _Atomic uint64_t manual_now;
    _Atomic int64_t kvmclock_offset; /* KVM_SET_CLOCK: kvm-clock minus clock_now() */
};

void clock_init(struct clock *clock, bool manual);
uint64_t clock_now(const struct clock *clock);
uint64_t clock_host_monotonic(void); /* ns */
uint64_t clock_host_wall(void);      /* ns since 1970 */

/* Scaling between nanoseconds and ticks of `khz` kHz, exact and without overflow; rounds down. */
uint64_t clock_ns_to_ticks(uint64_t ns, uint32_t khz);
/* The first nanosecond at which at least `ticks` have passed. */
uint64_t clock_ticks_to_ns(uint64_t ticks, uint32_t khz);

/* struct pvclock_vcpu_time_info of Documentation/virt/kvm/x86/msr.rst. */
struct pvclock_time {
    uint32_t version, pad0;
    uint64_t tsc_timestamp, system_time;
    uint32_t tsc_to_system_mul;
    int8_t tsc_shift;
    uint8_t flags;
    uint8_t pad[2];
};
struct pvclock_wall {
    uint32_t version, sec, nsec;
};
enum { PVCLOCK_TSC_STABLE = 1, PVCLOCK_GUEST_STOPPED = 2 };
/* The multiplier that turns TSC ticks into nanoseconds: ns = ((ticks << shift) * mul) >> 32. */
void clock_pvclock_scale(uint32_t khz, uint32_t *mul, int8_t *shift);

#endif
