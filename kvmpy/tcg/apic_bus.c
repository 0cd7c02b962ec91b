/* SPDX-License-Identifier: Apache-2.0
 *
 * The bus between IOAPIC, MSIs and local APICs: who is meant (SDM vol. 3A, 11.6.2), and for lowest-priority
 * delivery which one of them takes it.
 */
#include <string.h>

#include "lapic.h"

void apic_bus_init(struct apic_bus *bus, const struct apic_bus_ops *ops, void *opaque, struct timers *timers)
{
    memset(bus, 0, sizeof *bus);
    bus->ops = ops;
    bus->opaque = opaque;
    bus->timers = timers;
}

static bool matches_logical(const struct lapic *apic, uint32_t dest)
{
    uint32_t ldr = lapic_reg(apic, REG_LDR);
    if (lapic_x2(apic))
        return (ldr >> 16) == (dest >> 16) && (ldr & dest & 0xFFFF);
    ldr >>= 24;
    dest &= 0xFF;
    switch (lapic_reg(apic, REG_DFR) >> 28) {
    case 0xF: /* flat: eight APICs, a bit each */
        return ldr & dest;
    case 0x0: /* cluster: four bits of cluster, four of member */
        return (ldr >> 4) == (dest >> 4) && (ldr & dest & 0xF);
    default:
        return false;
    }
}

bool lapic_matches(const struct lapic *apic, const struct apic_message *message)
{
    uint32_t dest = message->dest;
    bool x2 = lapic_x2(apic);
    /* An eight-bit 0xFF from an IOAPIC or MSI means everybody also to an x2APIC, unless the quirk is off. */
    if (x2 && !message->ipi && dest == 0xFF && !apic->bus->no_broadcast_quirk)
        return true;
    if (dest == (x2 ? 0xFFFFFFFF : 0xFF) || dest == 0xFFFFFFFF)
        return true;
    return message->logical ? matches_logical(apic, dest) : dest == lapic_id(apic);
}

static int send_lowest(struct apic_bus *bus, const struct apic_message *message)
{
    struct lapic *best = NULL;
    for (unsigned step = 1; step <= bus->count; step++) { /* begin behind the last one: equals take turns */
        struct lapic *apic = bus->cpu[(bus->round + step) % bus->count];
        if (!apic || !lapic_enabled(apic) || !(lapic_reg(apic, REG_SVR) & (1 << 8)) || !lapic_matches(apic, message))
            continue;
        if (!best || lapic_ppr(apic) < lapic_ppr(best))
            best = apic;
    }
    if (!best)
        return -1;
    bus->round = best->cpu;
    return lapic_accept(best, APIC_LOWEST, message->vector, message->level_triggered);
}

int apic_bus_send(struct apic_bus *bus, const struct apic_message *message)
{
    if (message->mode == APIC_LOWEST)
        return send_lowest(bus, message);
    int result = -1;
    for (unsigned i = 0; i < bus->count; i++) {
        struct lapic *apic = bus->cpu[i];
        if (!apic || !lapic_matches(apic, message))
            continue;
        int accepted = lapic_accept(apic, message->mode, message->vector, message->level_triggered);
        if (accepted >= 0)
            result = result < 0 ? accepted : result + accepted;
    }
    return result;
}

void apic_decode_msi(uint64_t address, uint32_t data, struct apic_message *message)
{
    *message = (struct apic_message){
        .dest = ((address >> 12) & 0xFF) | ((address >> 32) & 0xFFFFFF00),
        .logical = address & (1 << 2),
        .level_triggered = data & (1 << 15),
        .mode = (data >> 8) & 7,
        .vector = data,
    };
}

void apic_bus_set_pic(struct apic_bus *bus, bool level)
{
    bool rising = level && !bus->pic_intr;
    bus->pic_intr = level;
    for (unsigned i = 0; i < bus->count; i++) {
        struct lapic *apic = bus->cpu[i];
        if (!apic)
            continue;
        lapic_update(apic);
        if (rising) /* LINT0 as fixed interrupt or NMI (the NMI watchdog of old kernels) */
            lapic_local_interrupt(apic, REG_LVT_LINT0);
    }
}
