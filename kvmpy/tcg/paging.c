/* SPDX-License-Identifier: Apache-2.0
 *
 * Page walks: 32-bit, PAE, 4-level and 5-level paging, SDM vol. 3A chapter 4.
 *
 * The rights of all levels are combined, then checked; A (and D) are set only when the access is allowed, with a
 * compare-and-swap on the entry, since other vCPUs walk the same tables. The walker finds page-table pages in host
 * memory through a small cache.
 *
 * Walk starts (paging-structure caches in SDM vol. 3A 4.10.3): in 64-bit mode the last table of a walk, or the large
 * page, is remembered for 2 MiB of linear addresses, with the rights of the levels above. The next walk there reads one
 * entry or none. MOV CR3 and INVLPG end all of them that are not global large pages, a whole flush ends all.
 */
#include "mmu.h"

#define PTE_P 1ull
#define PTE_W 2ull
#define PTE_U 4ull
#define PTE_A 0x20ull
#define PTE_D 0x40ull
#define PTE_PS 0x80ull
#define PTE_G 0x100ull
#define PTE_NX (1ull << 63)
enum { PF_P = 1, PF_W = 2, PF_U = 4, PF_RSVD = 8, PF_I = 16, PF_PK = 32 };

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

void walks_forget(struct cpu *c, bool global_too)
{
    c->walk_stamp[false] = ++c->walk_stamps;
    if (global_too) {
        c->walk_stamp[true] = ++c->walk_stamps;
        c->walks_huge = false;
    }
}

static struct walk_start *start_of(struct cpu *c, uint64_t lin) { return &c->walks[lin >> 21 & (WALK_CACHE - 1)]; }

void walks_invlpg(struct cpu *c, uint64_t lin)
{
    start_of(c, lin)->stamp = 0;
    walks_forget(c, c->walks_huge);
}

/* A walk on its way down. */
struct path {
    uint64_t gpa[5], entry[5]; /* entries read, the leaf last */
    unsigned n, level;
    uint64_t table;            /* the next one */
    uint64_t rights, above;    /* W, U and NX of all levels; of those before the last */
    uint64_t base;             /* of the page */
    bool known;                /* the leaf is a remembered large page */
};

/* Where to begin: at a walk start or at the root. false: PAE paging has no table there. */
static bool begin(struct cpu *c, uint64_t lin, enum access access, bool peek, struct path *p, struct walk *w)
{
    p->n = 0;
    p->known = false;
    p->table = 0;
    p->rights = p->above = PTE_W | PTE_U;
    w->error = 0;
    w->shift = 12;
    if (likely(long_mode(c)) && !peek) {
        const struct walk_start *s = start_of(c, lin);
        if (s->tag == lin >> 21 && s->stamp == c->walk_stamp[s->global]) {
            if (s->host) {
                p->rights = s->rights;
                p->table = s->entry;
                p->level = 1;
                return true;
            }
            if (access != ACCESS_WRITE || s->entry & PTE_D) { /* else D must be set in memory */
                p->rights = s->rights;
                p->entry[p->n++] = s->entry;
                w->shift = s->shift;
                w->global = s->global;
                p->base = s->entry & 0x000ffffffffff000ull & ~((1ull << s->shift) - 1);
                p->known = true;
                return true;
            }
        }
    }
    c->stat.walks++;
    if (!(c->cr4 & CR4_PAE)) {
        p->level = 2;
        p->table = c->cr3 & 0xfffff000;
    } else if (!long_mode(c)) {
        uint64_t pdpte = c->pdpte[lin >> 30 & 3];
        p->level = 2;
        p->table = pdpte & ((1ull << c->phys_bits) - 1) & PAGE_MASK_4K;
        return pdpte & 1;
    } else {
        p->level = c->cr4 & CR4_LA57 ? 5 : 4;
        p->table = c->cr3 & ((1ull << c->phys_bits) - 1) & PAGE_MASK_4K;
    }
    return true;
}

/* Down to the leaf. false: not present, or reserved bits are set. */
static bool descend(struct cpu *c, uint64_t lin, struct path *p, struct walk *w)
{
    bool wide = c->cr4 & CR4_PAE;
    uint64_t reserved = ~((1ull << c->phys_bits) - 1) & 0x000ffffffffff000ull;
    if (!(c->efer & EFER_NXE))
        reserved |= PTE_NX;
    for (;; p->level--) {
        unsigned level = p->level, shift = wide ? 12 + 9 * (level - 1) : 12 + 10 * (level - 1);
        uint64_t gpa = wide ? p->table + (lin >> shift & 511) * 8 : p->table + (lin >> shift & 1023) * 4;
        uint64_t e = read_entry(c, gpa, wide);
        p->gpa[p->n] = gpa;
        p->entry[p->n++] = e;
        if (!(e & PTE_P))
            return false;
        bool leaf = level == 1;
        uint64_t bad = wide ? reserved : 0;
        if (wide && !long_mode(c))
            bad |= 0x7ff0000000000000ull;
        if (level > 1 && (e & PTE_PS)) {
            if (!wide ? (c->cr4 & CR4_PSE) != 0 : level == 2 || level == 3) {
                leaf = true;
                w->shift = shift;
                bad |= wide ? ((1ull << shift) - 1) & ~0x1fffull : 0x3fe000 & ~((((1ull << c->phys_bits) - 1) >> 32) << 13);
            } else if (wide) {
                bad |= PTE_PS;
            }
        }
        if (e & bad) {
            w->error = PF_P | PF_RSVD;
            return false;
        }
        p->above = p->rights;
        p->rights &= (e & (PTE_W | PTE_U)) | ~(PTE_W | PTE_U);
        p->rights |= wide ? e & PTE_NX : 0;
        if (leaf) {
            if (!wide && level == 2)
                p->base = (e & 0xffc00000) | (e >> 13 & 0xff) << 32;
            else
                p->base = e & 0x000ffffffffff000ull & ~((1ull << w->shift) - 1);
            w->global = (e & PTE_G) && (c->cr4 & CR4_PGE);
            return true;
        }
        p->table = wide ? e & 0x000ffffffffff000ull : e & 0xfffff000;
    }
}

