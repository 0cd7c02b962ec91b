/* SPDX-License-Identifier: Apache-2.0
 *
 * What both ring formats have in common; see queue.h. The host is little endian, as the rings are.
 */
#include "queue_parts.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "virtio rings are little endian and read as they are"
#endif

#define MAX_CHAIN (1ull << 32)
#define IDS 65536u /* a packed ring's buffer ids are any 16 bits (2.8.13) */

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
    q->in_flight = NULL;
    q->table = NULL;
    q->size = 0;
    q->desc = q->avail = q->used = NULL;
    q->next_avail = q->seen = q->next_used = q->published = q->signalled = 0;
    q->signalled_valid = q->silent = false;
    q->take = q->give = q->first = (struct vq_place){0, true}; /* 2.8.1 */
    q->staged = q->unsignalled = q->ahead = q->slots = 0;
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
    q->desc = vq_host(memory, q->desc_gpa, 16 * n, q->packed);
    q->avail = vq_host(memory, q->avail_gpa, q->packed ? 4 : 6 + 2 * n, false);
    q->used = vq_host(memory, q->used_gpa, q->packed ? 4 : 6 + 8 * n, true);
    if (q->desc && q->avail && q->used)
        return 0;
    vq_fault(q, "a ring is not in guest RAM", !q->desc ? q->desc_gpa : !q->avail ? q->avail_gpa : q->used_gpa);
    return -EINVAL;
}

int vq_configure(struct vq *q, const struct vq_memory *memory, uint32_t size, uint64_t desc, uint64_t avail,
                 uint64_t used, unsigned flags)
{
    bool packed = flags & VQ_PACKED;
    vq_disable(q);
    if (!size || size > VQ_MAX_SIZE) {
        vq_fault(q, "the queue size is not 1 to 32768", size);
        return -EINVAL;
    }
    if (!packed && size & (size - 1)) {
        vq_fault(q, "the size of a split queue is no power of two", size);
        return -EINVAL;
    }
    if (desc & 15 || avail & (packed ? 3 : 1) || used & 3) {
        vq_fault(q, "a ring is not aligned", desc & 15 ? desc : avail & (packed ? 3 : 1) ? avail : used);
        return -EINVAL;
    }
    q->in_flight = calloc(packed ? IDS : size, sizeof(*q->in_flight));
    q->table = malloc(16 * (size_t)size);
    if (!q->in_flight || !q->table || vq_chain_init(&q->scratch, size)) {
        vq_disable(q);
        return -ENOMEM;
    }
    q->size = size;
    q->event_idx = flags & VQ_EVENT_IDX;
    q->indirect = flags & VQ_INDIRECT;
    q->packed = packed;
    q->desc_gpa = desc;
    q->avail_gpa = avail;
    q->used_gpa = used;
    int result = vq_remap(q, memory);
    if (result)
        q->size = 0;
    return result;
}

void vq_save(const struct vq *q, uint16_t *next_avail, uint16_t *next_used)
{
    *next_avail = q->packed ? q->take.index | q->take.wrap << 15 : q->next_avail;
    *next_used = q->packed ? q->give.index | q->give.wrap << 15 : q->published;
}

int vq_restore(struct vq *q, uint16_t next_avail, uint16_t next_used)
{
    if (!q->packed) {
        q->next_avail = q->seen = next_avail;
        q->next_used = q->published = q->signalled = next_used;
        q->signalled_valid = true; /* what was published then was decided about then */
        return 0;
    }
    struct vq_place take = {next_avail & 0x7fff, next_avail >> 15}, give = {next_used & 0x7fff, next_used >> 15};
    if (take.index >= q->size || give.index >= q->size)
        return -EINVAL;
    q->take = take;
    q->give = give;
    return 0;
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

int vq_add_buffer(struct vq *q, struct vq_chain *chain, uint64_t gpa, uint32_t len, bool write)
{
    uint64_t left = len;
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

int vq_indirect_table(struct vq *q, uint64_t gpa, uint32_t len, uint32_t most)
{
    if (!q->indirect)
        return vq_fault(q, "an indirect table that was not negotiated", gpa);
    if (!len || len % 16)
        return vq_fault(q, "an indirect table of odd length", len);
    if (len / 16 > most)
        return vq_fault(q, "an indirect table with more entries than the queue", len / 16);
    const unsigned char *table = vq_host(q->memory, gpa, len, false);
    if (!table)
        return vq_fault(q, "an indirect table is not in guest memory", gpa);
    copy_in(q->table, table, len);
    return len / 16;
}

int vq_pop(struct vq *q, struct vq_chain *chain)
{
    if (!q->size || q->fault)
        return q->fault ? -1 : 0;
    chain->reads = chain->writes = 0;
    chain->read_size = chain->write_size = chain->written = 0;
    int got = q->packed ? packed_pop(q, chain) : split_pop(q, chain);
    if (got == 1) {
        q->in_flight_count++;
        q->chains++;
    }
    return got;
}

static uint16_t taken(const struct vq *q, uint16_t head)
{
    return q->size && (q->packed || head < q->size) ? q->in_flight[head] : 0;
}

void vq_unpop(struct vq *q, uint16_t head)
{
    uint16_t slots = taken(q, head);
    if (!slots)
        return;
    q->in_flight[head] = 0;
    q->in_flight_count--;
    q->chains--;
    if (q->packed)
        packed_unpop(q, slots);
    else
        q->next_avail--;
}

/* ---- giving back */

bool vq_push(struct vq *q, uint16_t head, uint64_t written)
{
    uint16_t slots = taken(q, head);
    uint32_t length = written > UINT32_MAX ? UINT32_MAX : (uint32_t)written;
    if (!slots || q->fault)
        return false;
    q->in_flight[head] = 0;
    q->in_flight_count--;
    if (q->packed)
        packed_push(q, head, slots, length);
    else
        split_push(q, head, length);
    return true;
}

void vq_publish(struct vq *q)
{
    if (q->size)
        q->packed ? packed_publish(q) : split_publish(q);
}

bool vq_wants_interrupt(struct vq *q)
{
    if (!q->size)
        return false;
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* what was used must be out before the driver's wish is read */
    bool wanted = q->packed ? packed_wants_interrupt(q) : split_wants_interrupt(q);
    q->interrupts += wanted;
    return wanted;
}

void vq_no_kicks(struct vq *q)
{
    if (q->size)
        q->packed ? packed_no_kicks(q) : split_no_kicks(q);
}

bool vq_want_kicks(struct vq *q)
{
    if (!q->size || q->fault)
        return false;
    return q->packed ? packed_want_kicks(q) : split_want_kicks(q);
}

void vq_journal(struct vq *q, uint64_t gpa, uint64_t size)
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

int vq_slice(const struct iovec *iov, uint32_t count, uint64_t skip, uint64_t size, struct iovec *out, int room)
{
    int n = 0;
    for (uint32_t i = 0; i < count && size; i++) {
        if (skip >= iov[i].iov_len) {
            skip -= iov[i].iov_len;
            continue;
        }
        uint64_t length = iov[i].iov_len - skip;
        length = length < size ? length : size;
        if (n == room)
            return -1;
        out[n++] = (struct iovec){(char *)iov[i].iov_base + skip, length};
        size -= length;
        skip = 0;
    }
    return n;
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
        vq_journal(q, chain->gpa[i] + offset, n);
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
