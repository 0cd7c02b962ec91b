/* SPDX-License-Identifier: Apache-2.0
 *
 * qcow2 requests: reads, writes with allocation and copy-on-write, compressed clusters, and what they look like from outside.
 * Zeroes and discards are in qcow2_zero.c.
 */
#include "qcow2.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define PIECES 64
#define MANY_FREED 8192 /* clusters waiting for a flush: have one */

static int read_backing(struct qcow2 *q, struct sg *sg, uint64_t length, uint64_t offset)
{
    uint64_t size = q->backing ? __atomic_load_n(&q->backing->size, __ATOMIC_RELAXED) : 0;
    uint64_t inside = offset >= size ? 0 : size - offset < length ? size - offset : length;
    length -= inside;
    while (inside) {
        struct iovec iov[PIECES];
        size_t taken;
        int count = sg_take(sg, inside, iov, PIECES, &taken);
        int result = disk_preadv(q->backing, iov, count, offset);
        if (result) {
            if (result == -EBADMSG)
                q->disk.fault = q->backing->fault;
            return result;
        }
        inside -= taken;
        offset += taken;
    }
    sg_zero(sg, length); /* a backing file may be shorter than its overlay */
    return 0;
}

static int unpack(struct qcow2 *q, uint64_t entry, void *out)
{
    uint64_t offset, length;
    q_compressed_span(q, entry, &offset, &length);
    void *packed = malloc(length);
    if (!packed)
        return -ENOMEM;
    /* The last sector may be missing at the end of the file; the decompressor notices if that matters. */
    int result = file_pread(&q->file, packed, length, offset);
    if (!result && (!q->decompress || q->decompress(q->context, packed, length, out, q->cluster_size))) {
        pthread_mutex_lock(&q->lock);
        result = q_fault(q, "a compressed cluster does not decompress to one cluster", offset);
        pthread_mutex_unlock(&q->lock);
    }
    free(packed);
    return result;
}

static int read_compressed(struct qcow2 *q, struct sg *sg, uint64_t length, uint64_t in_cluster, uint64_t entry)
{
    pthread_mutex_lock(&q->unpacked_lock);
    bool cached = q->unpacked_entry == entry;
    if (cached)
        sg_put(sg, (char *)q->unpacked + in_cluster, length);
    pthread_mutex_unlock(&q->unpacked_lock);
    if (cached)
        return 0;
    void *cluster = malloc(q->cluster_size); /* our own, so that several threads can decompress at once */
    if (!cluster)
        return -ENOMEM;
    int result = unpack(q, entry, cluster);
    if (result) {
        free(cluster);
        return result;
    }
    sg_put(sg, (char *)cluster + in_cluster, length);
    pthread_mutex_lock(&q->unpacked_lock);
    void *old = q->unpacked;
    q->unpacked = cluster;
    q->unpacked_entry = entry;
    pthread_mutex_unlock(&q->unpacked_lock);
    free(old);
    return 0;
}

int q_read(struct qcow2 *q, struct sg *sg, uint64_t length, uint64_t offset)
{
    while (length) {
        struct q_map map;
        pthread_mutex_lock(&q->lock);
        int result = q_map(q, offset, length, &map);
        pthread_mutex_unlock(&q->lock);
        if (result)
            return result;
        switch (map.type) {
        case T_NORMAL:
            result = file_preadv(q->data, sg, map.length, map.host);
            break;
        case T_COMPRESSED:
            result = read_compressed(q, sg, map.length, offset & (q->cluster_size - 1), map.entry);
            break;
        case T_UNALLOCATED:
            result = read_backing(q, sg, map.length, offset);
            break;
        default:
            sg_zero(sg, map.length);
        }
        if (result)
            return result;
        offset += map.length;
        length -= map.length;
    }
    return 0;
}

static int qcow2_preadv(struct disk *disk, const struct iovec *iov, int count, uint64_t offset)
{
    struct qcow2 *q = (struct qcow2 *)disk;
    struct sg sg = {iov, count, 0};
    pthread_rwlock_rdlock(&q->io);
    int result = q_read(q, &sg, sg_length(iov, count), offset);
    pthread_rwlock_unlock(&q->io);
    return result;
}

