/* SPDX-License-Identifier: Apache-2.0
 *
 * A driver that does anything: random rings, split and packed, in random guest memory, under the C code of the queues and
 * of the block, network and entropy devices. Guest memory is two allocations of their own and a read-only one, so that
 * AddressSanitizer sees every byte beside them.
 *
 * The input: what to build (16 bytes), the first bytes of guest memory, then steps. Each step changes some bytes of guest
 * memory, as the driver may at any time, and calls something.
 */
#include "virtio/serve.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { LOW_SIZE = 0x4000, ROM_AT = 0x8000, ROM_SIZE = 0x1000, HIGH_SIZE = 0x2000, DISK_SIZE = 1 << 16 };
#define HIGH_AT 0x100000000ull

static unsigned char *low, *rom, *high;
static unsigned char rom_copy[ROM_SIZE];
static struct vq_region regions[3];
static const struct vq_memory memory = {3, regions};

#define MUST(what) do { if (!(what)) { fprintf(stderr, "broken: %s\n", #what); abort(); } } while (0)

struct input {
    const uint8_t *at;
    size_t left;
};

static uint8_t byte(struct input *in)
{
    if (!in->left)
        return 0;
    in->left--;
    return *in->at++;
}

static uint16_t word(struct input *in)
{
    uint16_t a = byte(in);
    return a | byte(in) << 8;
}

/* An address: mostly in memory, at its ends, or nowhere. */
static uint64_t address(struct input *in)
{
    uint16_t value = word(in);
    switch (value >> 13) {
    case 0: return HIGH_AT + (value & 0x1fff);
    case 1: return ROM_AT + (value & 0xfff);
    case 2: return LOW_SIZE - 32 + (value & 63);
    case 3: return ~0ull - (value & 63);
    default: return (value & 0x3fff) & ~15ull;
    }
}

/* ---- a disk in memory, some of whose blocks fail */

struct memory_disk {
    struct disk disk;
    unsigned char data[DISK_SIZE];
};

static int move(struct disk *disk, const struct iovec *iov, int count, uint64_t offset, bool out)
{
    struct memory_disk *d = (struct memory_disk *)disk;
    for (int i = 0; i < count; i++) {
        MUST(offset <= DISK_SIZE && iov[i].iov_len <= DISK_SIZE - offset);
        if (offset >> 12 == 13)
            return -EIO;
        if (out)
            memcpy(d->data + offset, iov[i].iov_base, iov[i].iov_len);
        else
            memcpy(iov[i].iov_base, d->data + offset, iov[i].iov_len);
        offset += iov[i].iov_len;
    }
    return 0;
}

static int preadv_(struct disk *d, const struct iovec *iov, int n, uint64_t at) { return move(d, iov, n, at, false); }
static int pwritev_(struct disk *d, const struct iovec *iov, int n, uint64_t at) { return move(d, iov, n, at, true); }
static int flush_(struct disk *d) { return 0; }

static int discard_(struct disk *d, uint64_t at, uint64_t size)
{
    MUST(at <= DISK_SIZE && size <= DISK_SIZE - at);
    return 0;
}

static int zeroes_(struct disk *d, uint64_t at, uint64_t size, unsigned flags)
{
    MUST(at <= DISK_SIZE && size <= DISK_SIZE - at);
    memset(((struct memory_disk *)d)->data + at, 0, size);
    return 0;
}

static int status_(struct disk *d, uint64_t at, uint64_t size, struct disk_extent *extent)
{
    *extent = (struct disk_extent){size, at, DISK_DATA};
    return 0;
}

static const struct disk_ops memory_ops = {preadv_, pwritev_, flush_, discard_, zeroes_, status_};
static struct memory_disk disk;

/* ---- checks */

static bool in_memory(const void *p, size_t size, bool write)
{
    for (int i = 0; i < 3; i++) {
        const unsigned char *at = p;
        if (at >= regions[i].hva && at < regions[i].hva + regions[i].size)
            return size <= (size_t)(regions[i].hva + regions[i].size - at) && !(write && regions[i].readonly);
    }
    return false;
}

static void check_chain(const struct vq *q, const struct vq_chain *chain)
{
    uint64_t reads = 0, writes = 0;
    MUST(chain->reads + chain->writes <= chain->room && chain->reads + chain->writes > 0);
    for (uint32_t i = 0; i < chain->reads + chain->writes; i++) {
        MUST(chain->iov[i].iov_len && in_memory(chain->iov[i].iov_base, chain->iov[i].iov_len, i >= chain->reads));
        *(i < chain->reads ? &reads : &writes) += chain->iov[i].iov_len;
    }
    MUST(reads == chain->read_size && writes == chain->write_size);
}

static bool restored; /* a saved state may say anything about places */

static void check_queue(const struct vq *q)
{
    MUST(q->in_flight_count <= q->size && q->journal_count <= VQ_JOURNAL);
    if (q->packed)
        MUST(q->slots <= q->size && q->ahead <= q->size && (!q->size || (q->take.index < q->size && q->give.index < q->size)));
    else if (!restored)
        MUST((uint16_t)(q->next_avail - q->next_used) == q->in_flight_count);
}

/* ---- */

