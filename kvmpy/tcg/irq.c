/* SPDX-License-Identifier: Apache-2.0
 *
 * From a GSI to interrupt controllers: the routing table (api.rst 4.52), lines with several sources, MSIs.
 * A line is the OR of its sources, so an irqfd that lowers its part leaves what user space asserts alone.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "vm.h"

/* First route of `gsi`; routes of one GSI stand together. */
static struct gsi_route *first_route(struct tcg_vm *vm, uint32_t gsi)
{
    uint32_t low = 0, high = vm->route_count;
    while (low < high) {
        uint32_t middle = (low + high) / 2;
        if (vm->routes[middle].gsi < gsi)
            low = middle + 1;
        else
            high = middle;
    }
    return low < vm->route_count && vm->routes[low].gsi == gsi ? &vm->routes[low] : NULL;
}

static int set_pin(struct tcg_vm *vm, uint32_t chip, uint32_t pin, unsigned source, bool level)
{
    uint8_t *sources = &vm->pin_sources[chip][pin], bit = 1u << source;
    *sources = level ? *sources | bit : *sources & ~bit;
    if (chip == KVM_IRQCHIP_IOAPIC)
        return vm->has_ioapic ? ioapic_set_irq(&vm->ioapic, pin, *sources) : -1;
    return vm->has_pic ? pic_set_irq(&vm->pic, chip * 8 + pin, *sources) : -1;
}

int irq_send_msi(struct tcg_vm *vm, uint64_t address, uint32_t data)
{
    struct apic_message message;
    apic_decode_msi(address, data, &message);
    vm->stats.msi_sent++;
    return apic_bus_send(&vm->apics, &message);
}

int irq_set(struct tcg_vm *vm, uint32_t gsi, unsigned source, bool level)
{
    int status = -1;
    vm->stats.irq_lines++;
    const struct gsi_route *route = first_route(vm, gsi), *end = route ? vm->routes + vm->route_count : NULL;
    for (; route < end && route->gsi == gsi; route++) {
        int one = -1;
        if (route->type == KVM_IRQ_ROUTING_IRQCHIP)
            one = set_pin(vm, route->chip, route->pin, source, level);
        else if (level) /* an MSI is an edge */
            one = irq_send_msi(vm, route->msi_address, route->msi_data);
        if (one >= 0)
            status = status < 0 ? one : status + one;
    }
    return status;
}

void irq_notify_eoi(struct tcg_vm *vm, uint32_t chip, uint32_t pin)
{
    for (uint32_t i = 0; i < vm->route_count; i++) {
        const struct gsi_route *route = &vm->routes[i];
        if (route->type != KVM_IRQ_ROUTING_IRQCHIP || route->chip != chip || route->pin != pin)
            continue;
        uint32_t gsi = route->gsi;
        if (gsi == 0 && vm->has_pit)
            pit_acknowledged(&vm->pit);
        irqfd_eoi(vm, gsi);
        return;
    }
}

/* ---- the table ---- */

static long check_entry(struct tcg_vm *vm, const struct kvm_irq_routing_entry *entry, struct gsi_route *route)
{
    if (entry->gsi >= MAX_GSI)
        return -EINVAL;
    *route = (struct gsi_route){.gsi = entry->gsi, .type = entry->type};
    switch (entry->type) {
    case KVM_IRQ_ROUTING_IRQCHIP: {
        static const uint32_t pins[KVM_NR_IRQCHIPS] = {8, 8, KVM_IOAPIC_NUM_PINS};
        route->chip = entry->u.irqchip.irqchip;
        route->pin = entry->u.irqchip.pin;
        bool bad = entry->flags || !vm->has_pic || route->chip >= KVM_NR_IRQCHIPS || route->pin >= pins[route->chip];
        return bad ? -EINVAL : 0;
    }
    case KVM_IRQ_ROUTING_MSI:
        if (entry->flags)
            return -EINVAL;
        if (vm->apics.ids_32bit && (entry->u.msi.address_hi & 0xFF))
            return -EINVAL;
        /* Without 32-bit ids the high half is not part of the destination. */
        route->msi_address = entry->u.msi.address_lo
                           | (vm->apics.ids_32bit ? (uint64_t)entry->u.msi.address_hi << 32 : 0);
        route->msi_data = entry->u.msi.data;
        return 0;
    default:
        return -EINVAL;
    }
}

