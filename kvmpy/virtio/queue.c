/* SPDX-License-Identifier: Apache-2.0
 *
 * Split virtqueues, virtio 1.2 section 2.7; see queue.h. The host is little endian, as the rings are.
 */
#include "queue.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "virtio rings are little endian and read as they are"
#endif

#define NO_INTERRUPT 1u /* avail.flags, 2.7.6 */
#define NO_NOTIFY 1u    /* used.flags, 2.7.8 */
#define MAX_CHAIN (1ull << 32)

struct desc { /* 2.7.5 */
    uint64_t addr;
    uint32_t len;
    uint16_t flags, next;
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

static inline uint16_t ring_load(const unsigned char *p)
{
    return __atomic_load_n((const uint16_t *)p, __ATOMIC_RELAXED);
}

/* ---- memory */

static const struct vq_region *find(const struct vq_memory *memory, uint64_t gpa)
{
    size_t low = 0, high = memory->count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        const struct vq_region *region = &memory->regions[middle];
        if (gpa < region->gpa)
            high = middle;
        else if (gpa - region->gpa >= region->size)
            low = middle + 1;
        else
            return region;
    }
    return NULL;
}

unsigned char *vq_host(const struct vq_memory *memory, uint64_t gpa, uint64_t size, bool write)
{
    const struct vq_region *region = find(memory, gpa);
    if (!region || (write && region->readonly) || size > region->size - (gpa - region->gpa))
        return NULL;
    return region->hva + (gpa - region->gpa);
}

/* ---- configuration */

void vq_init(struct vq *q)
{
    memset(q, 0, sizeof(*q));
}

void vq_disable(struct vq *q)
{
    free(q->in_flight);
    free(q->table);
    vq_chain_free(&q->scratch);
    q->in_flight = q->table = NULL;
    q->size = 0;
    q->desc = q->avail = q->used = NULL;
    q->next_avail = q->seen = q->next_used = q->published = q->signalled = 0;
    q->signalled_valid = q->silent = false;
    q->in_flight_count = q->journal_count = 0;
    q->fault = NULL;
    q->fault_value = 0;
}

void vq_free(struct vq *q)
{
    vq_disable(q);
}

int vq_fault(struct vq *q, const char *text, uint64_t value)
{
    if (!q->fault) {
        q->fault_value = value;
        q->fault = text;
    }
    return -1;
}

int vq_remap(struct vq *q, const struct vq_memory *memory)
{
    uint64_t n = q->size;
    q->memory = memory;
    q->desc = vq_host(memory, q->desc_gpa, 16 * n, false);
    q->avail = vq_host(memory, q->avail_gpa, 6 + 2 * n, false);
    q->used = vq_host(memory, q->used_gpa, 6 + 8 * n, true);
    if (q->desc && q->avail && q->used)
        return 0;
    vq_fault(q, "a ring is not in guest RAM", !q->desc ? q->desc_gpa : !q->avail ? q->avail_gpa : q->used_gpa);
    return -EINVAL;
}

int vq_configure(struct vq *q, const struct vq_memory *memory, uint32_t size, uint64_t desc, uint64_t avail,
                 uint64_t used, bool event_idx, bool indirect)
{
    vq_disable(q);
    if (!size || size > VQ_MAX_SIZE || (size & (size - 1))) {
        vq_fault(q, "the queue size is no power of two up to 32768", size);
        return -EINVAL;
    }
    if (desc & 15 || avail & 1 || used & 3) {
        vq_fault(q, "a ring is not aligned", desc & 15 ? desc : avail & 1 ? avail : used);
        return -EINVAL;
    }
    q->in_flight = calloc(size, 1);
    q->table = malloc(16 * (size_t)size);
    if (!q->in_flight || !q->table || vq_chain_init(&q->scratch, size)) {
        vq_disable(q);
        return -ENOMEM;
    }
    q->size = size;
    q->event_idx = event_idx;
    q->indirect = indirect;
    q->desc_gpa = desc;
    q->avail_gpa = avail;
    q->used_gpa = used;
    int result = vq_remap(q, memory);
    if (result)
        q->size = 0;
    return result;
}

