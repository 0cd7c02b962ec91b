/* SPDX-License-Identifier: Apache-2.0
 *
 * x87 arithmetic, comparison and the transcendental functions. How an instruction runs on the host: x87.h.
 *
 * Shapes: ST0 = ST0 op operand (register or memory), STi = STi op ST0 with or without a pop, ST0 = f(ST0),
 * ST0 = f(ST0, ST1), two results, and two operands into one with a pop. For the last two the depth of the host's
 * stack afterwards depends on what happened, so FNSAVE brings everything back at once.
 * Results of the transcendental functions are this host's, to the last bit.
 */
#include "x87.h"

/* ---- two operands ---- */
/* out = insn applied to ST0 = a, with %1 naming the other operand */
#define RUN2(insn, out, a, b)                                                                                    \
    __asm__ volatile("fldt %3\n\tfldt %2\n\t" insn " %%st(1), %%st\n\t" X87_END "fstpt %0\n\tfstp %%st(0)"       \
                     : X80_OUT(out), "=a"(sw) : X80(a), X80(b) : X87_CLOBBER)
#define RUN_MEM(insn, out, a, m)                                                                                 \
    __asm__ volatile("fldt %2\n\t" insn " %3\n\t" X87_END "fstpt %0" : X80_OUT(out), "=a"(sw) : X80(a), "m"(m) : X87_CLOBBER)

