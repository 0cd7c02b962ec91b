/* SPDX-License-Identifier: Apache-2.0
 *
 * Bits: BT BTS BTR BTC, BSF BSR TZCNT LZCNT POPCNT, CRC32, and BMI1/BMI2.
 *
 * BT and its like with a register index address memory beyond the operand: the index is signed and selects the
 * operand-sized unit first. An immediate index is taken modulo the size. BSF/BSR of 0 leave the destination (all
 * processors do; 32-bit forms then do not clear the upper half).
 */
#include "op.h"

static inline void cf(struct cpu *c, bool v) { c->cc = (uint16_t)((c->cc & ~CC_CF) | (v ? CC_CF : 0)); }

/* address of the unit that holds the bit; offset added before segment and wrap */
static inline uint64_t bit_ea(struct cpu *c, const struct uop *u, int64_t bytes)
{
    uint64_t a = R64(c, u->base) + (R64(c, u->index) << u->scale) + (int64_t)u->disp + (uint64_t)bytes;
    return unlikely(u->aflags) ? ea_slow(c, u, a) : a;
}
#define UNIT(bits) ((int64_t)((S(bits))GET##bits(u->s) >> (bits == 64 ? 6 : bits == 32 ? 5 : 4)) * (bits / 8))
#define BT(bits)                                                                                                       \
    OP(bt_rr##bits) { cf(c, GET##bits(u->d) >> (GET##bits(u->s) & (bits - 1)) & 1); NEXT; }                            \
    OP(bt_ri##bits) { cf(c, GET##bits(u->d) >> (u->imm & (bits - 1)) & 1); NEXT; }                                     \
    OP(bt_mr##bits) { cf(c, ld##bits(c, u, bit_ea(c, u, UNIT(bits))) >> (GET##bits(u->s) & (bits - 1)) & 1); NEXT; }   \
    OP(bt_mi##bits) { cf(c, ld##bits(c, u, ea(c, u)) >> (u->imm & (bits - 1)) & 1); NEXT; }
EACH_WIDE(BT)

#define BTX(bits, name, op)                                                                                            \
    static inline void name##_mem##bits(struct cpu *c, const struct uop *u, uint64_t lin, unsigned n, bool lock)       \
    {                                                                                                                  \
        uint8_t *p = lock ? locked_host(c, u, lin, bits / 8) : rmw_host(c, u, lin, bits / 8);                          \
        U(bits) m = (U(bits))1 << n, a;                                                                                \
        if (unlikely(!p)) {                                                                                            \
            a = (U(bits))ld_rmw(c, u, lin, bits / 8);                                                                  \
            mem_write_slow(c, u, lin, bits / 8, a op m, 0);                                                            \
        } else if (lock) {                                                                                             \
            a = HOST(bits, p);                                                                                         \
            while (!__atomic_compare_exchange_n((U(bits) *)p, &a, (U(bits))(a op m), false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) \
                ;                                                                                                      \
        } else {                                                                                                       \
            a = HOST(bits, p);                                                                                         \
            HOST(bits, p) = (U(bits))(a op m);                                                                         \
        }                                                                                                              \
        cf(c, a & m);                                                                                                  \
    }                                                                                                                  \
    OP(name##_rr##bits) { U(bits) a = GET##bits(u->d), m = (U(bits))((U(bits))1 << (GET##bits(u->s) & (bits - 1))); cf(c, a & m); SET##bits(u->d, a op m); NEXT; } \
    OP(name##_ri##bits) { U(bits) a = GET##bits(u->d), m = (U(bits))((U(bits))1 << (u->imm & (bits - 1))); cf(c, a & m); SET##bits(u->d, a op m); NEXT; } \
    OP(name##_mr##bits) { name##_mem##bits(c, u, bit_ea(c, u, UNIT(bits)), GET##bits(u->s) & (bits - 1), false); NEXT_RETURN; } \
    OP(name##_mi##bits) { name##_mem##bits(c, u, ea(c, u), u->imm & (bits - 1), false); NEXT_RETURN; }                 \
    OP(name##_mr##bits##_lock) { name##_mem##bits(c, u, bit_ea(c, u, UNIT(bits)), GET##bits(u->s) & (bits - 1), true); NEXT_RETURN; } \
    OP(name##_mi##bits##_lock) { name##_mem##bits(c, u, ea(c, u), u->imm & (bits - 1), true); NEXT_RETURN; }
#define AND_NOT & ~
EACH_WIDE(BTX, bts, |)
EACH_WIDE(BTX, btr, AND_NOT)
EACH_WIDE(BTX, btc, ^)

#define CTZ16(v) __builtin_ctz(v)
#define CTZ32(v) __builtin_ctz(v)
#define CTZ64(v) __builtin_ctzll(v)
#define CLZ16(v) (__builtin_clz(v) - 16)
#define CLZ32(v) __builtin_clz(v)
#define CLZ64(v) __builtin_clzll(v)
/* a count of bits of b: ZF from the source (BSx) or the result, CF as LZCNT/TZCNT have it */
#define SCAN(bits)                                                                                                     \
    static inline void bsf##bits(struct cpu *c, const struct uop *u, U(bits) b)                                        \
    {                                                                                                                  \
        c->cc = (uint16_t)((c->cc & ~CC_ZF) | (b ? 0 : CC_ZF));                                                        \
        if (b)                                                                                                         \
            SET##bits(u->d, CTZ##bits(b));                                                                             \
    }                                                                                                                  \
    static inline void bsr##bits(struct cpu *c, const struct uop *u, U(bits) b)                                        \
    {                                                                                                                  \
        c->cc = (uint16_t)((c->cc & ~CC_ZF) | (b ? 0 : CC_ZF));                                                        \
        if (b)                                                                                                         \
            SET##bits(u->d, bits - 1 - CLZ##bits(b));                                                                  \
    }                                                                                                                  \
    static inline void tzcnt##bits(struct cpu *c, const struct uop *u, U(bits) b)                                      \
    {                                                                                                                  \
        unsigned n = b ? (unsigned)CTZ##bits(b) : bits;                                                                \
        c->cc = (uint16_t)((c->cc & ~(CC_ZF | CC_CF)) | (n ? 0 : CC_ZF) | (b ? 0 : CC_CF));                            \
        SET##bits(u->d, n);                                                                                            \
    }                                                                                                                  \
    static inline void lzcnt##bits(struct cpu *c, const struct uop *u, U(bits) b)                                      \
    {                                                                                                                  \
        unsigned n = b ? (unsigned)CLZ##bits(b) : bits;                                                                \
        c->cc = (uint16_t)((c->cc & ~(CC_ZF | CC_CF)) | (n ? 0 : CC_ZF) | (b ? 0 : CC_CF));                            \
        SET##bits(u->d, n);                                                                                            \
    }                                                                                                                  \
    static inline void popcnt##bits(struct cpu *c, const struct uop *u, U(bits) b)                                     \
    {                                                                                                                  \
        c->cc = (uint16_t)(CC_ONE | (b ? 0 : CC_ZF));                                                                  \
        SET##bits(u->d, __builtin_popcountll(b));                                                                      \
    }
EACH_WIDE(SCAN)
#define UNARY_RM(bits, name)                                                                \
    OP(name##_rr##bits) { name##bits(c, u, GET##bits(u->s)); NEXT; }                        \
    OP(name##_rm##bits) { name##bits(c, u, ld##bits(c, u, ea(c, u))); NEXT; }
EACH_WIDE(UNARY_RM, bsf)
EACH_WIDE(UNARY_RM, bsr)
EACH_WIDE(UNARY_RM, tzcnt)
EACH_WIDE(UNARY_RM, lzcnt)
EACH_WIDE(UNARY_RM, popcnt)

/* CRC-32C, bit-reflected polynomial 0x82f63b78 (SDM vol. 2, CRC32), a nibble at a time */
static uint32_t crc32c(uint32_t crc, uint64_t data, unsigned bytes)
{
    static const uint32_t table[16] = {0x00000000, 0x105ec76f, 0x20bd8ede, 0x30e349b1, 0x417b1dbc, 0x5125dad3, 0x61c69362, 0x7198540d,
                                       0x82f63b78, 0x92a8fc17, 0xa24bb5a6, 0xb21572c9, 0xc38d26c4, 0xd3d3e1ab, 0xe330a81a, 0xf36e6f75};
    for (; bytes; bytes--, data >>= 8) {
        crc ^= (uint8_t)data;
        crc = crc >> 4 ^ table[crc & 15];
        crc = crc >> 4 ^ table[crc & 15];
    }
    return crc;
}
OP(crc32b_rr8) { SET32(u->d, crc32c(GET32(u->d), GET8(u->s), 1)); NEXT; }
OP(crc32b_rm8) { SET32(u->d, crc32c(GET32(u->d), ld8(c, u, ea(c, u)), 1)); NEXT; }
/* the row's size is that of its first operand (32 or 64): the source's 16 bits show in the operand-size prefix only */
#define CRC(bits)                                                                                           \
    OP(crc32_rr##bits) { SET32(u->d, crc32c(GET32(u->d), GET##bits(u->s), bits / 8)); NEXT; }               \
    OP(crc32_rm##bits) { SET32(u->d, crc32c(GET32(u->d), ld##bits(c, u, ea(c, u)), bits / 8)); NEXT; }
EACH_WIDE(CRC)

/* AF and PF, and SF of BEXTR, are undefined: 0 here, not what they were, as nobody computes that for us (quiet_flags()). */
#define BMI_CC(r, carry) (c->cc = (uint16_t)((cc_szp(r, sizeof(r) * 8) & ~(CC_PF | CC_AF)) | ((carry) ? CC_CF : 0)))
#define BMI(bits)                                                                                                   \
    static inline U(bits) pdep##bits(U(bits) v, U(bits) m)                                                          \
    {                                                                                                               \
        U(bits) r = 0;                                                                                              \
        for (; m; m &= m - 1, v >>= 1)                                                                              \
            if (v & 1)                                                                                              \
                r |= m & -m;                                                                                        \
        return r;                                                                                                   \
    }                                                                                                               \
    static inline U(bits) pext##bits(U(bits) v, U(bits) m)                                                          \
    {                                                                                                               \
        U(bits) r = 0, bit = 1;                                                                                     \
        for (; m; m &= m - 1, bit <<= 1)                                                                            \
            if (v & m & -m)                                                                                         \
                r |= bit;                                                                                           \
        return r;                                                                                                   \
    }                                                                                                               \
    static inline U(bits) andn##bits(struct cpu *c, U(bits) a, U(bits) b) { U(bits) r = ~a & b; BMI_CC(r, false); return r; } \
    static inline U(bits) blsr##bits(struct cpu *c, U(bits) b) { U(bits) r = b & (b - 1); BMI_CC(r, !b); return r; } \
    static inline U(bits) blsmsk##bits(struct cpu *c, U(bits) b) { U(bits) r = b ^ (b - 1); BMI_CC(r, !b); c->cc &= (uint16_t)~CC_ZF; return r; } \
    static inline U(bits) blsi##bits(struct cpu *c, U(bits) b) { U(bits) r = b & -b; BMI_CC(r, b); return r; }      \
    static inline U(bits) bextr##bits(struct cpu *c, U(bits) b, U(bits) how)                                        \
    {                                                                                                               \
        unsigned start = how & 255, len = how >> 8 & 255;                                                           \
        U(bits) r = start < bits ? b >> start : 0;                                                                  \
        if (len < bits)                                                                                             \
            r &= ((U(bits))1 << len) - 1;                                                                           \
        c->cc = (uint16_t)(CC_ONE | (r ? 0 : CC_ZF));                                                                 \
        return r;                                                                                                   \
    }                                                                                                               \
    static inline U(bits) bzhi##bits(struct cpu *c, U(bits) b, U(bits) how)                                         \
    {                                                                                                               \
        unsigned n = how & 255;                                                                                     \
        U(bits) r = n < bits ? b & (((U(bits))1 << n) - 1) : b;                                                     \
        BMI_CC(r, n > bits - 1);                                                                                    \
        return r;                                                                                                   \
    }                                                                                                               \
    OP(andn_rrr##bits) { SET##bits(u->d, andn##bits(c, GET##bits(u->s), GET##bits(u->x))); NEXT; }                  \
    OP(andn_rrm##bits) { SET##bits(u->d, andn##bits(c, GET##bits(u->s), ld##bits(c, u, ea(c, u)))); NEXT; }         \
    OP(blsr_rr##bits) { SET##bits(u->d, blsr##bits(c, GET##bits(u->s))); NEXT; }                                    \
    OP(blsr_rm##bits) { SET##bits(u->d, blsr##bits(c, ld##bits(c, u, ea(c, u)))); NEXT; }                           \
    OP(blsmsk_rr##bits) { SET##bits(u->d, blsmsk##bits(c, GET##bits(u->s))); NEXT; }                                \
    OP(blsmsk_rm##bits) { SET##bits(u->d, blsmsk##bits(c, ld##bits(c, u, ea(c, u)))); NEXT; }                       \
    OP(blsi_rr##bits) { SET##bits(u->d, blsi##bits(c, GET##bits(u->s))); NEXT; }                                    \
    OP(blsi_rm##bits) { SET##bits(u->d, blsi##bits(c, ld##bits(c, u, ea(c, u)))); NEXT; }                           \
    OP(bextr_rrr##bits) { SET##bits(u->d, bextr##bits(c, GET##bits(u->s), GET##bits(u->x))); NEXT; }                \
    OP(bextr_rmr##bits) { SET##bits(u->d, bextr##bits(c, ld##bits(c, u, ea(c, u)), GET##bits(u->x))); NEXT; }       \
    OP(bzhi_rrr##bits) { SET##bits(u->d, bzhi##bits(c, GET##bits(u->s), GET##bits(u->x))); NEXT; }                  \
    OP(bzhi_rmr##bits) { SET##bits(u->d, bzhi##bits(c, ld##bits(c, u, ea(c, u)), GET##bits(u->x))); NEXT; }         \
    OP(pdep_rrr##bits) { SET##bits(u->d, pdep##bits(GET##bits(u->s), GET##bits(u->x))); NEXT; }                     \
    OP(pdep_rrm##bits) { SET##bits(u->d, pdep##bits(GET##bits(u->s), ld##bits(c, u, ea(c, u)))); NEXT; }            \
    OP(pext_rrr##bits) { SET##bits(u->d, pext##bits(GET##bits(u->s), GET##bits(u->x))); NEXT; }                     \
    OP(pext_rrm##bits) { SET##bits(u->d, pext##bits(GET##bits(u->s), ld##bits(c, u, ea(c, u)))); NEXT; }
BMI(32)
BMI(64)
