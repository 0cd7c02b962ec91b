/* SPDX-License-Identifier: Apache-2.0
 *
 * MUL IMUL DIV IDIV MULX, the decimal instructions, and the sign extensions of the accumulator.
 *
 * SF ZF AF PF after a multiplication are undefined in the manual and 0 here: what they were before may never have been
 * computed (quiet_flags in block.c). Flags after a division are undefined and stay.
 */
#include "op.h"

static inline uint16_t mul_cc(bool overflow) { return (uint16_t)(CC_ONE | (overflow ? CC_CF | CC_OF : 0)); }

#define ONE_OPERAND(bits, wide, swide)                                                        \
    static inline void mul_##bits(struct cpu *c, U(bits) b)                                   \
    {                                                                                         \
        wide r = (wide)GET##bits(0) * b;                                                      \
        SET##bits(0, (U(bits))r);                                                             \
        SET##bits(RDX * 8, (U(bits))(r >> bits));                                             \
        c->cc = mul_cc((U(bits))(r >> bits) != 0);                                     \
    }                                                                                         \
    static inline void imul1_##bits(struct cpu *c, U(bits) b)                                 \
    {                                                                                         \
        swide r = (swide)(S(bits))GET##bits(0) * (S(bits))b;                                  \
        SET##bits(0, (U(bits))r);                                                             \
        SET##bits(RDX * 8, (U(bits))(r >> bits));                                             \
        c->cc = mul_cc(r != (S(bits))r);                                               \
    }                                                                                         \
    static inline void div_##bits(struct cpu *c, const struct uop *u, U(bits) b)              \
    {                                                                                         \
        wide a = (wide)GET##bits(RDX * 8) << bits | GET##bits(0);                             \
        if (unlikely(!b || GET##bits(RDX * 8) >= b))                                          \
            cpu_fault(c, u, EXC_DE);                                                          \
        SET##bits(0, (U(bits))(a / b));                                                       \
        SET##bits(RDX * 8, (U(bits))(a % b));                                                 \
    }                                                                                         \
    static inline void idiv_##bits(struct cpu *c, const struct uop *u, U(bits) divisor)       \
    {                                                                                         \
        swide a = (swide)((wide)GET##bits(RDX * 8) << bits | GET##bits(0));                   \
        S(bits) b = (S(bits))divisor;                                                         \
        /* the wide minimum / -1 overflows even the wide type; its quotient cannot fit anyway */ \
        if (unlikely(!b || (b == -1 && a == (swide)((wide)1 << (2 * bits - 1)))))             \
            cpu_fault(c, u, EXC_DE);                                                          \
        swide q = a / b;                                                                      \
        if (unlikely(q != (S(bits))q))                                                        \
            cpu_fault(c, u, EXC_DE);                                                          \
        SET##bits(0, (U(bits))q);                                                             \
        SET##bits(RDX * 8, (U(bits))(a % b));                                                 \
    }                                                                                         \
    OP(mul_r##bits) { mul_##bits(c, GET##bits(u->d)); NEXT; }                                 \
    OP(mul_m##bits) { mul_##bits(c, ld##bits(c, u, ea(c, u))); NEXT; }                        \
    OP(mul_r##bits##_nf) { mul_##bits(c, GET##bits(u->d)); NEXT; }                            \
    OP(mul_m##bits##_nf) { mul_##bits(c, ld##bits(c, u, ea(c, u))); NEXT; }                   \
    OP(imul1_r##bits) { imul1_##bits(c, GET##bits(u->d)); NEXT; }                             \
    OP(imul1_m##bits) { imul1_##bits(c, ld##bits(c, u, ea(c, u))); NEXT; }                    \
    OP(div_r##bits) { div_##bits(c, u, GET##bits(u->d)); NEXT; }                              \
    OP(div_m##bits) { div_##bits(c, u, ld##bits(c, u, ea(c, u))); NEXT; }                     \
    OP(idiv_r##bits) { idiv_##bits(c, u, GET##bits(u->d)); NEXT; }                            \
    OP(idiv_m##bits) { idiv_##bits(c, u, ld##bits(c, u, ea(c, u))); NEXT; }
ONE_OPERAND(16, uint32_t, int32_t)
ONE_OPERAND(32, uint64_t, int64_t)
ONE_OPERAND(64, unsigned __int128, __int128)

static inline void mul8(struct cpu *c, uint8_t b)
{
    uint16_t r = (uint16_t)(GET8(0) * b);
    SET16(0, r);
    c->cc = mul_cc(r >> 8);
}
static inline void imul8(struct cpu *c, uint8_t b)
{
    int16_t r = (int16_t)((int8_t)GET8(0) * (int8_t)b);
    SET16(0, (uint16_t)r);
    c->cc = mul_cc(r != (int8_t)r);
}
static inline void div8(struct cpu *c, const struct uop *u, uint8_t b)
{
    uint16_t a = GET16(0);
    if (!b || a >> 8 >= b)
        cpu_fault(c, u, EXC_DE);
    SET16(0, (uint16_t)((a % b) << 8 | a / b));
}
static inline void idiv8(struct cpu *c, const struct uop *u, uint8_t divisor)
{
    int a = (int16_t)GET16(0), b = (int8_t)divisor;
    if (!b || a / b != (int8_t)(a / b))
        cpu_fault(c, u, EXC_DE);
    SET16(0, (uint16_t)((a % b & 0xff) << 8 | (a / b & 0xff)));
}
OP(mul_r8) { mul8(c, GET8(u->d)); NEXT; }
OP(mul_m8) { mul8(c, ld8(c, u, ea(c, u))); NEXT; }
OP(imul1_r8) { imul8(c, GET8(u->d)); NEXT; }
OP(imul1_m8) { imul8(c, ld8(c, u, ea(c, u))); NEXT; }
OP(div_r8) { div8(c, u, GET8(u->d)); NEXT; }
OP(div_m8) { div8(c, u, ld8(c, u, ea(c, u))); NEXT; }
OP(idiv_r8) { idiv8(c, u, GET8(u->d)); NEXT; }
OP(idiv_m8) { idiv8(c, u, ld8(c, u, ea(c, u))); NEXT; }

#define IMUL(bits)                                                                                     \
    static inline U(bits) imul##bits(struct cpu *c, U(bits) a, U(bits) b)                              \
    {                                                                                                  \
        S(bits) r;                                                                                     \
        bool over = __builtin_mul_overflow((S(bits))a, (S(bits))b, &r);                                \
        c->cc = mul_cc(over);                                                                   \
        return (U(bits))r;                                                                             \
    }                                                                                                  \
    OP(imul_rr##bits) { SET##bits(u->d, imul##bits(c, GET##bits(u->d), GET##bits(u->s))); NEXT; }      \
    OP(imul_rm##bits) { SET##bits(u->d, imul##bits(c, GET##bits(u->d), ld##bits(c, u, ea(c, u)))); NEXT; } \
    OP(imul_rri##bits) { SET##bits(u->d, imul##bits(c, GET##bits(u->s), (U(bits))u->imm)); NEXT; }     \
    OP(imul_rmi##bits) { SET##bits(u->d, imul##bits(c, ld##bits(c, u, ea(c, u)), (U(bits))u->imm)); NEXT; } \
    OP(imul_rr##bits##_nf) { SET##bits(u->d, (uint64_t)GET##bits(u->d) * GET##bits(u->s)); NEXT; }     \
    OP(imul_rm##bits##_nf) { SET##bits(u->d, (uint64_t)GET##bits(u->d) * ld##bits(c, u, ea(c, u))); NEXT; } \
    OP(imul_rri##bits##_nf) { SET##bits(u->d, (uint64_t)GET##bits(u->s) * u->imm); NEXT; }             \
    OP(imul_rmi##bits##_nf) { SET##bits(u->d, (uint64_t)ld##bits(c, u, ea(c, u)) * u->imm); NEXT; }
EACH_WIDE(IMUL)

#define MULX(bits, wide)                                                            \
    static inline void mulx##bits(struct cpu *c, const struct uop *u, U(bits) b)    \
    {                                                                               \
        wide r = (wide)GET##bits(RDX * 8) * b;                                      \
        SET##bits(u->s, (U(bits))r);                                                \
        SET##bits(u->d, (U(bits))(r >> bits));                                      \
    }                                                                               \
    OP(mulx_rrr##bits) { mulx##bits(c, u, GET##bits(u->x)); NEXT; }                 \
    OP(mulx_rrm##bits) { mulx##bits(c, u, ld##bits(c, u, ea(c, u))); NEXT; }
MULX(32, uint64_t)
MULX(64, unsigned __int128)

OP(cbw_16) { SET16(0, (int8_t)GET8(0)); NEXT; }
OP(cbw_32) { SET32(0, (int16_t)GET16(0)); NEXT; }
OP(cbw_64) { SET64(0, (int64_t)(int32_t)GET32(0)); NEXT; }
OP(cwd_16) { SET16(RDX * 8, (int16_t)GET16(0) >> 15); NEXT; }
OP(cwd_32) { SET32(RDX * 8, (int32_t)GET32(0) >> 31); NEXT; }
OP(cwd_64) { SET64(RDX * 8, (int64_t)GET64(0) >> 63); NEXT; }

/* ---- decimal, SDM vol. 2; OF as processors have it (unchanged or cleared, it is undefined) ---- */
static void al_flags(struct cpu *c, uint8_t al, bool af, bool cf)
{
    SET8(0, al);
    c->cc = (uint16_t)(cc_szp(al, 8) | (af ? CC_AF : 0) | (cf ? CC_CF : 0));
}
OP(daa)
{
    uint8_t al = GET8(0), old = al;
    bool cf = c->cc & CC_CF, af = (al & 15) > 9 || (c->cc & CC_AF);
    if (af)
        al = (uint8_t)(al + 6);
    bool carry = old > 0x99 || cf;
    if (carry)
        al = (uint8_t)(al + 0x60);
    al_flags(c, al, af, carry);
    NEXT;
}
OP(das)
{
    uint8_t al = GET8(0), old = al;
    bool cf = c->cc & CC_CF, af = (al & 15) > 9 || (c->cc & CC_AF), carry = false;
    if (af) {
        carry = cf || al < 6;
        al = (uint8_t)(al - 6);
    }
    if (old > 0x99 || cf) {
        al = (uint8_t)(al - 0x60);
        carry = true;
    }
    al_flags(c, al, af, carry);
    NEXT;
}
static void adjust(struct cpu *c, int by)
{
    bool fix = (GET8(0) & 15) > 9 || (c->cc & CC_AF);
    if (fix)
        SET16(0, GET16(0) + by * 0x106);
    SET8(0, GET8(0) & 15);
    c->cc = (uint16_t)(cc_szp(GET8(0), 8) | (fix ? CC_AF | CC_CF : 0));
}
OP(aaa) { adjust(c, 1); NEXT; }
OP(aas) { adjust(c, -1); NEXT; }
OP(aam_i)
{
    uint8_t al = GET8(0), by = (uint8_t)u->imm;
    if (!by)
        cpu_fault(c, u, EXC_DE);
    SET8(1, al / by);
    al_flags(c, al % by, false, false);
    NEXT;
}
OP(aad_i)
{
    al_flags(c, (uint8_t)(GET8(0) + GET8(1) * (uint8_t)u->imm), false, false);
    SET8(1, 0);
    NEXT;
}
OP(salc) { SET8(0, c->cc & CC_CF ? 0xff : 0); NEXT; }
