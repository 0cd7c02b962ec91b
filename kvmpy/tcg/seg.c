/* SPDX-License-Identifier: Apache-2.0
 *
 * Segment registers and far transfers: MOV to a segment register, far JMP CALL RET, IRET, in all modes.
 *
 * References: SDM vol. 3A chapters 3.4, 5.8 (transfers between levels), 5.11 (pointers), 6.12-6.14 (returns). Every
 * function checks all it can before it changes anything, in the order of the manual's pseudo-code (vol. 2), and
 * stack reads of a return come before the commit, so a fault finds the machine as it was.
 *
 * Quirks: a return to an outer level nulls data segments the outer level may not have; IRET to 64-bit code always pops
 * SS:RSP; NULL SS is allowed in 64-bit mode below CPL 3; the hidden part of a segment loaded in real or vm86 mode has
 * base = selector * 16 and keeps (real) or gets (vm86) its limit and type.
 */
#include "op.h"

void set_cpl(struct cpu *c, unsigned cpl)
{
    c->cpl = (uint8_t)cpl;
    cpu_update_mode(c);
}

bool desc_fetch(struct cpu *c, const struct uop *u, uint16_t sel, uint64_t *desc)
{
    uint64_t base = c->gdt.base, limit = c->gdt.limit;
    if (sel & 4) {
        if (c->seg[SEG_LDT].attr & ATTR_UNUSABLE || !(c->seg[SEG_LDT].sel & 0xfffc))
            return false;
        base = c->seg[SEG_LDT].base;
        limit = c->seg[SEG_LDT].limit;
    }
    if ((uint64_t)(sel | 7) > limit)
        return false;
    *desc = sys_read(c, u, base + (sel & 0xfff8), 8);
    return true;
}

void desc_to_segment(uint16_t sel, uint64_t d, struct segment *s)
{
    s->sel = sel;
    s->base = (d >> 16 & 0xffffff) | (d >> 32 & 0xff000000);
    s->limit = (uint32_t)((d & 0xffff) | (d >> 32 & 0xf0000));
    s->attr = (uint32_t)(d >> 40) & 0xf0ff;
    if (s->attr & ATTR_G)
        s->limit = s->limit << 12 | 0xfff;
}

static void mark_accessed(struct cpu *c, const struct uop *u, uint16_t sel, struct segment *s)
{
    if (s->attr & 1)
        return;
    uint64_t base = sel & 4 ? c->seg[SEG_LDT].base : c->gdt.base;
    sys_write(c, u, base + (sel & 0xfff8) + 5, 1, (s->attr & 0xff) | 1);
    s->attr |= 1;
}

void seg_load_real(struct cpu *c, int seg, uint16_t sel)
{
    struct segment *s = &c->seg[seg];
    s->sel = sel;
    s->base = (uint64_t)sel << 4;
    if (c->sysflags & FL_VM) {
        s->limit = 0xffff;
        s->attr = 0xf3;
    } else {
        s->attr = (s->attr & ~(ATTR_UNUSABLE | 0x60u)) | ATTR_P | 0x13;
        if (seg == SEG_CS)
            s->attr = 0x9b | (s->attr & ATTR_DB);
    }
}

static void set_null(struct segment *s, uint16_t sel)
{
    s->sel = sel;
    s->base = 0;
    s->limit = 0;
    s->attr = ATTR_UNUSABLE;
}

/* Checks and fetches SS for `cpl`; vector: what its faults are (#GP for loads, #TS for stack switches). */
static struct segment fetch_ss(struct cpu *c, const struct uop *u, uint16_t sel, unsigned cpl, unsigned vector)
{
    struct segment s;
    uint64_t d;
    if (!(sel & 0xfffc))
        cpu_fault_code(c, u, vector, 0);
    if (!desc_fetch(c, u, sel, &d))
        cpu_fault_code(c, u, vector, sel & 0xfffc);
    desc_to_segment(sel, d, &s);
    if ((sel & 3u) != cpl || !(s.attr & ATTR_S) || (s.attr & 0xa) != 2 || seg_dpl(&s) != cpl)
        cpu_fault_code(c, u, vector, sel & 0xfffc);
    if (!(s.attr & ATTR_P))
        cpu_fault_code(c, u, EXC_SS, sel & 0xfffc);
    mark_accessed(c, u, sel, &s);
    return s;
}

