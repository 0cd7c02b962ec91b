/* SPDX-License-Identifier: Apache-2.0
 *
 * Floating-point arithmetic, comparison into a mask, rounding and logic: SSE to SSE4.1 and AVX.
 *
 * One line is one operation with its forms: packed single and double (ps, pd), scalar (ss, sd), each legacy and VEX.
 * FP() (fphost.h) deals with the guest's unmasked exceptions. The last arguments of the shapes say what results the
 * instruction makes: a result can only be tiny without being inexact where it is computed, not where it is chosen
 * (MIN, MAX) or rounded to an integer, and those say FP_NONE.
 */
#include "vec.h"

#define P(name, kind, n, mem)                                                                                    \
    OP(name##_rr) { FP(V(u->d), kind, n, RUN_LEGACY(#name, V(u->d), V(u->s))); NEXT; }                           \
    OP(name##_rm) { const union vec *m = SRC_LEGACY(mem); FP(V(u->d), kind, n, RUN_LEGACY(#name, V(u->d), m)); NEXT; }
#define P3_128(name, kind, n, mem)                                                                               \
    OP(v##name##_rrr128) { FP(V(u->d), kind, n, RUN_VEX3_128("v" #name, V(u->d), V(u->s), V(u->x))); NEXT; }     \
    OP(v##name##_rrm128) { const union vec *m = src(c, u, mem); FP(V(u->d), kind, n, RUN_VEX3_128("v" #name, V(u->d), V(u->s), m)); NEXT; }
#define P3_256(name, kind, n)                                                                                    \
    OP(v##name##_rrr256) { FP(V(u->d), kind, n, RUN_VEX3_256("v" #name, V(u->d), V(u->s), V(u->x))); NEXT; }     \
    OP(v##name##_rrm256) { const union vec *m = src(c, u, 32); FP(V(u->d), kind, n, RUN_VEX3_256("v" #name, V(u->d), V(u->s), m)); NEXT; }
#define P2(name, kind)                                                                                           \
    OP(v##name##_rr128) { FP(V(u->d), kind, 0, RUN_VEX2_128("v" #name, V(u->d), V(u->s))); NEXT; }               \
    OP(v##name##_rm128) { const union vec *m = src(c, u, 16); FP(V(u->d), kind, 0, RUN_VEX2_128("v" #name, V(u->d), m)); NEXT; } \
    OP(v##name##_rr256) { FP(V(u->d), kind, 0, RUN_VEX2_256("v" #name, V(u->d), V(u->s))); NEXT; }               \
    OP(v##name##_rm256) { const union vec *m = src(c, u, 32); FP(V(u->d), kind, 0, RUN_VEX2_256("v" #name, V(u->d), m)); NEXT; }
/* Scalars are LIG: the table has them without a length, so their VEX handlers carry no size. */
#define S3(name, kind, mem)                                                                                      \
    OP(v##name##_rrr) { FP(V(u->d), kind, 1, RUN_VEX3_128("v" #name, V(u->d), V(u->s), V(u->x))); NEXT; }        \
    OP(v##name##_rrm) { const union vec *m = src(c, u, mem); FP(V(u->d), kind, 1, RUN_VEX3_128("v" #name, V(u->d), V(u->s), m)); NEXT; }

#define PACKED(op, ks, kd)                                                                                       \
    P(op##ps, ks, 4, 16) P(op##pd, kd, 2, 16) P3_128(op##ps, ks, 4, 16) P3_256(op##ps, ks, 8)                    \
    P3_128(op##pd, kd, 2, 16) P3_256(op##pd, kd, 4)
#define SCALAR(op, ks, kd) P(op##ss, ks, 1, 4) P(op##sd, kd, 1, 8) S3(op##ss, ks, 4) S3(op##sd, kd, 8)
#define ARITH(op, ks, kd) PACKED(op, ks, kd) SCALAR(op, ks, kd)
ARITH(add, FP_S, FP_D) ARITH(sub, FP_S, FP_D) ARITH(mul, FP_S, FP_D) ARITH(div, FP_S, FP_D)
ARITH(min, FP_NONE, FP_NONE) ARITH(max, FP_NONE, FP_NONE)
PACKED(addsub, FP_S, FP_D) PACKED(hadd, FP_S, FP_D) PACKED(hsub, FP_S, FP_D)
P(sqrtps, FP_NONE, 0, 16) P(sqrtpd, FP_NONE, 0, 16) P2(sqrtps, FP_NONE) P2(sqrtpd, FP_NONE)
SCALAR(sqrt, FP_NONE, FP_NONE)

/* No exceptions: estimates, logic, interleaving. */
#define PLAIN(name) LEGACY(name, 16) VEX3(name)
PLAIN(andps) PLAIN(andpd) PLAIN(andnps) PLAIN(andnpd) PLAIN(orps) PLAIN(orpd) PLAIN(xorps) PLAIN(xorpd)
PLAIN(unpcklps) PLAIN(unpcklpd) PLAIN(unpckhps) PLAIN(unpckhpd)
#define ESTIMATE(op)                                                                                             \
    LEGACY(op##ps, 16) VEX2(op##ps) LEGACY(op##ss, 4)                                                            \
    OP(v##op##ss_rrr) { RUN_VEX3_128("v" #op "ss", V(u->d), V(u->s), V(u->x)); NEXT; }                           \
    OP(v##op##ss_rrm) { RUN_VEX3_128("v" #op "ss", V(u->d), V(u->s), src(c, u, 4)); NEXT; }
ESTIMATE(rcp) ESTIMATE(rsqrt)

/* ---- by immediate ---- */
LEGACY_IMM(shufps, 256) VEX3_IMM_128(shufps, 256) VEX3_IMM_256(shufps, 256)
LEGACY_IMM(shufpd, 4) VEX3_IMM_128(shufpd, 4) VEX3_IMM_256(shufpd, 16)
LEGACY_IMM(blendps, 16) VEX3_IMM_128(blendps, 16) VEX3_IMM_256(blendps, 256)
LEGACY_IMM(blendpd, 4) VEX3_IMM_128(blendpd, 4) VEX3_IMM_256(blendpd, 16)

#define FP_IMM(name, count, kind, n)                                                                             \
    IMM_TABLE(imm_##name, count, #name " $imm, %xmm1, %xmm0")                                                    \
    OP(name##_rri) { FP(V(u->d), kind, n, RUN_IMM(imm_##name, u->imm & (count - 1), V(u->d), V(u->s))); NEXT; }  \
    OP(name##_rmi) { const union vec *m = src_aligned(c, u); FP(V(u->d), kind, n, RUN_IMM(imm_##name, u->imm & (count - 1), V(u->d), m)); NEXT; }
#define FP_IMM_SCALAR(name, count, mem)                                                                          \
    IMM_TABLE(imm_##name, count, #name " $imm, %xmm1, %xmm0")                                                    \
    OP(name##_rri) { FP(V(u->d), FP_NONE, 1, RUN_IMM(imm_##name, u->imm & (count - 1), V(u->d), V(u->s))); NEXT; }  \
    OP(name##_rmi) { const union vec *m = src_copy(c, u, mem); FP(V(u->d), FP_NONE, 1, RUN_IMM(imm_##name, u->imm & (count - 1), V(u->d), m)); NEXT; }
#define FP_VEX3_IMM(name, bits, r, count, kind, n)                                                               \
    IMM_TABLE(imm_v##name##_##bits, count, "v" #name " $imm, %" #r "1, %" #r "0, %" #r "0")                      \
    OP(v##name##_rrri##bits) { FP(V(u->d), kind, n, RUN_VIMM_##bits(imm_v##name##_##bits, u->imm & (count - 1), V(u->d), V(u->s), V(u->x))); NEXT; } \
    OP(v##name##_rrmi##bits) { const union vec *m = src(c, u, bits / 8); FP(V(u->d), kind, n, RUN_VIMM_##bits(imm_v##name##_##bits, u->imm & (count - 1), V(u->d), V(u->s), m)); NEXT; }
#define FP_VEX3_IMM_SCALAR(name, count, mem)                                                                     \
    IMM_TABLE(imm_v##name, count, "v" #name " $imm, %xmm1, %xmm0, %xmm0")                                        \
    OP(v##name##_rrri) { FP(V(u->d), FP_NONE, 1, RUN_VIMM_128(imm_v##name, u->imm & (count - 1), V(u->d), V(u->s), V(u->x))); NEXT; } \
    OP(v##name##_rrmi) { const union vec *m = src_copy(c, u, mem); FP(V(u->d), FP_NONE, 1, RUN_VIMM_128(imm_v##name, u->imm & (count - 1), V(u->d), V(u->s), m)); NEXT; }
#define FP_VEX2_IMM(name, bits, r, count)                                                                        \
    IMM_TABLE(imm_v##name##_##bits, count, "v" #name " $imm, %" #r "1, %" #r "0")                                \
    OP(v##name##_rri##bits) { FP(V(u->d), FP_NONE, 0, RUN_VIMM_##bits(imm_v##name##_##bits, u->imm & (count - 1), V(u->d), V(u->d), V(u->s))); NEXT; } \
    OP(v##name##_rmi##bits) { const union vec *m = src(c, u, bits / 8); FP(V(u->d), FP_NONE, 0, RUN_VIMM_##bits(imm_v##name##_##bits, u->imm & (count - 1), V(u->d), V(u->d), m)); NEXT; }

/* Comparison: 8 predicates in legacy encoding, 32 in VEX. */
FP_IMM(cmpps, 8, FP_NONE, 0) FP_IMM(cmppd, 8, FP_NONE, 0) FP_IMM_SCALAR(cmpss, 8, 4) FP_IMM_SCALAR(cmpsd, 8, 8)
FP_VEX3_IMM(cmpps, 128, xmm, 32, FP_NONE, 0) FP_VEX3_IMM(cmpps, 256, ymm, 32, FP_NONE, 0)
FP_VEX3_IMM(cmppd, 128, xmm, 32, FP_NONE, 0) FP_VEX3_IMM(cmppd, 256, ymm, 32, FP_NONE, 0)
FP_VEX3_IMM_SCALAR(cmpss, 32, 4) FP_VEX3_IMM_SCALAR(cmpsd, 32, 8)
/* Rounding to integers: mode in bits 0-2, bit 3 keeps inexact quiet. */
FP_IMM(roundps, 16, FP_NONE, 0) FP_IMM(roundpd, 16, FP_NONE, 0) FP_IMM_SCALAR(roundss, 16, 4) FP_IMM_SCALAR(roundsd, 16, 8)
FP_VEX2_IMM(roundps, 128, xmm, 16) FP_VEX2_IMM(roundps, 256, ymm, 16) FP_VEX2_IMM(roundpd, 128, xmm, 16) FP_VEX2_IMM(roundpd, 256, ymm, 16)
FP_VEX3_IMM_SCALAR(roundss, 16, 4) FP_VEX3_IMM_SCALAR(roundsd, 16, 8)
/* Dot products: the host decides the order of the sums. Known limit: an unmasked underflow is seen in the sum, not in a
 * product that is tiny and exact. */
FP_IMM(dpps, 256, FP_S, 4) FP_IMM(dppd, 256, FP_D, 2)
FP_VEX3_IMM(dpps, 128, xmm, 256, FP_S, 4) FP_VEX3_IMM(dpps, 256, ymm, 256, FP_S, 8) FP_VEX3_IMM(dppd, 128, xmm, 256, FP_D, 2)
