/* SPDX-License-Identifier: Apache-2.0
 *
 * ADD OR ADC SBB AND SUB XOR CMP TEST, INC DEC NEG NOT, ADCX ADOX: every form and size.
 *
 * One macro per shape, one line per instruction. `_nf` versions make no flags (the block builder proved that nobody
 * reads them); `_lock` ones are a compare-and-swap loop on host memory. ADC and SBB read CF from c->cc.
 */
#include "op.h"

#define FORMS(bits, name, sfx, CALC)                                                                             \
    OP(name##_rr##bits##sfx) { U(bits) a = GET##bits(u->d), b = GET##bits(u->s); CALC(bits); SET##bits(u->d, r); NEXT; } \
    OP(name##_ri##bits##sfx) { U(bits) a = GET##bits(u->d), b = (U(bits))u->imm; CALC(bits); SET##bits(u->d, r); NEXT; } \
    OP(name##_rm##bits##sfx)                                                                                     \
    {                                                                                                            \
        U(bits) b = ld##bits(c, u, ea(c, u)), a = GET##bits(u->d);                                               \
        CALC(bits);                                                                                              \
        SET##bits(u->d, r);                                                                                      \
        NEXT;                                                                                                    \
    }
#define MEMORY(bits, name, sfx, CALC, HOW)                                                                       \
    OP(name##_mr##bits##sfx) { U(bits) b = GET##bits(u->s); HOW(bits, CALC(bits)); NEXT; }                       \
    OP(name##_mi##bits##sfx) { U(bits) b = (U(bits))u->imm; HOW(bits, CALC(bits)); NEXT; }

#define R_ADD(bits) U(bits) r = alu_add##bits(a, b, &c->cc)
#define R_SUB(bits) U(bits) r = alu_sub##bits(a, b, &c->cc)
#define R_AND(bits) U(bits) r = alu_and##bits(a, b, &c->cc)
#define R_OR(bits) U(bits) r = alu_or##bits(a, b, &c->cc)
#define R_XOR(bits) U(bits) r = alu_xor##bits(a, b, &c->cc)
#define R_ADC(bits) U(bits) r = alu_adc##bits(a, b, &c->cc)
#define R_SBB(bits) U(bits) r = alu_sbb##bits(a, b, &c->cc)
#define M_ADD(bits) U(bits) r = alu_add##bits(a, b, &f)
#define M_SUB(bits) U(bits) r = alu_sub##bits(a, b, &f)
#define M_AND(bits) U(bits) r = alu_and##bits(a, b, &f)
#define M_OR(bits) U(bits) r = alu_or##bits(a, b, &f)
#define M_XOR(bits) U(bits) r = alu_xor##bits(a, b, &f)
#define M_ADC(bits) U(bits) r = alu_adc##bits(a, b, &f)
#define M_SBB(bits) U(bits) r = alu_sbb##bits(a, b, &f)
#define N_ADD(bits) U(bits) r = (U(bits))(a + b)
#define N_SUB(bits) U(bits) r = (U(bits))(a - b)
#define N_AND(bits) U(bits) r = (U(bits))(a & b)
#define N_OR(bits) U(bits) r = (U(bits))(a | b)
#define N_XOR(bits) U(bits) r = (U(bits))(a ^ b)

#define ACCUMULATOR(bits, name, sfx, CALC) \
    OP(name##_ax_i##bits##sfx) { U(bits) a = GET##bits(0), b = (U(bits))u->imm; CALC(bits); SET##bits(0, r); NEXT; }
#define ACCUMULATOR8(name, CALC) OP(name##_al_i) { uint8_t a = GET8(0), b = (uint8_t)u->imm; CALC(8); SET8(0, r); NEXT; }

#define WITH_QUIET(name, X)               \
    EACH_SIZE(FORMS, name, , R_##X)       \
    EACH_SIZE(FORMS, name, _nf, N_##X)    \
    EACH_SIZE(MEMORY, name, , M_##X, RMW) \
    EACH_SIZE(MEMORY, name, _nf, N_##X, RMW) \
    EACH_SIZE(MEMORY, name, _lock, M_##X, LOCKED) \
    EACH_WIDE(ACCUMULATOR, name, , R_##X) \
    EACH_WIDE(ACCUMULATOR, name, _nf, N_##X) \
    ACCUMULATOR8(name, R_##X)
WITH_QUIET(add, ADD)
WITH_QUIET(sub, SUB)
WITH_QUIET(and, AND)
WITH_QUIET(or, OR)
WITH_QUIET(xor, XOR)

#define WITH_CARRY(name, X)               \
    EACH_SIZE(FORMS, name, , R_##X)       \
    EACH_SIZE(MEMORY, name, , M_##X, RMW) \
    EACH_SIZE(MEMORY, name, _lock, M_##X, LOCKED) \
    EACH_WIDE(ACCUMULATOR, name, , R_##X) \
    ACCUMULATOR8(name, R_##X)
WITH_CARRY(adc, ADC)
WITH_CARRY(sbb, SBB)

#define COMPARE(bits, name, alu)                                                                         \
    OP(name##_rr##bits) { alu##bits(GET##bits(u->d), GET##bits(u->s), &c->cc); NEXT; }                   \
    OP(name##_ri##bits) { alu##bits(GET##bits(u->d), (U(bits))u->imm, &c->cc); NEXT; }                   \
    OP(name##_mr##bits) { alu##bits(ld##bits(c, u, ea(c, u)), GET##bits(u->s), &c->cc); NEXT; }          \
    OP(name##_mi##bits) { alu##bits(ld##bits(c, u, ea(c, u)), (U(bits))u->imm, &c->cc); NEXT; }
#define COMPARE_AX(bits, name, alu) OP(name##_ax_i##bits) { alu##bits(GET##bits(0), (U(bits))u->imm, &c->cc); NEXT; }
EACH_SIZE(COMPARE, cmp, alu_sub)
EACH_SIZE(COMPARE, test, alu_and)
EACH_WIDE(COMPARE_AX, cmp, alu_sub)
EACH_WIDE(COMPARE_AX, test, alu_and)
#define COMPARE_RM(bits) OP(cmp_rm##bits) { alu_sub##bits(GET##bits(u->d), ld##bits(c, u, ea(c, u)), &c->cc); NEXT; }
EACH_SIZE(COMPARE_RM)
OP(cmp_al_i) { alu_sub8(GET8(0), (uint8_t)u->imm, &c->cc); NEXT; }
OP(test_al_i) { alu_and8(GET8(0), (uint8_t)u->imm, &c->cc); NEXT; }

#define UNARY(bits, name, sfx, RCALC, MCALC)                                                \
    OP(name##_r##bits##sfx) { U(bits) a = GET##bits(u->d); RCALC(bits); SET##bits(u->d, r); NEXT; } \
    OP(name##_m##bits##sfx) { RMW(bits, MCALC(bits)); NEXT; }
#define UNARY_LOCK(bits, name, MCALC) OP(name##_m##bits##_lock) { LOCKED(bits, MCALC(bits)); NEXT; }
#define R_INC(bits) U(bits) r = alu_inc##bits(a, &c->cc)
#define R_DEC(bits) U(bits) r = alu_dec##bits(a, &c->cc)
#define R_NEG(bits) U(bits) r = alu_neg##bits(a, &c->cc)
#define M_INC(bits) U(bits) r = alu_inc##bits(a, &f)
#define M_DEC(bits) U(bits) r = alu_dec##bits(a, &f)
#define M_NEG(bits) U(bits) r = alu_neg##bits(a, &f)
#define N_INC(bits) U(bits) r = (U(bits))(a + 1)
#define N_DEC(bits) U(bits) r = (U(bits))(a - 1)
#define N_NEG(bits) U(bits) r = (U(bits))-a
#define N_NOT(bits) U(bits) r = (U(bits))~a
#define UNARY_ALL(name, X)                     \
    EACH_SIZE(UNARY, name, , R_##X, M_##X)     \
    EACH_SIZE(UNARY, name, _nf, N_##X, N_##X)  \
    EACH_SIZE(UNARY_LOCK, name, M_##X)
UNARY_ALL(inc, INC)
UNARY_ALL(dec, DEC)
UNARY_ALL(neg, NEG)
EACH_SIZE(UNARY, not, , N_NOT, N_NOT)
EACH_SIZE(UNARY_LOCK, not, N_NOT)

/* ADCX and ADOX add with one flag as carry in and out and leave the others. */
#define CARRY_CHAIN(bits, name, FLAG)                                                  \
    static inline void name##bits(struct cpu *c, const struct uop *u, U(bits) b)       \
    {                                                                                  \
        unsigned __int128 sum = (unsigned __int128)GET##bits(u->d) + b + !!(c->cc & FLAG); \
        c->cc = (uint16_t)((c->cc & ~FLAG) | (sum >> bits & 1 ? FLAG : 0));            \
        SET##bits(u->d, (U(bits))sum);                                                 \
    }                                                                                  \
    OP(name##_rr##bits) { name##bits(c, u, GET##bits(u->s)); NEXT; }                   \
    OP(name##_rm##bits) { name##bits(c, u, ld##bits(c, u, ea(c, u))); NEXT; }
CARRY_CHAIN(32, adcx, CC_CF)
CARRY_CHAIN(64, adcx, CC_CF)
CARRY_CHAIN(32, adox, CC_OF)
CARRY_CHAIN(64, adox, CC_OF)
