/* SPDX-License-Identifier: Apache-2.0
 *
 * Modes (8254 data sheet, "Mode definitions"): 0 interrupt on terminal count, 1 retriggerable one-shot, 2 rate
 * generator, 3 square wave, 4 software and 5 hardware triggered strobe. Counter 0's gate is always high.
 */
#include "pit.h"

#include <string.h>

enum { LATCH_COMMAND = 0, ACCESS_LOW = 1, ACCESS_HIGH = 2, ACCESS_WORD = 3 };
/* kvm_pit_channel_state.read_state, write_state */
enum { STATE_LOW = 1, STATE_HIGH = 2, STATE_WORD_LOW = 3, STATE_WORD_HIGH = 4 };

#define MIN_PERIOD_NS 200000u /* 5 kHz; the fastest a guest can make the host thread tick */
#define MAX_OWED 1000u        /* a guest that slept long is not flooded */

static uint64_t now(const struct pit *pit)
{
    return clock_now(pit->timers->clock);
}

static uint64_t ns_to_ticks(uint64_t ns)
{
    return (unsigned __int128)ns * PIT_HZ / 1000000000u;
}

static uint64_t ticks_to_ns(uint64_t ticks)
{
    return ((unsigned __int128)ticks * 1000000000u + PIT_HZ - 1) / PIT_HZ;
}

static uint32_t from_bcd(uint16_t v)
{
    return (v & 15) + 10 * ((v >> 4) & 15) + 100 * ((v >> 8) & 15) + 1000 * ((v >> 12) & 15);
}

static uint16_t to_bcd(uint32_t v)
{
    return v % 10 | v / 10 % 10 << 4 | v / 100 % 10 << 8 | v / 1000 % 10 << 12;
}

static uint64_t elapsed_ticks(const struct pit *pit, const struct kvm_pit_channel_state *c)
{
    return ns_to_ticks(now(pit) - (uint64_t)c->count_load_time);
}

static uint16_t current_count(const struct pit *pit, const struct kvm_pit_channel_state *c)
{
    uint64_t elapsed = elapsed_ticks(pit, c);
    uint32_t count, modulus = c->bcd ? 10000 : 65536;
    switch (c->mode) {
    case 2:
        count = c->count - elapsed % c->count;
        break;
    case 3: /* counts by two, twice a period */
        count = c->count - (2 * elapsed) % c->count;
        break;
    default: /* runs on past zero */
        count = (c->count % modulus + modulus - elapsed % modulus) % modulus;
    }
    return c->bcd ? to_bcd(count % modulus) : count;
}

static bool output(const struct pit *pit, const struct kvm_pit_channel_state *c)
{
    uint64_t elapsed = elapsed_ticks(pit, c);
    switch (c->mode) {
    case 0:
    case 1:
        return elapsed >= c->count;
    case 2: /* low for the last tick of the period */
        return elapsed % c->count != c->count - 1;
    case 3:
        return elapsed % c->count < (c->count + 1) / 2;
    default: /* a strobe: low for one tick */
        return elapsed != c->count;
    }
}

/* ---- counter 0 and IRQ 0 ---- */

static void pulse(struct pit *pit)
{
    pit->irq(pit->opaque, true);
    pit->irq(pit->opaque, false);
}

static void tick(struct pit *pit, uint64_t ticks)
{
    if (!pit->reinject) {
        pulse(pit);
        return;
    }
    uint64_t owed = pit->owed + ticks;
    pit->owed = owed < MAX_OWED ? owed : MAX_OWED;
    if (pit->acked) {
        pit->acked = false;
        pulse(pit);
    }
}

void pit_acknowledged(struct pit *pit)
{
    if (!pit->reinject)
        return;
    if (pit->owed)
        pit->owed--;
    if (pit->owed) {
        pit->acked = false;
        pulse(pit);
    } else {
        pit->acked = true;
    }
}

void pit_set_reinject(struct pit *pit, bool reinject)
{
    pit->reinject = reinject;
    pit->acked = true;
    pit->owed = 0;
}

