/* SPDX-License-Identifier: Apache-2.0
 *
 * Paging, the softTLB, and every memory access that is not a TLB hit.
 *
 * There are four TLBs by access mode: user, supervisor, supervisor with EFLAGS.AC (SMAP is off for it) and user with
 * alignment checking (whose tags never match, so that every access is looked at). c->tlb points to the one for data
 * at the present CPL, c->xtlb to the one for code. An entry has a tag per kind of access. All three are filled from one
 * page walk, as far as the page allows; the write tag only
 *   - when D is set already (so the first write comes here and sets it),
 *   - when no vCPU has decoded code in the page (stores must see the granule bitmap),
 *   - when a dirty-logged page has been reported.
 *
 * A walk follows SDM vol. 3A chapter 4: 32-bit, PAE, 4-level and 5-level; the rights of all levels are combined, then
 * checked; A (and D) are set only when the access is allowed, with a compare-and-swap on the entry, since other vCPUs
 * walk the same tables. The walker finds page-table pages in host memory through a small cache.
 *
 * What has no host memory is MMIO: it goes to io.c, which asks the chips and then user space.
 * Global entries live on over MOV CR3: `local` is a bitmap of the others, so that a flush visits only used entries.
 * INVLPG of an address inside the range covered by large pages drops everything, for one large page is many entries.
 */
#include "core.h"

#include <linux/kvm.h>

#define PTE_P 1ull
#define PTE_W 2ull
#define PTE_U 4ull
#define PTE_A 0x20ull
#define PTE_D 0x40ull
#define PTE_PS 0x80ull
#define PTE_G 0x100ull
#define PTE_NX (1ull << 63)
enum { PF_P = 1, PF_W = 2, PF_U = 4, PF_RSVD = 8, PF_I = 16, PF_PK = 32 };

struct walk {
    uint64_t gpa;     /* of the 4 KiB page */
    uint64_t size;    /* of the mapping */
    bool read, write, exec; /* allowed for this mode */
    bool global, dirty, user, writable;
    uint32_t error;
};

static uint8_t *table_host(struct cpu *c, uint64_t gpa)
{
    uint64_t page = gpa & PAGE_MASK_4K;
    unsigned i = (page >> 12) & 63;
    if (c->pt_cache[i].gpa != page || !c->pt_cache[i].host) {
        struct page_info info;
        tcg_phys_to_host(c->vm, page, &info);
        c->pt_cache[i].gpa = page;
        c->pt_cache[i].host = info.host;
        if (!info.host)
            return NULL;
    }
    return c->pt_cache[i].host + (gpa & 0xfff);
}

static uint64_t read_entry(struct cpu *c, uint64_t gpa, bool wide)
{
    uint8_t *host = table_host(c, gpa);
    if (!host)
        return 0; /* nothing there: as KVM, not present */
    return wide ? __atomic_load_n((uint64_t *)host, __ATOMIC_RELAXED) : __atomic_load_n((uint32_t *)host, __ATOMIC_RELAXED);
}

/* false: the entry changed meanwhile, walk again */
static bool set_bits(struct cpu *c, uint64_t gpa, uint64_t old, uint64_t bits, bool wide)
{
    if ((old & bits) == bits)
        return true;
    struct page_info info;
    tcg_phys_to_host(c->vm, gpa & PAGE_MASK_4K, &info);
    if (!info.host || (info.flags & PAGE_READONLY))
        return true; /* tables in ROM keep their bits */
    uint8_t *host = info.host + (gpa & 0xfff);
    if (info.flags & PAGE_LOG)
        tcg_mark_dirty(c, gpa & PAGE_MASK_4K);
    if (wide) {
        uint64_t expected = old;
        if (!__atomic_compare_exchange_n((uint64_t *)host, &expected, old | bits, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED))
            return false;
    } else {
        uint32_t expected = (uint32_t)old;
        if (!__atomic_compare_exchange_n((uint32_t *)host, &expected, (uint32_t)(old | bits), false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED))
            return false;
    }
    if (info.code && atomic_load_explicit(info.code, memory_order_relaxed))
        block_page_is_written(c, gpa, wide ? 8 : 4, &info);
    return true;
}

/* Walks for `access` in mode `mmu`. true: allowed, w filled. false: w->error is the page fault's error code. With
 * `peek` nothing is changed (KVM_TRANSLATE). */
