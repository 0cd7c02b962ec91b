/* SPDX-License-Identifier: Apache-2.0
 *
 * The softTLB.
 *
 * There are four by access mode: user, supervisor, supervisor with EFLAGS.AC (SMAP is off for it) and user with
 * alignment checking (whose tags never match, so that every access is looked at). c->tlb points to the one for data
 * at the present CPL, c->xtlb to the one for code. An entry has a tag per kind of access. All three are filled from one
 * page walk, as far as the page allows; the write tag only
 *   - when D is set already (so the first write comes here and sets it),
 *   - when no vCPU has decoded code in the page (stores must see the granule bitmap),
 *   - when a dirty-logged page has been reported.
 *
 * Global entries live on over MOV CR3: `local` is a bitmap of the others, so that a flush visits only used entries.
 * One large page is many entries: `large` is a bitmap of such, and INVLPG inside their range looks for its parts there.
 */
#include "jit.h"
#include "mmu.h"

static void not_canonical(struct cpu *c, const struct uop *u, int stack)
{
    cpu_fault_code(c, u, stack || (u && u->seg == SEG_SS && u->len) ? EXC_SS : EXC_GP, 0);
}

void tlb_large(struct tlb *t, uint64_t lo, uint64_t hi)
{
    if (t->large_hi < t->large_lo) {
        t->large_lo = lo;
        t->large_hi = hi;
    } else {
        t->large_lo = lo < t->large_lo ? lo : t->large_lo;
        t->large_hi = hi > t->large_hi ? hi : t->large_hi;
    }
}

struct place tlb_fill(struct cpu *c, int mmu, const struct uop *u, uint64_t lin, enum access access, int stack)
{
    struct walk w;
    struct place p;
    c->stat.tlb_miss++;
    if (!long_mode(c))
        lin = (uint32_t)lin;
    else if (unlikely(!canonical(c, lin)))
        not_canonical(c, u, stack);
    if (!page_walk(c, lin, access, mmu, false, &w)) {
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
    t->info[i] = (struct tlb_info){.gpa = w.gpa, .shift = (uint8_t)w.shift, .key = w.key};
    t->used[i / 64] |= 1ull << i % 64;
    if (w.global)
        t->local[i / 64] &= ~(1ull << i % 64);
    else
        t->local[i / 64] |= 1ull << i % 64;
    t->large[i / 64] &= ~(1ull << i % 64);
    if (w.shift > 12) {
        uint64_t lo = lin >> w.shift << w.shift;
        t->large[i / 64] |= 1ull << i % 64;
        tlb_large(t, lo, lo + (1ull << w.shift) - 1);
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
    struct place p = tlb_fill(c, mmu, NULL, lin, ACCESS_EXEC, 0);
    *gpa = p.gpa;
    return p.host;
}

static void drop(struct tlb *t, unsigned i)
{
    t->e[i].rd = t->e[i].wr = t->e[i].ex = TLB_INVALID;
    t->used[i / 64] &= ~(1ull << i % 64);
    t->local[i / 64] &= ~(1ull << i % 64);
    t->large[i / 64] &= ~(1ull << i % 64);
}

/* The linear page of an entry: whichever tag is valid. */
static uint64_t page_of(const struct tlb_entry *e)
{
    uint64_t page = e->rd & TLB_INVALID ? e->wr & TLB_INVALID ? e->ex : e->wr : e->rd;
    return page & PAGE_MASK_4K;
}

/* All parts of the large page that has `lin`. */
static void drop_large(struct tlb *t, uint64_t lin)
{
    for (unsigned w = 0; w < TLB_SIZE / 64; w++)
        for (uint64_t bits = t->large[w]; bits; bits &= bits - 1) {
            unsigned i = w * 64 + (unsigned)__builtin_ctzll(bits);
            if (!((page_of(&t->e[i]) ^ lin) >> t->info[i].shift))
                drop(t, i);
        }
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
    jit_forget_addresses(c, true);
    pcid_forget_all(c);
    memset(c->pt_cache, 0, sizeof c->pt_cache);
    walks_forget(c, true);
}

void mmu_flush_local(struct cpu *c)
{
    c->stat.flushes++;
    for (unsigned m = 0; m < MMU_COUNT; m++)
        flush(&c->tlbs[m], false);
    jit_forget_addresses(c, false);
    walks_forget(c, false);
}

void mmu_invlpg(struct cpu *c, uint64_t lin)
{
    lin = long_mode(c) ? lin : (uint32_t)lin;
    for (unsigned m = 0; m < MMU_COUNT; m++) {
        struct tlb *t = &c->tlbs[m];
        if (lin >= t->large_lo && lin <= t->large_hi) {
            drop_large(t, lin);
            jit_forget_addresses(c, true);
        }
        drop(t, lin >> 12 & (TLB_SIZE - 1));
    }
    walks_invlpg(c, lin);
    jit_forget_page(c, lin);
}

void tlb_new_rights(struct tlb_entry *e, const struct tlb_info *info, uint32_t changed)
{
    if (info->key && changed >> 2 * (info->key - 1) & 3)
        e->rd = e->wr = TLB_INVALID;
}

/* PKRU guards loads and stores, not code (SDM vol. 3A, 4.6.2). Linux writes it at every fork and exec. */
void cpu_set_pkru(struct cpu *c, uint32_t value)
{
    uint32_t changed = c->pkru ^ value;
    c->pkru = value;
    if (!changed)
        return;
    for (unsigned m = 0; m < MMU_COUNT; m++)
        for (unsigned w = 0; w < TLB_SIZE / 64; w++)
            for (uint64_t bits = c->tlbs[m].used[w]; bits; bits &= bits - 1) {
                unsigned i = w * 64 + (unsigned)__builtin_ctzll(bits);
                tlb_new_rights(&c->tlbs[m].e[i], &c->tlbs[m].info[i], changed);
            }
    pcid_new_rights(c, changed);
}

void mmu_protect_code(struct cpu *c, uint64_t gpa)
{
    gpa &= PAGE_MASK_4K;
    pcid_protect_code(c, gpa);
    for (unsigned m = 0; m < MMU_COUNT; m++)
        for (unsigned w = 0; w < TLB_SIZE / 64; w++)
            for (uint64_t bits = c->tlbs[m].used[w]; bits; bits &= bits - 1) {
                unsigned i = w * 64 + (unsigned)__builtin_ctzll(bits);
                if (c->tlbs[m].info[i].gpa == gpa)
                    c->tlbs[m].e[i].wr = TLB_INVALID;
            }
}
