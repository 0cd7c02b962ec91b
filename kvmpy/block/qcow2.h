/* SPDX-License-Identifier: Apache-2.0
 *
 * The qcow2 data path (QEMU's docs/interop/qcow2.txt), without Python: look-up, copy-on-write, refcounts, order of writes.
 * Headers, creation, snapshot tables and repair decisions are Python's (kvmpy/block/qcow2/); it calls down here.
 *
 * Locks, taken in this order:
 *   flush_lock  one flush, or one change of the whole image (a snapshot), at a time
 *   io          shared by reads and writes for as long as they use host offsets; exclusive where clusters come free for
 *               new use, so that nobody reads or writes a cluster through a look-up that has gone stale
 *   lock        L1, L2 and refcount caches; held while tables are read or written, never during data transfers
 * Nothing here ever waits for the GIL with `lock` held.
 *
 * Order on disk: data and refcounts, sync, L2 tables, sync, L1; clusters that lost their last user come free only
 * after the tables that dropped them are on disk. A crash leaks clusters; it never leaves a pointer to a free one.
 */
#ifndef KVMPY_BLOCK_QCOW2_H
#define KVMPY_BLOCK_QCOW2_H

#include "disk.h"

#include <endian.h>

#define Q_COPIED (1ull << 63)     /* refcount is exactly one: may be written in place */
#define Q_COMPRESSED (1ull << 62)
#define Q_ZERO 1ull               /* standard L2 entries, version 3 */
#define Q_OFFSET 0x00fffffffffffe00ull
#define Q_MAX_L1 (32u << 20)      /* bytes */
#define Q_MAX_REFTABLE (8u << 20) /* bytes */

#define Q_INCOMPAT_DIRTY 1ull
#define Q_INCOMPAT_CORRUPT 2ull
#define Q_INCOMPAT_DATA_FILE 4ull
#define Q_INCOMPAT_COMPRESSION 8ull
#define Q_INCOMPAT_EXTL2 16ull

enum q_type { T_UNALLOCATED, T_ZERO, T_ZERO_ALLOC, T_NORMAL, T_COMPRESSED, T_INVALID };

/* A cached table (an L2 table or a refcount block), big endian as on disk. */
struct q_slot {
    uint64_t index;  /* which L1 entry, or which refcount table entry */
    uint64_t offset; /* where in the file */
    void *data;
    bool dirty, used;
};

struct q_cache {
    struct q_slot *slots;
    uint32_t limit, count, hand;
    uint32_t *slot_of; /* index -> slot + 1; 0: not cached */
    uint64_t indices;
};

struct q_free {
    uint64_t offset, length;
};

struct q_inflight { /* guest clusters that are being allocated; lives on the writer's stack */
    uint64_t first, count;
    struct q_inflight *next;
};

struct q_params { /* what the header says, checked by Python already */
    int fd, data_fd; /* data_fd -1: the same file */
    unsigned version, cluster_bits, refcount_order;
    uint64_t size, incompatible;
    uint64_t l1_offset, l1_size, rt_offset, rt_clusters;
    bool lazy, raw_external, readonly, no_sync, discard;
    uint64_t cache_bytes;
};

struct qcow2 {
    struct disk disk;
    struct host_file file, data_file;
    struct host_file *data; /* &file or &data_file */
    struct disk *backing;
    unsigned version, cluster_bits, l2_bits, refcount_order;
    uint64_t cluster_size;
    unsigned entry_words;      /* u64 per L2 entry: 2 with extended L2 */
    unsigned sub_count;        /* subclusters per cluster: 32 with extended L2, else 1 */
    uint64_t sub_size;
    uint64_t incompatible;
    bool lazy, raw_external, discard, corrupt;

    uint64_t *l1; /* host endian */
    uint64_t l1_size, l1_offset, l1_dirty_from, l1_dirty_to;
    uint64_t *rt;
    uint64_t rt_size, rt_offset, rt_dirty_from, rt_dirty_to;
    struct q_cache l2, rb;

    uint64_t free_hint;     /* no free cluster below this index */
    uint64_t file_clusters; /* the file never reached beyond this: clusters from here on read as zero */
    uint64_t meta_count, meta_size, *meta; /* hash set: cluster + 1 of each L2 table and refcount block */
    struct { uint64_t offset, length; } fixed[3]; /* L1, refcount table, snapshot table */

    struct q_free *freed;
    size_t freed_count, freed_room;
    struct q_inflight *inflight;
    uint64_t packed_next, packed_end; /* where the next compressed cluster goes */

    int (*decompress)(void *context, const void *in, size_t in_size, void *out, size_t out_size);
    void *context;
    uint64_t unpacked_entry; /* the compressed cluster that `unpacked` holds, 0: none */
    void *unpacked;
    pthread_mutex_t unpacked_lock;

    pthread_mutex_t flush_lock, lock;
    pthread_rwlock_t io;
    pthread_cond_t landed; /* an in-flight allocation ended */
};

