/* SPDX-License-Identifier: Apache-2.0
 *
 * Opening and closing, faults, and the header fields that change while an image is in use.
 */
#include "qcow2.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

int q_fault(struct qcow2 *q, const char *text, uint64_t offset)
{
    q->disk.fault = (struct disk_fault){text, offset};
    return -EBADMSG;
}

int q_header_put(struct qcow2 *q, unsigned offset, uint64_t value, unsigned bytes)
{
    uint64_t big = htobe64(value << (64 - bytes * 8));
    return file_pwrite(&q->file, &big, bytes, offset);
}

int q_set_incompatible(struct qcow2 *q, uint64_t bits)
{
    if (bits == q->incompatible || q->version < 3)
        return 0;
    int result = q_header_put(q, 72, bits, 8);
    if (!result)
        result = file_sync(&q->file);
    if (!result)
        q->incompatible = bits;
    return result;
}

int q_corrupt(struct qcow2 *q, const char *text, uint64_t offset)
{
    if (!q->disk.readonly && !q->corrupt) {
        q->corrupt = true; /* writes fail from now on, even if the mark below cannot be made */
        q_set_incompatible(q, q->incompatible | Q_INCOMPAT_CORRUPT);
    }
    return q_fault(q, text, offset);
}

static int load_table(struct qcow2 *q, uint64_t offset, uint64_t entries, uint64_t **table, const char *text)
{
    *table = calloc(entries ? entries : 1, 8);
    if (!*table)
        return -ENOMEM;
    int result = file_pread_exact(&q->file, *table, entries * 8, offset);
    if (result == -ENODATA)
        return q_fault(q, text, offset);
    for (uint64_t i = 0; i < entries; i++)
        (*table)[i] = be64toh((*table)[i]);
    return result;
}

static int note_metadata(struct qcow2 *q)
{
    int result = 0;
    if (q->meta)
        memset(q->meta, 0, q->meta_size * 8);
    q->meta_count = 0;
    for (uint64_t i = 0; i < q->l1_size && !result; i++)
        if (q->l1[i] & Q_OFFSET)
            result = q_meta_add(q, q->l1[i] & Q_OFFSET);
    for (uint64_t i = 0; i < q->rt_size && !result; i++)
        if (q->rt[i] & ~511ull)
            result = q_meta_add(q, q->rt[i] & ~511ull);
    q->fixed[0].offset = q->l1_offset;
    q->fixed[0].length = q->l1_size * 8;
    q->fixed[1].offset = q->rt_offset;
    q->fixed[1].length = q->rt_size * 8;
    return result;
}

static uint32_t slots_for(uint64_t bytes, uint64_t cluster_size, uint32_t least)
{
    uint64_t n = bytes / cluster_size;
    return n < least ? least : n > 1u << 16 ? 1u << 16 : n;
}

static int load(struct qcow2 *q, const struct q_params *p)
{
    struct stat st;
    q->file.fd = p->fd;
    q->file.no_sync = q->data_file.no_sync = p->no_sync;
    q->file.block_device = fstat(p->fd, &st) == 0 && S_ISBLK(st.st_mode);
    q->data = &q->file;
    if (p->data_fd >= 0) {
        q->data_file.fd = p->data_fd;
        q->data_file.block_device = fstat(p->data_fd, &st) == 0 && S_ISBLK(st.st_mode);
        q->data = &q->data_file;
    }
    int64_t bytes = file_size(&q->file);
    if (bytes < 0)
        return bytes;
    q->file_clusters = q_round_up(bytes, q->cluster_size) >> q->cluster_bits;
    int result = load_table(q, q->l1_offset, q->l1_size, &q->l1, "the L1 table lies beyond the end of the file");
    if (!result)
        result = load_table(q, q->rt_offset, q->rt_size, &q->rt, "the refcount table lies beyond the end of the file");
    if (!result)
        result = note_metadata(q);
    /* Refcounts are a sixteenth of the L2 tables' size and less. */
    if (!result)
        result = q_cache_init(&q->l2, q->l1_size, slots_for(p->cache_bytes, q->cluster_size, 4));
    if (!result)
        result = q_cache_init(&q->rb, q->rt_size, slots_for(p->cache_bytes / 4, q->cluster_size, 4));
    if (!result && !(q->unpacked = malloc(q->cluster_size)))
        result = -ENOMEM;
    return result;
}

