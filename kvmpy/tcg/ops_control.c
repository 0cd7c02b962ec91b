/* SPDX-License-Identifier: Apache-2.0
 *
 * Near control transfer: JMP CALL RET Jcc LOOP JCXZ, the end of a block that was cut, and compare-and-branch pairs.
 *
 * Direct branches are followed by two link slots: [0] taken, [1] not taken. Indirect ones and returns go through the
 * jump cache (jump_cached): RIP and mode must match and the code TLB must still lead RIP to the same host address.
 *
 * Fused pairs: CMP or TEST followed by Jcc at the end of a block run as one handler, which makes the flags too (code at
 * the target may read them) but does not wait for them. The Jcc's own micro-op stays in its place behind it.
 */
#include "op.h"

const struct uop *jump_cached(struct cpu *c)
{
    if (unlikely(atomic_load_explicit(&c->request, memory_order_relaxed)) || unlikely(!(c->mode & MODE_CODE64)))
        return NULL;
    if (!c->block->ninsn) /* called by host code, which looks itself (jit_call) */
        return NULL;
    struct block *b = block_peek(c);
    if (unlikely(!b) || unlikely(c->budget < b->ninsn))
        return NULL;
    c->bip = c->rip;
    c->block = b;
    c->budget -= b->ninsn;
    return b->uops;
}

OP(fall) { FOLLOW(0, u->imm); }
OP(jmp) { FOLLOW(0, u->imm); }
OP(jmp_o16) { JUMP((c->bip + u->imm) & 0xffff); }
OP(jcc_o16)
{
    if (cc_test(c->cc, u->d))
        JUMP((c->bip + u->imm) & 0xffff);
    FOLLOW(1, u->off + u->len);
}
OP(pause) { LEAVE_AFTER; }

#define JCC(name, n)                            \
    OP(name)                                    \
    {                                           \
        if (cc_test(c->cc, n))                  \
            FOLLOW(0, u->imm);                  \
        FOLLOW(1, u->off + u->len);             \
    }
JCC(jo, 0)
JCC(jno, 1)
JCC(jb, 2)
JCC(jae, 3)
JCC(jz, 4)
JCC(jnz, 5)
JCC(jbe, 6)
JCC(ja, 7)
JCC(js, 8)
JCC(jns, 9)
JCC(jp, 10)
JCC(jnp, 11)
JCC(jl, 12)
JCC(jge, 13)
JCC(jle, 14)
JCC(jg, 15)

/* LOOP and JCXZ count in CX, ECX or RCX by address size. */
static inline uint64_t count_mask(const struct cpu *c, const struct uop *u)
{
    return u->aflags & EA_A32 ? 0xffffffff : u->aflags & EA_A16 ? 0xffff : code64(c) ? ~0ull : 0xffffffff;
}
static inline uint64_t count_down(struct cpu *c, const struct uop *u)
{
    uint64_t mask = count_mask(c, u), n = (c->gpr[RCX] - 1) & mask;
    c->gpr[RCX] = mask == 0xffff ? (c->gpr[RCX] & ~mask) | n : n;
    return n;
}
#define LOOP(name, condition)                   \
    OP(name)                                    \
    {                                           \
        if (condition)                          \
            FOLLOW(0, u->imm);                  \
        FOLLOW(1, u->off + u->len);             \
    }
LOOP(loop, count_down(c, u))
LOOP(loope, count_down(c, u) && (c->cc & CC_ZF))
LOOP(loopne, count_down(c, u) && !(c->cc & CC_ZF))
LOOP(jcxz, !(c->gpr[RCX] & count_mask(c, u)))