static void fire(void *opaque, uint64_t deadline)
{
    struct pit *pit = opaque;
    uint64_t ticks = 1;
    if (pit->channel[0].mode == 2 || pit->channel[0].mode == 3) {
        uint64_t time = now(pit);
        uint64_t missed = time > deadline ? (time - deadline) / pit->period : 0;
        ticks += missed;
        timer_arm(pit->timers, &pit->timer, deadline + (missed + 1) * pit->period);
    }
    tick(pit, ticks);
}

static void start_timer(struct pit *pit)
{
    const struct kvm_pit_channel_state *c = &pit->channel[0];
    timer_cancel(&pit->timer);
    pit->owed = 0;
    pit->acked = true;
    if (pit->flags & KVM_PIT_FLAGS_HPET_LEGACY)
        return;
    uint64_t period = ticks_to_ns(c->count), start = c->count_load_time;
    switch (c->mode) {
    case 0:
    case 1:
    case 4: { /* once */
        if (now(pit) - start < period)
            timer_arm(pit->timers, &pit->timer, start + period);
        break;
    }
    case 2:
    case 3: {
        pit->period = period < MIN_PERIOD_NS ? MIN_PERIOD_NS : period;
        uint64_t past = (now(pit) - start) / pit->period;
        timer_arm(pit->timers, &pit->timer, start + (past + 1) * pit->period);
        break;
    }
    }
}

static void load_count(struct pit *pit, unsigned index, uint16_t value)
{
    struct kvm_pit_channel_state *c = &pit->channel[index];
    uint32_t count = c->bcd ? from_bcd(value) : value;
    c->count = count ? count : c->bcd ? 10000 : 65536; /* 0 stands for the modulus */
    if (c->count == 1 && (c->mode == 2 || c->mode == 3))
        c->count = 2; /* 1 is illegal there */
    c->count_load_time = now(pit);
    if (index == 0)
        start_timer(pit);
}

/* ---- ports ---- */

static void latch_count(struct pit *pit, struct kvm_pit_channel_state *c)
{
    if (!c->count_latched) {
        c->latched_count = current_count(pit, c);
        c->count_latched = c->rw_mode;
    }
}

static void latch_status(struct pit *pit, struct kvm_pit_channel_state *c)
{
    if (!c->status_latched) {
        c->status = (uint8_t)output(pit, c) << 7 | c->rw_mode << 4 | c->mode << 1 | c->bcd;
        c->status_latched = 1;
    }
}

static void write_control(struct pit *pit, uint8_t value)
{
    unsigned index = value >> 6, access = (value >> 4) & 3;
    if (index == 3) { /* read-back */
        for (index = 0; index < 3; index++) {
            if (!(value & (2u << index)))
                continue;
            if (!(value & 0x20))
                latch_count(pit, &pit->channel[index]);
            if (!(value & 0x10))
                latch_status(pit, &pit->channel[index]);
        }
        return;
    }
    struct kvm_pit_channel_state *c = &pit->channel[index];
    if (access == LATCH_COMMAND) {
        latch_count(pit, c);
        return;
    }
    c->rw_mode = access;
    c->read_state = c->write_state = access;
    c->mode = (value >> 1) & 7;
    if (c->mode > 5)
        c->mode -= 4; /* X10 and X11: modes 2 and 3 */
    c->bcd = value & 1;
    c->count_latched = c->status_latched = 0;
    if (index == 0)
        timer_cancel(&pit->timer); /* the output stays put until a count is written */
}

static void write_counter(struct pit *pit, unsigned index, uint8_t value)
{
    struct kvm_pit_channel_state *c = &pit->channel[index];
    switch (c->write_state) {
    case STATE_HIGH:
        load_count(pit, index, value << 8);
        break;
    case STATE_WORD_LOW:
        c->write_latch = value;
        c->write_state = STATE_WORD_HIGH;
        break;
    case STATE_WORD_HIGH:
        load_count(pit, index, c->write_latch | value << 8);
        c->write_state = STATE_WORD_LOW;
        break;
    default:
        load_count(pit, index, value);
    }
}

