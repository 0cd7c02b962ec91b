/* SPDX-License-Identifier: Apache-2.0
 *
 * What the files of the JIT share: its memory, its records, and the state of an emission.
 */
#ifndef KVMPY_TCG_JIT_CODE_H
#define KVMPY_TCG_JIT_CODE_H

#include "jit.h"
#include "jit_asm.h"

#define HOT_SIZE (16u << 20)  /* code, from the bottom up; behind it as much for what is seldom run */
#define COLD_SIZE (16u << 20)
#define DATA_SIZE (24u << 20) /* micro-ops of helper calls, records of links and blocks */
#define CODE_SLACK (96u << 10) /* more than one block can need */
#define TARGET_BITS 14
#define MAX_CONTEXTS 16
#define PROVED_BITS 16 /* a thousand pages are usual, and a page taken for one of them costs all proofs */

/* A host address for an indirect jump: key is RIP ^ context. */
struct target { uint64_t key; const uint8_t *code; uint64_t page; uintptr_t block; };
#define TARGET_FLAGS 1 /* in `block`, beside its address: it may show the flags that it gets */

struct jit_block;
/* A jump, by offsets in the code: where its displacement stands (0: there is none), and where it leads without a link. */
struct way { uint32_t site, stub; };
/* That a place in another page still is what it was: in the context of this serial number (0: none), for code that runs
 * at this page; it says nothing of another place that the code is mapped to. */
struct jit_proof { uint64_t serial, page; };
/* One way out of host code. `far`: the jump at its end. `early`: with `near`, the jump that leads to the block itself when
 * that does not look at flags; else the jump to where the flags are saved, a NOP when the block overwrites them. */
struct jit_link {
    struct jit_block *to;
    struct jit_link *next;   /* of those that lead to `to` */
    struct jit_proof *proof; /* NULL: it stays in the page */
    struct way far, early;
    int32_t delta;           /* target - start of the page that the block is in */
    uint8_t number;          /* of the block's */
    bool near;
    bool saved;              /* the flags are in c->cc before the near jump already */
};

/* What an instruction that crosses into the next page needs besides: that this still is the page. */
struct jit_second { struct jit_proof proof; const uint8_t *host; };

struct jit_block {
    struct block *block;
    const uint8_t *entry;
    struct jit_link *incoming;
    struct target *cached;   /* the entry of the target table that names this block */
    uint64_t page;           /* bound: linear address of the only page that the code may run in, for it has that as constants */
    uint32_t hot_bytes, cold_bytes;
    uint8_t ninsn, nlinks;
    bool bound;
    bool cached_often;       /* more than one does: look through the table */
    bool flags_in;           /* flags that hold at entry may be seen */
    bool mapped;             /* jit_at() is there */
    struct jit_link link[];
};
/* Where the code of each instruction begins, for jit_profile.c. */
static inline uint16_t *jit_at(const struct jit_block *jb) { return (uint16_t *)&jb->link[jb->nlinks]; }

