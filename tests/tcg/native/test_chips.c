/* SPDX-License-Identifier: Apache-2.0
 *
 * The chips by themselves, with a clock that is turned by hand.
 */
#include <string.h>

#include "clock.h"
#include "ioapic.h"
#include "lapic.h"
#include "pic.h"
#include "pit.h"
#include "timer.h"

#include "check.h"

/* ---- 8259A ---- */

static bool intr;
static unsigned ended[24];

static void on_intr(void *opaque, bool level) { (void)opaque; intr = level; }
static void on_eoi(void *opaque, unsigned pin) { (void)opaque; ended[pin]++; }

static void pic_start(struct pic *pic)
{
    memset(ended, 0, sizeof ended);
    pic_init(pic, on_intr, on_eoi, NULL);
    static const struct { uint16_t port; uint8_t value; } words[] = {
        {0x20, 0x11}, {0x21, 0x20}, {0x21, 0x04}, {0x21, 0x01}, {0xA0, 0x11}, {0xA1, 0x28}, {0xA1, 0x02}, {0xA1, 0x01},
    };
    for (unsigned i = 0; i < sizeof words / sizeof *words; i++)
        pic_write(pic, words[i].port, words[i].value);
}

static void test_pic_priority_and_eoi(void)
{
    struct pic pic;
    pic_start(&pic);
    CHECK_EQ(pic_set_irq(&pic, 4, true), 1);
    CHECK(intr);
    CHECK_EQ(pic_ack(&pic), 0x24);
    CHECK(!intr);
    pic_set_irq(&pic, 5, true); /* lower priority than the one in service */
    CHECK(!intr);
    pic_set_irq(&pic, 1, true); /* higher */
    CHECK(intr);
    CHECK_EQ(pic_ack(&pic), 0x21);
    pic_write(&pic, 0x20, 0x20); /* ends 1 */
    CHECK_EQ(ended[1], 1);
    CHECK(!intr);
    pic_write(&pic, 0x20, 0x64); /* specific EOI of 4 */
    CHECK_EQ(ended[4], 1);
    CHECK(intr);
    CHECK_EQ(pic_ack(&pic), 0x25);
}

static void test_pic_cascade_and_spurious(void)
{
    struct pic pic;
    pic_start(&pic);
    pic_set_irq(&pic, 12, true);
    CHECK(intr);
    CHECK_EQ(pic_ack(&pic), 0x2C);
    CHECK_EQ(pic.chip[0].isr, 1 << 2);
    CHECK_EQ(pic.chip[1].isr, 1 << 4);
    pic_write(&pic, 0xA0, 0x20);
    pic_write(&pic, 0x20, 0x20);
    CHECK_EQ(ended[12], 1);
    CHECK_EQ(pic_ack(&pic), 0x27); /* nothing is asked for: IRQ7 and no ISR bit */
    CHECK_EQ(pic.chip[0].isr, 0);
}

static void test_pic_edge_level_mask(void)
{
    struct pic pic;
    pic_start(&pic);
    pic_set_irq(&pic, 3, true);
    pic_set_irq(&pic, 3, true); /* no second edge */
    pic_ack(&pic);
    pic_write(&pic, 0x20, 0x20);
    CHECK(!intr);
    pic_write(&pic, 0x4D0, 0xFF);
    CHECK_EQ(pic_read(&pic, 0x4D0), 0xF8); /* 0, 1 and 2 cannot be level triggered */
    pic_set_irq(&pic, 3, false);
    pic_set_irq(&pic, 3, true);
    pic_ack(&pic);
    pic_write(&pic, 0x20, 0x20);
    CHECK(intr); /* a level line still asserted asks again */
    pic_set_irq(&pic, 3, false);
    CHECK(!intr);
    pic_write(&pic, 0x21, 0x80);
    CHECK_EQ(pic_set_irq(&pic, 7, true), -1);
    CHECK(!intr);
    CHECK_EQ(pic_read(&pic, 0x21), 0x80);
    pic_write(&pic, 0x20, 0x0A);
    CHECK_EQ(pic_read(&pic, 0x20), 0x80); /* IRR */
    pic_write(&pic, 0x21, 0);
    CHECK(intr);
}

