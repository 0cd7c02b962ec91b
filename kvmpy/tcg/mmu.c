/* SPDX-License-Identifier: Apache-2.0
 *
 * Every memory access that is not a TLB hit: page crossings, alignment checks, data breakpoints, code pages, MMIO.
 *
 * What has no host memory is MMIO: it goes to io.c, which asks the chips and then user space.
 */
#include "mmu.h"

#include <linux/kvm.h>

static void check_alignment(struct cpu *c, const struct uop *u, uint64_t lin, unsigned size, int mmu)
{
    if (mmu == MMU_USER_AC && size <= 8 && (lin & (size - 1)))
        cpu_fault_code(c, u, EXC_AC, 0);
}

static uint64_t get(const uint8_t *p, unsigned size)
{
    switch (size) {
    case 1: return *p;
    case 2: return HOST(16, p);
    case 4: return HOST(32, p);
    case 8: return HOST(64, p);
    }
    uint64_t v = 0;
    memcpy(&v, p, size);
    return v;
}
static void put(uint8_t *p, unsigned size, uint64_t v)
{
    switch (size) {
    case 1: *(volatile uint8_t *)p = (uint8_t)v; return;
    case 2: HOST(16, p) = (uint16_t)v; return;
    case 4: HOST(32, p) = (uint32_t)v; return;
    case 8: HOST(64, p) = v; return;
    }
    memcpy(p, &v, size);
}

/* Data breakpoints (SDM vol. 3B 17.2.4): noted here, reported by the loop when the instruction is complete. */
static void watch(struct cpu *c, uint64_t lin, unsigned size, bool write)
{
    for (unsigned set = 0; set < 2; set++) {
        const uint64_t *dr = set ? c->guest_debug.dr : c->dr;
        if (set && !(c->guest_debug.flags & KVM_GUESTDBG_USE_HW_BP))
            break;
        for (unsigned i = 0; i < 4; i++) {
            unsigned kind = dr[7] >> (16 + 4 * i) & 3, len = dr[7] >> (18 + 4 * i) & 3;
            uint64_t bytes = len == 2 ? 8 : len + 1, start = dr[i] & ~(bytes - 1);
            if ((dr[7] >> (2 * i) & 3) && (kind == 3 || (kind == 1 && write)) && lin < start + bytes && start < lin + size)
                c->watch_hit |= (uint8_t)(1u << (i + 4 * set));
        }
    }
}

/* I/O breakpoints, with CR4.DE. */
void watch_port(struct cpu *c, uint16_t port, unsigned size)
{
    for (unsigned i = 0; i < 4; i++) {
        unsigned len = c->dr[7] >> (18 + 4 * i) & 3;
        uint64_t bytes = len == 2 ? 8 : len + 1, start = c->dr[i] & ~(bytes - 1);
        if (c->dr[7] >> (2 * i) & 3 && (c->dr[7] >> (16 + 4 * i) & 3) == 2 && port < start + bytes && start < (uint64_t)port + size)
            c->watch_hit |= (uint8_t)(1u << i);
    }
}

static uint64_t read_place(struct cpu *c, const struct uop *u, const struct place *p, unsigned size)
{
    if (p->host)
        return get(p->host, size);
    return dev_read(c, u, IO_MMIO_READ, p->gpa, size);
}
static void write_place(struct cpu *c, const struct uop *u, const struct place *p, unsigned size, uint64_t v)
{
    if (!p->host) {
        dev_write(c, u, IO_MMIO_WRITE, p->gpa, size, v);
        return;
    }
    put(p->host, size, v);
    if (unlikely(p->page.code && atomic_load_explicit(p->page.code, memory_order_relaxed)))
        block_page_is_written(c, p->gpa, size, &p->page);
}

static uint64_t wrap(const struct cpu *c, uint64_t lin) { return long_mode(c) ? lin : (uint32_t)lin; }

