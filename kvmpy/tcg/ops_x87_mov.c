/* SPDX-License-Identifier: Apache-2.0
 *
 * x87 loads, stores, exchanges, constants and conditional moves. How an instruction runs on the host: x87.h.
 *
 * A load from single or double precision signals what it finds (invalid for a signalling NaN, denormal) and does not
 * push when that is not masked; both are plain to see in the bits, so it is decided before the host loads. A store
 * whose invalid, overflow or underflow exception is not masked writes nothing and does not pop; memory is checked for
 * writing first, so that a page fault leaves the flags alone.
 */
#include "x87.h"

/* ---- loads ---- */
/* Flags that a load of this value raises: 1 invalid, 2 denormal. */
static inline unsigned load_flags(uint64_t v, unsigned mant_bits, unsigned exp_max)
{
    uint64_t mant = v & ((1ull << mant_bits) - 1), exp = v >> mant_bits & exp_max;
    return exp == exp_max && mant && !(mant >> (mant_bits - 1)) ? SW_IE : exp == 0 && mant ? SW_DE : 0;
}
static inline void push_checked(struct cpu *c, const struct uop *u, const x87_reg *v, unsigned flags)
{
    x87_pointers(c, u);
    x87_data_pointer(c, u);
    if (unlikely(!x87_empty(c, 7)))
        flags = 0; /* a stack fault comes before the operand is looked at */
    c->fpu.sw = (uint16_t)((c->fpu.sw & ~SW_C1) | flags);
    if (unlikely(flags & ~c->fpu.cw)) {
        c->fpu.sw |= SW_ES | SW_B;
        c->fpu.fop = u->imm & 0x7ff;
        return;
    }
    x87_push(c, u, v);
}
/* The host's own flags are among the guest's by push_checked(); an unmasked one, or any of a load on a full stack, is not
 * raised on the host. */
