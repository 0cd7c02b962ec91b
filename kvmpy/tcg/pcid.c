/* SPDX-License-Identifier: Apache-2.0
 *
 * Process-context identifiers, SDM vol. 3A 4.10.1: what the softTLB holds of address spaces that are not loaded now.
 *
 * The softTLB itself knows one address space. When MOV CR3 goes to another PCID, the entries that are not global move
 * into a bag of the old one; when it comes back with bit 63 set, the bag is emptied into the softTLB again. There are a
 * few bags per vCPU, the one that was left longest ago makes room. Losing a bag is always allowed, so everything that
 * is rare just drops them. Entries in a bag count as cached: whoever revokes a write tag must look here too.
 */
#include "jit.h"
#include "mmu.h"

#include <stdlib.h>

#define BAGS 6u         /* Linux uses as many PCIDs per processor */
#define BAG_SIZE 256u   /* entries beyond these are forgotten */

struct kept {
    struct tlb_entry e;
    struct tlb_info info;
    uint16_t mmu, index;
};
struct bag {
    uint16_t pcid, count;
    bool full;
    struct jit_parked proved;
    uint64_t age, large_lo[MMU_COUNT], large_hi[MMU_COUNT];
    struct kept kept[BAG_SIZE];
};
struct pcid_bags {
    uint64_t clock;
    struct bag bag[BAGS];
};

static struct bag *find(struct cpu *c, unsigned pcid)
{
    for (unsigned i = 0; c->pcid_bags && i < BAGS; i++)
        if (c->pcid_bags->bag[i].full && c->pcid_bags->bag[i].pcid == pcid)
            return &c->pcid_bags->bag[i];
    return NULL;
}

void pcid_forget(struct cpu *c, unsigned pcid)
{
    struct bag *b = find(c, pcid);
    if (b)
        b->full = false;
}

void pcid_forget_all(struct cpu *c)
{
    for (unsigned i = 0; c->pcid_bags && i < BAGS; i++)
        c->pcid_bags->bag[i].full = false;
}

void pcid_free(struct cpu *c)
{
    free(c->pcid_bags);
    c->pcid_bags = NULL;
}

/* The entries of the address space that is left; they stay in the softTLB too, the caller drops them. */
static void keep(struct cpu *c, unsigned pcid)
{
    if (!c->pcid_bags)
        c->pcid_bags = calloc(1, sizeof *c->pcid_bags);
    if (!c->pcid_bags)
        return;
    struct bag *b = find(c, pcid);
    for (unsigned i = 0; !b && i < BAGS; i++)
        if (!c->pcid_bags->bag[i].full)
            b = &c->pcid_bags->bag[i];
    if (!b) {
        b = &c->pcid_bags->bag[0];
        for (unsigned i = 1; i < BAGS; i++)
            if (c->pcid_bags->bag[i].age < b->age)
                b = &c->pcid_bags->bag[i];
    }
    b->pcid = (uint16_t)pcid;
    b->full = true;
    b->age = ++c->pcid_bags->clock;
    b->proved = jit_park(c);
    b->count = 0;
    for (unsigned m = 0; m < MMU_COUNT; m++) {
        const struct tlb *t = &c->tlbs[m];
        b->large_lo[m] = t->large_lo;
        b->large_hi[m] = t->large_hi;
        for (unsigned w = 0; w < TLB_SIZE / 64; w++)
            for (uint64_t bits = t->local[w]; bits && b->count < BAG_SIZE; bits &= bits - 1) {
                unsigned i = w * 64 + (unsigned)__builtin_ctzll(bits);
                b->kept[b->count++] = (struct kept){t->e[i], t->info[i], (uint16_t)m, (uint16_t)i};
            }
    }
}

static void restore(struct cpu *c, unsigned pcid)
{
    struct bag *b = find(c, pcid);
    if (!b)
        return;
    b->full = false; /* the softTLB has them now, and INVLPG looks there only */
    jit_unpark(c, b->proved);
    for (unsigned n = 0; n < b->count; n++) {
        struct tlb *t = &c->tlbs[b->kept[n].mmu];
        unsigned i = b->kept[n].index;
        t->e[i] = b->kept[n].e;
        t->info[i] = b->kept[n].info;
        t->used[i / 64] |= 1ull << i % 64;
        t->local[i / 64] |= 1ull << i % 64;
        t->large[i / 64] &= ~(1ull << i % 64);
        if (t->info[i].shift > 12)
            t->large[i / 64] |= 1ull << i % 64;
    }
    for (unsigned m = 0; m < MMU_COUNT; m++)
        if (b->large_lo[m] <= b->large_hi[m])
            tlb_large(&c->tlbs[m], b->large_lo[m], b->large_hi[m]);
}

void pcid_switch(struct cpu *c, unsigned from, unsigned to, bool keep_to)
{
    if (from == to) {
        if (!keep_to)
            mmu_flush_local(c);
        return;
    }
    keep(c, from);
    mmu_flush_local(c);
    if (keep_to)
        restore(c, to);
    else
        pcid_forget(c, to);
}

void pcid_protect_code(struct cpu *c, uint64_t gpa)
{
    for (unsigned i = 0; c->pcid_bags && i < BAGS; i++)
        for (unsigned n = 0; c->pcid_bags->bag[i].full && n < c->pcid_bags->bag[i].count; n++)
            if (c->pcid_bags->bag[i].kept[n].info.gpa == gpa)
                c->pcid_bags->bag[i].kept[n].e.wr = TLB_INVALID;
}

void pcid_new_rights(struct cpu *c, uint32_t changed)
{
    for (unsigned i = 0; c->pcid_bags && i < BAGS; i++)
        for (unsigned n = 0; c->pcid_bags->bag[i].full && n < c->pcid_bags->bag[i].count; n++)
            tlb_new_rights(&c->pcid_bags->bag[i].kept[n].e, &c->pcid_bags->bag[i].kept[n].info, changed);
}
