/* SPDX-License-Identifier: Apache-2.0
 *
 * Write-back caches of L2 tables and refcount blocks, and the order in which they reach the disk.
 */
#include "qcow2.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

int q_cache_init(struct q_cache *cache, uint64_t indices, uint32_t limit)
{
    cache->limit = limit;
    cache->slots = calloc(limit, sizeof *cache->slots);
    cache->slot_of = calloc(indices ? indices : 1, sizeof *cache->slot_of);
    cache->indices = indices;
    return cache->slots && cache->slot_of ? 0 : -ENOMEM;
}

int q_cache_grow(struct q_cache *cache, uint64_t indices)
{
    if (indices <= cache->indices)
        return 0;
    uint32_t *slot_of = realloc(cache->slot_of, indices * sizeof *slot_of);
    if (!slot_of)
        return -ENOMEM;
    memset(slot_of + cache->indices, 0, (indices - cache->indices) * sizeof *slot_of);
    cache->slot_of = slot_of;
    cache->indices = indices;
    return 0;
}

void q_cache_drop(struct q_cache *cache)
{
    for (uint32_t i = 0; i < cache->count; i++) {
        if (cache->slots[i].index < cache->indices)
            cache->slot_of[cache->slots[i].index] = 0;
        free(cache->slots[i].data);
    }
    memset(cache->slots, 0, cache->limit * sizeof *cache->slots);
    cache->count = cache->hand = 0;
}

void q_cache_free(struct q_cache *cache)
{
    if (cache->slots)
        q_cache_drop(cache);
    free(cache->slots);
    free(cache->slot_of);
    memset(cache, 0, sizeof *cache);
}

static int write_slot(struct qcow2 *q, struct q_slot *slot)
{
    int result = file_pwrite(&q->file, slot->data, q->cluster_size, slot->offset);
    if (!result)
        slot->dirty = false;
    return result;
}

/* A slot to fill: a new one while there is room, else the next that was not used since the hand passed. */
static int victim(struct qcow2 *q, struct q_cache *cache, struct q_slot **found)
{
    if (cache->count < cache->limit) {
        struct q_slot *slot = &cache->slots[cache->count];
        slot->data = malloc(q->cluster_size);
        if (!slot->data)
            return -ENOMEM;
        slot->index = UINT64_MAX;
        cache->count++;
        *found = slot;
        return 0;
    }
    for (;;) {
        struct q_slot *slot = &cache->slots[cache->hand];
        cache->hand = (cache->hand + 1) % cache->limit;
        if (slot->used) {
            slot->used = false;
            continue;
        }
        if (slot->dirty) {
            /* An L2 table must not reach the disk before what it points to; refcounts may go at any time. */
            int result = cache == &q->l2 ? q_writeback(q) : write_slot(q, slot);
            if (result)
                return result;
        }
        if (slot->index < cache->indices)
            cache->slot_of[slot->index] = 0;
        slot->index = UINT64_MAX;
        *found = slot;
        return 0;
    }
}

int q_cache_get(struct qcow2 *q, struct q_cache *cache, uint64_t index, uint64_t offset, bool fresh, struct q_slot **found)
{
    uint32_t at = cache->slot_of[index];
    if (at) {
        *found = &cache->slots[at - 1];
        (*found)->used = true;
        return 0;
    }
    struct q_slot *slot;
    int result = victim(q, cache, &slot);
    if (result)
        return result;
    if (fresh)
        memset(slot->data, 0, q->cluster_size);
    else
        result = file_pread_exact(&q->file, slot->data, q->cluster_size, offset);
    if (result == -ENODATA)
        return q_fault(q, "a metadata table lies beyond the end of the file", offset);
    if (result)
        return result; /* the slot stays empty */
    slot->index = index;
    slot->offset = offset;
    slot->dirty = fresh;
    slot->used = true;
    cache->slot_of[index] = slot - cache->slots + 1;
    *found = slot;
    return 0;
}

static int write_dirty(struct qcow2 *q, struct q_cache *cache)
{
    for (uint32_t i = 0; i < cache->count; i++) {
        if (cache->slots[i].dirty && cache->slots[i].index != UINT64_MAX) {
            int result = write_slot(q, &cache->slots[i]);
            if (result)
                return result;
        }
    }
    return 0;
}

static bool any_dirty(const struct q_cache *cache)
{
    for (uint32_t i = 0; i < cache->count; i++)
        if (cache->slots[i].dirty)
            return true;
    return false;
}

/* Write entries [from, to) of a top-level table, in whole pieces of 512 entries. */
static int write_table(struct qcow2 *q, const uint64_t *table, uint64_t entries, uint64_t offset, uint64_t *from, uint64_t *to)
{
    uint64_t big[512];
    uint64_t at = *from;
    while (at < *to && at < entries) {
        uint64_t n = 0;
        while (n < 512 && at + n < *to && at + n < entries) {
            big[n] = htobe64(table[at + n]);
            n++;
        }
        int result = file_pwrite(&q->file, big, n * 8, offset + at * 8);
        if (result)
            return result;
        at += n;
    }
    *from = UINT64_MAX;
    *to = 0;
    return 0;
}

static int sync_all(struct qcow2 *q)
{
    int result = q->data == &q->data_file ? file_sync(&q->data_file) : 0;
    return result ? result : file_sync(&q->file);
}

int q_writeback(struct qcow2 *q)
{
    bool refcounts_stale = q->incompatible & Q_INCOMPAT_DIRTY; /* lazy: the dirty bit is on disk, they can wait */
    int result = 0;
    if (!refcounts_stale) {
        result = write_dirty(q, &q->rb);
        if (!result && q->rt_dirty_to) {
            result = sync_all(q);
            if (!result)
                result = write_table(q, q->rt, q->rt_size, q->rt_offset, &q->rt_dirty_from, &q->rt_dirty_to);
        }
    }
    if (!result && (any_dirty(&q->l2) || q->l1_dirty_to)) {
        result = sync_all(q);
        if (!result)
            result = write_dirty(q, &q->l2);
    }
    if (!result && q->l1_dirty_to) {
        result = sync_all(q);
        if (!result)
            result = write_table(q, q->l1, q->l1_size, q->l1_offset, &q->l1_dirty_from, &q->l1_dirty_to);
    }
    return result;
}

int q_flush(struct qcow2 *q, bool exclusive)
{
    if (!exclusive)
        pthread_mutex_lock(&q->flush_lock);
    pthread_mutex_lock(&q->lock);
    int result = q_writeback(q);
    size_t freed = q->freed_count;
    pthread_mutex_unlock(&q->lock);
    if (!result)
        result = sync_all(q);
    if (!result && freed) {
        /* Nothing on disk points at these any more. Wait for those who looked them up before. */
        if (!exclusive)
            pthread_rwlock_wrlock(&q->io);
        pthread_mutex_lock(&q->lock);
        result = q_apply_frees(q, freed);
        pthread_mutex_unlock(&q->lock);
        if (!exclusive)
            pthread_rwlock_unlock(&q->io);
    }
    if (!exclusive)
        pthread_mutex_unlock(&q->flush_lock);
    return result;
}
