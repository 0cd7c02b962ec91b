/* SPDX-License-Identifier: Apache-2.0
 *
 * Micro-ops, blocks, and how one handler goes to the next.
 *
 * The decoder turns guest bytes into an array of `struct uop`, one per instruction (rarely two: a prefix micro-op
 * without length prepares a value). A handler is
 *
 *     OP(add_rr64) { R64(c, u->d) += R64(c, u->s); NEXT; }
 *
 * NEXT is a sibling call to the handler of the following record: one load and one indirect jump, and the indirect
 * jump stands at the end of every handler, so the host predicts each by its own history. Compilers without
 * guaranteed sibling calls (-O0, sanitizers) get NEXT as "return u + 1" to a loop; both have the same signature,
 * so a handler whose local variables escape (which forbids a sibling call) simply says NEXT_RETURN.
 * Building with clang checks it: there NEXT is `musttail`.
 *
 * A block is a run of instructions of one physical page, in one mode; its last record is a terminator. A block is
 * position independent: RIP of an instruction is c->bip + u->off, so a page mapped at two addresses (or by two
 * processes) is decoded once. Terminators with a known target are followed by a `struct link` in place of a micro-op.
 */
#ifndef KVMPY_TCG_UOP_H
#define KVMPY_TCG_UOP_H

#include "cpu.h"

typedef const struct uop *(*uop_fn)(struct cpu *c, const struct uop *u);

struct uop {
    uop_fn fn;         /* 0 */
    uint64_t imm;      /* 8   immediate, sign-extended as the instruction wants it; branches: target - block start */
    int32_t disp;      /* 16 */
    uint8_t d, s, x;   /* 20  operands in order: a GPR is its byte offset in struct cpu (AH is RAX + 1), others their number */
    uint8_t base;      /* 23  byte offsets; REG_ZERO when absent, REG_BIP for RIP-relative (disp is made relative to bip) */
    uint8_t index;     /* 24 */
    uint8_t scale;     /* 25  0..3 */
    uint8_t aflags;    /* 26  EA_*: anything that makes an address more than base + index + disp */
    uint8_t seg;       /* 27  SEG_*, after overrides */
    uint8_t len;       /* 28  bytes of the instruction, 0 for a prefix micro-op */
    uint8_t off;       /* 29  of the instruction in the block */
    uint16_t row;      /* 30  OPROW_*: its line in the optable */
};
_Static_assert(sizeof(struct uop) == 32, "the JIT and link slots count on 32 bytes");

enum { EA_A32 = 1, EA_A16 = 2, EA_SEG = 4 /* add a segment base */, EA_CHECK = 8 /* check segment limit and type */ };
#define REG_ZERO 128
#define REG_BIP 136
#define REG_SCRATCH 144

#define R64(c, o) (*(uint64_t *)((char *)(c) + (o)))
#define R32(c, o) (*(uint32_t *)((char *)(c) + (o)))
#define R16(c, o) (*(uint16_t *)((char *)(c) + (o)))
#define R8(c, o) (*(uint8_t *)((char *)(c) + (o)))

/* What a decoded block depends on besides its bytes: cpu.mode, part of the block key. */
enum {
    MODE_CODE32 = 1 << 0,  /* default operand and address size 32 (16 when neither) */
    MODE_CODE64 = 1 << 1,
    MODE_STACK32 = 1 << 2, /* SS.B; implied by CODE64 */
    MODE_USER = 1 << 3,    /* CPL 3 */
    MODE_CPL0 = 1 << 4,
    MODE_PE = 1 << 5,
    MODE_VM86 = 1 << 6,
    MODE_SEGS = 1 << 7,    /* some of ES SS DS is not flat: addresses need EA_SEG and EA_CHECK */
    MODE_LIMIT = 1 << 8,   /* CS.limit below 4 GiB: checked at block entry */
    MODE_EM = 1 << 9,      /* CR0.EM */
    MODE_TS = 1 << 10,     /* CR0.TS */
    MODE_MP = 1 << 11,
    MODE_SSE = 1 << 12,    /* CR4.OSFXSR */
    MODE_AVX = 1 << 13,    /* CR4.OSXSAVE and XCR0 has SSE and AVX */
    MODE_STEP = 1 << 14,   /* blocks of one instruction (not in cpu.mode: the loop adds it) */
    MODE_LA57 = 1 << 20,   /* what is canonical */
    MODE_IOPL = 1 << 15,   /* CPL <= IOPL: CLI, STI, IN... need no further check */
};

struct link { /* takes the place of a micro-op behind a terminator */
    struct block *to;
    struct link *next;   /* of the links that lead to `to` */
    struct block *from;
    uint64_t unused;
};
_Static_assert(sizeof(struct link) == 32, "a link takes the place of a micro-op");

struct jit_block;
typedef uint32_t block_ref; /* bytes from the start of the cache's arena; 0: none */
struct block {           /* 64 bytes: a processor has tens of thousands */
    uint8_t *host;       /* first byte in host memory: together with `mode` the key */
    uint64_t gpa;
    uint32_t mode;
    uint16_t bytes;
    uint8_t ninsn, nuop;
    bool dead;           /* forgotten; memory goes back at the next flush */
    bool crosses;        /* one instruction that goes on in the next page: a struct crossing is behind uops and links */
    uint8_t nlinks : 2;
    bool roams : 1;      /* its page is mapped in several places: its host code takes no constants from one */
    uint8_t more;        /* bytes behind its own that its host code covers */
    uint32_t count;      /* executions, for the JIT's threshold */
    struct jit_block *host_code; /* NULL: none */
    uop_fn first;        /* handler of the first micro-op, where the JIT has put its own */
    block_ref hash_next, page_next;
    struct link *incoming;
    struct uop uops[];
};
struct crossing {
    uint64_t gpa;        /* of the second page */
    uint8_t *host;
    block_ref page_next; /* in the list of that page */
    uint32_t unused[3];
};
_Static_assert(sizeof(struct block) % 32 == 0 && sizeof(struct crossing) == 32, "micro-ops do not straddle cache lines");

#define OP(name) const struct uop *op_##name(struct cpu *c, const struct uop *u)
#define OP_DECL(name) const struct uop *op_##name(struct cpu *c, const struct uop *u)

#if defined(__clang__) && defined(__OPTIMIZE__) && !defined(TCG_NO_TAIL)
#define GOTO(target) do { const struct uop *t_ = (target); __attribute__((musttail)) return t_->fn(c, t_); } while (0)
#elif defined(__OPTIMIZE__) && !defined(__SANITIZE_ADDRESS__) && !defined(TCG_NO_TAIL)
#define GOTO(target) do { const struct uop *t_ = (target); return t_->fn(c, t_); } while (0)
#else
#define GOTO(target) return (target)
#endif
#define NEXT GOTO(u + 1)
#define NEXT_RETURN return u + 1
/* Back to cpu_run()'s loop, which goes on at c->rip. */
#define LEAVE return NULL
#define LEAVE_AFTER do { c->rip = (c->bip + u->off + u->len) & c->ipmask; return NULL; } while (0)
#define RIP_OF(c, u) (((c)->bip + (u)->off) & (c)->ipmask)
#define RIP_AFTER(c, u) (((c)->bip + (u)->off + (u)->len) & (c)->ipmask)

#endif
