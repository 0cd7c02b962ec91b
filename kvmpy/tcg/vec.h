/* SPDX-License-Identifier: Apache-2.0
 *
 * For the vector handlers: operands, and macros that execute one host instruction on them.
 *
 * A handler of a vector instruction is that instruction: load the guest's registers from struct cpu, execute, store.
 * Everything is written by shape, so that a line names an instruction and gives all its forms:
 *
 *   legacy   dst = OP(dst, src)      writes 128 bits, keeps the rest      RUN_LEGACY
 *   VEX 3    dst = OP(src1, src2)    bits above the operand become zero   RUN_VEX3
 *   VEX 2    dst = OP(src)           the same                             RUN_VEX2
 *   with an immediate: as above; the immediate is only known at run time, so IMM_TABLE makes a table with the
 *   instruction for every value and the handler calls the entry.
 *
 * Memory operands: src() gives a host pointer to guest memory where that is plain RAM, else a copy in a scratch
 * register, c->v[31]. It faults before anything changes. The instruction reads through the pointer exactly once, with
 * exactly the size that was checked. Legacy 16-byte operands must be aligned (#GP), VEX ones need not be.
 */
#ifndef KVMPY_TCG_VEC_H
#define KVMPY_TCG_VEC_H

#include "fphost.h"
#include "op.h"

#define V(n) (&c->v[n])
#define V_SCRATCH (&c->v[31])

static inline __attribute__((always_inline)) const union vec *src_at(struct cpu *c, const struct uop *u, uint64_t lin, unsigned size)
{
    uint8_t *p = tlb_read(c, lin, size);
    if (likely(p))
        return (const union vec *)p;
    mem_read_bytes(c, u, lin, V_SCRATCH, size);
    return V_SCRATCH;
}
static inline __attribute__((always_inline)) const union vec *src(struct cpu *c, const struct uop *u, unsigned size)
{
    return src_at(c, u, ea(c, u), size);
}
static inline __attribute__((always_inline)) const union vec *src_aligned(struct cpu *c, const struct uop *u)
{
    uint64_t lin = ea(c, u);
    need_aligned(c, u, lin, 16);
    return src_at(c, u, lin, 16);
}
/* A copy with zeros behind it, for code that reads more than once or wider than `size`. */
static inline union vec *src_copy(struct cpu *c, const struct uop *u, unsigned size)
{
    const union vec *p = src(c, u, size);
    union vec *t = V_SCRATCH;
    if (size == 4) {
        uint32_t v;
        memcpy(&v, p, 4);
        memset(t, 0, 16);
        t->d[0] = v;
    } else if (size == 8) {
        uint64_t v;
        memcpy(&v, p, 8);
        memset(t, 0, 16);
        t->q[0] = v;
    } else {
        memmove(t, p, size);
    }
    return t;
}
/* Legacy size 16 is aligned, smaller ones are not: what the L forms of the families below use. */
#define SRC_LEGACY(size) ((size) == 16 ? src_aligned(c, u) : src(c, u, size))

static inline void zero_above(union vec *v, unsigned bytes)
{
    if (bytes <= 16)
        v->q[2] = v->q[3] = 0;
}

/* ops_sse_mov.c: bytes with the sign set in the mask go to DS:rDI */
void store_masked_bytes(struct cpu *c, const struct uop *u, const union vec *v, const union vec *mask, unsigned n);

struct bytes64 { uint8_t b[64]; }; /* no alignment, aliases everything: guest memory */
#define IN(p) "m"(*(const struct bytes64 *)(p))
#define RUN_LEGACY(insn, dst, s2) \
    __asm__ volatile("movdqa %0, %%xmm0\n\t" insn " %1, %%xmm0\n\tmovdqa %%xmm0, %0" : "+m"(*(dst)) : IN(s2) : "xmm0")
#define RUN_VEX3_128(insn, dst, s1, s2)                                                                          \
    __asm__ volatile("vmovdqa %1, %%xmm0\n\t" insn " %2, %%xmm0, %%xmm0\n\tvmovdqa %%xmm0, %0" : "=m"(*(dst)) : IN(s1), IN(s2) : "xmm0"); \
    zero_above(dst, 16)
