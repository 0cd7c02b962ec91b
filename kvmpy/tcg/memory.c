/* SPDX-License-Identifier: Apache-2.0
 *
 * Memory slots (api.rst 4.35): which guest physical page is which host page. The table is an array sorted by
 * address, replaced as a whole. A vCPU looks pages up without a lock and caches host addresses in its softTLB, so a
 * change stops every vCPU once and makes it flush before it touches memory again; after the ioctl nobody
 * knows the old host address any more and user space may unmap it.
 *
 * Reading and writing host memory that user space unmapped is a fault of this process, as it is for any program:
 * whoever registers memory keeps it mapped until the slot is deleted.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "vm.h"

#define MAX_PAGES ((1ull << 31) - 1) /* KVM_MEM_MAX_NR_PAGES */
#define MAX_GPA (1ull << 52)

static uint64_t dirty_words(uint64_t pages)
{
    return (pages + 63) / 64;
}

/* Zeroed memory that costs nothing until touched: one word per page adds up. */
static void *reserve(size_t size)
{
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return memory == MAP_FAILED ? NULL : memory;
}

static void release_dirty(struct slot *slot)
{
    if (slot->dirty)
        munmap((void *)slot->dirty, dirty_words(slot->pages) * 8);
    slot->dirty = NULL;
}

static void release_slot(struct slot *slot)
{
    release_dirty(slot);
    if (slot->code)
        munmap((void *)slot->code, slot->pages * 8);
    slot->code = NULL;
}

int memory_init(struct tcg_vm *vm)
{
    struct slot_table *table = calloc(1, sizeof *table);
    atomic_init(&vm->slots, table);
    return table ? 0 : -ENOMEM;
}

void memory_free(struct tcg_vm *vm)
{
    struct slot_table *table = atomic_load(&vm->slots);
    if (!table)
        return;
    for (uint32_t i = 0; i < table->count; i++)
        release_slot(&table->slot[i]);
    free(table);
}

struct slot *memory_find(struct slot_table *table, uint64_t gpa)
{
    uint32_t low = 0, high = table->count;
    while (low < high) {
        uint32_t middle = (low + high) / 2;
        if (table->slot[middle].gpa <= gpa)
            low = middle + 1;
        else
            high = middle;
    }
    if (!low)
        return NULL;
    struct slot *slot = &table->slot[low - 1];
    return (gpa - slot->gpa) >> PAGE_SHIFT < slot->pages ? slot : NULL;
}

struct slot *memory_find_id(struct slot_table *table, uint32_t id)
{
    for (uint32_t i = 0; i < table->count; i++)
        if (table->slot[i].id == id)
            return &table->slot[i];
    return NULL;
}

/* A copy of the table without slot `leave_out` and with `add` (either may be NULL), still sorted. */
static struct slot_table *copy_table(const struct slot_table *old, const struct slot *leave_out, const struct slot *add)
{
    struct slot_table *table = malloc(sizeof *table + (old->count + 1) * sizeof(struct slot));
    if (!table)
        return NULL;
    table->count = 0;
    for (uint32_t i = 0; i < old->count; i++) {
        if (add && add->gpa < old->slot[i].gpa) {
            table->slot[table->count++] = *add;
            add = NULL;
        }
        if (&old->slot[i] != leave_out)
            table->slot[table->count++] = old->slot[i];
    }
    if (add)
        table->slot[table->count++] = *add;
    return table;
}

/* Publish `table`; when this returns no vCPU uses the old one, which is freed. */
static void replace_table(struct tcg_vm *vm, struct slot_table *table)
{
    struct slot_table *old = atomic_exchange(&vm->slots, table);
    vm_quiesce(vm, CPU_REQ_TLB);
    free(old);
}

static bool overlaps(const struct slot_table *table, const struct slot *self, uint64_t gpa, uint64_t size)
{
    for (uint32_t i = 0; i < table->count; i++) {
        const struct slot *s = &table->slot[i];
        if (s != self && gpa < s->gpa + (s->pages << PAGE_SHIFT) && s->gpa < gpa + size)
            return true;
    }
    return false;
}

