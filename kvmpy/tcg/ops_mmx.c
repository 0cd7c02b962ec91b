/* SPDX-License-Identifier: Apache-2.0
 *
 * MMX, and what SSE to SSSE3 added on its registers.
 *
 * MMi is the low 64 bits of physical x87 register i. Every MMX instruction marks all registers as in use and sets TOP
 * to 0; one that writes MMi fills its exponent with ones (SDM vol. 1, 9.5). A pending x87 exception raises #MF first.
 *
 * The host executes the SSE form of the instruction on the low half of its registers, so its own x87 state is never
 * touched. Where the SSE form mixes halves (packs, horizontal sums, high unpacks) the operands are put side by side and
 * the wanted 64 bits are taken out; PSHUFB and PALIGNR wrap at 8 bytes instead of 16.
 */
#include "vec.h"
#include "x87.h"

static inline void mmx_begin(struct cpu *c, const struct uop *u) { x87_wait(c, u); }
static inline void mmx_use(struct cpu *c)
{
    c->fpu.top = 0;
    c->fpu.valid = 0xff;
}
#define MM(n) (c->fpu.r[n].mant)
static inline void set_mm(struct cpu *c, unsigned n, uint64_t v)
{
    c->fpu.r[n].mant = v;
    c->fpu.r[n].exp = 0xffff;
    mmx_use(c);
}

/* One operation on two 64-bit values: `pre` text before, `post` after; operands in xmm0 and xmm1, result in xmm0. */
#define MMX_RUN(text, a, b)                                                                                      \
    ({                                                                                                           \
        uint64_t r_;                                                                                             \
        __asm__ volatile("movq %1, %%xmm0\n\tmovq %2, %%xmm1\n\t" text "\n\tmovq %%xmm0, %0" : "=r"(r_) : "r"(a), "r"(b) : "xmm0", "xmm1"); \
        r_;                                                                                                      \
    })
