/* SPDX-License-Identifier: Apache-2.0
 *
 * From guest offsets to clusters: L1, L2 and their entries (qcow2.txt, "Cluster mapping").
 */
#include "qcow2.h"

#include <errno.h>
#include <string.h>

bool q_has_host(const struct qcow2 *q, uint64_t entry)
{
    /* Offset 0 is a place only in an external data file; there the COPIED flag says that it is one. */
    return !(entry & Q_COMPRESSED) && ((entry & Q_OFFSET) || (q->data == &q->data_file && (entry & Q_COPIED)));
}

enum q_type q_entry_type(const struct qcow2 *q, const uint64_t *entry, unsigned sub)
{
    bool host = q_has_host(q, entry[0]);
    if (entry[0] & Q_COMPRESSED)
        return q->data == &q->data_file || (q->sub_count > 1 && entry[1]) ? T_INVALID : T_COMPRESSED;
    if (q->sub_count > 1) {
        bool allocated = entry[1] >> sub & 1, zero = entry[1] >> 32 >> sub & 1;
        if (allocated)
            return host && !zero ? T_NORMAL : T_INVALID;
        return zero ? (host ? T_ZERO_ALLOC : T_ZERO) : T_UNALLOCATED;
    }
    if (q->version >= 3 && (entry[0] & Q_ZERO))
        return host ? T_ZERO_ALLOC : T_ZERO;
    return host ? T_NORMAL : T_UNALLOCATED;
}

static uint64_t table_index(const struct qcow2 *q, uint64_t offset)
{
    return q_cluster(q, offset) & ((1ull << q->l2_bits) - 1);
}

void q_entry_get(const struct qcow2 *q, const struct q_slot *slot, uint64_t offset, uint64_t entry[2])
{
    const uint64_t *table = slot->data;
    uint64_t i = table_index(q, offset) * q->entry_words;
    entry[0] = be64toh(table[i]);
    entry[1] = q->entry_words > 1 ? be64toh(table[i + 1]) : 0;
}

void q_entry_put(struct qcow2 *q, struct q_slot *slot, uint64_t offset, uint64_t entry, uint64_t bitmap)
{
    uint64_t *table = slot->data;
    uint64_t i = table_index(q, offset) * q->entry_words;
    table[i] = htobe64(entry);
    if (q->entry_words > 1)
        table[i + 1] = htobe64(bitmap);
    slot->dirty = true;
}

void q_compressed_span(const struct qcow2 *q, uint64_t entry, uint64_t *offset, uint64_t *length)
{
    unsigned bits = 62 - (q->cluster_bits - 8); /* of the offset; the rest counts further 512-byte sectors */
    *offset = entry & ((1ull << bits) - 1);
    *length = ((entry & ~(Q_COPIED | Q_COMPRESSED)) >> bits) * 512 + 512 - (*offset & 511);
}

int q_drop_entry(struct qcow2 *q, uint64_t entry)
{
    if (entry & Q_COMPRESSED) {
        uint64_t offset, length;
        q_compressed_span(q, entry, &offset, &length);
        return q_free_later(q, offset, length);
    }
    if (q->data == &q->data_file || !(entry & Q_OFFSET))
        return 0;
    return q_free_later(q, entry & Q_OFFSET, q->cluster_size);
}

static void set_l1(struct qcow2 *q, uint64_t index, uint64_t offset)
{
    q->l1[index] = offset | Q_COPIED;
    if (index < q->l1_dirty_from)
        q->l1_dirty_from = index;
    if (index + 1 > q->l1_dirty_to)
        q->l1_dirty_to = index + 1;
}

/* A cluster for a table, with room in the file: what the guest was told is written must not be lost for want of it later. */
static int alloc_table(struct qcow2 *q, uint64_t *offset)
{
    uint64_t got;
    bool fresh;
    int result = q_alloc(q, 1, true, offset, &got, &fresh);
    if (result)
        return result;
    result = file_reserve(&q->file, *offset, q->cluster_size);
    if (result)
        q_set_refcount(q, q_cluster(q, *offset), 0); /* if that fails it is leaked */
    return result;
}