static long start_logging(struct tcg_vm *vm, struct slot *slot)
{
    uint64_t words = dirty_words(slot->pages);
    slot->dirty = reserve(words * 8);
    if (!slot->dirty)
        return -ENOMEM;
    if (vm->manual_protect & KVM_DIRTY_LOG_INITIALLY_SET) {
        for (uint64_t page = 0; page < slot->pages; page++)
            slot->dirty[page / 64] |= 1ull << (page % 64);
    }
    return 0;
}

static long delete_slot(struct tcg_vm *vm, struct slot_table *table, struct slot *slot)
{
    struct slot gone = *slot;
    struct slot_table *next = copy_table(table, slot, NULL);
    if (!next)
        return -ENOMEM;
    cpu_code_written(&vm->core, NULL, gone.gpa, gone.pages << PAGE_SHIFT);
    replace_table(vm, next);
    release_slot(&gone);
    return 0;
}

static long create_slot(struct tcg_vm *vm, struct slot_table *table, struct slot *slot)
{
    slot->code = reserve(slot->pages * 8);
    long error = slot->code ? 0 : -ENOMEM;
    if (!error && (slot->flags & KVM_MEM_LOG_DIRTY_PAGES))
        error = start_logging(vm, slot);
    struct slot_table *next = error ? NULL : copy_table(table, NULL, slot);
    if (!next) {
        release_slot(slot);
        return error ? error : -ENOMEM;
    }
    replace_table(vm, next);
    return 0;
}

static long change_slot(struct tcg_vm *vm, struct slot_table *table, struct slot *old, uint64_t gpa, uint32_t flags)
{
    struct slot changed = *old, gone = {.pages = old->pages};
    changed.flags = flags;
    bool moved = gpa != old->gpa;
    if (moved) {
        if (overlaps(table, old, gpa, old->pages << PAGE_SHIFT))
            return -EEXIST;
        changed.gpa = gpa;
        changed.code = reserve(changed.pages * 8); /* nothing was decoded at the new address yet */
        if (!changed.code)
            return -ENOMEM;
        gone.code = old->code;
    }
    bool logged = old->flags & KVM_MEM_LOG_DIRTY_PAGES, log = flags & KVM_MEM_LOG_DIRTY_PAGES;
    if (logged && !log) {
        gone.dirty = old->dirty;
        changed.dirty = NULL;
    } else if (log && !logged && start_logging(vm, &changed) < 0) {
        if (moved)
            munmap((void *)changed.code, changed.pages * 8);
        return -ENOMEM;
    }
    struct slot_table *next = copy_table(table, old, &changed);
    if (!next) {
        if (moved)
            munmap((void *)changed.code, changed.pages * 8);
        if (log && !logged)
            release_dirty(&changed);
        return -ENOMEM;
    }
    if (moved)
        cpu_code_written(&vm->core, NULL, old->gpa, old->pages << PAGE_SHIFT);
    replace_table(vm, next);
    release_slot(&gone);
    return 0;
}

static long set_region(struct tcg_vm *vm, const struct kvm_userspace_memory_region *r)
{
    struct slot_table *table = atomic_load(&vm->slots);
    struct slot *old = memory_find_id(table, r->slot);
    uint64_t pages = r->memory_size >> PAGE_SHIFT;
    if (!pages)
        return old ? delete_slot(vm, table, old) : -EINVAL;
    uint8_t *host = (uint8_t *)(uintptr_t)r->userspace_addr;
    if (old) {
        if (old->host != host || old->pages != pages || ((old->flags ^ r->flags) & KVM_MEM_READONLY))
            return -EINVAL;
        if (old->gpa == r->guest_phys_addr && old->flags == r->flags)
            return 0;
        return change_slot(vm, table, old, r->guest_phys_addr, r->flags);
    }
    if (overlaps(table, NULL, r->guest_phys_addr, r->memory_size))
        return -EEXIST;
    struct slot slot = {
        .id = r->slot, .flags = r->flags, .gpa = r->guest_phys_addr, .pages = pages, .host = host,
    };
    return create_slot(vm, table, &slot);
}

