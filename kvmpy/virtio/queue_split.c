/* SPDX-License-Identifier: Apache-2.0
 *
 * Split virtqueues, virtio 1.2 section 2.7; see queue.h.
 */
#include "queue_parts.h"

#include <string.h>

#define NO_INTERRUPT 1u /* avail.flags, 2.7.6 */
#define NO_NOTIFY 1u    /* used.flags, 2.7.8 */

/* 2.7.5.3: the table is copied whole, so that what is checked is what is used. */
static int walk_indirect(struct vq *q, struct vq_chain *chain, const struct vq_desc *outer, uint32_t seen)
{
    if (outer->flags & VQ_DESC_NEXT)
        return vq_fault(q, "a descriptor with INDIRECT and NEXT", outer->addr);
    int count = vq_indirect_table(q, outer->addr, outer->len, q->size - seen);
    if (count < 0)
        return -1;
    for (int index = 0, steps = 0;; steps++) {
        struct vq_desc d;
        if (steps == count)
            return vq_fault(q, "a loop in an indirect table", outer->addr);
        memcpy(&d, q->table + 16 * (size_t)index, sizeof(d));
        if (d.flags & ~(VQ_DESC_NEXT | VQ_DESC_WRITE))
            return vq_fault(q, d.flags & VQ_DESC_INDIRECT ? "a nested indirect table" : "unknown descriptor flags", d.flags);
        if (vq_add_buffer(q, chain, d.addr, d.len, d.flags & VQ_DESC_WRITE))
            return -1;
        if (!(d.flags & VQ_DESC_NEXT))
            return 0;
        if (d.next >= count)
            return vq_fault(q, "next points outside the indirect table", d.next);
        index = d.next;
    }
}

static int walk(struct vq *q, struct vq_chain *chain, uint16_t head)
{
    uint16_t index = head;
    for (uint32_t steps = 0;; steps++) {
        struct vq_desc d;
        if (steps == q->size)
            return vq_fault(q, "a loop of descriptors", head);
        copy_in(&d, q->desc + 16 * (size_t)index, sizeof(d));
        if (d.flags & ~(VQ_DESC_NEXT | VQ_DESC_WRITE | VQ_DESC_INDIRECT))
            return vq_fault(q, "unknown descriptor flags", d.flags);
        if (d.flags & VQ_DESC_INDIRECT)
            return walk_indirect(q, chain, &d, steps);
        if (vq_add_buffer(q, chain, d.addr, d.len, d.flags & VQ_DESC_WRITE))
            return -1;
        if (!(d.flags & VQ_DESC_NEXT))
            return 0;
        if (d.next >= q->size)
            return vq_fault(q, "next points outside the descriptor table", d.next);
        index = d.next;
    }
}

int split_pop(struct vq *q, struct vq_chain *chain)
{
    uint16_t idx = load16(q->avail + 2); /* acquire: the entries up to it are there */
    q->seen = idx;
    uint16_t waiting = idx - q->next_avail;
    if (!waiting)
        return 0;
    if (waiting > q->size)
        return vq_fault(q, "avail.idx is ahead by more than the queue size", idx);
    uint16_t head = __atomic_load_n(
        (const uint16_t *)(q->avail + 4 + 2 * (size_t)(q->next_avail & (q->size - 1))), __ATOMIC_RELAXED);
    if (head >= q->size)
        return vq_fault(q, "the available ring names a descriptor beyond the table", head);
    if (q->in_flight[head])
        return vq_fault(q, "a descriptor is made available twice", head);
    chain->head = head;
    if (walk(q, chain, head))
        return -1;
    q->in_flight[head] = 1;
    q->next_avail++;
    return 1;
}

void split_push(struct vq *q, uint16_t head, uint32_t written)
{
    uint32_t element[2] = {head, written};
    memcpy(q->used + 4 + 8 * (size_t)(q->next_used & (q->size - 1)), element, sizeof(element));
    q->next_used++;
}

void split_publish(struct vq *q)
{
    if (q->published == q->next_used)
        return;
    store16(q->used + 2, q->next_used); /* release: elements and data are there first */
    q->published = q->next_used;
    vq_journal(q, q->used_gpa, 6 + 8 * (uint64_t)q->size);
}

bool split_wants_interrupt(struct vq *q)
{
    uint16_t old = q->signalled, new = q->published;
    bool valid = q->signalled_valid;
    if (old == new && (valid || !new))
        return false;
    q->signalled = new;
    q->signalled_valid = true;
    if (!q->event_idx)
        return !(load16(q->avail) & NO_INTERRUPT);
    uint16_t event = load16(q->avail + 4 + 2 * (size_t)q->size); /* used_event, 2.7.7.2 */
    return !valid || (uint16_t)(new - event - 1) < (uint16_t)(new - old);
}

/* ---- kicks, 2.7.10 */

void split_no_kicks(struct vq *q)
{
    if (!q->event_idx && !q->silent) {
        store16(q->used, NO_NOTIFY); /* a hint: not worth a mark of its own */
        q->silent = true;
    }
}

bool split_want_kicks(struct vq *q)
{
    if (q->event_idx)
        store16(q->used + 4 + 8 * (size_t)q->size, q->seen); /* avail_event */
    else if (q->silent)
        store16(q->used, 0);
    q->silent = false;
    vq_journal(q, q->used_gpa, 6 + 8 * (uint64_t)q->size);
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* the wish must be out before we look for the last time */
    uint16_t idx = load16(q->avail + 2);
    bool more = idx != q->seen;
    q->seen = idx; /* once per change: a device that wants no buffers now must not be asked for ever */
    return more;
}