int q_l2(struct qcow2 *q, uint64_t offset, bool write, struct q_slot **slot)
{
    uint64_t index = offset >> (q->cluster_bits + q->l2_bits), fresh_offset;
    *slot = NULL;
    if (index >= q->l1_size)
        return q_fault(q, "the L1 table is too short for the disk", q->l1_offset);
    uint64_t table = q->l1[index] & Q_OFFSET;
    if (!table && !write)
        return 0;
    if (table & (q->cluster_size - 1))
        return q_corrupt(q, "an L2 table is not aligned to clusters", q->l1_offset + index * 8);
    if (table && q_overlaps_fixed(q, table, q->cluster_size))
        return q_corrupt(q, "an L2 table is where another table is", q->l1_offset + index * 8);
    int result = 0;
    if (table) {
        result = q_cache_get(q, &q->l2, index, table, false, slot);
        if (result || !write || (q->l1[index] & Q_COPIED))
            return result;
        /* A snapshot has this table too: go on with a copy under the same index. */
        result = alloc_table(q, &fresh_offset);
        if (!result)
            result = q_cache_get(q, &q->l2, index, table, false, slot);
    } else {
        result = alloc_table(q, &fresh_offset);
        if (!result)
            result = q_cache_get(q, &q->l2, index, fresh_offset, true, slot);
    }
    if (result)
        return result;
    result = q_meta_add(q, fresh_offset);
    if (!result && table)
        result = q_free_later(q, table, q->cluster_size);
    if (result)
        return result;
    (*slot)->offset = fresh_offset;
    (*slot)->dirty = true;
    set_l1(q, index, fresh_offset);
    return 0;
}

int q_map(struct qcow2 *q, uint64_t offset, uint64_t length, struct q_map *map)
{
    uint64_t in_cluster = offset & (q->cluster_size - 1);
    uint64_t table_span = q->cluster_size << q->l2_bits;
    uint64_t room = table_span - (offset & (table_span - 1));
    struct q_slot *slot;
    if (length > room)
        length = room;
    memset(map, 0, sizeof *map);
    int result = q_l2(q, offset, false, &slot);
    if (result)
        return result;
    if (!slot) {
        map->type = T_UNALLOCATED;
        map->length = length;
        return 0;
    }
    uint64_t entry[2];
    unsigned sub = in_cluster / q->sub_size;
    q_entry_get(q, slot, offset, entry);
    map->entry = entry[0];
    map->type = q_entry_type(q, entry, sub);
    map->has_host = q_has_host(q, entry[0]);
    uint64_t where = slot->offset + table_index(q, offset) * q->entry_words * 8;
    if (map->type == T_INVALID)
        return q_corrupt(q, "an L2 entry contradicts itself", where);
    if (map->has_host) {
        uint64_t host = entry[0] & Q_OFFSET;
        if (host & (q->cluster_size - 1))
            return q_corrupt(q, "a data cluster is not aligned", where);
        if (q->data == &q->file && q_cluster(q, host) >= q->file_clusters && map->type == T_NORMAL)
            return q_fault(q, "a data cluster lies beyond the end of the file", where);
        map->host = host + in_cluster;
    }
    map->length = q->sub_size - (offset & (q->sub_size - 1));
    if (map->type == T_COMPRESSED) {
        map->length = q->cluster_size - in_cluster;
    } else {
        bool contiguous = map->type == T_NORMAL || map->type == T_ZERO_ALLOC;
        uint64_t expected = entry[0] & (Q_OFFSET | Q_COPIED);
        while (map->length < length) {
            if (++sub == q->sub_count) {
                sub = 0;
                q_entry_get(q, slot, offset + map->length, entry);
                expected += q->cluster_size;
                if (contiguous && (entry[0] & (Q_OFFSET | Q_COPIED)) != expected)
                    break;
            }
            if (q_entry_type(q, entry, sub) != map->type)
                break;
            map->length += q->sub_size;
        }
    }
    if (map->type == T_NORMAL && q->data == &q->file) {
        uint64_t end = q->file_clusters << q->cluster_bits; /* a later part beyond it faults on its own turn */
        if (map->host + map->length > end)
            map->length = end - map->host;
    }
    if (map->length > length)
        map->length = length;
    return 0;
}
