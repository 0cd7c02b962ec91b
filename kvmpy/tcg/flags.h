/* SPDX-License-Identifier: Apache-2.0
 *
 * Arithmetic and its flags. alu_add32(a, b, &cc) and its like give the result and the 16-bit flag word that
 * `cpu.cc` holds: AH as LAHF makes it (SF ZF 0 AF 0 PF 1 CF), AL as SETO makes it.
 *
 * On x86-64 hosts the host's own instruction makes both: three host micro-ops for exact flags, also those that the
 * manual calls undefined (they then are what this host's processor makes). Other hosts use the C below each; build
 * with -DTCG_PORTABLE to test that on x86 (undefined flags are then 0 or unchanged, as documented per operation).
 */
#ifndef KVMPY_TCG_FLAGS_H
#define KVMPY_TCG_FLAGS_H

#include <stdint.h>
#include <stdbool.h>

#define CC_OF 0x0001
#define CC_CF 0x0100
#define CC_PF 0x0400
#define CC_AF 0x1000
#define CC_ZF 0x4000
#define CC_SF 0x8000
#define CC_ONE 0x0200
#define CC_ALL (CC_OF | CC_CF | CC_PF | CC_AF | CC_ZF | CC_SF)

static inline uint32_t cc_to_eflags(uint16_t cc) { return ((cc >> 8) & 0xd5u) | ((uint32_t)(cc & 1) << 11); }
static inline uint16_t cc_from_eflags(uint64_t f) { return (uint16_t)((f & 0xd5) << 8 | CC_ONE | (f >> 11 & 1)); }

/* The sixteen conditions of Jcc, in the order of their codes. */
static inline bool cc_test(uint16_t f, unsigned cond)
{
    bool r;
    switch (cond >> 1) {
    case 0: r = f & CC_OF; break;
    case 1: r = f & CC_CF; break;
    case 2: r = f & CC_ZF; break;
    case 3: r = f & (CC_CF | CC_ZF); break;
    case 4: r = f & CC_SF; break;
    case 5: r = f & CC_PF; break;
    case 6: r = ((f >> 15) ^ f) & 1; break;
    default: r = (((f >> 15) ^ f) & 1) | (f & CC_ZF); break;
    }
    return r ^ (cond & 1);
}

static inline uint16_t cc_szp(uint64_t result, unsigned bits)
{
    uint16_t f = CC_ONE;
    if (!(bits == 64 ? result : result & ((1ull << bits) - 1)))
        f |= CC_ZF;
    if (result >> (bits - 1) & 1)
        f |= CC_SF;
    if (!__builtin_parity((uint8_t)result))
        f |= CC_PF;
    return f;
}

