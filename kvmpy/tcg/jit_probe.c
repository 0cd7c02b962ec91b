/* SPDX-License-Identifier: Apache-2.0
 *
 * Memory operands: addresses, and probes of the softTLB.
 *
 * A probe finds an entry by the first byte's address and compares its tag with the page of the last byte, so an access
 * that crosses pages misses. Where the offset in the page is known, one address does; where all is, the entry is known too.
 */
#include "jit_code.h"

#if HAVE_JIT

_Static_assert(sizeof(struct tlb_entry) == 32, "the probe computes an entry's place by shifts");

/* Neither base nor index in memory, no segment, no 32-bit wrap: one addressing mode says it. */
static bool plain(const struct uop *u)
{
    if (u->aflags || u->base == REG_BIP)
        return false;
    return (u->base == REG_ZERO || !homed(jit_guest(u->base))) && (u->index == REG_ZERO || !homed(jit_guest(u->index)));
}

bool jit_can_address(const struct emit *e, const struct decoded *d)
{
    const struct uop *u = &d->uop;
    int64_t disp = (int64_t)u->disp + (u->base == REG_BIP ? e->start : 0);
    if (d->has_prefix || u->aflags & (EA_CHECK | EA_A16) || u->base == REG_SCRATCH || disp > 0x7fffff00 || disp < -0x7fffff00)
        return false;
    if (u->base == REG_BIP)
        return u->index == REG_ZERO && !(u->aflags & EA_A32);
    return true;
}

/* One half of an address into a register: from where it lives, or where it is. */
unsigned jit_half(struct emit *e, uint8_t offset, unsigned tmp)
{
    if (!homed(jit_guest(offset)))
        return host_reg(jit_guest(offset));
    mov_load(&e->a, tmp, rm_abs(&e->c->gpr[jit_guest(offset)]));
    return tmp;
}

void jit_offset(struct emit *e, const struct uop *u, unsigned dst, unsigned other)
{
    bool wide = !(u->aflags & EA_A32);
    if (u->base == REG_BIP) {
        jit_address(&e->a, e, dst, u->disp + (int32_t)e->start);
    } else {
        unsigned base = NO_REG, index = NO_REG;
        if (u->base != REG_ZERO)
            base = jit_half(e, u->base, dst);
        if (u->index != REG_ZERO)
            index = jit_half(e, u->index, base == dst ? other : dst);
        lea(&e->a, wide, dst, rm_sib(base, index, u->scale, u->disp));
    }
}

/* The linear address. */
static void linear(struct emit *e, const struct uop *u, unsigned dst, unsigned other)
{
    jit_offset(e, u, dst, other);
    if (u->aflags & EA_SEG)
        put_insn(&e->a, 0, true, 0, 0x03, dst, rm_abs(&e->c->segbase[u->seg]), 0);
}

static size_t tag(bool write) { return write ? offsetof(struct tlb_entry, wr) : offsetof(struct tlb_entry, rd); }

/* Of the linear address in `from`, its low half will do: S0, counted from the softTLB's start. */
static void entry_of(struct emit *e, unsigned from)
{
    struct place_of_code *a = &e->a;
    if (from != S0 && e->j->rorx) {
        rorx(a, S0, from, 7);
    } else {
        if (from != S0)
            put_insn(a, 0, false, 0, 0x8b, S0, rm_reg(from), 0);
        shift_imm(a, false, 5, S0, 7);
    }
    alu_imm(a, false, 4, rm_reg(S0), (TLB_SIZE - 1) << 5);
}

/* S0: the entry, S1: what its tag must be. Then S0 is the addend. */
static void match(struct emit *e, bool write, struct slow *s)
{
    unsigned gs = e->j->gs ? P_GS : 0;
    put_insn(&e->a, gs, true, 0, 0x3b, S1, rm_mem(S0, (int32_t)tag(write)), 0);
    jit_slow_if(e, s, COND_NZ);
    put_insn(&e->a, gs, true, 0, 0x8b, S0, rm_mem(S0, offsetof(struct tlb_entry, addend)), 0);
}

void jit_look_up(struct emit *e, unsigned from, bool write, struct slow *s)
{
    struct place_of_code *a = &e->a;
    entry_of(e, from);
    if (!e->j->gs)
        put_insn(a, 0, true, 0, 0x03, S0, FIELD(e, tlb), 0);
    alu_imm(a, true, 4, rm_reg(S1), e->aligned ? -4096 | (int32_t)(e->aligned - 1) : -4096);
    match(e, write, s);
}

