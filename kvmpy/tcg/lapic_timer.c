/* SPDX-License-Identifier: Apache-2.0
 *
 * The timer of a local APIC (SDM vol. 3A, 11.5.4). The bus clock is 1 GHz, as KVM has it, so a count is
 * nanoseconds times the divider. Current count is computed from the clock when it is read.
 *
 * Missed periods are not made up for: the next tick is the first multiple of the period that lies ahead. A
 * periodic timer runs no faster than every 200 us (KVM's min_timer_period_us), or a guest could eat a host core.
 */
#include "lapic.h"

#define MIN_PERIOD_NS 200000u

static uint64_t divider(uint32_t tdcr)
{
    unsigned code = (tdcr & 3) | ((tdcr >> 1) & 4);
    return code == 7 ? 1 : 2u << code;
}

static uint64_t now(const struct lapic *apic)
{
    return clock_now(apic->bus->timers->clock);
}

static uint32_t timer_mode(const struct lapic *apic)
{
    return lapic_reg(apic, REG_LVT_TIMER) & LVT_TIMER_MODE;
}

static uint64_t full_period(const struct lapic *apic)
{
    uint64_t period = lapic_reg(apic, REG_TMICT) * divider(lapic_reg(apic, REG_TDCR));
    return timer_mode(apic) == LVT_PERIODIC && period && period < MIN_PERIOD_NS ? MIN_PERIOD_NS : period;
}

static void fire(void *opaque, uint64_t deadline)
{
    struct lapic *apic = opaque;
    if (timer_mode(apic) == LVT_PERIODIC) {
        uint64_t period = full_period(apic), time = now(apic);
        uint64_t missed = time > deadline ? (time - deadline) / period : 0;
        apic->timer_start = deadline + missed * period;
        apic->period = period;
        timer_arm(apic->bus->timers, &apic->timer, apic->timer_start + period);
    } else {
        apic->tsc_deadline = 0;
        apic->period = 0;
    }
    lapic_local_interrupt(apic, REG_LVT_TIMER);
}

void lapic_timer_init(struct lapic *apic)
{
    timer_add(apic->bus->timers, &apic->timer, fire, apic);
}

void lapic_timer_stop(struct lapic *apic)
{
    timer_cancel(&apic->timer);
    apic->period = 0;
    apic->tsc_deadline = 0;
}

void lapic_timer_start(struct lapic *apic, uint32_t count)
{
    lapic_timer_stop(apic);
    uint64_t full = full_period(apic);
    if (!full || timer_mode(apic) == LVT_DEADLINE)
        return;
    uint64_t left = count * divider(lapic_reg(apic, REG_TDCR));
    if (left > full || !left)
        left = full;
    apic->period = full;
    apic->timer_start = now(apic) + left - full; /* may lie before the VM's birth: arithmetic is modulo 2^64 */
    timer_arm(apic->bus->timers, &apic->timer, now(apic) + left);
}

uint32_t lapic_timer_count(const struct lapic *apic)
{
    if (!apic->period || timer_mode(apic) == LVT_DEADLINE)
        return 0;
    uint64_t elapsed = now(apic) - apic->timer_start;
    if (elapsed >= apic->period) {
        if (timer_mode(apic) != LVT_PERIODIC)
            return 0;
        elapsed %= apic->period;
    }
    uint64_t count = (apic->period - elapsed) / divider(lapic_reg(apic, REG_TDCR));
    uint32_t initial = lapic_reg(apic, REG_TMICT);
    return count < initial ? (uint32_t)count : initial;
}

void lapic_timer_divide(struct lapic *apic, uint32_t tdcr)
{
    uint32_t count = lapic_timer_count(apic);
    lapic_put(apic, REG_TDCR, tdcr & 0xB);
    if (apic->period && count)
        lapic_timer_start(apic, count);
}

void lapic_timer_mode_changed(struct lapic *apic, uint32_t old_lvt)
{
    uint32_t old_mode = old_lvt & LVT_TIMER_MODE, mode = timer_mode(apic);
    if (mode == old_mode)
        return;
    if (mode == LVT_DEADLINE || old_mode == LVT_DEADLINE) { /* SDM 11.5.4.1: the change disarms the timer */
        lapic_timer_stop(apic);
        lapic_put(apic, REG_TMICT, 0);
    } else if (apic->period) {
        lapic_timer_start(apic, lapic_timer_count(apic));
    }
}

void lapic_set_tsc_deadline(struct lapic *apic, uint64_t tsc, uint64_t when)
{
    if (!lapic_enabled(apic) || timer_mode(apic) != LVT_DEADLINE)
        return;
    timer_cancel(&apic->timer);
    apic->tsc_deadline = tsc;
    if (!tsc)
        return;
    if (when <= now(apic))
        fire(apic, when);
    else
        timer_arm(apic->bus->timers, &apic->timer, when);
}

uint64_t lapic_get_tsc_deadline(const struct lapic *apic)
{
    return timer_mode(apic) == LVT_DEADLINE ? apic->tsc_deadline : 0;
}