static void test_pic_auto_eoi_rotation_poll(void)
{
    struct pic pic;
    pic_start(&pic);
    pic_write(&pic, 0x20, 0x11);
    pic_write(&pic, 0x21, 0x40);
    pic_write(&pic, 0x21, 0x04);
    pic_write(&pic, 0x21, 0x03); /* auto EOI */
    pic_write(&pic, 0x20, 0x80); /* rotate on it */
    pic_set_irq(&pic, 0, true);
    CHECK_EQ(pic_ack(&pic), 0x40);
    CHECK_EQ(pic.chip[0].isr, 0);
    pic_set_irq(&pic, 0, false);
    pic_set_irq(&pic, 0, true);
    pic_set_irq(&pic, 1, true);
    CHECK_EQ(pic_ack(&pic), 0x41); /* 0 is the lowest now */
    pic_write(&pic, 0x20, 0x0C);
    CHECK_EQ(pic_read(&pic, 0x20), 0x80); /* poll: pin 0 */
    pic_write(&pic, 0x20, 0x0C);
    CHECK_EQ(pic_read(&pic, 0x20), 0);
}

/* ---- local APIC, IOAPIC ---- */

struct wires { bool intr[4]; unsigned nmi[4], init[4], sipi[4], eoi[256]; };
static struct wires wires;
static void w_intr(void *o, unsigned cpu, bool level) { (void)o; wires.intr[cpu] = level; }
static void w_nmi(void *o, unsigned cpu) { (void)o; wires.nmi[cpu]++; }
static void w_init(void *o, unsigned cpu) { (void)o; wires.init[cpu]++; }
static void w_sipi(void *o, unsigned cpu, uint8_t vector) { (void)o; wires.sipi[cpu] = vector; }
static struct ioapic *eoi_target;
static void w_eoi(void *o, unsigned cpu, uint8_t vector, bool level)
{
    (void)o;
    (void)cpu;
    wires.eoi[vector]++;
    if (eoi_target)
        ioapic_eoi(eoi_target, vector, level);
}
static const struct apic_bus_ops w_ops = {w_intr, w_nmi, w_init, w_sipi, w_eoi};

struct bench {
    struct clock clock;
    pthread_mutex_t lock;
    struct timers timers;
    struct apic_bus bus;
    struct lapic apic[4];
};

static void bench_start(struct bench *b, unsigned cpus)
{
    memset(&wires, 0, sizeof wires);
    eoi_target = NULL;
    pthread_mutex_init(&b->lock, NULL);
    clock_init(&b->clock, true);
    timers_init(&b->timers, &b->clock, &b->lock);
    apic_bus_init(&b->bus, &w_ops, b, &b->timers);
    for (unsigned i = 0; i < cpus; i++) {
        lapic_init(&b->apic[i], &b->bus, i, i == 0);
        lapic_write(&b->apic[i], 0xF0, 4, 0x1FF);
    }
}

static void advance(struct bench *b, uint64_t ns)
{
    b->clock.manual_now += ns;
    timers_run(&b->timers, clock_now(&b->clock));
}

static int send(struct bench *b, uint64_t address, uint32_t data)
{
    struct apic_message message;
    apic_decode_msi(address, data, &message);
    return apic_bus_send(&b->bus, &message);
}

static void test_lapic_priority(void)
{
    struct bench b;
    bench_start(&b, 1);
    struct lapic *a = &b.apic[0];
    CHECK_EQ(send(&b, 0xFEE00000, 0x41), 1);
    CHECK_EQ(send(&b, 0xFEE00000, 0x41), 0); /* coalesced */
    CHECK(wires.intr[0]);
    CHECK_EQ(lapic_ack(a), 0x41);
    CHECK(!wires.intr[0]);
    send(&b, 0xFEE00000, 0x45); /* same class as the one in service */
    CHECK(!wires.intr[0]);
    send(&b, 0xFEE00000, 0x81);
    CHECK(wires.intr[0]);
    CHECK_EQ(lapic_ack(a), 0x81);
    CHECK_EQ(lapic_read(a, 0xA0, 4), 0x80); /* PPR */
    lapic_write(a, 0xB0, 4, 0);
    CHECK_EQ(wires.eoi[0x81], 1);
    lapic_write(a, 0xB0, 4, 0);
    CHECK_EQ(lapic_ack(a), 0x45);
    lapic_write(a, 0xB0, 4, 0);
    lapic_set_tpr(a, 0x90);
    send(&b, 0xFEE00000, 0x91);
    CHECK(!wires.intr[0]); /* held back by the task priority */
    lapic_set_tpr(a, 0x80);
    CHECK(wires.intr[0]);
    CHECK_EQ(send(&b, 0xFEE00000, 0x05), -1); /* vectors below 16 are illegal */
    lapic_write(a, 0x280, 4, 0);
    CHECK_EQ(lapic_read(a, 0x280, 4), 1 << 6);
}

