/* SPDX-License-Identifier: Apache-2.0
 *
 * Copying data from one disk to another, a chunk at a time: small enough to stay in the processor's cache between the read,
 * the look for zeroes and the write.
 */
#include "disk.h"

/* Write `length` bytes of `data` at `offset`, except for runs of whole units of zeroes. */
static int write_sparse(const struct disk_copy *copy, const char *data, size_t length, uint64_t offset)
{
    size_t unit = copy->unit ? copy->unit : length, at = 0;
    while (at < length) {
        size_t start = at;
        bool zero = copy->unit && buffer_is_zero(data + at, length - at < unit ? length - at : unit);
        do
            at += length - at < unit ? length - at : unit;
        while (at < length && zero == buffer_is_zero(data + at, length - at < unit ? length - at : unit));
        int result = 0;
        if (!zero)
            result = disk_pwrite(copy->to, data + start, at - start, offset + start);
        else if (!copy->to_is_zero)
            result = disk_write_zeroes(copy->to, offset + start, at - start, DISK_UNMAP);
        if (result)
            return result;
    }
    return 0;
}

int disk_copy(const struct disk_copy *copy, void *buffer, uint64_t offset, uint64_t length, const struct disk **failed)
{
    while (length) {
        size_t n = copy->chunk - offset % copy->chunk;
        if (n > length)
            n = length;
        *failed = copy->from;
        int result = disk_pread(copy->from, buffer, n, offset);
        if (result)
            return result;
        *failed = copy->to;
        result = write_sparse(copy, buffer, n, offset);
        if (result)
            return result;
        offset += n;
        length -= n;
    }
    return 0;
}
