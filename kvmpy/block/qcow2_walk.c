/* SPDX-License-Identifier: Apache-2.0
 *
 * Walks over all that an L1 table reaches: refcounts for snapshots, COPIED flags, and the count that a check compares.
 * They read the tables from the file, so the caches must be on disk and are dropped after a change.
 */
#include "qcow2.h"

#include <errno.h>
#include <stdlib.h>

static bool aligned(const struct qcow2 *q, uint64_t offset)
{
    return !(offset & (q->cluster_size - 1));
}

static uint64_t table_entries(const struct qcow2 *q)
{
    return q->cluster_size / 8 / q->entry_words;
}

static int load_l2(struct qcow2 *q, uint64_t offset, uint64_t *table)
{
    if (!aligned(q, offset))
        return q_fault(q, "an L2 table is not aligned to clusters", offset);
    int result = file_pread_exact(&q->file, table, q->cluster_size, offset);
    return result == -ENODATA ? q_fault(q, "an L2 table lies beyond the end of the file", offset) : result;
}

/* The clusters of the image file that an entry uses; false if none. */
static bool entry_span(const struct qcow2 *q, uint64_t entry, uint64_t *offset, uint64_t *length)
{
    if (entry & Q_COMPRESSED) {
        q_compressed_span(q, entry, offset, length);
        return true;
    }
    *offset = entry & Q_OFFSET;
    *length = q->cluster_size;
    return *offset && q->data == &q->file;
}

/* Add delta along the table, stopping in front of entry `stop` of L1 entry `l1_stop`; the place reached is left in both. */
static int add_along(struct qcow2 *q, const uint64_t *l1, int delta, uint64_t *table, uint64_t *l1_stop, uint64_t *stop)
{
    int result = 0;
    for (uint64_t i = 0; i < *l1_stop || (i == *l1_stop && *stop); i++) {
        uint64_t end = i < *l1_stop ? table_entries(q) + 1 : *stop, n = 0;
        uint64_t l2 = l1[i] & Q_OFFSET;
        if (!l2)
            continue;
        result = load_l2(q, l2, table);
        for (; !result && n < end; n++) { /* step 0 is the table itself */
            uint64_t offset = l2, length = q->cluster_size;
            if (n && !entry_span(q, be64toh(table[(n - 1) * q->entry_words]), &offset, &length))
                continue;
            if (offset >> 56)
                result = q_fault(q, "an L2 entry points beyond any file", l2 + (n - 1) * q->entry_words * 8);
            else
                result = q_add_refcount(q, offset, length, delta);
            if (result)
                break;
        }
        if (result) {
            *l1_stop = i;
            *stop = n;
            return result;
        }
    }
    return 0;
}

int q_walk_refcounts(struct qcow2 *q, const uint64_t *l1, uint64_t entries, int delta)
{
    uint64_t *table = malloc(q->cluster_size), l1_stop = entries, stop = 0;
    if (!table)
        return -ENOMEM;
    pthread_mutex_lock(&q->lock);
    int result = add_along(q, l1, delta, table, &l1_stop, &stop);
    if (result && delta > 0) /* a refcount was full, or the image is broken: as if nothing had been */
        add_along(q, l1, -delta, table, &l1_stop, &stop);
    pthread_mutex_unlock(&q->lock);
    free(table);
    return result;
}

static int flag_for(struct qcow2 *q, uint64_t offset, uint64_t *flag)
{
    uint64_t value;
    int result = q_refcount(q, q_cluster(q, offset), &value);
    *flag = !result && value == 1 ? Q_COPIED : 0;
    return result;
}

int q_walk_flags(struct qcow2 *q, const uint64_t *l1, uint64_t entries)
{
    uint64_t *table = malloc(q->cluster_size), flag;
    int result = table ? 0 : -ENOMEM;
    bool active = !l1;
    pthread_mutex_lock(&q->lock);
    if (active) {
        l1 = q->l1;
        entries = q->l1_size;
    }
    for (uint64_t i = 0; i < entries && !result; i++) {
        uint64_t l2 = l1[i] & Q_OFFSET;
        bool changed = false;
        if (!l2)
            continue;
        result = load_l2(q, l2, table);
        for (uint64_t n = 0; n < table_entries(q) && !result; n++) {
            uint64_t entry = be64toh(table[n * q->entry_words]);
            if (entry & Q_COMPRESSED || !(entry & Q_OFFSET) || q->data == &q->data_file)
                continue;
            result = flag_for(q, entry & Q_OFFSET, &flag);
            if (!result && (entry & Q_COPIED) != flag) {
                table[n * q->entry_words] = htobe64((entry & ~Q_COPIED) | flag);
                changed = true;
            }
        }
        if (!result && changed)
            result = file_pwrite(&q->file, table, q->cluster_size, l2);
        if (!result && active)
            result = flag_for(q, l2, &flag);
        if (!result && active && (l1[i] & Q_COPIED) != flag) {
            q->l1[i] = (l1[i] & ~Q_COPIED) | flag;
            q->l1_dirty_from = i < q->l1_dirty_from ? i : q->l1_dirty_from;
            q->l1_dirty_to = i + 1 > q->l1_dirty_to ? i + 1 : q->l1_dirty_to;
        }
    }
    q_cache_drop(&q->l2);
    pthread_mutex_unlock(&q->lock);
    free(table);
    return result;
}

