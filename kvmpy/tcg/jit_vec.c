/* SPDX-License-Identifier: Apache-2.0
 *
 * Host code of SSE and AVX instructions: the guest's own opcode on the host register of the same number.
 *
 * Within a block guest vector registers stay in host registers once they are loaded; they go to c->v before the block
 * ends, before a handler is called, and on the slow path of a memory access (which loads them again). 16 bytes or 32
 * are held: legacy instructions leave the upper half alone, in c->v as in the register; VEX instructions clear it.
 *
 * Floating point runs with the guest's MXCSR in the host's unit (fphost.h) and all exceptions masked. A block that can
 * raise them looks first whether the guest masks them too; else the interpreter's handlers do it.
 */
#include "jit_code.h"

#if HAVE_JIT
#include "fphost.h"
#include "optable.h"

static struct rm where(struct emit *e, unsigned n) { return rm_abs(&e->c->v[n]); }
static bool host_avx(const struct emit *e) { return e->j->host_features[FEAT_AVX / 64] >> (FEAT_AVX % 64) & 1; }

static void store_vector(struct place_of_code *a, struct emit *e, unsigned n, bool full)
{
    if (full)
        put_vex(a, 0, false, true, 1, 0x11, n, 0, where(e, n), 0);
    else
        put_insn(a, 0, false, 1, 0x11, n, where(e, n), 0);
}
static void load_vector(struct place_of_code *a, struct emit *e, unsigned n, bool full)
{
    if (host_avx(e))
        put_vex(a, 0, false, full, 1, 0x10, n, 0, where(e, n), 0);
    else
        put_insn(a, 0, false, 1, 0x10, n, where(e, n), 0);
}

void jit_spill(struct place_of_code *a, struct emit *e, struct vectors v)
{
    for (unsigned n = 0; n < 16; n++)
        if (v.low >> n & 1)
            store_vector(a, e, n, v.full >> n & 1);
    jit_store_fip(a, e, v.fip);
    if (v.wide) { /* VZEROUPPER: C code uses the legacy encodings */
        put1(a, 0xc5);
        put1(a, 0xf8);
        put1(a, 0x77);
    }
}

void jit_reload(struct place_of_code *a, struct emit *e, struct vectors v)
{
    for (unsigned n = 0; n < 16; n++)
        if (v.low >> n & 1)
            load_vector(a, e, n, v.full >> n & 1);
}

void jit_flush_vectors(struct emit *e)
{
    jit_spill(&e->a, e, e->dirty);
    e->dirty = e->held = (struct vectors){0};
}

static void hold(struct emit *e, unsigned n, bool full)
{
    if (full ? e->held.full >> n & 1 : e->held.low >> n & 1)
        return;
    if (e->dirty.low >> n & 1) { /* the lower half is newer here, the upper one is only there */
        store_vector(&e->a, e, n, false);
        e->dirty.low &= (uint16_t)~(1u << n);
    }
    load_vector(&e->a, e, n, full);
    e->held.low |= (uint16_t)(1u << n);
    if (full) {
        e->held.full |= (uint16_t)(1u << n);
        e->dirty.wide = true;
    }
}

static void written(struct emit *e, unsigned n, bool vex)
{
    uint16_t bit = (uint16_t)(1u << n);
    e->held.low |= bit;
    e->dirty.low |= bit;
    if (vex) {
        e->held.full |= bit;
        e->dirty.full |= bit;
        e->dirty.wide = true;
    }
}

static void zero_upper(struct emit *e)
{
    jit_flush_vectors(e);
    put_vex(&e->a, 1, false, false, 1, 0xef, 0, 0, rm_reg(0), 0); /* VPXOR xmm0, xmm0, xmm0 */
    for (unsigned n = 0; n < 16; n++)
        put_insn(&e->a, 0, false, 1, 0x11, 0, rm_abs(&e->c->v[n].q[2]), 0);
}

static unsigned memory_size(const struct decoded *d)
{
    unsigned full = d->enc.vex && d->enc.l ? 32 : 16;
    switch (d->row->vec_size) {
    case VEC_FULL: return full;
    case VEC_HALF: return full / 2;
    case VEC_QUARTER: return full / 4;
    case VEC_EIGHTH: return full / 8;
    case VEC_BY_W: return d->enc.w ? 8 : 4;
    default: return d->row->vec_size;
    }
}

/* Unmasked exceptions are the interpreter's. */
static void need_masked(struct emit *e, const struct decoded *d)
{
    if (e->masked)
        return;
    jit_lose_eflags(e);
    put_insn(&e->a, 0, false, 0, 0x8b, S0, FIELD(e, mxcsr), 0);
    alu_imm(&e->a, false, 4, rm_reg(S0), MX_MASKS);
    alu_imm(&e->a, false, 7, rm_reg(S0), MX_MASKS);
    jit_leave_if(e, COND_NZ, e->start + d->uop.off);
    e->masked = true;
}

struct shape { int reg, rm, vvvv, is4; bool gpr_reg, gpr_rm; };

