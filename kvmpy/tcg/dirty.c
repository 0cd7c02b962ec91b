/* SPDX-License-Identifier: Apache-2.0
 *
 * Which pages were written: the dirty bitmap of a slot (KVM_GET_DIRTY_LOG, KVM_CLEAR_DIRTY_LOG) and the dirty
 * rings (api.rst 8.29).
 *
 * The core reports the first write to a page since its softTLB was flushed. So the bits are taken first, and every
 * vCPU flushes before the ioctl returns: a write in between is in the page when user space copies it.
 * With rings a bitmap exists too, so that a page stands in the rings only once.
 */
#include <errno.h>
#include <string.h>

#include "vm.h"

/* Room that is left when a ring counts as full: what the instructions up to the next exit may still dirty. */
#define RING_RESERVE 320u

static uint32_t ring_soft_limit(const struct vcpu *vcpu)
{
    return vcpu->ring_entries > 2 * RING_RESERVE ? vcpu->ring_entries - RING_RESERVE : vcpu->ring_entries / 2;
}

bool ring_soft_full(const struct vcpu *vcpu)
{
    return vcpu->ring_entries && vcpu->ring_head - __atomic_load_n(&vcpu->ring_reset, __ATOMIC_ACQUIRE) >= ring_soft_limit(vcpu);
}

static void push(struct vcpu *vcpu, const struct slot *slot, uint64_t page)
{
    struct kvm_dirty_gfn *entry = &vcpu->ring[vcpu->ring_head & (vcpu->ring_entries - 1)];
    entry->slot = slot->id;
    entry->offset = page;
    __atomic_store_n(&entry->flags, KVM_DIRTY_GFN_F_DIRTY, __ATOMIC_RELEASE); /* the rest is readable before this is */
    vcpu->ring_head++;
    if (ring_soft_full(vcpu))
        cpu_request(&vcpu->cpu, CPU_REQ_EXIT);
}

void memory_mark_dirty(struct vcpu *vcpu, struct slot *slot, uint64_t page)
{
    uint64_t bit = 1ull << (page % 64);
    if (atomic_fetch_or(&slot->dirty[page / 64], bit) & bit)
        return;
    if (vcpu->ring)
        push(vcpu, slot, page);
}

void tcg_mark_dirty(struct cpu *c, uint64_t gpa)
{
    struct vcpu *vcpu = vcpu_of(c);
    struct slot *slot = memory_find(atomic_load_explicit(&vcpu->vm->slots, memory_order_acquire), gpa);
    if (slot && slot->dirty)
        memory_mark_dirty(vcpu, slot, (gpa - slot->gpa) >> PAGE_SHIFT);
}

static long find_logged(struct tcg_vm *vm, uint32_t id, struct slot **slot)
{
    if (vm->ring_bytes)
        return -ENXIO;
    if (id >= MAX_SLOTS)
        return -EINVAL;
    *slot = memory_find_id(atomic_load(&vm->slots), id);
    return *slot && (*slot)->dirty ? 0 : -ENOENT;
}

static long get_dirty_log(struct tcg_vm *vm, const struct kvm_dirty_log *log)
{
    struct slot *slot;
    long error = find_logged(vm, log->slot, &slot);
    if (error)
        return error;
    uint8_t *out = log->dirty_bitmap; /* user space's own memory: the engine is a library in its process */
    bool manual = vm->manual_protect & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, any = false;
    for (uint64_t word = 0; word < (slot->pages + 63) / 64; word++) {
        uint64_t bits = atomic_load_explicit(&slot->dirty[word], memory_order_relaxed);
        if (bits && !manual)
            bits = atomic_exchange(&slot->dirty[word], 0);
        any |= bits != 0;
        memcpy(out + word * 8, &bits, 8);
    }
    if (any && !manual)
        vm_quiesce(vm, CPU_REQ_TLB);
    return 0;
}

static long clear_dirty_log(struct tcg_vm *vm, const struct kvm_clear_dirty_log *log)
{
    struct slot *slot;
    long error = find_logged(vm, log->slot, &slot);
    if (log->first_page & 63)
        return -EINVAL;
    if (error)
        return error;
    if (log->first_page > slot->pages || log->num_pages > slot->pages - log->first_page)
        return -EINVAL;
    if (log->num_pages < slot->pages - log->first_page && (log->num_pages & 63))
        return -EINVAL;
    const uint8_t *in = log->dirty_bitmap;
    bool any = false;
    for (uint64_t word = 0; word < ((uint64_t)log->num_pages + 63) / 64; word++) {
        uint64_t bits;
        memcpy(&bits, in + word * 8, 8);
        any |= (atomic_fetch_and(&slot->dirty[log->first_page / 64 + word], ~bits) & bits) != 0;
    }
    if (any)
        vm_quiesce(vm, CPU_REQ_TLB);
    return 0;
}

long memory_get_dirty_log(struct tcg_vm *vm, const struct kvm_dirty_log *log)
{
    pthread_mutex_lock(&vm->slots_lock);
    long result = get_dirty_log(vm, log);
    pthread_mutex_unlock(&vm->slots_lock);
    return result;
}

long memory_clear_dirty_log(struct tcg_vm *vm, const struct kvm_clear_dirty_log *log)
{
    pthread_mutex_lock(&vm->slots_lock);
    long result = clear_dirty_log(vm, log);
    pthread_mutex_unlock(&vm->slots_lock);
    return result;
}

/* Take back the entries that user space has collected; their pages are reported again when written again. */
static long reset_ring(struct tcg_vm *vm, struct vcpu *vcpu)
{
    long count = 0;
    for (;; count++) {
        struct kvm_dirty_gfn *entry = &vcpu->ring[vcpu->ring_reset & (vcpu->ring_entries - 1)];
        if (count >= vcpu->ring_entries || !(__atomic_load_n(&entry->flags, __ATOMIC_ACQUIRE) & KVM_DIRTY_GFN_F_RESET))
            return count;
        struct slot *slot = memory_find_id(atomic_load(&vm->slots), entry->slot);
        uint64_t page = entry->offset; /* user space could have written anything here */
        if (slot && slot->dirty && page < slot->pages)
            atomic_fetch_and(&slot->dirty[page / 64], ~(1ull << (page % 64)));
        __atomic_store_n(&entry->flags, 0, __ATOMIC_RELEASE);
        __atomic_store_n(&vcpu->ring_reset, vcpu->ring_reset + 1, __ATOMIC_RELEASE);
    }
}

long memory_reset_rings(struct tcg_vm *vm)
{
    if (!vm->ring_bytes)
        return -EINVAL;
    long count = 0;
    pthread_mutex_lock(&vm->slots_lock);
    for (unsigned i = 0; i < TCG_MAX_CPUS; i++) {
        struct vcpu *vcpu = atomic_load(&vm->vcpu[i]);
        if (vcpu)
            count += reset_ring(vm, vcpu);
    }
    if (count)
        vm_quiesce(vm, CPU_REQ_TLB);
    pthread_mutex_unlock(&vm->slots_lock);
    return count;
}