/* A near target outside CS.limit faults at the branch. */
static inline void check_target(struct cpu *c, const struct uop *u, uint64_t rip)
{
    if (code64(c) ? !canonical(c, rip) : rip > c->seg[SEG_CS].limit)
        cpu_fault_code(c, u, EXC_GP, 0);
}
static inline void push(struct cpu *c, const struct uop *u, unsigned bits, uint64_t v)
{
    uint64_t sp = c->gpr[RSP] - bits / 8;
    if (bits == 64) {
        ststk64(c, u, sp, v);
        c->gpr[RSP] = sp;
        return;
    }
    if (c->mode & MODE_SEGS)
        stack_check(c, u, sp, bits / 8);
    if (bits == 32)
        ststk32(c, u, stack_lin(c, sp), (uint32_t)v);
    else
        ststk16(c, u, stack_lin(c, sp), (uint16_t)v);
    set_sp(c, sp);
}
static inline uint64_t top(struct cpu *c, const struct uop *u, unsigned bits)
{
    if (bits == 64)
        return ldstk64(c, u, c->gpr[RSP]);
    if (c->mode & MODE_SEGS)
        stack_check(c, u, c->gpr[RSP], bits / 8);
    return bits == 32 ? ldstk32(c, u, stack_lin(c, c->gpr[RSP])) : ldstk16(c, u, stack_lin(c, c->gpr[RSP]));
}