static bool walk(struct cpu *c, uint64_t lin, enum access access, int mmu, bool peek, struct walk *w)
{
    bool user = mmu == MMU_USER || mmu == MMU_USER_AC;
    if (!(c->cr0 & CR0_PG)) {
        uint64_t gpa = (uint32_t)lin & PAGE_MASK_4K;
        *w = (struct walk){.gpa = gpa, .size = 4096, .read = true, .write = true, .exec = true, .dirty = true, .user = true, .writable = true};
        return true;
    }
    uint64_t entry_gpa[5], entry[5];
    uint64_t reserved = ~((1ull << c->phys_bits) - 1) & 0x000ffffffffff000ull;
    bool wide = c->cr4 & CR4_PAE, nxe = c->efer & EFER_NXE;
    if (!nxe)
        reserved |= PTE_NX;
    unsigned level, n;
    uint64_t table, base = 0, rights, size = 4096;
again:
    n = 0;
    rights = PTE_W | PTE_U;
    w->error = 0;
    if (!wide) {
        level = 2;
        table = c->cr3 & 0xfffff000;
    } else if (!long_mode(c)) {
        level = 2;
        uint64_t pdpte = c->pdpte[lin >> 30 & 3];
        if (!(pdpte & 1))
            goto fault;
        table = pdpte & ((1ull << c->phys_bits) - 1) & PAGE_MASK_4K;
    } else {
        level = c->cr4 & CR4_LA57 ? 5 : 4;
        table = c->cr3 & ((1ull << c->phys_bits) - 1) & PAGE_MASK_4K;
    }
    for (;; level--) {
        unsigned shift = wide ? 12 + 9 * (level - 1) : 12 + 10 * (level - 1);
        uint64_t gpa = wide ? table + (lin >> shift & 511) * 8 : table + (lin >> shift & 1023) * 4;
        uint64_t e = read_entry(c, gpa, wide);
        entry_gpa[n] = gpa;
        entry[n++] = e;
        if (!(e & PTE_P))
            goto fault;
        bool leaf = level == 1;
        uint64_t bad = wide ? reserved : 0;
        if (wide && !long_mode(c))
            bad |= 0x7ff0000000000000ull;
        if (level > 1 && (e & PTE_PS)) {
            if (!wide ? (c->cr4 & CR4_PSE) != 0 : level == 2 || level == 3) {
                leaf = true;
                size = 1ull << shift;
                bad |= wide ? (size - 1) & ~0x1fffull : 0x3fe000 & ~((((1ull << c->phys_bits) - 1) >> 32) << 13);
            } else if (wide) {
                bad |= PTE_PS;
            }
        }
        if (e & bad) {
            w->error = PF_P | PF_RSVD;
            goto fault;
        }
        rights &= (e & (PTE_W | PTE_U)) | ~(PTE_W | PTE_U);
        rights |= wide ? e & PTE_NX : 0;
        if (leaf) {
            if (!wide && level == 2)
                base = (e & 0xffc00000) | (e >> 13 & 0xff) << 32;
            else
                base = e & 0x000ffffffffff000ull & ~(size - 1);
            w->global = (e & PTE_G) && (c->cr4 & CR4_PGE);
            break;
        }
        table = wide ? e & 0x000ffffffffff000ull : e & 0xfffff000;
    }
    bool upage = rights & PTE_U;
    w->user = upage;
    w->writable = rights & PTE_W;
    if (user) {
        w->read = upage;
        w->write = upage && (rights & PTE_W);
        w->exec = upage && !(rights & PTE_NX);
    } else {
        bool smap = upage && (c->cr4 & CR4_SMAP) && mmu == MMU_KERNEL;
        w->read = !smap;
        w->write = !smap && ((rights & PTE_W) || !(c->cr0 & CR0_WP));
        w->exec = !(rights & PTE_NX) && !(upage && (c->cr4 & CR4_SMEP));
    }
    bool pk_fault = false;
    if (upage && (c->cr4 & CR4_PKE) && long_mode(c)) {
        unsigned key = entry[n - 1] >> 59 & 15;
        bool ad = c->pkru >> (2 * key) & 1, wd = c->pkru >> (2 * key + 1) & 1;
        bool wdeny = ad || (wd && (user || (c->cr0 & CR0_WP)));
        pk_fault = access == ACCESS_READ ? ad : access == ACCESS_WRITE ? wdeny : false;
        w->read = w->read && !ad;
        w->write = w->write && !wdeny;
    }
    if (access == ACCESS_READ ? !w->read : access == ACCESS_WRITE ? !w->write : !w->exec) {
        w->error = PF_P | (pk_fault ? PF_PK : 0);
        goto fault;
    }
    w->gpa = (base | (lin & (size - 1))) & PAGE_MASK_4K;
    w->size = size;
    if (!peek) {
        for (unsigned i = 0; i < n; i++) {
            uint64_t bits = PTE_A | (i == n - 1 && access == ACCESS_WRITE ? PTE_D : 0);
            if (!set_bits(c, entry_gpa[i], entry[i], bits, wide))
                goto again;
        }
    }
    w->dirty = (entry[n - 1] & PTE_D) || access == ACCESS_WRITE;
    return true;
fault:
    if (access == ACCESS_WRITE)
        w->error |= PF_W;
    if (user)
        w->error |= PF_U;
    if (access == ACCESS_EXEC && (nxe || (c->cr4 & CR4_SMEP)))
        w->error |= PF_I;
    return false;
}

