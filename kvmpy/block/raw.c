/* SPDX-License-Identifier: Apache-2.0
 *
 * raw: a file or block device as it is. Holes are reported (SEEK_HOLE) and made (PUNCH_HOLE, ZERO_RANGE).
 */
#define _GNU_SOURCE
#include "disk.h"

#include <errno.h>
#include <sys/stat.h>
#include <unistd.h>

static int raw_preadv(struct disk *disk, const struct iovec *iov, int count, uint64_t offset)
{
    struct raw_disk *raw = (struct raw_disk *)disk;
    struct sg sg = {iov, count, 0};
    return file_preadv(&raw->file, &sg, sg_length(iov, count), raw->start + offset);
}

static int raw_pwritev(struct disk *disk, const struct iovec *iov, int count, uint64_t offset)
{
    struct raw_disk *raw = (struct raw_disk *)disk;
    struct sg sg = {iov, count, 0};
    return file_pwritev(&raw->file, &sg, sg_length(iov, count), raw->start + offset);
}

static int raw_flush(struct disk *disk)
{
    return file_sync(&((struct raw_disk *)disk)->file);
}

static int raw_discard(struct disk *disk, uint64_t offset, uint64_t length)
{
    struct raw_disk *raw = (struct raw_disk *)disk;
    return raw->discard ? file_punch(&raw->file, raw->start + offset, length) : 0;
}

static int raw_write_zeroes(struct disk *disk, uint64_t offset, uint64_t length, unsigned flags)
{
    struct raw_disk *raw = (struct raw_disk *)disk;
    return file_zero(&raw->file, raw->start + offset, length, (flags & DISK_UNMAP) && raw->discard);
}

static int raw_status(struct disk *disk, uint64_t offset, uint64_t length, struct disk_extent *extent)
{
    struct raw_disk *raw = (struct raw_disk *)disk;
    uint64_t at = raw->start + offset;
    extent->flags = DISK_DATA | DISK_ALLOCATED | DISK_HOST_OFFSET;
    extent->host = at;
    extent->length = length;
    if (raw->file.block_device)
        return 0;
    off_t data = lseek(raw->file.fd, at, SEEK_DATA);
    if (data < 0 && errno != ENXIO)
        return errno == EINVAL || errno == EOPNOTSUPP ? 0 : -errno; /* no holes known here: all of it is data */
    if (data < 0 || (uint64_t)data > at) {
        extent->flags = DISK_ZERO | DISK_ALLOCATED | DISK_HOST_OFFSET;
        if (data >= 0 && (uint64_t)data - at < length)
            extent->length = data - at;
        return 0;
    }
    off_t hole = lseek(raw->file.fd, at, SEEK_HOLE);
    if (hole < 0)
        return errno == ENXIO ? 0 : -errno; /* ENXIO: the file shrank between the two questions */
    if ((uint64_t)hole > at && (uint64_t)hole - at < length)
        extent->length = hole - at;
    return 0;
}

static const struct disk_ops raw_ops = {
    .preadv = raw_preadv,
    .pwritev = raw_pwritev,
    .flush = raw_flush,
    .discard = raw_discard,
    .write_zeroes = raw_write_zeroes,
    .status = raw_status,
};

void raw_init(struct raw_disk *raw, int fd, uint64_t start, uint64_t size, bool readonly)
{
    struct stat st;
    raw->disk.ops = &raw_ops;
    raw->disk.size = size;
    raw->disk.readonly = readonly;
    raw->file.fd = fd;
    raw->file.block_device = fstat(fd, &st) == 0 && S_ISBLK(st.st_mode);
    raw->start = start;
    raw->discard = true;
}