OP(call_64)
{
    push(c, u, 64, c->bip + u->off + u->len);
    FOLLOW(0, u->imm);
}
OP(call_32)
{
    push(c, u, 32, RIP_AFTER(c, u));
    FOLLOW(0, u->imm);
}
OP(call_16)
{
    push(c, u, 16, RIP_AFTER(c, u));
    JUMP((c->bip + u->imm) & 0xffff);
}
#define INDIRECT(bits)                                                                                             \
    OP(jmp_ind_r##bits) { uint64_t t = GET##bits(u->d); check_target(c, u, t); JUMP(t); }                          \
    OP(jmp_ind_m##bits) { uint64_t t = ld##bits(c, u, ea(c, u)); check_target(c, u, t); JUMP(t); }                 \
    OP(call_ind_r##bits) { uint64_t t = GET##bits(u->d); check_target(c, u, t); push(c, u, bits, RIP_AFTER(c, u)); JUMP(t); } \
    OP(call_ind_m##bits) { uint64_t t = ld##bits(c, u, ea(c, u)); check_target(c, u, t); push(c, u, bits, RIP_AFTER(c, u)); JUMP(t); } \
    OP(ret_##bits)                                                                                                 \
    {                                                                                                              \
        uint64_t t = top(c, u, bits);                                                                              \
        check_target(c, u, t);                                                                                     \
        if (bits == 64)                                                                                            \
            c->gpr[RSP] += 8;                                                                                      \
        else                                                                                                       \
            set_sp(c, c->gpr[RSP] + bits / 8);                                                                     \
        JUMP(t);                                                                                                   \
    }                                                                                                              \
    OP(ret_i##bits)                                                                                                \
    {                                                                                                              \
        uint64_t t = top(c, u, bits);                                                                              \
        check_target(c, u, t);                                                                                     \
        set_sp(c, c->gpr[RSP] + bits / 8 + (uint16_t)u->imm);                                                      \
        JUMP(t);                                                                                                   \
    }
EACH_WIDE(INDIRECT)

/* ---- fused pairs ---- */
#define JCC_OF_FUSED (u + 1)
#define FUSED(bits, shape, name, LOAD_A, LOAD_B, n, TEST)                                   \
    static OP(fused_##shape##bits##_##name)                                                 \
    {                                                                                       \
        U(bits) a = LOAD_A, b = LOAD_B;                                                     \
        const struct uop *j = u + 1;                                                        \
        TEST;                                                                               \
        if (n)                                                                              \
            FOLLOW_J(0, j->imm);                                                            \
        FOLLOW_J(1, j->off + j->len);                                                       \
    }
#define FOLLOW_J(k, delta)                                                        \
    do {                                                                          \
        const struct uop *next_ = follow(c, (struct link *)(j + 1) + (k), delta); \
        if (unlikely(!next_))                                                     \
            return NULL;                                                          \
        GOTO(next_);                                                              \
    } while (0)
#define CMP_FLAGS(bits) alu_sub##bits(a, b, &c->cc)
#define TEST_FLAGS(bits) alu_and##bits(a, b, &c->cc)
#define EACH_CMP(bits, shape, A, B)                                                          \
    FUSED(bits, cmp_##shape, b, A, B, a < b, CMP_FLAGS(bits))                                \
    FUSED(bits, cmp_##shape, ae, A, B, a >= b, CMP_FLAGS(bits))                              \
    FUSED(bits, cmp_##shape, z, A, B, a == b, CMP_FLAGS(bits))                               \
    FUSED(bits, cmp_##shape, nz, A, B, a != b, CMP_FLAGS(bits))                              \
    FUSED(bits, cmp_##shape, be, A, B, a <= b, CMP_FLAGS(bits))                              \
    FUSED(bits, cmp_##shape, a, A, B, a > b, CMP_FLAGS(bits))                                \
    FUSED(bits, cmp_##shape, l, A, B, (S(bits))a < (S(bits))b, CMP_FLAGS(bits))              \
    FUSED(bits, cmp_##shape, ge, A, B, (S(bits))a >= (S(bits))b, CMP_FLAGS(bits))            \
    FUSED(bits, cmp_##shape, le, A, B, (S(bits))a <= (S(bits))b, CMP_FLAGS(bits))            \
    FUSED(bits, cmp_##shape, g, A, B, (S(bits))a > (S(bits))b, CMP_FLAGS(bits))
#define EACH_TEST(bits, shape, A, B)                                                         \
    FUSED(bits, test_##shape, z, A, B, !(a & b), TEST_FLAGS(bits))                           \
    FUSED(bits, test_##shape, nz, A, B, a & b, TEST_FLAGS(bits))                             \
    FUSED(bits, test_##shape, s, A, B, (S(bits))(a & b) < 0, TEST_FLAGS(bits))               \
    FUSED(bits, test_##shape, ns, A, B, (S(bits))(a & b) >= 0, TEST_FLAGS(bits))
#define EACH_FUSED(bits)                                                                     \
    EACH_CMP(bits, rr, GET##bits(u->d), GET##bits(u->s))                                     \
    EACH_CMP(bits, ri, GET##bits(u->d), (U(bits))u->imm)                                     \
    EACH_TEST(bits, rr, GET##bits(u->d), GET##bits(u->s))
EACH_FUSED(32)
EACH_FUSED(64)
EACH_TEST(8, rr, GET8(u->d), GET8(u->s))
EACH_TEST(8, ri, GET8(u->d), (uint8_t)u->imm)
EACH_CMP(8, ri, GET8(u->d), (uint8_t)u->imm)

#define CMP_ROW(bits, shape)                                                                                        \
    {NULL, NULL, op_fused_cmp_##shape##bits##_b, op_fused_cmp_##shape##bits##_ae, op_fused_cmp_##shape##bits##_z,   \
     op_fused_cmp_##shape##bits##_nz, op_fused_cmp_##shape##bits##_be, op_fused_cmp_##shape##bits##_a, NULL, NULL,  \
     NULL, NULL, op_fused_cmp_##shape##bits##_l, op_fused_cmp_##shape##bits##_ge, op_fused_cmp_##shape##bits##_le,  \
     op_fused_cmp_##shape##bits##_g}
#define TEST_ROW(bits, shape)                                                                                       \
    {NULL, NULL, NULL, NULL, op_fused_test_##shape##bits##_z, op_fused_test_##shape##bits##_nz, NULL, NULL,         \
     op_fused_test_##shape##bits##_s, op_fused_test_##shape##bits##_ns}

uop_fn fuse_pair(const struct decoded *a, const struct decoded *b)
{
    static const struct { uop_fn first; uop_fn pair[16]; } table[] = {
        {op_cmp_rr32, CMP_ROW(32, rr)}, {op_cmp_rr64, CMP_ROW(64, rr)}, {op_cmp_ri32, CMP_ROW(32, ri)},
        {op_cmp_ri64, CMP_ROW(64, ri)}, {op_cmp_ri8, CMP_ROW(8, ri)},   {op_test_rr32, TEST_ROW(32, rr)},
        {op_test_rr64, TEST_ROW(64, rr)}, {op_test_rr8, TEST_ROW(8, rr)}, {op_test_ri8, TEST_ROW(8, ri)},
    };
    for (unsigned i = 0; i < sizeof table / sizeof table[0]; i++)
        if (a->uop.fn == table[i].first)
            return table[i].pair[b->cond];
    return NULL;
}