bool cpu_translate(struct cpu *c, uint64_t lin, uint64_t *gpa, bool *writable, bool *user)
{
    struct walk w;
    if (long_mode(c) && !canonical(c, lin))
        return false;
    if (!walk(c, lin, ACCESS_READ, MMU_KERNEL_AC, true, &w))
        return false;
    *gpa = w.gpa | (lin & 0xfff);
    *writable = w.writable;
    *user = w.user;
    return true;
}

static void not_canonical(struct cpu *c, const struct uop *u, int stack)
{
    cpu_fault_code(c, u, stack || (u && u->seg == SEG_SS && u->len) ? EXC_SS : EXC_GP, 0);
}

struct place { uint8_t *host; uint64_t gpa; struct page_info page; };

/* Translates one byte's page and fills the TLB entry. */
static struct place place_of(struct cpu *c, int mmu, const struct uop *u, uint64_t lin, enum access access, int stack)
{
    struct walk w;
    struct place p;
    c->stat.tlb_miss++;
    if (!long_mode(c))
        lin = (uint32_t)lin;
    else if (unlikely(!canonical(c, lin)))
        not_canonical(c, u, stack);
    if (!walk(c, lin, access, mmu, false, &w)) {
        c->cr2 = lin;
        cpu_fault_code(c, u, EXC_PF, w.error);
    }
    tcg_phys_to_host(c->vm, w.gpa, &p.page);
    p.gpa = w.gpa | (lin & 0xfff);
    p.host = p.page.host ? p.page.host + (lin & 0xfff) : NULL;
    if (!p.host)
        return p;
    if (access == ACCESS_WRITE && (p.page.flags & PAGE_READONLY)) {
        p.host = NULL; /* a write to a read-only slot is MMIO */
        return p;
    }
    if (access == ACCESS_WRITE && (p.page.flags & PAGE_LOG))
        tcg_mark_dirty(c, w.gpa);
    struct tlb *t = &c->tlbs[mmu];
    unsigned i = lin >> 12 & (TLB_SIZE - 1);
    struct tlb_entry *e = &t->e[i];
    uint64_t page = lin & PAGE_MASK_4K;
    bool code = p.page.code && atomic_load_explicit(p.page.code, memory_order_relaxed);
    bool wr = w.write && w.dirty && !code && !(p.page.flags & PAGE_READONLY) && (access == ACCESS_WRITE || !(p.page.flags & PAGE_LOG));
    e->addend = (uintptr_t)p.page.host - page;
    e->rd = w.read ? page : TLB_INVALID;
    e->wr = wr ? page : TLB_INVALID;
    e->ex = w.exec ? page : TLB_INVALID;
    if (mmu == MMU_USER_AC || c->watching)
        e->rd = e->wr = TLB_INVALID;
    t->info[i] = (struct tlb_info){.gpa = w.gpa};
    t->used[i / 64] |= 1ull << i % 64;
    if (w.global)
        t->local[i / 64] &= ~(1ull << i % 64);
    else
        t->local[i / 64] |= 1ull << i % 64;
    if (w.size > 4096) {
        uint64_t lo = lin & ~(w.size - 1), hi = lo + w.size - 1;
        if (t->large_hi < t->large_lo) {
            t->large_lo = lo;
            t->large_hi = hi;
        } else {
            t->large_lo = lo < t->large_lo ? lo : t->large_lo;
            t->large_hi = hi > t->large_hi ? hi : t->large_hi;
        }
    }
    return p;
}