/* Wait until nobody allocates at guest cluster `first`; returns how many clusters from there on are free of it. */
static uint64_t claimable(struct qcow2 *q, uint64_t first, uint64_t count)
{
    struct q_inflight *other = q->inflight;
    while (other) {
        if (first >= other->first && first < other->first + other->count) {
            pthread_cond_wait(&q->landed, &q->lock);
            other = q->inflight;
            continue;
        }
        if (other->first > first && other->first - first < count)
            count = other->first - first;
        other = other->next;
    }
    return count;
}

static void land(struct qcow2 *q, struct q_inflight *mine)
{
    struct q_inflight **link = &q->inflight;
    while (*link != mine)
        link = &(*link)->next;
    *link = mine->next;
    pthread_cond_broadcast(&q->landed);
}

struct plan { /* an allocating write of guest bytes [offset, end) into host clusters */
    uint64_t offset, end;
    uint64_t from, to; /* with the bytes around it that must be copied along */
    uint64_t host;     /* of the first cluster */
    uint64_t clusters;
    bool reuse; /* the clusters are there already */
    bool from_zero, to_zero; /* what is around is zero and the host clusters read as zero: nothing to write */
};

/* True if a new host cluster must take over data (rather than zeroes or the backing file's) from the old one. */
static bool moves(const struct qcow2 *q, const uint64_t *entry)
{
    return (entry[0] & Q_COMPRESSED) || (q->sub_count > 1 ? (uint32_t)entry[1] != 0 : q_entry_type(q, entry, 0) == T_NORMAL);
}

static bool reads_zero(const struct qcow2 *q, enum q_type type, uint64_t offset)
{
    return type == T_ZERO || type == T_ZERO_ALLOC || (type == T_UNALLOCATED && (!q->backing || offset >= q->backing->size));
}

static bool in_place(const struct qcow2 *q, uint64_t entry)
{
    return q_has_host(q, entry) && ((entry & Q_COPIED) || q->data == &q->data_file);
}

/* Decide where a write goes that cannot go in place, and allocate. `lock` held. */
static int plan_write(struct qcow2 *q, uint64_t offset, uint64_t length, struct plan *plan)
{
    uint64_t mask = q->cluster_size - 1, start = offset & ~mask, table_span = q->cluster_size << q->l2_bits;
    uint64_t table_end = (offset | (table_span - 1)) + 1, want = 1;
    uint64_t first[2] = {0, 0}, last[2], next[2] = {0, 0};
    struct q_slot *slot;
    int result = q_l2(q, offset, false, &slot);
    if (result)
        return result;
    if (slot)
        q_entry_get(q, slot, offset, first);
    memcpy(last, first, sizeof last);
    plan->reuse = in_place(q, first[0]);
    plan->offset = offset;
    plan->from_zero = plan->to_zero = false;
    bool fresh = false;
    if (plan->reuse) {
        plan->clusters = 1;
        plan->host = first[0] & Q_OFFSET;
    } else {
        for (uint64_t at = start + q->cluster_size; at < offset + length && at < table_end; at += q->cluster_size) {
            if (slot)
                q_entry_get(q, slot, at, next);
            if (in_place(q, next[0]))
                break;
            want++;
        }
        if (q->data == &q->data_file) {
            plan->host = start;
            plan->clusters = want;
        } else {
            result = q_alloc(q, want, false, &plan->host, &plan->clusters, &fresh);
            if (result)
                return result;
            /* The allocation may have thrown the table out of the cache. */
            result = q_l2(q, offset, false, &slot);
            if (result)
                return result;
        }
        if (slot)
            q_entry_get(q, slot, start + (plan->clusters - 1) * q->cluster_size, last);
    }
    uint64_t stop = start + plan->clusters * q->cluster_size;
    plan->end = offset + length < stop ? offset + length : stop;
    plan->from = offset & ~(q->sub_size - 1);
    plan->to = q_round_up(plan->end, q->sub_size);
    enum q_type head = q_entry_type(q, first, (offset & mask) / q->sub_size);
    enum q_type tail = q_entry_type(q, last, ((plan->end - 1) & mask) / q->sub_size);
    if (plan->reuse) {
        /* A subcluster that is in use is written in place; others may be writing it too, so copy nothing over it. */
        if (head == T_NORMAL)
            plan->from = offset;
        if (tail == T_NORMAL)
            plan->to = plan->end;
    } else {
        if (moves(q, first))
            plan->from = start;
        if (moves(q, last))
            plan->to = stop;
        plan->from_zero = fresh && !moves(q, first) && reads_zero(q, head, plan->from);
        plan->to_zero = fresh && !moves(q, last) && reads_zero(q, tail, plan->end);
    }
    if (q->data == &q->data_file && plan->to > q->disk.size)
        plan->to = q->disk.size; /* a raw data file is as long as the disk */
    return 0;
}