void seg_load(struct cpu *c, const struct uop *u, int seg, uint16_t sel)
{
    if (real_or_vm86(c)) {
        seg_load_real(c, seg, sel);
        cpu_update_mode(c);
        return;
    }
    struct segment s;
    uint64_t d;
    if (!(sel & 0xfffc)) {
        if (seg == SEG_SS) {
            if (!code64(c) || c->cpl == 3 || (sel & 3) != c->cpl)
                cpu_fault_code(c, u, EXC_GP, 0);
            set_null(&c->seg[SEG_SS], sel);
            c->seg[SEG_SS].attr |= (uint32_t)c->cpl << ATTR_DPL_SHIFT;
        } else {
            set_null(&c->seg[seg], sel);
        }
        cpu_update_mode(c);
        return;
    }
    if (seg == SEG_SS) {
        s = fetch_ss(c, u, sel, c->cpl, EXC_GP);
    } else {
        if (!desc_fetch(c, u, sel, &d))
            cpu_fault_code(c, u, EXC_GP, sel & 0xfffc);
        desc_to_segment(sel, d, &s);
        bool code = s.attr & 8;
        if (!(s.attr & ATTR_S) || (code && !(s.attr & 2)))
            cpu_fault_code(c, u, EXC_GP, sel & 0xfffc);
        if ((!code || !(s.attr & 4)) && (seg_dpl(&s) < c->cpl || seg_dpl(&s) < (sel & 3u)))
            cpu_fault_code(c, u, EXC_GP, sel & 0xfffc);
        if (!(s.attr & ATTR_P))
            cpu_fault_code(c, u, EXC_NP, sel & 0xfffc);
        mark_accessed(c, u, sel, &s);
    }
    c->seg[seg] = s;
    cpu_update_mode(c);
}

/* [sp, sp+size) within the stack segment? */
void stack_check(struct cpu *c, const struct uop *u, uint64_t sp, unsigned size)
{
    const struct segment *s = &c->seg[SEG_SS];
    if (!seg_holds(s, sp & c->stack_mask, size))
        cpu_fault_code(c, u, EXC_SS, 0);
}

/* ---- code segments ---- */

static void check_rip(struct cpu *c, const struct uop *u, const struct segment *cs, uint64_t rip)
{
    if (long_mode(c) && (cs->attr & ATTR_L) ? !canonical(c, rip) : rip > cs->limit)
        cpu_fault_code(c, u, EXC_GP, 0);
}

/* A code segment for a direct far JMP or CALL. */
static struct segment fetch_cs(struct cpu *c, const struct uop *u, uint16_t sel, const struct segment *s0)
{
    struct segment s = *s0;
    bool conforming = s.attr & 4;
    if (!(s.attr & 8) || (conforming ? seg_dpl(&s) > c->cpl : (sel & 3u) > c->cpl || seg_dpl(&s) != c->cpl) ||
        (long_mode(c) && (s.attr & ATTR_L) && (s.attr & ATTR_DB)))
        cpu_fault_code(c, u, EXC_GP, sel & 0xfffc);
    if (!(s.attr & ATTR_P))
        cpu_fault_code(c, u, EXC_NP, sel & 0xfffc);
    return s;
}

static void load_cs(struct cpu *c, const struct uop *u, struct segment s, uint16_t sel, unsigned cpl)
{
    mark_accessed(c, u, sel, &s);
    s.sel = (uint16_t)((sel & 0xfffc) | cpl);
    c->seg[SEG_CS] = s;
    set_cpl(c, cpl);
}

static void fetch(struct cpu *c, const struct uop *u, uint16_t sel, struct segment *s)
{
    uint64_t d;
    if (!(sel & 0xfffc))
        cpu_fault_code(c, u, EXC_GP, 0);
    if (!desc_fetch(c, u, sel, &d))
        cpu_fault_code(c, u, EXC_GP, sel & 0xfffc);
    desc_to_segment(sel, d, s);
}

