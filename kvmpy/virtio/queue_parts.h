/* SPDX-License-Identifier: Apache-2.0
 *
 * What the two ring formats share, and their functions behind those of queue.h.
 */
#ifndef KVMPY_VIRTIO_QUEUE_PARTS_H
#define KVMPY_VIRTIO_QUEUE_PARTS_H

#include "queue.h"

struct vq_desc { /* 2.7.5; a packed descriptor (2.8.13) has the buffer id before the flags */
    uint64_t addr;
    uint32_t len;
    union {
        struct {
            uint16_t flags, next;
        };
        struct {
            uint16_t id, packed_flags;
        };
    };
};

/* Index and flag words are single accesses: a torn index is an index out of nowhere. */
static inline uint16_t load16(const unsigned char *p)
{
    return __atomic_load_n((const uint16_t *)p, __ATOMIC_ACQUIRE);
}

static inline void store16(unsigned char *p, uint16_t value)
{
    __atomic_store_n((uint16_t *)p, value, __ATOMIC_RELEASE);
}

/* A private copy: what is checked is what is used. */
static inline void copy_in(void *to, const unsigned char *from, size_t size)
{
    __builtin_memcpy(to, from, size);
    __asm__ volatile("" ::: "memory");
}

void vq_journal(struct vq *, uint64_t gpa, uint64_t size);
int vq_add_buffer(struct vq *, struct vq_chain *, uint64_t gpa, uint32_t len, bool write);
/* Copies an indirect table into vq.table; the number of its entries, or -1. `most`: entries that it may have. */
int vq_indirect_table(struct vq *, uint64_t gpa, uint32_t len, uint32_t most);

int split_pop(struct vq *, struct vq_chain *);
void split_push(struct vq *, uint16_t head, uint32_t written);
void split_publish(struct vq *);
bool split_wants_interrupt(struct vq *);
void split_no_kicks(struct vq *);
bool split_want_kicks(struct vq *);

int packed_pop(struct vq *, struct vq_chain *);
void packed_unpop(struct vq *, uint32_t slots);
void packed_push(struct vq *, uint16_t id, uint32_t slots, uint32_t written);
void packed_publish(struct vq *);
bool packed_wants_interrupt(struct vq *);
void packed_no_kicks(struct vq *);
bool packed_want_kicks(struct vq *);

#endif
