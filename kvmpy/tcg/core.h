/* SPDX-License-Identifier: Apache-2.0
 *
 * What the core's files share among themselves (the machine half does not need it).
 */
#ifndef KVMPY_TCG_CORE_H
#define KVMPY_TCG_CORE_H

#include "decode.h"
#include "flags.h"
#include "mem.h"

enum { ESCAPE_FAULT = 1, ESCAPE_STOP, ESCAPE_RESUME };

/* block.c */
struct block *block_find(struct cpu *c, uint32_t mode); /* for c->rip; may fault */
struct block *block_peek(struct cpu *c);
struct block *block_at(struct cpu *c, uint64_t lin); /* any that is there, without side effects */
struct block *block_known(struct cpu *c, const uint8_t *host, uint32_t mode); /* the same by its first byte */
const uint8_t *block_second(const struct block *b); /* b->crosses: the second page in host memory */
void block_connect(struct cpu *c, struct link *link, struct block *to);
bool block_init(struct cpu *c);
void block_free(struct cpu *c);
void block_drain(struct cpu *c); /* what others posted to c->inval */
bool block_monitor(struct cpu *c, uint64_t gpa); /* arms c->monitor */
void block_page_is_written(struct cpu *c, uint64_t gpa, unsigned size, const struct page_info *page);

/* paging.c, tlb.c, mmu.c (mmu.h is what they share) */
enum access { ACCESS_READ, ACCESS_WRITE, ACCESS_EXEC };
/* Host address of a byte for code fetch; fills the TLB; faults. NULL: not memory. */
uint8_t *mmu_fetch(struct cpu *c, uint64_t lin, uint64_t *gpa);
void mmu_protect_code(struct cpu *c, uint64_t gpa); /* drop write entries of this page */
void mmu_flush_local(struct cpu *c);
void mmu_invlpg(struct cpu *c, uint64_t lin);
/* pcid.c: MOV CR3 from one PCID to another; keep_to: bit 63 was set. forget: the softTLB itself is not touched. */
void pcid_switch(struct cpu *c, unsigned from, unsigned to, bool keep_to);
void pcid_forget(struct cpu *c, unsigned pcid);
void pcid_forget_all(struct cpu *c);
void pcid_free(struct cpu *c);
bool mmu_load_pdptes(struct cpu *c, uint64_t cr3);
void watch_port(struct cpu *c, uint16_t port, unsigned size);
/* Implicit supervisor accesses: descriptor tables, TSS, IDT. u may be NULL. */
uint64_t sys_read(struct cpu *c, const struct uop *u, uint64_t lin, unsigned size);
void sys_write(struct cpu *c, const struct uop *u, uint64_t lin, unsigned size, uint64_t value);
void sys_check_write(struct cpu *c, const struct uop *u, uint64_t lin, unsigned size);
/* Data access through one of the MMU_* modes, for stack pushes at another CPL. */
uint64_t mode_read(struct cpu *c, int mmu, const struct uop *u, uint64_t lin, unsigned size, int stack);
void mode_write(struct cpu *c, int mmu, const struct uop *u, uint64_t lin, unsigned size, uint64_t value, int stack);
static inline bool canonical(const struct cpu *c, uint64_t a)
{
    unsigned s = c->cr4 & CR4_LA57 ? 7 : 16;
    return (uint64_t)((int64_t)(a << s) >> s) == a;
}
static inline bool feature(const struct cpu *c, unsigned f) { return c->features[f / 64] >> (f % 64) & 1; }

/* ea.c */
int mmu_index(const struct cpu *c); /* the MMU_* mode of data accesses now */
bool seg_holds(const struct segment *s, uint64_t off, uint64_t size); /* [off, off + size) within its limit? */
bool seg_can(const struct cpu *c, int seg, uint64_t off, uint64_t size, bool write); /* and may it be accessed so? */
/* Linear address outside 64-bit mode, after the checks; faults. */
uint64_t seg_linear(struct cpu *c, const struct uop *u, int seg, uint64_t off, unsigned size, bool write);

/* io.c: user space answers */
uint64_t dev_read(struct cpu *c, const struct uop *u, enum cpu_io_kind kind, uint64_t addr, unsigned size);
void dev_write(struct cpu *c, const struct uop *u, enum cpu_io_kind kind, uint64_t addr, unsigned size, uint64_t value);
/* REP INS (into `items`) and OUTS: at least 2 and up to `count` items in one exit. Returns 1: the engine took one. */
uint32_t dev_items(struct cpu *c, const struct uop *u, enum cpu_io_kind kind, uint16_t port, unsigned size, uint32_t count, uint8_t *items);
/* How many items the answer holds that this instruction runs again for (INS: in c->io.data); 0: there is none. */
uint32_t dev_items_answered(struct cpu *c, enum cpu_io_kind kind, uint16_t port, unsigned size, uint64_t most);

int io_msr(struct cpu *c, const struct uop *u, bool write, uint32_t index, uint64_t *value);
void io_answered(struct cpu *c);

