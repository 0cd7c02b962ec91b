/* SPDX-License-Identifier: Apache-2.0
 *
 * The pair of 8259A interrupt controllers of a PC (Intel 8259A data sheet, 231468-003), with the ELCR
 * registers of the PIIX3 (ports 0x4D0, 0x4D1). Pure register logic: no lock, no thread, no time. The
 * caller holds the lock of the chips (vm.h) around every call.
 */
#ifndef KVMPY_TCG_PIC_H
#define KVMPY_TCG_PIC_H

#include <stdbool.h>
#include <stdint.h>

#include <linux/kvm.h>

struct pic {
    struct kvm_pic_state chip[2]; /* 0 is the master; the slave hangs on its pin 2 */
    bool output;                  /* INTR, which goes to LINT0 of the local APICs */

    void (*intr)(void *opaque, bool level);     /* INTR changed */
    void (*eoi)(void *opaque, unsigned pin);    /* the interrupt of pin 0..15 is done */
    void *opaque;
};

void pic_init(struct pic *pic, void (*intr)(void *, bool), void (*eoi)(void *, unsigned), void *opaque);
void pic_reset(struct pic *pic);

/* Drives pin 0..15. Returns what KVM_IRQ_LINE_STATUS wants: 1 delivered, 0 coalesced, -1 masked. */
int pic_set_irq(struct pic *pic, unsigned pin, bool level);

/* The INTA cycle: the vector of the interrupt that the processor takes now (a spurious one if none is left). */
uint8_t pic_ack(struct pic *pic);

/* Ports 0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1. */
bool pic_owns_port(uint16_t port);
uint8_t pic_read(struct pic *pic, uint16_t port);
void pic_write(struct pic *pic, uint16_t port, uint8_t value);

void pic_set_state(struct pic *pic, unsigned chip, const struct kvm_pic_state *state);

#endif