long memory_set_region(struct tcg_vm *vm, const struct kvm_userspace_memory_region *r)
{
    const uint64_t offset_mask = PAGE_SIZE - 1;
    if (r->flags & ~(KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY))
        return -EINVAL;
    if ((r->memory_size | r->guest_phys_addr | r->userspace_addr) & offset_mask)
        return -EINVAL;
    if (r->slot >= MAX_SLOTS) /* a second address space (bits 16..) is SMM's, which is not here */
        return -EINVAL;
    if (r->memory_size >> PAGE_SHIFT > MAX_PAGES || r->guest_phys_addr + r->memory_size < r->guest_phys_addr)
        return -EINVAL;
    if (r->guest_phys_addr + r->memory_size > MAX_GPA || r->userspace_addr + r->memory_size < r->userspace_addr)
        return -EINVAL;
    if (r->memory_size && !r->userspace_addr)
        return -EINVAL;
    pthread_mutex_lock(&vm->slots_lock);
    long result = set_region(vm, r);
    pthread_mutex_unlock(&vm->slots_lock);
    return result;
}

/* ---- for the core ---- */

void tcg_phys_to_host(struct tcg_vm_core *core, uint64_t gpa, struct page_info *page)
{
    struct slot *slot = memory_find(atomic_load_explicit(&vm_of_core(core)->slots, memory_order_acquire), gpa);
    if (!slot) {
        *page = (struct page_info){0};
        return;
    }
    uint64_t index = (gpa - slot->gpa) >> PAGE_SHIFT;
    page->host = slot->host + (index << PAGE_SHIFT);
    page->code = &slot->code[index];
    page->flags = PAGE_RAM | ((slot->flags & KVM_MEM_READONLY) ? PAGE_READONLY : 0)
                | ((slot->flags & KVM_MEM_LOG_DIRTY_PAGES) ? PAGE_LOG : 0);
}

/* ---- for devices ---- */

void memory_host_wrote(struct tcg_vm *vm, uint64_t gpa, uint64_t size)
{
    if (!size)
        return;
    /* Most pages that devices write never held code. Whoever translates marks the page first and compares the bytes once more
       behind a fence (block.c, build): so it sees what was written, or we see its mark. */
    atomic_thread_fence(memory_order_seq_cst);
    if (pthread_mutex_trylock(&vm->slots_lock)) { /* the slots are changing: without a look, then */
        cpu_code_written(&vm->core, NULL, gpa, size);
        return;
    }
    struct slot_table *table = atomic_load(&vm->slots);
    uint64_t end = gpa + size, start = 0, stop = 0; /* a run of pages with code */
    while (gpa < end) {
        uint64_t next = (gpa | (PAGE_SIZE - 1)) + 1, part = next < end ? next - gpa : end - gpa;
        struct slot *slot = memory_find(table, gpa);
        if (slot && atomic_load_explicit(&slot->code[(gpa - slot->gpa) >> PAGE_SHIFT], memory_order_relaxed)) {
            if (stop != gpa) {
                cpu_code_written(&vm->core, NULL, start, stop - start);
                start = gpa;
            }
            stop = gpa + part;
        }
        gpa += part;
    }
    cpu_code_written(&vm->core, NULL, start, stop - start);
    pthread_mutex_unlock(&vm->slots_lock);
}

/* ---- for the engine itself: kvm-clock pages and the like ---- */

static uint8_t *host_range(struct vcpu *vcpu, uint64_t gpa, size_t size, bool write)
{
    struct slot *slot = memory_find(atomic_load(&vcpu->vm->slots), gpa);
    if (!slot || (write && (slot->flags & KVM_MEM_READONLY)))
        return NULL;
    uint64_t offset = gpa - slot->gpa;
    if (size > (slot->pages << PAGE_SHIFT) - offset)
        return NULL;
    if (write && (slot->flags & KVM_MEM_LOG_DIRTY_PAGES))
        for (uint64_t page = offset >> PAGE_SHIFT; page <= (offset + size - 1) >> PAGE_SHIFT; page++)
            memory_mark_dirty(vcpu, slot, page);
    return slot->host + offset;
}

bool memory_write(struct vcpu *vcpu, uint64_t gpa, const void *data, size_t size)
{
    uint8_t *host = host_range(vcpu, gpa, size, true);
    if (!host)
        return false;
    memcpy(host, data, size);
    cpu_code_written(&vcpu->vm->core, &vcpu->cpu, gpa, size);
    return true;
}

bool memory_read(struct vcpu *vcpu, uint64_t gpa, void *data, size_t size)
{
    const uint8_t *host = host_range(vcpu, gpa, size, false);
    if (host)
        memcpy(data, host, size);
    return host != NULL;
}
