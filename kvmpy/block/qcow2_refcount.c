/* SPDX-License-Identifier: Apache-2.0
 *
 * Refcounts of every width, allocation of clusters, and which clusters hold metadata.
 */
#include "qcow2.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static uint64_t per_block(const struct qcow2 *q)
{
    return 1ull << (q->cluster_bits + 3 - q->refcount_order);
}

static uint64_t refcount_max(const struct qcow2 *q)
{
    return q->refcount_order == 6 ? INT64_MAX : (1ull << (1u << q->refcount_order)) - 1;
}

/* Entries narrower than a byte count from the least significant bit (qcow2.txt, "Refcount block entry"). */
static uint64_t load(const struct qcow2 *q, const void *block, uint64_t i)
{
    const uint8_t *bytes = block;
    switch (q->refcount_order) {
    case 3:
        return bytes[i];
    case 4:
        return be16toh(((const uint16_t *)block)[i]);
    case 5:
        return be32toh(((const uint32_t *)block)[i]);
    case 6:
        return be64toh(((const uint64_t *)block)[i]);
    default: {
        unsigned width = 1u << q->refcount_order, per_byte = 8 / width;
        return bytes[i / per_byte] >> (i % per_byte * width) & ((1u << width) - 1);
    }
    }
}

static void store(const struct qcow2 *q, void *block, uint64_t i, uint64_t value)
{
    uint8_t *bytes = block;
    switch (q->refcount_order) {
    case 3:
        bytes[i] = value;
        break;
    case 4:
        ((uint16_t *)block)[i] = htobe16(value);
        break;
    case 5:
        ((uint32_t *)block)[i] = htobe32(value);
        break;
    case 6:
        ((uint64_t *)block)[i] = htobe64(value);
        break;
    default: {
        unsigned width = 1u << q->refcount_order, per_byte = 8 / width, shift = i % per_byte * width;
        unsigned mask = ((1u << width) - 1) << shift;
        bytes[i / per_byte] = (bytes[i / per_byte] & ~mask) | (value << shift & mask);
    }
    }
}

/* The block of refcounts for `cluster`; *slot NULL if there is none. */
static int block_of(struct qcow2 *q, uint64_t cluster, struct q_slot **slot)
{
    uint64_t index = cluster / per_block(q);
    *slot = NULL;
    if (index >= q->rt_size || !q->rt[index])
        return 0;
    uint64_t offset = q->rt[index] & ~511ull;
    if (offset & (q->cluster_size - 1) || offset >> 56)
        return q_corrupt(q, "the refcount table has a misplaced block", q->rt_offset + index * 8);
    return q_cache_get(q, &q->rb, index, offset, false, slot);
}

int q_refcount(struct qcow2 *q, uint64_t cluster, uint64_t *value)
{
    struct q_slot *slot;
    int result = block_of(q, cluster, &slot);
    if (!result)
        *value = slot ? load(q, slot->data, cluster % per_block(q)) : 0;
    return result;
}

