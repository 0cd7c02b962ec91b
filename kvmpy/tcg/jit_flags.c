/* SPDX-License-Identifier: Apache-2.0
 *
 * Where the guest's arithmetic flags are between two instructions of a block.
 *
 * IN_EFLAGS: in the host's, made by the guest's own opcode. IN_CC: in c->cc, where handlers want them. IN_RECIPE:
 * nowhere, but a few instructions make them again, for the registers they came from still hold the values. A softTLB
 * probe or a poll clobbers EFLAGS, and mostly nobody looks at the flags of before but a fault or an interrupt: with a
 * recipe only their ways out, which are seldom run, make the flags and save them.
 *
 * INC and DEC leave the carry alone. When it is in c->cc it stays there, and the host's EFLAGS have the others
 * (BUT_CARRY): the recipe takes the carry from there and counts once more.
 */
#include "jit_code.h"

#if HAVE_JIT
#include "optable.h"

/* LAHF and SETO make c->cc's format. S1 is clobbered, EFLAGS stay. */
static void save(struct place_of_code *a, struct emit *e)
{
    mov_rr(a, S1, RAX);
    put1(a, 0x9f);
    put_insn(a, 0, false, 1, 0x90, 0, rm_reg(RAX), 0);
    put_insn(a, P_66, false, 0, 0x89, RAX, rm_abs(&e->c->cc), 0);
    mov_rr(a, RAX, S1);
}

/* The same, except for the carry, which stays what it is in c->cc. EFLAGS are lost. */
static void save_but_carry(struct place_of_code *a, struct emit *e)
{
    mov_rr(a, S1, RAX);
    put1(a, 0x9f);
    put_insn(a, 0, false, 1, 0x90, 0, rm_reg(RAX), 0);
    put_insn(a, P_66, false, 0, 0x33, RAX, rm_abs(&e->c->cc), 0); /* XOR: which bits differ ... */
    alu_imm(a, false, 4, rm_reg(RAX), ~0x100);                   /* ... the carry does not count ... */
    put_insn(a, P_66, false, 0, 0x33, RAX, rm_abs(&e->c->cc), 0);
    put_insn(a, P_66, false, 0, 0x89, RAX, rm_abs(&e->c->cc), 0);
    mov_rr(a, RAX, S1);
}

/* From c->cc. S1 is clobbered. */
void jit_restore_flags(struct place_of_code *a, struct emit *e)
{
    mov_rr(a, S1, RAX);
    put_insn(a, 0, false, 1, 0xb7, RAX, rm_abs(&e->c->cc), 0);
    put1(a, 0x04); /* ADD AL, 127 makes OF of bit 0 */
    put1(a, 127);
    put1(a, 0x9e);
    mov_rr(a, RAX, S1);
}

/* ---- recipes ---- */

enum { NONE, AGAIN, TEST, COUNT, ADD, SUB }; /* the opcode as it was; TEST dst, dst; INC or DEC; ... */

static void add_or_sub(struct place_of_code *a, const struct recipe *r, unsigned op) /* ADD 0, SUB 5 */
{
    if (r->src != NO_REG)
        put_insn(a, 0, r->wide, 0, op << 3 | 1, r->src, rm_reg(S1), 0);
    else
        alu_imm(a, r->wide, op, rm_reg(S1), r->imm);
}

static void make(struct place_of_code *a, struct emit *e, const struct recipe *r)
{
    switch (r->kind) {
    case AGAIN:
        memcpy(a->p, r->bytes, r->size);
        a->p += r->size;
        return;
    case TEST:
        put_insn(a, 0, r->wide, 0, 0x85, r->dst, rm_reg(r->dst), 0);
        return;
    case COUNT:
        jit_restore_flags(a, e);
        lea(a, true, S1, rm_mem(r->dst, -r->imm));
        put_insn(a, 0, r->wide, 0, 0xff, r->imm < 0, rm_reg(S1), 0);
        return;
    case ADD: case SUB: /* backwards to the value of before, then once more */
        lea(a, true, S1, rm_mem(r->dst, -r->moved));
        add_or_sub(a, r, r->kind == ADD ? 5 : 0);
        add_or_sub(a, r, r->kind == ADD ? 0 : 5);
        return;
    }
}

/* INC or DEC of a whole register, by 1 or -1; else 0. */
static int counts(const struct decoded *d, int *guest)
{
    struct operands o;
    if (d->row->jit != JIT_COPY || d->enc.mem || d->enc.osize == 2 || (strcmp(d->row->name, "inc") && strcmp(d->row->name, "dec")))
        return 0;
    jit_find_operands(d, &o);
    *guest = o.rm;
    if (d->row->size != 1 || o.rm < 0 || o.rm == RSP || homed((unsigned)o.rm))
        return 0;
    return d->row->name[0] == 'i' ? 1 : -1;
}

static bool carry_is_in_cc(const struct emit *e)
{
    return e->flags & IN_CC || (e->flags & IN_RECIPE && e->recipe.kind == COUNT);
}

bool jit_keeps_carry(const struct emit *e, const struct decoded *d)
{
    int guest;
    return !(e->j->off & JIT_NO_FLAGS) && !(e->flags & IN_EFLAGS) && carry_is_in_cc(e) && counts(d, &guest);
}

