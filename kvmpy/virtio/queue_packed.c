/* SPDX-License-Identifier: Apache-2.0
 *
 * Packed virtqueues, virtio 1.2 section 2.8; see queue.h.
 *
 * One ring of descriptors that both sides write. A descriptor is available when its AVAIL flag is the wrap counter and its
 * USED flag is not, and used when both are (2.8.1). A request takes as many slots as it has descriptors (an indirect one
 * takes one), and the used descriptor that answers it stands in the first of as many slots, so it never overtakes what was
 * not taken yet.
 */
#include "queue_parts.h"

#include <string.h>

#define AVAIL (1u << 7)
#define USED (1u << 15)

/* Event suppression, 2.8.14: desc (offset and wrap counter) and flags. */
enum { EVENT_ENABLE = 0, EVENT_DISABLE = 1, EVENT_DESC = 2 };

static inline struct vq_place later(const struct vq *q, struct vq_place place, uint32_t slots)
{
    uint32_t index = place.index + slots; /* slots <= size: once around at most */
    return index < q->size ? (struct vq_place){index, place.wrap} : (struct vq_place){index - q->size, !place.wrap};
}

static inline struct vq_place earlier(const struct vq *q, struct vq_place place, uint32_t slots)
{
    return place.index >= slots ? (struct vq_place){place.index - slots, place.wrap}
                                : (struct vq_place){place.index + q->size - slots, !place.wrap};
}

static inline unsigned char *flags_at(const struct vq *q, uint16_t index)
{
    return q->desc + 16 * (size_t)index + 14;
}

static bool is_available(const struct vq *q, struct vq_place place)
{
    uint16_t flags = load16(flags_at(q, place.index)); /* acquire: the rest of the request is there */
    return !!(flags & AVAIL) == place.wrap && !!(flags & USED) != place.wrap;
}

/* 2.8.7: all entries of the table, in order; only their WRITE flag counts. */
static int walk_indirect(struct vq *q, struct vq_chain *chain, uint64_t gpa, uint32_t len)
{
    int count = vq_indirect_table(q, gpa, len, q->size);
    for (int i = 0; i < count; i++) {
        struct vq_desc d;
        memcpy(&d, q->table + 16 * (size_t)i, sizeof(d));
        if (vq_add_buffer(q, chain, d.addr, d.len, d.packed_flags & VQ_DESC_WRITE))
            return -1;
    }
    return count < 0 ? -1 : 0;
}

int packed_pop(struct vq *q, struct vq_chain *chain)
{
    if (!is_available(q, q->take))
        return 0;
    uint32_t count = 0;
    struct vq_place at = q->take;
    for (;;) { /* 2.8.6: a chain is in consecutive slots, its id in the last one */
        struct vq_desc d;
        if (count == q->size - q->slots)
            return vq_fault(q, "more descriptors in flight than the queue has", count);
        copy_in(&d, q->desc + 16 * (size_t)at.index, sizeof(d));
        count++;
        if (d.packed_flags & ~(VQ_DESC_NEXT | VQ_DESC_WRITE | VQ_DESC_INDIRECT | AVAIL | USED))
            return vq_fault(q, "unknown descriptor flags", d.packed_flags);
        if (d.packed_flags & VQ_DESC_INDIRECT) {
            if (d.packed_flags & VQ_DESC_NEXT || count > 1)
                return vq_fault(q, "an indirect descriptor in a chain", d.addr); /* 2.8.7 */
            if (walk_indirect(q, chain, d.addr, d.len))
                return -1;
        } else if (vq_add_buffer(q, chain, d.addr, d.len, d.packed_flags & VQ_DESC_WRITE)) {
            return -1;
        }
        chain->head = d.id;
        if (!(d.packed_flags & VQ_DESC_NEXT))
            break;
        at = later(q, at, 1);
    }
    if (q->in_flight[chain->head])
        return vq_fault(q, "a buffer id is made available twice", chain->head);
    q->in_flight[chain->head] = count;
    q->slots += count;
    q->take = later(q, q->take, count);
    q->ahead = q->ahead > count ? q->ahead - count : 0;
    return 1;
}

void packed_unpop(struct vq *q, uint32_t slots)
{
    q->take = earlier(q, q->take, slots);
    q->slots -= slots;
    q->ahead += slots;
}

void packed_push(struct vq *q, uint16_t id, uint32_t slots, uint32_t written)
{
    unsigned char *to = q->desc + 16 * (size_t)q->give.index;
    uint16_t flags = (q->give.wrap ? AVAIL | USED : 0) | (written ? VQ_DESC_WRITE : 0);
    memcpy(to + 8, &written, sizeof(written));
    memcpy(to + 12, &id, sizeof(id));
    /* The driver looks at used descriptors in order: with the first one's flags it sees all that are staged. */
    if (q->staged) {
        store16(to + 14, flags);
    } else {
        q->first = q->give;
        q->first_flags = flags;
    }
    q->staged += slots;
    q->slots -= slots;
    q->give = later(q, q->give, slots);
}

void packed_publish(struct vq *q)
{
    if (!q->staged)
        return;
    store16(flags_at(q, q->first.index), q->first_flags); /* release: all the rest is there first */
    q->unsignalled += q->staged;
    q->staged = 0;
    vq_journal(q, q->desc_gpa, 16 * (uint64_t)q->size);
}

bool packed_wants_interrupt(struct vq *q)
{
    uint32_t moved = q->unsignalled;
    if (!moved)
        return false;
    q->unsignalled = 0;
    uint32_t wish = __atomic_load_n((const uint32_t *)q->avail, __ATOMIC_ACQUIRE); /* 2.8.14: both halves at once */
    uint16_t desc = wish, flags = wish >> 16 & 3;
    if (flags != EVENT_DESC || !q->event_idx)
        return flags != EVENT_DISABLE;
    /* Does the place that the driver waits for lie among the slots that were used? Counted backwards from `give`. */
    uint16_t index = desc & 0x7fff;
    if (index >= q->size)
        return true; /* nonsense: too many interrupts harm nobody but the guest */
    bool lap = q->give.wrap != desc >> 15;
    uint32_t behind = q->give.index + (lap ? q->size : 0) - index; /* wraps to a large number when it lies ahead */
    return behind - 1 < moved;
}

/* ---- kicks, 2.8.10 */

static void wish(struct vq *q, uint16_t desc, uint16_t flags)
{
    __atomic_store_n((uint32_t *)q->used, desc | (uint32_t)flags << 16, __ATOMIC_RELEASE);
}

void packed_no_kicks(struct vq *q)
{
    if (!q->silent)
        wish(q, 0, EVENT_DISABLE); /* a hint: not worth a mark of its own */
    q->silent = true;
}

bool packed_want_kicks(struct vq *q)
{
    struct vq_place next = later(q, q->take, q->ahead);
    if (q->event_idx)
        wish(q, next.index | next.wrap << 15, EVENT_DESC);
    else if (q->silent)
        wish(q, 0, EVENT_ENABLE);
    q->silent = false;
    vq_journal(q, q->used_gpa, 4);
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* the wish must be out before we look for the last time */
    bool more = false;
    /* Once per change: a device that wants no buffers now must not be asked for ever. */
    for (; q->ahead < q->size && is_available(q, next); next = later(q, next, 1)) {
        q->ahead++;
        more = true;
    }
    return more;
}