/* An address whose offset in its page is known, and so that it ends there: relative to RIP, or a constant. */
static bool fixed_place(const struct emit *e, const struct uop *u, unsigned size, int64_t *disp, bool *constant)
{
    int32_t known;
    *disp = (int64_t)u->disp + (u->base == REG_BIP ? e->start : 0);
    *constant = u->base == REG_ZERO;
    if (u->base == REG_BIP && jit_knows(e, *disp, &known)) {
        *disp = known;
        *constant = true;
    }
    return e->j->gs && (u->base == REG_BIP || u->base == REG_ZERO) && u->index == REG_ZERO && !u->aflags &&
           (*disp & 0xfff) + size <= 4096 && !(*disp & (e->aligned ? e->aligned - 1 : 0));
}

static struct rm look_up_fixed(struct emit *e, int64_t disp, bool constant, bool write, struct slow *s, bool want_s1)
{
    struct place_of_code *a = &e->a;
    int32_t page = (int32_t)(disp & ~0xfffll);
    if (constant) {
        int32_t entry = (int32_t)(((uint32_t)page >> 12 & (TLB_SIZE - 1)) << 5);
        put_insn(a, P_GS, true, 0, 0x81, 7, rm_disp(entry + (int32_t)tag(write)), 4); /* CMP tag, page */
        put4(a, (uint32_t)page);
        jit_slow_if(e, s, COND_NZ);
        put_insn(a, P_GS, true, 0, 0x8b, S0, rm_disp(entry + (int32_t)offsetof(struct tlb_entry, addend)), 0);
        return rm_mem(S0, (int32_t)disp);
    }
    mov_load(a, S1, FIELD(e, jit.page));
    if (page)
        alu_imm(a, true, 0, rm_reg(S1), page);
    entry_of(e, S1);
    match(e, write, s);
    if (!want_s1)
        return rm_sib(S0, S1, 0, (int32_t)(disp & 0xfff));
    put_insn(a, 0, true, 0, 0x03, S0, rm_reg(S1), 0);
    return rm_mem(S0, (int32_t)(disp & 0xfff));
}

struct rm jit_probe(struct emit *e, unsigned base, int32_t disp, unsigned size, bool write, struct slow *s)
{
    if (e->group)
        return rm_sib(base, S0, 0, disp);
    int32_t last = disp + (e->aligned ? 0 : (int32_t)size - 1);
    if (last)
        lea(&e->a, true, S1, rm_mem(base, last));
    else
        mov_rr(&e->a, S1, base);
    if (disp)
        lea(&e->a, false, S0, rm_mem(base, disp));
    jit_look_up(e, disp ? S0 : base, write, s);
    return rm_sib(base, S0, 0, disp);
}

struct rm jit_operand(struct emit *e, const struct decoded *d, unsigned size, bool write, struct slow *s, bool want_s1)
{
    const struct uop *u = &d->uop;
    struct place_of_code *a = &e->a;
    if (plain(u) && u->index == REG_ZERO && u->base != REG_ZERO)
        return jit_probe(e, host_reg(jit_guest(u->base)), u->disp, size, write, s);
    int64_t disp;
    bool constant;
    if (fixed_place(e, u, size, &disp, &constant))
        return look_up_fixed(e, disp, constant, write, s, want_s1);
    bool both = u->base < REG_ZERO && u->index < REG_ZERO && homed(jit_guest(u->base)) && homed(jit_guest(u->index));
    linear(e, u, S0, S1);
    if (both)
        mov_store(a, FIELD(e, scratch[2]), S0);
    if (e->aligned || size == 1)
        mov_rr(a, S1, S0);
    else
        lea(a, true, S1, rm_mem(S0, (int32_t)size - 1));
    jit_look_up(e, S0, write, s);
    if (both)
        mov_load(a, S1, FIELD(e, scratch[2]));
    else
        linear(e, u, S1, S1);
    if (!want_s1)
        return rm_sib(S0, S1, 0, 0);
    put_insn(a, 0, true, 0, 0x03, S0, rm_reg(S1), 0);
    return rm_mem(S0, 0);
}
#endif