/* A stack under construction: pushes go to memory at once, SP is committed by the caller. */
struct stack { uint64_t base, sp, mask; int mmu; unsigned size; const struct segment *ss; bool check; };
static void stack_push(struct cpu *c, const struct uop *u, struct stack *k, uint64_t v)
{
    k->sp -= k->size;
    if (k->check && !seg_holds(k->ss, k->sp & k->mask, k->size))
        cpu_fault_code(c, u, EXC_SS, 0);
    mode_write(c, k->mmu, u, k->base + (k->sp & k->mask), k->size, v, 1);
}
static struct stack own_stack(const struct cpu *c, unsigned size)
{
    return (struct stack){.base = c->segbase[SEG_SS], .sp = c->gpr[RSP], .mask = c->stack_mask, .mmu = mmu_index(c), .size = size,
                          .ss = &c->seg[SEG_SS], .check = !code64(c)};
}
static void commit_sp(struct cpu *c, const struct stack *k) { c->gpr[RSP] = (c->gpr[RSP] & ~k->mask) | (k->sp & k->mask); }

static uint64_t trunc_to(uint64_t v, unsigned osize) { return osize == 16 ? (uint16_t)v : osize == 32 ? (uint32_t)v : v; }

struct gate { uint16_t sel; unsigned params, type, dpl; uint64_t off; };
static struct gate gate_of(struct cpu *c, const struct uop *u, uint16_t sel)
{
    uint64_t d = 0, hi;
    desc_fetch(c, u, sel, &d);
    struct gate g = {.sel = (uint16_t)(d >> 16), .params = d >> 32 & 31, .type = d >> 40 & 15, .dpl = d >> 45 & 3,
                     .off = (d & 0xffff) | (d >> 32 & 0xffff0000)};
    if (long_mode(c)) {
        if (!desc_fetch(c, u, (uint16_t)(sel + 8), &hi) || (hi >> 40 & 31))
            cpu_fault_code(c, u, EXC_GP, sel & 0xfffc);
        g.off |= hi << 32;
    } else if (g.type == 4) {
        g.off &= 0xffff;
    }
    return g;
}

/* New stack pointer for `cpl` from the TSS. */
void tss_stack(struct cpu *c, const struct uop *u, unsigned cpl, uint16_t *ss, uint64_t *sp)
{
    const struct segment *tr = &c->seg[SEG_TR];
    bool wide = (tr->attr & 15) == 11 || (tr->attr & 15) == 9;
    unsigned off = long_mode(c) ? 4 + 8 * cpl : wide ? 4 + 8 * cpl : 2 + 4 * cpl, need = long_mode(c) ? 8 : wide ? 6 : 4;
    if (off + need - 1 > tr->limit)
        cpu_fault_code(c, u, EXC_TS, tr->sel & 0xfffc);
    *ss = 0;
    if (long_mode(c)) {
        *sp = sys_read(c, u, tr->base + off, 8);
    } else if (wide) {
        *sp = sys_read(c, u, tr->base + off, 4);
        *ss = (uint16_t)sys_read(c, u, tr->base + off + 4, 2);
    } else {
        *sp = sys_read(c, u, tr->base + off, 2);
        *ss = (uint16_t)sys_read(c, u, tr->base + off + 2, 2);
    }
}

