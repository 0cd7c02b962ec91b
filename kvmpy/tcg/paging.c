/* SPDX-License-Identifier: Apache-2.0
 *
 * Page walks: 32-bit, PAE, 4-level and 5-level paging, SDM vol. 3A chapter 4.
 *
 * The rights of all levels are combined, then checked; A (and D) are set only when the access is allowed, with a
 * compare-and-swap on the entry, since other vCPUs walk the same tables. The walker finds page-table pages in host
 * memory through a small cache.
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

bool page_walk(struct cpu *c, uint64_t lin, enum access access, int mmu, bool peek, struct walk *w)
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
