/* SPDX-License-Identifier: Apache-2.0
 *
 * Writing x86-64 instructions (SDM vol. 2, chapter 2). Registers are host numbers, 0 to 15.
 *
 * Code is written through one mapping and runs in another (jit_pages.c); `delta` leads from the first to the second.
 */
#ifndef KVMPY_TCG_JIT_ASM_H
#define KVMPY_TCG_JIT_ASM_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

enum { P_66 = 1, P_F2 = 2, P_F3 = 4, P_LOCK = 8, P_REX = 16 /* even if it says nothing: SPL to DIL */, P_GS = 32 };
#define NO_REG 0xffu

struct place_of_code { uint8_t *p; intptr_t delta; };
#define AS struct place_of_code *a

/* The r/m side of an instruction. */
struct rm {
    uint8_t reg;          /* when not memory */
    bool mem;
    uint8_t base, index, scale; /* NO_REG: none; base none and index none: RIP-relative to `target` */
    int32_t disp;
    const void *target;   /* run address */
};
static inline struct rm rm_reg(unsigned r) { return (struct rm){.reg = (uint8_t)r}; }
static inline struct rm rm_mem(unsigned base, int32_t disp) { return (struct rm){.mem = true, .base = (uint8_t)base, .index = NO_REG, .disp = disp}; }
static inline struct rm rm_sib(unsigned base, unsigned index, unsigned scale, int32_t disp)
{
    return (struct rm){.mem = true, .base = (uint8_t)base, .index = (uint8_t)index, .scale = (uint8_t)scale, .disp = disp};
}
static inline struct rm rm_disp(int32_t disp) { return (struct rm){.mem = true, .base = NO_REG, .index = NO_REG, .disp = disp}; } /* no register */
static inline struct rm rm_abs(const void *target) { return (struct rm){.mem = true, .base = NO_REG, .index = NO_REG, .target = target}; }

static inline void put1(AS, unsigned v) { *a->p++ = (uint8_t)v; }
static inline void put4(AS, uint32_t v) { memcpy(a->p, &v, 4); a->p += 4; }
static inline void put8(AS, uint64_t v) { memcpy(a->p, &v, 8); a->p += 8; }
static inline uint8_t *run_address(AS) { return a->p + a->delta; }

/* ModRM and what follows it; `tail`: bytes of immediate behind (RIP-relative addresses count from the end). */
static inline void put_modrm(AS, unsigned reg, struct rm m, unsigned tail)
{
    reg &= 7;
    if (!m.mem) {
        put1(a, 0xc0 | reg << 3 | (m.reg & 7));
        return;
    }
    if (m.target) {
        put1(a, reg << 3 | 5);
        put4(a, (uint32_t)((const uint8_t *)m.target - (run_address(a) + 4 + tail)));
        return;
    }
    if (m.base == NO_REG) { /* index only, or an absolute address: SIB without base has disp32 */
        put1(a, reg << 3 | 4);
        put1(a, (unsigned)m.scale << 6 | (m.index == NO_REG ? 4u : m.index & 7u) << 3 | 5);
        put4(a, (uint32_t)m.disp);
        return;
    }
    bool sib = m.index != NO_REG || (m.base & 7) == 4;
    unsigned mod = m.disp == 0 && (m.base & 7) != 5 ? 0 : m.disp == (int8_t)m.disp ? 1 : 2;
    put1(a, mod << 6 | reg << 3 | (sib ? 4 : m.base & 7));
    if (sib)
        put1(a, (unsigned)m.scale << 6 | (m.index == NO_REG ? 4u : m.index & 7u) << 3 | (m.base & 7));
    if (mod == 1)
        put1(a, (unsigned)m.disp & 0xff);
    else if (mod == 2)
        put4(a, (uint32_t)m.disp);
}

static inline unsigned rex_xb(struct rm m)
{
    if (!m.mem)
        return m.reg >> 3;
    return (m.index != NO_REG ? (m.index >> 3) << 1 : 0) | (m.base != NO_REG ? m.base >> 3 : 0);
}

