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
};
#define OPK(kind, size) ((kind) | (size) << 8)

enum decode_result { DECODE_OK, DECODE_MORE }; /* MORE: `avail` bytes are not enough */

struct decoded {
    struct uop uop;
    struct uop prefix;        /* when has_prefix: goes first */
    uop_fn quiet;             /* version for dead flags, or NULL */
    const struct oprow *row;  /* NULL: a made-up fault */
    uint8_t flags_written, flags_read;
    uint8_t links;            /* records to leave behind the terminator */
    uint8_t cond;             /* of a Jcc, else 0xff */
    bool has_prefix, end, barrier; /* barrier: may fault or exit, so flags must be right when it begins */
};

/* One instruction at p (avail bytes readable, at most 15 used); off: its offset in the block. */
enum decode_result decode_insn(const uint8_t *p, unsigned avail, uint32_t mode, const uint64_t *features, unsigned off,
                               struct decoded *out);
bool decode_repeats(unsigned row); /* a string instruction: it may come again at its own RIP */
const char *decode_name(unsigned row);

#endif
