/* SPDX-License-Identifier: Apache-2.0
 *
 * Host code of single instructions: mostly the guest's own opcode with other register numbers; a memory operand becomes
 * a probe of the softTLB and then the same instruction on host memory. What misses the probe, and what has no
 * emission, calls the interpreter's handler.
 */
#include "jit_code.h"

#if HAVE_JIT
#include "optable.h"

/* ---- the interpreter's handlers ---- */

struct uop *jit_begin_uops(struct emit *e)
{
    uint64_t *head = (uint64_t *)(e->j->data + e->j->used);
    *head = e->start;
    return (struct uop *)(head + 1);
}
void jit_end_uops(struct emit *e, struct uop *end)
{
    end->fn = op_jit_back;
    e->j->used = ((size_t)((uint8_t *)(&end->fn + 1) - e->j->data) + 15) & ~15ull;
}

const struct uop *jit_copy_uop(struct emit *e, const struct decoded *d, uop_fn fn)
{
    struct uop *u = jit_begin_uops(e), *first = u;
    if (d->has_prefix)
        *u++ = d->prefix;
    *u = d->uop;
    if (fn) {
        u->fn = fn;
        u->len = 0; /* only a part of the instruction */
    }
    u++;
    if (e->held.x87)
        *u++ = jit_x87_again(d->uop.off + d->uop.len);
    jit_end_uops(e, u);
    return first;
}

void jit_helper(struct emit *e, const struct decoded *d)
{
    jit_need_cc(e);
    jit_flush_vectors(e);
    e->masked = false;
    const struct uop *u = jit_copy_uop(e, d, NULL);
    lea(&e->a, true, S0, rm_abs(u));
    call_to(&e->a, e->j->helper);
    e->flags = IN_CC;
    e->helpers++;
}

struct slow *jit_new_slow(struct emit *e)
{
    struct slow *s = &e->slow[e->nslow++];
    memset(s, 0, sizeof *s);
    s->spill = e->dirty;
    jit_lose_eflags(e); /* the probe does it */
    s->flags = e->flags;
    s->recipe = e->recipe;
    return s;
}

struct slow *jit_begin_access(struct emit *e)
{
    return e->group ? NULL : jit_new_slow(e);
}

void jit_slow_if(struct emit *e, struct slow *s, unsigned cond) { s->site[s->sites++] = jcc32(&e->a, cond); }

/* The slow path of an instruction ends here. */
void jit_resume(struct emit *e, const struct decoded *d, struct slow *s)
{
    if (!s) /* the group's */
        return;
    s->uop = jit_copy_uop(e, d, NULL);
    s->resume = run_address(&e->a);
    s->restore = e->flags & (IN_EFLAGS | BUT_CARRY);
    s->reload = e->held;
}

/* ---- opcodes written again ---- */

static bool host_has(const struct emit *e, const struct oprow *r)
{
    for (unsigned i = 0; i < 3 && r->feature[i]; i++)
        if (!(e->j->host_features[(r->feature[i] - 1) / 64] >> ((r->feature[i] - 1) % 64) & 1))
            return false;
    return true;
}

static unsigned prefixes(const struct decoded *d)
{
    static const uint8_t mandatory[] = {0, 0, P_66, P_F3, P_F2};
    return mandatory[d->row->prefix] | (d->row->size == 1 && d->enc.osize == 2 ? P_66 : 0) | (d->enc.lock ? P_LOCK : 0);
}
static bool wide(const struct decoded *d) { return (d->row->size == 1 || d->row->size == 2) && d->enc.osize == 8; }

static void immediate(struct emit *e, const struct decoded *d)
{
    const uint8_t *p = e->bytes + d->uop.off + d->uop.len - d->enc.imm;
    for (unsigned i = 0; i < d->enc.imm; i++)
        put1(&e->a, p[i]);
}

