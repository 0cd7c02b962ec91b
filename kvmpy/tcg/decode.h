/* SPDX-License-Identifier: Apache-2.0
 *
 * What decode.c gives to block.c: one instruction as a micro-op, and what the block builder must know about it.
 */
#ifndef KVMPY_TCG_DECODE_H
#define KVMPY_TCG_DECODE_H

#include "optable.h"

struct oprow {
    const char *name;
    uint8_t prefix; /* 0 any, 1 none, 2 66, 3 F3, 4 F2 */
    int8_t digit;
    uint8_t mod; /* 0 any, 1 register, 2 memory, 3 a register whatever ModRM.mod says */
    int8_t rm, w, l;
    uint8_t modrm;
    uint8_t size; /* 0 none, 1 v, 2 y, 3 x, 4 byte */
    uint16_t operand[4];
    uint8_t feature[3]; /* FEAT_* + 1, 0 ends */
    uint8_t written, read;
    uint16_t pool;
    uint32_t attrs;
    uint8_t jit; /* JIT_*: how host code is made of it */
    uint8_t vec_size, vec; /* JIT_VEC: bytes of memory, or VEC_FULL...; VEC_* */
};
enum { SZ_NONE, SZ_B, SZ_W, SZ_D, SZ_Q, SZ_V, SZ_Y, SZ_Z, SZ_X, SZ_UB }; /* of an operand; in the order of SIZES in optable.py */
#define OPK(kind, size) ((kind) | (size) << 8)

enum decode_result { DECODE_OK, DECODE_MORE }; /* MORE: `avail` bytes are not enough */

enum { VEC_FULL = 32, VEC_HALF, VEC_QUARTER, VEC_EIGHTH, VEC_BY_W };
enum { VEC_ALIGNED = 1, VEC_FRESH = 2, VEC_FRESH_LOAD = 4, VEC_READS = 8, VEC_FP = 16, VEC_COMPARE = 32, VEC_XMM0 = 64 };

struct encoding { /* how it was written: for the JIT, which writes it again for the host */
    uint8_t map, opcode, modrm;
    uint8_t osize; /* operand size in bytes: 2, 4, 8 */
    uint8_t imm;   /* bytes of immediates and targets at its end */
    uint8_t l;
    bool vex, w, lock, mem;
};

struct decoded {
    struct uop uop;
    struct uop prefix;        /* when has_prefix: goes first */
    uop_fn quiet;             /* version for dead flags, or NULL */
    const struct oprow *row;  /* NULL: a made-up fault */
    uint8_t flags_written, flags_read;
    uint8_t links;            /* records to leave behind the terminator */
    uint8_t cond;             /* of a Jcc, else 0xff */
    struct encoding enc;
    bool has_prefix, end, barrier; /* barrier: may fault or exit, so flags must be right when it begins */
};

/* One instruction at p (avail bytes readable, at most 15 used); off: its offset in the block. */
enum decode_result decode_insn(const uint8_t *p, unsigned avail, uint32_t mode, const uint64_t *features, unsigned off,
                               struct decoded *out);
bool decode_repeats(unsigned row); /* a string instruction: it may come again at its own RIP */
const char *decode_name(unsigned row);

#endif
