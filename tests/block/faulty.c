/* SPDX-License-Identifier: Apache-2.0
 *
 * A library to preload: transfers of files called *.faulty are cut short and interrupted, or fail with EIO, now and then.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

enum { SOUND, INTERRUPTED, BROKEN };
static int mode;
static uint32_t every = 5, state = 1;
static long faults;

/* From now on one transfer in `one_in` is what `how` says; returns how many were so far. */
long faulty(int how, unsigned one_in, unsigned seed)
{
    mode = how;
    every = one_in;
    state = seed * 2654435761u | 1;
    return faults;
}

static int now(int fd)
{
    char link[40], name[PATH_MAX];
    if (!mode)
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, name, sizeof name);
    if (n < 7 || memcmp(name + n - 7, ".faulty", 7))
        return 0;
    state ^= state << 13;
    state ^= state >> 17;
    state ^= state << 5;
    if (state % every)
        return 0;
    faults++;
    return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FAIL() do { errno = mode == BROKEN ? EIO : EINTR; return -1; } while (0)

#define PLAIN(name, type)                                                    \
    ssize_t name(int fd, type buffer, size_t size, off_t offset)             \
    {                                                                        \
        if (now(fd)) {                                                       \
            if (mode == BROKEN || size < 2 || state & 64)                    \
                FAIL();                                                      \
            size = 1 + state / 128 % (size - 1);                             \
        }                                                                    \
        return REAL(name)(fd, buffer, size, offset);                         \
    }
PLAIN(pread, void *)
PLAIN(pread64, void *)
PLAIN(pwrite, const void *)
PLAIN(pwrite64, const void *)

#define VECTOR(name)                                                         \
    ssize_t name(int fd, const struct iovec *iov, int count, off_t offset)   \
    {                                                                        \
        if (now(fd)) {                                                       \
            if (mode == BROKEN || iov->iov_len < 2 || state & 64)            \
                FAIL();                                                      \
            struct iovec first = {iov->iov_base, 1 + state / 128 % (iov->iov_len - 1)}; \
            return REAL(name)(fd, &first, 1, offset);                        \
        }                                                                    \
        return REAL(name)(fd, iov, count, offset);                           \
    }
VECTOR(preadv)
VECTOR(preadv64)
VECTOR(pwritev)
VECTOR(pwritev64)

int fallocate(int fd, int how, off_t offset, off_t size)
{
    if (now(fd))
        FAIL();
    return REAL(fallocate)(fd, how, offset, size);
}

int fdatasync(int fd)
{
    if (mode == INTERRUPTED && now(fd))
        FAIL();
    return REAL(fdatasync)(fd);
}
