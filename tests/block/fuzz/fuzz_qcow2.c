/* SPDX-License-Identifier: Apache-2.0
 *
 * A qcow2 file of any content under the C code: mapping, reads, writes, discards, refcounts, snapshots' tables, checks.
 *
 * The input: 32 bytes of parameters as a header would give them (brought into the limits that qcow2/header.py enforces),
 * 64 bytes of requests, then the file.
 */
#define _GNU_SOURCE
#include "block/qcow2.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { MOST_DISK = 1 << 24 };

#define MUST(what) do { if (!(what)) { fprintf(stderr, "broken: %s\n", #what); abort(); } } while (0)

static int file = -1;

static int unpack(void *context, const void *in, size_t in_size, void *out, size_t out_size)
{
    memset(out, in_size ? *(const unsigned char *)in : 0, out_size); /* every byte of both must be there */
    unsigned char sum = 0;
    for (size_t i = 0; i < in_size; i++)
        sum ^= ((const unsigned char *)in)[i];
    return sum == 0xff ? -1 : 0;
}

static void report(void *context, int kind, uint64_t offset, uint64_t value)
{
    MUST(kind >= Q_BAD_L1 && kind <= Q_TOO_LOW);
    ++*(unsigned *)context;
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    file = memfd_create("qcow2", MFD_CLOEXEC);
    return file < 0;
}

static void requests(struct qcow2 *q, const uint8_t *words, uint64_t size)
{
    static unsigned char buffer[1 << 17];
    for (int n = 0; n < 16; n++, words += 4) {
        uint64_t offset = (words[1] | words[2] << 8) * 512ull * (1 + words[0] / 8) % (size ? size : 1);
        uint64_t length = 1 + words[3] * 300ull;
        length = length > size - offset ? size - offset : length;
        struct disk_extent extent;
        if (!length)
            continue;
        switch (words[0] & 7) {
        case 0: case 1:
            disk_pread(&q->disk, buffer, length, offset);
            break;
        case 2: case 3:
            disk_pwrite(&q->disk, buffer, length, offset);
            break;
        case 4:
            disk_discard(&q->disk, offset, length);
            break;
        case 5:
            disk_write_zeroes(&q->disk, offset, length, words[3] & 1);
            break;
        case 6:
            disk_flush(&q->disk);
            break;
        default:
            for (int i = 0; i < 50 && offset < size; i++) {
                if (disk_status(&q->disk, offset, size - offset, &extent))
                    break;
                MUST(extent.length && extent.length <= size - offset);
                offset += extent.length;
            }
        }
    }
}

/* What check, snapshots and repair do, on a flushed image. */
static void walks(struct qcow2 *q, uint8_t how)
{
    uint64_t statistics[4] = {0}, clusters = q->file_clusters < 4096 ? q->file_clusters : 4096;
    uint32_t *counts = calloc(clusters + 1, sizeof(*counts));
    unsigned reports = 0;
    if (q_flush(q, true) || !counts) {
        free(counts);
        return;
    }
    q_walk_count(q, q->l1, q->l1_size, true, how & 1 && !q->disk.readonly, counts, clusters, statistics, report, &reports);
    q_walk_compare(q, counts, clusters, how & 2 && !q->disk.readonly, how & 4 && !q->disk.readonly, report, &reports);
    if (how & 8 && !q->disk.readonly && !q_walk_refcounts(q, q->l1, q->l1_size, 1)) {
        q_walk_flags(q, NULL, 0);
        q_walk_refcounts(q, q->l1, q->l1_size, -1);
    }
    free(counts);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 96 + 512)
        return 0;
    const uint8_t *p = data;
    struct qcow2 q;
    struct q_params params = {.fd = file, .data_fd = -1, .no_sync = true, .cache_bytes = 1 << 16};
    memset(&q, 0, sizeof(q));
    params.version = 2 + (p[0] & 1);
    params.cluster_bits = 9 + p[1] % 4;
    params.refcount_order = params.version == 2 ? 4 : p[2] % 7;
    params.lazy = p[3] & 1;
    params.readonly = p[3] & 2;
    params.discard = p[3] & 4;
    params.incompatible = (p[3] & 8 ? 1 : 0);
    if (p[3] & 16 && params.version == 3) {
        params.incompatible |= 1 << 4; /* extended L2: clusters of 16 KiB and more */
        params.cluster_bits = 14;
    }
    uint64_t cluster = 1ull << params.cluster_bits;
    params.size = ((p[4] | p[5] << 8 | p[6] << 16) & (MOST_DISK - 1)) + (p[7] & 1 ? 0 : 1);
    unsigned entry = params.incompatible & 16 ? 16 : 8;
    uint64_t covered = cluster * (cluster / entry), needed = (params.size + covered - 1) / covered;
    params.l1_offset = (1 + p[8] % 32) * cluster;
    params.l1_size = needed + p[9] % 4;
    params.rt_offset = (1 + p[10] % 32) * cluster;
    params.rt_clusters = 1 + p[11] % 2;
    if (ftruncate(file, 0) || pwrite(file, data + 96, size - 96, 0) != (ssize_t)(size - 96))
        exit(2);
    int result = q_open(&q, &params);
    q.decompress = unpack;
    if (result) {
        q.disk.readonly = true;
    } else {
        requests(&q, data + 32, params.size);
        pthread_mutex_lock(&q.flush_lock);
        pthread_rwlock_wrlock(&q.io);
        walks(&q, p[12]);
        pthread_rwlock_unlock(&q.io);
        pthread_mutex_unlock(&q.flush_lock);
        requests(&q, data + 32, params.size);
    }
    q_close(&q);
    return 0;
}