/* EFLAGS as the instruction must find them: what it reads, and what it leaves alone and somebody may see. */
static bool wants_eflags(const struct decoded *d, uint8_t observed)
{
    return d->flags_read || (d->flags_written && (observed & ~d->flags_written));
}
void jit_find_operands(const struct decoded *d, struct operands *o)
{
    const uint8_t slot[4] = {d->uop.d, d->uop.s, d->uop.x, 0};
    *o = (struct operands){.reg = -1, .rm = -1, .opcode = -1, .vvvv = -1};
    for (unsigned i = 0; i < 3 && d->row->operand[i]; i++) {
        unsigned kind = d->row->operand[i] & 0xff, size = d->row->operand[i] >> 8;
        bool mem = kind == 'M' || (kind == 'E' && d->enc.mem);
        if (mem) {
            o->mem_first = i == 0;
            o->mem_size = size == SZ_B ? 1 : size == SZ_W ? 2 : size == SZ_D ? 4 : size == SZ_Q ? 8 : d->enc.osize;
            continue;
        }
        bool high = size == SZ_B && (slot[i] & 7) == 1;
        switch (kind) {
        case 'E': case 'R': o->rm = slot[i] / 8; o->high_rm = high; break;
        case 'G': o->reg = slot[i] / 8; o->high_reg = high; break;
        case 'Z': o->opcode = slot[i] / 8; o->high_rm = high; break;
        case 'B': o->vvvv = slot[i] / 8; break;
        default: continue;
        }
        o->byte |= size == SZ_B;
    }
}

/* Guest registers that live in memory come into the scratch registers, each into one. */
struct scratch { int guest[2]; unsigned used; };

static unsigned fetch(struct emit *e, int guest, struct scratch *t)
{
    static const uint8_t order[2] = {S1, S0};
    if (!homed((unsigned)guest))
        return host_reg((unsigned)guest);
    for (unsigned i = 0; i < t->used; i++)
        if (t->guest[i] == guest)
            return order[i];
    mov_load(&e->a, order[t->used], rm_abs(&e->c->gpr[guest]));
    t->guest[t->used] = guest;
    return order[t->used++];
}
static void give_back(struct emit *e, int guest, unsigned r)
{
    if (guest >= 0 && homed((unsigned)guest))
        mov_store(&e->a, rm_abs(&e->c->gpr[guest]), r);
}
unsigned jit_count_homed(const struct operands *o)
{
    const int all[4] = {o->reg, o->rm, o->opcode, o->vvvv};
    unsigned seen = 0;
    for (unsigned i = 0; i < 4; i++)
        if (all[i] >= 0 && homed((unsigned)all[i]))
            seen |= 1u << all[i];
    return (unsigned)__builtin_popcount(seen);
}

/* Atomic on the bus: LOCK, or XCHG with memory. */
static bool locks(const struct decoded *d) { return d->enc.mem && (d->enc.lock || (!d->enc.map && (d->enc.opcode & 0xfe) == 0x86)); }

static bool copy_access(const struct decoded *d, unsigned *size, bool *write)
{
    struct operands o;
    jit_find_operands(d, &o);
    *size = o.mem_size;
    *write = o.mem_first && d->row->jit != JIT_COPYR;
    return jit_count_homed(&o) < 2 && o.mem_size && !o.high_reg;
}

/* What may share a probe: a locked access has one of its own. */
bool jit_copy_access(const struct decoded *d, unsigned *size, bool *write) { return !locks(d) && copy_access(d, size, write); }