static void by_hand(struct vq *q, struct input *in, uint16_t heads[64], unsigned *flying)
{
    struct vq_chain *chain = &q->scratch;
    int got = vq_pop(q, chain);
    MUST(got >= -1 && got <= 1 && (got < 0) == (q->fault != NULL));
    if (got != 1)
        return;
    check_chain(q, chain);
    unsigned char data[300];
    memset(data, 0x5a, sizeof(data));
    vq_read(chain, word(in), data, sizeof(data));
    vq_write(q, chain, word(in) & 0x3ff, data, byte(in));
    MUST(chain->written <= chain->write_size);
    uint8_t what = byte(in);
    if (what < 40) {
        vq_unpop(q, chain->head);
    } else if (what < 100 && *flying < 64) {
        heads[(*flying)++] = chain->head; /* given back later, in another order */
    } else {
        MUST(vq_push(q, chain->head, chain->written));
    }
    if (*flying && what & 1) {
        unsigned pick = byte(in) % *flying;
        vq_push(q, heads[pick], byte(in));
        heads[pick] = heads[--*flying];
    }
    vq_push(q, word(in), 4); /* a head that is not in flight is refused */
}

static void steps(struct vq *q, struct input *in, int kind)
{
    static struct net_server net;
    struct blk_server blk = {.disk = &disk.disk, .serial = "serial"};
    struct rate_limit limit;
    uint16_t heads[64];
    unsigned flying = 0;
    uint64_t bytes = 0;
    int pair[2] = {-1, -1};
    uint8_t how = byte(in);
    limit_init(&limit);
    if (how & 1)
        limit_set(&limit, 1u << (how >> 3), 0, how & 2 ? 1000 : 0, how & 4 ? 3 : 0);
    blk.limit = how & 1 ? &limit : NULL;
    blk.flush = how & 2, blk.discard = blk.write_zeroes = how & 4, blk.writeback = how & 8, blk.readonly = how & 16;
    if (kind == 2) {
        if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, pair))
            exit(2);
        memset(&net, 0, offsetof(struct net_server, frame));
        net.fd = pair[0];
        net.vnet_header = how & 2, net.mergeable = how & 4, net.csum = how & 8, net.tso4 = net.tso6 = how & 16;
        net.ecn = how & 32, net.ufo = how & 64;
        net.transmit_limit = net.receive_limit = how & 1 ? &limit : NULL;
    }
    for (int n = 0; n < 40 && in->left; n++) {
        for (uint8_t changes = byte(in) & 7; changes; changes--) {
            uint16_t at = word(in);
            uint8_t value = byte(in);
            if (at & 0x8000)
                high[at % HIGH_SIZE] = value;
            else
                low[at % LOW_SIZE] = value;
        }
        switch (kind) {
        case 1:
            blk_serve(q, &blk);
            break;
        case 2:
            if (byte(in) & 1) {
                unsigned char frame[2000];
                unsigned size = word(in) % sizeof(frame);
                memset(frame, byte(in), size);
                if (send(pair[1], frame, size, MSG_DONTWAIT) < 0 && errno != EAGAIN)
                    exit(2);
                net_receive(q, &net);
            } else {
                net_transmit(q, &net);
                unsigned char drain[70000];
                while (recv(pair[1], drain, sizeof(drain), MSG_DONTWAIT) > 0)
                    continue;
            }
            break;
        case 3:
            rng_serve(q, &bytes);
            break;
        default:
            by_hand(q, in, heads, &flying);
        }
        check_queue(q);
        for (uint32_t i = 0; i < q->journal_count; i++)
            MUST(q->journal_count == VQ_JOURNAL || vq_host(&memory, q->journal[i].gpa, 1, true));
        q->journal_count = 0;
        uint8_t after = byte(in);
        if (after & 1)
            vq_publish(q);
        if (after & 2)
            vq_wants_interrupt(q);
        if (after & 4)
            vq_no_kicks(q);
        if (after & 8)
            vq_want_kicks(q);
        if (after == 0xff)
            vq_remap(q, &memory);
        check_queue(q);
    }
    if (pair[0] >= 0) {
        close(pair[0]);
        close(pair[1]);
    }
    pthread_mutex_destroy(&limit.lock);
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    low = malloc(LOW_SIZE), rom = malloc(ROM_SIZE), high = malloc(HIGH_SIZE);
    regions[0] = (struct vq_region){0, LOW_SIZE, low, false};
    regions[1] = (struct vq_region){ROM_AT, ROM_SIZE, rom, true};
    regions[2] = (struct vq_region){HIGH_AT, HIGH_SIZE, high, false};
    disk.disk.ops = &memory_ops;
    disk.disk.size = DISK_SIZE;
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, size};
    struct vq q;
    uint8_t kind = byte(&in), flags = byte(&in);
    uint32_t entries = flags & 0x80 ? word(&in) : flags & 0x40 ? 8 : 1u << (flags >> 3 & 7);
    uint64_t desc = flags & 0x20 ? address(&in) : 0, avail = flags & 0x20 ? address(&in) : 0x800;
    uint64_t used = flags & 0x20 ? address(&in) : 0xc00;
    uint16_t next_avail = word(&in), next_used = word(&in);
    memset(low, 0, LOW_SIZE);
    memset(high, 0, HIGH_SIZE);
    memset(rom, 0x77, ROM_SIZE);
    memcpy(rom_copy, rom, ROM_SIZE);
    vq_init(&q);
    if (!vq_configure(&q, &memory, entries, desc, avail, used, flags & 7)) {
        restored = kind & 0x80 && !vq_restore(&q, next_avail, next_used);
        check_queue(&q);
        size_t first = in.left < 0x1000 ? in.left / 2 : 0x800;
        memcpy(low, in.at, first);
        in.at += first;
        in.left -= first;
        steps(&q, &in, kind & 3);
    } else {
        MUST(q.size == 0);
        MUST(vq_pop(&q, &q.scratch) <= 0 && !vq_want_kicks(&q) && !vq_wants_interrupt(&q));
    }
    MUST(!memcmp(rom, rom_copy, ROM_SIZE));
    vq_free(&q);
    return 0;
}
