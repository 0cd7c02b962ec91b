/* SPDX-License-Identifier: Apache-2.0
 *
 * The C face of a disk: what a virtio-blk worker calls without the GIL.
 *
 * All functions return 0 or -errno and may be called from several threads at once. -EBADMSG means that the image
 * itself is damaged; `disk_fault` has the text. Lengths and offsets are bytes; nothing needs to be aligned. A transfer is complete
 * or it is an error, never short.
 */
#ifndef KVMPY_BLOCK_DISK_H
#define KVMPY_BLOCK_DISK_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

/* disk_extent.flags */
#define DISK_DATA 1u       /* reads may give anything (stored here, or in a backing file) */
#define DISK_ZERO 2u       /* reads give zeroes */
#define DISK_ALLOCATED 4u  /* this layer answers, not its backing file */
#define DISK_COMPRESSED 8u
#define DISK_HOST_OFFSET 16u /* `host` is where the data stands in the image file */

/* disk_write_zeroes flags */
#define DISK_UNMAP 1u /* the space may be given back */

struct disk_extent {
    uint64_t length; /* bytes from the asked offset on that share these flags; never 0 */
    uint64_t host;
    unsigned flags;
};

struct disk_stats { /* updated with relaxed atomics */
    uint64_t reads, read_bytes, writes, written_bytes, flushes, discards, zeroes, errors;
};

struct disk;

struct disk_ops {
    int (*preadv)(struct disk *, const struct iovec *, int count, uint64_t offset);
    int (*pwritev)(struct disk *, const struct iovec *, int count, uint64_t offset);
    int (*flush)(struct disk *);
    int (*discard)(struct disk *, uint64_t offset, uint64_t length);
    int (*write_zeroes)(struct disk *, uint64_t offset, uint64_t length, unsigned flags);
    int (*status)(struct disk *, uint64_t offset, uint64_t length, struct disk_extent *);
};

struct disk_fault {
    const char *text; /* static storage, NULL: no fault so far */
    uint64_t offset;  /* in the image file */
};

struct disk {
    const struct disk_ops *ops;
    uint64_t size; /* bytes */
    bool readonly;
    struct disk_stats stats;
    struct disk_fault fault; /* the last one; written with the format's own lock held */
};

/* The doors: they check the range and the read-only mark, count, and call the format. */
int disk_preadv(struct disk *, const struct iovec *, int count, uint64_t offset);
int disk_pwritev(struct disk *, const struct iovec *, int count, uint64_t offset);
int disk_flush(struct disk *);
int disk_discard(struct disk *, uint64_t offset, uint64_t length);
int disk_write_zeroes(struct disk *, uint64_t offset, uint64_t length, unsigned flags);
int disk_status(struct disk *, uint64_t offset, uint64_t length, struct disk_extent *);

static inline int disk_pread(struct disk *disk, void *buffer, size_t length, uint64_t offset)
{
    struct iovec iov = {buffer, length};
    return disk_preadv(disk, &iov, 1, offset);
}

static inline int disk_pwrite(struct disk *disk, const void *buffer, size_t length, uint64_t offset)
{
    struct iovec iov = {(void *)buffer, length};
    return disk_pwritev(disk, &iov, 1, offset);
}

/* A position in a scatter list, so that a request can be served piece by piece. */
struct sg {
    const struct iovec *iov;
    int count;
    size_t skip; /* bytes of iov[0] already served */
};

size_t sg_length(const struct iovec *, int count);
/* Take the next `length` bytes: fills `out` with at most `max` entries, returns how many; *taken may be less than `length`. */
int sg_take(struct sg *, size_t length, struct iovec *out, int max, size_t *taken);
void sg_zero(struct sg *, size_t length);
void sg_put(struct sg *, const void *data, size_t length); /* copy into the list */
void sg_get(struct sg *, void *data, size_t length);       /* copy out of the list */

/* A host file. Reads past its end give zeroes, EINTR and short transfers are carried on, a failed sync stays failed
 * (the kernel forgets the dirty pages it could not write, so a later success would be a lie). */
struct host_file {
    int fd;
    int sync_error; /* sticky, -errno */
    bool no_sync;   /* cache="unsafe": order and flushes are not wanted */
    bool block_device;
};

int file_preadv(struct host_file *, struct sg *, size_t length, uint64_t offset);
int file_pwritev(struct host_file *, struct sg *, size_t length, uint64_t offset);
int file_pread(struct host_file *, void *, size_t length, uint64_t offset);
int file_pread_exact(struct host_file *, void *, size_t length, uint64_t offset); /* -ENODATA at the end of the file */
int file_pwrite(struct host_file *, const void *, size_t length, uint64_t offset);
int file_sync(struct host_file *);
int file_punch(struct host_file *, uint64_t offset, uint64_t length); /* a hint: unsupported is success */
int file_zero(struct host_file *, uint64_t offset, uint64_t length, bool unmap);
int file_reserve(struct host_file *, uint64_t offset, uint64_t length); /* so that writing there finds room; where that is known */
int64_t file_size(struct host_file *);

/* True if all bytes are zero. */
bool buffer_is_zero(const void *, size_t);

struct disk_copy {
    struct disk *from, *to;
    size_t chunk;    /* bytes read and written at a time; not 0 */
    size_t unit;     /* so many zeroes in the data are worth a hole; 0: none are */
    bool to_is_zero; /* zeroes need not be written */
};

/* Copy [offset, offset + length) by way of `buffer` (a chunk); *failed is the disk that an error is about. */
int disk_copy(const struct disk_copy *, void *buffer, uint64_t offset, uint64_t length, const struct disk **failed);

/* raw: the file is the disk. `disk` must be zeroed memory that outlives its users. */
struct raw_disk {
    struct disk disk;
    struct host_file file;
    uint64_t start; /* where the disk begins in the file: flat VMDK extents begin inside one */
    bool discard;   /* pass discards to the host */
};

void raw_init(struct raw_disk *, int fd, uint64_t start, uint64_t size, bool readonly);

#endif
