/* SPDX-License-Identifier: Apache-2.0
 *
 * Groups: neighbours that access memory through one base register share a probe of the softTLB.
 *
 * Saving and restoring registers, locals of a function, fields of a structure: one probe of the first and the last byte
 * proves that all of them lie in one page. Behind it S0 keeps the addend until the group ends, so what stands
 * between the accesses may be anything that leaves S0 and the base register alone; RSP may move by constants. When the
 * probe misses (or the group crosses a page), the interpreter's handlers run the whole group, each instruction with its
 * own checks, and host code goes on behind it.
 */
#include "jit_code.h"

#if HAVE_JIT
#include "optable.h"

#define SPAN 128 /* bytes from first to last: a group that crosses a page is slow */

/* A store of the group may have been to the code of the running block. */
OP(jit_check)
{
    if (likely(!c->jit.stop))
        NEXT;
    c->rip = RIP_AFTER(c, u - 1);
    return NULL;
}

struct reach { unsigned base; int32_t disp; unsigned size; bool write; };

/* Its access, if one addressing mode without index says it. */
static bool access_of(const struct emit *e, const struct decoded *d, struct reach *a)
{
    const struct uop *u = &d->uop;
    switch (d->row->jit) {
    case JIT_PUSH: case JIT_CALL:
        *a = (struct reach){RSP, -8, 8, true};
        return d->enc.osize == 8 && !d->enc.mem;
    case JIT_POP: case JIT_RET:
        *a = (struct reach){RSP, 0, 8, false};
        return d->enc.osize == 8 && !d->enc.mem && (d->row->jit == JIT_RET || u->d != RSP * 8);
    case JIT_COPY: case JIT_COPYR: case JIT_COPYW: case JIT_VEC: break;
    default: return false;
    }
    if (!d->enc.mem || u->aflags || u->index != REG_ZERO || u->base >= REG_ZERO || homed(u->base / 8) || !jit_can_address(e, d))
        return false;
    *a = (struct reach){.base = u->base / 8, .disp = u->disp};
    return d->row->jit == JIT_VEC ? jit_vector_access(e, d, &a->size, &a->write) : jit_copy_access(d, &a->size, &a->write);
}

/* General registers that it writes; all of them where that is not obvious. */
unsigned jit_written(const struct decoded *d)
{
    struct operands o;
    const struct oprow *r = d->row;
    unsigned op = d->enc.opcode, map = d->enc.vex ? 4u + d->enc.map : d->enc.map;
    if (r->jit == JIT_NOP || (r->jit == JIT_COPYR && map == 0 && (op & 0xfe) != 0xf6) || r->jit == JIT_JCC ||
        r->jit == JIT_JMP || r->jit == JIT_JMPIND || r->jit == JIT_RET /* its pop comes last of all */)
        return 0;
    if (r->jit == JIT_X87 || r->jit == JIT_X87W || r->jit == JIT_X87CW)
        return 0;
    if (r->jit == JIT_X87C)
        return 1u << RAX; /* FNSTSW AX */
    if (r->jit == JIT_LEAVE)
        return 1u << RSP | 1u << RBP;
    if (r->jit == JIT_MOVS || r->jit == JIT_STOS)
        return 1u << RSI | 1u << RDI | 1u << RCX;
    if (r->jit == JIT_FIXED)
        return 1u << RAX | 1u << RDX;
    if (r->jit == JIT_XCHGAX)
        return 1u << RAX | 1u << d->uop.d / 8;
    if (r->jit == JIT_CLI || r->jit == JIT_SWAPGS)
        return 0;
    if (r->jit == JIT_PUSH || r->jit == JIT_PUSHF || r->jit == JIT_CALL || r->jit == JIT_CALLIND)
        return 1u << RSP;
    jit_find_operands(d, &o);
    unsigned named = 0;
    const int all[4] = {o.reg, o.rm, o.opcode, o.vvvv};
    for (unsigned i = 0; i < 4; i++)
        if (all[i] >= 0)
            named |= 1u << all[i];
    switch (r->operand[0] & 0xff) {
    case 'E': case 'R': case 'G': case 'Z': case 'B': case 'V': case 'W': case 'H': case 'U': case 'M': break;
    default: return ~0u;
    }
    if (map == 0 && (op & 0xfe) == 0xf6)
        return named | 1u << RAX | 1u << RDX; /* MUL and its like */
    if (map == 1 && (op & 0xfe) == 0xb0)
        return named | 1u << RAX; /* CMPXCHG */
    if ((map == 0 && (op & 0xfe) == 0x86) || (map == 1 && (op & 0xfe) == 0xc0) || map >= 4)
        return named; /* XCHG, XADD; VEX may have two destinations */
    int first = -1;
    switch (r->operand[0] & 0xff) {
    case 'E': case 'R': first = o.rm; break;
    case 'G': first = o.reg; break;
    case 'Z': first = o.opcode; break;
    default: break;
    }
    return (first >= 0 ? 1u << first : 0) | (r->jit == JIT_POP ? 1u << RSP : 0);
}

