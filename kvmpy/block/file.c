/* SPDX-License-Identifier: Apache-2.0
 *
 * Host files: complete transfers, holes, syncs that do not lie.
 */
#define _GNU_SOURCE
#include "disk.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <string.h>
#include <unistd.h>

#define PIECES 64

static int transfer(struct host_file *file, struct sg *sg, size_t length, uint64_t offset, bool write)
{
    struct iovec iov[PIECES];
    if (offset > INT64_MAX || length > INT64_MAX - offset)
        return -EFBIG;
    while (length) {
        size_t taken;
        int count = sg_take(sg, length, iov, PIECES, &taken);
        struct iovec *next = iov;
        length -= taken;
        while (taken) {
            ssize_t n = write ? pwritev(file->fd, next, count, offset) : preadv(file->fd, next, count, offset);
            if (n < 0) {
                if (errno == EINTR)
                    continue;
                return -errno;
            }
            if (n == 0) {
                if (write)
                    return -EIO; /* a write that makes no progress and names no reason */
                for (int i = 0; i < count; i++)
                    memset(next[i].iov_base, 0, next[i].iov_len);
                n = taken;
            }
            offset += n;
            taken -= n;
            while (count && (size_t)n >= next->iov_len) {
                n -= next->iov_len;
                next++;
                count--;
            }
            if (count) {
                next->iov_base = (char *)next->iov_base + n;
                next->iov_len -= n;
            }
        }
    }
    return 0;
}

int file_preadv(struct host_file *file, struct sg *sg, size_t length, uint64_t offset)
{
    return transfer(file, sg, length, offset, false);
}

int file_pwritev(struct host_file *file, struct sg *sg, size_t length, uint64_t offset)
{
    return transfer(file, sg, length, offset, true);
}

int file_pread(struct host_file *file, void *buffer, size_t length, uint64_t offset)
{
    struct iovec iov = {buffer, length};
    struct sg sg = {&iov, 1, 0};
    return transfer(file, &sg, length, offset, false);
}

int file_pread_exact(struct host_file *file, void *buffer, size_t length, uint64_t offset)
{
    if (offset > INT64_MAX || length > INT64_MAX - offset)
        return -ENODATA;
    while (length) {
        ssize_t n = pread(file->fd, buffer, length, offset);
        if (n < 0 && errno != EINTR)
            return -errno;
        if (n == 0)
            return -ENODATA;
        if (n > 0) {
            buffer = (char *)buffer + n;
            length -= n;
            offset += n;
        }
    }
    return 0;
}

int file_pwrite(struct host_file *file, const void *buffer, size_t length, uint64_t offset)
{
    struct iovec iov = {(void *)buffer, length};
    struct sg sg = {&iov, 1, 0};
    return transfer(file, &sg, length, offset, true);
}

int file_sync(struct host_file *file)
{
    if (file->no_sync)
        return 0;
    int failed = __atomic_load_n(&file->sync_error, __ATOMIC_RELAXED);
    if (failed)
        return failed;
    while (fdatasync(file->fd)) {
        if (errno == EINTR)
            continue;
        failed = -errno;
        __atomic_store_n(&file->sync_error, failed, __ATOMIC_RELAXED);
        return failed;
    }
    return 0;
}

static int allocate(struct host_file *file, int mode, uint64_t offset, uint64_t length)
{
    if (offset > INT64_MAX || length > INT64_MAX - offset)
        return -EFBIG;
    while (fallocate(file->fd, mode, offset, length))
        if (errno != EINTR)
            return -errno;
    return 0;
}

static bool unsupported(int result)
{
    return result == -EOPNOTSUPP || result == -ENOSYS || result == -EINVAL || result == -ENODEV || result == -EPERM;
}

int file_punch(struct host_file *file, uint64_t offset, uint64_t length)
{
    int result = length ? allocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length) : 0;
    return unsupported(result) ? 0 : result;
}

int file_zero(struct host_file *file, uint64_t offset, uint64_t length, bool unmap)
{
    static const char zeroes[64 << 10];
    int result = -EOPNOTSUPP;
    if (unmap && !file->block_device) /* a hole in a file reads as zero; a discarded device need not */
        result = allocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length);
    if (unsupported(result))
        result = allocate(file, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, offset, length);
    if (!unsupported(result))
        return result;
    while (length) {
        size_t n = length < sizeof zeroes ? length : sizeof zeroes;
        result = file_pwrite(file, zeroes, n, offset);
        if (result)
            return result;
        offset += n;
        length -= n;
    }
    return 0;
}

int file_reserve(struct host_file *file, uint64_t offset, uint64_t length)
{
    int result = file->block_device ? 0 : allocate(file, 0, offset, length);
    return unsupported(result) ? 0 : result;
}

int64_t file_size(struct host_file *file)
{
    int64_t size = lseek(file->fd, 0, SEEK_END);
    return size < 0 ? -errno : size;
}
