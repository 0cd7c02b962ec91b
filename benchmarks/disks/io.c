/* SPDX-License-Identifier: Apache-2.0
 *
 * Reads and writes a block device for a while in each of several ways, past the page cache, and says how often:
 *
 *     io DEVICE SECONDS        ->  bench: begin, then for each way bench: NAME OPERATIONS SECONDS
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/fs.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MIB (1u << 20)
#define DEEPEST 32

static struct { const char *name; int write; unsigned size, depth; int random; } ways[] = {
    {"seq-read", 0, MIB, 1, 0},        {"seq-write", 1, MIB, 1, 0},
    {"rand-read-1", 0, 4096, 1, 1},    {"rand-write-1", 1, 4096, 1, 1},
    {"rand-read-32", 0, 4096, 32, 1},  {"rand-write-32", 1, 4096, 32, 1},
};

static double now(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec + ts.tv_nsec / 1e9;
}

static void die(const char *what)
{
    printf("bench: failed %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t state = 88172645463325252ull;

static uint64_t place(uint64_t blocks, uint64_t *next, int random)
{
    if (!random)
        return (*next)++ % blocks;
    state ^= state << 13, state ^= state >> 7, state ^= state << 17; /* xorshift: the same places on each side */
    return state % blocks;
}

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    int fd = open(argv[1], O_RDWR | O_DIRECT);
    uint64_t bytes, next = 0;
    double seconds = atof(argv[2]);
    aio_context_t context = 0;
    char *room;
    if (fd < 0 || ioctl(fd, BLKGETSIZE64, &bytes) || syscall(SYS_io_setup, DEEPEST, &context))
        die("open");
    if (posix_memalign((void **)&room, 4096, DEEPEST * 4096 > MIB ? DEEPEST * 4096 : MIB))
        die("memory");
    for (size_t i = 0; i < MIB; i++)
        room[i] = i * 2654435761u >> 13;
    puts("bench: begin");
    fflush(stdout);
    for (unsigned w = 0; w < sizeof(ways) / sizeof(*ways); w++) {
        unsigned size = ways[w].size, depth = ways[w].depth;
        uint64_t done = 0, blocks = bytes / size;
        double start = now(), end = start + seconds, at = start;
        if (depth == 1) {
            for (; at < end; at = now(), done++) {
                off_t offset = place(blocks, &next, ways[w].random) * size;
                ssize_t moved = ways[w].write ? pwrite(fd, room, size, offset) : pread(fd, room, size, offset);
                if (moved != size)
                    die(ways[w].name);
            }
        } else {
            struct iocb cbs[DEEPEST], *list[DEEPEST];
            struct io_event events[DEEPEST];
            unsigned ready = depth, flying = 0;
            for (unsigned i = 0; i < depth; i++)
                list[i] = &cbs[i];
            while (ready || flying) {
                at = now();
                for (unsigned i = 0; i < ready; i++) {
                    unsigned slot = list[i] - cbs;
                    memset(list[i], 0, sizeof(*list[i]));
                    list[i]->aio_lio_opcode = ways[w].write ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD;
                    list[i]->aio_fildes = fd;
                    list[i]->aio_buf = (uint64_t)(uintptr_t)(room + slot * 4096);
                    list[i]->aio_nbytes = size;
                    list[i]->aio_offset = place(blocks, &next, 1) * size;
                }
                if (ready && syscall(SYS_io_submit, context, ready, list) != ready)
                    die("io_submit");
                flying += ready;
                long got = syscall(SYS_io_getevents, context, 1, depth, events, NULL);
                if (got < 1)
                    die("io_getevents");
                flying -= got;
                ready = 0;
                for (long i = 0; i < got; i++) {
                    if (events[i].res != (int64_t)size)
                        die(ways[w].name);
                    done++;
                    if (at < end)
                        list[ready++] = (struct iocb *)(uintptr_t)events[i].obj;
                }
            }
            at = now();
        }
        if (ways[w].write && fsync(fd))
            die("fsync");
        printf("bench: %s %llu %.4f\n", ways[w].name, (unsigned long long)done, at - start);
        fflush(stdout);
    }
    return 0;
}