#define MMX(name, text)                                                                                          \
    OP(mmx_##name##_rr) { mmx_begin(c, u); set_mm(c, u->d, MMX_RUN(text, MM(u->d), MM(u->s))); NEXT; }           \
    OP(mmx_##name##_rm)                                                                                          \
    {                                                                                                            \
        mmx_begin(c, u);                                                                                         \
        uint64_t m = ld64(c, u, ea(c, u));                                                                       \
        set_mm(c, u->d, MMX_RUN(text, MM(u->d), m));                                                             \
        NEXT;                                                                                                    \
    }
#define SAME(name) MMX(name, #name " %%xmm1, %%xmm0")
SAME(paddb) SAME(paddw) SAME(paddd) SAME(paddq) SAME(psubb) SAME(psubw) SAME(psubd) SAME(psubq)
SAME(paddsb) SAME(paddsw) SAME(paddusb) SAME(paddusw) SAME(psubsb) SAME(psubsw) SAME(psubusb) SAME(psubusw)
SAME(pmullw) SAME(pmulhw) SAME(pmulhuw) SAME(pmuludq) SAME(pmaddwd) SAME(psadbw) SAME(pavgb) SAME(pavgw)
SAME(pand) SAME(pandn) SAME(por) SAME(pxor)
SAME(pcmpeqb) SAME(pcmpeqw) SAME(pcmpeqd) SAME(pcmpgtb) SAME(pcmpgtw) SAME(pcmpgtd)
SAME(pminub) SAME(pmaxub) SAME(pminsw) SAME(pmaxsw)
SAME(punpcklbw) SAME(punpcklwd) SAME(punpckldq)
SAME(psllw) SAME(pslld) SAME(psllq) SAME(psrlw) SAME(psrld) SAME(psrlq) SAME(psraw) SAME(psrad)
SAME(pmaddubsw) SAME(pmulhrsw) SAME(psignb) SAME(psignw) SAME(psignd) SAME(pabsb) SAME(pabsw) SAME(pabsd)
/* d:s side by side */
#define JOINED(name, own) MMX(own, "punpcklqdq %%xmm1, %%xmm0\n\t" name " %%xmm0, %%xmm0")
JOINED("packsswb", packsswb) JOINED("packssdw", packssdw) JOINED("packuswb", packuswb)
JOINED("phaddw", phaddw) JOINED("phaddd", phaddd) JOINED("phaddsw", phaddsw)
JOINED("phsubw", phsubw) JOINED("phsubd", phsubd) JOINED("phsubsw", phsubsw)
/* the high half of the low unpack */
#define HIGH(name, low) MMX(name, low " %%xmm1, %%xmm0\n\tpsrldq $8, %%xmm0")
HIGH(punpckhbw, "punpcklbw") HIGH(punpckhwd, "punpcklwd") HIGH(punpckhdq, "punpckldq")
/* the source twice, so that bit 3 of an index counts for nothing */
MMX(pshufb, "punpcklqdq %%xmm0, %%xmm0\n\tpshufb %%xmm1, %%xmm0")

#define SHIFT_IMM(name)                                                                                          \
    OP(mmx_##name##_ri)                                                                                          \
    {                                                                                                            \
        mmx_begin(c, u);                                                                                         \
        set_mm(c, u->d, MMX_RUN(#name " %%xmm1, %%xmm0", MM(u->d), u->imm));                                     \
        NEXT;                                                                                                    \
    }
SHIFT_IMM(psllw) SHIFT_IMM(pslld) SHIFT_IMM(psllq) SHIFT_IMM(psrlw) SHIFT_IMM(psrld) SHIFT_IMM(psrlq) SHIFT_IMM(psraw) SHIFT_IMM(psrad)

static inline uint64_t align(uint64_t hi, uint64_t lo, unsigned n)
{
    return n == 0 ? lo : n < 8 ? lo >> 8 * n | hi << (64 - 8 * n) : n < 16 ? hi >> 8 * (n - 8) : 0;
}
OP(mmx_palignr_rri) { mmx_begin(c, u); set_mm(c, u->d, align(MM(u->d), MM(u->s), (uint8_t)u->imm)); NEXT; }
OP(mmx_palignr_rmi) { mmx_begin(c, u); uint64_t m = ld64(c, u, ea(c, u)); set_mm(c, u->d, align(MM(u->d), m, (uint8_t)u->imm)); NEXT; }
static inline uint64_t shuffle(uint64_t v, unsigned imm)
{
    uint64_t r = 0;
    for (unsigned i = 0; i < 4; i++)
        r |= (v >> 16 * (imm >> 2 * i & 3) & 0xffff) << 16 * i;
    return r;
}
OP(mmx_pshufw_rri) { mmx_begin(c, u); set_mm(c, u->d, shuffle(MM(u->s), (uint8_t)u->imm)); NEXT; }
OP(mmx_pshufw_rmi) { mmx_begin(c, u); uint64_t m = ld64(c, u, ea(c, u)); set_mm(c, u->d, shuffle(m, (uint8_t)u->imm)); NEXT; }

/* ---- moves ---- */
OP(mmx_movq_rr) { mmx_begin(c, u); set_mm(c, u->d, MM(u->s)); NEXT; }
OP(mmx_movq_rm) { mmx_begin(c, u); uint64_t m = ld64(c, u, ea(c, u)); set_mm(c, u->d, m); NEXT; }
OP(mmx_movq_mr) { mmx_begin(c, u); st64(c, u, ea(c, u), MM(u->s)); mmx_use(c); NEXT; }
#define MOVD(bits)                                                                                               \
    OP(mmx_movd_to_rr##bits) { mmx_begin(c, u); set_mm(c, u->d, GET##bits(u->s)); NEXT; }                        \
    OP(mmx_movd_to_rm##bits) { mmx_begin(c, u); uint64_t m = ld##bits(c, u, ea(c, u)); set_mm(c, u->d, m); NEXT; } \
    OP(mmx_movd_from_rr##bits) { mmx_begin(c, u); SET##bits(u->d, MM(u->s)); mmx_use(c); NEXT; }                 \
    OP(mmx_movd_from_mr##bits) { mmx_begin(c, u); st##bits(c, u, ea(c, u), (U(bits))MM(u->s)); mmx_use(c); NEXT; }
MOVD(32) MOVD(64)
static inline uint64_t with_word(uint64_t v, uint16_t w, unsigned n)
{
    n = 16 * (n & 3);
    return (v & ~(0xffffull << n)) | (uint64_t)w << n;
}
OP(mmx_pinsrw_rri) { mmx_begin(c, u); set_mm(c, u->d, with_word(MM(u->d), GET16(u->s), (unsigned)u->imm)); NEXT; }
OP(mmx_pinsrw_rmi)
{
    mmx_begin(c, u);
    uint16_t m = ld16(c, u, ea(c, u));
    set_mm(c, u->d, with_word(MM(u->d), m, (unsigned)u->imm));
    NEXT;
}
OP(mmx_pextrw_rri) { mmx_begin(c, u); SET32(u->d, (uint16_t)(MM(u->s) >> 16 * (u->imm & 3))); mmx_use(c); NEXT; }
OP(mmx_pmovmskb_rr)
{
    mmx_begin(c, u);
    uint32_t r = 0;
    for (unsigned i = 0; i < 8; i++)
        r |= (uint32_t)(MM(u->s) >> (8 * i + 7) & 1) << i;
    SET32(u->d, r);
    mmx_use(c);
    NEXT;
}
OP(maskmovq_rr)
{
    union vec *t = V_SCRATCH;
    mmx_begin(c, u);
    t->q[0] = MM(u->d);
    t->q[1] = MM(u->s);
    store_masked_bytes(c, u, t, (const union vec *)&t->q[1], 8);
    mmx_use(c);
    NEXT;
}
OP(movq2dq_rr) { mmx_begin(c, u); V(u->d)->q[0] = MM(u->s); V(u->d)->q[1] = 0; mmx_use(c); NEXT; }
OP(movdq2q_rr) { mmx_begin(c, u); set_mm(c, u->d, V(u->s)->q[0]); NEXT; }

/* ---- conversions (they make SSE exceptions). The switch to MMX comes before they
 * are raised; a memory operand of CVTPI2PD does not switch. ---- */
#define TO_PS(v) FP(V(u->d), FP_NONE, 0,                                                                         \
    __asm__ volatile("movdqa %0, %%xmm0\n\tmovq %1, %%xmm1\n\tcvtdq2ps %%xmm1, %%xmm1\n\tmovsd %%xmm1, %%xmm0\n\tmovdqa %%xmm0, %0" \
                     : "+m"(*V(u->d)) : "r"(v) : "xmm0", "xmm1"))
#define TO_PD(v) __asm__ volatile("movq %1, %%xmm1\n\tcvtdq2pd %%xmm1, %%xmm0\n\tmovdqa %%xmm0, %0" : "+m"(*V(u->d)) : "r"(v) : "xmm0", "xmm1")
OP(cvtpi2ps_rr) { mmx_begin(c, u); mmx_use(c); TO_PS(MM(u->s)); NEXT; }
OP(cvtpi2ps_rm) { mmx_begin(c, u); uint64_t m = ld64(c, u, ea(c, u)); mmx_use(c); TO_PS(m); NEXT; }
OP(cvtpi2pd_rr) { mmx_begin(c, u); TO_PD(MM(u->s)); mmx_use(c); NEXT; }
OP(cvtpi2pd_rm) { uint64_t m = ld64(c, u, ea(c, u)); TO_PD(m); NEXT; }
#define FROM(name, insn, size)                                                                                   \
    OP(name##_rr) { mmx_begin(c, u); FROM_RUN(insn, V(u->s)); NEXT; }                                            \
    OP(name##_rm) { mmx_begin(c, u); FROM_RUN(insn, size == 8 ? src_copy(c, u, 8) : src_aligned(c, u)); NEXT; }
#define FROM_RUN(insn, s2)                                                                                       \
    const union vec *m_ = s2;                                                                                    \
    uint64_t r_;                                                                                                 \
    mmx_use(c);                                                                                                  \
    FP(NULL, FP_NONE, 0, __asm__ volatile(FROM_##insn : "=r"(r_) : IN(m_) : "xmm0"));                            \
    set_mm(c, u->d, r_)
/* single: only the low two values may raise exceptions, so the others are cleared */
#define FROM_PS "movq %1, %%xmm0\n\tcvtps2dq %%xmm0, %%xmm0\n\tmovq %%xmm0, %0"
#define FROM_PST "movq %1, %%xmm0\n\tcvttps2dq %%xmm0, %%xmm0\n\tmovq %%xmm0, %0"
#define FROM_PD "movdqu %1, %%xmm0\n\tcvtpd2dq %%xmm0, %%xmm0\n\tmovq %%xmm0, %0"
#define FROM_PDT "movdqu %1, %%xmm0\n\tcvttpd2dq %%xmm0, %%xmm0\n\tmovq %%xmm0, %0"
FROM(cvtps2pi, PS, 8) FROM(cvttps2pi, PST, 8) FROM(cvtpd2pi, PD, 16) FROM(cvttpd2pi, PDT, 16)