uint8_t *mmu_fetch(struct cpu *c, uint64_t lin, uint64_t *gpa)
{
    int mmu = c->cpl == 3 ? MMU_USER : MMU_KERNEL;
    struct tlb *t = &c->tlbs[mmu];
    unsigned i = lin >> 12 & (TLB_SIZE - 1);
    if (t->e[i].ex == (lin & PAGE_MASK_4K)) {
        *gpa = t->info[i].gpa | (lin & 0xfff);
        return (uint8_t *)(lin + t->e[i].addend);
    }
    struct place p = place_of(c, mmu, NULL, lin, ACCESS_EXEC, 0);
    *gpa = p.gpa;
    return p.host;
}

static int mmu_index(const struct cpu *c) { return (int)(c->tlb - c->tlbs); }

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
        struct place p = place_of(c, mmu, u, lin, ACCESS_READ, stack);
        if (unlikely(c->watching))
            watch(c, lin, size, false);
        return read_place(c, u, &p, size);
    }
    struct place a = place_of(c, mmu, u, lin, ACCESS_READ, stack);
    struct place b = place_of(c, mmu, u, wrap(c, lin + first), ACCESS_READ, stack);
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
        struct place p = place_of(c, mmu, u, lin, ACCESS_WRITE, stack);
        if (unlikely(c->watching))
            watch(c, lin, size, true);
        write_place(c, u, &p, size, value);
        return;
    }
    struct place a = place_of(c, mmu, u, lin, ACCESS_WRITE, stack);
    struct place b = place_of(c, mmu, u, wrap(c, lin + first), ACCESS_WRITE, stack);
    write_place(c, u, &a, first, value & ((1ull << 8 * first) - 1));
    write_place(c, u, &b, size - first, value >> 8 * first);
}

uint64_t mem_read_slow(struct cpu *c, const struct uop *u, uint64_t lin, unsigned size, int stack)
{
    return mode_read(c, mmu_index(c), u, lin, size, stack);
}
void mem_write_slow(struct cpu *c, const struct uop *u, uint64_t lin, unsigned size, uint64_t value, int stack)
{
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
    place_of(c, MMU_KERNEL, u, wrap(c, lin), ACCESS_WRITE, 0);
    if ((lin & 0xfff) + size > 4096)
        place_of(c, MMU_KERNEL, u, wrap(c, (lin + size - 1) & PAGE_MASK_4K), ACCESS_WRITE, 0);
}

void mem_check_write(struct cpu *c, const struct uop *u, uint64_t lin, unsigned size, int stack)
{
    check_alignment(c, u, lin, size, mmu_index(c));
    place_of(c, mmu_index(c), u, wrap(c, lin), ACCESS_WRITE, stack);
    if ((lin & 0xfff) + size > 4096)
        place_of(c, mmu_index(c), u, wrap(c, (lin + size - 1) & PAGE_MASK_4K), ACCESS_WRITE, stack);
}

uint64_t ld_rmw(struct cpu *c, const struct uop *u, uint64_t lin, unsigned size)
{
    mem_check_write(c, u, lin, size, 0);
    return mem_read_slow(c, u, lin, size, 0);
}

