/* SPDX-License-Identifier: Apache-2.0
 *
 * For the x87 handlers: the register stack, flags, and how one instruction runs on the host's x87.
 *
 * Values are 80 bits in c->fpu.r[]; stack and tags are kept here in C (the host's stack is empty between handlers), so
 * stack overflow and underflow are decided before the host sees the operands. Then the host computes under the guest's
 * control word and its status word tells what happened: rounding direction (C1), flags, and with an exception that the
 * guest has not masked ES, as it would have been for the guest. Invalid, denormal and divide exceptions that are not
 * masked leave everything as it was; the others deliver their result first (SDM vol. 1, 8.7). The host's exception is
 * cleared before its next waiting instruction; the guest gets its #MF at the guest's next waiting instruction.
 *
 * FIP and FDP follow every instruction that is not a control instruction; FOP is kept for unmasked exceptions only, as
 * on processors since the Pentium 4. With CR0.NE clear a pending exception would assert FERR#: no such wire exists
 * here, and the instruction goes on as with IGNNE# asserted.
 */
#ifndef KVMPY_TCG_X87_H
#define KVMPY_TCG_X87_H

#include "fphost.h"
#include "op.h"

enum { SW_IE = 1, SW_DE = 2, SW_ZE = 4, SW_OE = 8, SW_UE = 16, SW_PE = 32, SW_SF = 64, SW_ES = 128, SW_C0 = 0x100, SW_C1 = 0x200,
       SW_C2 = 0x400, SW_C3 = 0x4000, SW_B = 0x8000 };
#define SW_CC (SW_C0 | SW_C1 | SW_C2 | SW_C3)

typedef __typeof__(((struct cpu *)0)->fpu.r[0]) x87_reg;
#define ST(i) (&c->fpu.r[(c->fpu.top + (i)) & 7])
#define X80(p) "m"(*(const uint8_t (*)[10])(p))
#define X80_OUT(p) "=m"(*(uint8_t (*)[10])(p))

static inline bool x87_empty(const struct cpu *c, unsigned i) { return !(c->fpu.valid >> ((c->fpu.top + i) & 7) & 1); }
static inline void x87_mark(struct cpu *c, unsigned i) { c->fpu.valid |= (uint8_t)(1 << ((c->fpu.top + i) & 7)); }
static inline void x87_free(struct cpu *c, unsigned i) { c->fpu.valid &= (uint8_t) ~(1 << ((c->fpu.top + i) & 7)); }
static inline void x87_pop(struct cpu *c)
{
    x87_free(c, 0);
    c->fpu.top = (c->fpu.top + 1) & 7;
}
static inline void x87_set(struct cpu *c, unsigned i, const x87_reg *v)
{
    *ST(i) = *v;
    x87_mark(c, i);
}
extern const x87_reg x87_indefinite;

/* Start of a waiting instruction. */
static inline void x87_wait(struct cpu *c, const struct uop *u)
{
    if (unlikely(c->fpu.sw & SW_ES) && (c->cr0 & CR0_NE))
        cpu_fault(c, u, EXC_MF);
}
/* After the last possible fault of an instruction that is not a control instruction. */
static inline void x87_pointers(struct cpu *c, const struct uop *u)
{
    c->fpu.fip = RIP_OF(c, u);
    c->fpu.fcs = c->seg[SEG_CS].sel;
}
static inline void x87_data_pointer(struct cpu *c, const struct uop *u)
{
    c->fpu.fdp = ea_offset(c, u);
    c->fpu.fds = c->seg[u->seg].sel;
}
/* ES and B from flags and masks. */
static inline void x87_summary(struct cpu *c)
{
    c->fpu.sw &= (uint16_t) ~(SW_ES | SW_B);
    if (c->fpu.sw & ~c->fpu.cw & 0x3f)
        c->fpu.sw |= SW_ES | SW_B;
}
/* Takes over the flags and `codes` from a status word. False: an unmasked exception keeps the operands, and then the
 * codes too: the host's would be of an earlier instruction. */
static inline bool x87_status(struct cpu *c, const struct uop *u, uint16_t host, uint16_t codes)
{
    bool kept = unlikely(host & SW_ES) && host & ~c->fpu.cw & (SW_IE | SW_DE | SW_ZE);
    if (unlikely(kept))
        codes = 0;
    c->fpu.sw = (uint16_t)((c->fpu.sw & ~codes) | (host & (0x3f | codes)));
    if (likely(!(host & SW_ES)))
        return true;
    c->fpu.sw |= SW_ES | SW_B;
    c->fpu.fop = u->imm & 0x7ff;
    return !kept;
}
/* Stack fault. `over`: C1. True: masked, the caller goes on with the indefinite value. */
static inline bool x87_stack_fault(struct cpu *c, const struct uop *u, bool over)
{
    c->fpu.sw = (uint16_t)((c->fpu.sw & ~SW_C1) | SW_IE | SW_SF | (over ? SW_C1 : 0));
    if (c->fpu.cw & SW_IE)
        return true;
    c->fpu.sw |= SW_ES | SW_B;
    c->fpu.fop = u->imm & 0x7ff;
    return false;
}
static inline void x87_push(struct cpu *c, const struct uop *u, const x87_reg *v)
{
    if (unlikely(!x87_empty(c, 7))) {
        if (!x87_stack_fault(c, u, true))
            return;
        v = &x87_indefinite;
    }
    x87_reg t = *v; /* may be a register that the new top replaces */
    c->fpu.top = (c->fpu.top + 7) & 7;
    x87_set(c, 0, &t);
}

/* Stores that must fault before the flags change: a check, then the write. Both are one TLB probe for plain memory. */
static inline void x87_check_write(struct cpu *c, const struct uop *u, uint64_t lin, unsigned size)
{
    if (unlikely(!tlb_write(c, lin, size)))
        mem_check_write(c, u, lin, size, 0);
}
static inline void x87_write(struct cpu *c, const struct uop *u, uint64_t lin, const void *v, unsigned size)
{
    uint8_t *p = tlb_write(c, lin, size);
    if (likely(p))
        memcpy(p, v, size);
    else
        mem_write_bytes(c, u, lin, v, size);
}

struct x87_image { /* FNSAVE, 32-bit protected-mode form, which 64-bit code gets too */
    uint16_t cw, pad0, sw, pad1, tags, pad2;
    uint32_t pointers[4];
    uint8_t st[8][10];
};
_Static_assert(sizeof(struct x87_image) == 108, "FNSAVE writes 108 bytes");

/* The end of every asm below: status to AX, and no exception may stay pending on the host. */
#define X87_END "fnstsw %%ax\n\ttest $0x80, %%al\n\tjz 1f\n\tfnclex\n1:\n\t"
#define X87_CLOBBER "cc", "st", "st(1)", "st(2)"

#endif