static void through_gate(struct cpu *c, const struct uop *u, uint16_t sel, bool call)
{
    struct gate g = gate_of(c, u, sel);
    struct segment s;
    fetch(c, u, g.sel, &s);
    if (!(s.attr & ATTR_S) || !(s.attr & 8) || seg_dpl(&s) > c->cpl || (long_mode(c) && (!(s.attr & ATTR_L) || (s.attr & ATTR_DB))))
        cpu_fault_code(c, u, EXC_GP, g.sel & 0xfffc);
    if (!(s.attr & ATTR_P))
        cpu_fault_code(c, u, EXC_NP, g.sel & 0xfffc);
    bool conforming = s.attr & 4, inner = call && !conforming && seg_dpl(&s) < c->cpl;
    if (!call && !conforming && seg_dpl(&s) != c->cpl)
        cpu_fault_code(c, u, EXC_GP, g.sel & 0xfffc);
    unsigned size = long_mode(c) ? 8 : g.type == 12 ? 4 : 2;
    check_rip(c, u, &s, g.off);
    uint64_t after = RIP_AFTER(c, u);
    if (!call) {
        load_cs(c, u, s, g.sel, c->cpl);
    } else if (!inner) {
        struct stack k = own_stack(c, size);
        stack_push(c, u, &k, c->seg[SEG_CS].sel);
        stack_push(c, u, &k, after);
        load_cs(c, u, s, g.sel, c->cpl);
        commit_sp(c, &k);
    } else {
        unsigned cpl = seg_dpl(&s);
        uint16_t new_ss;
        uint64_t new_sp, old_sp = c->gpr[RSP], params[31];
        tss_stack(c, u, cpl, &new_ss, &new_sp);
        struct segment ss = {.attr = ATTR_UNUSABLE | cpl << ATTR_DPL_SHIFT, .sel = (uint16_t)cpl};
        struct stack k = {.sp = new_sp, .mask = ~0ull, .mmu = MMU_KERNEL, .size = size, .ss = &ss};
        if (!long_mode(c)) {
            ss = fetch_ss(c, u, new_ss, cpl, EXC_TS);
            k.base = ss.base;
            k.mask = ss.attr & ATTR_DB ? 0xffffffff : 0xffff;
            k.check = true;
            for (unsigned i = 0; i < g.params; i++)
                params[i] = size == 4 ? ldstk32(c, u, stack_lin(c, old_sp + 4 * i)) : ldstk16(c, u, stack_lin(c, old_sp + 2 * i));
        } else {
            g.params = 0;
        }
        stack_push(c, u, &k, c->seg[SEG_SS].sel);
        stack_push(c, u, &k, old_sp);
        for (unsigned i = g.params; i--;)
            stack_push(c, u, &k, params[i]);
        stack_push(c, u, &k, c->seg[SEG_CS].sel);
        stack_push(c, u, &k, after);
        c->seg[SEG_SS] = ss;
        load_cs(c, u, s, g.sel, cpl);
        commit_sp(c, &k);
    }
    c->rip = g.off;
}

static void far_transfer(struct cpu *c, const struct uop *u, uint16_t sel, uint64_t off, unsigned osize, bool call)
{
    off = trunc_to(off, osize);
    uint64_t after = RIP_AFTER(c, u);
    if (real_or_vm86(c)) {
        if (off > 0xffff && off > c->seg[SEG_CS].limit)
            cpu_fault_code(c, u, EXC_GP, 0);
        if (call) {
            struct stack k = own_stack(c, osize / 8);
            stack_push(c, u, &k, c->seg[SEG_CS].sel);
            stack_push(c, u, &k, after);
            commit_sp(c, &k);
        }
        seg_load_real(c, SEG_CS, sel);
        cpu_update_mode(c);
        c->rip = off;
        return;
    }
    struct segment s;
    fetch(c, u, sel, &s);
    if (s.attr & ATTR_S) {
        s = fetch_cs(c, u, sel, &s);
        check_rip(c, u, &s, off);
        struct stack k = own_stack(c, osize / 8);
        if (call) {
            stack_push(c, u, &k, c->seg[SEG_CS].sel);
            stack_push(c, u, &k, after);
        }
        load_cs(c, u, s, sel, c->cpl);
        if (call)
            commit_sp(c, &k);
        c->rip = off;
        return;
    }
    unsigned type = s.attr & 15;
    if (long_mode(c) && type != 12)
        cpu_fault_code(c, u, EXC_GP, sel & 0xfffc);
    if (type != 1 && type != 9 && type != 4 && type != 5 && type != 12)
        cpu_fault_code(c, u, EXC_GP, sel & 0xfffc);
    if (seg_dpl(&s) < c->cpl || seg_dpl(&s) < (sel & 3u))
        cpu_fault_code(c, u, EXC_GP, sel & 0xfffc);
    if (!(s.attr & ATTR_P))
        cpu_fault_code(c, u, EXC_NP, sel & 0xfffc);
    if (type == 12 || type == 4) {
        through_gate(c, u, sel, call);
        return;
    }
    if (type == 5) {
        uint64_t d = 0;
        desc_fetch(c, u, sel, &d);
        sel = (uint16_t)(d >> 16);
    }
    task_switch(c, u, sel, call ? TASK_CALL : TASK_JMP, after, false, 0);
}
void far_jump(struct cpu *c, const struct uop *u, uint16_t sel, uint64_t off, unsigned osize) { far_transfer(c, u, sel, off, osize, false); }
void far_call(struct cpu *c, const struct uop *u, uint16_t sel, uint64_t off, unsigned osize) { far_transfer(c, u, sel, off, osize, true); }

