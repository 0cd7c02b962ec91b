/* SPDX-License-Identifier: Apache-2.0
 *
 * Packed integers: SSE2, SSSE3, SSE4.1/4.2 and their AVX and AVX2 forms.
 *
 * One line is one instruction with all its forms (see vec.h): legacy with a register or an aligned 16-byte operand,
 * VEX.128 and VEX.256. None of these look at MXCSR. What does not fit the shapes:
 *  - shifts by a vector: the count is 128 bits also for VEX.256;
 *  - shifts by an immediate: done as shifts by a vector that holds the immediate (same results for any count);
 *  - PMOVSX/PMOVZX read a part of the operand, half, a quarter or an eighth;
 *  - PTEST makes flags; PCMPxSTRx make flags and write ECX or XMM0; PBLENDVB has XMM0 as its third operand.
 */
#include "vec.h"

#define BOTH(name) LEGACY(name, 16) VEX3(name)
BOTH(paddb) BOTH(paddw) BOTH(paddd) BOTH(paddq) BOTH(psubb) BOTH(psubw) BOTH(psubd) BOTH(psubq)
BOTH(paddsb) BOTH(paddsw) BOTH(paddusb) BOTH(paddusw) BOTH(psubsb) BOTH(psubsw) BOTH(psubusb) BOTH(psubusw)
BOTH(pmullw) BOTH(pmulhw) BOTH(pmulhuw) BOTH(pmuludq) BOTH(pmaddwd) BOTH(psadbw) BOTH(pavgb) BOTH(pavgw)
BOTH(pand) BOTH(pandn) BOTH(por) BOTH(pxor)
BOTH(pcmpeqb) BOTH(pcmpeqw) BOTH(pcmpeqd) BOTH(pcmpgtb) BOTH(pcmpgtw) BOTH(pcmpgtd)
BOTH(pminub) BOTH(pmaxub) BOTH(pminsw) BOTH(pmaxsw)
BOTH(packsswb) BOTH(packssdw) BOTH(packuswb)
BOTH(punpcklbw) BOTH(punpcklwd) BOTH(punpckldq) BOTH(punpcklqdq)
BOTH(punpckhbw) BOTH(punpckhwd) BOTH(punpckhdq) BOTH(punpckhqdq)
/* SSSE3 */
BOTH(pshufb) BOTH(phaddw) BOTH(phaddd) BOTH(phaddsw) BOTH(phsubw) BOTH(phsubd) BOTH(phsubsw)
BOTH(pmaddubsw) BOTH(pmulhrsw) BOTH(psignb) BOTH(psignw) BOTH(psignd)
/* SSE4 */
BOTH(pmuldq) BOTH(pmulld) BOTH(pcmpeqq) BOTH(pcmpgtq) BOTH(packusdw)
BOTH(pminsb) BOTH(pminsd) BOTH(pminuw) BOTH(pminud) BOTH(pmaxsb) BOTH(pmaxsd) BOTH(pmaxuw) BOTH(pmaxud)

#define UNARY(name) LEGACY(name, 16) VEX2(name)
UNARY(pabsb) UNARY(pabsw) UNARY(pabsd)
LEGACY(phminposuw, 16) VEX2_128(phminposuw, 16)

/* Lengthening moves: `mem` bytes make 16. */
#define EXTEND(name, mem) LEGACY(name, mem) VEX2_128(name, mem) VEX2_256(name, 2 * mem)
EXTEND(pmovsxbw, 8) EXTEND(pmovsxbd, 4) EXTEND(pmovsxbq, 2) EXTEND(pmovsxwd, 8) EXTEND(pmovsxwq, 4) EXTEND(pmovsxdq, 8)
EXTEND(pmovzxbw, 8) EXTEND(pmovzxbd, 4) EXTEND(pmovzxbq, 2) EXTEND(pmovzxwd, 8) EXTEND(pmovzxwq, 4) EXTEND(pmovzxdq, 8)