/* interp.c */
_Noreturn void cpu_stop(struct cpu *c, const struct uop *u, enum tcg_stop stop); /* RIP stays at the instruction */
_Noreturn void cpu_fault_full(struct cpu *c, const struct uop *u, unsigned vector, bool has_error, uint32_t code);
void cpu_update_mode(struct cpu *c); /* mode, masks and TLB pointers from CPL, segments, CR, EFER, AC */
void cpu_irq_enabled(struct cpu *c); /* IF became 1 */
/* The guest loaded RFLAGS with RF: it holds for one instruction, and matters only where code breakpoints are armed. */
static inline void cpu_rf_loaded(struct cpu *c)
{
    if (unlikely(c->dr[7] & 0xff))
        cpu_request(c, CPU_REQ_STEP);
    else
        c->sysflags &= ~(uint32_t)FL_RF;
}

/* The block ends before `next`: it and what follows do not count as executed. Time is counted in instructions in
 * deterministic mode, so it must not depend on when somebody asked for a stop. Host code counts otherwise: its micro-ops
 * are not in c->block. */
static inline void give_back_budget(struct cpu *c, const struct uop *next)
{
    if (!c->block || next < c->block->uops || next >= c->block->uops + c->block->nuop)
        return;
    int64_t done = 0;
    for (const struct uop *u = c->block->uops; u < next; u++)
        done += u->len != 0; /* prefix micro-ops are no instructions */
    if (done < c->block->ninsn)
        c->budget += c->block->ninsn - done;
}

/* excp.c */
void deliver_exception(struct cpu *c); /* c->exc at c->rip */
void deliver_interrupt(struct cpu *c, unsigned vector, bool soft, bool nmi);
void soft_interrupt(struct cpu *c, const struct uop *u, unsigned vector, int kind); /* INT n, INT3, INTO, INT1 */
enum { SOFT_INT, SOFT_INT3, SOFT_INTO, SOFT_INT1 };

/* seg.c */
static inline unsigned seg_dpl(const struct segment *s) { return s->attr >> ATTR_DPL_SHIFT & 3; }
bool desc_fetch(struct cpu *c, const struct uop *u, uint16_t sel, uint64_t *desc); /* false: outside the table */
void desc_to_segment(uint16_t sel, uint64_t desc, struct segment *s);
void seg_load(struct cpu *c, const struct uop *u, int seg, uint16_t sel); /* MOV/POP to a segment register, all modes */
void seg_load_real(struct cpu *c, int seg, uint16_t sel);
void far_jump(struct cpu *c, const struct uop *u, uint16_t sel, uint64_t off, unsigned osize);
void far_call(struct cpu *c, const struct uop *u, uint16_t sel, uint64_t off, unsigned osize);
void far_return(struct cpu *c, const struct uop *u, unsigned osize, unsigned pop);
void iret(struct cpu *c, const struct uop *u, unsigned osize);
void task_switch(struct cpu *c, const struct uop *u, uint16_t sel, int why, uint64_t next_rip, bool has_error, uint32_t error);
enum { TASK_JMP, TASK_CALL, TASK_IRET, TASK_INT };
void set_cpl(struct cpu *c, unsigned cpl);
void load_null_if_weaker(struct cpu *c);

static inline bool long_mode(const struct cpu *c) { return c->efer & EFER_LMA; }
static inline bool code64(const struct cpu *c) { return c->mode & MODE_CODE64; }
static inline bool real_or_vm86(const struct cpu *c) { return !(c->cr0 & CR0_PE) || (c->sysflags & FL_VM); }
static inline bool protected_mode(const struct cpu *c) { return !real_or_vm86(c); }

/* At this CPL and IOPL the guest has VIF in place of IF: virtual-8086 mode with CR4.VME, ring 3 with CR4.PVI (SDM vol. 3B 20.3, 20.4). */
static inline bool virtual_if(const struct cpu *c)
{
    return c->cpl == 3 && (c->sysflags >> 12 & 3) < 3 && c->cr4 & (c->sysflags & FL_VM ? CR4_VME : CR4_PVI);
}
/* FLAGS as a virtual-8086 program with VIF sees them, and what it may do to them (POPF, IRET). */
static inline uint16_t virtual_flags(const struct cpu *c, uint64_t flags)
{
    return (uint16_t)((flags & ~(uint64_t)FL_IF) | FL_IOPL | (c->sysflags & FL_VIF ? FL_IF : 0));
}
void set_virtual_flags(struct cpu *c, const struct uop *u, uint16_t flags); /* after the last check but its own */

/* Stack by SS.B and mode: address of [SS:sp]. */
static inline uint64_t stack_lin(const struct cpu *c, uint64_t sp) { return c->segbase[SEG_SS] + (sp & c->stack_mask); }
static inline void set_sp(struct cpu *c, uint64_t sp) { c->gpr[RSP] = (c->gpr[RSP] & ~c->stack_mask) | (sp & c->stack_mask); }
void stack_check(struct cpu *c, const struct uop *u, uint64_t sp, unsigned size); /* SS limit */

/* Going on at another block: every terminator ends in one of these. */
#define CONTINUE_AT(newrip) do { c->rip = (newrip); LEAVE; } while (0)

#endif