/* After a return to an outer level: data segments that level may not use become null, and a null selector 0 (SDM vol. 2,
 * IRET); bases of null FS and GS stay. */
void load_null_if_weaker(struct cpu *c)
{
    static const int list[] = {SEG_ES, SEG_DS, SEG_FS, SEG_GS};
    for (unsigned i = 0; i < 4; i++) {
        struct segment *s = &c->seg[list[i]];
        if (s->sel < 4)
            s->sel = 0;
        if (!(s->attr & ATTR_UNUSABLE) && (!(s->attr & 8) || !(s->attr & 4)) && seg_dpl(s) < c->cpl) {
            uint64_t base = s->base;
            set_null(s, 0);
            if (list[i] >= SEG_FS && long_mode(c))
                s->base = base;
        }
    }
    cpu_update_mode(c);
}

static uint64_t pop_at(struct cpu *c, const struct uop *u, uint64_t *sp, unsigned osize)
{
    uint64_t lin = stack_lin(c, *sp);
    if (c->mode & MODE_SEGS && !code64(c))
        stack_check(c, u, *sp, osize / 8);
    *sp += osize / 8;
    return osize == 16 ? ldstk16(c, u, lin) : osize == 32 ? ldstk32(c, u, lin) : ldstk64(c, u, lin);
}

/* Common end of far RET and IRET in protected mode: CS and, to an outer level, SS. */
static void return_to(struct cpu *c, const struct uop *u, uint16_t sel, uint64_t rip, uint64_t sp, unsigned osize, unsigned pop, bool iret64)
{
    struct segment s;
    fetch(c, u, sel, &s);
    unsigned rpl = sel & 3;
    if (!(s.attr & ATTR_S) || !(s.attr & 8) || rpl < c->cpl || ((s.attr & 4) ? seg_dpl(&s) > rpl : seg_dpl(&s) != rpl) ||
        (long_mode(c) && (s.attr & ATTR_L) && (s.attr & ATTR_DB)))
        cpu_fault_code(c, u, EXC_GP, sel & 0xfffc);
    if (!(s.attr & ATTR_P))
        cpu_fault_code(c, u, EXC_NP, sel & 0xfffc);
    bool to64 = long_mode(c) && (s.attr & ATTR_L);
    if (rpl == c->cpl && !iret64) {
        check_rip(c, u, &s, rip);
        load_cs(c, u, s, sel, rpl);
        set_sp(c, sp + pop);
    } else {
        sp += pop;
        uint64_t new_sp = pop_at(c, u, &sp, osize);
        uint16_t new_ss = (uint16_t)pop_at(c, u, &sp, osize);
        struct segment ss = {.attr = ATTR_UNUSABLE | rpl << ATTR_DPL_SHIFT, .sel = new_ss};
        if (!(new_ss & 0xfffc)) {
            if (!to64 || rpl == 3 || (new_ss & 3u) != rpl)
                cpu_fault_code(c, u, EXC_GP, 0);
        } else {
            ss = fetch_ss(c, u, new_ss, rpl, EXC_GP);
        }
        check_rip(c, u, &s, rip);
        bool outer = rpl != c->cpl;
        c->seg[SEG_SS] = ss;
        load_cs(c, u, s, sel, rpl);
        uint64_t mask = c->stack_mask;
        c->gpr[RSP] = mask == 0xffff ? (c->gpr[RSP] & ~mask) | ((new_sp + pop) & mask) : (new_sp + pop) & mask;
        if (outer)
            load_null_if_weaker(c);
    }
    c->rip = to64 ? rip : (uint32_t)rip;
}

void far_return(struct cpu *c, const struct uop *u, unsigned osize, unsigned pop)
{
    uint64_t sp = c->gpr[RSP], rip = pop_at(c, u, &sp, osize);
    uint16_t sel = (uint16_t)pop_at(c, u, &sp, osize);
    if (real_or_vm86(c)) {
        if (rip > c->seg[SEG_CS].limit)
            cpu_fault_code(c, u, EXC_GP, 0);
        seg_load_real(c, SEG_CS, sel);
        cpu_update_mode(c);
        set_sp(c, sp + pop);
        c->rip = rip;
        return;
    }
    return_to(c, u, sel, rip, sp, osize, pop, false);
}

