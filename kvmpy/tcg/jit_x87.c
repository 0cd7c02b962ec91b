/* SPDX-License-Identifier: Apache-2.0
 *
 * Host code of x87 instructions: the guest's own opcode on the host's unit, which then holds the guest's registers,
 * tags, TOP and status.
 *
 * They come there with the first x87 instruction of a block that does not find them there (c->jit.x87.live) and stay,
 * from block to block, until something else than host code runs: a handler, or the loop. So nothing written in C knows
 * of them, and a loop pays a comparison per turn. That needs all exceptions to be masked and none to be pending; else
 * the interpreter's handlers do it. Masked responses, stack faults and condition codes are then the processor's own.
 *
 * The host's pointers to the last instruction say nothing of the guest. FIP goes to c->fpu where it can be seen
 * (struct vectors, like a register that is not yet in memory), FDP with each memory operand; their selectors cannot
 * change while the registers are in the host and come with them.
 */
#include "jit_code.h"

#if HAVE_JIT
#include "optable.h"
#include "x87.h"

OP_DECL(jit_x87_enter);

/* ---- between c->fpu and the host's unit ---- */

static bool enter_host(struct cpu *c)
{
    struct x87_image i = {.cw = c->fpu.cw, .sw = (uint16_t)(c->fpu.sw | c->fpu.top << 11)};
    if ((c->fpu.cw & 0x3f) != 0x3f || c->fpu.sw & SW_ES)
        return false;
    for (unsigned n = 0; n < 8; n++) {
        i.tags |= (uint16_t)(c->fpu.valid >> n & 1 ? 0 : 3 << 2 * n);
        memcpy(i.st[n], ST(n)->raw, 10);
    }
    __asm__ volatile("frstor %0" : : "m"(i));
    memset(&c->jit.x87, 0, sizeof c->jit.x87);
    c->jit.x87.live = true;
    return true;
}

void jit_x87_leave(struct cpu *c)
{
    struct x87_image i;
    __asm__ volatile("fnsave %0\n\tfldcw %1" : "=m"(i) : "m"(c->fpu.cw));
    c->fpu.top = i.sw >> 11 & 7;
    c->fpu.sw = i.sw & ~0x3800;
    c->fpu.valid = 0;
    for (unsigned n = 0; n < 8; n++) {
        c->fpu.valid |= (uint8_t)((i.tags >> 2 * n & 3) != 3) << n;
        memcpy(ST(n)->raw, i.st[n], 10);
    }
    if (c->jit.x87.fip_written)
        c->fpu.fcs = c->seg[SEG_CS].sel;
    if (c->jit.x87.fdp_segment)
        c->fpu.fds = c->seg[c->jit.x87.fdp_segment - 1].sel;
    c->jit.x87.live = false;
}

/* Before the instruction of `u`, which the interpreter does when it cannot be the host's. */
OP(jit_x87_enter)
{
    if (enter_host(c))
        NEXT_RETURN;
    c->rip = RIP_OF(c, u);
    c->jit.once = true;
    LEAVE;
}

/* ---- emission ---- */

/* Behind a handler that made the registers leave the host, before host code goes on with instruction `offset`. */
struct uop jit_x87_again(unsigned offset)
{
    return (struct uop){.fn = op_jit_x87_enter, .off = (uint8_t)offset, .base = REG_ZERO, .index = REG_ZERO};
}

static void store_flag(struct place_of_code *a, uint8_t *flag, unsigned value)
{
    put_insn(a, 0, false, 0, 0xc6, 0, rm_abs(flag), 1);
    put1(a, value);
}

void jit_store_fip(struct place_of_code *a, struct emit *e, unsigned fip)
{
    if (!fip)
        return;
    jit_address(a, e, S1, (int32_t)fip - 1);
    mov_store(a, FIELD(e, fpu.fip), S1);
    store_flag(a, (uint8_t *)&e->c->jit.x87.fip_written, 1);
}

static void need_host(struct emit *e, const struct decoded *d)
{
    if (e->held.x87)
        return;
    struct slow *s = jit_new_slow(e);
    put_insn(&e->a, 0, false, 0, 0x80, 7, rm_abs(&e->c->jit.x87.live), 1); /* CMP live, 0 */
    put1(&e->a, 0);
    jit_slow_if(e, s, COND_Z);
    s->uop = jit_copy_uop(e, d, op_jit_x87_enter);
    s->resume = run_address(&e->a);
    s->reload = e->held;
    e->held.x87 = true;
}

static void made_pointers(struct emit *e, const struct decoded *d)
{
    e->dirty.fip = (uint16_t)(e->start + d->uop.off + 1);
    if (!d->enc.mem)
        return;
    jit_offset(e, &d->uop, S0, S1);
    mov_store(&e->a, FIELD(e, fpu.fdp), S0);
    store_flag(&e->a, &e->c->jit.x87.fdp_segment, d->uop.seg + 1u);
}

/* A control word that masks all; others are the handler's, and so is the next instruction then. */
static void load_control(struct emit *e, const struct decoded *d)
{
    struct place_of_code *a = &e->a;
    struct slow *s = jit_new_slow(e);
    struct rm m = jit_operand(e, d, 2, false, s, false);
    put_insn(a, 0, false, 1, 0xb7, S0, m, 0);
    lea(a, false, S1, rm_mem(S0, 0));
    alu_imm(a, false, 4, rm_reg(S1), 0x3f);
    alu_imm(a, false, 7, rm_reg(S1), 0x3f);
    jit_slow_if(e, s, COND_NZ);
    alu_imm(a, false, 4, rm_reg(S0), 0x1f3f);
    alu_imm(a, false, 1, rm_reg(S0), 0x40);
    put_insn(a, P_66, false, 0, 0x89, S0, FIELD(e, fpu.cw), 0);
    put_insn(a, 0, false, 0, 0xd9, 5, FIELD(e, fpu.cw), 0);
    e->held.x87 = false;
    jit_resume(e, d, s);
}

bool jit_x87(struct emit *e, const struct decoded *d)
{
    const struct oprow *r = d->row;
    bool control = r->jit == JIT_X87C;
    /* FS and GS: FDP is the offset, and thread-local x87 data is rare */
    if (e->j->off & JIT_NO_X87 || e->b->mode & MODE_TS || (d->enc.mem && (!jit_can_address(e, d) || d->uop.aflags & EA_SEG)))
        return false;
    need_host(e, d);
    if (r->jit == JIT_X87CW) {
        load_control(e, d);
        return true;
    }
    if (!d->enc.mem) {
        if (d->flags_read)
            jit_need_eflags(e, d->flags_read);
        put1(&e->a, d->enc.opcode);
        if (r->modrm)
            put1(&e->a, d->enc.modrm);
        if (d->flags_written)
            e->flags = IN_EFLAGS;
        if (!control)
            made_pointers(e, d);
        return true;
    }
    struct slow *s = jit_new_slow(e);
    struct rm m = jit_operand(e, d, r->vec_size, control || r->jit == JIT_X87W, s, false);
    put_insn(&e->a, 0, false, 0, d->enc.opcode, (unsigned)r->digit, m, 0);
    if (!control)
        made_pointers(e, d);
    jit_resume(e, d, s);
    return true;
}
#endif