static void test_lapic_ipi(void)
{
    struct bench b;
    bench_start(&b, 3);
    lapic_write(&b.apic[0], 0x310, 4, 2u << 24);
    lapic_write(&b.apic[0], 0x300, 4, 0x4500); /* INIT to 2 */
    CHECK_EQ(wires.init[2], 1);
    lapic_write(&b.apic[0], 0x300, 4, 0x4608); /* SIPI */
    CHECK_EQ(wires.sipi[2], 8);
    lapic_write(&b.apic[0], 0x300, 4, 0x8500); /* INIT level de-assert: nothing */
    CHECK_EQ(wires.init[2], 1);
    lapic_write(&b.apic[0], 0x300, 4, 0xC4400); /* NMI to all others */
    CHECK_EQ(wires.nmi[0], 0);
    CHECK_EQ(wires.nmi[1], 1);
    CHECK_EQ(wires.nmi[2], 1);
    lapic_write(&b.apic[0], 0x300, 4, 0x44055); /* self */
    CHECK_EQ(lapic_ack(&b.apic[0]), 0x55);
    for (unsigned i = 0; i < 3; i++) { /* flat logical ids */
        lapic_write(&b.apic[i], 0xE0, 4, 0xFFFFFFFF);
        lapic_write(&b.apic[i], 0xD0, 4, 1u << (24 + i));
    }
    CHECK_EQ(send(&b, 0xFEE00000 | 6u << 12 | 4, 0x61), 2);
    CHECK(!wires.intr[0] && wires.intr[1] && wires.intr[2]);
    CHECK_EQ(lapic_ack(&b.apic[1]), 0x61); /* now 1 is busy: the other is lowest */
    CHECK_EQ(send(&b, 0xFEE00000 | 6u << 12 | 4, 0x0152), 1);
    CHECK_EQ(lapic_ack(&b.apic[2]), 0x61);
    lapic_write(&b.apic[2], 0xB0, 4, 0);
    CHECK_EQ(lapic_ack(&b.apic[2]), 0x52);
}

static void test_lapic_x2apic(void)
{
    struct bench b;
    uint64_t value;
    bench_start(&b, 2);
    struct lapic *a = &b.apic[1];
    CHECK(!lapic_read_msr(a, 0x802, &value)); /* not in that mode */
    CHECK(!lapic_set_base(a, APIC_DEFAULT_BASE | APIC_BASE_X2APIC, false, 0));
    CHECK(lapic_set_base(a, APIC_DEFAULT_BASE | APIC_BASE_ENABLE | APIC_BASE_X2APIC, false, 0));
    CHECK(!lapic_set_base(a, APIC_DEFAULT_BASE | APIC_BASE_ENABLE, false, 0)); /* x2 -> x is not allowed */
    CHECK(lapic_read_msr(a, 0x802, &value));
    CHECK_EQ(value, 1);
    CHECK(lapic_read_msr(a, 0x80D, &value));
    CHECK_EQ(value, 2);
    CHECK(!lapic_write_msr(a, 0x80D, 5)); /* LDR is read only */
    CHECK(!lapic_write_msr(a, 0x831, 0)); /* no ICR2 */
    CHECK(!lapic_write_msr(a, 0x80B, 1)); /* EOI takes only 0 */
    CHECK(!lapic_write_msr(a, 0x808, 0x100));
    CHECK(lapic_write_msr(a, 0x83F, 0x77));
    CHECK_EQ(lapic_ack(a), 0x77);
    CHECK(lapic_write_msr(a, 0x830, 0x4066)); /* to id 0 */
    CHECK_EQ(lapic_ack(&b.apic[0]), 0x66);
    struct kvm_lapic_state state;
    lapic_get_state(a, &state);
    uint32_t id;
    memcpy(&id, state.regs + 0x20, 4);
    CHECK_EQ(id, 1u << 24); /* old format */
    CHECK(lapic_set_state(a, &state));
    state.regs[0x23] = 7;
    CHECK(!lapic_set_state(a, &state));
}

