/* SPDX-License-Identifier: Apache-2.0
 *
 * Zeroes and discards: whole (sub)clusters by their L2 entries, the edges as data.
 */
#include "qcow2.h"

#include <errno.h>
#include <stdlib.h>

enum change { ZERO_KEEP, ZERO_UNMAP, DISCARD };

/* Write zeroes as data, where it does not read as zeroes already. No lock held. */
static int write_data(struct qcow2 *q, uint64_t offset, uint64_t length)
{
    size_t unit = length < (256u << 10) ? length : 256u << 10;
    void *zeroes = unit ? calloc(1, unit) : NULL;
    int result = 0;
    if (unit && !zeroes)
        return -ENOMEM;
    while (length && !result) {
        size_t n = length < unit ? length : unit;
        struct disk_extent extent;
        result = q->disk.ops->status(&q->disk, offset, n, &extent);
        if (result)
            break;
        if (extent.length < n)
            n = extent.length;
        struct iovec iov = {zeroes, n};
        if (!(extent.flags & DISK_ZERO) || q->raw_external)
            result = q->disk.ops->pwritev(&q->disk, &iov, 1, offset);
        offset += n;
        length -= n;
    }
    free(zeroes);
    return result;
}

/* Change subclusters [from, to) of the cluster at guest offset `at`. `io` held for writing, and `lock`. */
static int change_cluster(struct qcow2 *q, uint64_t at, unsigned from, unsigned to, enum change change)
{
    struct q_slot *slot;
    uint64_t entry[2];
    int result = q_l2(q, at, false, &slot);
    if (result)
        return result;
    if (!slot && !q->backing)
        return 0; /* reads as zeroes already */
    result = q_l2(q, at, true, &slot);
    if (result)
        return result;
    q_entry_get(q, slot, at, entry);
    bool whole = from == 0 && to == q->sub_count;
    bool keep = q->version >= 3 && q_has_host(q, entry[0]) && (change == ZERO_KEEP || q->data == &q->data_file);
    if (q->sub_count > 1) {
        uint64_t bits = ((1ull << to) - 1) & ~((1ull << from) - 1);
        if ((entry[0] & Q_COMPRESSED) && !whole)
            return change == DISCARD ? 0 : -EAGAIN; /* the rest must be unpacked: the caller writes data */
        uint64_t bitmap = (entry[0] & Q_COMPRESSED ? 0 : entry[1] & ~bits) | bits << 32;
        if (!keep && whole) {
            q_drop_entry(q, entry[0]); /* if there is no memory to note it, the cluster is leaked */
            entry[0] = 0;
            if (change == DISCARD && !q->backing)
                bitmap = 0;
        }
        q_entry_put(q, slot, at, entry[0], bitmap);
        return 0;
    }
    enum q_type type = q_entry_type(q, entry, 0);
    if (type == T_ZERO || (type == T_UNALLOCATED && !q->backing))
        return 0;
    if (keep) {
        q_entry_put(q, slot, at, entry[0] | Q_ZERO, 0);
        return 0;
    }
    q_drop_entry(q, entry[0]);
    q_entry_put(q, slot, at, q->version < 3 || (change == DISCARD && !q->backing) ? 0 : Q_ZERO, 0);
    return 0;
}

/* [offset, end) is made of whole subclusters. */
static int change_range(struct qcow2 *q, uint64_t offset, uint64_t end, enum change change)
{
    int result = 0;
    uint64_t mask = q->cluster_size - 1;
    pthread_rwlock_wrlock(&q->io);
    pthread_mutex_lock(&q->lock);
    if (q->corrupt)
        result = -EIO;
    while (offset < end && !result) {
        uint64_t at = offset & ~mask, stop = at + q->cluster_size < end ? at + q->cluster_size : end;
        result = change_cluster(q, at, (offset - at) / q->sub_size, (stop - at) / q->sub_size, change);
        if (result == -EAGAIN) {
            pthread_mutex_unlock(&q->lock);
            pthread_rwlock_unlock(&q->io);
            uint64_t last = stop < q->disk.size ? stop : q->disk.size;
            result = write_data(q, offset, last - offset);
            pthread_rwlock_wrlock(&q->io);
            pthread_mutex_lock(&q->lock);
        }
        offset = stop;
    }
    pthread_mutex_unlock(&q->lock);
    pthread_rwlock_unlock(&q->io);
    return result;
}

int qcow2_write_zeroes(struct disk *disk, uint64_t offset, uint64_t length, unsigned flags)
{
    struct qcow2 *q = (struct qcow2 *)disk;
    uint64_t end = offset + length, mask = q->sub_size - 1;
    uint64_t first = q_round_up(offset, q->sub_size);
    uint64_t last = end == disk->size ? q_round_up(end, q->sub_size) : end & ~mask; /* nothing is behind the end */
    if (first >= last || (q->version < 3 && q->backing)) /* version 2 cannot say "zero" over a backing file */
        return write_data(q, offset, length);
    int result = write_data(q, offset, first - offset);
    if (!result && end > last)
        result = write_data(q, last, end - last);
    if (!result && q->data == &q->data_file) /* the raw view of the data file must agree */
        result = file_zero(&q->data_file, first, (last < disk->size ? last : disk->size) - first, flags & DISK_UNMAP);
    return result ? result : change_range(q, first, last, flags & DISK_UNMAP ? ZERO_UNMAP : ZERO_KEEP);
}

int qcow2_discard(struct disk *disk, uint64_t offset, uint64_t length)
{
    struct qcow2 *q = (struct qcow2 *)disk;
    uint64_t end = offset + length;
    uint64_t first = q_round_up(offset, q->sub_size);
    uint64_t last = end == disk->size ? q_round_up(end, q->sub_size) : end & ~(q->sub_size - 1);
    /* Without a zero flag the backing file's old data would come back. */
    if (!q->discard || first >= last || (q->version < 3 && q->backing))
        return 0;
    if (q->data == &q->data_file) {
        int result = file_zero(&q->data_file, first, (last < disk->size ? last : disk->size) - first, true);
        if (result)
            return result;
    }
    return change_range(q, first, last, DISCARD);
}