/* Write [from, to): the request's bytes and, around them, what the disk reads there now. No lock held but `io`. */
static int write_plan(struct qcow2 *q, const struct plan *plan, struct sg *sg)
{
    uint64_t host = plan->host + (plan->offset & (q->cluster_size - 1));
    size_t head = plan->from_zero ? 0 : plan->offset - plan->from, tail = plan->to_zero ? 0 : plan->to - plan->end;
    uint64_t length = plan->end - plan->offset;
    if (!head && !tail)
        return file_pwritev(q->data, sg, length, host);
    char *around = malloc(head + tail);
    if (!around)
        return -ENOMEM;
    struct iovec iov[PIECES + 2] = {{around, head}};
    struct sg old = {&iov[0], 1, 0};
    int result = head ? q_read(q, &old, head, plan->from) : 0;
    struct iovec tail_iov = {around + head, tail};
    old = (struct sg){&tail_iov, 1, 0};
    if (!result && tail)
        result = q_read(q, &old, tail, plan->end);
    if (!result) { /* one write for all, unless the request is in very many pieces */
        size_t taken;
        int count = 1 + sg_take(sg, length, iov + 1, PIECES, &taken);
        uint64_t at = host - head;
        if (taken == length)
            iov[count++] = tail_iov;
        struct sg whole = {iov, count, 0};
        uint64_t bytes = head + taken + (taken == length ? tail : 0);
        result = file_pwritev(q->data, &whole, bytes, at);
        if (!result && taken < length) {
            result = file_pwritev(q->data, sg, length - taken, at + bytes);
            struct sg rest = {&tail_iov, 1, 0};
            if (!result)
                result = file_pwritev(q->data, &rest, tail, host + length);
        }
    }
    free(around);
    return result;
}

/* Point the L2 entries at what was written. `lock` held. Returns how many clusters were linked in *linked. */
static int link_plan(struct qcow2 *q, const struct plan *plan, uint64_t *linked)
{
    uint64_t start = plan->offset & ~(q->cluster_size - 1);
    for (*linked = 0; *linked < plan->clusters; ++*linked) {
        uint64_t at = start + *linked * q->cluster_size, entry[2];
        struct q_slot *slot;
        int result = q_l2(q, at, true, &slot);
        if (result)
            return result;
        q_entry_get(q, slot, at, entry);
        uint64_t bitmap = 0;
        if (q->sub_count > 1) {
            uint64_t from = plan->from > at ? (plan->from - at) / q->sub_size : 0;
            uint64_t to = plan->to < at + q->cluster_size ? q_round_up(plan->to - at, q->sub_size) / q->sub_size : 32;
            uint64_t bits = ((1ull << to) - 1) & ~((1ull << from) - 1);
            bitmap = (entry[1] | bits) & ~(bits << 32);
        }
        if (!plan->reuse)
            q_drop_entry(q, entry[0]); /* if there is no memory to note it, the cluster is leaked */
        q_entry_put(q, slot, at, (plan->host + *linked * q->cluster_size) | Q_COPIED, bitmap);
    }
    return 0;
}

static void give_back(struct qcow2 *q, const struct plan *plan, uint64_t linked)
{
    if (!plan->reuse && q->data == &q->file && linked < plan->clusters) /* if this fails too, they are leaked */
        q_add_refcount(q, plan->host + linked * q->cluster_size, (plan->clusters - linked) * q->cluster_size, -1);
}