/* qcow2_core.c */
int q_open(struct qcow2 *, const struct q_params *);
int q_close(struct qcow2 *); /* flushes a writable image; frees in any case */
int q_fault(struct qcow2 *, const char *text, uint64_t offset);   /* -> -EBADMSG */
int q_corrupt(struct qcow2 *, const char *text, uint64_t offset); /* ... and no more writes */
int q_header_put(struct qcow2 *, unsigned offset, uint64_t value, unsigned bytes);
int q_set_incompatible(struct qcow2 *, uint64_t bits);
int q_replace_l1(struct qcow2 *, uint64_t offset, uint64_t entries);

/* qcow2_cache.c; `lock` held */
int q_cache_init(struct q_cache *, uint64_t indices, uint32_t limit);
int q_cache_grow(struct q_cache *, uint64_t indices);
void q_cache_drop(struct q_cache *); /* forget everything; nothing may be dirty */
void q_cache_free(struct q_cache *);
int q_cache_get(struct qcow2 *, struct q_cache *, uint64_t index, uint64_t offset, bool fresh, struct q_slot **);
int q_writeback(struct qcow2 *); /* in the order above, without the last sync */
int q_flush(struct qcow2 *, bool exclusive); /* no lock held; exclusive: `flush_lock` and `io` for writing are */

/* qcow2_refcount.c; `lock` held */
int q_refcount(struct qcow2 *, uint64_t cluster, uint64_t *value);
int q_set_refcount(struct qcow2 *, uint64_t cluster, uint64_t value);
int q_add_refcount(struct qcow2 *, uint64_t offset, uint64_t length, int delta);
int q_alloc(struct qcow2 *, uint64_t want, bool exact, uint64_t *offset, uint64_t *got, bool *fresh);
int q_free_later(struct qcow2 *, uint64_t offset, uint64_t length);
int q_apply_frees(struct qcow2 *, size_t count);
int q_meta_add(struct qcow2 *, uint64_t offset);
void q_meta_remove(struct qcow2 *, uint64_t offset);
bool q_overlaps(struct qcow2 *, uint64_t offset, uint64_t length); /* data here would hit metadata */
bool q_overlaps_fixed(struct qcow2 *, uint64_t offset, uint64_t length); /* ... header, L1, refcount or snapshot table */

/* qcow2_map.c; `lock` held */
struct q_map {
    enum q_type type;
    uint64_t entry;  /* of the first cluster */
    uint64_t host;   /* of the asked byte, for T_NORMAL and T_ZERO_ALLOC */
    uint64_t length; /* bytes of this type (and contiguous in the file, if T_NORMAL) */
    bool has_host;   /* the first cluster has a host cluster, whatever its subclusters say */
};
int q_map(struct qcow2 *, uint64_t offset, uint64_t length, struct q_map *);
int q_l2(struct qcow2 *, uint64_t offset, bool write, struct q_slot **); /* *slot NULL: none, only if !write */
enum q_type q_entry_type(const struct qcow2 *, const uint64_t *entry, unsigned sub);
void q_entry_get(const struct qcow2 *, const struct q_slot *, uint64_t offset, uint64_t entry[2]);
void q_entry_put(struct qcow2 *, struct q_slot *, uint64_t offset, uint64_t entry, uint64_t bitmap);
void q_compressed_span(const struct qcow2 *, uint64_t entry, uint64_t *offset, uint64_t *length);
int q_drop_entry(struct qcow2 *, uint64_t entry); /* its clusters come free once the tables are on disk */
bool q_has_host(const struct qcow2 *, uint64_t entry);

/* qcow2_io.c */
extern const struct disk_ops qcow2_ops;
int q_read(struct qcow2 *, struct sg *, uint64_t length, uint64_t offset); /* `io` held */
int q_preallocate(struct qcow2 *); /* give every cluster a place; only for images nobody else uses yet */
int q_write_compressed(struct qcow2 *, uint64_t offset, const void *data, size_t size);

/* qcow2_walk.c; `io` held for writing, image flushed */
typedef void (*q_report)(void *context, int kind, uint64_t offset, uint64_t value);
enum { Q_BAD_L1, Q_BAD_L2_TABLE, Q_BAD_ENTRY, Q_BAD_FLAG, Q_LEAK, Q_TOO_LOW };
/* Add `delta` to the refcount of everything an L1 table reaches; if it fails, undo what was done. */
int q_walk_refcounts(struct qcow2 *, const uint64_t *l1, uint64_t entries, int delta);
/* Make the COPIED flags of what an L1 table reaches agree with the refcounts; NULL: the active one, whose own flags too. */
int q_walk_flags(struct qcow2 *, const uint64_t *l1, uint64_t entries);
/* Count the references an L1 table makes, report what cannot be; fix: clear entries that point nowhere. */
int q_walk_count(struct qcow2 *, const uint64_t *l1, uint64_t entries, bool active, bool fix, uint32_t *counts, uint64_t clusters,
                 uint64_t statistics[4], q_report, void *context);
/* Compare the refcounts with the counts; fix those that are too high (leaks) or too low. */
int q_walk_compare(struct qcow2 *, const uint32_t *counts, uint64_t clusters, bool fix_leaks, bool fix_low, q_report, void *context);

static inline uint64_t q_cluster(const struct qcow2 *q, uint64_t offset)
{
    return offset >> q->cluster_bits;
}

static inline uint64_t q_round_up(uint64_t value, uint64_t unit)
{
    return (value + unit - 1) & ~(unit - 1);
}

#endif
