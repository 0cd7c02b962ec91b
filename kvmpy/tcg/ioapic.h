/* SPDX-License-Identifier: Apache-2.0
 *
 * The 82093AA I/O APIC (Intel 290566-001): 24 pins, a redirection entry each, edge or level triggered.
 * Pure register logic under the chips lock (vm.h).
 */
#ifndef KVMPY_TCG_IOAPIC_H
#define KVMPY_TCG_IOAPIC_H

#include <stdbool.h>
#include <stdint.h>

#include <linux/kvm.h>

#define IOAPIC_DEFAULT_BASE 0xFEC00000ull
#define IOAPIC_SIZE 0x100u

struct apic_bus;

struct ioapic {
    struct kvm_ioapic_state state; /* irr: the level of each pin */
    struct apic_bus *bus;
    void (*eoi)(void *opaque, unsigned pin); /* an interrupt of this pin is done */
    void *opaque;
};

void ioapic_init(struct ioapic *ioapic, struct apic_bus *bus, void (*eoi)(void *, unsigned), void *opaque);

/* Drives a pin. Returns what KVM_IRQ_LINE_STATUS wants: > 0 delivered, 0 coalesced, -1 masked or nobody there. */
int ioapic_set_irq(struct ioapic *ioapic, unsigned pin, bool level);
/* A LAPIC ended `vector`: clears remote IRR, and sends again where the line is still asserted. */
void ioapic_eoi(struct ioapic *ioapic, uint8_t vector, bool level_triggered);

uint64_t ioapic_read(struct ioapic *ioapic, uint32_t offset, unsigned size);
void ioapic_write(struct ioapic *ioapic, uint32_t offset, unsigned size, uint64_t value);
void ioapic_set_state(struct ioapic *ioapic, const struct kvm_ioapic_state *state);

#endif
