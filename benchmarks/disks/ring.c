/* SPDX-License-Identifier: Apache-2.0
 *
 * The rings alone: a driver's side in C beside our device's side, in one thread, without a guest. A request has a buffer to
 * read and a buffer to write; 16 of them are on their way. Prints nanoseconds per request, the driver's part included, for
 * split and packed rings, direct and indirect:
 *
 *     bench: split 61.2
 */
#include "virtio/queue.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { SIZE = 256, BATCH = 16, ROUNDS = 200000, RAM = 1 << 20, AVAIL = 0x8000, USED = 0x10000, TABLES = 0x20000, DATA = 0x40000 };

struct desc {
    uint64_t addr;
    uint32_t len;
    uint16_t a, b;
};

static unsigned char *ram;

static void put(struct desc *at, uint64_t addr, uint32_t len, uint16_t a, uint16_t b)
{
    at->addr = addr;
    at->len = len;
    at->a = a;
    __atomic_store_n(&at->b, b, __ATOMIC_RELEASE);
}

static double now(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec * 1e9 + ts.tv_nsec;
}

static void check(bool good, const char *what)
{
    if (!good) {
        printf("bench: failed %s\n", what);
        exit(1);
    }
}

static double run(unsigned flags)
{
    struct vq_region region = {0, RAM, ram, false};
    struct vq_memory memory = {1, &region};
    struct vq q;
    bool packed = flags & VQ_PACKED, indirect = flags & VQ_INDIRECT, wrap = true, used_wrap = true;
    struct desc *ring = (struct desc *)ram, *tables = (struct desc *)(ram + TABLES);
    uint16_t *avail = (uint16_t *)(ram + AVAIL), *used = (uint16_t *)(ram + USED);
    uint16_t next = 0, done = 0;
    memset(ram, 0, DATA);
    vq_init(&q);
    check(!vq_configure(&q, &memory, SIZE, 0, AVAIL, USED, flags), "configure");
    double start = now();
    for (unsigned round = 0; round < ROUNDS / BATCH; round++) {
        for (unsigned n = 0; n < BATCH; n++) {
            unsigned each = indirect ? 1 : 2;
            uint64_t from = DATA + 4096 * n, to = from + 2048;
            if (!packed) {
                unsigned slot = (next & 127) * 2;
                struct desc *d = indirect ? &tables[slot] : &ring[slot];
                put(d, from, 16, VQ_DESC_NEXT, indirect ? 1 : slot + 1);
                put(d + 1, to, 512, VQ_DESC_WRITE, 0);
                if (indirect)
                    put(&ring[slot], TABLES + 16 * slot, 32, VQ_DESC_INDIRECT, 0);
                avail[2 + (next & (SIZE - 1))] = slot;
                __atomic_store_n(&avail[1], ++next, __ATOMIC_RELEASE);
                continue;
            }
            uint16_t flag = wrap ? 0x80 : 0x8000, later;
            unsigned first = next;
            if (indirect) {
                put(&tables[2 * n], from, 16, 0, 0);
                put(&tables[2 * n + 1], to, 512, 0, VQ_DESC_WRITE);
                put(&ring[first], TABLES + 32 * n, 32, n, VQ_DESC_INDIRECT | flag);
            } else { /* SIZE is even: a request does not wrap */
                later = flag | VQ_DESC_WRITE;
                put(&ring[first + 1], to, 512, n, later);
                put(&ring[first], from, 16, n, VQ_DESC_NEXT | flag);
            }
            next += each;
            if (next == SIZE)
                next = 0, wrap = !wrap;
        }
        vq_no_kicks(&q);
        unsigned char head[16];
        while (vq_pop(&q, &q.scratch) == 1) {
            vq_read(&q.scratch, 0, head, sizeof(head));
            vq_write(&q, &q.scratch, 0, head, sizeof(head));
            vq_push(&q, q.scratch.head, q.scratch.written);
        }
        q.journal_count = 0;
        vq_publish(&q);
        vq_wants_interrupt(&q);
        check(!vq_want_kicks(&q) && !q.fault, "no fault");
        q.journal_count = 0;
        if (!packed) {
            done += BATCH;
            check(__atomic_load_n(&used[1], __ATOMIC_ACQUIRE) == done, "used.idx");
        } else {
            for (unsigned n = 0; n < BATCH; n++) {
                uint16_t flag = __atomic_load_n(&ring[done].b, __ATOMIC_ACQUIRE);
                check(!!(flag & 0x80) == used_wrap && !!(flag & 0x8000) == used_wrap && ring[done].a == n, "used");
                done += indirect ? 1 : 2;
                if (done == SIZE)
                    done = 0, used_wrap = !used_wrap;
            }
        }
    }
    double took = now() - start;
    vq_free(&q);
    return took / ROUNDS;
}

int main(void)
{
    static const struct { const char *name; unsigned flags; } kinds[] = {
        {"split", VQ_EVENT_IDX}, {"split-indirect", VQ_EVENT_IDX | VQ_INDIRECT},
        {"packed", VQ_EVENT_IDX | VQ_PACKED}, {"packed-indirect", VQ_EVENT_IDX | VQ_PACKED | VQ_INDIRECT},
    };
    ram = aligned_alloc(4096, RAM);
    for (unsigned i = 0; i < sizeof(kinds) / sizeof(*kinds); i++) {
        double best = 1e9;
        for (int n = 0; n < 7; n++) {
            double ns = run(kinds[i].flags);
            best = ns < best ? ns : best;
        }
        printf("bench: %s %.1f\n", kinds[i].name, best);
    }
    return 0;
}