#if defined(__x86_64__) && !defined(TCG_PORTABLE)
#define ALU_HOST 1
#define ALU2(name, bits, suffix)                                                                           \
    static inline uint##bits##_t alu_##name##bits(uint##bits##_t a, uint##bits##_t b, uint16_t *cc)        \
    {                                                                                                      \
        uint16_t f;                                                                                        \
        __asm__(#name suffix " %2, %0\n\tlahf\n\tseto %%al" : "+q"(a), "=&a"(f) : "qm"(b) : "cc");         \
        *cc = f;                                                                                           \
        return a;                                                                                          \
    }
#define ALU2C(name, bits, suffix) /* CF is an input: bit 8 of *cc */                                       \
    static inline uint##bits##_t alu_##name##bits(uint##bits##_t a, uint##bits##_t b, uint16_t *cc)        \
    {                                                                                                      \
        uint16_t f = *cc;                                                                                  \
        __asm__("btw $8, %1\n\t" #name suffix " %2, %0\n\tlahf\n\tseto %%al" : "+q"(a), "+&a"(f) : "qm"(b) : "cc"); \
        *cc = f;                                                                                           \
        return a;                                                                                          \
    }
#define ALU1C(name, bits, suffix) /* CF passes through (INC, DEC) or is an input (RCL by 1) */             \
    static inline uint##bits##_t alu_##name##bits(uint##bits##_t a, uint16_t *cc)                          \
    {                                                                                                      \
        uint16_t f = *cc;                                                                                  \
        __asm__("btw $8, %1\n\t" #name suffix " %0\n\tlahf\n\tseto %%al" : "+q"(a), "+&a"(f) : : "cc");    \
        *cc = f;                                                                                           \
        return a;                                                                                          \
    }
#define ALU_ALL(M, name) M(name, 8, "b") M(name, 16, "w") M(name, 32, "l") M(name, 64, "q")
ALU_ALL(ALU2, add)
ALU_ALL(ALU2, sub)
ALU_ALL(ALU2, and)
ALU_ALL(ALU2, or)
ALU_ALL(ALU2, xor)
ALU_ALL(ALU2C, adc)
ALU_ALL(ALU2C, sbb)
ALU_ALL(ALU1C, inc)
ALU_ALL(ALU1C, dec)
ALU_ALL(ALU1C, neg)

/* Shifts and rotates: the count is masked by the host as by the guest (5 bits, 6 for 64-bit operands); a count of 0
 * keeps all flags, rotates keep SF ZF AF PF: so all flags are loaded first. */
#define SHIFT(name, bits, suffix)                                                                          \
    static inline uint##bits##_t alu_##name##bits(uint##bits##_t a, uint8_t count, uint16_t *cc)           \
    {                                                                                                      \
        uint16_t f = *cc;                                                                                  \
        __asm__("addb $127, %%al\n\tsahf\n\t" #name suffix " %%cl, %0\n\tlahf\n\tseto %%al"                \
                : "+q"(a), "+&a"(f) : "c"(count) : "cc");                                                  \
        *cc = f;                                                                                           \
        return a;                                                                                          \
    }
ALU_ALL(SHIFT, rol)
ALU_ALL(SHIFT, ror)
ALU_ALL(SHIFT, rcl)
ALU_ALL(SHIFT, rcr)
ALU_ALL(SHIFT, shl)
ALU_ALL(SHIFT, shr)
ALU_ALL(SHIFT, sar)
#define SHIFTD(name, bits, suffix)                                                                         \
    static inline uint##bits##_t alu_##name##bits(uint##bits##_t a, uint##bits##_t b, uint8_t count, uint16_t *cc) \
    {                                                                                                      \
        uint16_t f = *cc;                                                                                  \
        __asm__("addb $127, %%al\n\tsahf\n\t" #name suffix " %%cl, %2, %0\n\tlahf\n\tseto %%al"            \
                : "+r"(a), "+&a"(f) : "r"(b), "c"(count) : "cc");                                          \
        *cc = f;                                                                                           \
        return a;                                                                                          \
    }
#define ALU_WIDE(M, name) M(name, 16, "w") M(name, 32, "l") M(name, 64, "q")
ALU_WIDE(SHIFTD, shld)
ALU_WIDE(SHIFTD, shrd)
#undef SHIFT
#undef SHIFTD
#else /* portable */
#define ALU_CARRIES(bits, cv, r) /* cv: carry (borrow) out of every bit */                                 \
    (uint16_t)(cc_szp(r, bits) | ((cv) >> (bits - 1) & 1 ? CC_CF : 0) | ((cv) >> 3 & 1 ? CC_AF : 0) |      \
               ((((cv) >> (bits - 1)) ^ ((cv) >> (bits - 2))) & 1))
#define PORTABLE_ALU(bits)                                                                                 \
    typedef uint##bits##_t alu_t##bits;                                                                    \
    static inline alu_t##bits alu_adc_##bits(alu_t##bits a, alu_t##bits b, unsigned c, uint16_t *cc)       \
    {                                                                                                      \
        alu_t##bits r = (alu_t##bits)(a + b + c), cv = (a & b) | ((a | b) & ~r);                           \
        *cc = ALU_CARRIES(bits, cv, r);                                                                    \
        return r;                                                                                          \
    }                                                                                                      \
    static inline alu_t##bits alu_sbb_##bits(alu_t##bits a, alu_t##bits b, unsigned c, uint16_t *cc)       \
    {                                                                                                      \
        alu_t##bits r = (alu_t##bits)(a - b - c), cv = (~a & b) | ((~a | b) & r);                          \
        *cc = ALU_CARRIES(bits, cv, r);                                                                    \
        return r;                                                                                          \
    }                                                                                                      \
    static inline alu_t##bits alu_add##bits(alu_t##bits a, alu_t##bits b, uint16_t *cc) { return alu_adc_##bits(a, b, 0, cc); } \
    static inline alu_t##bits alu_sub##bits(alu_t##bits a, alu_t##bits b, uint16_t *cc) { return alu_sbb_##bits(a, b, 0, cc); } \
    static inline alu_t##bits alu_adc##bits(alu_t##bits a, alu_t##bits b, uint16_t *cc) { return alu_adc_##bits(a, b, *cc >> 8 & 1, cc); } \
    static inline alu_t##bits alu_sbb##bits(alu_t##bits a, alu_t##bits b, uint16_t *cc) { return alu_sbb_##bits(a, b, *cc >> 8 & 1, cc); } \
    static inline alu_t##bits alu_and##bits(alu_t##bits a, alu_t##bits b, uint16_t *cc) { a &= b; *cc = cc_szp(a, bits); return a; } \
    static inline alu_t##bits alu_or##bits(alu_t##bits a, alu_t##bits b, uint16_t *cc) { a |= b; *cc = cc_szp(a, bits); return a; } \
    static inline alu_t##bits alu_xor##bits(alu_t##bits a, alu_t##bits b, uint16_t *cc) { a ^= b; *cc = cc_szp(a, bits); return a; } \
    static inline alu_t##bits alu_neg##bits(alu_t##bits a, uint16_t *cc) { return alu_sbb_##bits(0, a, 0, cc); } \
    static inline alu_t##bits alu_inc##bits(alu_t##bits a, uint16_t *cc)                                   \
    {                                                                                                      \
        uint16_t f;                                                                                        \
        a = alu_adc_##bits(a, 1, 0, &f);                                                                   \
        *cc = (f & ~CC_CF) | (*cc & CC_CF);                                                                \
        return a;                                                                                          \
    }                                                                                                      \
    static inline alu_t##bits alu_dec##bits(alu_t##bits a, uint16_t *cc)                                   \
    {                                                                                                      \
        uint16_t f;                                                                                        \
        a = alu_sbb_##bits(a, 1, 0, &f);                                                                   \
        *cc = (f & ~CC_CF) | (*cc & CC_CF);                                                                \
        return a;                                                                                          \
    }                                                                                                      \
    static inline void alu_rot_cc##bits(uint16_t *cc, unsigned cf, unsigned of) { *cc = (*cc & ~(CC_CF | CC_OF)) | (cf ? CC_CF : 0) | (of & 1); } \
    static inline alu_t##bits alu_rol##bits(alu_t##bits a, uint8_t n, uint16_t *cc)                        \
    {                                                                                                      \
        if (!(n &= bits == 64 ? 63 : 31))                                                                  \
            return a;                                                                                      \
        n &= bits - 1;                                                                                     \
        alu_t##bits r = n ? (alu_t##bits)(a << n | a >> (bits - n)) : a;                                   \
        alu_rot_cc##bits(cc, r & 1, (unsigned)(r >> (bits - 1) ^ r));                                      \
        return r;                                                                                          \
    }                                                                                                      \
    static inline alu_t##bits alu_ror##bits(alu_t##bits a, uint8_t n, uint16_t *cc)                        \
    {                                                                                                      \
        if (!(n &= bits == 64 ? 63 : 31))                                                                  \
            return a;                                                                                      \
        n &= bits - 1;                                                                                     \
        alu_t##bits r = n ? (alu_t##bits)(a >> n | a << (bits - n)) : a;                                   \
        alu_rot_cc##bits(cc, r >> (bits - 1) & 1, (unsigned)(r >> (bits - 1) ^ r >> (bits - 2)));          \
        return r;                                                                                          \
    }                                                                                                      \
    static inline alu_t##bits alu_rcl##bits(alu_t##bits a, uint8_t n, uint16_t *cc)                        \
    {                                                                                                      \
        n = (n & (bits == 64 ? 63 : 31)) % (bits + 1);                                                     \
        if (!n)                                                                                            \
            return a;                                                                                      \
        unsigned c = *cc >> 8 & 1;                                                                         \
        for (; n; n--) {                                                                                   \
            unsigned out = a >> (bits - 1) & 1;                                                            \
            a = (alu_t##bits)(a << 1 | c);                                                                 \
            c = out;                                                                                       \
        }                                                                                                  \
        alu_rot_cc##bits(cc, c, (unsigned)(a >> (bits - 1)) ^ c);                                          \
        return a;                                                                                          \
    }                                                                                                      \
    static inline alu_t##bits alu_rcr##bits(alu_t##bits a, uint8_t n, uint16_t *cc)                        \
    {                                                                                                      \
        n = (n & (bits == 64 ? 63 : 31)) % (bits + 1);                                                     \
        if (!n)                                                                                            \
            return a;                                                                                      \
        unsigned c = *cc >> 8 & 1;                                                                         \
        for (; n; n--) {                                                                                   \
            unsigned out = a & 1;                                                                          \
            a = (alu_t##bits)(a >> 1 | (alu_t##bits)c << (bits - 1));                                      \
            c = out;                                                                                       \
        }                                                                                                  \
        alu_rot_cc##bits(cc, c, (unsigned)(a >> (bits - 1) ^ a >> (bits - 2)));                            \
        return a;                                                                                          \
    }                                                                                                      \
    static inline alu_t##bits alu_shl##bits(alu_t##bits a, uint8_t n, uint16_t *cc)                        \
    {                                                                                                      \
        if (!(n &= bits == 64 ? 63 : 31))                                                                  \
            return a;                                                                                      \
        unsigned cf = n <= bits ? (unsigned)(a >> (bits - n)) & 1 : 0;                                     \
        alu_t##bits r = n < bits ? (alu_t##bits)(a << n) : 0;                                              \
        *cc = cc_szp(r, bits) | (cf ? CC_CF : 0) | ((unsigned)(r >> (bits - 1)) ^ cf);                     \
        return r;                                                                                          \
    }                                                                                                      \
    static inline alu_t##bits alu_shr##bits(alu_t##bits a, uint8_t n, uint16_t *cc)                        \
    {                                                                                                      \
        if (!(n &= bits == 64 ? 63 : 31))                                                                  \
            return a;                                                                                      \
        unsigned cf = n <= bits ? (unsigned)(a >> (n - 1)) & 1 : 0;                                        \
        alu_t##bits r = n < bits ? (alu_t##bits)(a >> n) : 0;                                              \
        *cc = cc_szp(r, bits) | (cf ? CC_CF : 0) | (n == 1 ? (unsigned)(a >> (bits - 1)) & 1 : 0);         \
        return r;                                                                                          \
    }                                                                                                      \
    static inline alu_t##bits alu_sar##bits(alu_t##bits a, uint8_t n, uint16_t *cc)                        \
    {                                                                                                      \
        if (!(n &= bits == 64 ? 63 : 31))                                                                  \
            return a;                                                                                      \
        if (n > bits)                                                                                      \
            n = bits;                                                                                      \
        unsigned cf = (unsigned)((int##bits##_t)a >> (n - 1)) & 1;                                         \
        alu_t##bits r = (alu_t##bits)((int##bits##_t)a >> (n < bits ? n : bits - 1));                      \
        *cc = cc_szp(r, bits) | (cf ? CC_CF : 0);                                                          \
        return r;                                                                                          \
    }
#define PORTABLE_SHIFTD(bits)                                                                              \
    static inline alu_t##bits alu_shld##bits(alu_t##bits a, alu_t##bits b, uint8_t n, uint16_t *cc)        \
    {                                                                                                      \
        if (!(n &= bits == 64 ? 63 : 31))                                                                  \
            return a;                                                                                      \
        if (n >= bits && bits == 16) { alu_t##bits t = a; a = b; b = t; n -= bits; }                       \
        alu_t##bits r = n ? (alu_t##bits)(a << n | b >> (bits - n)) : a;                                   \
        unsigned cf = n ? (unsigned)(a >> (bits - n)) & 1 : b & 1;                                         \
        *cc = cc_szp(r, bits) | (cf ? CC_CF : 0) | ((unsigned)((a ^ r) >> (bits - 1)) & 1);                \
        return r;                                                                                          \
    }                                                                                                      \
    static inline alu_t##bits alu_shrd##bits(alu_t##bits a, alu_t##bits b, uint8_t n, uint16_t *cc)        \
    {                                                                                                      \
        if (!(n &= bits == 64 ? 63 : 31))                                                                  \
            return a;                                                                                      \
        if (n >= bits && bits == 16) { alu_t##bits t = a; a = b; b = t; n -= bits; }                       \
        alu_t##bits r = n ? (alu_t##bits)(a >> n | b << (bits - n)) : a;                                   \
        unsigned cf = n ? (unsigned)(a >> (n - 1)) & 1 : (unsigned)(b >> (bits - 1)) & 1;                  \
        *cc = cc_szp(r, bits) | (cf ? CC_CF : 0) | ((unsigned)((a ^ r) >> (bits - 1)) & 1);                \
        return r;                                                                                          \
    }
PORTABLE_ALU(8)
PORTABLE_ALU(16)
PORTABLE_ALU(32)
PORTABLE_ALU(64)
PORTABLE_SHIFTD(16)
PORTABLE_SHIFTD(32)
PORTABLE_SHIFTD(64)
#endif
#endif