static void test_lapic_timer(void)
{
    struct bench b;
    bench_start(&b, 1);
    struct lapic *a = &b.apic[0];
    lapic_write(a, 0x3E0, 4, 0x3);             /* divide by 16 */
    lapic_write(a, 0x320, 4, 0xEF);            /* one-shot */
    lapic_write(a, 0x380, 4, 1000000);
    advance(&b, 8000000);
    CHECK_EQ(lapic_read(a, 0x390, 4), 500000);
    CHECK(!wires.intr[0]);
    advance(&b, 8000000);
    CHECK_EQ(lapic_ack(a), 0xEF);
    CHECK_EQ(lapic_read(a, 0x390, 4), 0);
    lapic_write(a, 0xB0, 4, 0);
    lapic_write(a, 0x320, 4, 0x200EF);         /* periodic */
    lapic_write(a, 0x380, 4, 62500);           /* 1 ms */
    for (unsigned i = 0; i < 3; i++) {
        advance(&b, 1000000);
        CHECK_EQ(lapic_ack(a), 0xEF);
        lapic_write(a, 0xB0, 4, 0);
    }
    advance(&b, 5500000);                      /* missed ticks come once */
    CHECK_EQ(lapic_ack(a), 0xEF);
    lapic_write(a, 0xB0, 4, 0);
    CHECK(!wires.intr[0]);
    CHECK_EQ(lapic_read(a, 0x390, 4), 31250);  /* and the phase is kept */
    advance(&b, 500000);
    CHECK_EQ(lapic_ack(a), 0xEF);
    lapic_write(a, 0xB0, 4, 0);
    lapic_write(a, 0x320, 4, 0x400EF);         /* TSC deadline */
    CHECK_EQ(lapic_read(a, 0x390, 4), 0);
    lapic_set_tsc_deadline(a, 123, clock_now(&b.clock) + 100);
    CHECK_EQ(lapic_get_tsc_deadline(a), 123);
    advance(&b, 99);
    CHECK(!wires.intr[0]);
    advance(&b, 1);
    CHECK_EQ(lapic_ack(a), 0xEF);
    CHECK_EQ(lapic_get_tsc_deadline(a), 0);
    lapic_write(a, 0xB0, 4, 0);
    lapic_set_tsc_deadline(a, 5, 0);           /* in the past: at once */
    CHECK(wires.intr[0]);
}

static void test_ioapic_edge_and_level(void)
{
    struct bench b;
    struct ioapic io;
    bench_start(&b, 1);
    memset(ended, 0, sizeof ended);
    ioapic_init(&io, &b.bus, on_eoi, NULL);
    eoi_target = &io;
    ioapic_write(&io, 0, 4, 1);
    CHECK_EQ(ioapic_read(&io, 0x10, 4), 0x170011);
    CHECK_EQ(ioapic_set_irq(&io, 4, true), -1); /* masked at reset, and the edge is lost */
    ioapic_write(&io, 0, 4, 0x10 + 2 * 4);
    ioapic_write(&io, 0x10, 4, 0x34);
    CHECK(!wires.intr[0]);
    ioapic_set_irq(&io, 4, false);
    CHECK_EQ(ioapic_set_irq(&io, 4, true), 1);
    CHECK_EQ(lapic_ack(&b.apic[0]), 0x34);
    lapic_write(&b.apic[0], 0xB0, 4, 0);
    CHECK_EQ(ended[4], 1);
    CHECK(!wires.intr[0]);

    ioapic_write(&io, 0, 4, 0x10 + 2 * 11);
    ioapic_write(&io, 0x10, 4, 0x8035); /* level */
    ioapic_set_irq(&io, 11, true);
    CHECK_EQ(ioapic_read(&io, 0x10, 4), 0xC035); /* remote IRR */
    CHECK_EQ(lapic_ack(&b.apic[0]), 0x35);
    lapic_write(&b.apic[0], 0xB0, 4, 0);
    CHECK(wires.intr[0]); /* still asserted: sent again */
    CHECK_EQ(lapic_ack(&b.apic[0]), 0x35);
    ioapic_set_irq(&io, 11, false);
    lapic_write(&b.apic[0], 0xB0, 4, 0);
    CHECK(!wires.intr[0]);
    CHECK_EQ(ioapic_read(&io, 0x10, 4), 0x8035);
    ioapic_write(&io, 0, 4, 0x3F);
    ioapic_write(&io, 0, 4, 0xFF);
    CHECK_EQ(ioapic_read(&io, 0x10, 4), 0xFFFFFFFF); /* beyond the registers */
}