static bool shape_of(const struct emit *e, const struct decoded *d, struct shape *s)
{
    const uint8_t slot[4] = {d->uop.d, d->uop.s, d->uop.x, 0};
    *s = (struct shape){-1, -1, -1, -1, false, false};
    for (unsigned i = 0; i < 4 && d->row->operand[i]; i++) {
        switch (d->row->operand[i] & 0xff) {
        case 'V': s->reg = slot[i]; break;
        case 'W': case 'U': s->rm = slot[i]; break;
        case 'H': s->vvvv = slot[i]; break;
        case 'L': s->is4 = (int)(d->uop.imm >> 4 & 15); break;
        case 'G': s->reg = slot[i] / 8; s->gpr_reg = true; break;
        case 'E': s->rm = slot[i] / 8; s->gpr_rm = true; break;
        case 'M': case 'I': break;
        default: return false;
        }
    }
    (void)e;
    if (d->enc.mem)
        s->rm = -1;
    return !(s->gpr_reg && homed((unsigned)s->reg)) && !(s->gpr_rm && s->rm >= 0 && homed((unsigned)s->rm));
}

bool jit_vector_access(const struct emit *e, const struct decoded *d, unsigned *size, bool *write)
{
    struct shape s;
    unsigned kind = d->row->operand[0] & 0xff;
    *size = memory_size(d);
    *write = kind == 'W' || kind == 'M' || kind == 'E';
    return !(e->j->off & JIT_NO_VECTORS) && !(d->row->vec & VEC_ALIGNED) && shape_of(e, d, &s);
}

bool jit_vector(struct emit *e, const struct decoded *d)
{
    const struct oprow *r = d->row;
    struct shape s;
    bool vex = d->enc.vex, full = vex && d->enc.l;
    if (e->j->off & JIT_NO_VECTORS)
        return false;
    if (r->jit == JIT_VZEROUPPER) {
        zero_upper(e);
        return true;
    }
    if (!shape_of(e, d, &s) || (d->enc.mem && !jit_can_address(e, d)))
        return false;
    unsigned kind = r->operand[0] & 0xff, size = memory_size(d);
    bool store = d->enc.mem && (kind == 'W' || kind == 'M' || kind == 'E');
    int dst = r->vec & VEC_COMPARE || store || kind == 'G' || kind == 'E' ? -1 : kind == 'V' ? s.reg : kind == 'H' ? s.vvvv : s.rm;
    bool fresh = vex ? !(r->vec & VEC_READS) : r->vec & VEC_FRESH || (r->vec & VEC_FRESH_LOAD && d->enc.mem);
    if (r->vec & VEC_FP)
        need_masked(e, d);
    const int vectors[3] = {s.gpr_reg ? -1 : s.reg, s.gpr_rm ? -1 : s.rm, s.vvvv};
    const unsigned of[3] = {'V', 'W', 'H'};
    for (unsigned i = 0; i < 3; i++) {
        bool is_dst = of[i] == kind || (i == 1 && kind == 'U');
        if (vectors[i] >= 0 && !(is_dst && dst >= 0 && fresh))
            hold(e, (unsigned)vectors[i], full);
    }
    if (s.is4 >= 0)
        hold(e, (unsigned)s.is4, full);
    if (r->vec & VEC_XMM0)
        hold(e, 0, false);
    struct slow *slow = NULL;
    struct rm rm = rm_reg(s.rm >= 0 ? (s.gpr_rm ? host_reg((unsigned)s.rm) : (unsigned)s.rm) : 0);
    if (d->enc.mem) {
        slow = jit_begin_access(e);
        e->aligned = r->vec & VEC_ALIGNED ? size : 0;
        rm = jit_operand(e, d, size, store, slow, false);
        e->aligned = 0;
    }
    unsigned reg = r->digit >= 0 ? (unsigned)r->digit : s.gpr_reg ? host_reg((unsigned)s.reg) : s.reg >= 0 ? (unsigned)s.reg : 0;
    if (vex) {
        static const uint8_t pp[] = {0, 0, 1, 2, 3};
        put_vex(&e->a, pp[r->prefix], d->enc.w, d->enc.l, d->enc.map, d->enc.opcode, reg, s.vvvv >= 0 ? (unsigned)s.vvvv : 0, rm, d->enc.imm);
    } else {
        static const uint8_t mandatory[] = {0, 0, P_66, P_F3, P_F2};
        put_insn(&e->a, mandatory[r->prefix], d->enc.w, d->enc.map, d->enc.opcode, reg, rm, d->enc.imm);
    }
    const uint8_t *imm = e->bytes + d->uop.off + d->uop.len - d->enc.imm;
    for (unsigned i = 0; i < d->enc.imm; i++)
        put1(&e->a, imm[i]);
    if (dst >= 0)
        written(e, (unsigned)dst, vex);
    if (d->flags_written)
        e->flags = IN_EFLAGS;
    if (slow)
        jit_resume(e, d, slow);
    return true;
}
#endif
