/* SPDX-License-Identifier: Apache-2.0
 *
 * Block requests, virtio 1.2 section 5.2.6. The header may be cut into any pieces and the status byte is the last byte of
 * the writable part (2.7.4.1: no assumption about framing).
 */
#include "serve.h"

#include <errno.h>
#include <string.h>
#include <time.h>

enum { T_IN = 0, T_OUT = 1, T_FLUSH = 4, T_GET_ID = 8, T_DISCARD = 11, T_WRITE_ZEROES = 13 };
enum { S_OK = 0, S_IOERR = 1, S_UNSUPP = 2 };
#define MAX_PIECES 1024 /* IOV_MAX of Linux */
#define MAX_RANGES 32   /* max_discard_seg, max_write_zeroes_seg */
#define MAX_SECTORS (1u << 22) /* of one such range: 2 GiB */
#define UNMAP 1u

#define ADD(counter, n) __atomic_fetch_add(&blk->counts.counter, (n), __ATOMIC_RELAXED)

struct header {
    uint32_t type, reserved;
    uint64_t sector;
};

struct range { /* 5.2.6: struct virtio_blk_discard_write_zeroes */
    uint64_t sector;
    uint32_t count, flags;
};

uint64_t serve_clock(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ull + now.tv_nsec;
}

static bool inside(const struct blk_server *blk, uint64_t sector, uint64_t bytes)
{
    uint64_t size = __atomic_load_n(&blk->disk->size, __ATOMIC_RELAXED);
    return sector <= size / 512 && bytes <= size - sector * 512;
}

static int failed(struct blk_server *blk, int result)
{
    __atomic_store_n(&blk->last_error, -result, __ATOMIC_RELAXED);
    return S_IOERR;
}

static int write_through(struct blk_server *blk)
{
    if (__atomic_load_n(&blk->writeback, __ATOMIC_RELAXED))
        return S_OK;
    int result = disk_flush(blk->disk);
    return result ? failed(blk, result) : S_OK;
}

static int transfer(struct vq *q, struct blk_server *blk, struct vq_chain *chain, const struct header *header, uint64_t size)
{
    struct iovec iov[MAX_PIECES];
    bool in = header->type == T_IN;
    if (size % 512 || !inside(blk, header->sector, size) || (!in && blk->readonly))
        return S_IOERR;
    int count = in ? vq_slice(chain->iov + chain->reads, chain->writes, 0, size, iov, MAX_PIECES)
                   : vq_slice(chain->iov, chain->reads, sizeof(*header), size, iov, MAX_PIECES);
    if (count < 0)
        return S_IOERR;
    int result = in ? disk_preadv(blk->disk, iov, count, header->sector * 512)
                    : disk_pwritev(blk->disk, iov, count, header->sector * 512);
    if (in)
        vq_written(q, chain, 0, size); /* a failed read may have written a part of it */
    if (result) {
        chain->written = 0; /* ... but promises nothing */
        return failed(blk, result);
    }
    if (in) {
        ADD(reads, 1);
        ADD(read_bytes, size);
        return S_OK;
    }
    ADD(writes, 1);
    ADD(written_bytes, size);
    return write_through(blk);
}

/* All ranges are checked before the first is touched. */
static int ranges(struct blk_server *blk, const struct vq_chain *chain, bool zeroes)
{
    struct range list[MAX_RANGES];
    uint64_t size = chain->read_size - sizeof(struct header), n = size / sizeof(struct range);
    if (!(zeroes ? blk->write_zeroes : blk->discard))
        return S_UNSUPP;
    if (!n || size % sizeof(struct range) || n > MAX_RANGES || blk->readonly)
        return S_IOERR;
    vq_read(chain, sizeof(struct header), list, size);
    for (uint64_t i = 0; i < n; i++) {
        if (list[i].flags & ~(zeroes ? UNMAP : 0))
            return S_UNSUPP;
        if (list[i].count > MAX_SECTORS || !inside(blk, list[i].sector, list[i].count * 512ull))
            return S_IOERR;
    }
    for (uint64_t i = 0; i < n; i++) {
        uint64_t at = list[i].sector * 512, length = list[i].count * 512ull;
        int result = zeroes ? disk_write_zeroes(blk->disk, at, length, list[i].flags & UNMAP ? DISK_UNMAP : 0)
                            : disk_discard(blk->disk, at, length);
        if (result)
            return failed(blk, result);
    }
    if (zeroes)
        ADD(zeroes, 1);
    else
        ADD(discards, 1);
    return write_through(blk);
}

static int request(struct vq *q, struct blk_server *blk, struct vq_chain *chain, const struct header *header)
{
    uint64_t room = chain->write_size - 1;
    int result;
    switch (header->type) {
    case T_IN:
        return transfer(q, blk, chain, header, room);
    case T_OUT:
        return transfer(q, blk, chain, header, chain->read_size - sizeof(*header));
    case T_FLUSH:
        if (!blk->flush)
            return S_UNSUPP;
        ADD(flushes, 1);
        result = disk_flush(blk->disk);
        return result ? failed(blk, result) : S_OK;
    case T_GET_ID:
        vq_write(q, chain, 0, blk->serial, room < sizeof(blk->serial) ? room : sizeof(blk->serial));
        return S_OK;
    case T_DISCARD:
    case T_WRITE_ZEROES:
        return ranges(blk, chain, header->type == T_WRITE_ZEROES);
    default:
        return S_UNSUPP;
    }
}

/* What counts against a limit of bytes. */
static uint64_t payload(const struct vq_chain *chain, const struct header *header)
{
    return header->type == T_IN ? chain->write_size - 1 : header->type == T_OUT ? chain->read_size - sizeof(*header) : 0;
}

enum serve_result blk_serve(struct vq *q, struct blk_server *blk)
{
    struct vq_chain *chain = &q->scratch;
    uint64_t end = serve_clock() + SERVE_NANOSECONDS;
    for (int n = 0; n < SERVE_REQUESTS && !vq_journal_full(q); n++) {
        struct header header;
        int got = vq_pop(q, chain);
        if (got <= 0)
            return got ? SERVE_FAULT : SERVE_IDLE;
        if (chain->read_size < sizeof(header) || !chain->write_size) {
            vq_fault(q, "a block request without room for header or status", chain->read_size);
            return SERVE_FAULT;
        }
        vq_read(chain, 0, &header, sizeof(header));
        q->wait = blk->limit ? limit_take(blk->limit, payload(chain, &header)) : 0;
        if (q->wait) {
            vq_unpop(q, chain->head);
            return SERVE_LIMITED;
        }
        uint8_t status = request(q, blk, chain, &header);
        if (status == S_IOERR)
            ADD(errors, 1);
        if (status == S_UNSUPP)
            ADD(unsupported, 1);
        vq_write(q, chain, chain->write_size - 1, &status, 1);
        vq_push(q, chain->head, chain->written);
        if (serve_clock() > end)
            break;
    }
    return SERVE_MORE;
}
