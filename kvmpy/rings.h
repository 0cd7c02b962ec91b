/* SPDX-License-Identifier: Apache-2.0
 *
 * The rings that the kernel and we share: dirty pages (api.rst 7.36) and coalesced writes (api.rst 4.116). The other
 * side writes them at any time, so each entry is copied once, in the right order, before it is believed.
 */
#ifndef KVMPY_RINGS_H
#define KVMPY_RINGS_H

#include <stdbool.h>

#include "kvm_compat.h"

/* Take the dirty entry at `entry`: false if it is not dirty (yet). */
static inline bool dirty_take(struct kvm_dirty_gfn *entry, struct kvm_dirty_gfn *into)
{
    __u32 flags = __atomic_load_n(&entry->flags, __ATOMIC_ACQUIRE);
    if ((flags & KVM_DIRTY_GFN_F_MASK) != KVM_DIRTY_GFN_F_DIRTY)
        return false;
    into->slot = entry->slot;
    into->offset = entry->offset;
    __atomic_store_n(&entry->flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
    return true;
}

/* Entries that fit in the ring's page. */
enum { COALESCED_MAX = (4096 - sizeof(struct kvm_coalesced_mmio_ring)) / sizeof(struct kvm_coalesced_mmio) };

/* Take the oldest coalesced write: false if there is none. */
static inline bool coalesced_take(struct kvm_coalesced_mmio_ring *ring, struct kvm_coalesced_mmio *into)
{
    __u32 first = ring->first;
    __u32 last = __atomic_load_n(&ring->last, __ATOMIC_ACQUIRE);
    if (first >= COALESCED_MAX || first == last)
        return false;
    *into = ((struct kvm_coalesced_mmio *)(ring + 1))[first];
    __atomic_store_n(&ring->first, (first + 1) % COALESCED_MAX, __ATOMIC_RELEASE);
    return true;
}

#endif