/* A longer refcount table, put behind everything that the old one covers or the new one needs. */
static int grow_table(struct qcow2 *q, uint64_t index)
{
    uint64_t entries = q_round_up((index + 1) * 8 + index * 4, q->cluster_size) / 8;
    if (entries * 8 > Q_MAX_REFTABLE)
        entries = Q_MAX_REFTABLE / 8;
    if (index >= entries)
        return -EFBIG;
    uint64_t *bigger = calloc(entries, 8), *old = q->rt, old_size = q->rt_size, old_offset = q->rt_offset;
    if (!bigger)
        return -ENOMEM;
    memcpy(bigger, old, old_size * 8);
    int result = q_cache_grow(&q->rb, entries);
    if (result) {
        free(bigger);
        return result;
    }
    /* From here the memory copy is the longer one, so that the table's own clusters can be counted in it. It is
     * not written to the old place: write_table stops there, as nothing marks the new entries dirty for it. */
    uint64_t from = q->rt_dirty_from, to = q->rt_dirty_to, offset, got;
    bool fresh;
    q->rt = bigger;
    q->rt_size = entries;
    result = q_alloc(q, entries * 8 >> q->cluster_bits, true, &offset, &got, &fresh);
    if (!result) {
        q->rt_offset = offset;
        q->rt_dirty_from = 0;
        q->rt_dirty_to = entries;
        bool lazy = q->incompatible & Q_INCOMPAT_DIRTY;
        q->incompatible &= ~Q_INCOMPAT_DIRTY; /* only in memory: the blocks must be on disk before the header points here */
        result = q_writeback(q);
        if (lazy)
            q->incompatible |= Q_INCOMPAT_DIRTY;
        if (!result)
            result = file_sync(&q->file);
        if (!result) { /* both fields in one write: they must never disagree */
            uint8_t fields[12];
            uint64_t where = htobe64(offset);
            uint32_t clusters = htobe32(entries * 8 >> q->cluster_bits);
            memcpy(fields, &where, 8);
            memcpy(fields + 8, &clusters, 4);
            result = file_pwrite(&q->file, fields, sizeof fields, 48);
        }
        if (!result)
            result = file_sync(&q->file);
    }
    if (result) {
        /* New blocks made meanwhile are lost from the table: leaked, nothing points into what they cover. */
        for (uint64_t i = 0; i < q->rb.count; i++) {
            struct q_slot *slot = &q->rb.slots[i];
            if (slot->index != UINT64_MAX && slot->index >= old_size) {
                q->rb.slot_of[slot->index] = 0;
                slot->index = UINT64_MAX;
                slot->dirty = slot->used = false;
            }
        }
        q->rt = old;
        q->rt_size = old_size;
        q->rt_offset = old_offset;
        q->rt_dirty_from = from < old_size ? from : UINT64_MAX;
        q->rt_dirty_to = to;
        free(bigger);
        return result;
    }
    free(old);
    q->fixed[1].offset = offset;
    q->fixed[1].length = entries * 8;
    return q_free_later(q, old_offset, old_size * 8);
}

/* Make the refcount block that covers `cluster`, in the free cluster `place`: that one, then it counts itself, or an earlier one. */
static int make_block(struct qcow2 *q, uint64_t cluster, uint64_t place)
{
    uint64_t index = cluster / per_block(q), offset = place << q->cluster_bits;
    struct q_slot *slot;
    if (index >= q->rt_size)
        return grow_table(q, index);
    if (q->rt[index])
        return q_corrupt(q, "a refcount block exists already", q->rt_offset + index * 8);
    int result = file_reserve(&q->file, offset, q->cluster_size);
    if (!result)
        result = q_meta_add(q, offset);
    if (!result)
        result = q_cache_get(q, &q->rb, index, offset, true, &slot);
    if (result)
        return result;
    if (place == cluster)
        store(q, slot->data, cluster % per_block(q), 1);
    slot->dirty = true;
    q->rt[index] = offset;
    if (index < q->rt_dirty_from)
        q->rt_dirty_from = index;
    if (index + 1 > q->rt_dirty_to)
        q->rt_dirty_to = index + 1;
    if (place >= q->file_clusters)
        q->file_clusters = place + 1;
    return place == cluster ? 0 : q_set_refcount(q, place, 1);
}

/* A cluster has come free: whatever was known about its content is over. */
static void forget(struct qcow2 *q, uint64_t cluster)
{
    uint64_t offset = cluster << q->cluster_bits;
    if (cluster < q->free_hint)
        q->free_hint = cluster;
    q_meta_remove(q, offset);
    if (offset <= q->packed_next && q->packed_next < offset + q->cluster_size)
        q->packed_next = q->packed_end = 0;
    pthread_mutex_lock(&q->unpacked_lock);
    q->unpacked_entry = 0;
    pthread_mutex_unlock(&q->unpacked_lock);
}

