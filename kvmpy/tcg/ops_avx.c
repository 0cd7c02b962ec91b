/* SPDX-License-Identifier: Apache-2.0
 *
 * What only AVX and AVX2 have: broadcasts, lane inserts and extracts, permutes, masked moves, gathers, VZEROALL.
 *
 * Masked moves and gathers must not touch memory of elements that their mask leaves out. Masked moves use the host's
 * instruction where the whole operand lies in plain memory, else they go element by element; stores check all elements
 * before the first is written. A gather works from element 0 up and clears mask bits as it goes, so that after a
 * fault in the middle it continues where it was (SDM vol. 2, VGATHER).
 */
#include "vec.h"

/* ---- broadcasts: the host's memory form reads the first element of a register in struct cpu as well ---- */
#define BROADCAST(name, size)                                                                                    \
    OP(v##name##_rr128) { RUN_VEX2_128("v" #name, V(u->d), V(u->s)); NEXT; }                                     \
    OP(v##name##_rm128) { RUN_VEX2_128("v" #name, V(u->d), src(c, u, size)); NEXT; }                             \
    BROADCAST_256(name, size)
#define BROADCAST_256(name, size)                                                                                \
    OP(v##name##_rr256) { RUN_VEX2_256("v" #name, V(u->d), V(u->s)); NEXT; }                                     \
    OP(v##name##_rm256) { RUN_VEX2_256("v" #name, V(u->d), src(c, u, size)); NEXT; }
BROADCAST(broadcastss, 4) BROADCAST_256(broadcastsd, 8)
BROADCAST(pbroadcastb, 1) BROADCAST(pbroadcastw, 2) BROADCAST(pbroadcastd, 4) BROADCAST(pbroadcastq, 8)
OP(vbroadcast128_rm) { RUN_VEX2_256("vbroadcastf128", V(u->d), src(c, u, 16)); NEXT; }

/* ---- lanes ---- */
#define INSERT_LANE(s2)                                                                                          \
    union vec *t_ = V_SCRATCH;                                                                                   \
    const union vec *m_ = s2;                                                                                    \
    memmove(t_->b, m_, 16);                                                                                      \
    memmove(V(u->d), V(u->s), 32);                                                                               \
    memcpy(V(u->d)->b + 16 * (u->imm & 1), t_->b, 16)
OP(vinsert128_rrri) { INSERT_LANE(V(u->x)); NEXT; }
OP(vinsert128_rrmi) { INSERT_LANE(src(c, u, 16)); NEXT; }
OP(vextract128_rri)
{
    memmove(V(u->d), V(u->s)->b + 16 * (u->imm & 1), 16);
    zero_above(V(u->d), 16);
    NEXT;
}
OP(vextract128_mri) { st128(c, u, ea(c, u), V(u->s)->b + 16 * (u->imm & 1)); NEXT; }
VEX3_IMM_256(perm2f128, 256)

VEX3(permilps) VEX3(permilpd)
VEX2_IMM_128(permilps, 256) VEX2_IMM_256(permilps, 256) VEX2_IMM_128(permilpd, 4) VEX2_IMM_256(permilpd, 16)
VEX3_256(permd) VEX3_256(permps)
VEX2_IMM_256(permq, 256) VEX2_IMM_256(permpd, 256)
VEX3_IMM_128(pblendd, 16) VEX3_IMM_256(pblendd, 256)

/* ---- masked moves: the sign of each element of the mask (u->s) ---- */
#define MASKED(elem, lane, bits, r, insn)                                                                        \
    OP(vmaskmov##elem##_rrm##bits)                                                                               \
    {                                                                                                            \
        uint64_t lin = ea(c, u);                                                                                 \
        uint8_t *p = tlb_read(c, lin, bits / 8);                                                                 \
        if (likely(p)) {                                                                                         \
            __asm__ volatile("vmovdqa %1, %%" #r "0\n\t" insn " %2, %%" #r "0, %%" #r "0\n\tvmovdqa %%" #r "0, %0\n\tvzeroupper" \
                             : "=m"(*V(u->d)) : IN(V(u->s)), IN(p) : "xmm0");                                    \
        } else {                                                                                                 \
            union vec *t = V_SCRATCH;                                                                            \
            for (unsigned i = 0; i < bits / elem; i++)                                                           \
                t->lane[i] = V(u->s)->lane[i] >> (elem - 1) ? ld##elem(c, u, lin + i * (elem / 8)) : 0;          \
            memcpy(V(u->d), t, bits / 8);                                                                        \
        }                                                                                                        \
        zero_above(V(u->d), bits / 8);                                                                           \
        NEXT;                                                                                                    \
    }                                                                                                            \
    OP(vmaskmov##elem##_mrr##bits)                                                                               \
    {                                                                                                            \
        uint64_t lin = ea(c, u);                                                                                 \
        uint8_t *p = tlb_write(c, lin, bits / 8);                                                                \
        if (likely(p)) {                                                                                         \
            __asm__ volatile("vmovdqa %1, %%" #r "0\n\tvmovdqa %2, %%" #r "1\n\t" insn " %%" #r "1, %%" #r "0, %0\n\tvzeroupper" \
                             : "+m"(*(struct bytes64 *)p) : IN(V(u->s)), IN(V(u->x)) : "xmm0", "xmm1", "memory");     \
        } else {                                                                                                 \
            for (unsigned i = 0; i < bits / elem; i++)                                                           \
                if (V(u->s)->lane[i] >> (elem - 1))                                                              \
                    mem_check_write(c, u, lin + i * (elem / 8), elem / 8, 0);                                    \
            for (unsigned i = 0; i < bits / elem; i++)                                                           \
                if (V(u->s)->lane[i] >> (elem - 1))                                                              \
                    st##elem(c, u, lin + i * (elem / 8), V(u->x)->lane[i]);                                      \
        }                                                                                                        \
        NEXT;                                                                                                    \
    }
MASKED(32, d, 128, xmm, "vmaskmovps") MASKED(32, d, 256, ymm, "vmaskmovps")
MASKED(64, q, 128, xmm, "vmaskmovpd") MASKED(64, q, 256, ymm, "vmaskmovpd")

/* ---- gathers: u->d destination, u->x mask, u->index vector of offsets (not a general register here) ---- */
static inline uint64_t element_address(struct cpu *c, const struct uop *u, int64_t index)
{
    uint64_t a = R64(c, u->base) + ((uint64_t)index << u->scale) + (uint64_t)(int64_t)u->disp;
    return unlikely(u->aflags) ? ea_slow(c, u, a) : a;
}
#define GATHER(isize, itype, ilane, esize, elane, bits)                                                          \
    OP(vgather##isize##_##esize##_rmr##bits)                                                                     \
    {                                                                                                            \
        enum { N = bits / (isize > esize ? isize : esize) };                                                     \
        union vec *d = V(u->d), *m = V(u->x);                                                                    \
        const union vec *x = V(u->index);                                                                        \
        if (u->d == u->x || u->d == u->index || u->x == u->index)                                                \
            cpu_fault(c, u, EXC_UD);                                                                             \
        for (unsigned i = 0; i < N; i++) /* the whole element becomes the sign first, as hardware shows on a fault */ \
            m->elane[i] = 0 - (m->elane[i] >> (esize - 1));                                                      \
        for (unsigned i = 0; i < N; i++)                                                                         \
            if (m->elane[i]) {                                                                                   \
                d->elane[i] = ld##esize(c, u, element_address(c, u, (itype)x->ilane[i]));                        \
                m->elane[i] = 0;                                                                                 \
            }                                                                                                    \
        memset(d->b + N * esize / 8, 0, 32 - N * esize / 8);                                                     \
        memset(m->b, 0, 32);                                                                                     \
        NEXT;                                                                                                    \
    }
GATHER(32, int32_t, d, 32, d, 128) GATHER(32, int32_t, d, 32, d, 256) GATHER(32, int32_t, d, 64, q, 128) GATHER(32, int32_t, d, 64, q, 256)
GATHER(64, int64_t, q, 32, d, 128) GATHER(64, int64_t, q, 32, d, 256) GATHER(64, int64_t, q, 64, q, 128) GATHER(64, int64_t, q, 64, q, 256)

static inline void clear_upper(struct cpu *c, unsigned from)
{
    for (unsigned i = 0; i < (c->mode & MODE_CODE64 ? 16u : 8u); i++)
        memset(c->v[i].b + from, 0, 32 - from);
}
OP(vzeroupper) { (void)u; clear_upper(c, 16); NEXT; }
OP(vzeroall) { (void)u; clear_upper(c, 0); NEXT; }
