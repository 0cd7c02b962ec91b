/* SPDX-License-Identifier: Apache-2.0
 *
 * An edge pin sends on the rise of its line; an edge while it is masked is lost, as on the real chip. A level
 * pin sends while its line is up and remote IRR is clear; remote IRR falls with the EOI.
 */
#include "ioapic.h"

#include <string.h>

#include "lapic.h"

enum { SELECT = 0x00, WINDOW = 0x10 };
enum { INDEX_ID, INDEX_VERSION, INDEX_ARBITRATION, INDEX_REDIRECTION = 0x10 };
#define VERSION (0x11u | (KVM_IOAPIC_NUM_PINS - 1) << 16)

enum { EDGE, LEVEL };
#define ENTRY_READ_ONLY (1ull << 12 | 1ull << 14) /* delivery status, remote IRR */
#define ENTRY_WRITABLE 0xFF0000000001FFFFull
#define ENTRY_RESET (1ull << 16)

void ioapic_init(struct ioapic *ioapic, struct apic_bus *bus, void (*eoi)(void *, unsigned), void *opaque)
{
    memset(ioapic, 0, sizeof *ioapic);
    ioapic->bus = bus;
    ioapic->eoi = eoi;
    ioapic->opaque = opaque;
    ioapic->state.base_address = IOAPIC_DEFAULT_BASE;
    for (unsigned pin = 0; pin < KVM_IOAPIC_NUM_PINS; pin++)
        ioapic->state.redirtbl[pin].bits = ENTRY_RESET;
}

static int service(struct ioapic *ioapic, unsigned pin)
{
    struct kvm_ioapic_state *s = &ioapic->state;
    bool level = s->redirtbl[pin].fields.trig_mode == LEVEL;
    if (s->redirtbl[pin].fields.mask)
        return -1;
    if (level && s->redirtbl[pin].fields.remote_irr)
        return 0;
    struct apic_message message = {
        .dest = s->redirtbl[pin].fields.dest_id,
        .logical = s->redirtbl[pin].fields.dest_mode,
        .level_triggered = level,
        .mode = s->redirtbl[pin].fields.delivery_mode,
        .vector = s->redirtbl[pin].fields.vector,
    };
    int result = apic_bus_send(ioapic->bus, &message);
    if (level && result >= 0)
        s->redirtbl[pin].fields.remote_irr = 1;
    return result;
}

int ioapic_set_irq(struct ioapic *ioapic, unsigned pin, bool level)
{
    uint32_t bit = 1u << pin;
    bool was = ioapic->state.irr & bit;
    if (!level) {
        ioapic->state.irr &= ~bit;
        return 1;
    }
    ioapic->state.irr |= bit;
    if (was && ioapic->state.redirtbl[pin].fields.trig_mode == EDGE)
        return 0; /* no edge */
    return service(ioapic, pin);
}

void ioapic_eoi(struct ioapic *ioapic, uint8_t vector, bool level_triggered)
{
    for (unsigned pin = 0; pin < KVM_IOAPIC_NUM_PINS; pin++) {
        if (ioapic->state.redirtbl[pin].fields.vector != vector)
            continue;
        bool level = ioapic->state.redirtbl[pin].fields.trig_mode == LEVEL;
        if (level && level_triggered)
            ioapic->state.redirtbl[pin].fields.remote_irr = 0;
        ioapic->eoi(ioapic->opaque, pin); /* may lower the line, or raise it again */
        if (level && level_triggered && (ioapic->state.irr & (1u << pin)))
            service(ioapic, pin);
    }
}

static void write_entry(struct ioapic *ioapic, unsigned pin, bool high, uint32_t value)
{
    uint64_t old = ioapic->state.redirtbl[pin].bits, bits;
    if (high)
        bits = (old & 0xFFFFFFFF) | (uint64_t)value << 32;
    else
        bits = (old & ~0xFFFFFFFFull) | value;
    bits = (bits & ENTRY_WRITABLE & ~ENTRY_READ_ONLY) | (old & ENTRY_READ_ONLY);
    ioapic->state.redirtbl[pin].bits = bits;
    if (ioapic->state.redirtbl[pin].fields.trig_mode == EDGE)
        ioapic->state.redirtbl[pin].fields.remote_irr = 0; /* how Linux and others clear a stuck one */
    else if (ioapic->state.irr & (1u << pin))
        service(ioapic, pin);
}

uint64_t ioapic_read(struct ioapic *ioapic, uint32_t offset, unsigned size)
{
    const struct kvm_ioapic_state *s = &ioapic->state;
    uint32_t value = 0, index = s->ioregsel;
    switch (offset & 0xF0) {
    case SELECT:
        value = index;
        break;
    case WINDOW:
        if (index == INDEX_ID || index == INDEX_ARBITRATION)
            value = (s->id & 0xF) << 24;
        else if (index == INDEX_VERSION)
            value = VERSION;
        else if (index >= INDEX_REDIRECTION && index < INDEX_REDIRECTION + 2 * KVM_IOAPIC_NUM_PINS)
            value = s->redirtbl[(index - INDEX_REDIRECTION) / 2].bits >> (index & 1 ? 32 : 0);
        else
            value = 0xFFFFFFFF;
        break;
    }
    return size < 4 ? value & ((1u << size * 8) - 1) : value;
}

void ioapic_write(struct ioapic *ioapic, uint32_t offset, unsigned size, uint64_t value)
{
    struct kvm_ioapic_state *s = &ioapic->state;
    uint32_t index = s->ioregsel, data = size < 4 ? value & ((1u << size * 8) - 1) : value;
    switch (offset & 0xF0) {
    case SELECT:
        s->ioregsel = data & 0xFF;
        break;
    case WINDOW:
        if (index == INDEX_ID)
            s->id = (data >> 24) & 0xF;
        else if (index >= INDEX_REDIRECTION && index < INDEX_REDIRECTION + 2 * KVM_IOAPIC_NUM_PINS)
            write_entry(ioapic, (index - INDEX_REDIRECTION) / 2, index & 1, data);
        break;
    }
}

void ioapic_set_state(struct ioapic *ioapic, const struct kvm_ioapic_state *state)
{
    ioapic->state = *state;
    ioapic->state.ioregsel &= 0xFF;
    ioapic->state.id &= 0xF;
    ioapic->state.irr &= (1u << KVM_IOAPIC_NUM_PINS) - 1;
    for (unsigned pin = 0; pin < KVM_IOAPIC_NUM_PINS; pin++) {
        ioapic->state.redirtbl[pin].bits &= ENTRY_WRITABLE;
        ioapic->state.redirtbl[pin].fields.delivery_status = 0;
        if ((ioapic->state.irr & (1u << pin)) && ioapic->state.redirtbl[pin].fields.trig_mode == LEVEL)
            service(ioapic, pin);
    }
}