/* ---- chains */

int vq_chain_init(struct vq_chain *chain, uint32_t size)
{
    /* A buffer that crosses regions takes an entry in each of them; 64 crossings per request are plenty. */
    memset(chain, 0, sizeof(*chain));
    chain->room = size + 64;
    chain->iov = calloc(chain->room, sizeof(*chain->iov));
    chain->gpa = calloc(chain->room, sizeof(*chain->gpa));
    if (chain->iov && chain->gpa)
        return 0;
    vq_chain_free(chain);
    return -ENOMEM;
}

void vq_chain_free(struct vq_chain *chain)
{
    free(chain->iov);
    free(chain->gpa);
    memset(chain, 0, sizeof(*chain));
}

static int add_buffer(struct vq *q, struct vq_chain *chain, const struct desc *d)
{
    bool write = d->flags & VQ_DESC_WRITE;
    uint64_t gpa = d->addr, left = d->len;
    if (!left)
        return vq_fault(q, "a buffer of length 0", gpa);
    if (gpa + left - 1 < gpa)
        return vq_fault(q, "a buffer wraps around the address space", gpa);
    if (!write && chain->writes)
        return vq_fault(q, "a device-readable buffer after a device-writable one", gpa); /* 2.7.4.2 */
    if (chain->read_size + chain->write_size + left > MAX_CHAIN)
        return vq_fault(q, "a request of more than 4 GiB", gpa);
    while (left) {
        const struct vq_region *region = find(q->memory, gpa);
        if (!region)
            return vq_fault(q, "a buffer is not in guest memory", gpa);
        if (write && region->readonly)
            return vq_fault(q, "a device-writable buffer in ROM", gpa);
        uint32_t at = chain->reads + chain->writes;
        if (at == chain->room)
            return vq_fault(q, "a request in too many pieces", at);
        uint64_t inside = region->size - (gpa - region->gpa), count = left < inside ? left : inside;
        chain->iov[at].iov_base = region->hva + (gpa - region->gpa);
        chain->iov[at].iov_len = count;
        chain->gpa[at] = gpa;
        if (write) {
            chain->writes++;
            chain->write_size += count;
        } else {
            chain->reads++;
            chain->read_size += count;
        }
        gpa += count;
        left -= count;
    }
    return 0;
}

/* 2.7.5.3: the table is copied whole, so that what is checked is what is used. */
static int walk_indirect(struct vq *q, struct vq_chain *chain, const struct desc *outer, uint32_t seen)
{
    uint32_t count = outer->len / 16;
    if (!q->indirect)
        return vq_fault(q, "an indirect table that was not negotiated", outer->addr);
    if (outer->flags & VQ_DESC_NEXT)
        return vq_fault(q, "a descriptor with INDIRECT and NEXT", outer->addr);
    if (!outer->len || outer->len % 16)
        return vq_fault(q, "an indirect table of odd length", outer->len);
    if (count > q->size - seen)
        return vq_fault(q, "an indirect table with more entries than the queue", count);
    const unsigned char *table = vq_host(q->memory, outer->addr, outer->len, false);
    if (!table)
        return vq_fault(q, "an indirect table is not in guest memory", outer->addr);
    memcpy(q->table, table, outer->len);
    __asm__ volatile("" ::: "memory"); /* the copy, not the original, from here on */
    for (uint32_t index = 0, steps = 0;; steps++) {
        struct desc d;
        if (steps == count)
            return vq_fault(q, "a loop in an indirect table", outer->addr);
        memcpy(&d, q->table + 16 * (size_t)index, sizeof(d));
        if (d.flags & ~(VQ_DESC_NEXT | VQ_DESC_WRITE))
            return vq_fault(q, d.flags & VQ_DESC_INDIRECT ? "a nested indirect table" : "unknown descriptor flags", d.flags);
        if (add_buffer(q, chain, &d))
            return -1;
        if (!(d.flags & VQ_DESC_NEXT))
            return 0;
        if (d.next >= count)
            return vq_fault(q, "next points outside the indirect table", d.next);
        index = d.next;
    }
}