/* What this mode may do there, and whether that includes `access`. */
static bool permit(struct cpu *c, enum access access, int mmu, const struct path *p, struct walk *w)
{
    bool user = mmu == MMU_USER || mmu == MMU_USER_AC, upage = p->rights & PTE_U, writable = p->rights & PTE_W;
    w->user = upage;
    w->writable = writable;
    if (user) {
        w->read = upage;
        w->write = upage && writable;
        w->exec = upage && !(p->rights & PTE_NX);
    } else {
        bool smap = upage && (c->cr4 & CR4_SMAP) && mmu == MMU_KERNEL;
        w->read = !smap;
        w->write = !smap && (writable || !(c->cr0 & CR0_WP));
        w->exec = !(p->rights & PTE_NX) && !(upage && (c->cr4 & CR4_SMEP));
    }
    bool pk_fault = false;
    w->key = 0;
    if (upage && (c->cr4 & CR4_PKE) && long_mode(c)) {
        unsigned key = p->entry[p->n - 1] >> 59 & 15;
        bool ad = c->pkru >> (2 * key) & 1, wd = c->pkru >> (2 * key + 1) & 1;
        bool wdeny = ad || (wd && (user || (c->cr0 & CR0_WP)));
        pk_fault = access == ACCESS_READ ? ad : access == ACCESS_WRITE ? wdeny : false;
        w->read = w->read && !ad;
        w->write = w->write && !wdeny;
        w->key = (uint8_t)(1 + key);
    }
    if (access == ACCESS_READ ? w->read : access == ACCESS_WRITE ? w->write : w->exec)
        return true;
    w->error = PF_P | (pk_fault ? PF_PK : 0);
    return false;
}

/* Sets A, and D for a write, in the entries that were read. false: one of them changed meanwhile. */
static bool mark_used(struct cpu *c, enum access access, const struct path *p)
{
    bool wide = c->cr4 & CR4_PAE;
    for (unsigned i = 0; i < p->n; i++) {
        uint64_t bits = PTE_A | (i == p->n - 1 && access == ACCESS_WRITE ? PTE_D : 0);
        if (!set_bits(c, p->gpa[i], p->entry[i], bits, wide))
            return false;
    }
    return true;
}

static void remember(struct cpu *c, uint64_t lin, const struct path *p, const struct walk *w)
{
    struct walk_start *s = start_of(c, lin);
    bool large = w->shift > 12;
    uint8_t *host = large ? NULL : table_host(c, p->table);
    s->stamp = 0;
    if (!large && !host)
        return;
    s->tag = lin >> 21;
    s->global = large && w->global;
    s->host = host;
    s->shift = (uint8_t)w->shift;
    s->rights = large ? p->rights : p->above;
    s->entry = large ? p->entry[p->n - 1] | PTE_A | (w->dirty ? PTE_D : 0) : p->table;
    s->stamp = c->walk_stamp[s->global];
    c->walks_huge |= w->shift > 21;
}

bool page_walk(struct cpu *c, uint64_t lin, enum access access, int mmu, bool peek, struct walk *w)
{
    struct path p;
    if (!(c->cr0 & CR0_PG)) {
        uint64_t gpa = (uint32_t)lin & PAGE_MASK_4K;
        *w = (struct walk){.gpa = gpa, .shift = 12, .read = true, .write = true, .exec = true, .dirty = true, .user = true, .writable = true};
        return true;
    }
    do {
        if (!begin(c, lin, access, peek, &p, w) || (!p.known && !descend(c, lin, &p, w)) || !permit(c, access, mmu, &p, w)) {
            if (access == ACCESS_WRITE)
                w->error |= PF_W;
            if (mmu == MMU_USER || mmu == MMU_USER_AC)
                w->error |= PF_U;
            if (access == ACCESS_EXEC && ((c->efer & EFER_NXE) || (c->cr4 & CR4_SMEP)))
                w->error |= PF_I;
            return false;
        }
    } while (!peek && !p.known && !mark_used(c, access, &p));
    w->gpa = (p.base | (lin & ((1ull << w->shift) - 1))) & PAGE_MASK_4K;
    w->dirty = (p.entry[p.n - 1] & PTE_D) || access == ACCESS_WRITE;
    if (p.n > 1 && !peek && long_mode(c))
        remember(c, lin, &p, w);
    return true;
}

bool cpu_translate(struct cpu *c, uint64_t lin, uint64_t *gpa, bool *writable, bool *user)
{
    struct walk w;
    if (long_mode(c) && !canonical(c, lin))
        return false;
    if (!page_walk(c, lin, ACCESS_READ, MMU_KERNEL_AC, true, &w))
        return false;
    *gpa = w.gpa | (lin & 0xfff);
    *writable = w.writable;
    *user = w.user;
    return true;
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