static inline bool lacks(struct cpu *c, unsigned i, unsigned j) { return unlikely(x87_empty(c, i) || x87_empty(c, j)); }
/* Stack underflow with the result in ST(i); then the pop. */
static __attribute__((noinline)) void underflow(struct cpu *c, const struct uop *u, unsigned i, bool pop)
{
    if (!x87_stack_fault(c, u, false))
        return;
    x87_set(c, i, &x87_indefinite);
    if (pop)
        x87_pop(c);
}
/* dst names the stack register that takes ST(dst) op ST(other) */
#define BINARY(name, insn, dst, other, pop)                                                                      \
    OP(name##_r)                                                                                                 \
    {                                                                                                            \
        x87_wait(c, u);                                                                                          \
        x87_pointers(c, u);                                                                                      \
        if (lacks(c, 0, u->d)) {                                                                                 \
            underflow(c, u, dst, pop);                                                                           \
            NEXT_RETURN;                                                                                         \
        }                                                                                                        \
        uint16_t sw;                                                                                             \
        x87_reg r;                                                                                               \
        RUN2(insn, &r, ST(dst), ST(other));                                                                      \
        if (likely(x87_status(c, u, sw, SW_C1))) {                                                               \
            memcpy(ST(dst)->raw, r.raw, 10);                                                                     \
            if (pop)                                                                                             \
                x87_pop(c);                                                                                      \
        }                                                                                                        \
        NEXT_RETURN;                                                                                             \
    }
#define MEMORY(name, bits, insn)                                                                                 \
    OP(name##_m)                                                                                                 \
    {                                                                                                            \
        x87_wait(c, u);                                                                                          \
        uint##bits##_t m = ld##bits(c, u, ea(c, u));                                                             \
        x87_pointers(c, u);                                                                                      \
        x87_data_pointer(c, u);                                                                                  \
        if (unlikely(x87_empty(c, 0))) {                                                                         \
            underflow(c, u, 0, false);                                                                           \
            NEXT_RETURN;                                                                                         \
        }                                                                                                        \
        uint16_t sw;                                                                                             \
        x87_reg r;                                                                                               \
        RUN_MEM(insn, &r, ST(0), m);                                                                             \
        if (likely(x87_status(c, u, sw, SW_C1)))                                                                 \
            memcpy(ST(0)->raw, r.raw, 10);                                                                       \
        NEXT_RETURN;                                                                                             \
    }
#define ARITH(op)                                                                                                \
    BINARY(f##op##_0, "f" #op, 0, u->d, false) BINARY(f##op##_i, "f" #op, u->d, 0, false) BINARY(f##op##p, "f" #op, u->d, 0, true) \
    MEMORY(f##op##32, 32, "f" #op "s") MEMORY(f##op##64, 64, "f" #op "l") MEMORY(fi##op##16, 16, "fi" #op "s") MEMORY(fi##op##32, 32, "fi" #op "l")
ARITH(add) ARITH(mul) ARITH(sub) ARITH(subr) ARITH(div) ARITH(divr)

/* ---- comparison: all four codes; unordered when something is missing ---- */
static inline bool compare_missing(struct cpu *c, const struct uop *u, bool missing, bool eflags)
{
    if (likely(!missing))
        return false;
    if (x87_stack_fault(c, u, false) && !eflags)
        c->fpu.sw |= SW_C0 | SW_C2 | SW_C3;
    return true;
}
#define POPS(n)                                                                                                  \
    do {                                                                                                         \
        for (int i_ = 0; i_ < (n); i_++)                                                                         \
            x87_pop(c);                                                                                          \
    } while (0)
/* Unmasked invalid: nothing but the flags changes. EFLAGS says whether ZF PF CF are wanted in place of the codes. */
#define COMPARE_END(host, n, EFLAGS, missing)                                                                    \
    if (!compare_missing(c, u, missing, EFLAGS)) {                                                                     \
        uint16_t sw;                                                                                             \
        host;                                                                                                    \
        if (!x87_status(c, u, sw, EFLAGS ? 0 : SW_CC)    )                                                       \
            NEXT_RETURN;                                                                                         \
        codes = sw;                                                                                              \
    } else if (!(c->fpu.cw & SW_IE)) {                                                                           \
        NEXT_RETURN;                                                                                             \
    }                                                                                                            \
    if (EFLAGS)                                                                                                  \
        c->cc = (uint16_t)(CC_ONE | (codes & SW_C3 ? CC_ZF : 0) | (codes & SW_C2 ? CC_PF : 0) | (codes & SW_C0 ? CC_CF : 0)); \
    POPS(n);                                                                                                     \
    NEXT_RETURN
#define COMPARE(name, insn, n, eflags)                                                                           \
    OP(name##_r)                                                                                                 \
    {                                                                                                            \
        x87_wait(c, u);                                                                                          \
        x87_pointers(c, u);                                                                                      \
        uint16_t codes = SW_C0 | SW_C2 | SW_C3;                                                                  \
        COMPARE_END(__asm__ volatile("fldt %2\n\tfldt %1\n\t" insn " %%st(1)\n\t" X87_END "fstp %%st(0)\n\tfstp %%st(0)" \
                                     : "=a"(sw) : X80(ST(0)), X80(ST(u->d)) : X87_CLOBBER), n, eflags, lacks(c, 0, u->d)); \
    }
COMPARE(fcom, "fcom", 0, 0) COMPARE(fcomp, "fcom", 1, 0) COMPARE(fcompp, "fcom", 2, 0)
COMPARE(fucom, "fucom", 0, 0) COMPARE(fucomp, "fucom", 1, 0) COMPARE(fucompp, "fucom", 2, 0)
COMPARE(fcomi, "fcom", 0, 1) COMPARE(fcomip, "fcom", 1, 1) COMPARE(fucomi, "fucom", 0, 1) COMPARE(fucomip, "fucom", 1, 1)
#define COMPARE_MEM(name, bits, insn, n)                                                                         \
    OP(name##_m)                                                                                                 \
    {                                                                                                            \
        x87_wait(c, u);                                                                                          \
        uint##bits##_t m = ld##bits(c, u, ea(c, u));                                                             \
        x87_pointers(c, u);                                                                                      \
        x87_data_pointer(c, u);                                                                                  \
        uint16_t codes = 0;                                                                                      \
        COMPARE_END(__asm__ volatile("fldt %1\n\t" insn " %2\n\t" X87_END "fstp %%st(0)" : "=a"(sw) : X80(ST(0)), "m"(m) : X87_CLOBBER), \
                    n, 0, x87_empty(c, 0));                                                                      \
    }
COMPARE_MEM(fcom32, 32, "fcoms", 0) COMPARE_MEM(fcomp32, 32, "fcoms", 1) COMPARE_MEM(fcom64, 64, "fcoml", 0) COMPARE_MEM(fcomp64, 64, "fcoml", 1)
COMPARE_MEM(ficom16, 16, "ficoms", 0) COMPARE_MEM(ficomp16, 16, "ficoms", 1) COMPARE_MEM(ficom32, 32, "ficoml", 0) COMPARE_MEM(ficomp32, 32, "ficoml", 1)
OP(ftst)
{
    x87_wait(c, u);
    x87_pointers(c, u);
    uint16_t codes = 0;
    COMPARE_END(__asm__ volatile("fldt %1\n\tftst\n\t" X87_END "fstp %%st(0)" : "=a"(sw) : X80(ST(0)) : X87_CLOBBER), 0, 0, x87_empty(c, 0));
}
OP(fxam)
{
    uint16_t sw;
    x87_wait(c, u);
    x87_pointers(c, u);
    __asm__ volatile("fldt %1\n\tfxam\n\tfnstsw %%ax\n\tfstp %%st(0)" : "=a"(sw) : X80(ST(0)) : X87_CLOBBER);
    if (x87_empty(c, 0))
        sw = (uint16_t)(SW_C3 | SW_C0 | (sw & SW_C1));
    c->fpu.sw = (uint16_t)((c->fpu.sw & ~SW_CC) | (sw & SW_CC));
    NEXT_RETURN;
}

/* ---- one operand ---- */
#define UNARY(name, codes)                                                                                       \
    OP(name)                                                                                                     \
    {                                                                                                            \
        x87_wait(c, u);                                                                                          \
        x87_pointers(c, u);                                                                                      \
        if (unlikely(x87_empty(c, 0))) {                                                                         \
            c->fpu.sw &= (uint16_t) ~((codes) & SW_C2);                                                          \
            underflow(c, u, 0, false);                                                                           \
            NEXT_RETURN;                                                                                         \
        }                                                                                                        \
        uint16_t sw;                                                                                             \
        x87_reg r;                                                                                               \
        __asm__ volatile("fldt %2\n\t" #name "\n\t" X87_END "fstpt %0" : X80_OUT(&r), "=a"(sw) : X80(ST(0)) : X87_CLOBBER); \
        if (likely(x87_status(c, u, sw, codes)))                                                                 \
            memcpy(ST(0)->raw, r.raw, 10);                                                                       \
        NEXT_RETURN;                                                                                             \
    }
UNARY(fchs, SW_C1) UNARY(fabs, SW_C1) UNARY(fsqrt, SW_C1) UNARY(frndint, SW_C1) UNARY(f2xm1, SW_C1)
UNARY(fsin, SW_C1 | SW_C2) UNARY(fcos, SW_C1 | SW_C2)

/* ---- ST0 = f(ST0, ST1) ---- */
#define BINARY_TOP(name, codes)                                                                                  \
    OP(name)                                                                                                     \
    {                                                                                                            \
        x87_wait(c, u);                                                                                          \
        x87_pointers(c, u);                                                                                      \
        if (lacks(c, 0, 1)) {                                                                                    \
            c->fpu.sw &= (uint16_t) ~((codes) & SW_C2);                                                          \
            underflow(c, u, 0, false);                                                                           \
            NEXT_RETURN;                                                                                         \
        }                                                                                                        \
        uint16_t sw;                                                                                             \
        x87_reg r;                                                                                               \
        __asm__ volatile("fldt %3\n\tfldt %2\n\t" #name "\n\t" X87_END "fstpt %0\n\tfstp %%st(0)"                \
                         : X80_OUT(&r), "=a"(sw) : X80(ST(0)), X80(ST(1)) : X87_CLOBBER);                        \
        /* no quotient bits without a quotient */                                                                \
        bool nan = (r.exp & 0x7fff) == 0x7fff && r.mant << 1;                                                    \
        if (likely(x87_status(c, u, sw, nan ? (codes) & (SW_C1 | SW_C2) : (codes))))                                                                 \
            memcpy(ST(0)->raw, r.raw, 10);                                                                       \
        NEXT_RETURN;                                                                                             \
    }
BINARY_TOP(fprem, SW_CC) BINARY_TOP(fprem1, SW_CC) BINARY_TOP(fscale, SW_C1)

/* ---- what changes the depth ---- */
#define RUN_SAVE(insn, load2, image, a, b)                                                                       \
    __asm__ volatile(load2 "fldt %1\n\t" insn "\n\tfnsave %0\n\tfldcw %3" : "=m"(image) : X80(a), X80(b), "m"(c->fpu.cw) : X87_CLOBBER)

/* ST0 becomes the first result and the second is pushed, unless C2 says that the operand is out of range. */
#define TWO_RESULTS(name, codes)                                                                                 \
    OP(name)                                                                                                     \
    {                                                                                                            \
        x87_wait(c, u);                                                                                          \
        x87_pointers(c, u);                                                                                      \
        if (unlikely(x87_empty(c, 0) || !x87_empty(c, 7))) {                                                     \
            c->fpu.sw &= (uint16_t) ~((codes) & SW_C2);                                                          \
            if (x87_stack_fault(c, u, !x87_empty(c, 0))) {                                                       \
                x87_set(c, 0, &x87_indefinite);                                                                  \
                c->fpu.top = (c->fpu.top + 7) & 7;                                                               \
                x87_set(c, 0, &x87_indefinite);                                                                  \
            }                                                                                                    \
            NEXT_RETURN;                                                                                         \
        }                                                                                                        \
        struct x87_image i;                                                                                          \
        RUN_SAVE(#name, "", i, ST(0), ST(0));                                                                    \
        x87_status(c, u, i.sw, codes);                                                                           \
        if ((i.sw >> 11 & 7) == 6) {                                                                             \
            memcpy(ST(0)->raw, i.st[1], 10);                                                                     \
            c->fpu.top = (c->fpu.top + 7) & 7;                                                                   \
            memcpy(ST(0)->raw, i.st[0], 10);                                                                     \
            x87_mark(c, 0);                                                                                      \
        }                                                                                                        \
        NEXT_RETURN;                                                                                             \
    }
TWO_RESULTS(fptan, SW_C1 | SW_C2) TWO_RESULTS(fsincos, SW_C1 | SW_C2) TWO_RESULTS(fxtract, SW_C1)

/* ST1 = f(ST0, ST1), pop */
#define INTO_NEXT(name)                                                                                          \
    OP(name)                                                                                                     \
    {                                                                                                            \
        x87_wait(c, u);                                                                                          \
        x87_pointers(c, u);                                                                                      \
        if (lacks(c, 0, 1)) {                                                                                    \
            underflow(c, u, 1, true);                                                                            \
            NEXT_RETURN;                                                                                         \
        }                                                                                                        \
        struct x87_image i;                                                                                          \
        RUN_SAVE(#name, "fldt %2\n\t", i, ST(0), ST(1));                                                         \
        x87_status(c, u, i.sw, SW_C1);                                                                           \
        if ((i.sw >> 11 & 7) == 7) {                                                                             \
            memcpy(ST(1)->raw, i.st[0], 10);                                                                     \
            x87_pop(c);                                                                                          \
        }                                                                                                        \
        NEXT_RETURN;                                                                                             \
    }
INTO_NEXT(fpatan) INTO_NEXT(fyl2x) INTO_NEXT(fyl2xp1)