#define RUN_VEX3_256(insn, dst, s1, s2)                                                                          \
    __asm__ volatile("vmovdqa %1, %%ymm0\n\t" insn " %2, %%ymm0, %%ymm0\n\tvmovdqa %%ymm0, %0\n\tvzeroupper"     \
                     : "=m"(*(dst)) : IN(s1), IN(s2) : VEX_CLOBBER)
#define RUN_VEX2_128(insn, dst, s2)                                                                              \
    __asm__ volatile(insn " %1, %%xmm0\n\tvmovdqa %%xmm0, %0" : "=m"(*(dst)) : IN(s2) : "xmm0");                 \
    zero_above(dst, 16)
#define RUN_VEX2_256(insn, dst, s2)                                                                              \
    __asm__ volatile(insn " %1, %%ymm0\n\tvmovdqa %%ymm0, %0\n\tvzeroupper" : "=m"(*(dst)) : IN(s2) : VEX_CLOBBER)
#define VEX_CLOBBER "xmm0" /* VZEROUPPER changes no bits that compiled code holds */

/* Handlers of one name. L: legacy; 3 and 2: VEX with that many operands. mem: bytes of the memory operand. */
#define LEGACY(name, mem)                                                      \
    OP(name##_rr) { RUN_LEGACY(#name, V(u->d), V(u->s)); NEXT; }               \
    OP(name##_rm) { RUN_LEGACY(#name, V(u->d), SRC_LEGACY(mem)); NEXT; }
#define VEX3_128(name, mem)                                                                  \
    OP(v##name##_rrr128) { RUN_VEX3_128("v" #name, V(u->d), V(u->s), V(u->x)); NEXT; }       \
    OP(v##name##_rrm128) { RUN_VEX3_128("v" #name, V(u->d), V(u->s), src(c, u, mem)); NEXT; }
#define VEX3_256(name)                                                                       \
    OP(v##name##_rrr256) { RUN_VEX3_256("v" #name, V(u->d), V(u->s), V(u->x)); NEXT; }       \
    OP(v##name##_rrm256) { RUN_VEX3_256("v" #name, V(u->d), V(u->s), src(c, u, 32)); NEXT; }
#define VEX3(name) VEX3_128(name, 16) VEX3_256(name)
#define VEX2_128(name, mem)                                                                  \
    OP(v##name##_rr128) { RUN_VEX2_128("v" #name, V(u->d), V(u->s)); NEXT; }                 \
    OP(v##name##_rm128) { RUN_VEX2_128("v" #name, V(u->d), src(c, u, mem)); NEXT; }
#define VEX2_256(name, mem)                                                                  \
    OP(v##name##_rr256) { RUN_VEX2_256("v" #name, V(u->d), V(u->s)); NEXT; }                 \
    OP(v##name##_rm256) { RUN_VEX2_256("v" #name, V(u->d), src(c, u, mem)); NEXT; }
#define VEX2(name) VEX2_128(name, 16) VEX2_256(name, 32)

/* ---- immediates ---- */
/* `text` uses $imm, xmm1/ymm1 as the last source, xmm0/ymm0 as the other and as the destination. 16 bytes an entry. */
#define IMM_TABLE(sym, count, text)                                                                              \
    __asm__(".pushsection .text." #sym ", \"ax\", @progbits\n\t.balign 16\n" #sym ":\n\t.set imm, 0\n\t"         \
            ".rept " #count "\n\t" text "\n\tret\n\t.balign 16\n\t.set imm, imm + 1\n\t.endr\n\t.popsection");   \
    extern const char sym[] __attribute__((visibility("hidden")));
#define ENTRY_OF(sym, n) "r"((sym) + 16 * (unsigned)(n))
/* Below the red zone: the call must not overwrite what compiled code keeps under RSP. */
#define CALL_ENTRY(operand) "lea -128(%%rsp), %%rsp\n\tcall *" operand "\n\tlea 128(%%rsp), %%rsp\n\t"
#define RUN_IMM(sym, n, dst, s2)                                                                                 \
    __asm__ volatile("movdqa %0, %%xmm0\n\tmovdqu %1, %%xmm1\n\t" CALL_ENTRY("%2") "movdqa %%xmm0, %0"           \
                     : "+m"(*(dst)) : IN(s2), ENTRY_OF(sym, n) : "xmm0", "xmm1")
#define RUN_VIMM_128(sym, n, dst, s1, s2)                                                                        \
    __asm__ volatile("vmovdqa %1, %%xmm0\n\tvmovdqu %2, %%xmm1\n\t" CALL_ENTRY("%3") "vmovdqa %%xmm0, %0"        \
                     : "=m"(*(dst)) : IN(s1), IN(s2), ENTRY_OF(sym, n) : "xmm0", "xmm1");                        \
    zero_above(dst, 16)
#define RUN_VIMM_256(sym, n, dst, s1, s2)                                                                        \
    __asm__ volatile("vmovdqa %1, %%ymm0\n\tvmovdqu %2, %%ymm1\n\t" CALL_ENTRY("%3") "vmovdqa %%ymm0, %0\n\tvzeroupper" \
                     : "=m"(*(dst)) : IN(s1), IN(s2), ENTRY_OF(sym, n) : "xmm0", "xmm1")
/* Two operands and immediate (PSHUFD) or three (SHUFPS); count: a power of two, higher immediate bits are ignored. */
#define LEGACY_IMM(name, count)                                                                                  \
    IMM_TABLE(imm_##name, count, #name " $imm, %xmm1, %xmm0")                                                    \
    OP(name##_rri) { RUN_IMM(imm_##name, u->imm & (count - 1), V(u->d), V(u->s)); NEXT; }                        \
    OP(name##_rmi) { RUN_IMM(imm_##name, u->imm & (count - 1), V(u->d), src_aligned(c, u)); NEXT; }
#define VEX3_IMM_128(name, count)                                                                                \
    IMM_TABLE(imm_v##name##_128, count, "v" #name " $imm, %xmm1, %xmm0, %xmm0")                                  \
    OP(v##name##_rrri128) { RUN_VIMM_128(imm_v##name##_128, u->imm & (count - 1), V(u->d), V(u->s), V(u->x)); NEXT; } \
    OP(v##name##_rrmi128) { RUN_VIMM_128(imm_v##name##_128, u->imm & (count - 1), V(u->d), V(u->s), src(c, u, 16)); NEXT; }
#define VEX3_IMM_256(name, count)                                                                                \
    IMM_TABLE(imm_v##name##_256, count, "v" #name " $imm, %ymm1, %ymm0, %ymm0")                                  \
    OP(v##name##_rrri256) { RUN_VIMM_256(imm_v##name##_256, u->imm & (count - 1), V(u->d), V(u->s), V(u->x)); NEXT; } \
    OP(v##name##_rrmi256) { RUN_VIMM_256(imm_v##name##_256, u->imm & (count - 1), V(u->d), V(u->s), src(c, u, 32)); NEXT; }
#define VEX2_IMM_128(name, count)                                                                                \
    IMM_TABLE(imm_v##name##_128, count, "v" #name " $imm, %xmm1, %xmm0")                                         \
    OP(v##name##_rri128) { RUN_VIMM_128(imm_v##name##_128, u->imm & (count - 1), V(u->d), V(u->d), V(u->s)); NEXT; } \
    OP(v##name##_rmi128) { RUN_VIMM_128(imm_v##name##_128, u->imm & (count - 1), V(u->d), V(u->d), src(c, u, 16)); NEXT; }
#define VEX2_IMM_256(name, count)                                                                                \
    IMM_TABLE(imm_v##name##_256, count, "v" #name " $imm, %ymm1, %ymm0")                                         \
    OP(v##name##_rri256) { RUN_VIMM_256(imm_v##name##_256, u->imm & (count - 1), V(u->d), V(u->d), V(u->s)); NEXT; } \
    OP(v##name##_rmi256) { RUN_VIMM_256(imm_v##name##_256, u->imm & (count - 1), V(u->d), V(u->d), src(c, u, 32)); NEXT; }

#endif