/* RSP moves by a constant. */
bool jit_moves_stack(const struct decoded *d, int64_t *by)
{
    const struct uop *u = &d->uop;
    *by = 0;
    if (d->row->jit == JIT_PUSH || d->row->jit == JIT_CALL || d->row->jit == JIT_CALLIND || (d->row->jit == JIT_POP && d->uop.d != RSP * 8))
        *by = d->row->jit == JIT_POP ? 8 : -8;
    else if (d->enc.osize != 8 || u->d != RSP * 8)
        return false;
    else if (d->row->jit == JIT_LEA && u->base == RSP * 8 && u->index == REG_ZERO && !u->aflags)
        *by = u->disp;
    else if (d->row->jit == JIT_COPY && !d->enc.mem && !d->enc.map && (d->enc.opcode == 0x83 || d->enc.opcode == 0x81) &&
             (d->row->digit == 0 || d->row->digit == 5) && (int64_t)u->imm == (int32_t)u->imm)
        *by = d->row->digit ? -(int64_t)u->imm : (int64_t)u->imm;
    return *by != 0;
}

/* Host code for it without memory, S0 or a handler. */
static bool harmless(const struct emit *e, const struct decoded *d)
{
    if (!d->row || d->has_prefix || d->end || d->enc.mem)
        return false;
    switch (d->row->jit) {
    case JIT_COPY: case JIT_COPYR: case JIT_COPYW: case JIT_BITREG: {
        struct operands o;
        jit_find_operands(d, &o);
        return jit_count_homed(&o) < 2;
    }
    case JIT_LEA: return d->uop.base != REG_BIP && !homed(d->uop.d / 8) && (d->uop.base >= REG_ZERO || !homed(d->uop.base / 8)) &&
                         (d->uop.index >= REG_ZERO || !homed(d->uop.index / 8));
    case JIT_FIXED: case JIT_NOP: case JIT_XCHGAX: return true;
    case JIT_VEC: return !(d->row->vec & VEC_FP) || e->masked;
    default: return false;
    }
}

bool jit_group_begin(struct emit *e, const struct decoded *d, unsigned at, unsigned n)
{
    struct reach first, a;
    int64_t moved = 0, lo, hi, by;
    bool write;
    unsigned last = at, count = 1;
    if (e->no_groups || !d[at].row || d[at].has_prefix || !access_of(e, &d[at], &first))
        return false;
    lo = first.disp;
    hi = first.disp + (int64_t)first.size;
    write = first.write;
    for (unsigned i = at; i < n; i++) {
        bool memory = d[i].row && !d[i].has_prefix && access_of(e, &d[i], &a), ends = d[i].end;
        if (memory ? a.base != first.base || (d[i].row->jit == JIT_VEC && d[i].row->vec & VEC_FP && !e->masked) : !harmless(e, &d[i]))
            break;
        if (memory && i > at) {
            int64_t from = a.disp + moved, to = from + a.size, low = from < lo ? from : lo, high = to > hi ? to : hi;
            if (high - low > SPAN)
                break;
            lo = low;
            hi = high;
            write |= a.write;
            last = i;
            count++;
        }
        if (ends)
            break;
        if (first.base == RSP && jit_moves_stack(&d[i], &by)) {
            moved += by;
            if (moved != (int32_t)moved)
                break;
        } else if (jit_written(&d[i]) >> first.base & 1) {
            break;
        }
    }
    if (count < 2 || lo != (int32_t)lo || hi != (int32_t)hi)
        return false;
    struct slow *s = jit_new_slow(e);
    jit_probe(e, host_reg(first.base), (int32_t)lo, (unsigned)(hi - lo), write, s);
    e->group = s;
    e->group_first = at;
    e->group_last = last;
    return true;
}

void jit_group_end(struct emit *e, const struct decoded *d, uop_fn part)
{
    struct slow *s = e->group;
    struct uop *u = jit_begin_uops(e);
    s->uop = u;
    for (unsigned i = e->group_first; i <= e->group_last; i++) {
        bool last = i == e->group_last;
        if (d[i].has_prefix)
            *u++ = d[i].prefix;
        *u = d[i].uop;
        if (last && part) {
            u->fn = part;
            u->len = 0;
        }
        u++;
        if (!last && d[i].barrier)
            *u++ = (struct uop){.fn = op_jit_check, .base = REG_ZERO, .index = REG_ZERO};
    }
    if (e->held.x87)
        *u++ = jit_x87_again(d[e->group_last].uop.off + d[e->group_last].uop.len);
    jit_end_uops(e, u);
    s->resume = run_address(&e->a);
    s->restore = e->flags & (IN_EFLAGS | BUT_CARRY);
    s->reload = e->held;
    e->group = NULL;
}
#endif