static int by_gsi(const void *left, const void *right)
{
    const struct gsi_route *a = left, *b = right;
    return a->gsi < b->gsi ? -1 : a->gsi > b->gsi;
}

/* A GSI may reach several chips, but each only once, and an MSI only alone. */
static bool consistent(const struct gsi_route *routes, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        for (uint32_t j = i + 1; j < count && routes[j].gsi == routes[i].gsi; j++)
            if (routes[i].type == KVM_IRQ_ROUTING_MSI || routes[j].type == KVM_IRQ_ROUTING_MSI
                || routes[i].chip == routes[j].chip)
                return false;
    return true;
}

static void scan_eoi_exits(struct tcg_vm *vm)
{
    memset(vm->eoi_exits, 0, sizeof vm->eoi_exits);
    for (uint32_t i = 0; i < vm->route_count; i++) {
        const struct gsi_route *route = &vm->routes[i];
        if (route->gsi < vm->split_pins && route->type == KVM_IRQ_ROUTING_MSI && (route->msi_data & (1 << 15)))
            vm->eoi_exits[(route->msi_data & 0xFF) / 8] |= 1u << (route->msi_data & 7);
    }
}

long irq_set_routing(struct tcg_vm *vm, const struct kvm_irq_routing *routing, const struct kvm_irq_routing_entry *entries)
{
    if (!vm->has_lapics || routing->nr > MAX_GSI || routing->flags)
        return -EINVAL;
    struct gsi_route *routes = calloc(routing->nr ? routing->nr : 1, sizeof *routes);
    if (!routes)
        return -ENOMEM;
    long error = 0;
    for (uint32_t i = 0; i < routing->nr && !error; i++)
        error = check_entry(vm, &entries[i], &routes[i]);
    if (!error) {
        qsort(routes, routing->nr, sizeof *routes, by_gsi);
        if (!consistent(routes, routing->nr))
            error = -EINVAL;
    }
    if (error) {
        free(routes);
        return error;
    }
    pthread_mutex_lock(&vm->chips_lock);
    struct gsi_route *old = vm->routes;
    vm->routes = routes;
    vm->route_count = routing->nr;
    scan_eoi_exits(vm);
    pthread_mutex_unlock(&vm->chips_lock);
    free(old);
    return 0;
}

/* GSI n is IOAPIC pin n, and below 16 PIC pin n too. */
int irq_init_default_routes(struct tcg_vm *vm)
{
    struct kvm_irq_routing_entry entries[KVM_IOAPIC_NUM_PINS + 16] = {0};
    uint32_t count = 0;
    for (uint32_t gsi = 0; gsi < KVM_IOAPIC_NUM_PINS; gsi++) {
        entries[count].gsi = gsi;
        entries[count].type = KVM_IRQ_ROUTING_IRQCHIP;
        entries[count].u.irqchip.irqchip = KVM_IRQCHIP_IOAPIC;
        entries[count++].u.irqchip.pin = gsi;
        if (gsi >= 16)
            continue;
        entries[count].gsi = gsi;
        entries[count].type = KVM_IRQ_ROUTING_IRQCHIP;
        entries[count].u.irqchip.irqchip = gsi < 8 ? KVM_IRQCHIP_PIC_MASTER : KVM_IRQCHIP_PIC_SLAVE;
        entries[count++].u.irqchip.pin = gsi & 7;
    }
    struct kvm_irq_routing routing = {.nr = count};
    return (int)irq_set_routing(vm, &routing, entries);
}

/* ---- the ioctls ---- */

long irq_line(struct tcg_vm *vm, uint32_t gsi, bool level, int *status)
{
    if (!vm->has_lapics)
        return -ENXIO;
    pthread_mutex_lock(&vm->chips_lock);
    *status = irq_set(vm, gsi, SOURCE_USER, level);
    pthread_mutex_unlock(&vm->chips_lock);
    return 0;
}

long irq_signal_msi(struct tcg_vm *vm, const struct kvm_msi *msi)
{
    if (!vm->has_lapics || msi->flags)
        return -EINVAL;
    if (vm->apics.ids_32bit && (msi->address_hi & 0xFF))
        return -EINVAL;
    uint64_t high = vm->apics.ids_32bit ? (uint64_t)msi->address_hi << 32 : 0;
    pthread_mutex_lock(&vm->chips_lock);
    int result = irq_send_msi(vm, high | msi->address_lo, msi->data);
    pthread_mutex_unlock(&vm->chips_lock);
    return result;
}