static bool count_span(const struct qcow2 *q, uint64_t offset, uint64_t length, uint32_t *counts, uint64_t clusters)
{
    uint64_t first = q_cluster(q, offset), last = q_cluster(q, offset + length - 1);
    if (last >= clusters)
        return false;
    for (; first <= last; first++)
        if (counts[first] != UINT32_MAX)
            counts[first]++;
    return true;
}

int q_walk_count(struct qcow2 *q, const uint64_t *l1, uint64_t entries, bool active, bool fix, uint32_t *counts, uint64_t clusters,
                 uint64_t statistics[4], q_report report, void *context)
{
    uint64_t *table = malloc(q->cluster_size), expected = 0, value;
    int result = table ? 0 : -ENOMEM;
    for (uint64_t i = 0; i < entries && !result; i++) {
        uint64_t l2 = l1[i] & Q_OFFSET;
        bool changed = false;
        if (!l2)
            continue;
        if (!aligned(q, l2) || !count_span(q, l2, q->cluster_size, counts, clusters)) {
            report(context, Q_BAD_L1, i, l1[i]);
            continue;
        }
        result = file_pread_exact(&q->file, table, q->cluster_size, l2);
        if (result == -ENODATA) {
            report(context, Q_BAD_L2_TABLE, i, l1[i]);
            result = 0;
            continue;
        }
        if (!result && active) {
            result = q_refcount(q, q_cluster(q, l2), &value);
            if (!result && (value == 1) != !!(l1[i] & Q_COPIED))
                report(context, Q_BAD_FLAG, l2, l1[i]);
        }
        for (uint64_t n = 0; n < table_entries(q) && !result; n++) {
            uint64_t words[2] = {be64toh(table[n * q->entry_words]), 0}, offset, length;
            uint64_t where = l2 + n * q->entry_words * 8;
            if (q->entry_words > 1)
                words[1] = be64toh(table[n * 2 + 1]);
            if (!words[0] && !words[1])
                continue;
            bool valid = !(words[0] & Q_COMPRESSED && q->data == &q->data_file);
            for (unsigned sub = 0; sub < q->sub_count && valid; sub++)
                valid = q_entry_type(q, words, sub) != T_INVALID;
            if (valid && entry_span(q, words[0], &offset, &length)) {
                valid = (words[0] & Q_COMPRESSED || aligned(q, offset)) && count_span(q, offset, length, counts, clusters);
                if (valid) {
                    statistics[0]++;
                    if (words[0] & Q_COMPRESSED)
                        statistics[1]++;
                    if (words[0] & Q_COMPRESSED || offset != expected)
                        statistics[2]++;
                    expected = offset + length;
                    if (active && !(words[0] & Q_COMPRESSED)) {
                        result = q_refcount(q, q_cluster(q, offset), &value);
                        if (!result && (value == 1) != !!(words[0] & Q_COPIED))
                            report(context, Q_BAD_FLAG, where, words[0]);
                    }
                }
            }
            if (!valid) {
                report(context, Q_BAD_ENTRY, where, words[0]);
                if (fix) { /* what it pointed at is lost; zeroes rather than the backing file's old data */
                    table[n * q->entry_words] = q->sub_count > 1 || q->version < 3 ? 0 : htobe64(Q_ZERO);
                    if (q->entry_words > 1)
                        table[n * 2 + 1] = htobe64(0xffffffffull << 32);
                    changed = true;
                }
            }
        }
        if (!result && changed)
            result = file_pwrite(&q->file, table, q->cluster_size, l2);
    }
    free(table);
    return result;
}

static int compare_one(struct qcow2 *q, uint64_t cluster, uint32_t count, bool fix_leaks, bool fix_low, q_report report,
                       void *context)
{
    uint64_t value;
    int result = q_refcount(q, cluster, &value);
    if (result || value == count)
        return result;
    report(context, value > count ? Q_LEAK : Q_TOO_LOW, cluster, value);
    if (value > count ? !fix_leaks : !fix_low)
        return 0;
    return q_set_refcount(q, cluster, count);
}

int q_walk_compare(struct qcow2 *q, const uint32_t *counts, uint64_t clusters, bool fix_leaks, bool fix_low, q_report report,
                   void *context)
{
    uint64_t per_block = 1ull << (q->cluster_bits + 3 - q->refcount_order);
    int result = 0;
    for (uint64_t i = 0; i < q->rt_size && !result; i++) {
        uint64_t first = i * per_block, end = first + per_block;
        if (!(q->rt[i] & ~511ull) && end > clusters)
            end = clusters; /* no block: all refcounts are zero, as they should be where the file does not reach */
        for (uint64_t cluster = first; cluster < end && !result; cluster++)
            result = compare_one(q, cluster, cluster < clusters ? counts[cluster] : 0, fix_leaks, fix_low, report, context);
    }
    for (uint64_t cluster = q->rt_size * per_block; cluster < clusters && !result; cluster++)
        result = compare_one(q, cluster, counts[cluster], fix_leaks, false, report, context);
    return result;
}