static bool copy(struct emit *e, const struct decoded *d, uint8_t observed)
{
    const struct oprow *r = d->row;
    struct operands o;
    jit_find_operands(d, &o);
    bool mem = d->enc.mem, high = o.high_reg || o.high_rm, write;
    unsigned nhomed = jit_count_homed(&o), size;
    if (d->enc.map == 1 && (d->enc.opcode & 0xf8) == 0xc8 && d->enc.osize == 2)
        return false; /* BSWAP of 16 bits is undefined: as the interpreter does */
    if (mem ? !jit_can_address(e, d) || !copy_access(d, &size, &write) : nhomed > 2)
        return false;
    if (high) { /* AH to BH exist only without REX */
        const int low[2] = {o.high_reg ? -1 : o.reg, o.high_rm ? -1 : o.rm};
        if (nhomed)
            return false;
        for (unsigned i = 0; i < 2; i++)
            if (low[i] >= 0 && (low[i] >= 8 || low[i] == RSP))
                return false;
        if (wide(d))
            return false;
    }
    bool eflags = wants_eflags(d, observed);
    if (!mem && eflags && !(e->carry_in_cc = jit_keeps_carry(e, d)))
        jit_need_eflags(e, d->flags_written ? ~0u : d->flags_read);
    struct slow *s = NULL;
    struct rm rm = {0};
    struct scratch scratch = {.used = 0};
    if (mem) {
        s = jit_begin_access(e);
        e->aligned = locks(d) ? size : 0; /* else it is for the handler, which knows how to go about a bus lock */
        rm = jit_operand(e, d, size, write, s, nhomed > 0 || eflags);
        e->aligned = 0;
        if (eflags)
            jit_need_eflags(e, ~0u);
    } else if (o.rm >= 0) {
        rm = rm_reg(o.high_rm ? (unsigned)o.rm + 4 : fetch(e, o.rm, &scratch));
    }
    unsigned reg = r->digit >= 0 ? (unsigned)r->digit : 0;
    if (o.reg >= 0)
        reg = o.high_reg ? (unsigned)o.reg + 4 : fetch(e, o.reg, &scratch);
    unsigned p = prefixes(d) | (o.byte && !high ? P_REX : 0), vvvv = o.vvvv >= 0 ? fetch(e, o.vvvv, &scratch) : 0;
    const uint8_t *start = e->a.p;
    if (d->enc.vex) {
        static const uint8_t pp[] = {0, 0, 1, 2, 3};
        put_vex(&e->a, pp[r->prefix], d->enc.w, d->enc.l, d->enc.map, d->enc.opcode, reg, vvvv, rm, d->enc.imm);
    } else if (o.opcode >= 0) { /* the register is in the opcode */
        unsigned h = o.high_rm ? (unsigned)o.opcode + 4 : fetch(e, o.opcode, &scratch), rex = (unsigned)wide(d) << 3 | h >> 3;
        if (p & P_66)
            put1(&e->a, 0x66);
        if (rex || (p & P_REX))
            put1(&e->a, 0x40 | rex);
        if (d->enc.map)
            put1(&e->a, 0x0f);
        put1(&e->a, (d->enc.opcode & 0xf8u) | (h & 7));
        rm = rm_reg(h);
    } else {
        put_insn(&e->a, p, wide(d), d->enc.map, d->enc.opcode, reg, rm, d->enc.imm);
    }
    immediate(e, d);
    unsigned length = (unsigned)(e->a.p - start);
    give_back(e, o.reg, reg);
    give_back(e, mem ? -1 : o.rm, rm.reg);
    give_back(e, o.opcode, rm.reg);
    give_back(e, o.vvvv, vvvv);
    jit_flags_made(e, d, length);
    if (mem)
        jit_resume(e, d, s);
    return true;
}

/* Operands implied by the opcode: AL, RAX, RDX, none. */
static bool fixed(struct emit *e, const struct decoded *d, uint8_t observed)
{
    if (wants_eflags(d, observed))
        jit_need_eflags(e, ~0u);
    const uint8_t *start = e->a.p;
    if (prefixes(d) & P_66)
        put1(&e->a, 0x66);
    if (wide(d))
        put1(&e->a, 0x48);
    put1(&e->a, d->enc.opcode);
    immediate(e, d);
    jit_flags_made(e, d, (unsigned)(e->a.p - start));
    return true;
}

