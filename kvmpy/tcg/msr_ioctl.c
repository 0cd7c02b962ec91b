/* SPDX-License-Identifier: Apache-2.0
 *
 * MSRs in bulk for user space, the lists of them, and the filter (KVM_X86_SET_MSR_FILTER, api.rst 4.126).
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "vm.h"

#define MAX_ENTRIES 256u /* MAX_IO_MSRS */

/* What a snapshot must carry, in an order in which it can be loaded: the mode of the APIC before its registers. */
static const uint32_t saved[] = {
    0x1B, 0x3A, 0x10, 0x3B, 0x48, 0x8B, 0x174, 0x175, 0x176, 0x17A, 0x1A0, 0x1D9, 0x277, 0x2FF,
    0x200, 0x201, 0x202, 0x203, 0x204, 0x205, 0x206, 0x207, 0x208, 0x209, 0x20A, 0x20B, 0x20C, 0x20D, 0x20E, 0x20F,
    0x250, 0x258, 0x259, 0x268, 0x269, 0x26A, 0x26B, 0x26C, 0x26D, 0x26E, 0x26F,
    0x10A, 0x6E0, 0xDA0, 0xC0000080, 0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084, 0xC0000100, 0xC0000101, 0xC0000102,
    0xC0000103, 0x4B564D00, 0x4B564D01, 0x11, 0x12,
};
static const uint32_t features[] = {0x8B, 0x10A};

long msr_list(uintptr_t user, bool feature)
{
    struct kvm_msr_list *list = (struct kvm_msr_list *)user;
    if (!list)
        return -EFAULT;
    const uint32_t *indices = feature ? features : saved;
    uint32_t count = feature ? sizeof features / 4 : sizeof saved / 4, room = list->nmsrs;
    list->nmsrs = count;
    if (room < count)
        return -E2BIG;
    memcpy(list->indices, indices, count * sizeof *indices);
    return 0;
}

long msr_get_many(struct vcpu *vcpu, uintptr_t user)
{
    struct kvm_msrs *msrs = (struct kvm_msrs *)user;
    if (msrs->nmsrs >= MAX_ENTRIES)
        return -E2BIG;
    for (uint32_t i = 0; i < msrs->nmsrs; i++) {
        uint64_t value = 0;
        if (msr_read(vcpu, msrs->entries[i].index, &value, true))
            return i; /* how many were read: the next one failed */
        msrs->entries[i].data = value;
    }
    return msrs->nmsrs;
}

long msr_set_many(struct vcpu *vcpu, uintptr_t user)
{
    const struct kvm_msrs *msrs = (const struct kvm_msrs *)user;
    if (msrs->nmsrs >= MAX_ENTRIES)
        return -E2BIG;
    for (uint32_t i = 0; i < msrs->nmsrs; i++)
        if (msr_write(vcpu, msrs->entries[i].index, msrs->entries[i].data, true))
            return i;
    return msrs->nmsrs;
}

long msr_get_features(uintptr_t user)
{
    struct kvm_msrs *msrs = (struct kvm_msrs *)user;
    if (!msrs)
        return -EFAULT;
    uint32_t done = 0;
    for (; done < msrs->nmsrs && msr_feature(msrs->entries[done].index, &msrs->entries[done].data); done++)
        ;
    return done;
}

/* ---- the filter ---- */

struct range {
    uint32_t flags, base, count;
    uint8_t *allowed;
};
struct msr_filter {
    bool default_allow;
    uint32_t count;
    struct range range[KVM_MSR_FILTER_MAX_RANGES];
    uint8_t bits[];
};

bool msr_allowed(struct tcg_vm *vm, uint32_t index, bool write)
{
    if (index >= 0x800 && index <= 0x8FF)
        return true; /* x2APIC registers are not filtered (api.rst) */
    const struct msr_filter *filter = atomic_load_explicit(&vm->msr_filter, memory_order_acquire);
    if (!filter)
        return true;
    uint32_t access = write ? KVM_MSR_FILTER_WRITE : KVM_MSR_FILTER_READ;
    for (uint32_t i = 0; i < filter->count; i++) {
        const struct range *r = &filter->range[i];
        uint32_t bit = index - r->base;
        if (index >= r->base && bit < r->count && (r->flags & access))
            return r->allowed[bit / 8] & (1u << (bit & 7));
    }
    return filter->default_allow;
}

static long build_filter(const struct kvm_msr_filter *in, struct msr_filter **out)
{
    size_t bytes = 0;
    bool any = false;
    if (in->flags & ~KVM_MSR_FILTER_DEFAULT_DENY)
        return -EINVAL;
    for (unsigned i = 0; i < KVM_MSR_FILTER_MAX_RANGES; i++) {
        const struct kvm_msr_filter_range *r = &in->ranges[i];
        size_t size = ((size_t)r->nmsrs + 7) / 8;
        if (!r->nmsrs)
            continue;
        if (size > KVM_MSR_FILTER_MAX_BITMAP_SIZE || (r->flags & ~(KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE)) || !r->flags)
            return -EINVAL;
        if (!r->bitmap)
            return -EFAULT;
        bytes += size;
        any = true;
    }
    bool default_allow = !(in->flags & KVM_MSR_FILTER_DEFAULT_DENY);
    *out = NULL;
    if (!any && default_allow)
        return 0; /* no filter at all */
    if (!any)
        return -EINVAL; /* api.rst: default deny needs at least one range */
    struct msr_filter *filter = calloc(1, sizeof *filter + bytes);
    if (!filter)
        return -ENOMEM;
    filter->default_allow = default_allow;
    uint8_t *at = filter->bits;
    for (unsigned i = 0; i < KVM_MSR_FILTER_MAX_RANGES; i++) {
        const struct kvm_msr_filter_range *r = &in->ranges[i];
        size_t size = ((size_t)r->nmsrs + 7) / 8;
        if (!r->nmsrs)
            continue;
        memcpy(at, r->bitmap, size);
        filter->range[filter->count++] = (struct range){r->flags, r->base, r->nmsrs, at};
        at += size;
    }
    *out = filter;
    return 0;
}

/* vm.lock held. */
long msr_set_filter(struct tcg_vm *vm, uintptr_t user)
{
    struct msr_filter *filter;
    if (!user)
        return -EFAULT;
    long error = build_filter((const struct kvm_msr_filter *)user, &filter);
    if (error)
        return error;
    struct msr_filter *old = atomic_exchange(&vm->msr_filter, filter);
    vm_quiesce(vm, 0);
    free(old);
    return 0;
}

void msr_filter_free(struct tcg_vm *vm)
{
    free(atomic_load(&vm->msr_filter));
}
