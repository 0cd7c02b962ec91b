/* SPDX-License-Identifier: Apache-2.0
 *
 * Addresses that are more than base + index + displacement: address size, segment base, limit and type (SDM vol. 3A
 * 5.3 to 5.5).
 *
 * A limit is about the whole access, a type about whether it writes, and ea_slow() knows neither. It need not, unless
 * the address lies near the limit or the segment may not be written: then it points c->tlb to a softTLB in which
 * nothing ever hits. The access comes to mmu.c, which knows both and calls edge_check(). This lasts until an access by
 * another instruction, or anything else that sets c->tlb.
 */
#include "mmu.h"

#define WINDOW 4095u /* more than the largest access (XSAVE) */

#define EMPTY {TLB_INVALID, TLB_INVALID, TLB_INVALID, 0}
static const struct tlb edge = {.e = {[0 ... TLB_SIZE - 1] = EMPTY}, .large_lo = 1};

bool at_edge(const struct cpu *c) { return c->tlb == &edge; }

int mmu_index(const struct cpu *c) { return at_edge(c) ? c->edge.mmu : (int)(c->tlb - c->tlbs); }

static void leave_edge(struct cpu *c) { c->tlb = &c->tlbs[c->edge.mmu]; }

bool seg_holds(const struct segment *s, uint64_t off, uint64_t size)
{
    uint64_t last = off + size - 1;
    if (s->attr & ATTR_UNUSABLE)
        return false;
    if ((s->attr & (ATTR_S | 0xc)) == (ATTR_S | 4)) /* expand down: (limit, 64K or 4G) */
        return off > s->limit && last <= (s->attr & ATTR_DB ? 0xffffffff : 0xffff);
    return last <= s->limit || (s->limit == 0xffffffff && off <= s->limit); /* around 4G: as the processor likes */
}

static bool may(const struct cpu *c, const struct segment *s, bool write)
{
    if (real_or_vm86(c))
        return true; /* there types are not looked at */
    return s->attr & 8 ? !write && s->attr & 2 : !write || s->attr & 2;
}

static uint64_t linear(const struct cpu *c, int seg, uint64_t off) { return (uint32_t)(off + c->segbase[seg]); }

uint64_t seg_linear(struct cpu *c, const struct uop *u, int seg, uint64_t off, unsigned size, bool write)
{
    if (unlikely(!seg_holds(&c->seg[seg], off, size) || !may(c, &c->seg[seg], write)))
        cpu_fault_code(c, u, seg == SEG_SS ? EXC_SS : EXC_GP, 0);
    return linear(c, seg, off);
}

bool seg_can(const struct cpu *c, int seg, uint64_t off, uint64_t size, bool write)
{
    return seg_holds(&c->seg[seg], off, size) && may(c, &c->seg[seg], write);
}

uint64_t ea_slow(struct cpu *c, const struct uop *u, uint64_t a)
{
    if (u->aflags & EA_A32)
        a = (uint32_t)a;
    else if (u->aflags & EA_A16)
        a = (uint16_t)a;
    if (!(u->aflags & EA_SEG))
        return a;
    if (!(u->aflags & EA_CHECK))
        return a + c->segbase[u->seg];
    a = (uint32_t)a;
    const struct segment *s = &c->seg[u->seg];
    if (likely(seg_holds(s, a, WINDOW) && may(c, s, true)))
        return linear(c, u->seg, a);
    seg_linear(c, u, u->seg, a, 1, false);
    if (!at_edge(c))
        c->edge.mmu = (uint8_t)mmu_index(c);
    c->edge.u = u;
    c->tlb = (struct tlb *)&edge; /* never written: tlb_fill() goes by mmu_index() */
    return linear(c, u->seg, a);
}

void edge_check(struct cpu *c, const struct uop *u, uint64_t lin, unsigned size, bool write)
{
    if (!u || c->edge.u != u) {
        leave_edge(c); /* it was another instruction that came near a limit */
        return;
    }
    seg_linear(c, u, u->seg, (uint32_t)(lin - c->segbase[u->seg]), size, write);
}