uint64_t mode_read(struct cpu *c, int mmu, const struct uop *u, uint64_t lin, unsigned size, int stack)
{
    unsigned first = 4096 - (lin & 0xfff);
    lin = wrap(c, lin);
    check_alignment(c, u, lin, size, mmu);
    if (likely(first >= size)) {
        const struct tlb_entry *e = &c->tlbs[mmu].e[lin >> 12 & (TLB_SIZE - 1)];
        if (e->rd == (lin & PAGE_MASK_4K))
            return get((uint8_t *)(lin + e->addend), size);
        struct place p = tlb_fill(c, mmu, u, lin, ACCESS_READ, stack);
        if (unlikely(c->watching))
            watch(c, lin, size, false);
        return read_place(c, u, &p, size);
    }
    struct place a = tlb_fill(c, mmu, u, lin, ACCESS_READ, stack);
    struct place b = tlb_fill(c, mmu, u, wrap(c, lin + first), ACCESS_READ, stack);
    uint64_t low = read_place(c, u, &a, first);
    return low | read_place(c, u, &b, size - first) << 8 * first;
}

void mode_write(struct cpu *c, int mmu, const struct uop *u, uint64_t lin, unsigned size, uint64_t value, int stack)
{
    unsigned first = 4096 - (lin & 0xfff);
    lin = wrap(c, lin);
    check_alignment(c, u, lin, size, mmu);
    if (likely(first >= size)) {
        const struct tlb_entry *e = &c->tlbs[mmu].e[lin >> 12 & (TLB_SIZE - 1)];
        if (e->wr == (lin & PAGE_MASK_4K)) {
            put((uint8_t *)(lin + e->addend), size, value);
            return;
        }
        struct place p = tlb_fill(c, mmu, u, lin, ACCESS_WRITE, stack);
        if (unlikely(c->watching))
            watch(c, lin, size, true);
        write_place(c, u, &p, size, value);
        return;
    }
    struct place a = tlb_fill(c, mmu, u, lin, ACCESS_WRITE, stack);
    struct place b = tlb_fill(c, mmu, u, wrap(c, lin + first), ACCESS_WRITE, stack);
    write_place(c, u, &a, first, value & ((1ull << 8 * first) - 1));
    write_place(c, u, &b, size - first, value >> 8 * first);
}

uint64_t mem_read_slow(struct cpu *c, const struct uop *u, uint64_t lin, unsigned size, int stack)
{
    if (unlikely(at_edge(c)) && !stack)
        edge_check(c, u, lin, size, false);
    return mode_read(c, mmu_index(c), u, lin, size, stack);
}
void mem_write_slow(struct cpu *c, const struct uop *u, uint64_t lin, unsigned size, uint64_t value, int stack)
{
    if (unlikely(at_edge(c)) && !stack)
        edge_check(c, u, lin, size, true);
    mode_write(c, mmu_index(c), u, lin, size, value, stack);
}

uint64_t sys_read(struct cpu *c, const struct uop *u, uint64_t lin, unsigned size)
{
    lin = wrap(c, lin);
    struct tlb_entry *e = &c->tlbs[MMU_KERNEL].e[lin >> 12 & (TLB_SIZE - 1)];
    if (likely(((lin + size - 1) & PAGE_MASK_4K) == e->rd))
        return get((uint8_t *)(lin + e->addend), size);
    return mode_read(c, MMU_KERNEL, u, lin, size, 0);
}
void sys_write(struct cpu *c, const struct uop *u, uint64_t lin, unsigned size, uint64_t value)
{
    mode_write(c, MMU_KERNEL, u, lin, size, value, 0);
}
void sys_check_write(struct cpu *c, const struct uop *u, uint64_t lin, unsigned size)
{
    tlb_fill(c, MMU_KERNEL, u, wrap(c, lin), ACCESS_WRITE, 0);
    if ((lin & 0xfff) + size > 4096)
        tlb_fill(c, MMU_KERNEL, u, wrap(c, (lin + size - 1) & PAGE_MASK_4K), ACCESS_WRITE, 0);
}

