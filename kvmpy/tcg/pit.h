/* SPDX-License-Identifier: Apache-2.0
 *
 * The 8254 interval timer (Intel 231164): three counters at 1.193182 MHz, and port 0x61, which has the gate and the
 * output of counter 2 (the speaker) and the refresh toggle. Counts are computed from the clock when they are
 * read; only counter 0 has a timer, which drives IRQ 0. Under the chips lock (vm.h).
 */
#ifndef KVMPY_TCG_PIT_H
#define KVMPY_TCG_PIT_H

#include <stdbool.h>
#include <stdint.h>

#include <linux/kvm.h>

#include "timer.h"

#define PIT_HZ 1193182u

struct pit {
    struct kvm_pit_channel_state channel[3]; /* count_load_time: clock_now() */
    uint32_t flags;                          /* KVM_PIT_FLAGS_* */
    bool speaker_port;                       /* port 0x61 is here (KVM_PIT_SPEAKER_DUMMY) */

    struct timers *timers;
    struct timer timer;
    uint64_t period; /* ns; of the running count of counter 0 */
    bool reinject;   /* KVM_REINJECT_CONTROL: ticks that the guest was too slow to take are made up for */
    bool acked;      /* the guest took the last tick */
    uint32_t owed;   /* ticks to make up for */
    void (*irq)(void *opaque, bool level);
    void *opaque;
};

void pit_init(struct pit *pit, struct timers *timers, bool speaker_port, void (*irq)(void *, bool), void *opaque);
void pit_free(struct pit *pit);
bool pit_owns_port(const struct pit *pit, uint16_t port);
uint8_t pit_read(struct pit *pit, uint16_t port);
void pit_write(struct pit *pit, uint16_t port, uint8_t value);
/* The guest ended the interrupt of the timer. */
void pit_acknowledged(struct pit *pit);
void pit_set_reinject(struct pit *pit, bool reinject);

void pit_get_state(struct pit *pit, struct kvm_pit_state2 *state);
void pit_set_state(struct pit *pit, const struct kvm_pit_state2 *state);

#endif