/* Write one stretch, as long as it can be in one go; *done is its length. `io` held. */
static int write_some(struct qcow2 *q, struct sg *sg, uint64_t length, uint64_t offset, uint64_t *done)
{
    uint64_t first = q_cluster(q, offset), linked = 0;
    struct q_map map;
    struct plan plan = {0};
    pthread_mutex_lock(&q->lock);
    uint64_t free_run = claimable(q, first, q_cluster(q, offset + length - 1) - first + 1);
    uint64_t limit = ((first + free_run) << q->cluster_bits) - offset;
    if (length > limit)
        length = limit;
    int result = q->corrupt ? -EIO : q_map(q, offset, length, &map);
    if (!result && map.type == T_NORMAL && in_place(q, map.entry)) {
        if (q->data == &q->file && q_overlaps(q, map.host, map.length))
            result = q_corrupt(q, "a data cluster is used for metadata as well", map.host);
        pthread_mutex_unlock(&q->lock);
        *done = map.length;
        return result ? result : file_pwritev(q->data, sg, map.length, map.host);
    }
    if (!result)
        result = plan_write(q, offset, length, &plan);
    if (!result && plan.reuse && q->data == &q->file && q_overlaps(q, plan.host, q->cluster_size))
        result = q_corrupt(q, "a data cluster is used for metadata as well", plan.host);
    if (result) {
        if (plan.clusters)
            give_back(q, &plan, 0);
        pthread_mutex_unlock(&q->lock);
        return result;
    }
    struct q_inflight mine = {first, plan.clusters, q->inflight};
    q->inflight = &mine;
    pthread_mutex_unlock(&q->lock);
    result = write_plan(q, &plan, sg);
    pthread_mutex_lock(&q->lock);
    if (!result)
        result = link_plan(q, &plan, &linked);
    if (result)
        give_back(q, &plan, linked);
    land(q, &mine);
    pthread_mutex_unlock(&q->lock);
    *done = plan.end - plan.offset;
    return result;
}

static int qcow2_pwritev(struct disk *disk, const struct iovec *iov, int count, uint64_t offset)
{
    struct qcow2 *q = (struct qcow2 *)disk;
    struct sg sg = {iov, count, 0};
    uint64_t length = sg_length(iov, count), done;
    int result = 0;
    if (__atomic_load_n(&q->freed_count, __ATOMIC_RELAXED) > MANY_FREED)
        result = q_flush(q, false);
    pthread_rwlock_rdlock(&q->io);
    for (; !result && length; length -= done, offset += done) {
        result = write_some(q, &sg, length, offset, &done);
        if (result)
            break;
    }
    pthread_rwlock_unlock(&q->io);
    return result;
}

int q_preallocate(struct qcow2 *q)
{
    uint64_t offset = 0, linked;
    int result = 0;
    pthread_rwlock_rdlock(&q->io);
    pthread_mutex_lock(&q->lock);
    while (offset < q->disk.size && !result) {
        struct q_map map;
        struct plan plan = {0};
        result = q_map(q, offset, q->disk.size - offset, &map);
        if (result || map.type == T_NORMAL) {
            offset += map.length;
            continue;
        }
        result = plan_write(q, offset, map.length, &plan);
        if (!result)
            result = link_plan(q, &plan, &linked);
        offset = plan.end;
    }
    pthread_mutex_unlock(&q->lock);
    pthread_rwlock_unlock(&q->io);
    return result;
}

/* A place for `size` bytes of compressed data: behind the last ones if they fit, else from a new cluster on. `lock` held. */
static int alloc_bytes(struct qcow2 *q, size_t size, uint64_t *offset)
{
    if (q->packed_next && q->packed_end - q->packed_next >= size &&
        q_add_refcount(q, q->packed_next, size, 1) == 0) {
        *offset = q->packed_next;
    } else {
        uint64_t start, got;
        bool fresh;
        int result = q_alloc(q, q_round_up(size, q->cluster_size) >> q->cluster_bits, true, &start, &got, &fresh);
        if (result)
            return result;
        *offset = start;
        q->packed_end = start + got * q->cluster_size;
    }
    q->packed_next = *offset + size;
    if (q->packed_next == q->packed_end)
        q->packed_next = q->packed_end = 0;
    return 0;
}