static void unmask_nmi(struct cpu *c)
{
    c->nmi_masked = false;
    cpu_irq_enabled(c); /* one may have waited */
}

void set_virtual_flags(struct cpu *c, const struct uop *u, uint16_t flags)
{
    if (flags & FL_TF || (flags & FL_IF && c->sysflags & FL_VIP))
        cpu_fault_code(c, u, EXC_GP, 0);
    uint64_t may = FL_ARITH | FL_DF | FL_NT | FL_TF | FL_VIF, v = flags | (flags & FL_IF ? FL_VIF : 0);
    cpu_set_rflags(c, (cpu_rflags(c) & ~may & ~(uint64_t)FL_RF) | (v & may));
}

void iret(struct cpu *c, const struct uop *u, unsigned osize)
{
    uint64_t may = FL_ARITH | FL_TF | FL_DF | FL_NT | FL_RF | FL_AC | FL_ID;
    unsigned iopl = c->sysflags >> 12 & 3;
    if (protected_mode(c) && (c->sysflags & FL_NT)) {
        if (long_mode(c))
            cpu_fault_code(c, u, EXC_GP, 0);
        uint16_t back = (uint16_t)sys_read(c, u, c->seg[SEG_TR].base, 2);
        task_switch(c, u, back, TASK_IRET, RIP_AFTER(c, u), false, 0);
        return;
    }
    bool virtual = (c->sysflags & FL_VM) && iopl < 3;
    if (virtual && (osize != 16 || !virtual_if(c)))
        cpu_fault_code(c, u, EXC_GP, 0);
    uint64_t sp = c->gpr[RSP], rip = pop_at(c, u, &sp, osize);
    uint16_t sel = (uint16_t)pop_at(c, u, &sp, osize);
    uint64_t flags = pop_at(c, u, &sp, osize);
    if (real_or_vm86(c)) {
        if (rip > c->seg[SEG_CS].limit)
            cpu_fault_code(c, u, EXC_GP, 0);
        if (virtual) {
            set_virtual_flags(c, u, (uint16_t)flags);
            seg_load_real(c, SEG_CS, sel);
            set_sp(c, sp);
            c->rip = rip;
            unmask_nmi(c);
            cpu_update_mode(c);
            return;
        }
        may |= FL_IF | (c->sysflags & FL_VM ? 0 : FL_IOPL);
        if (osize == 16)
            may &= 0xffff;
        seg_load_real(c, SEG_CS, sel);
        set_sp(c, sp);
        c->rip = rip;
        unmask_nmi(c);
        cpu_set_rflags(c, (cpu_rflags(c) & ~may) | (flags & may));
        cpu_rf_loaded(c);
        cpu_update_mode(c);
        return;
    }
    if ((flags & FL_VM) && c->cpl == 0 && osize == 32 && !long_mode(c)) { /* to virtual-8086 */
        uint64_t new_sp = pop_at(c, u, &sp, 32);
        uint16_t sels[6];
        static const int order[] = {SEG_SS, SEG_ES, SEG_DS, SEG_FS, SEG_GS};
        for (unsigned i = 0; i < 5; i++)
            sels[i] = (uint16_t)pop_at(c, u, &sp, 32);
        unmask_nmi(c);
        c->cpl = 3;
        cpu_set_rflags(c, flags & 0x3f7fd7);
        cpu_rf_loaded(c);
        for (unsigned i = 0; i < 5; i++)
            seg_load_real(c, order[i], sels[i]);
        seg_load_real(c, SEG_CS, sel);
        c->gpr[RSP] = new_sp & 0xffffffff;
        c->rip = rip & 0xffff;
        set_cpl(c, 3);
        return;
    }
    if (c->cpl <= iopl)
        may |= FL_IF;
    if (c->cpl == 0)
        may |= FL_IOPL | FL_VIF | FL_VIP;
    if (osize == 16)
        may &= 0xffff;
    return_to(c, u, sel, rip, sp, osize, 0, code64(c));
    unmask_nmi(c);
    cpu_set_rflags(c, (cpu_rflags(c) & ~may) | (flags & may));
    cpu_rf_loaded(c);
}
