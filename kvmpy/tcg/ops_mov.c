/* SPDX-License-Identifier: Apache-2.0
 *
 * Moves that make no flags: MOV, MOVZX, MOVSX, LEA, XCHG, CMOVcc, SETcc, MOVBE, MOVNTI, XLAT; and what moves under a
 * condition on memory: CMPXCHG, CMPXCHG8B/16B, XADD. Flag bits by hand: CLC STC CMC LAHF SAHF CLD STD. NOPs.
 *
 * XCHG with memory and CMPXCHG16B are done with the host's own atomic instructions; XCHG is locked with or without
 * the prefix. CMOV with a memory operand reads memory whatever the condition; its 32-bit form always clears the upper
 * half of the destination.
 */
#include "op.h"

#define MOV(bits)                                                                        \
    OP(mov_rr##bits) { SET##bits(u->d, GET##bits(u->s)); NEXT; }                         \
    OP(mov_ri##bits) { SET##bits(u->d, u->imm); NEXT; }                                  \
    OP(mov_rm##bits) { SET##bits(u->d, ld##bits(c, u, ea(c, u))); NEXT; }                \
    OP(mov_mr##bits) { st##bits(c, u, ea(c, u), GET##bits(u->s)); NEXT; }                \
    OP(mov_mi##bits) { st##bits(c, u, ea(c, u), (U(bits))u->imm); NEXT; }                \
    OP(xchg_rr##bits) { U(bits) t = GET##bits(u->d); SET##bits(u->d, GET##bits(u->s)); SET##bits(u->s, t); NEXT; } \
    OP(xchg_mr##bits)                                                                    \
    {                                                                                    \
        uint64_t lin = ea(c, u);                                                         \
        uint8_t *p = locked_host(c, u, lin, bits / 8);                                   \
        U(bits) old;                                                                     \
        if (likely(p)) {                                                                 \
            old = __atomic_exchange_n((U(bits) *)p, GET##bits(u->s), __ATOMIC_SEQ_CST);  \
        } else {                                                                         \
            old = (U(bits))ld_rmw(c, u, lin, bits / 8);                                  \
            mem_write_slow(c, u, lin, bits / 8, GET##bits(u->s), 0);                     \
        }                                                                                \
        SET##bits(u->s, old);                                                            \
        NEXT;                                                                            \
    }                                                                                    \
    OP(xchg_mr##bits##_lock) { GOTO_FN(op_xchg_mr##bits); }
#define GOTO_FN(f) return f(c, u)
EACH_SIZE(MOV)

#define XCHG_AX(bits) OP(xchg_ax_r##bits) { U(bits) t = GET##bits(0); SET##bits(0, GET##bits(u->d)); SET##bits(u->d, t); NEXT; }
EACH_WIDE(XCHG_AX)

/* moffs: a full address in imm */
static inline uint64_t moffs(struct cpu *c, const struct uop *u) { return unlikely(u->aflags) ? ea_slow(c, u, u->imm) : u->imm; }
#define MOFFS(bits, suffix, name)                                                        \
    OP(mov_##name##_m##suffix) { SET##bits(0, ld##bits(c, u, moffs(c, u))); NEXT; }      \
    OP(movs_##name##_m##suffix) { st##bits(c, u, moffs(c, u), GET##bits(0)); NEXT; }
MOFFS(8, 8, al)
MOFFS(16, 16, ax)
MOFFS(32, 32, ax)
MOFFS(64, 64, ax)

#define EXTEND(bits)                                                                     \
    OP(movzxb_rr##bits) { SET##bits(u->d, GET8_OF(u->s)); NEXT; }                        \
    OP(movzxb_rm##bits) { SET##bits(u->d, ld8(c, u, ea(c, u))); NEXT; }                  \
    OP(movzxw_rr##bits) { SET##bits(u->d, GET16(u->s)); NEXT; }                          \
    OP(movzxw_rm##bits) { SET##bits(u->d, ld16(c, u, ea(c, u))); NEXT; }                 \
    OP(movsxb_rr##bits) { SET##bits(u->d, (int8_t)GET8_OF(u->s)); NEXT; }                \
    OP(movsxb_rm##bits) { SET##bits(u->d, (int8_t)ld8(c, u, ea(c, u))); NEXT; }          \
    OP(movsxw_rr##bits) { SET##bits(u->d, (int16_t)GET16(u->s)); NEXT; }                 \
    OP(movsxw_rm##bits) { SET##bits(u->d, (int16_t)ld16(c, u, ea(c, u))); NEXT; }        \
    OP(movsxd_rr##bits) { SET##bits(u->d, (int64_t)(int32_t)GET32(u->s)); NEXT; }        \
    OP(lea_rm##bits) { SET##bits(u->d, ea_offset(c, u)); NEXT; }
#define GET8_OF(o) R8(c, o)
EACH_WIDE(EXTEND)
OP(movsxd_rm16) { SET16(u->d, ld16(c, u, ea(c, u))); NEXT; }
OP(movsxd_rm32) { SET32(u->d, ld32(c, u, ea(c, u))); NEXT; }
OP(movsxd_rm64) { SET64(u->d, (int64_t)(int32_t)ld32(c, u, ea(c, u))); NEXT; }

#define CMOV(bits, name, n)                                                                \
    OP(cmov##name##_rr##bits) { U(bits) v = GET##bits(u->s); SET##bits(u->d, cc_test(c->cc, n) ? v : GET##bits(u->d)); NEXT; } \
    OP(cmov##name##_rm##bits) { U(bits) v = ld##bits(c, u, ea(c, u)); SET##bits(u->d, cc_test(c->cc, n) ? v : GET##bits(u->d)); NEXT; }
#define CONDITION(name, n)                                                 \
    EACH_WIDE(CMOV, name, n)                                               \
    OP(set##name##_r8) { SET8(u->d, cc_test(c->cc, n)); NEXT; }            \
    OP(set##name##_m8) { st8(c, u, ea(c, u), cc_test(c->cc, n)); NEXT; }
CONDITION(o, 0)
CONDITION(no, 1)
CONDITION(b, 2)
CONDITION(ae, 3)
CONDITION(z, 4)
CONDITION(nz, 5)
CONDITION(be, 6)
CONDITION(a, 7)
CONDITION(s, 8)
CONDITION(ns, 9)
CONDITION(p, 10)
CONDITION(np, 11)
CONDITION(l, 12)
CONDITION(ge, 13)
CONDITION(le, 14)
CONDITION(g, 15)

#define SWAP16(v) __builtin_bswap16(v)
#define SWAP32(v) __builtin_bswap32(v)
#define SWAP64(v) __builtin_bswap64(v)
#define BYTE_SWAP(bits)                                                                  \
    OP(movbe_rm##bits) { SET##bits(u->d, SWAP##bits(ld##bits(c, u, ea(c, u)))); NEXT; }  \
    OP(movbe_mr##bits) { st##bits(c, u, ea(c, u), SWAP##bits(GET##bits(u->s))); NEXT; }
EACH_WIDE(BYTE_SWAP)
OP(bswap_r16) { SET16(u->d, 0); NEXT; } /* undefined; processors clear it */
OP(bswap_r32) { SET32(u->d, SWAP32(GET32(u->d))); NEXT; }
OP(bswap_r64) { SET64(u->d, SWAP64(GET64(u->d))); NEXT; }
OP(movnti_mr32) { st32(c, u, ea(c, u), GET32(u->s)); NEXT; }
OP(movnti_mr64) { st64(c, u, ea(c, u), GET64(u->s)); NEXT; }

OP(xlat)
{
    uint64_t a = c->gpr[RBX] + GET8(0);
    SET8(0, ld8(c, u, u->aflags ? ea_slow(c, u, a) : a));
    NEXT;
}

/* CMPXCHG: without LOCK it is still one read and one write; memory is written in both cases. */
#define CMPXCHG(bits)                                                                    \
    OP(cmpxchg_rr##bits)                                                                 \
    {                                                                                    \
        U(bits) a = GET##bits(u->d);                                                     \
        alu_sub##bits(GET##bits(0), a, &c->cc);                                          \
        if (c->cc & CC_ZF)                                                               \
            SET##bits(u->d, GET##bits(u->s));                                            \
        else                                                                             \
            SET##bits(0, a);                                                             \
        NEXT;                                                                            \
    }                                                                                    \
    OP(cmpxchg_mr##bits##_lock)                                                          \
    {                                                                                    \
        uint64_t lin = ea(c, u);                                                         \
        uint8_t *p = locked_host(c, u, lin, bits / 8);                                   \
        U(bits) a, want = GET##bits(0);                                                  \
        if (likely(p)) {                                                                 \
            a = want;                                                                    \
            __atomic_compare_exchange_n((U(bits) *)p, &a, GET##bits(u->s), false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
        } else {                                                                         \
            a = (U(bits))ld_rmw(c, u, lin, bits / 8);                                    \
            mem_write_slow(c, u, lin, bits / 8, a == want ? GET##bits(u->s) : a, 0);     \
        }                                                                                \
        alu_sub##bits(want, a, &c->cc);                                                  \
        if (!(c->cc & CC_ZF))                                                            \
            SET##bits(0, a);                                                             \
        NEXT;                                                                            \
    }                                                                                    \
    OP(cmpxchg_mr##bits) { GOTO_FN(op_cmpxchg_mr##bits##_lock); }                        \
    OP(xadd_rr##bits)                                                                    \
    {                                                                                    \
        U(bits) a = GET##bits(u->d), b = GET##bits(u->s);                                \
        U(bits) r = alu_add##bits(a, b, &c->cc);                                         \
        SET##bits(u->s, a);                                                              \
        SET##bits(u->d, r);                                                              \
        NEXT;                                                                            \
    }                                                                                    \
    OP(xadd_mr##bits) { U(bits) b = GET##bits(u->s), old; RMW(bits, old = a; U(bits) r = alu_add##bits(a, b, &f)); SET##bits(u->s, old); NEXT; } \
    OP(xadd_mr##bits##_lock) { U(bits) b = GET##bits(u->s), old; LOCKED(bits, old = a; U(bits) r = alu_add##bits(a, b, &f)); SET##bits(u->s, old); NEXT; }
EACH_SIZE(CMPXCHG)

static void zf(struct cpu *c, bool z) { c->cc = (uint16_t)((c->cc & ~CC_ZF) | (z ? CC_ZF : 0)); }

OP(cmpxchg8b_m)
{
    uint64_t lin = ea(c, u), want = (uint64_t)GET32(RDX * 8) << 32 | GET32(0), with = (uint64_t)GET32(RCX * 8) << 32 | GET32(RBX * 8), a = want;
    uint8_t *p = locked_host(c, u, lin, 8);
    if (likely(p)) {
        __atomic_compare_exchange_n((uint64_t *)p, &a, with, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    } else {
        a = ld_rmw(c, u, lin, 8);
        mem_write_slow(c, u, lin, 8, a == want ? with : a, 0);
    }
    zf(c, a == want);
    if (a != want) {
        SET32(0, (uint32_t)a);
        SET32(RDX * 8, (uint32_t)(a >> 32));
    }
    NEXT_RETURN;
}
OP(cmpxchg8b_m_lock) { return op_cmpxchg8b_m(c, u); }

#if !defined(__x86_64__)
static pthread_mutex_t wide_lock = PTHREAD_MUTEX_INITIALIZER;
#endif
OP(cmpxchg16b_m)
{
    uint64_t lin = ea(c, u), lo = c->gpr[RAX], hi = c->gpr[RDX];
    bool equal;
    need_aligned(c, u, lin, 16);
    uint8_t *p = rmw_host(c, u, lin, 16);
    if (likely(p)) {
#if defined(__x86_64__)
        __asm__ volatile("lock cmpxchg16b %1" : "=@ccz"(equal), "+m"(*(unsigned __int128 *)p), "+a"(lo), "+d"(hi) : "b"(c->gpr[RBX]), "c"(c->gpr[RCX]) : "memory");
#else
        pthread_mutex_lock(&wide_lock);
        uint64_t *q = (uint64_t *)p;
        equal = q[0] == lo && q[1] == hi;
        lo = q[0], hi = q[1];
        if (equal)
            q[0] = c->gpr[RBX], q[1] = c->gpr[RCX];
        pthread_mutex_unlock(&wide_lock);
#endif
    } else {
        uint64_t q[2], w[2] = {c->gpr[RBX], c->gpr[RCX]};
        mem_check_write(c, u, lin, 16, 0);
        mem_read_bytes(c, u, lin, q, 16);
        equal = q[0] == lo && q[1] == hi;
        mem_write_bytes(c, u, lin, equal ? w : q, 16);
        lo = q[0], hi = q[1];
    }
    zf(c, equal);
    if (!equal) {
        c->gpr[RAX] = lo;
        c->gpr[RDX] = hi;
    }
    NEXT_RETURN;
}
OP(cmpxchg16b_m_lock) { return op_cmpxchg16b_m(c, u); }

OP(clc) { c->cc &= (uint16_t)~CC_CF; NEXT; }
OP(stc) { c->cc |= CC_CF; NEXT; }
OP(cmc) { c->cc ^= CC_CF; NEXT; }
OP(cld) { c->sysflags &= ~(uint32_t)FL_DF; NEXT; }
OP(std) { c->sysflags |= FL_DF; NEXT; }
OP(lahf) { SET8(1, (c->cc >> 8 & 0xd5) | 2); NEXT; }
OP(sahf) { c->cc = (uint16_t)((c->cc & 0xff) | (GET8(1) & 0xd5) << 8 | CC_ONE); NEXT; }
OP(nop) { NEXT; }
OP(prefetch_m) { NEXT; }
OP(nop_rm_r16) { NEXT; }
OP(nop_rm_r32) { NEXT; }
OP(nop_rm_r64) { NEXT; }
OP(nop_rm_m16) { NEXT; }
OP(nop_rm_m32) { NEXT; }
OP(nop_rm_m64) { NEXT; }
OP(fence) { atomic_thread_fence(memory_order_acquire); NEXT; }
OP(mfence) { atomic_thread_fence(memory_order_seq_cst); NEXT; }
