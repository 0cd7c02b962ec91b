/* SPDX-License-Identifier: Apache-2.0
 *
 * 8259A: eight inputs each, IRR (requested), IMR (masked), ISR (in service). Priority runs from
 * `priority_add` upwards; an input in service holds back those of the same and lower priority until EOI.
 */
#include "pic.h"

#include <string.h>

enum { MASTER, SLAVE, CASCADE_PIN = 2, SPURIOUS_PIN = 7, NO_PIN = 8 };
/* kvm_pic_state.init_state: which initialisation word comes next. */
enum { OPERATIONAL, WAIT_ICW2, WAIT_ICW3, WAIT_ICW4 };

static const uint8_t elcr_mask[2] = {0xF8, 0xDE}; /* IRQ 0, 1, 2, 8 and 13 are always edge triggered */

/* Rank of the most urgent of `pins`: 0 first, NO_PIN if there is none. */
static unsigned rank_of(const struct kvm_pic_state *s, uint8_t pins)
{
    for (unsigned rank = 0; rank < 8; rank++)
        if (pins & (1u << ((rank + s->priority_add) & 7)))
            return rank;
    return NO_PIN;
}

/* The pin this chip asks service for, or NO_PIN. */
static unsigned requested_pin(const struct kvm_pic_state *s, bool master)
{
    unsigned rank = rank_of(s, s->irr & ~s->imr);
    if (rank == NO_PIN)
        return NO_PIN;
    uint8_t blocking = s->isr;
    if (s->special_mask)
        blocking &= ~s->imr;
    if (master && s->special_fully_nested_mode)
        blocking &= ~(1u << CASCADE_PIN); /* the slave may interrupt its own service */
    return rank < rank_of(s, blocking) ? (rank + s->priority_add) & 7 : NO_PIN;
}

static int set_pin(struct kvm_pic_state *s, unsigned pin, bool level)
{
    uint8_t bit = 1u << pin;
    int delivered = 1;
    if (level) {
        bool triggers = (s->elcr & bit) || !(s->last_irr & bit);
        if (triggers) {
            delivered = !(s->irr & bit);
            s->irr |= bit;
        }
        s->last_irr |= bit;
    } else {
        if (s->elcr & bit)
            s->irr &= ~bit;
        s->last_irr &= ~bit;
    }
    return (s->imr & bit) ? -1 : delivered;
}

static void update(struct pic *pic)
{
    bool slave = requested_pin(&pic->chip[SLAVE], false) != NO_PIN;
    if (slave) { /* the cascade is a pulse for each request, so that an edge-triggered pin 2 sees every one */
        set_pin(&pic->chip[MASTER], CASCADE_PIN, true);
        set_pin(&pic->chip[MASTER], CASCADE_PIN, false);
    }
    bool output = requested_pin(&pic->chip[MASTER], true) != NO_PIN;
    if (output != pic->output) {
        pic->output = output;
        pic->intr(pic->opaque, output);
    }
}

void pic_init(struct pic *pic, void (*intr)(void *, bool), void (*eoi)(void *, unsigned), void *opaque)
{
    memset(pic, 0, sizeof *pic);
    pic->intr = intr;
    pic->eoi = eoi;
    pic->opaque = opaque;
    pic->chip[MASTER].elcr_mask = elcr_mask[MASTER];
    pic->chip[SLAVE].elcr_mask = elcr_mask[SLAVE];
}

static void reset_chip(struct kvm_pic_state *s, uint8_t keep_elcr, uint8_t mask)
{
    memset(s, 0, sizeof *s);
    s->elcr = keep_elcr;
    s->elcr_mask = mask;
}

void pic_reset(struct pic *pic)
{
    for (unsigned i = 0; i < 2; i++)
        reset_chip(&pic->chip[i], 0, elcr_mask[i]);
    update(pic);
}

int pic_set_irq(struct pic *pic, unsigned pin, bool level)
{
    int status = set_pin(&pic->chip[pin >> 3], pin & 7, level);
    update(pic);
    return status;
}

static void end_of_interrupt(struct pic *pic, unsigned chip, unsigned pin)
{
    pic->chip[chip].isr &= ~(1u << pin);
    pic->eoi(pic->opaque, chip * 8 + pin);
}

static void acknowledge(struct pic *pic, unsigned chip, unsigned pin)
{
    struct kvm_pic_state *s = &pic->chip[chip];
    uint8_t bit = 1u << pin;
    s->isr |= bit;
    if (!(s->elcr & bit))
        s->irr &= ~bit;
    if (s->auto_eoi) {
        if (s->rotate_on_auto_eoi)
            s->priority_add = (pin + 1) & 7;
        end_of_interrupt(pic, chip, pin);
    }
}

uint8_t pic_ack(struct pic *pic)
{
    unsigned chip = MASTER, pin = requested_pin(&pic->chip[MASTER], true);
    if (pin == NO_PIN) {
        pin = SPURIOUS_PIN; /* the request went away before INTA: IRQ7, ISR unchanged (data sheet, "Spurious") */
    } else {
        acknowledge(pic, MASTER, pin);
        if (pin == CASCADE_PIN) {
            chip = SLAVE;
            pin = requested_pin(&pic->chip[SLAVE], false);
            if (pin == NO_PIN)
                pin = SPURIOUS_PIN;
            else
                acknowledge(pic, SLAVE, pin);
        }
    }
    uint8_t vector = pic->chip[chip].irq_base + pin;
    update(pic);
    return vector;
}