static bool load_address(struct emit *e, const struct decoded *d)
{
    const struct uop *u = &d->uop;
    if (!jit_can_address(e, d) || (d->enc.osize == 2 && homed(jit_guest(u->d)))) /* 16 bits keep the rest */
        return false;
    unsigned guest = jit_guest(u->d), dst = homed(guest) ? S0 : host_reg(guest);
    struct place_of_code *a = &e->a;
    struct rm m;
    if (u->base == REG_BIP && d->enc.osize == 8) {
        jit_address(a, e, dst, u->disp + (int32_t)e->start);
        give_back(e, (int)guest, dst);
        return true;
    }
    if (u->base == REG_BIP) {
        mov_load(a, S0, FIELD(e, jit.page));
        m = rm_mem(S0, u->disp + (int32_t)e->start);
    } else {
        unsigned base = u->base == REG_ZERO ? NO_REG : jit_half(e, u->base, S0);
        unsigned index = u->index == REG_ZERO ? NO_REG : jit_half(e, u->index, S1);
        m = rm_sib(base, index, u->scale, u->disp);
    }
    if (u->aflags & EA_A32 && d->enc.osize == 8) {
        lea(a, false, dst, m); /* 32 bits of address, then zeros */
    } else {
        put_insn(a, d->enc.osize == 2 ? P_66 : 0, d->enc.osize == 8, 0, 0x8d, dst, m, 0);
    }
    give_back(e, (int)guest, dst);
    return true;
}

static void push_s0(struct emit *e, struct slow *s)
{
    mov_store(&e->a, FIELD(e, scratch[0]), S0);
    struct rm m = jit_probe(e, GUEST_SP, -8, 8, true, s);
    mov_load(&e->a, S1, FIELD(e, scratch[0]));
    mov_store(&e->a, m, S1);
    lea(&e->a, true, GUEST_SP, rm_mem(GUEST_SP, -8));
}

static bool push_flags(struct emit *e, const struct decoded *d)
{
    struct place_of_code *a = &e->a;
    if (d->enc.osize != 8)
        return false;
    jit_need_cc(e);
    struct slow *s = jit_new_slow(e);
    put_insn(a, 0, false, 1, 0xb7, S0, FIELD(e, cc), 0); /* MOVZX */
    put_insn(a, 0, false, 0, 0x8b, S1, rm_reg(S0), 0);
    shift_imm(a, false, 5, S1, 8);
    alu_imm(a, false, 4, rm_reg(S0), CC_OF);
    shift_imm(a, false, 4, S0, 11);
    put_insn(a, 0, false, 0, 0x0b, S0, rm_reg(S1), 0);
    put_insn(a, 0, false, 0, 0x8b, S1, FIELD(e, sysflags), 0);
    alu_imm(a, false, 4, rm_reg(S1), ~(FL_VM | FL_RF));
    put_insn(a, 0, false, 0, 0x0b, S0, rm_reg(S1), 0);
    push_s0(e, s);
    jit_resume(e, d, s);
    return true;
}

static bool clear_if(struct emit *e)
{
    if (!(e->b->mode & MODE_IOPL))
        return false;
    jit_lose_eflags(e);
    alu_imm(&e->a, false, 4, FIELD(e, sysflags), ~FL_IF);
    return true;
}

static bool swap_gs(struct emit *e)
{
    struct place_of_code *a = &e->a;
    mov_load(a, S0, FIELD(e, seg[SEG_GS].base));
    mov_load(a, S1, FIELD(e, kernel_gs_base));
    mov_store(a, FIELD(e, kernel_gs_base), S0);
    mov_store(a, FIELD(e, seg[SEG_GS].base), S1);
    mov_store(a, FIELD(e, segbase[SEG_GS]), S1);
    return true;
}

