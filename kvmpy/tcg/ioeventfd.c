/* SPDX-License-Identifier: Apache-2.0
 *
 * Writes that never leave the engine: ioeventfds (api.rst 4.59), which signal an eventfd, and coalesced zones
 * (4.116), which queue the write in a ring that user space empties at its next exit. Both stand in one table
 * that vCPUs read without a lock (see vm.h).
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "event.h"
#include "vm.h"

#define MAX_ENTRIES 1000u /* NR_IOBUS_DEVS of the kernel */

struct ioevent {
    uint64_t addr, datamatch;
    uint32_t size; /* 0: any */
    bool pio, match;
    struct event event;
};
struct zone {
    uint64_t addr;
    uint32_t size;
    bool pio;
};
struct io_table {
    uint32_t events, zones;
    struct ioevent event[MAX_ENTRIES];
    struct zone zone[MAX_ENTRIES];
};

static struct io_table *copy_table(struct tcg_vm *vm)
{
    const struct io_table *old = atomic_load(&vm->io);
    struct io_table *table = malloc(sizeof *table);
    if (!table)
        return NULL;
    table->events = old ? old->events : 0;
    table->zones = old ? old->zones : 0;
    if (old) {
        memcpy(table->event, old->event, old->events * sizeof old->event[0]);
        memcpy(table->zone, old->zone, old->zones * sizeof old->zone[0]);
    }
    return table;
}

static void replace_table(struct tcg_vm *vm, struct io_table *table)
{
    struct io_table *old = atomic_exchange(&vm->io, table);
    vm_quiesce(vm, 0);
    free(old);
}

/* ---- ioeventfd; vm.lock held ---- */

static bool collides(const struct ioevent *a, const struct ioevent *b)
{
    if (a->pio != b->pio || a->addr != b->addr)
        return false;
    if (!a->size || !b->size)
        return true;
    return a->size == b->size && (!a->match || !b->match || a->datamatch == b->datamatch);
}

static long assign(struct tcg_vm *vm, const struct ioevent *wanted, int fd)
{
    struct io_table *table = copy_table(vm);
    if (!table)
        return -ENOMEM;
    struct ioevent added = *wanted;
    long error = event_hold(&added.event, fd);
    if (error) {
        free(table);
        return error;
    }
    for (uint32_t i = 0; i < table->events && !error; i++)
        if (collides(&table->event[i], &added))
            error = -EEXIST;
    if (!error && table->events + table->zones >= MAX_ENTRIES)
        error = -ENOSPC;
    if (error) {
        event_release(&added.event);
        free(table);
        return error;
    }
    table->event[table->events++] = added;
    replace_table(vm, table);
    return 0;
}

static long deassign(struct tcg_vm *vm, const struct ioevent *wanted, int fd)
{
    struct io_table *table = copy_table(vm);
    if (!table)
        return -ENOMEM;
    for (uint32_t i = 0; i < table->events; i++) {
        struct ioevent *e = &table->event[i];
        if (e->pio != wanted->pio || e->addr != wanted->addr || e->size != wanted->size || e->match != wanted->match
            || (e->match && e->datamatch != wanted->datamatch) || !event_same(&e->event, fd))
            continue;
        struct event gone = e->event;
        *e = table->event[--table->events];
        replace_table(vm, table);
        event_release(&gone);
        return 0;
    }
    free(table);
    return -ENOENT;
}