/* OCW2: end of interrupt and priority rotation; the operation is bits 7..5. */
static void write_ocw2(struct pic *pic, unsigned chip, uint8_t value)
{
    enum { AUTO_ROTATE_OFF = 0, EOI = 1, EOI_PIN = 3, AUTO_ROTATE_ON = 4, EOI_ROTATE = 5, SET_PRIORITY = 6, EOI_PIN_ROTATE = 7 };
    struct kvm_pic_state *s = &pic->chip[chip];
    unsigned operation = value >> 5, pin = value & 7;
    switch (operation) {
    case AUTO_ROTATE_OFF:
    case AUTO_ROTATE_ON:
        s->rotate_on_auto_eoi = operation == AUTO_ROTATE_ON;
        return;
    case SET_PRIORITY:
        s->priority_add = (pin + 1) & 7;
        return;
    case EOI:
    case EOI_ROTATE: {
        unsigned rank = rank_of(s, s->isr);
        if (rank == NO_PIN)
            return;
        pin = (rank + s->priority_add) & 7;
        if (operation == EOI_ROTATE)
            s->priority_add = (pin + 1) & 7;
        break;
    }
    case EOI_PIN_ROTATE:
        s->priority_add = (pin + 1) & 7;
        break;
    case EOI_PIN:
        break;
    default: /* 2 is "no operation" */
        return;
    }
    end_of_interrupt(pic, chip, pin);
}

static void write_command(struct pic *pic, unsigned chip, uint8_t value)
{
    struct kvm_pic_state *s = &pic->chip[chip];
    if (value & 0x10) { /* ICW1: starts initialisation; what a level input asks for stays requested */
        uint8_t still = s->last_irr & s->elcr, was_in_service = s->isr;
        bool four = value & 1;
        reset_chip(s, s->elcr, s->elcr_mask);
        s->irr = s->last_irr = still;
        s->init4 = four;
        s->init_state = WAIT_ICW2;
        for (unsigned pin = 0; pin < 8; pin++)
            if (was_in_service & (1u << pin))
                pic->eoi(pic->opaque, chip * 8 + pin);
    } else if (value & 0x08) { /* OCW3 */
        if (value & 0x04)
            s->poll = 1;
        if (value & 0x02)
            s->read_reg_select = value & 1;
        if (value & 0x40)
            s->special_mask = (value >> 5) & 1;
    } else {
        write_ocw2(pic, chip, value);
    }
}

static void write_data(struct kvm_pic_state *s, uint8_t value)
{
    switch (s->init_state) {
    case OPERATIONAL:
        s->imr = value; /* OCW1 */
        break;
    case WAIT_ICW2:
        s->irq_base = value & 0xF8;
        s->init_state = WAIT_ICW3;
        break;
    case WAIT_ICW3: /* which pin has the slave: wired, so not kept */
        s->init_state = s->init4 ? WAIT_ICW4 : OPERATIONAL;
        break;
    case WAIT_ICW4:
        s->special_fully_nested_mode = (value >> 4) & 1;
        s->auto_eoi = (value >> 1) & 1;
        s->init_state = OPERATIONAL;
        break;
    }
}

bool pic_owns_port(uint16_t port)
{
    return (port & ~1u) == 0x20 || (port & ~1u) == 0xA0 || (port & ~1u) == 0x4D0;
}

void pic_write(struct pic *pic, uint16_t port, uint8_t value)
{
    if ((port & ~1u) == 0x4D0) {
        struct kvm_pic_state *s = &pic->chip[port & 1];
        s->elcr = value & s->elcr_mask;
    } else if (port & 1) {
        write_data(&pic->chip[port >= 0xA0], value);
    } else {
        write_command(pic, port >= 0xA0, value);
    }
    update(pic);
}

/* A read after OCW3 with P=1 is an INTA cycle in disguise: it answers 0x80 + pin, or 0. */
static uint8_t poll(struct pic *pic, unsigned chip)
{
    struct kvm_pic_state *s = &pic->chip[chip];
    s->poll = 0;
    unsigned pin = requested_pin(s, chip == MASTER);
    if (pin == NO_PIN)
        return 0;
    acknowledge(pic, chip, pin);
    update(pic);
    return 0x80 | pin;
}

uint8_t pic_read(struct pic *pic, uint16_t port)
{
    if ((port & ~1u) == 0x4D0)
        return pic->chip[port & 1].elcr;
    unsigned chip = port >= 0xA0;
    struct kvm_pic_state *s = &pic->chip[chip];
    if (s->poll)
        return poll(pic, chip);
    if (port & 1)
        return s->imr;
    return s->read_reg_select ? s->isr : s->irr;
}

void pic_set_state(struct pic *pic, unsigned chip, const struct kvm_pic_state *state)
{
    struct kvm_pic_state *s = &pic->chip[chip];
    *s = *state;
    s->elcr_mask = elcr_mask[chip];
    s->elcr &= s->elcr_mask;
    s->priority_add &= 7;
    s->irq_base &= 0xF8;
    if (s->init_state > WAIT_ICW4)
        s->init_state = OPERATIONAL;
    update(pic);
}
