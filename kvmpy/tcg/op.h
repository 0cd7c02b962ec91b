/* SPDX-License-Identifier: Apache-2.0
 *
 * For files that define handlers: register access by size, read-modify-write patterns, and the way to the next block.
 *
 * SETn writes a register as the processor does: 32-bit results clear the upper half, 8 and 16-bit ones keep the rest.
 * RMW(bits, CALC) runs CALC on the memory operand: `a` is the old value, CALC defines `r`, the new one, and may set
 * the flag word `f`, which is committed with the store. LOCKED(bits, CALC) does it atomically.
 */
#ifndef KVMPY_TCG_OP_H
#define KVMPY_TCG_OP_H

#include "core.h"

#define GET8(o) R8(c, o)
#define GET16(o) R16(c, o)
#define GET32(o) R32(c, o)
#define GET64(o) R64(c, o)
#define SET8(o, v) ((void)(R8(c, o) = (uint8_t)(v)))
#define SET16(o, v) ((void)(R16(c, o) = (uint16_t)(v)))
#define SET32(o, v) ((void)(R64(c, o) = (uint32_t)(v)))
#define SET64(o, v) ((void)(R64(c, o) = (uint64_t)(v)))
#define U(bits) uint##bits##_t
#define S(bits) int##bits##_t
#define EACH_SIZE(M, ...) M(8, ##__VA_ARGS__) M(16, ##__VA_ARGS__) M(32, ##__VA_ARGS__) M(64, ##__VA_ARGS__)
#define EACH_WIDE(M, ...) M(16, ##__VA_ARGS__) M(32, ##__VA_ARGS__) M(64, ##__VA_ARGS__)

#define RMW(bits, ...)                                               \
    do {                                                             \
        uint64_t lin = ea(c, u);                                     \
        uint8_t *p = rmw_host(c, u, lin, bits / 8);                  \
        uint16_t f = c->cc;                                          \
        if (likely(p)) {                                             \
            U(bits) a = HOST(bits, p);                               \
            __VA_ARGS__;                                             \
            HOST(bits, p) = r;                                       \
        } else {                                                     \
            U(bits) a = (U(bits))ld_rmw(c, u, lin, bits / 8);        \
            __VA_ARGS__;                                             \
            mem_write_slow(c, u, lin, bits / 8, r, 0);               \
        }                                                            \
        c->cc = f;                                                   \
    } while (0)

#define LOCKED(bits, ...)                                                                                        \
    do {                                                                                                         \
        uint64_t lin = ea(c, u);                                                                                 \
        uint8_t *p = locked_host(c, u, lin, bits / 8);                                                           \
        uint16_t f;                                                                                              \
        if (likely(p)) {                                                                                         \
            U(bits) a = HOST(bits, p);                                                                           \
            for (;;) {                                                                                           \
                f = c->cc;                                                                                       \
                __VA_ARGS__;                                                                                     \
                if (__atomic_compare_exchange_n((U(bits) *)p, &a, r, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) \
                    break;                                                                                       \
            }                                                                                                    \
        } else {                                                                                                 \
            U(bits) a = (U(bits))ld_rmw(c, u, lin, bits / 8);                                                    \
            f = c->cc;                                                                                           \
            __VA_ARGS__;                                                                                         \
            mem_write_slow(c, u, lin, bits / 8, r, 0);                                                           \
        }                                                                                                        \
        c->cc = f;                                                                                               \
    } while (0)

/* To the block at c->bip + delta by a link; returns to the loop when there is none yet or somebody wants something. */
static inline __attribute__((always_inline)) const struct uop *follow(struct cpu *c, struct link *l, uint64_t delta)
{
    uint64_t rip = (c->bip + delta) & c->ipmask;
    struct block *b = l->to;
    if (likely(b) && likely(!atomic_load_explicit(&c->request, memory_order_relaxed)) && likely(c->budget >= b->ninsn)) {
        if (l->unused) { /* leaves the page: does RIP still lead there? */
            struct tlb_entry *e = &c->xtlb->e[rip >> 12 & (TLB_SIZE - 1)];
            if (unlikely(e->ex != (rip & PAGE_MASK_4K) || (uint8_t *)(rip + e->addend) != b->host)) {
                c->rip = rip;
                return NULL;
            }
        }
        c->bip = rip;
        c->block = b;
        c->budget -= b->ninsn;
        return b->uops;
    }
    c->rip = rip;
    c->link = b ? NULL : l;
    return NULL;
}
#define FOLLOW(n, delta)                                                          \
    do {                                                                          \
        const struct uop *next_ = follow(c, (struct link *)(u + 1) + (n), delta); \
        if (unlikely(!next_))                                                     \
            return NULL;                                                          \
        GOTO(next_);                                                              \
    } while (0)

/* First thing in an instruction whose answer the machine gives: in an emulation assist the other engine's machine does.
 * processor_only: what the processor answers, but the other one unless this one leads. */
static inline void processor_only(struct cpu *c, const struct uop *u)
{
    if (unlikely(cpu_only_helps(c)))
        cpu_stop(c, u, TCG_STOP_HANDBACK);
}

static inline void machine_only(struct cpu *c, const struct uop *u)
{
    if (unlikely(c->assist_left))
        cpu_stop(c, u, TCG_STOP_HANDBACK);
}

static inline void whole_xstate_only(struct cpu *c, const struct uop *u)
{
    if (unlikely(c->assist_partial))
        machine_only(c, u);
}

/* To c->rip through the jump cache (returns, indirect jumps). */
const struct uop *jump_cached(struct cpu *c);
#define JUMP(newrip)                                 \
    do {                                             \
        c->rip = (newrip);                           \
        const struct uop *next_ = jump_cached(c);    \
        if (unlikely(!next_))                        \
            return NULL;                             \
        GOTO(next_);                                 \
    } while (0)

#endif