int q_set_refcount(struct qcow2 *q, uint64_t cluster, uint64_t value)
{
    struct q_slot *slot;
    if (value > refcount_max(q))
        return -ERANGE;
    int result = q->lazy ? q_set_incompatible(q, q->incompatible | Q_INCOMPAT_DIRTY) : 0;
    if (!result)
        result = block_of(q, cluster, &slot);
    if (result)
        return result;
    if (!slot)
        return q_fault(q, "no refcount block covers a cluster in use", cluster << q->cluster_bits);
    store(q, slot->data, cluster % per_block(q), value);
    slot->dirty = true;
    if (!value)
        forget(q, cluster);
    return 0;
}

int q_add_refcount(struct qcow2 *q, uint64_t offset, uint64_t length, int delta)
{
    uint64_t cluster = q_cluster(q, offset), last = q_cluster(q, offset + length - 1);
    for (; cluster <= last; cluster++) {
        uint64_t value;
        int result = q_refcount(q, cluster, &value);
        if (result)
            return result;
        if (delta < 0 && value < (uint64_t)-delta)
            return q_corrupt(q, "the refcount of a cluster in use is too low", cluster << q->cluster_bits);
        if (delta > 0 && value > refcount_max(q) - delta)
            return -ERANGE;
        result = q_set_refcount(q, cluster, value + delta);
        if (result)
            return result;
    }
    return 0;
}

int q_alloc(struct qcow2 *q, uint64_t want, bool exact, uint64_t *offset, uint64_t *got, bool *fresh)
{
    uint64_t start = q->free_hint, count = 0, cluster = q->free_hint, limit = 1ull << (56 - q->cluster_bits);
    bool first_fit = true; /* nothing free was passed by yet */
    while (count < want) {
        uint64_t value;
        if (cluster >= limit)
            return -EFBIG;
        int result = q_refcount(q, cluster, &value);
        if (result)
            return result;
        if (value) {
            if (count && !exact)
                break;
            if (count)
                first_fit = false;
            count = 0;
            cluster++;
            continue;
        }
        uint64_t index = cluster / per_block(q);
        if (index >= q->rt_size || !q->rt[index]) {
            if (count && !exact)
                break;
            uint64_t old_size = q->rt_size;
            result = make_block(q, cluster, count ? start : cluster);
            if (result)
                return result;
            if (q->rt_size != old_size) { /* the table moved, maybe to here: look again from the start */
                cluster = q->free_hint;
                count = 0;
                first_fit = true;
            } else if (count) { /* a long run gives its first cluster to the block, or no run could cross a block's end */
                start++;
                count--;
            } else {
                cluster++;
            }
            continue;
        }
        if (!count)
            start = cluster;
        count++;
        cluster++;
    }
    if (q_overlaps(q, start << q->cluster_bits, count << q->cluster_bits))
        return q_corrupt(q, "a cluster that holds metadata is counted as free", start << q->cluster_bits);
    for (uint64_t i = 0; i < count; i++) {
        int result = q_set_refcount(q, start + i, 1);
        if (result)
            return result;
    }
    *offset = start << q->cluster_bits;
    *got = count;
    if (first_fit)
        q->free_hint = start + count;
    *fresh = start >= q->file_clusters && !q->file.block_device;
    if (start + count > q->file_clusters)
        q->file_clusters = start + count;
    return 0;
}

int q_free_later(struct qcow2 *q, uint64_t offset, uint64_t length)
{
    if (q->freed_count == q->freed_room) {
        size_t room = q->freed_room ? q->freed_room * 2 : 64;
        struct q_free *bigger = realloc(q->freed, room * sizeof *bigger);
        if (!bigger)
            return -ENOMEM;
        q->freed = bigger;
        q->freed_room = room;
    }
    q->freed[q->freed_count] = (struct q_free){offset, length};
    __atomic_store_n(&q->freed_count, q->freed_count + 1, __ATOMIC_RELAXED); /* writers peek at it without the lock */
    return 0;
}