/* `d` has just been emitted, as `size` bytes up to e->a.p, and has made the flags. */
static void write_recipe(struct emit *e, const struct decoded *d, unsigned size)
{
    struct recipe *r = &e->recipe;
    struct operands o;
    const char *name = d->row->name;
    bool compares = !strncmp(name, "cmp", 3) || !strncmp(name, "test", 4), fixed = d->row->jit == JIT_FIXED;
    *r = (struct recipe){.kind = NONE, .src = NO_REG};
    jit_find_operands(d, &o);
    if (d->enc.mem || d->enc.map || d->enc.vex || jit_count_homed(&o))
        return;
    if (compares && (fixed || d->row->jit == JIT_COPYR)) {
        r->kind = AGAIN;
        r->size = (uint8_t)size;
        memcpy(r->bytes, e->a.p - size, size);
        r->uses = (o.reg >= 0 ? 1u << o.reg : 0) | (o.rm >= 0 ? 1u << o.rm : 0) | (fixed ? 1u << RAX : 0);
        return;
    }
    if (d->row->jit != JIT_COPY || d->row->size != 1 || d->enc.osize == 2 || o.opcode >= 0 || o.rm < 0)
        return;
    bool to_reg = o.reg >= 0 && d->enc.opcode & 2; /* the destination is ModRM.reg */
    int dst = to_reg ? o.reg : o.rm, src = to_reg ? o.rm : o.reg;
    r->dst = (uint8_t)host_reg((unsigned)dst);
    r->wide = d->enc.osize == 8;
    r->uses = 1u << dst;
    if (!strcmp(name, "and") || !strcmp(name, "or") || !strcmp(name, "xor")) {
        r->kind = TEST;
    } else if (src != dst && (!strcmp(name, "add") || !strcmp(name, "sub"))) {
        r->kind = name[0] == 'a' ? ADD : SUB;
        r->imm = (int32_t)d->uop.imm;
        if (src >= 0) {
            r->src = (uint8_t)host_reg((unsigned)src);
            r->uses |= 1u << src;
        }
    }
}

/* ---- what emission asks for ---- */

void jit_flags_made(struct emit *e, const struct decoded *d, unsigned size)
{
    if (!d->flags_written)
        return;
    if (e->carry_in_cc) {
        int guest, by = counts(d, &guest);
        e->carry_in_cc = false;
        e->recipe = (struct recipe){.kind = COUNT, .src = NO_REG, .dst = (uint8_t)host_reg((unsigned)guest),
                                    .wide = d->enc.osize == 8, .imm = by, .uses = 1u << guest};
        e->flags = IN_RECIPE | BUT_CARRY;
        return;
    }
    e->flags = IN_EFLAGS;
    write_recipe(e, d, size);
    if (e->recipe.kind && !(e->j->off & JIT_NO_FLAGS))
        e->flags |= IN_RECIPE;
    if (e->j->off & JIT_NO_FLAGS)
        jit_need_cc(e);
}

void jit_make_cc(struct place_of_code *a, struct emit *e, unsigned flags, const struct recipe *r)
{
    if (flags & IN_CC)
        return;
    if ((flags & (IN_EFLAGS | BUT_CARRY)) == BUT_CARRY) {
        save_but_carry(a, e);
        return;
    }
    if (!(flags & IN_EFLAGS))
        make(a, e, r);
    save(a, e);
}

void jit_need_cc(struct emit *e)
{
    jit_make_cc(&e->a, e, e->flags, &e->recipe);
    e->flags = (e->flags & ~(unsigned)BUT_CARRY) | IN_CC;
}

void jit_need_eflags(struct emit *e, unsigned which)
{
    if (e->flags & IN_EFLAGS || (e->flags & BUT_CARRY && !(which & FLAG_C)))
        return;
    if (e->flags & IN_RECIPE)
        make(&e->a, e, &e->recipe);
    else
        jit_restore_flags(&e->a, e);
    e->flags |= IN_EFLAGS;
}

/* Something clobbers EFLAGS: are the flags somewhere else? */
void jit_lose_eflags(struct emit *e)
{
    if (!(e->flags & (IN_CC | IN_RECIPE)))
        jit_need_cc(e);
    e->flags = jit_lost(e->flags);
}

/* A recipe for what RSP has become follows when RSP moves by a constant. */
static bool follows(const struct emit *e, const struct decoded *d, int64_t *by)
{
    return e->recipe.uses == 1u << RSP && e->recipe.kind >= ADD && !d->flags_written && jit_moves_stack(d, by) &&
           (int32_t)(e->recipe.moved + *by) == e->recipe.moved + *by;
}

void jit_registers_will_change(struct emit *e, const struct decoded *d, uint8_t observed)
{
    int64_t by;
    if (!(e->flags & IN_RECIPE) || !(jit_written(d) & e->recipe.uses) || follows(e, d, &by))
        return;
    unsigned seen = d->barrier ? ~0u : (observed & ~d->flags_written) | d->flags_read;
    if (seen == FLAG_C && carry_is_in_cc(e))
        e->flags |= IN_CC;
    if (seen && !(e->flags & (IN_CC | IN_EFLAGS)))
        jit_need_cc(e);
    e->flags &= ~(unsigned)(IN_RECIPE | BUT_CARRY);
    if (!e->flags)
        e->flags = IN_CC; /* whatever is there: nobody looks */
}

void jit_stack_has_moved(struct emit *e, const struct decoded *d)
{
    int64_t by;
    if (e->flags & IN_RECIPE && follows(e, d, &by))
        e->recipe.moved += (int32_t)by;
}
#endif