static uint8_t read_counter(struct pit *pit, unsigned index)
{
    struct kvm_pit_channel_state *c = &pit->channel[index];
    if (c->status_latched) {
        c->status_latched = 0;
        return c->status;
    }
    if (c->count_latched) {
        switch (c->count_latched) {
        case ACCESS_WORD:
            c->count_latched = STATE_HIGH; /* the other half comes next */
            return c->latched_count;
        case ACCESS_HIGH:
            c->count_latched = 0;
            return c->latched_count >> 8;
        default:
            c->count_latched = 0;
            return c->latched_count;
        }
    }
    uint16_t count = current_count(pit, c);
    switch (c->read_state) {
    case STATE_HIGH:
        return count >> 8;
    case STATE_WORD_LOW:
        c->read_state = STATE_WORD_HIGH;
        return count;
    case STATE_WORD_HIGH:
        c->read_state = STATE_WORD_LOW;
        return count >> 8;
    default:
        return count;
    }
}

/* Port 0x61: bit 0 gate 2, 1 speaker data, 4 refresh toggle (every 15 us), 5 output 2. */
static uint8_t read_speaker(struct pit *pit)
{
    const struct kvm_pit_channel_state *c = &pit->channel[2];
    uint8_t refresh = (now(pit) / 15000) & 1;
    uint8_t data = (pit->flags & KVM_PIT_FLAGS_SPEAKER_DATA_ON) ? 2 : 0;
    return (c->gate & 1) | data | refresh << 4 | (uint8_t)output(pit, c) << 5;
}

static void write_speaker(struct pit *pit, uint8_t value)
{
    struct kvm_pit_channel_state *c = &pit->channel[2];
    bool rising = (value & 1) && !c->gate;
    c->gate = value & 1;
    if (value & 2)
        pit->flags |= KVM_PIT_FLAGS_SPEAKER_DATA_ON;
    else
        pit->flags &= ~KVM_PIT_FLAGS_SPEAKER_DATA_ON;
    if (rising && c->mode != 0 && c->mode != 4)
        c->count_load_time = now(pit); /* modes 1, 2, 3 and 5 begin anew on the rise of the gate */
}

bool pit_owns_port(const struct pit *pit, uint16_t port)
{
    return (port >= 0x40 && port <= 0x43) || (port == 0x61 && pit->speaker_port);
}

uint8_t pit_read(struct pit *pit, uint16_t port)
{
    if (port == 0x61)
        return read_speaker(pit);
    return port == 0x43 ? 0 : read_counter(pit, port & 3);
}

void pit_write(struct pit *pit, uint16_t port, uint8_t value)
{
    if (port == 0x61)
        write_speaker(pit, value);
    else if (port == 0x43)
        write_control(pit, value);
    else
        write_counter(pit, port & 3, value);
}

/* ---- life and state ---- */

void pit_init(struct pit *pit, struct timers *timers, bool speaker_port, void (*irq)(void *, bool), void *opaque)
{
    memset(pit, 0, sizeof *pit);
    pit->timers = timers;
    pit->speaker_port = speaker_port;
    pit->irq = irq;
    pit->opaque = opaque;
    pit->reinject = true;
    pit->acked = true;
    timer_add(timers, &pit->timer, fire, pit);
    for (unsigned i = 0; i < 3; i++) {
        pit->channel[i].mode = 0xFF; /* as KVM has it until the guest writes a control word */
        pit->channel[i].gate = i != 2;
        pit->channel[i].count = 65536;
        pit->channel[i].count_load_time = now(pit);
    }
}

void pit_free(struct pit *pit)
{
    timer_remove(pit->timers, &pit->timer);
}

void pit_get_state(struct pit *pit, struct kvm_pit_state2 *state)
{
    memset(state, 0, sizeof *state);
    memcpy(state->channels, pit->channel, sizeof state->channels);
    state->flags = pit->flags;
}

void pit_set_state(struct pit *pit, const struct kvm_pit_state2 *state)
{
    pit->flags = state->flags & (KVM_PIT_FLAGS_HPET_LEGACY | KVM_PIT_FLAGS_SPEAKER_DATA_ON);
    for (unsigned i = 0; i < 3; i++) {
        struct kvm_pit_channel_state *c = &pit->channel[i];
        *c = state->channels[i];
        c->mode = c->mode == 0xFF ? 0xFF : c->mode & 7;
        c->rw_mode &= 3;
        c->bcd &= 1;
        c->gate &= 1;
        if (c->count == 0 || c->count > 65536)
            c->count = 65536;
        c->count_load_time = now(pit); /* times of another clock mean nothing here */
    }
    start_timer(pit);
}