int q_apply_frees(struct qcow2 *q, size_t count)
{
    int result = 0;
    size_t done = 0;
    uint64_t hole = 0, hole_end = 0;
    for (; done < count && !result; done++) {
        uint64_t cluster = q_cluster(q, q->freed[done].offset);
        uint64_t last = q_cluster(q, q->freed[done].offset + q->freed[done].length - 1);
        for (; cluster <= last && !result; cluster++) {
            uint64_t value;
            result = q_add_refcount(q, cluster << q->cluster_bits, 1, -1);
            if (!result)
                result = q_refcount(q, cluster, &value);
            if (result || value)
                continue;
            uint64_t offset = cluster << q->cluster_bits;
            if (!q->discard)
                continue;
            if (offset != hole_end) {
                file_punch(&q->file, hole, hole_end - hole); /* giving space back is a favour, not a promise */
                hole = offset;
            }
            hole_end = offset + q->cluster_size;
        }
    }
    if (q->discard)
        file_punch(&q->file, hole, hole_end - hole);
    memmove(q->freed, q->freed + done, (q->freed_count - done) * sizeof *q->freed);
    __atomic_store_n(&q->freed_count, q->freed_count - done, __ATOMIC_RELAXED);
    return result;
}

static uint64_t hash(const struct qcow2 *q, uint64_t key)
{
    return (key * 0x9e3779b97f4a7c15ull >> 20) & (q->meta_size - 1);
}

int q_meta_add(struct qcow2 *q, uint64_t offset)
{
    if ((q->meta_count + 1) * 2 > q->meta_size) {
        uint64_t *old = q->meta, old_size = q->meta_size;
        uint64_t *bigger = calloc(old_size ? old_size * 2 : 64, 8);
        if (!bigger)
            return -ENOMEM;
        q->meta = bigger;
        q->meta_size = old_size ? old_size * 2 : 64;
        for (uint64_t i = 0; i < old_size; i++) {
            if (!old[i])
                continue;
            uint64_t at = hash(q, old[i]);
            while (q->meta[at])
                at = (at + 1) & (q->meta_size - 1);
            q->meta[at] = old[i];
        }
        free(old);
    }
    uint64_t key = q_cluster(q, offset) + 1, at = hash(q, key);
    while (q->meta[at] && q->meta[at] != key)
        at = (at + 1) & (q->meta_size - 1);
    if (!q->meta[at]) {
        q->meta[at] = key;
        q->meta_count++;
    }
    return 0;
}

void q_meta_remove(struct qcow2 *q, uint64_t offset)
{
    if (!q->meta_size)
        return;
    uint64_t key = q_cluster(q, offset) + 1, mask = q->meta_size - 1, at = hash(q, key);
    while (q->meta[at] && q->meta[at] != key)
        at = (at + 1) & mask;
    if (!q->meta[at])
        return;
    q->meta_count--;
    for (uint64_t next = (at + 1) & mask; q->meta[next]; next = (next + 1) & mask) {
        uint64_t home = hash(q, q->meta[next]);
        if (((next - home) & mask) >= ((next - at) & mask)) { /* it may stand at `at` as well: close the gap */
            q->meta[at] = q->meta[next];
            at = next;
        }
    }
    q->meta[at] = 0;
}

bool q_overlaps_fixed(struct qcow2 *q, uint64_t offset, uint64_t length)
{
    if (offset < q->cluster_size)
        return true;
    for (unsigned i = 0; i < sizeof q->fixed / sizeof *q->fixed; i++)
        if (q->fixed[i].length && offset < q->fixed[i].offset + q->fixed[i].length && q->fixed[i].offset < offset + length)
            return true;
    return false;
}

bool q_overlaps(struct qcow2 *q, uint64_t offset, uint64_t length)
{
    if (!length)
        return false;
    if (q_overlaps_fixed(q, offset, length))
        return true;
    if (!q->meta_size)
        return false;
    uint64_t last = q_cluster(q, offset + length - 1);
    for (uint64_t cluster = q_cluster(q, offset); cluster <= last; cluster++) {
        uint64_t key = cluster + 1, at = hash(q, key);
        while (q->meta[at] && q->meta[at] != key)
            at = (at + 1) & (q->meta_size - 1);
        if (q->meta[at])
            return true;
    }
    return false;
}