void mem_check_write(struct cpu *c, const struct uop *u, uint64_t lin, unsigned size, int stack)
{
    if (unlikely(at_edge(c)) && !stack)
        edge_check(c, u, lin, size, true);
    check_alignment(c, u, lin, size, mmu_index(c));
    tlb_fill(c, mmu_index(c), u, wrap(c, lin), ACCESS_WRITE, stack);
    if ((lin & 0xfff) + size > 4096)
        tlb_fill(c, mmu_index(c), u, wrap(c, (lin + size - 1) & PAGE_MASK_4K), ACCESS_WRITE, stack);
}

uint64_t ld_rmw(struct cpu *c, const struct uop *u, uint64_t lin, unsigned size)
{
    mem_check_write(c, u, lin, size, 0);
    return mem_read_slow(c, u, lin, size, 0);
}

uint8_t *rmw_host_slow(struct cpu *c, const struct uop *u, uint64_t lin, unsigned size)
{
    if (unlikely(at_edge(c)))
        edge_check(c, u, lin, size, true);
    check_alignment(c, u, lin, size, mmu_index(c));
    if ((lin & 0xfff) + size > 4096)
        return NULL;
    struct place p = tlb_fill(c, mmu_index(c), u, wrap(c, lin), ACCESS_WRITE, 0);
    if (!p.host)
        return NULL;
    if (unlikely(c->watching))
        watch(c, lin, size, true);
    if (p.page.code) {
        uint64_t code = atomic_load_explicit(p.page.code, memory_order_relaxed);
        unsigned a = (lin & 0xfff) >> 6, b = ((lin & 0xfff) + size - 1) >> 6;
        if (code >> a & 1 || code >> b & 1)
            return NULL;
    }
    return p.host;
}

/* Larger or odd accesses: all pages are checked before anything is touched. */
void mem_read_bytes(struct cpu *c, const struct uop *u, uint64_t lin, void *buffer, unsigned size)
{
    uint8_t *out = buffer;
    if (unlikely(at_edge(c)))
        edge_check(c, u, lin, size, false);
    int mmu = mmu_index(c);
    lin = wrap(c, lin);
    unsigned first = 4096 - (lin & 0xfff);
    struct place p = tlb_fill(c, mmu, u, lin, ACCESS_READ, 0), q = p;
    if (unlikely(c->watching))
        watch(c, lin, size, false);
    if (first < size)
        q = tlb_fill(c, mmu, u, wrap(c, lin + first), ACCESS_READ, 0);
    for (unsigned done = 0; done < size;) {
        struct place now = done < first ? p : q;
        unsigned off = done < first ? done : done - first, n = (done < first && first < size ? first : size) - done;
        if (now.host) {
            memcpy(out + done, now.host + off, n);
        } else {
            n = n > 8 ? 8 : n;
            now.gpa += off;
            uint64_t v = read_place(c, u, &now, n);
            memcpy(out + done, &v, n);
        }
        done += n;
    }
}

void mem_write_bytes(struct cpu *c, const struct uop *u, uint64_t lin, const void *buffer, unsigned size)
{
    const uint8_t *in = buffer;
    if (unlikely(at_edge(c)))
        edge_check(c, u, lin, size, true);
    int mmu = mmu_index(c);
    lin = wrap(c, lin);
    unsigned first = 4096 - (lin & 0xfff);
    struct place p = tlb_fill(c, mmu, u, lin, ACCESS_WRITE, 0), q = p;
    if (unlikely(c->watching))
        watch(c, lin, size, true);
    if (first < size)
        q = tlb_fill(c, mmu, u, wrap(c, lin + first), ACCESS_WRITE, 0);
    for (unsigned done = 0; done < size;) {
        struct place now = done < first ? p : q;
        unsigned off = done < first ? done : done - first, n = (done < first && first < size ? first : size) - done;
        now.gpa += off;
        if (now.host) {
            memcpy(now.host + off, in + done, n);
            if (now.page.code && atomic_load_explicit(now.page.code, memory_order_relaxed))
                block_page_is_written(c, now.gpa, n, &now.page);
        } else {
            n = n > 8 ? 8 : n;
            uint64_t v = 0;
            memcpy(&v, in + done, n);
            write_place(c, u, &now, n, v);
        }
        done += n;
    }
}