int q_open(struct qcow2 *q, const struct q_params *p)
{
    pthread_rwlockattr_t attr;
    memset(q, 0, sizeof *q);
    q->disk.ops = &qcow2_ops;
    q->disk.size = p->size;
    q->disk.readonly = p->readonly;
    q->version = p->version;
    q->cluster_bits = p->cluster_bits;
    q->cluster_size = 1ull << p->cluster_bits;
    q->refcount_order = p->refcount_order;
    q->incompatible = p->incompatible;
    q->corrupt = p->incompatible & Q_INCOMPAT_CORRUPT;
    q->entry_words = p->incompatible & Q_INCOMPAT_EXTL2 ? 2 : 1;
    q->sub_count = q->entry_words == 2 ? 32 : 1;
    q->sub_size = q->cluster_size / q->sub_count;
    q->l2_bits = p->cluster_bits - 2 - q->entry_words;
    q->lazy = p->lazy && p->version >= 3;
    q->raw_external = p->raw_external;
    q->discard = p->discard;
    q->l1_offset = p->l1_offset;
    q->l1_size = p->l1_size;
    q->rt_offset = p->rt_offset;
    q->rt_size = p->rt_clusters * q->cluster_size / 8;
    q->l1_dirty_from = q->rt_dirty_from = UINT64_MAX;
    pthread_mutex_init(&q->flush_lock, NULL);
    pthread_mutex_init(&q->lock, NULL);
    pthread_mutex_init(&q->unpacked_lock, NULL);
    pthread_cond_init(&q->landed, NULL);
    /* A stream of reads must not starve a flush; nobody takes `io` twice. */
    pthread_rwlockattr_init(&attr);
    pthread_rwlockattr_setkind_np(&attr, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
    pthread_rwlock_init(&q->io, &attr);
    pthread_rwlockattr_destroy(&attr);
    return load(q, p);
}

/* Writing back and, for lazy refcounts, the mark that says they are right again. */
static int settle(struct qcow2 *q)
{
    int result = q_flush(q, false);
    if (!result)
        result = q_flush(q, false); /* the refcounts that the first one lowered */
    if (!result && (q->incompatible & Q_INCOMPAT_DIRTY) && !q->corrupt) {
        uint64_t bits = q->incompatible & ~Q_INCOMPAT_DIRTY;
        q->incompatible = bits; /* in memory only, so that the refcounts are written too */
        result = q_flush(q, false);
        q->incompatible |= Q_INCOMPAT_DIRTY;
        if (!result)
            result = q_set_incompatible(q, bits);
    }
    return result;
}

int q_close(struct qcow2 *q)
{
    int result = q->disk.readonly || !q->l2.slots ? 0 : settle(q);
    q_cache_free(&q->l2);
    q_cache_free(&q->rb);
    free(q->l1);
    free(q->rt);
    free(q->meta);
    free(q->freed);
    free(q->unpacked);
    q->l1 = q->rt = q->meta = NULL;
    q->freed = NULL;
    q->unpacked = NULL;
    pthread_mutex_destroy(&q->flush_lock);
    pthread_mutex_destroy(&q->lock);
    pthread_mutex_destroy(&q->unpacked_lock);
    pthread_cond_destroy(&q->landed);
    pthread_rwlock_destroy(&q->io);
    return result;
}

int q_replace_l1(struct qcow2 *q, uint64_t offset, uint64_t entries)
{
    uint64_t *l1;
    int result = load_table(q, offset, entries, &l1, "the L1 table lies beyond the end of the file");
    if (!result)
        result = q_cache_grow(&q->l2, entries);
    if (result) {
        free(l1);
        return result;
    }
    q_cache_drop(&q->l2);
    free(q->l1);
    q->l1 = l1;
    q->l1_size = entries;
    q->l1_offset = offset;
    q->l1_dirty_from = UINT64_MAX;
    q->l1_dirty_to = 0;
    return note_metadata(q);
}