long ioeventfd_ioctl(struct tcg_vm *vm, const struct kvm_ioeventfd *request)
{
    const uint32_t known = KVM_IOEVENTFD_FLAG_DATAMATCH | KVM_IOEVENTFD_FLAG_PIO | KVM_IOEVENTFD_FLAG_DEASSIGN;
    if (request->flags & ~known)
        return -EINVAL;
    struct ioevent wanted = {
        .addr = request->addr, .datamatch = request->datamatch, .size = request->len,
        .pio = request->flags & KVM_IOEVENTFD_FLAG_PIO, .match = request->flags & KVM_IOEVENTFD_FLAG_DATAMATCH,
    };
    if (request->flags & KVM_IOEVENTFD_FLAG_DEASSIGN)
        return deassign(vm, &wanted, request->fd);
    if (wanted.size > 8 || (wanted.size & (wanted.size - 1)))
        return -EINVAL;
    if (wanted.addr + wanted.size < wanted.addr || (!wanted.size && wanted.match))
        return -EINVAL;
    return assign(vm, &wanted, request->fd);
}

/* ---- coalesced zones; vm.lock held ---- */

static bool contains(const struct zone *zone, bool pio, uint64_t addr, uint64_t size)
{
    return zone->pio == pio && addr >= zone->addr && size <= zone->size && addr - zone->addr <= zone->size - size;
}

long coalesced_zone(struct tcg_vm *vm, const struct kvm_coalesced_mmio_zone *zone, bool add)
{
    if (zone->pio > 1)
        return -EINVAL;
    struct io_table *table = copy_table(vm);
    if (!table)
        return -ENOMEM;
    if (add) {
        if (table->events + table->zones >= MAX_ENTRIES) {
            free(table);
            return -ENOSPC;
        }
        table->zone[table->zones++] = (struct zone){.addr = zone->addr, .size = zone->size, .pio = zone->pio};
    } else {
        for (uint32_t i = 0; i < table->zones;) {
            if (contains(&table->zone[i], zone->pio, zone->addr, zone->size))
                table->zone[i] = table->zone[--table->zones];
            else
                i++;
        }
    }
    replace_table(vm, table);
    return 0;
}

static bool coalesce(struct tcg_vm *vm, bool pio, uint64_t addr, unsigned size, uint64_t value)
{
    struct kvm_coalesced_mmio_ring *ring = vm->coalesced.ring;
    bool room = false;
    pthread_mutex_lock(&vm->coalesced.lock);
    uint32_t last = __atomic_load_n(&ring->last, __ATOMIC_RELAXED); /* user space can write it: checked */
    uint32_t first = __atomic_load_n(&ring->first, __ATOMIC_ACQUIRE);
    if (last < KVM_COALESCED_MMIO_MAX && (last + 1) % KVM_COALESCED_MMIO_MAX != first) {
        struct kvm_coalesced_mmio *entry = &ring->coalesced_mmio[last];
        entry->phys_addr = addr;
        entry->len = size;
        entry->pio = pio;
        memcpy(entry->data, &value, size);
        __atomic_store_n(&ring->last, (uint32_t)((last + 1) % KVM_COALESCED_MMIO_MAX), __ATOMIC_RELEASE);
        room = true;
    }
    pthread_mutex_unlock(&vm->coalesced.lock);
    return room;
}

/* ---- the guest's writes ---- */

bool io_write(struct tcg_vm *vm, bool pio, uint64_t addr, unsigned size, uint64_t value)
{
    const struct io_table *table = atomic_load_explicit(&vm->io, memory_order_acquire);
    if (!table)
        return false;
    if (size < 8)
        value &= (1ull << size * 8) - 1;
    for (uint32_t i = 0; i < table->events; i++) {
        const struct ioevent *e = &table->event[i];
        if (e->addr != addr || e->pio != pio || (e->size && e->size != size) || (e->match && e->datamatch != value))
            continue;
        event_signal(&e->event);
        return true;
    }
    for (uint32_t i = 0; i < table->zones; i++)
        if (contains(&table->zone[i], pio, addr, size))
            return coalesce(vm, pio, addr, size, value);
    return false;
}

void io_free(struct tcg_vm *vm)
{
    struct io_table *table = atomic_load(&vm->io);
    for (uint32_t i = 0; table && i < table->events; i++)
        event_release(&table->event[i].event);
    free(table);
}