int q_write_compressed(struct qcow2 *q, uint64_t offset, const void *data, size_t size)
{
    uint64_t first = q_cluster(q, offset), host, entry[2];
    struct q_slot *slot;
    if (q->disk.readonly)
        return -EROFS;
    if (offset & (q->cluster_size - 1) || offset >= q->disk.size || !size || size >= q->cluster_size ||
        q->data == &q->data_file)
        return -EINVAL;
    pthread_rwlock_rdlock(&q->io);
    pthread_mutex_lock(&q->lock);
    claimable(q, first, 1);
    int result = q->corrupt ? -EIO : alloc_bytes(q, size, &host);
    if (!result) {
        struct q_inflight mine = {first, 1, q->inflight};
        q->inflight = &mine;
        pthread_mutex_unlock(&q->lock);
        result = file_pwrite(&q->file, data, size, host);
        pthread_mutex_lock(&q->lock);
        if (!result)
            result = q_l2(q, offset, true, &slot);
        if (result) {
            q_add_refcount(q, host, size, -1);
            q->packed_next = q->packed_end = 0;
        } else {
            uint64_t more = (host + size - 1) / 512 - host / 512;
            q_entry_get(q, slot, offset, entry);
            q_drop_entry(q, entry[0]);
            q_entry_put(q, slot, offset, Q_COMPRESSED | more << (62 - (q->cluster_bits - 8)) | host, 0);
        }
        land(q, &mine);
    }
    pthread_mutex_unlock(&q->lock);
    pthread_rwlock_unlock(&q->io);
    return result;
}

static int qcow2_flush(struct disk *disk)
{
    return q_flush((struct qcow2 *)disk, false);
}

static int describe(struct qcow2 *q, uint64_t offset, uint64_t length, struct disk_extent *extent)
{
    struct q_map map;
    pthread_mutex_lock(&q->lock);
    int result = q_map(q, offset, length, &map);
    pthread_mutex_unlock(&q->lock);
    if (result)
        return result;
    extent->length = map.length;
    extent->host = map.host;
    extent->flags = DISK_ALLOCATED;
    switch (map.type) {
    case T_NORMAL:
        extent->flags |= DISK_DATA | DISK_HOST_OFFSET;
        return 0;
    case T_COMPRESSED:
        extent->flags |= DISK_DATA | DISK_COMPRESSED;
        return 0;
    case T_ZERO_ALLOC:
        extent->flags |= DISK_HOST_OFFSET; /* fall through */
    case T_ZERO:
        extent->flags |= DISK_ZERO;
        return 0;
    default:
        extent->flags = DISK_ZERO;
    }
    if (q->backing && offset < q->backing->size) {
        if (map.length > q->backing->size - offset)
            map.length = q->backing->size - offset;
        result = disk_status(q->backing, offset, map.length, extent);
        extent->flags &= DISK_DATA | DISK_ZERO;
    }
    return result;
}

static int qcow2_status(struct disk *disk, uint64_t offset, uint64_t length, struct disk_extent *extent)
{
    struct qcow2 *q = (struct qcow2 *)disk;
    pthread_rwlock_rdlock(&q->io);
    int result = describe(q, offset, length, extent);
    for (int i = 0; !result && i < 64 && extent->length < length; i++) { /* L2 tables end, runs go on; but not forever */
        struct disk_extent next;
        result = describe(q, offset + extent->length, length - extent->length, &next);
        if (result || next.flags != extent->flags ||
            ((next.flags & DISK_HOST_OFFSET) && next.host != extent->host + extent->length))
            break;
        extent->length += next.length;
    }
    pthread_rwlock_unlock(&q->io);
    return result;
}

int qcow2_discard(struct disk *, uint64_t offset, uint64_t length);
int qcow2_write_zeroes(struct disk *, uint64_t offset, uint64_t length, unsigned flags);

const struct disk_ops qcow2_ops = {
    .preadv = qcow2_preadv,
    .pwritev = qcow2_pwritev,
    .flush = qcow2_flush,
    .discard = qcow2_discard,
    .write_zeroes = qcow2_write_zeroes,
    .status = qcow2_status,
};