/* ---- shifts ---- */
#define SHIFT(name)                                                                                              \
    LEGACY(name, 16) VEX3_128(name, 16)                                                                          \
    OP(v##name##_rrr256) { RUN_VEX3_256("v" #name, V(u->d), V(u->s), V(u->x)); NEXT; }                           \
    OP(v##name##_rrm256) { RUN_VEX3_256("v" #name, V(u->d), V(u->s), src(c, u, 16)); NEXT; }                     \
    OP(name##_ri)                                                                                                \
    {                                                                                                            \
        __asm__ volatile("movdqa %0, %%xmm0\n\tmovd %1, %%xmm1\n\t" #name " %%xmm1, %%xmm0\n\tmovdqa %%xmm0, %0" \
                         : "+m"(*V(u->d)) : "r"((uint32_t)u->imm) : "xmm0", "xmm1");                             \
        NEXT;                                                                                                    \
    }                                                                                                            \
    OP(v##name##_rri128)                                                                                         \
    {                                                                                                            \
        __asm__ volatile("vmovdqa %1, %%xmm0\n\tvmovd %2, %%xmm1\n\tv" #name " %%xmm1, %%xmm0, %%xmm0\n\tvmovdqa %%xmm0, %0" \
                         : "=m"(*V(u->d)) : IN(V(u->s)), "r"((uint32_t)u->imm) : "xmm0", "xmm1");                \
        zero_above(V(u->d), 16);                                                                                 \
        NEXT;                                                                                                    \
    }                                                                                                            \
    OP(v##name##_rri256)                                                                                         \
    {                                                                                                            \
        __asm__ volatile("vmovdqa %1, %%ymm0\n\tvmovd %2, %%xmm1\n\tv" #name " %%xmm1, %%ymm0, %%ymm0\n\tvmovdqa %%ymm0, %0\n\tvzeroupper" \
                         : "=m"(*V(u->d)) : IN(V(u->s)), "r"((uint32_t)u->imm) : "xmm0", "xmm1");                \
        NEXT;                                                                                                    \
    }
SHIFT(psllw) SHIFT(pslld) SHIFT(psllq) SHIFT(psrlw) SHIFT(psrld) SHIFT(psrlq) SHIFT(psraw) SHIFT(psrad)

/* Bytes of each 128-bit lane; 16 and more clear it. */
#define SHIFT_BYTES(name)                                                                                        \
    IMM_TABLE(imm_##name, 17, #name " $imm, %xmm0")                                                              \
    IMM_TABLE(imm_v##name##_128, 17, "v" #name " $imm, %xmm0, %xmm0")                                            \
    IMM_TABLE(imm_v##name##_256, 17, "v" #name " $imm, %ymm0, %ymm0")                                            \
    OP(name##_ri) { RUN_IMM(imm_##name, u->imm > 16 ? 16 : u->imm, V(u->d), V(u->d)); NEXT; }                    \
    OP(v##name##_rri128) { RUN_VIMM_128(imm_v##name##_128, u->imm > 16 ? 16 : u->imm, V(u->d), V(u->s), V(u->s)); NEXT; } \
    OP(v##name##_rri256) { RUN_VIMM_256(imm_v##name##_256, u->imm > 16 ? 16 : u->imm, V(u->d), V(u->s), V(u->s)); NEXT; }
SHIFT_BYTES(pslldq) SHIFT_BYTES(psrldq)

/* Each element by its own count (AVX2). */
VEX3(psllvd) VEX3(psllvq) VEX3(psrlvd) VEX3(psrlvq) VEX3(psravd)

/* ---- shuffles and blends by immediate ---- */
#define SHUFFLE(name) LEGACY_IMM(name, 256) VEX2_IMM_128(name, 256) VEX2_IMM_256(name, 256)
SHUFFLE(pshufd) SHUFFLE(pshufhw) SHUFFLE(pshuflw)
#define BOTH_IMM(name) LEGACY_IMM(name, 256) VEX3_IMM_128(name, 256) VEX3_IMM_256(name, 256)
BOTH_IMM(palignr) BOTH_IMM(pblendw)
LEGACY_IMM(mpsadbw, 8) VEX3_IMM_128(mpsadbw, 8) VEX3_IMM_256(mpsadbw, 64)

#define BLENDV(name)                                                                                             \
    OP(name##_rr) { BLENDV_RUN(#name, V(u->s)); NEXT; }                                                          \
    OP(name##_rm) { BLENDV_RUN(#name, src_aligned(c, u)); NEXT; }                                                \
    OP(v##name##_rrrr128) { BLENDV_VEX(#name, xmm, V(u->x)); zero_above(V(u->d), 16); NEXT; }                     \
    OP(v##name##_rrmr128) { BLENDV_VEX(#name, xmm, src(c, u, 16)); zero_above(V(u->d), 16); NEXT; }               \
    OP(v##name##_rrrr256) { BLENDV_VEX(#name, ymm, V(u->x)); __asm__ volatile("vzeroupper"); NEXT; }              \
    OP(v##name##_rrmr256) { BLENDV_VEX(#name, ymm, src(c, u, 32)); __asm__ volatile("vzeroupper"); NEXT; }
#define BLENDV_RUN(insn, s2)                                                                                     \
    __asm__ volatile("movdqa %2, %%xmm0\n\tmovdqa %0, %%xmm1\n\t" insn " %%xmm0, %1, %%xmm1\n\tmovdqa %%xmm1, %0"      \
                     : "+m"(*V(u->d)) : IN(s2), IN(V(0)) : "xmm0", "xmm1")
#define IS4 (u->imm >> 4 & (c->mode & MODE_CODE64 ? 15 : 7))
#define BLENDV_VEX(insn, r, s2)                                                                                  \
    __asm__ volatile("vmovdqa %3, %%" #r "0\n\tvmovdqa %1, %%" #r "1\n\tv" insn " %%" #r "0, %2, %%" #r "1, %%" #r "1\n\tvmovdqa %%" #r "1, %0" \
                     : "=m"(*V(u->d)) : IN(V(u->s)), IN(s2), IN(V(IS4)) : "xmm0", "xmm1")
BLENDV(pblendvb) BLENDV(blendvps) BLENDV(blendvpd)

/* ---- tests ---- */
static inline void set_zc(struct cpu *c, bool z, bool carry) { c->cc = (uint16_t)(CC_ONE | (z ? CC_ZF : 0) | (carry ? CC_CF : 0)); }
#define TEST_RUN(move, insn, r, s2)                                                                              \
    do {                                                                                                         \
        bool z_, c_;                                                                                             \
        __asm__ volatile(move " %2, %%" #r "0\n\t" insn " %3, %%" #r "0"                                         \
                         : "=@ccz"(z_), "=@ccc"(c_) : IN(V(u->d)), IN(s2) : "xmm0");                              \
        set_zc(c, z_, c_);                                                                                       \
    } while (0)
OP(ptest_rr) { TEST_RUN("movdqa", "ptest", xmm, V(u->s)); NEXT; }
OP(ptest_rm) { TEST_RUN("movdqa", "ptest", xmm, src_aligned(c, u)); NEXT; }
#define VTEST(name)                                                                                              \
    OP(v##name##_rr128) { TEST_RUN("vmovdqa", "v" #name, xmm, V(u->s)); NEXT; }                                  \
    OP(v##name##_rm128) { TEST_RUN("vmovdqa", "v" #name, xmm, src(c, u, 16)); NEXT; }                            \
    OP(v##name##_rr256) { TEST_RUN("vmovdqa", "v" #name, ymm, V(u->s)); __asm__ volatile("vzeroupper"); NEXT; }  \
    OP(v##name##_rm256) { TEST_RUN("vmovdqa", "v" #name, ymm, src(c, u, 32)); __asm__ volatile("vzeroupper"); NEXT; }
VTEST(ptest) VTEST(testps) VTEST(testpd)

/* ---- SSE4.2 strings: the memory operand need not be aligned; the VEX form also clears the upper half of YMM0 ---- */
static inline uint32_t string_length(uint64_t r, bool wide)
{
    int64_t n = wide ? (int64_t)r : (int32_t)r;
    return n > 16 || n < -16 ? 16 : (uint32_t)(n < 0 ? -n : n);
}
#define STRING(name, wide, s2)                                                                                   \
    do {                                                                                                         \
        const union vec *p_ = s2;                                                                                \
        uint32_t a_ = string_length(c->gpr[RAX], wide), d_ = string_length(c->gpr[RDX], wide), n_;               \
        __asm__ volatile("movdqa %3, %%xmm0\n\tmovdqu %4, %%xmm1\n\t" CALL_ENTRY("%5")                           \
                         "lahf\n\tseto %%al\n\tmovdqa %%xmm0, %0"                                                \
                         : "=m"(*V_SCRATCH), "+a"(a_), "=&c"(n_)                                                 \
                         : IN(V(u->d)), IN(p_), ENTRY_OF(imm_##name, u->imm & 127), "d"(d_) : "xmm0", "xmm1");   \
        c->cc = (uint16_t)((a_ & (CC_CF | CC_ZF | CC_SF | CC_OF)) | CC_ONE);                                     \
        STRING_RESULT(n_);                                                                                       \
        NEXT;                                                                                                    \
    } while (0)
#define STRING_FORMS(handler, name, wide)                                                                        \
    OP(handler##_rri) { STRING(name, wide, V(u->s)); }                                                           \
    OP(handler##_rmi) { STRING(name, wide, src(c, u, 16)); }
#define STRING_TABLE(name) IMM_TABLE(imm_##name, 128, #name " $imm, %xmm1, %xmm0")
STRING_TABLE(pcmpestri) STRING_TABLE(pcmpestrm) STRING_TABLE(pcmpistri) STRING_TABLE(pcmpistrm)
#define STRING_RESULT(n) SET32(RCX * 8, n)
STRING_FORMS(pcmpestri, pcmpestri, false) STRING_FORMS(pcmpestriq, pcmpestri, true) STRING_FORMS(pcmpistri, pcmpistri, false)
#undef STRING_RESULT
#define STRING_RESULT(n) ((void)(n), memcpy(V(0), V_SCRATCH, 16))
STRING_FORMS(pcmpestrm, pcmpestrm, false) STRING_FORMS(pcmpestrmq, pcmpestrm, true) STRING_FORMS(pcmpistrm, pcmpistrm, false)
#undef STRING_RESULT
#define STRING_RESULT(n) ((void)(n), memcpy(V(0), V_SCRATCH, 16), zero_above(V(0), 16))
STRING_FORMS(vpcmpestrm, pcmpestrm, false) STRING_FORMS(vpcmpestrmq, pcmpestrm, true) STRING_FORMS(vpcmpistrm, pcmpistrm, false)