static int walk(struct vq *q, struct vq_chain *chain, uint16_t head)
{
    uint16_t index = head;
    for (uint32_t steps = 0;; steps++) {
        struct desc d;
        if (steps == q->size)
            return vq_fault(q, "a loop of descriptors", head);
        memcpy(&d, q->desc + 16 * (size_t)index, sizeof(d));
        __asm__ volatile("" ::: "memory"); /* the copy, not the original, from here on */
        if (d.flags & ~(VQ_DESC_NEXT | VQ_DESC_WRITE | VQ_DESC_INDIRECT))
            return vq_fault(q, "unknown descriptor flags", d.flags);
        if (d.flags & VQ_DESC_INDIRECT)
            return walk_indirect(q, chain, &d, steps);
        if (add_buffer(q, chain, &d))
            return -1;
        if (!(d.flags & VQ_DESC_NEXT))
            return 0;
        if (d.next >= q->size)
            return vq_fault(q, "next points outside the descriptor table", d.next);
        index = d.next;
    }
}

int vq_pop(struct vq *q, struct vq_chain *chain)
{
    if (!q->size || q->fault)
        return q->fault ? -1 : 0;
    uint16_t idx = load16(q->avail + 2); /* acquire: the entries up to it are there */
    q->seen = idx;
    uint16_t waiting = idx - q->next_avail;
    if (!waiting)
        return 0;
    if (waiting > q->size)
        return vq_fault(q, "avail.idx is ahead by more than the queue size", idx);
    uint16_t head = ring_load(q->avail + 4 + 2 * (size_t)(q->next_avail & (q->size - 1)));
    if (head >= q->size)
        return vq_fault(q, "the available ring names a descriptor beyond the table", head);
    if (q->in_flight[head])
        return vq_fault(q, "a descriptor is made available twice", head);
    chain->head = head;
    chain->reads = chain->writes = 0;
    chain->read_size = chain->write_size = chain->written = 0;
    if (walk(q, chain, head))
        return -1;
    q->in_flight[head] = 1;
    q->in_flight_count++;
    q->next_avail++;
    q->chains++;
    return 1;
}

void vq_unpop(struct vq *q, uint16_t head)
{
    if (q->size && head < q->size && q->in_flight[head]) {
        q->in_flight[head] = 0;
        q->in_flight_count--;
        q->next_avail--;
        q->chains--;
    }
}

/* ---- giving back */

bool vq_push(struct vq *q, uint16_t head, uint64_t written)
{
    if (!q->size || head >= q->size || !q->in_flight[head] || q->fault)
        return false;
    uint32_t element[2] = {head, written > UINT32_MAX ? UINT32_MAX : (uint32_t)written};
    memcpy(q->used + 4 + 8 * (size_t)(q->next_used & (q->size - 1)), element, sizeof(element));
    q->in_flight[head] = 0;
    q->in_flight_count--;
    q->next_used++;
    return true;
}

static void journal(struct vq *q, uint64_t gpa, uint64_t size)
{
    if (q->journal_count) {
        struct vq_range *last = &q->journal[q->journal_count - 1];
        if (last->gpa + last->size == gpa) {
            last->size += size;
            return;
        }
    }
    if (q->journal_count == VQ_JOURNAL) { /* cannot tell them apart any more: say too much rather than too little */
        struct vq_range *last = &q->journal[VQ_JOURNAL - 1];
        uint64_t end = last->gpa + last->size > gpa + size ? last->gpa + last->size : gpa + size;
        last->gpa = last->gpa < gpa ? last->gpa : gpa;
        last->size = end - last->gpa;
        return;
    }
    q->journal[q->journal_count++] = (struct vq_range){gpa, size};
}