struct jit {
    uint8_t *write, *run;    /* the two mappings of hot and cold code */
    uint8_t *data;
    size_t hot, cold, used;  /* allocated so far */
    size_t first_hot, first_cold;
    uint8_t *near_memory;    /* what was reserved: code, then data */
    bool full;
    unsigned threshold, off; /* off: JIT_NO_* */
    uint64_t host_features[2];
    bool gs;                 /* the host's GS base is c->tlb while host code runs: probes need not load it */
    bool rorx;
    const uint8_t *(*enter)(const uint8_t *code); /* returns a link or NULL with c->rip set */
    const uint8_t *helper, *exit_link, *exit_rip, *prove, *find, *second; /* thunks */
    struct jit_link *pending;  /* host code left by it and c->jit.pending_rip is where it leads */
    uint64_t pending_rip;
    struct block nowhere;    /* c->block while host code runs; has no instructions */
    struct target *target;
    struct target **data_target; /* the same pointer, near the code */
    struct { uint32_t mode; uint64_t serial; } contexts[MAX_CONTEXTS]; /* serial 0: free */
    uint64_t last_serial;
    unsigned next_victim;
    uint64_t epoch;          /* changes when all proofs are void, those of parked address spaces too */
    bool kernel_local;       /* a page that is not global has been proved for the kernel */
    uint64_t pages[(1 << PROVED_BITS) / 64]; /* filter of pages that have been proved */
    uint64_t (*calls)[2];    /* of handlers by row, from hot and from cold code; NULL: nobody asked (jit_profile.c) */
    uint8_t *helper_half;    /* where the helper thunk names its C half */
};
enum {
    JIT_ALL = 1 /* blocks too that are mostly helper calls */, JIT_PERF = 2 /* tell perf of the code */,
    JIT_NO_CHAIN = 4, JIT_NO_FLAGS = 8, JIT_NO_INDIRECT = 16, JIT_NO_VECTORS = 32, JIT_NO_X87 = 64, JIT_NO_GROUPS = 128,
    JIT_NO_GS = 256, JIT_NO_TRACES = 512, JIT_NO_BINDING = 1024, JIT_NO_STRINGS = 2048, JIT_NO_CROSSING = 4096, JIT_NO_PARKING = 8192,
};

bool jit_map(struct cpu *c, struct jit *j);
void jit_unmap(struct jit *j);
void jit_thunks(struct cpu *c, struct jit *j);
/* What thunks call. jit_call: micro-ops up to op_jit_back; where host code goes on, NULL: out. */
const uint8_t *jit_call(struct cpu *c, const struct uop *u, const uint8_t *behind);
const uint8_t *jit_prove(struct cpu *c, struct jit_link *l);
const uint8_t *jit_find(struct cpu *c);
uintptr_t jit_prove_second(struct cpu *c, struct jit_second *s); /* not 0: it holds */
bool jit_compile(struct cpu *c, struct block *b);
struct piece { const uint8_t *start; unsigned size; };
void jit_tell_perf(uint64_t rip, const struct piece *pieces, unsigned count); /* jit_perf.c */
OP_DECL(jit_back);

/* ---- emission ---- */
enum { IN_CC = 1, IN_EFLAGS = 2, IN_RECIPE = 4, BUT_CARRY = 8 }; /* where the flags are: jit_flags.c */
struct recipe {
    uint8_t kind, size, dst, src; /* host registers */
    bool wide;
    int32_t imm, moved;      /* of dst since: only RSP may move */
    uint32_t uses;           /* guest registers */
    uint8_t bytes[15];
};
#define SLOW_SITES 4
struct vectors { /* registers of which 16 bytes, and those of which 32 are meant; and x87 (jit_x87.c) */
    uint16_t low, full;
    bool wide;               /* of dirty: upper halves of host registers have been used */
    bool x87;                /* of held: its registers are in the host's unit */
    uint16_t fip;            /* of dirty: c->fpu.fip shall be this offset in the page, plus 1; 0: it is what it shall be */
};
struct slow { /* out of line: the interpreter does it */
    uint8_t *site[SLOW_SITES];
    unsigned sites;
    const uint8_t *resume;   /* run address */
    const struct uop *uop;
    bool restore;            /* EFLAGS are wanted behind it */
    struct vectors spill, reload;
    unsigned flags;          /* where they are on the way here */
    struct recipe recipe;
    uint32_t return_offset;  /* of a CALL: what its push shall store, from the start of the page; 0: none */
};
struct leave { uint8_t *site; uint32_t offset; struct vectors spill; unsigned flags; struct recipe recipe; }; /* to the loop, with RIP at this offset in the page */