static bool push(struct emit *e, const struct decoded *d)
{
    const struct uop *u = &d->uop;
    bool imm = (d->row->operand[0] & 0xff) == 'I';
    if (d->enc.osize != 8)
        return false;
    if (d->enc.mem) {
        if (!jit_can_address(e, d))
            return false;
        struct slow *s = jit_new_slow(e);
        mov_load(&e->a, S0, jit_operand(e, d, 8, false, s, false));
        push_s0(e, s);
        jit_resume(e, d, s);
        return true;
    }
    struct slow *s = jit_begin_access(e);
    struct rm m = jit_probe(e, GUEST_SP, -8, 8, true, s);
    if (imm) {
        put_insn(&e->a, 0, true, 0, 0xc7, 0, m, 4);
        put4(&e->a, (uint32_t)u->imm);
    } else {
        struct scratch scratch = {.used = 0};
        mov_store(&e->a, m, fetch(e, (int)jit_guest(u->d), &scratch));
    }
    lea(&e->a, true, GUEST_SP, rm_mem(GUEST_SP, -8));
    jit_resume(e, d, s);
    return true;
}

static bool pop(struct emit *e, const struct decoded *d)
{
    unsigned guest = jit_guest(d->uop.d), dst = homed(guest) ? S1 : host_reg(guest);
    if (d->enc.osize != 8)
        return false;
    struct slow *s = jit_begin_access(e);
    struct rm m = jit_probe(e, GUEST_SP, 0, 8, false, s);
    mov_load(&e->a, dst, m);
    if (guest != RSP)
        lea(&e->a, true, GUEST_SP, rm_mem(GUEST_SP, 8));
    give_back(e, (int)guest, dst);
    jit_resume(e, d, s);
    return true;
}

static bool leave(struct emit *e, const struct decoded *d)
{
    if (d->enc.osize != 8)
        return false;
    struct slow *s = jit_begin_access(e);
    struct rm m = jit_probe(e, RBP, 0, 8, false, s);
    mov_load(&e->a, S1, m);
    lea(&e->a, true, GUEST_SP, rm_mem(RBP, 8));
    mov_rr(&e->a, RBP, S1);
    jit_resume(e, d, s);
    return true;
}

/* DIV and IDIV of 32 and 64 bits. Whatever might overflow goes to the handler, so the host never traps: quotients of a
 * zero-extended dividend by a larger divisor half fit, those of a sign-extended one fit unless the divisor is 0 or -1. */
static bool divide(struct emit *e, const struct decoded *d)
{
    struct operands o;
    bool w = d->enc.osize == 8, sign = d->row->digit == 7;
    struct place_of_code *a = &e->a;
    jit_find_operands(d, &o);
    if (d->row->size != 1 || d->enc.osize == 2 || (d->enc.mem && !jit_can_address(e, d)))
        return false;
    jit_need_cc(e); /* the flags are undefined: they stay, as the interpreter leaves them */
    struct slow *s = jit_new_slow(e);
    if (d->enc.mem) { /* read once: another processor may write it meanwhile */
        struct rm m = jit_operand(e, d, d->enc.osize, false, s, false);
        put_insn(a, 0, w, 0, 0x8b, S1, m, 0);
    } else {
        struct scratch scratch = {.used = 0};
        unsigned r = fetch(e, o.rm, &scratch);
        if (r != S1)
            mov_rr(a, S1, r);
    }
    if (sign) {
        mov_rr(a, S0, RAX);
        shift_imm(a, w, 7, S0, w ? 63 : 31);
        put_insn(a, 0, w, 0, 0x3b, S0, rm_reg(RDX), 0);
        jit_slow_if(e, s, COND_NZ);
        lea(a, w, S0, rm_mem(S1, 1));
        alu_imm(a, w, 7, rm_reg(S0), 1);
        jit_slow_if(e, s, COND_BE);
    } else {
        put_insn(a, 0, w, 0, 0x3b, RDX, rm_reg(S1), 0);
        jit_slow_if(e, s, COND_AE);
    }
    put_insn(a, 0, w, 0, 0xf7, (unsigned)d->row->digit, rm_reg(S1), 0);
    e->flags = IN_CC;
    jit_resume(e, d, s);
    return true;
}

/* MOVS and STOS, with REP: the processor's own on host memory, when what is left lies in one page (of each). RDI and RSI
 * have host addresses meanwhile. The flags stay, the host's DF is clear. */