/* ---- 8254 ---- */

static unsigned ticks;
static void on_tick(void *opaque, bool level) { (void)opaque; ticks += level; }

static void test_pit_periodic_and_reinject(void)
{
    struct bench b;
    struct pit pit;
    bench_start(&b, 1);
    ticks = 0;
    pit_init(&pit, &b.timers, true, on_tick, NULL);
    pit_write(&pit, 0x43, 0x34); /* counter 0, word, mode 2 */
    pit_write(&pit, 0x40, 0x9C);
    pit_write(&pit, 0x40, 0x2E); /* 11932: about 10 ms */
    advance(&b, 10001000);
    CHECK_EQ(ticks, 1);
    advance(&b, 30000000); /* the guest takes none: they are owed */
    CHECK_EQ(ticks, 1);
    for (unsigned i = 2; i <= 4; i++) {
        pit_acknowledged(&pit);
        CHECK_EQ(ticks, i);
    }
    pit_acknowledged(&pit);
    CHECK_EQ(ticks, 4);
    pit_set_reinject(&pit, false);
    advance(&b, 30000000);
    CHECK_EQ(ticks, 5); /* missed ones are dropped */
}

static void test_pit_counting(void)
{
    struct bench b;
    struct pit pit;
    bench_start(&b, 1);
    pit_init(&pit, &b.timers, true, on_tick, NULL);
    pit_write(&pit, 0x61, 0x01);
    pit_write(&pit, 0x43, 0xB0); /* counter 2, word, mode 0 */
    pit_write(&pit, 0x42, 0x00);
    pit_write(&pit, 0x42, 0x80); /* 32768: 27.46 ms */
    CHECK(!(pit_read(&pit, 0x61) & 0x20));
    advance(&b, 13731500); /* half */
    pit_write(&pit, 0x43, 0x80); /* latch */
    advance(&b, 1000000);
    unsigned count = pit_read(&pit, 0x42);
    count |= pit_read(&pit, 0x42) << 8;
    CHECK(count > 16380 && count < 16388);
    pit_write(&pit, 0x43, 0xE8); /* read back status of counter 2 */
    CHECK_EQ(pit_read(&pit, 0x42) & 0xBF, 0x30);
    advance(&b, 13731500);
    CHECK(pit_read(&pit, 0x61) & 0x20);
    struct kvm_pit_state2 state;
    pit_get_state(&pit, &state);
    state.channels[2].mode = 99; /* hostile */
    state.channels[2].count = 0;
    pit_set_state(&pit, &state);
    CHECK(pit_read(&pit, 0x42) <= 0xFF);
}

static void test_clock_scaling(void)
{
    static const uint32_t rates[] = {1000, 999999, 1000000, 1000001, 2100000, 3800000, 100000000};
    for (unsigned i = 0; i < sizeof rates / sizeof *rates; i++) {
        uint32_t mul;
        int8_t shift;
        clock_pvclock_scale(rates[i], &mul, &shift);
        uint64_t ticks_in_1s = (uint64_t)rates[i] * 1000;
        uint64_t scaled = shift < 0 ? ticks_in_1s >> -shift : ticks_in_1s << shift;
        uint64_t ns = (uint64_t)(((unsigned __int128)scaled * mul) >> 32);
        CHECK(ns <= 1000000000 && ns > 1000000000 - 200);
        CHECK_EQ(clock_ns_to_ticks(1000000000, rates[i]), ticks_in_1s);
        CHECK_EQ(clock_ticks_to_ns(ticks_in_1s, rates[i]), 1000000000);
    }
    CHECK(clock_ticks_to_ns(UINT64_MAX, 1000) == UINT64_MAX);
}

int main(void)
{
    test_pic_priority_and_eoi();
    test_pic_cascade_and_spurious();
    test_pic_edge_level_mask();
    test_pic_auto_eoi_rotation_poll();
    test_lapic_priority();
    test_lapic_ipi();
    test_lapic_x2apic();
    test_lapic_timer();
    test_ioapic_edge_and_level();
    test_pit_periodic_and_reinject();
    test_pit_counting();
    test_clock_scaling();
    return 0;
}