#define MAX_SLOW 160
#define MAX_LEAVE 96
struct emit {
    struct place_of_code a;  /* hot */
    struct place_of_code k;  /* cold */
    struct cpu *c;
    struct jit *j;
    struct block *b;
    const uint8_t *bytes;    /* of the guest's code */
    struct jit_block *jb;
    uint32_t start;          /* of the block, in its page */
    bool bound;              /* to this page: */
    uint64_t page;
    int64_t behind;          /* the terminator that is emitted, from the block's start */
    unsigned nlinks;
    unsigned flags;          /* IN_* */
    struct recipe recipe;    /* with IN_RECIPE */
    bool carry_in_cc;        /* the instruction that is emitted leaves it there */
    unsigned nslow, nleave, helpers;
    struct slow *group;      /* S0 holds the addend for accesses of this group; NULL: there is none (jit_group.c) */
    unsigned group_first, group_last; /* instructions */
    bool no_groups;
    unsigned aligned;        /* of the next probe: a power of two; 0: it need not be */
    struct vectors held, dirty; /* guest vector registers in host registers of the same number; those not yet in c->v */
    bool masked;             /* MXCSR has been looked at: all exceptions are masked */
    bool shadow;             /* STI comes before this instruction */
    struct slow slow[MAX_SLOW]; /* from here on not cleared for a new block */
    struct leave leave[MAX_LEAVE];
};

#define FIELD(e, f) rm_abs(&(e)->c->f)
#define GUEST_SP 15 /* host register of guest RSP */
#define S0 10       /* scratch */
#define S1 11

static inline bool homed(unsigned guest) { return guest == R10 || guest == R11 || guest == R15; } /* in struct cpu */
static inline unsigned jit_guest(uint8_t offset) { return offset / 8; } /* of an operand in a micro-op */
static inline unsigned host_reg(unsigned guest) { return guest == RSP ? GUEST_SP : guest; }

static inline bool jit_runs_at(const struct jit_block *jb, uint64_t rip) { return !jb->bound || jb->page == (rip & PAGE_MASK_4K); }

static inline const struct jit_block *jit_from(const struct jit_link *l)
{
    return (const struct jit_block *)((const char *)(l - l->number) - offsetof(struct jit_block, link));
}
/* The jump leads to `target` (run address). */
static inline void jit_lead(const struct jit *j, struct way w, const uint8_t *target)
{
    set_target(j->write + w.site, j->run - j->write, target);
}
static inline void jit_lead_to_stub(const struct jit *j, struct way w) { jit_lead(j, w, j->run + w.stub); }

/* Where the code runs is a constant of 32 bits, sign-extended: `offset` from the start of the page. */
static inline bool jit_knows(const struct emit *e, int64_t offset, int32_t *address)
{
    int64_t sum = (int64_t)e->page + offset;
    *address = (int32_t)sum;
    return e->bound && sum == *address;
}
/* The linear address at this offset into a register. */
static inline void jit_address(struct place_of_code *a, const struct emit *e, unsigned dst, int32_t offset)
{
    int32_t known;
    if (jit_knows(e, offset, &known)) {
        mov_imm(a, rm_reg(dst), known);
        return;
    }
    mov_load(a, dst, FIELD(e, jit.page));
    lea(a, true, dst, rm_mem(dst, offset));
}

void *jit_data(struct jit *j, size_t size); /* NULL: full */
/* jit_insn.c: one instruction that does not end a block. False: it has no emission. observed: flags that may be seen after it */
bool jit_insn(struct emit *e, const struct decoded *d, uint8_t observed);
void jit_helper(struct emit *e, const struct decoded *d);
/* Micro-ops for the helper thunk: 8 bytes before them the block's offset in its page; behind them a handler alone. */
struct uop *jit_begin_uops(struct emit *e);
void jit_end_uops(struct emit *e, struct uop *end);
/* Micro-op of a slow path or helper call; fn NULL: its own */
const struct uop *jit_copy_uop(struct emit *e, const struct decoded *d, uop_fn fn);
/* `from`: the low half of the linear address; S1: the address of the last byte, or of the first when it must be aligned
 * (then no bit of its offset in the page may differ from a multiple). Then S0 is the addend. */
