/* SPDX-License-Identifier: Apache-2.0
 *
 * Moves of vectors and parts of them: SSE to SSE4.1 and the AVX forms of the same instructions.
 *
 * A legacy load of a scalar clears the rest of the 128 bits, a register move of one keeps it; VEX forms take the rest
 * from a second source and clear what is above. Instructions that differ only in name (MOVUPS MOVUPD MOVDQU LDDQU;
 * MOVAPS MOVAPD MOVDQA MOVNTPS MOVNTDQ...) share a handler: hints of non-temporality mean nothing here.
 */
#include "vec.h"

static inline void copy(union vec *d, const union vec *s, unsigned bytes) { memcpy(d, s, bytes); }

OP(movups_rr) { copy(V(u->d), V(u->s), 16); NEXT; }
OP(movups_rm) { copy(V(u->d), src(c, u, 16), 16); NEXT; }
OP(movups_mr) { st128(c, u, ea(c, u), V(u->s)); NEXT; }
OP(movaps_rr) { copy(V(u->d), V(u->s), 16); NEXT; }
OP(movaps_rm) { copy(V(u->d), src_aligned(c, u), 16); NEXT; }
OP(movaps_mr) { st128a(c, u, ea(c, u), V(u->s)); NEXT; }
static inline const union vec *src32_aligned(struct cpu *c, const struct uop *u, unsigned size)
{
    uint64_t lin = ea(c, u);
    need_aligned(c, u, lin, size);
    return src_at(c, u, lin, size);
}
#define VMOV(bits)                                                                                               \
    OP(vmovups_rr##bits) { copy(V(u->d), V(u->s), bits / 8); zero_above(V(u->d), bits / 8); NEXT; }              \
    OP(vmovups_rm##bits) { copy(V(u->d), src(c, u, bits / 8), bits / 8); zero_above(V(u->d), bits / 8); NEXT; }  \
    OP(vmovups_mr##bits) { st##bits(c, u, ea(c, u), V(u->s)); NEXT; }                                            \
    OP(vmovaps_rr##bits) { copy(V(u->d), V(u->s), bits / 8); zero_above(V(u->d), bits / 8); NEXT; }              \
    OP(vmovaps_rm##bits) { copy(V(u->d), src32_aligned(c, u, bits / 8), bits / 8); zero_above(V(u->d), bits / 8); NEXT; } \
    OP(vmovaps_mr##bits) { st##bits##a(c, u, ea(c, u), V(u->s)); NEXT; }
VMOV(128) VMOV(256)

/* ---- scalars ---- */
static inline void set64(union vec *v, uint64_t x) { v->q[0] = x; v->q[1] = 0; }
#define SCALAR(name, bits, lane)                                                                                 \
    OP(name##_rr) { V(u->d)->lane[0] = V(u->s)->lane[0]; NEXT; }                                                 \
    OP(name##_rm) { set64(V(u->d), ld##bits(c, u, ea(c, u))); NEXT; }                                            \
    OP(name##_mr) { st##bits(c, u, ea(c, u), V(u->s)->lane[0]); NEXT; }                                          \
    OP(v##name##_rm) { set64(V(u->d), ld##bits(c, u, ea(c, u))); zero_above(V(u->d), 16); NEXT; }                \
    OP(v##name##_rrr)                                                                                            \
    {                                                                                                            \
        U(bits) low = V(u->x)->lane[0];                                                                          \
        copy(V(u->d), V(u->s), 16);                                                                              \
        V(u->d)->lane[0] = low;                                                                                  \
        zero_above(V(u->d), 16);                                                                                 \
        NEXT;                                                                                                    \
    }
SCALAR(movss, 32, d) SCALAR(movsd, 64, q)

OP(movq_rr) { set64(V(u->d), V(u->s)->q[0]); NEXT; }
OP(movq_rm) { set64(V(u->d), ld64(c, u, ea(c, u))); NEXT; }
OP(movq_mr) { st64(c, u, ea(c, u), V(u->s)->q[0]); NEXT; }
OP(vmovq_rr) { set64(V(u->d), V(u->s)->q[0]); zero_above(V(u->d), 16); NEXT; }
OP(vmovq_rm) { set64(V(u->d), ld64(c, u, ea(c, u))); zero_above(V(u->d), 16); NEXT; }

#define MOVD(bits)                                                                                               \
    OP(movd_to_rr##bits) { set64(V(u->d), GET##bits(u->s)); NEXT; }                                              \
    OP(movd_to_rm##bits) { set64(V(u->d), ld##bits(c, u, ea(c, u))); NEXT; }                                     \
    OP(vmovd_to_rr##bits) { set64(V(u->d), GET##bits(u->s)); zero_above(V(u->d), 16); NEXT; }                    \
    OP(vmovd_to_rm##bits) { set64(V(u->d), ld##bits(c, u, ea(c, u))); zero_above(V(u->d), 16); NEXT; }           \
    OP(movd_from_rr##bits) { SET##bits(u->d, V(u->s)->q[0]); NEXT; }                                             \
    OP(movd_from_mr##bits) { st##bits(c, u, ea(c, u), (U(bits))V(u->s)->q[0]); NEXT; }
MOVD(32) MOVD(64)

/* ---- halves: l is quadword 0, h is quadword 1 ---- */
#define HALF(name, n)                                                                                            \
    OP(name##_rm) { V(u->d)->q[n] = ld64(c, u, ea(c, u)); NEXT; }                                                \
    OP(name##_mr) { st64(c, u, ea(c, u), V(u->s)->q[n]); NEXT; }                                                 \
    OP(v##name##_rrm)                                                                                            \
    {                                                                                                            \
        uint64_t m = ld64(c, u, ea(c, u));                                                                       \
        copy(V(u->d), V(u->s), 16);                                                                              \
        V(u->d)->q[n] = m;                                                                                       \
        zero_above(V(u->d), 16);                                                                                 \
        NEXT;                                                                                                    \
    }
HALF(movlps, 0) HALF(movhps, 1)
OP(movhlps_rr) { V(u->d)->q[0] = V(u->s)->q[1]; NEXT; }
OP(movlhps_rr) { V(u->d)->q[1] = V(u->s)->q[0]; NEXT; }
static inline void set_pair(union vec *d, uint64_t lo, uint64_t hi) { d->q[0] = lo; d->q[1] = hi; d->q[2] = d->q[3] = 0; }
OP(vmovhlps_rrr) { set_pair(V(u->d), V(u->x)->q[1], V(u->s)->q[1]); NEXT; }
OP(vmovlhps_rrr) { set_pair(V(u->d), V(u->s)->q[0], V(u->x)->q[0]); NEXT; }

LEGACY(movddup, 8) VEX2_128(movddup, 8) VEX2_256(movddup, 32)
LEGACY(movsldup, 16) VEX2(movsldup)
LEGACY(movshdup, 16) VEX2(movshdup)

/* ---- sign bits ---- */
#define SIGNS(name, lane, n, bits, full)                                                                         \
    OP(full)                                                                                                     \
    {                                                                                                            \
        uint32_t r = 0;                                                                                          \
        for (unsigned i = 0; i < n; i++)                                                                         \
            r |= (uint32_t)(V(u->s)->lane[i] >> (bits - 1)) << i;                                                \
        SET32(u->d, r);                                                                                          \
        NEXT;                                                                                                    \
    }
SIGNS(movmskps, d, 4, 32, movmskps_rr) SIGNS(movmskps, d, 4, 32, vmovmskps_rr128) SIGNS(movmskps, d, 8, 32, vmovmskps_rr256)
SIGNS(movmskpd, q, 2, 64, movmskpd_rr) SIGNS(movmskpd, q, 2, 64, vmovmskpd_rr128) SIGNS(movmskpd, q, 4, 64, vmovmskpd_rr256)
static inline uint32_t byte_signs(const void *p)
{
    uint32_t r;
    __asm__("movdqa %1, %%xmm0\n\tpmovmskb %%xmm0, %0" : "=r"(r) : "m"(*(const uint8_t(*)[16])p) : "xmm0");
    return r;
}
OP(pmovmskb_rr) { SET32(u->d, byte_signs(V(u->s))); NEXT; }
OP(vpmovmskb_rr128) { SET32(u->d, byte_signs(V(u->s))); NEXT; }
OP(vpmovmskb_rr256) { SET32(u->d, byte_signs(V(u->s)) | byte_signs(V(u->s)->b + 16) << 16); NEXT; }

/* ---- one element to and from a general register or memory ---- */
#define INSERT(name, sfx, bits, lane, count, regs)                                                               \
    OP(name##_rri##sfx) { V(u->d)->lane[u->imm & (count - 1)] = (U(bits))GET##regs(u->s); NEXT; }                \
    OP(name##_rmi##sfx) { V(u->d)->lane[u->imm & (count - 1)] = ld##bits(c, u, ea(c, u)); NEXT; }                \
    OP(v##name##_rrri##sfx) { VINSERT(lane, count, (U(bits))GET##regs(u->x)); NEXT; }                            \
    OP(v##name##_rrmi##sfx) { VINSERT(lane, count, ld##bits(c, u, ea(c, u))); NEXT; }
#define VINSERT(lane, count, value)                                                                              \
    do {                                                                                                         \
        __typeof__(V(0)->lane[0]) e_ = value;                                                                    \
        copy(V(u->d), V(u->s), 16);                                                                              \
        V(u->d)->lane[u->imm & (count - 1)] = e_;                                                                \
        zero_above(V(u->d), 16);                                                                                 \
    } while (0)
INSERT(pinsrb, , 8, b, 16, 32) INSERT(pinsrw, , 16, w, 8, 32) INSERT(pinsrd, 32, 32, d, 4, 32) INSERT(pinsrd, 64, 64, q, 2, 64)
#define EXTRACT(name, sfx, bits, lane, count)                                                                    \
    OP(name##_rri##sfx) { SET64(u->d, V(u->s)->lane[u->imm & (count - 1)]); NEXT; }                              \
    OP(name##_mri##sfx) { st##bits(c, u, ea(c, u), V(u->s)->lane[u->imm & (count - 1)]); NEXT; }
EXTRACT(pextrb, , 8, b, 16) EXTRACT(pextrw, , 16, w, 8) EXTRACT(pextrd, 32, 32, d, 4) EXTRACT(pextrd, 64, 64, q, 2) EXTRACT(extractps, , 32, d, 4)

/* INSERTPS picks the source element by bits 6-7; with memory there is only one. */
IMM_TABLE(imm_insertps, 256, "insertps $imm, %xmm1, %xmm0")
IMM_TABLE(imm_vinsertps, 256, "vinsertps $imm, %xmm1, %xmm0, %xmm0")
OP(insertps_rri) { RUN_IMM(imm_insertps, u->imm, V(u->d), V(u->s)); NEXT; }
OP(insertps_rmi) { RUN_IMM(imm_insertps, u->imm & 0x3f, V(u->d), src_copy(c, u, 4)); NEXT; }
OP(vinsertps_rrri) { RUN_VIMM_128(imm_vinsertps, u->imm, V(u->d), V(u->s), V(u->x)); NEXT; }
OP(vinsertps_rrmi) { RUN_VIMM_128(imm_vinsertps, u->imm & 0x3f, V(u->d), V(u->s), src_copy(c, u, 4)); NEXT; }

/* ---- MASKMOVDQU (and MASKMOVQ, ops_mmx.c): bytes with the sign set in the mask go to DS:rDI. Nothing is touched otherwise. ---- */
void store_masked_bytes(struct cpu *c, const struct uop *u, const union vec *v, const union vec *mask, unsigned n)
{
    uint64_t lin = u->aflags ? ea_slow(c, u, c->gpr[RDI]) : c->gpr[RDI];
    uint32_t m = 0;
    for (unsigned i = 0; i < n; i++)
        m |= (uint32_t)(mask->b[i] >> 7) << i;
    if (!m)
        return;
    for (unsigned i = 0; i < n; i++)
        if (m >> i & 1)
            mem_check_write(c, u, lin + i, 1, 0);
    for (unsigned i = 0; i < n; i++)
        if (m >> i & 1)
            st8(c, u, lin + i, v->b[i]);
}
OP(maskmovdqu_rr) { store_masked_bytes(c, u, V(u->d), V(u->s), 16); NEXT; }
