/* SPDX-License-Identifier: Apache-2.0
 *
 * The doors of disk.h, and scatter lists.
 */
#include "disk.h"

#include <errno.h>
#include <string.h>

#define COUNT(field, n) __atomic_fetch_add(&disk->stats.field, (n), __ATOMIC_RELAXED)

static bool inside(const struct disk *disk, uint64_t offset, uint64_t length)
{
    uint64_t size = __atomic_load_n(&disk->size, __ATOMIC_RELAXED);
    return offset <= size && length <= size - offset;
}

static int counted(struct disk *disk, int result)
{
    if (result)
        COUNT(errors, 1);
    return result;
}

int disk_preadv(struct disk *disk, const struct iovec *iov, int count, uint64_t offset)
{
    size_t length = sg_length(iov, count);
    if (!inside(disk, offset, length))
        return counted(disk, -EINVAL);
    COUNT(reads, 1);
    COUNT(read_bytes, length);
    return length ? counted(disk, disk->ops->preadv(disk, iov, count, offset)) : 0;
}

int disk_pwritev(struct disk *disk, const struct iovec *iov, int count, uint64_t offset)
{
    size_t length = sg_length(iov, count);
    if (disk->readonly)
        return counted(disk, -EROFS);
    if (!inside(disk, offset, length))
        return counted(disk, -EINVAL);
    COUNT(writes, 1);
    COUNT(written_bytes, length);
    return length ? counted(disk, disk->ops->pwritev(disk, iov, count, offset)) : 0;
}

int disk_flush(struct disk *disk)
{
    COUNT(flushes, 1);
    return disk->readonly ? 0 : counted(disk, disk->ops->flush(disk));
}

int disk_discard(struct disk *disk, uint64_t offset, uint64_t length)
{
    if (disk->readonly)
        return counted(disk, -EROFS);
    if (!inside(disk, offset, length))
        return counted(disk, -EINVAL);
    COUNT(discards, 1);
    return length ? counted(disk, disk->ops->discard(disk, offset, length)) : 0;
}

int disk_write_zeroes(struct disk *disk, uint64_t offset, uint64_t length, unsigned flags)
{
    if (disk->readonly)
        return counted(disk, -EROFS);
    if (!inside(disk, offset, length))
        return counted(disk, -EINVAL);
    COUNT(zeroes, 1);
    return length ? counted(disk, disk->ops->write_zeroes(disk, offset, length, flags)) : 0;
}

int disk_status(struct disk *disk, uint64_t offset, uint64_t length, struct disk_extent *extent)
{
    if (!length || !inside(disk, offset, length))
        return -EINVAL;
    return counted(disk, disk->ops->status(disk, offset, length, extent));
}

size_t sg_length(const struct iovec *iov, int count)
{
    size_t length = 0;
    for (int i = 0; i < count; i++)
        length += iov[i].iov_len;
    return length;
}

int sg_take(struct sg *sg, size_t length, struct iovec *out, int max, size_t *taken)
{
    int n = 0;
    *taken = 0;
    while (length && n < max && sg->count) {
        size_t here = sg->iov->iov_len - sg->skip;
        if (here > length)
            here = length;
        if (here) {
            out[n].iov_base = (char *)sg->iov->iov_base + sg->skip;
            out[n++].iov_len = here;
        }
        *taken += here;
        length -= here;
        sg->skip += here;
        if (sg->skip == sg->iov->iov_len) {
            sg->iov++;
            sg->count--;
            sg->skip = 0;
        }
    }
    return n;
}

void sg_zero(struct sg *sg, size_t length)
{
    struct iovec piece;
    size_t taken;
    while (length && sg_take(sg, length, &piece, 1, &taken)) {
        memset(piece.iov_base, 0, taken);
        length -= taken;
    }
}

void sg_put(struct sg *sg, const void *data, size_t length)
{
    struct iovec piece;
    size_t taken;
    while (length && sg_take(sg, length, &piece, 1, &taken)) {
        memcpy(piece.iov_base, data, taken);
        data = (const char *)data + taken;
        length -= taken;
    }
}

void sg_get(struct sg *sg, void *data, size_t length)
{
    struct iovec piece;
    size_t taken;
    while (length && sg_take(sg, length, &piece, 1, &taken)) {
        memcpy(data, piece.iov_base, taken);
        data = (char *)data + taken;
        length -= taken;
    }
}

bool buffer_is_zero(const void *buffer, size_t length)
{
    const unsigned char *p = buffer;
    /* Most data differs from zero early: look there first, then compare the buffer with itself, which memcmp does at
     * the speed of memory. */
    size_t head = length < 16 ? length : 16;
    for (size_t i = 0; i < head; i++)
        if (p[i])
            return false;
    return length <= 16 || memcmp(p, p + 16, length - 16) == 0;
}
