/* SPDX-License-Identifier: Apache-2.0
 *
 * The JIT: host code for blocks that run often. This file is what the rest of the core sees of it.
 *
 * Guest registers live in the host registers of the same name (RAX RCX RDX RBX RBP RSI RDI R8 R9 R12 R13 R14); guest
 * RSP in host R15; guest R10 R11 R15 stay in struct cpu; host R10 and R11 are scratch. Guest code is thus mostly
 * written again with the same opcodes. Fields of struct cpu are reached RIP-relative: the code lies near it.
 *
 * A block of micro-ops counts its executions in its first micro-op (op_jit_count). Then jit_compile() makes host code
 * and that micro-op becomes op_jit_enter, which runs host code until it comes to something that has none. What has
 * no emission of its own calls the interpreter's handler on a copy of its micro-op, and so does every memory access
 * that misses the softTLB: faults, MMIO, code pages and dirty logging have one implementation.
 *
 * Host code is position independent as blocks are: RIP is c->jit.page (linear address of the running page) plus a
 * constant. Where the page lies in the lowest or highest 2 GiB, as kernels and programs of a fixed address do, the code is
 * bound to it: addresses are constants, and a second place that the page is mapped to gets code of the other kind.
 * A probe of the softTLB needs its address: where the host allows, that is the base of GS. Jumps inside the page are direct once both ends are compiled. Jumps out of the page and indirect ones
 * prove first that RIP still leads where it did: by c->jit.context, a number that stands for the mode and the state
 * of address translation, changed by every flush (jit_forget_addresses).
 *
 * Flags are in the host's EFLAGS from the instruction that made them on, and go to c->cc before something that
 * clobbers them while they can still be seen (an instruction that may fault sees them).
 */
#ifndef KVMPY_TCG_JIT_H
#define KVMPY_TCG_JIT_H

#include "core.h"

#if defined(__x86_64__) && !defined(TCG_PORTABLE)
#define HAVE_JIT 1
#else
#define HAVE_JIT 0
#endif

/* What was proved of an address space that is left, for when it comes back. serial 0: nothing. */
struct jit_parked { uint64_t serial, epoch; uint32_t mode; };

#if HAVE_JIT
void jit_init(struct cpu *c);                     /* leaves c->jit.state NULL where there can be none */
void jit_free(struct cpu *c);
void jit_new_block(struct cpu *c, struct block *b); /* it may become host code one day */
void jit_kill(struct cpu *c, struct block *b);    /* only when b->host_code */
void jit_flush(struct cpu *c);                    /* all blocks are forgotten */
void jit_update_context(struct cpu *c);           /* c->mode changed */
void jit_forget_addresses(struct cpu *c, bool global_too); /* the softTLB was flushed */
void jit_forget_page(struct cpu *c, uint64_t lin); /* INVLPG */
struct jit_parked jit_park(const struct cpu *c); /* before the softTLB is flushed */
void jit_unpark(struct cpu *c, struct jit_parked p); /* after that */
bool jit_is_full(const struct cpu *c);
/* Around everything that runs host code: the host's GS base is ours meanwhile. */
uint64_t jit_borrow_gs(struct cpu *c);
void jit_return_gs(const struct cpu *c, uint64_t base);
#else
static inline void jit_init(struct cpu *c) { (void)c; }
static inline void jit_free(struct cpu *c) { (void)c; }
static inline void jit_new_block(struct cpu *c, struct block *b) { (void)c, (void)b; }
static inline void jit_kill(struct cpu *c, struct block *b) { (void)c, (void)b; }
static inline void jit_flush(struct cpu *c) { (void)c; }
static inline void jit_update_context(struct cpu *c) { (void)c; }
static inline void jit_forget_addresses(struct cpu *c, bool global_too) { (void)c, (void)global_too; }
static inline void jit_forget_page(struct cpu *c, uint64_t lin) { (void)c, (void)lin; }
static inline struct jit_parked jit_park(const struct cpu *c) { (void)c; return (struct jit_parked){0}; }
static inline void jit_unpark(struct cpu *c, struct jit_parked p) { (void)c, (void)p; }
static inline bool jit_is_full(const struct cpu *c) { (void)c; return false; }
static inline uint64_t jit_borrow_gs(struct cpu *c) { (void)c; return 0; }
static inline void jit_return_gs(const struct cpu *c, uint64_t base) { (void)c, (void)base; }
#endif

#endif
