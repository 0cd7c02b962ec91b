/* SPDX-License-Identifier: Apache-2.0
 *
 * The device's side of a virtqueue without Python: split (virtio 1.2, 2.7) in queue_split.c, packed (2.8) in queue_packed.c.
 *
 * Everything in guest memory is hostile and changes while we look: a descriptor is copied once and the copy is checked,
 * a chain is accepted or refused as a whole, every loop is bounded by the queue size. What a guest gets wrong is a
 * `fault`: the queue gives nothing more until it is configured anew, and the device says DEVICE_NEEDS_RESET.
 *
 * One thread at a time works on a queue. The order of a request:
 *   vq_pop -> work on chain->iov -> vq_written, vq_push (staged) -> [tell the engine of the writes] -> vq_publish
 */
#ifndef KVMPY_VIRTIO_QUEUE_H
#define KVMPY_VIRTIO_QUEUE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#define VQ_MAX_SIZE 32768u /* 2.7, 2.8.10.1: the largest queue */
#define VQ_JOURNAL 512u    /* written ranges that are kept apart until they are told */

#define VQ_DESC_NEXT 1u
#define VQ_DESC_WRITE 2u
#define VQ_DESC_INDIRECT 4u

/* What was negotiated about a ring. */
#define VQ_EVENT_IDX 1u
#define VQ_INDIRECT 2u
#define VQ_PACKED 4u

/* Guest memory as it was when the table was made; sorted by address, never changed. Whoever holds it keeps it mapped. */
struct vq_region {
    uint64_t gpa, size;
    unsigned char *hva;
    bool readonly;
};

struct vq_memory {
    size_t count;
    struct vq_region *regions;
};

struct vq_range {
    uint64_t gpa, size;
};

/* A request: `reads` buffers for the device to read, after them `writes` buffers for it to write. */
struct vq_chain {
    uint16_t head; /* the first descriptor (split), the buffer id (packed): names the request until it is pushed */
    uint32_t reads, writes, room;
    uint64_t read_size, write_size;
    uint64_t written; /* bytes from the start of the writable part that the device has written */
    struct iovec *iov;
    uint64_t *gpa; /* of each iov */
};

/* A place in a packed ring: wraps at the queue size, and then its counter flips (2.8.1). */
struct vq_place {
    uint16_t index;
    bool wrap;
};

struct vq {
    const struct vq_memory *memory;
    uint16_t size;                    /* 0: not configured */
    bool event_idx, indirect, packed; /* as negotiated */
    bool silent;                      /* we asked for no kicks */
    uint64_t desc_gpa, avail_gpa, used_gpa;
    unsigned char *desc, *avail, *used; /* packed: the ring, the driver's and the device's event suppression */

    /* split: counters that wrap at 65536 */
    uint16_t next_avail;       /* the next entry of the available ring to take */
    uint16_t seen;             /* avail.idx when we last looked */
    uint16_t next_used;        /* where the next used element goes; staged beyond `published` */
    uint16_t published;        /* used.idx as the driver sees it */
    uint16_t signalled;        /* used.idx at the last decision about an interrupt */
    bool signalled_valid;

    /* packed */
    struct vq_place take, give; /* the next descriptor to take, and where the next used one goes */
    struct vq_place first;      /* of the staged used descriptors: its flags are stored last */
    uint16_t first_flags;
    uint32_t staged;            /* slots of staged used descriptors */
    uint32_t unsignalled;       /* slots used since the last decision about an interrupt */
    uint32_t ahead;             /* available slots behind `take` that we have seen */
    uint32_t slots;             /* that requests in flight take of the ring */

    uint16_t *in_flight;       /* per head or id: ring slots of a request that was taken and not yet given back */
    uint32_t in_flight_count;
    unsigned char *table;      /* room for a private copy of an indirect table */

    const char *fault;         /* static text, NULL: healthy */
    uint64_t fault_value;

    uint32_t journal_count;
    struct vq_range journal[VQ_JOURNAL];
    uint64_t chains, interrupts;
    uint64_t wait;             /* SERVE_LIMITED: nanoseconds until the next request may begin */
    struct vq_chain scratch;   /* for the C devices */
};

void vq_init(struct vq *);
void vq_free(struct vq *);
/* Take addresses into use; `flags`: VQ_*. Returns 0, -EINVAL (`fault` says why) or -ENOMEM. */
int vq_configure(struct vq *, const struct vq_memory *, uint32_t size, uint64_t desc, uint64_t avail, uint64_t used,
                 unsigned flags);
int vq_remap(struct vq *, const struct vq_memory *); /* guest memory changed; -EINVAL: the rings are gone */
void vq_disable(struct vq *);
int vq_fault(struct vq *, const char *text, uint64_t value); /* -> -1 */
/* Where the device is, in 16 bits each; packed: the index, and the wrap counter in bit 15. */
void vq_save(const struct vq *, uint16_t *next_avail, uint16_t *next_used);
int vq_restore(struct vq *, uint16_t next_avail, uint16_t next_used); /* -EINVAL: cannot be */

int vq_chain_init(struct vq_chain *, uint32_t size);
void vq_chain_free(struct vq_chain *);

int vq_pop(struct vq *, struct vq_chain *); /* 1: a request, 0: none, -1: fault */
void vq_unpop(struct vq *, uint16_t head);  /* give back the last request that was taken: it comes again */
bool vq_push(struct vq *, uint16_t head, uint64_t written); /* staged; false: this head is not in flight */
void vq_publish(struct vq *);
bool vq_wants_interrupt(struct vq *); /* after vq_publish */
void vq_no_kicks(struct vq *);
bool vq_want_kicks(struct vq *); /* true: requests came since we last looked */

/* Copies between a chain's parts and host memory; return the bytes moved, less than `size` only at the end. */
size_t vq_read(const struct vq_chain *, uint64_t offset, void *to, size_t size);
size_t vq_write(struct vq *, struct vq_chain *, uint64_t offset, const void *from, size_t size);
/* The device wrote [offset, offset + size) of the writable part by itself. */
void vq_written(struct vq *, struct vq_chain *, uint64_t offset, uint64_t size);
/* Bytes [skip, skip + size) of `count` pieces as pieces of their own. Returns how many, -1: more than `room`. */
int vq_slice(const struct iovec *, uint32_t count, uint64_t skip, uint64_t size, struct iovec *out, int room);
bool vq_journal_full(const struct vq *);
unsigned char *vq_host(const struct vq_memory *, uint64_t gpa, uint64_t size, bool write); /* one region, or NULL */

#endif