uint8_t *rmw_host_slow(struct cpu *c, const struct uop *u, uint64_t lin, unsigned size)
{
    check_alignment(c, u, lin, size, mmu_index(c));
    if ((lin & 0xfff) + size > 4096)
        return NULL;
    struct place p = place_of(c, mmu_index(c), u, wrap(c, lin), ACCESS_WRITE, 0);
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
    int mmu = mmu_index(c);
    lin = wrap(c, lin);
    unsigned first = 4096 - (lin & 0xfff);
    struct place p = place_of(c, mmu, u, lin, ACCESS_READ, 0), q = p;
    if (unlikely(c->watching))
        watch(c, lin, size, false);
    if (first < size)
        q = place_of(c, mmu, u, wrap(c, lin + first), ACCESS_READ, 0);
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
    int mmu = mmu_index(c);
    lin = wrap(c, lin);
    unsigned first = 4096 - (lin & 0xfff);
    struct place p = place_of(c, mmu, u, lin, ACCESS_WRITE, 0), q = p;
    if (unlikely(c->watching))
        watch(c, lin, size, true);
    if (first < size)
        q = place_of(c, mmu, u, wrap(c, lin + first), ACCESS_WRITE, 0);
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

/* Segment base, address-size wrap, limits and types: whatever is not plain 64-bit addressing. */
uint64_t ea_slow(struct cpu *c, const struct uop *u, uint64_t a)
{
    if (u->aflags & EA_A32)
        a = (uint32_t)a;
    else if (u->aflags & EA_A16)
        a = (uint16_t)a;
    if (!(u->aflags & EA_SEG))
        return a;
    if (u->aflags & EA_CHECK) {
        const struct segment *s = &c->seg[u->seg];
        unsigned vector = u->seg == SEG_SS ? EXC_SS : EXC_GP;
        bool bad = s->attr & ATTR_UNUSABLE;
        if ((s->attr & 0xc) == 4) /* expand down: (limit, 64K or 4G) */
            bad |= a <= s->limit || a > (s->attr & ATTR_DB ? 0xffffffff : 0xffff);
        else
            bad |= a > s->limit;
        if (unlikely(bad))
            cpu_fault_code(c, u, vector, 0);
        return (uint32_t)(a + c->segbase[u->seg]);
    }
    return a + c->segbase[u->seg];
}

static void drop(struct tlb *t, unsigned i)
{
    t->e[i].rd = t->e[i].wr = t->e[i].ex = TLB_INVALID;
    t->used[i / 64] &= ~(1ull << i % 64);
    t->local[i / 64] &= ~(1ull << i % 64);
}

static void flush(struct tlb *t, bool global_too)
{
    for (unsigned w = 0; w < TLB_SIZE / 64; w++)
        for (uint64_t bits = global_too ? t->used[w] : t->local[w]; bits; bits &= bits - 1)
            drop(t, w * 64 + (unsigned)__builtin_ctzll(bits));
    if (global_too) {
        t->large_lo = 1;
        t->large_hi = 0;
    }
}

void cpu_flush_tlb(struct cpu *c)
{
    c->stat.flushes++;
    for (unsigned m = 0; m < MMU_COUNT; m++)
        flush(&c->tlbs[m], true);
    memset(c->pt_cache, 0, sizeof c->pt_cache);
}

void mmu_flush_local(struct cpu *c)
{
    c->stat.flushes++;
    for (unsigned m = 0; m < MMU_COUNT; m++)
        flush(&c->tlbs[m], false);
}

void mmu_invlpg(struct cpu *c, uint64_t lin)
{
    lin = wrap(c, lin);
    for (unsigned m = 0; m < MMU_COUNT; m++) {
        struct tlb *t = &c->tlbs[m];
        if (lin >= t->large_lo && lin <= t->large_hi)
            flush(t, true);
        else
            drop(t, lin >> 12 & (TLB_SIZE - 1));
    }
}

void mmu_protect_code(struct cpu *c, uint64_t gpa)
{
    gpa &= PAGE_MASK_4K;
    for (unsigned m = 0; m < MMU_COUNT; m++)
        for (unsigned w = 0; w < TLB_SIZE / 64; w++)
            for (uint64_t bits = c->tlbs[m].used[w]; bits; bits &= bits - 1) {
                unsigned i = w * 64 + (unsigned)__builtin_ctzll(bits);
                if (c->tlbs[m].info[i].gpa == gpa)
                    c->tlbs[m].e[i].wr = TLB_INVALID;
            }
}

bool mmu_load_pdptes(struct cpu *c, uint64_t cr3)
{
    uint64_t e[4], bad = ~((1ull << c->phys_bits) - 1) | 0x1e6;
    for (unsigned i = 0; i < 4; i++) {
        e[i] = read_entry(c, (cr3 & 0xffffffe0) + 8 * i, true);
        if ((e[i] & 1) && (e[i] & bad))
            return false;
    }
    memcpy(c->pdpte, e, sizeof e);
    return true;
}