bool vq_journal_full(const struct vq *q)
{
    return q->journal_count > VQ_JOURNAL / 2;
}

void vq_publish(struct vq *q)
{
    if (!q->size || q->published == q->next_used)
        return;
    store16(q->used + 2, q->next_used); /* release: elements and data are there first */
    q->published = q->next_used;
    journal(q, q->used_gpa, 6 + 8 * (uint64_t)q->size);
}

bool vq_wants_interrupt(struct vq *q)
{
    if (!q->size)
        return false;
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* used.idx must be out before the driver's wish is read */
    uint16_t old = q->signalled, new = q->published;
    bool valid = q->signalled_valid;
    if (valid && old == new)
        return false;
    if (!valid && !new)
        return false;
    q->signalled = new;
    q->signalled_valid = true;
    bool wanted;
    if (q->event_idx) {
        uint16_t event = load16(q->avail + 4 + 2 * (size_t)q->size); /* used_event, 2.7.7.2 */
        wanted = !valid || (uint16_t)(new - event - 1) < (uint16_t)(new - old);
    } else {
        wanted = !(load16(q->avail) & NO_INTERRUPT);
    }
    q->interrupts += wanted;
    return wanted;
}

/* ---- kicks, 2.7.10 */

void vq_no_kicks(struct vq *q)
{
    if (q->size && !q->event_idx && !q->silent) {
        store16(q->used, NO_NOTIFY); /* a hint: not worth a mark of its own */
        q->silent = true;
    }
}

bool vq_want_kicks(struct vq *q)
{
    if (!q->size || q->fault)
        return false;
    if (q->event_idx)
        store16(q->used + 4 + 8 * (size_t)q->size, q->seen); /* avail_event */
    else if (q->silent)
        store16(q->used, 0);
    q->silent = false;
    journal(q, q->used_gpa, 6 + 8 * (uint64_t)q->size);
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* the wish must be out before we look for the last time */
    uint16_t idx = load16(q->avail + 2);
    bool more = idx != q->seen;
    q->seen = idx; /* once per change: a device that wants no buffers now must not be asked for ever */
    return more;
}

/* ---- copies */

static size_t copy(const struct iovec *iov, uint32_t count, uint64_t offset, char *data, size_t size, bool out)
{
    size_t done = 0;
    for (uint32_t i = 0; i < count && done < size; i++) {
        if (offset >= iov[i].iov_len) {
            offset -= iov[i].iov_len;
            continue;
        }
        size_t n = iov[i].iov_len - offset;
        n = n < size - done ? n : size - done;
        char *guest = (char *)iov[i].iov_base + offset;
        memcpy(out ? guest : data + done, out ? data + done : guest, n);
        done += n;
        offset = 0;
    }
    return done;
}

size_t vq_read(const struct vq_chain *chain, uint64_t offset, void *to, size_t size)
{
    return copy(chain->iov, chain->reads, offset, to, size, false);
}

void vq_written(struct vq *q, struct vq_chain *chain, uint64_t offset, uint64_t size)
{
    if (size && offset <= chain->written && offset + size > chain->written)
        chain->written = offset + size;
    for (uint32_t i = chain->reads; i < chain->reads + chain->writes && size; i++) {
        uint64_t length = chain->iov[i].iov_len;
        if (offset >= length) {
            offset -= length;
            continue;
        }
        uint64_t n = length - offset < size ? length - offset : size;
        journal(q, chain->gpa[i] + offset, n);
        size -= n;
        offset = 0;
    }
}

size_t vq_write(struct vq *q, struct vq_chain *chain, uint64_t offset, const void *from, size_t size)
{
    size_t done = copy(chain->iov + chain->reads, chain->writes, offset, (char *)from, size, true);
    vq_written(q, chain, offset, done);
    return done;
}