#define FLD_HOST(insn, value) __asm__ volatile(insn " %1\n\tfstpt %0" : X80_OUT(&r) : "m"(value) : "st")
#define FLD(name, bits, insn, fraction, top)                                                                       \
    OP(name##_m)                                                                                                 \
    {                                                                                                            \
        x87_wait(c, u);                                                                                          \
        uint##bits##_t v = ld##bits(c, u, ea(c, u));                                                             \
        unsigned flags = load_flags(v, fraction, top);                                                           \
        x87_reg r = {.mant = 0};                                                                                 \
        if (likely(!(flags & ~c->fpu.cw) && x87_empty(c, 7)))                                                    \
            FLD_HOST(insn, v);                                                                                   \
        push_checked(c, u, &r, flags);                                                                           \
        NEXT_RETURN;                                                                                             \
    }
FLD(fld32, 32, "flds", 23, 0xff)
FLD(fld64, 64, "fldl", 52, 0x7ff)
#define FILD(name, bits, insn)                                                                                   \
    OP(name##_m)                                                                                                 \
    {                                                                                                            \
        x87_wait(c, u);                                                                                          \
        uint##bits##_t v = ld##bits(c, u, ea(c, u));                                                             \
        x87_reg r;                                                                                               \
        FLD_HOST(insn, v);                                                                                       \
        push_checked(c, u, &r, 0);                                                                               \
        NEXT_RETURN;                                                                                             \
    }
FILD(fild16, 16, "filds") FILD(fild32, 32, "fildl") FILD(fild64, 64, "fildll")
OP(fld80_m)
{
    x87_reg r = {.mant = 0};
    x87_wait(c, u);
    ld80(c, u, ea(c, u), r.raw);
    push_checked(c, u, &r, 0);
    NEXT_RETURN;
}
OP(fbld_m)
{
    x87_reg r = {.mant = 0};
    uint8_t v[10];
    x87_wait(c, u);
    ld80(c, u, ea(c, u), v);
    __asm__ volatile("fbld %1\n\tfstpt %0" : X80_OUT(&r) : "m"(v) : "st");
    push_checked(c, u, &r, 0);
    NEXT_RETURN;
}
OP(fld_r)
{
    x87_wait(c, u);
    x87_pointers(c, u);
    if (unlikely(x87_empty(c, u->d))) { /* comes before a full stack */
        if (x87_stack_fault(c, u, false)) {
            c->fpu.top = (c->fpu.top + 7) & 7;
            x87_set(c, 0, &x87_indefinite);
        }
        NEXT;
    }
    c->fpu.sw &= ~SW_C1;
    x87_push(c, u, ST(u->d));
    NEXT;
}
#define CONSTANT(name)                                                                                           \
    OP(name)                                                                                                     \
    {                                                                                                            \
        x87_reg r;                                                                                               \
        x87_wait(c, u);                                                                                          \
        x87_pointers(c, u);                                                                                      \
        __asm__ volatile(#name "\n\tfstpt %0" : X80_OUT(&r) : : "st"); /* rounded as the guest's RC says */      \
        c->fpu.sw &= ~SW_C1;                                                                                     \
        x87_push(c, u, &r);                                                                                      \
        NEXT_RETURN;                                                                                             \
    }
CONSTANT(fld1) CONSTANT(fldl2t) CONSTANT(fldl2e) CONSTANT(fldpi) CONSTANT(fldlg2) CONSTANT(fldln2) CONSTANT(fldz)

/* ---- stores ---- */
/* `text` stores ST0 to the local and may pop; whatever is left on the host's stack is dropped by FNINIT when an
 * exception made the depth uncertain, else by `drop`. */
#define STORE_HOST(text, drop, out, in)                                                                          \
    __asm__ volatile("fldt %2\n\t" text " %0\n\tfnstsw %%ax\n\ttest $0x80, %%al\n\tjz 1f\n\tfninit\n\tfldcw %3\n\tjmp 2f\n1:\t" drop "\n2:" \
                     : "=m"(out), "=&a"(sw) : X80(in), "m"(c->fpu.cw) : X87_CLOBBER)
#define FST(name, type, size, text, drop, indefinite, pop)                                                       \
    OP(name##_m)                                                                                                 \
    {                                                                                                            \
        x87_wait(c, u);                                                                                          \
        uint64_t lin = ea(c, u);                                                                                 \
        uint16_t sw;                                                                                             \
        type v;                                                                                                  \
        x87_check_write(c, u, lin, size);                                                                        \
        x87_pointers(c, u);                                                                                      \
        x87_data_pointer(c, u);                                                                                  \
        if (unlikely(x87_empty(c, 0))) {                                                                         \
            if (!x87_stack_fault(c, u, false))                                                                   \
                NEXT_RETURN;                                                                                     \
            v = (type)indefinite;                                                                                \
        } else {                                                                                                 \
            STORE_HOST(text, drop, v, ST(0));                                                                    \
            x87_status(c, u, sw, SW_C1);                                                                         \
            if (unlikely(sw & SW_ES && sw & ~c->fpu.cw & 0x1f)) /* all but inexact keep memory and stack */      \
                NEXT_RETURN;                                                                                     \
        }                                                                                                        \
        x87_write(c, u, lin, &v, size);                                                                          \
        if (pop)                                                                                                 \
            x87_pop(c);                                                                                          \
        NEXT_RETURN;                                                                                             \
    }
FST(fst32, uint32_t, 4, "fsts", "fstp %%st(0)", 0xffc00000, false) FST(fstp32, uint32_t, 4, "fsts", "fstp %%st(0)", 0xffc00000, true)
FST(fst64, uint64_t, 8, "fstl", "fstp %%st(0)", 0xfff8000000000000, false) FST(fstp64, uint64_t, 8, "fstl", "fstp %%st(0)", 0xfff8000000000000, true)
FST(fist16, uint16_t, 2, "fists", "fstp %%st(0)", 0x8000, false) FST(fistp16, uint16_t, 2, "fists", "fstp %%st(0)", 0x8000, true)
FST(fist32, uint32_t, 4, "fistl", "fstp %%st(0)", 0x80000000, false) FST(fistp32, uint32_t, 4, "fistl", "fstp %%st(0)", 0x80000000, true)
FST(fistp64, uint64_t, 8, "fistpll", "", 0x8000000000000000, true)
FST(fisttp16, uint16_t, 2, "fisttps", "", 0x8000, true) FST(fisttp32, uint32_t, 4, "fisttpl", "", 0x80000000, true)
FST(fisttp64, uint64_t, 8, "fisttpll", "", 0x8000000000000000, true)
typedef struct { uint8_t b[10]; } bcd;
#define BCD_INDEFINITE {{0, 0, 0, 0, 0, 0, 0, 0xc0, 0xff, 0xff}}
FST(fbstp, bcd, 10, "fbstp", "", BCD_INDEFINITE, true)
OP(fstp80_m)
{
    x87_wait(c, u);
    uint64_t lin = ea(c, u);
    const x87_reg *v = ST(0);
    x87_check_write(c, u, lin, 10);
    x87_pointers(c, u);
    x87_data_pointer(c, u);
    if (unlikely(x87_empty(c, 0))) {
        if (!x87_stack_fault(c, u, false))
            NEXT;
        v = &x87_indefinite;
    } else {
        c->fpu.sw &= ~SW_C1;
    }
    st80(c, u, lin, v->raw);
    x87_pop(c);
    NEXT;
}
#define FST_R(name, pop)                                                                                         \
    OP(name##_r)                                                                                                 \
    {                                                                                                            \
        x87_wait(c, u);                                                                                          \
        x87_pointers(c, u);                                                                                      \
        const x87_reg *v = ST(0);                                                                                \
        if (unlikely(x87_empty(c, 0))) {                                                                         \
            if (!x87_stack_fault(c, u, false))                                                                   \
                NEXT;                                                                                            \
            v = &x87_indefinite;                                                                                 \
        } else {                                                                                                 \
            c->fpu.sw &= ~SW_C1;                                                                                 \
        }                                                                                                        \
        x87_set(c, u->d, v);                                                                                     \
        if (pop)                                                                                                 \
            x87_pop(c);                                                                                          \
        NEXT;                                                                                                    \
    }
FST_R(fst, false) FST_R(fstp, true)
/* D9 /3, undocumented: FSTP to which an empty register is no error and no value */
OP(fstpnce_r)
{
    x87_wait(c, u);
    x87_pointers(c, u);
    c->fpu.sw &= ~SW_C1;
    if (!x87_empty(c, 0))
        x87_set(c, u->d, ST(0));
    x87_pop(c);
    NEXT;
}

/* ---- between registers ---- */
OP(fxch_r)
{
    x87_wait(c, u);
    x87_pointers(c, u);
    if (unlikely(x87_empty(c, 0) || x87_empty(c, u->d))) {
        if (!x87_stack_fault(c, u, false))
            NEXT;
        if (x87_empty(c, 0))
            x87_set(c, 0, &x87_indefinite);
        if (x87_empty(c, u->d))
            x87_set(c, u->d, &x87_indefinite);
    } else {
        c->fpu.sw &= ~SW_C1;
    }
    x87_reg t = *ST(0);
    *ST(0) = *ST(u->d);
    *ST(u->d) = t;
    NEXT;
}
#define FCMOV(name, mask, sense)                                                                                 \
    OP(fcmov##name##_r)                                                                                          \
    {                                                                                                            \
        x87_wait(c, u);                                                                                          \
        x87_pointers(c, u);                                                                                      \
        bool move = ((c->cc & (mask)) != 0) == sense;                                                            \
        if (unlikely(x87_empty(c, 0) || x87_empty(c, u->d))) {                                                   \
            if (x87_stack_fault(c, u, false)) /* whatever the condition */                                       \
                x87_set(c, 0, &x87_indefinite);                                                                  \
        } else if (move) {                                                                                       \
            *ST(0) = *ST(u->d);                                                                                  \
        }                                                                                                        \
        NEXT;                                                                                                    \
    }
FCMOV(b, CC_CF, true) FCMOV(e, CC_ZF, true) FCMOV(be, CC_CF | CC_ZF, true) FCMOV(u, CC_PF, true)
FCMOV(nb, CC_CF, false) FCMOV(ne, CC_ZF, false) FCMOV(nbe, CC_CF | CC_ZF, false) FCMOV(nu, CC_PF, false)
