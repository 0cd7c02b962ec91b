/* SPDX-License-Identifier: Apache-2.0
 *
 * Conversions between formats, scalar comparison into flags, half precision (F16C), and MXCSR itself.
 *
 * Results in general registers and flags are made in locals and committed after FP(), which may raise #XM. The packed
 * double forms narrow: VEX.256 reads 32 bytes and writes 16 (the host's mnemonics end in x and y for that).
 */
#include "vec.h"

#define CVT(name, kind, n, mem)                                                                                  \
    OP(name##_rr) { FP(V(u->d), kind, n, RUN_LEGACY(#name, V(u->d), V(u->s))); NEXT; }                           \
    OP(name##_rm) { const union vec *m = SRC_LEGACY(mem); FP(V(u->d), kind, n, RUN_LEGACY(#name, V(u->d), m)); NEXT; }
#define VCVT(name, insn, bits, mem, run, kind, n, zero)                                                          \
    OP(v##name##_rr##bits) { FP(V(u->d), kind, n, run("v" insn, V(u->d), V(u->s)); zero); NEXT; }                \
    OP(v##name##_rm##bits) { const union vec *m = src(c, u, mem); FP(V(u->d), kind, n, run("v" insn, V(u->d), m); zero); NEXT; }
#define NOTHING (void)0
#define VCVT_SAME(name, mem128, mem256)                                                                          \
    VCVT(name, #name, 128, mem128, RUN_VEX2_128, FP_NONE, 0, NOTHING) VCVT(name, #name, 256, mem256, RUN_VEX2_256, FP_NONE, 0, NOTHING)
/* 256-bit source, 128-bit result */
#define RUN_NARROW(insn, dst, s2)                                                                                \
    __asm__ volatile(insn " %1, %%xmm0\n\tvmovdqa %%xmm0, %0\n\tvzeroupper" : "=m"(*(dst)) : IN(s2) : "xmm0");   \
    zero_above(dst, 16)
#define VCVT_NARROW(name, kind)                                                                                  \
    VCVT(name, #name "x", 128, 16, RUN_VEX2_128, kind, 2, NOTHING) VCVT(name, #name "y", 256, 32, RUN_NARROW, kind, 4, NOTHING)

CVT(cvtps2pd, FP_NONE, 0, 8) VCVT_SAME(cvtps2pd, 8, 16)
CVT(cvtdq2pd, FP_NONE, 0, 8) VCVT_SAME(cvtdq2pd, 8, 16)
CVT(cvtdq2ps, FP_NONE, 0, 16) VCVT_SAME(cvtdq2ps, 16, 32)
CVT(cvtps2dq, FP_NONE, 0, 16) VCVT_SAME(cvtps2dq, 16, 32)
CVT(cvttps2dq, FP_NONE, 0, 16) VCVT_SAME(cvttps2dq, 16, 32)
CVT(cvtpd2ps, FP_S, 2, 16) VCVT_NARROW(cvtpd2ps, FP_S)
CVT(cvtpd2dq, FP_NONE, 0, 16) VCVT_NARROW(cvtpd2dq, FP_NONE)
CVT(cvttpd2dq, FP_NONE, 0, 16) VCVT_NARROW(cvttpd2dq, FP_NONE)
VCVT(cvtph2ps, "cvtph2ps", 128, 8, RUN_VEX2_128, FP_NONE, 0, NOTHING) VCVT(cvtph2ps, "cvtph2ps", 256, 16, RUN_VEX2_256, FP_NONE, 0, NOTHING)

#define CVT_SCALAR(name, kind, mem)                                                                              \
    CVT(name, kind, 1, mem)                                                                                      \
    OP(v##name##_rrr) { FP(V(u->d), kind, 1, RUN_VEX3_128("v" #name, V(u->d), V(u->s), V(u->x))); NEXT; }        \
    OP(v##name##_rrm) { const union vec *m = src(c, u, mem); FP(V(u->d), kind, 1, RUN_VEX3_128("v" #name, V(u->d), V(u->s), m)); NEXT; }
CVT_SCALAR(cvtss2sd, FP_NONE, 4) CVT_SCALAR(cvtsd2ss, FP_S, 8)

/* From a general register */
#define FROM_INT(name, bits, l)                                                                                  \
    OP(name##_rr##bits) { FROM_INT_RUN(#name #l, bits, GET##bits(u->s)); NEXT; }                                 \
    OP(name##_rm##bits) { FROM_INT_RUN(#name #l, bits, ld##bits(c, u, ea(c, u))); NEXT; }                        \
    OP(v##name##_rrr##bits) { VFROM_INT_RUN("v" #name #l, bits, GET##bits(u->x)); NEXT; }                        \
    OP(v##name##_rrm##bits) { VFROM_INT_RUN("v" #name #l, bits, ld##bits(c, u, ea(c, u))); NEXT; }
#define FROM_INT_RUN(insn, bits, value)                                                                          \
    U(bits) v_ = value;                                                                                          \
    FP(V(u->d), FP_NONE, 0,                                                                                      \
       __asm__ volatile("movdqa %0, %%xmm0\n\t" insn " %1, %%xmm0\n\tmovdqa %%xmm0, %0" : "+m"(*V(u->d)) : "r"(v_) : "xmm0"))
#define VFROM_INT_RUN(insn, bits, value)                                                                         \
    U(bits) v_ = value;                                                                                          \
    FP(V(u->d), FP_NONE, 0,                                                                                      \
       __asm__ volatile("vmovdqa %1, %%xmm0\n\t" insn " %2, %%xmm0, %%xmm0\n\tvmovdqa %%xmm0, %0"                \
                        : "=m"(*V(u->d)) : IN(V(u->s)), "r"(v_) : "xmm0");                                       \
       zero_above(V(u->d), 16))
FROM_INT(cvtsi2ss, 32, l) FROM_INT(cvtsi2ss, 64, q) FROM_INT(cvtsi2sd, 32, l) FROM_INT(cvtsi2sd, 64, q)

/* To a general register; the VEX forms do the same */
#define TO_INT(name, bits, mem)                                                                                  \
    OP(name##_rr##bits) { TO_INT_RUN(#name, bits, V(u->s)); NEXT; }                                              \
    OP(name##_rm##bits) { TO_INT_RUN(#name, bits, src(c, u, mem)); NEXT; }
#define TO_INT_RUN(insn, bits, s2)                                                                               \
    const union vec *m_ = s2;                                                                                    \
    U(bits) r_;                                                                                                  \
    FP(NULL, FP_NONE, 0, __asm__ volatile(insn " %1, %0" : "=r"(r_) : IN(m_)));                                  \
    SET##bits(u->d, r_)
#define TO_INTS(op) TO_INT(op##ss2si, 32, 4) TO_INT(op##ss2si, 64, 4) TO_INT(op##sd2si, 32, 8) TO_INT(op##sd2si, 64, 8)
TO_INTS(cvt) TO_INTS(cvtt)

/* ---- (U)COMISS, (U)COMISD: ZF PF CF; OF AF SF become 0 ---- */
#define COMPARE(name, mem)                                                                                       \
    OP(name##_rr) { COMPARE_RUN(#name, V(u->s)); NEXT; }                                                         \
    OP(name##_rm) { COMPARE_RUN(#name, src(c, u, mem)); NEXT; }
#define COMPARE_RUN(insn, s2)                                                                                    \
    const union vec *m_ = s2;                                                                                    \
    uint16_t f_;                                                                                                 \
    FP(NULL, FP_NONE, 0,                                                                                         \
       __asm__ volatile("movdqa %1, %%xmm0\n\t" insn " %2, %%xmm0\n\tlahf\n\tseto %%al" : "=a"(f_) : IN(V(u->d)), IN(m_) : "xmm0")); \
    c->cc = f_
COMPARE(ucomiss, 4) COMPARE(ucomisd, 8) COMPARE(comiss, 4) COMPARE(comisd, 8)

/* ---- VCVTPS2PH: the destination is the r/m operand; bit 2 of the immediate takes the rounding of MXCSR ---- */
IMM_TABLE(imm_vcvtps2ph_128, 8, "vcvtps2ph $imm, %xmm1, %xmm0")
IMM_TABLE(imm_vcvtps2ph_256, 8, "vcvtps2ph $imm, %ymm1, %xmm0")
OP(vcvtps2ph_rri128)
{
    FP(V(u->d), FP_H, 4, RUN_VIMM_128(imm_vcvtps2ph_128, u->imm & 7, V(u->d), V(u->s), V(u->s)));
    NEXT;
}
OP(vcvtps2ph_rri256)
{
    FP(V(u->d), FP_H, 8, RUN_VIMM_256(imm_vcvtps2ph_256, u->imm & 7, V(u->d), V(u->s), V(u->s)); zero_above(V(u->d), 16));
    NEXT;
}
OP(vcvtps2ph_mri128)
{
    uint64_t lin = ea(c, u);
    mem_check_write(c, u, lin, 8, 0);
    FP(V_SCRATCH, FP_H, 4, RUN_VIMM_128(imm_vcvtps2ph_128, u->imm & 7, V_SCRATCH, V(u->s), V(u->s)));
    st64(c, u, lin, V_SCRATCH->q[0]);
    NEXT;
}
OP(vcvtps2ph_mri256)
{
    uint64_t lin = ea(c, u);
    mem_check_write(c, u, lin, 16, 0);
    FP(V_SCRATCH, FP_H, 8, RUN_VIMM_256(imm_vcvtps2ph_256, u->imm & 7, V_SCRATCH, V(u->s), V(u->s)));
    st128(c, u, lin, V_SCRATCH);
    NEXT;
}

/* ---- MXCSR ---- */
OP(ldmxcsr_m)
{
    uint32_t v = ld32(c, u, ea(c, u));
    if (v & ~0xffffu)
        cpu_fault_code(c, u, EXC_GP, 0);
    c->mxcsr = v;
    host_ldmxcsr(v | MX_MASKS);
    NEXT;
}
OP(stmxcsr_m)
{
    fp_sync(c);
    st32(c, u, ea(c, u), c->mxcsr);
    NEXT;
}
