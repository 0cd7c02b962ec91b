/* SPDX-License-Identifier: Apache-2.0
 *
 * FMA3: dst = +-(a * b) +- c in one rounding. 132, 213 and 231 say which operand is which; the host knows.
 *
 * The destination is also a source, so these have a shape of their own. Scalars keep the destination's upper half of
 * the low 128 bits.
 */
#include "vec.h"

#define RUN_FMA(insn, r, dst, s1, s2, after)                                                                     \
    __asm__ volatile("vmovdqa %0, %%" #r "0\n\tvmovdqa %1, %%" #r "1\n\t" insn " %2, %%" #r "1, %%" #r "0\n\tvmovdqa %%" #r "0, %0\n\t" after \
                     : "+m"(*(dst)) : IN(s1), IN(s2) : "xmm0", "xmm1")
#define FMA_FORMS(name, bits, r, mem, suffix, kind, n, after)                                                    \
    OP(name##_rrr##suffix)                                                                                       \
    {                                                                                                            \
        FP(V(u->d), kind, n, RUN_FMA(#name, r, V(u->d), V(u->s), V(u->x), after); zero_above(V(u->d), bits / 8)); \
        NEXT;                                                                                                    \
    }                                                                                                            \
    OP(name##_rrm##suffix)                                                                                       \
    {                                                                                                            \
        const union vec *m = src(c, u, mem);                                                                     \
        FP(V(u->d), kind, n, RUN_FMA(#name, r, V(u->d), V(u->s), m, after); zero_above(V(u->d), bits / 8));      \
        NEXT;                                                                                                    \
    }
#define FMA_PACKED(name, kind, n)                                                                                \
    FMA_FORMS(name, 128, xmm, 16, 128, kind, n, "") FMA_FORMS(name, 256, ymm, 32, 256, kind, 2 * n, "vzeroupper")
#define FMA_SCALAR(name, kind, mem) FMA_FORMS(name, 128, xmm, mem, , kind, 1, "")
#define FMA_ORDER(op, order)                                                                                     \
    FMA_PACKED(op##order##ps, FP_S, 4) FMA_PACKED(op##order##pd, FP_D, 2) FMA_SCALAR(op##order##ss, FP_S, 4) FMA_SCALAR(op##order##sd, FP_D, 8)
#define FMA(op) FMA_ORDER(op, 132) FMA_ORDER(op, 213) FMA_ORDER(op, 231)
FMA(vfmadd) FMA(vfmsub) FMA(vfnmadd) FMA(vfnmsub)
#define FMA_MIXED(op, order) FMA_PACKED(op##order##ps, FP_S, 4) FMA_PACKED(op##order##pd, FP_D, 2)
FMA_MIXED(vfmaddsub, 132) FMA_MIXED(vfmaddsub, 213) FMA_MIXED(vfmaddsub, 231)
FMA_MIXED(vfmsubadd, 132) FMA_MIXED(vfmsubadd, 213) FMA_MIXED(vfmsubadd, 231)