void jit_look_up(struct emit *e, unsigned from, bool write, struct slow *s);
/* Proves an access of `size` bytes at host register `base` + disp and gives the operand. Clobbers S0, S1, EFLAGS. */
struct rm jit_probe(struct emit *e, unsigned base, int32_t disp, unsigned size, bool write, struct slow *s);
struct rm jit_operand(struct emit *e, const struct decoded *d, unsigned size, bool write, struct slow *s, bool want_s1);
bool jit_can_address(const struct emit *e, const struct decoded *d);
struct slow *jit_new_slow(struct emit *e);
/* Flags are safe, and there is a slow path for a probe; NULL: the group's probe has been made. */
struct slow *jit_begin_access(struct emit *e);
void jit_resume(struct emit *e, const struct decoded *d, struct slow *s); /* its slow path comes back here */
struct operands {
    int reg, rm, opcode, vvvv; /* guest registers by place in the encoding, -1: none */
    bool high_reg, high_rm, byte, mem_first;
    unsigned mem_size;
};
void jit_find_operands(const struct decoded *d, struct operands *o);
unsigned jit_count_homed(const struct operands *o);
bool jit_copy_access(const struct decoded *d, unsigned *size, bool *write); /* as JIT_COPY does; false: it would not */
unsigned jit_half(struct emit *e, uint8_t offset, unsigned tmp); /* a base or index: in which register it is, `tmp` if it lives in memory */
/* The address within its segment into dst; `other` is used only when base and index both live in memory. */
void jit_offset(struct emit *e, const struct uop *u, unsigned dst, unsigned other);
void jit_leave_if(struct emit *e, unsigned cond, uint32_t offset);
void jit_slow_if(struct emit *e, struct slow *s, unsigned cond);
/* jit_flags.c */
static inline unsigned jit_lost(unsigned flags) { return flags & ~(unsigned)(IN_EFLAGS | BUT_CARRY); }
void jit_flags_made(struct emit *e, const struct decoded *d, unsigned size); /* by the `size` bytes before e->a.p */
void jit_need_cc(struct emit *e);
void jit_need_eflags(struct emit *e, unsigned which); /* FLAG_*; clobbers S1 */
/* INC or DEC of a register is next, and the host's may run with any carry. */
bool jit_keeps_carry(const struct emit *e, const struct decoded *d);
void jit_lose_eflags(struct emit *e);    /* they are about to be clobbered */
void jit_make_cc(struct place_of_code *a, struct emit *e, unsigned flags, const struct recipe *r); /* out of line; clobbers S1 */
void jit_restore_flags(struct place_of_code *a, struct emit *e);
void jit_registers_will_change(struct emit *e, const struct decoded *d, uint8_t observed); /* before `d` is emitted */
void jit_stack_has_moved(struct emit *e, const struct decoded *d); /* after it */
/* General registers that an instruction writes, all of them where that is not obvious; RSP moves by a constant. */
unsigned jit_written(const struct decoded *d);
bool jit_moves_stack(const struct decoded *d, int64_t *by);
/* jit_group.c. `part`: the handler of the part of the last instruction that belongs to the group; NULL: all of it */
bool jit_group_begin(struct emit *e, const struct decoded *d, unsigned at, unsigned n);
void jit_group_end(struct emit *e, const struct decoded *d, uop_fn part);
/* jit_vec.c */
bool jit_vector_access(const struct emit *e, const struct decoded *d, unsigned *size, bool *write);
bool jit_vector(struct emit *e, const struct decoded *d);
void jit_flush_vectors(struct emit *e);  /* to c->v; none is held afterwards */
void jit_spill(struct place_of_code *a, struct emit *e, struct vectors v);
void jit_reload(struct place_of_code *a, struct emit *e, struct vectors v);
/* jit_x87.c */
bool jit_x87(struct emit *e, const struct decoded *d);
void jit_store_fip(struct place_of_code *a, struct emit *e, unsigned fip);
struct uop jit_x87_again(unsigned offset);
void jit_x87_leave(struct cpu *c);
/* Behind host code, before C that may look at c->fpu or use the unit: handlers and the loop. */
static inline void jit_x87_behind(struct cpu *c)
{
    if (unlikely(c->jit.x87.live))
        jit_x87_leave(c);
}

#endif