/* map: 0 one byte, 1 0F, 2 0F38, 3 0F3A */
static inline void put_insn(AS, unsigned prefixes, bool w, unsigned map, unsigned opcode, unsigned reg, struct rm m, unsigned tail)
{
    if (prefixes & P_GS)
        put1(a, 0x65);
    if (prefixes & P_LOCK)
        put1(a, 0xf0);
    if (prefixes & P_66)
        put1(a, 0x66);
    if (prefixes & P_F2)
        put1(a, 0xf2);
    if (prefixes & P_F3)
        put1(a, 0xf3);
    unsigned rex = (unsigned)w << 3 | (reg >> 3 & 1) << 2 | rex_xb(m);
    if (rex || (prefixes & P_REX))
        put1(a, 0x40 | rex);
    if (map)
        put1(a, 0x0f);
    if (map > 1)
        put1(a, map == 2 ? 0x38 : 0x3a);
    put1(a, opcode);
    put_modrm(a, reg, m, tail);
}

/* pp: 0 none, 1 66, 2 F3, 3 F2 */
static inline void put_vex(AS, unsigned pp, bool w, bool l, unsigned map, unsigned opcode, unsigned reg, unsigned vvvv, struct rm m, unsigned tail)
{
    unsigned xb = rex_xb(m);
    put1(a, 0xc4);
    put1(a, (~reg >> 3 & 1) << 7 | (~xb >> 1 & 1) << 6 | (~xb & 1) << 5 | map);
    put1(a, (unsigned)w << 7 | (~vvvv & 15) << 3 | (unsigned)l << 2 | pp);
    put1(a, opcode);
    put_modrm(a, reg, m, tail);
}

/* ---- the few that the JIT itself needs ---- */
static inline void mov_rr(AS, unsigned d, unsigned s) { put_insn(a, 0, true, 0, 0x8b, d, rm_reg(s), 0); }
static inline void mov_load(AS, unsigned d, struct rm m) { put_insn(a, 0, true, 0, 0x8b, d, m, 0); }
static inline void mov_store(AS, struct rm m, unsigned s) { put_insn(a, 0, true, 0, 0x89, s, m, 0); }
static inline void mov_imm(AS, struct rm m, int32_t imm) { put_insn(a, 0, true, 0, 0xc7, 0, m, 4); put4(a, (uint32_t)imm); }
static inline void lea(AS, bool w, unsigned d, struct rm m) { put_insn(a, 0, w, 0, 0x8d, d, m, 0); }
/* ADD 0, OR 1, AND 4, SUB 5, XOR 6, CMP 7 with an immediate */
static inline void alu_imm(AS, bool w, unsigned op, struct rm m, int32_t imm)
{
    bool small = imm == (int8_t)imm;
    put_insn(a, 0, w, 0, small ? 0x83 : 0x81, op, m, small ? 1 : 4);
    if (small)
        put1(a, (unsigned)imm & 0xff);
    else
        put4(a, (uint32_t)imm);
}
static inline void shift_imm(AS, bool w, unsigned op, unsigned r, unsigned n) /* SHL 4, SHR 5, SAR 7 */
{
    put_insn(a, 0, w, 0, 0xc1, op, rm_reg(r), 1);
    put1(a, n);
}
static inline void rorx(AS, unsigned d, unsigned s, unsigned n) /* of 32 bits */
{
    put_vex(a, 3, false, false, 3, 0xf0, d, 0, rm_reg(s), 1);
    put1(a, n);
}
static inline void wrgsbase(AS, unsigned r) { put_insn(a, P_F3, true, 1, 0xae, 3, rm_reg(r), 0); }
/* A jump with a target to be filled in: where its 32-bit displacement stands (to write). */
static inline uint8_t *jmp32(AS) { put1(a, 0xe9); put4(a, 0); return a->p - 4; }
static inline uint8_t *jcc32(AS, unsigned cond) { put1(a, 0x0f); put1(a, 0x80 | cond); put4(a, 0); return a->p - 4; }
enum { COND_O, COND_NO, COND_B, COND_AE, COND_Z, COND_NZ, COND_BE, COND_A, COND_S, COND_NS };
/* `site` shall lead to `target` (run address). One aligned-or-not store by the only thread that runs this code. */
static inline void set_target(uint8_t *site, intptr_t delta, const uint8_t *target)
{
    int32_t d = (int32_t)(target - (site + delta + 4));
    memcpy(site, &d, 4);
}
static inline void jump_to(AS, const uint8_t *target) { set_target(jmp32(a), a->delta, target); }
static inline void call_to(AS, const uint8_t *target)
{
    put1(a, 0xe8);
    put4(a, 0);
    set_target(a->p - 4, a->delta, target);
}

#undef AS
#endif