static bool string(struct emit *e, const struct decoded *d)
{
    bool moves = d->row->jit == JIT_MOVS, repeats = d->uop.imm == 1;
    unsigned size = d->row->size == 1 ? d->enc.osize : 1, scale = size == 8 ? 3 : size / 2;
    struct place_of_code *a = &e->a;
    if (d->uop.aflags || d->uop.seg >= SEG_FS || d->uop.imm > 1 || e->j->off & JIT_NO_STRINGS)
        return false;
    struct slow *s = jit_new_slow(e);
    put_insn(a, 0, false, 0, 0xf7, 0, FIELD(e, sysflags), 4); /* TEST sysflags, DF */
    put4(a, FL_DF);
    jit_slow_if(e, s, COND_NZ);
    if (repeats) {
        lea(a, true, S1, rm_mem(RCX, -1));
        alu_imm(a, true, 7, rm_reg(S1), 4096 / (int32_t)size - 1);
        jit_slow_if(e, s, COND_A); /* 0 times too */
    }
    for (unsigned write = moves ? 0 : 1; write < 2; write++) {
        unsigned r = write ? RDI : RSI;
        lea(a, true, S1, repeats ? rm_sib(r, RCX, scale, -1) : rm_mem(r, (int32_t)size - 1));
        jit_look_up(e, r, write, s);
        if (!write)
            mov_store(a, FIELD(e, scratch[0]), S0);
    }
    if (moves)
        mov_load(a, S1, FIELD(e, scratch[0]));
    put_insn(a, 0, true, 0, 0x03, RDI, rm_reg(S0), 0);
    if (moves)
        put_insn(a, 0, true, 0, 0x03, RSI, rm_reg(S1), 0);
    if (size == 2)
        put1(a, 0x66);
    if (repeats)
        put1(a, 0xf3);
    if (size == 8)
        put1(a, 0x48);
    put1(a, d->enc.opcode);
    put_insn(a, 0, true, 0, 0x2b, RDI, rm_reg(S0), 0);
    if (moves)
        put_insn(a, 0, true, 0, 0x2b, RSI, rm_reg(S1), 0);
    jit_resume(e, d, s);
    return true;
}

bool jit_insn(struct emit *e, const struct decoded *d, uint8_t observed)
{
    const struct oprow *r = d->row;
    if (!r || d->has_prefix || !host_has(e, r))
        return false;
    switch (r->jit) {
    case JIT_BITREG: return !d->enc.mem && copy(e, d, observed); /* in memory the bit may be far from the operand */
    case JIT_COPY: case JIT_COPYR: case JIT_COPYW: return copy(e, d, observed);
    case JIT_FIXED: return fixed(e, d, observed);
    case JIT_LEA: return load_address(e, d);
    case JIT_PUSH: return push(e, d);
    case JIT_POP: return pop(e, d);
    case JIT_LEAVE: return leave(e, d);
    case JIT_NOP: return true;
    case JIT_VEC: case JIT_VZEROUPPER: return jit_vector(e, d);
    case JIT_DIV: return divide(e, d);
    case JIT_MOVS: case JIT_STOS: return string(e, d);
    case JIT_PUSHF: return push_flags(e, d);
    case JIT_CLI: return clear_if(e);
    case JIT_SWAPGS: return swap_gs(e);
    case JIT_X87: case JIT_X87W: case JIT_X87C: case JIT_X87CW: return jit_x87(e, d);
    case JIT_XCHGAX: {
        unsigned guest = jit_guest(d->uop.d);
        struct scratch scratch = {.used = 0};
        if (guest == RAX) /* NOP */
            return true;
        unsigned h = fetch(e, (int)guest, &scratch);
        put_insn(&e->a, prefixes(d), wide(d), 0, 0x87, h, rm_reg(RAX), 0);
        give_back(e, (int)guest, h);
        return true;
    }
    default: return false;
    }
}
#endif
