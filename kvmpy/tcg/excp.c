/* SPDX-License-Identifier: Apache-2.0
 *
 * Delivery of exceptions and interrupts: real mode, protected mode with 16- and 32-bit gates and task gates, 64-bit
 * mode with IST; double and triple fault. SDM vol. 3A chapter 6; vol. 2 INT n.
 *
 * Delivery itself reads descriptors and pushes, so it can fault. It changes registers only at its end; a fault inside
 * comes back to cpu_run() by longjmp, which calls deliver_exception() again, and in_delivery then says that the two
 * combine (table 6-5): contributory on contributory, or either on a page fault, is #DF; a fault while #DF is delivered
 * is shutdown.
 */
#include "op.h"

#include <linux/kvm.h>

void tss_stack(struct cpu *c, const struct uop *u, unsigned cpl, uint16_t *ss, uint64_t *sp);

struct event {
    unsigned vector;
    bool soft;       /* INT n, INT3, INTO: the gate's DPL counts */
    bool external;   /* interrupt or NMI */
    bool has_error;
    uint32_t error;
    uint64_t rip;    /* to return to */
    uint64_t flags;  /* image to push */
};

static bool contributory(unsigned v) { return v == EXC_DE || (v >= EXC_TS && v <= EXC_GP) || v == EXC_CP; }

static void real_mode(struct cpu *c, const struct event *e)
{
    if (e->vector * 4 + 3 > c->idt.limit)
        cpu_fault_full(c, NULL, EXC_GP, false, 0);
    uint32_t target = (uint32_t)sys_read(c, NULL, c->idt.base + e->vector * 4, 4);
    uint64_t sp = c->gpr[RSP], values[3] = {e->flags, c->seg[SEG_CS].sel, e->rip};
    for (unsigned i = 0; i < 3; i++) {
        sp -= 2;
        mode_write(c, MMU_KERNEL, NULL, stack_lin(c, sp), 2, values[i] & 0xffff, 1);
    }
    set_sp(c, sp);
    seg_load_real(c, SEG_CS, (uint16_t)(target >> 16));
    c->rip = target & 0xffff;
    cpu_set_rflags(c, cpu_rflags(c) & ~(uint64_t)(FL_IF | FL_TF | FL_AC | FL_RF));
    cpu_update_mode(c);
}

static void push(struct cpu *c, uint64_t base, uint64_t *sp, uint64_t mask, unsigned size, uint64_t v, int mmu)
{
    *sp -= size;
    mode_write(c, mmu, NULL, base + (*sp & mask), size, v, 1);
}

static void protected_or_long(struct cpu *c, const struct event *e)
{
    bool lm = long_mode(c);
    unsigned ext = e->soft ? 0 : 1, code = e->vector * 8 + 2 + ext;
    unsigned entry = lm ? 16 : 8;
    if (e->vector * entry + entry - 1 > c->idt.limit)
        cpu_fault_code(c, NULL, EXC_GP, code);
    uint64_t gate = sys_read(c, NULL, c->idt.base + e->vector * entry, 8), high = 0;
    if (lm)
        high = sys_read(c, NULL, c->idt.base + e->vector * entry + 8, 8);
    unsigned type = gate >> 40 & 31, dpl = gate >> 45 & 3;
    uint16_t sel = (uint16_t)(gate >> 16);
    uint64_t off = (gate & 0xffff) | (gate >> 32 & 0xffff0000) | high << 32;
    if (type != 14 && type != 15 && (lm || (type != 5 && type != 6 && type != 7)))
        cpu_fault_code(c, NULL, EXC_GP, code);
    if (e->soft && dpl < c->cpl)
        cpu_fault_code(c, NULL, EXC_GP, code);
    if (!(gate >> 47 & 1))
        cpu_fault_code(c, NULL, EXC_NP, code);
    if (type == 5) {
        task_switch(c, NULL, sel, TASK_INT, e->rip, e->has_error, e->error);
        return;
    }
    if (type < 8)
        off &= 0xffff;
    if (!(sel & 0xfffc))
        cpu_fault_code(c, NULL, EXC_GP, ext);
    uint64_t desc;
    struct segment cs;
    if (!desc_fetch(c, NULL, sel, &desc))
        cpu_fault_code(c, NULL, EXC_GP, (sel & 0xfffcu) | ext);
    desc_to_segment(sel, desc, &cs);
    if (!(cs.attr & ATTR_S) || !(cs.attr & 8) || seg_dpl(&cs) > c->cpl || (lm && (!(cs.attr & ATTR_L) || (cs.attr & ATTR_DB))))
        cpu_fault_code(c, NULL, EXC_GP, (sel & 0xfffcu) | ext);
    if (!(cs.attr & ATTR_P))
        cpu_fault_code(c, NULL, EXC_NP, (sel & 0xfffcu) | ext);
    bool vm86 = c->sysflags & FL_VM;
    unsigned cpl = cs.attr & 4 ? c->cpl : seg_dpl(&cs);
    if (vm86 && cpl != 0)
        cpu_fault_code(c, NULL, EXC_GP, (sel & 0xfffcu) | ext);
    unsigned size = lm ? 8 : type >= 8 ? 4 : 2;
    unsigned ist = lm ? gate >> 32 & 7 : 0;
    bool change = cpl < c->cpl || vm86;
    uint64_t sp = c->gpr[RSP], old_sp = sp, base = c->segbase[SEG_SS], mask = c->stack_mask;
    struct segment ss = c->seg[SEG_SS];
    int mmu = cpl == 3 ? MMU_USER : MMU_KERNEL;

    if (lm) {
        base = 0;
        mask = ~0ull;
        if (ist) {
            const struct segment *tr = &c->seg[SEG_TR];
            if (0x24 + 8 * ist - 1 > tr->limit)
                cpu_fault_code(c, NULL, EXC_TS, (tr->sel & 0xfffcu) | ext);
            sp = sys_read(c, NULL, tr->base + 0x1c + 8 * ist, 8);
        } else if (change) {
            uint16_t none;
            tss_stack(c, NULL, cpl, &none, &sp);
        }
        sp &= ~15ull;
        if (!canonical(c, sp))
            cpu_fault_code(c, NULL, EXC_SS, ext);
        if (change)
            ss = (struct segment){.sel = (uint16_t)cpl, .attr = ATTR_UNUSABLE | cpl << ATTR_DPL_SHIFT};
    } else if (change) {
        uint16_t new_ss;
        uint64_t d;
        tss_stack(c, NULL, cpl, &new_ss, &sp);
        if (!(new_ss & 0xfffc))
            cpu_fault_code(c, NULL, EXC_TS, ext);
        if (!desc_fetch(c, NULL, new_ss, &d))
            cpu_fault_code(c, NULL, EXC_TS, (new_ss & 0xfffcu) | ext);
        desc_to_segment(new_ss, d, &ss);
        if ((new_ss & 3u) != cpl || seg_dpl(&ss) != cpl || !(ss.attr & ATTR_S) || (ss.attr & 0xa) != 2)
            cpu_fault_code(c, NULL, EXC_TS, (new_ss & 0xfffcu) | ext);
        if (!(ss.attr & ATTR_P))
            cpu_fault_code(c, NULL, EXC_SS, (new_ss & 0xfffcu) | ext);
        base = ss.base;
        mask = ss.attr & ATTR_DB ? 0xffffffff : 0xffff;
    }
    if (lm ? !canonical(c, off) : off > cs.limit)
        cpu_fault_code(c, NULL, EXC_GP, ext);

    unsigned room = size * ((vm86 ? 4 : 0) + (change || lm ? 2 : 0) + 3 + e->has_error);
    if (!lm && !seg_holds(&ss, (sp - room) & mask, room))
        cpu_fault_code(c, NULL, EXC_SS, (change ? ss.sel & 0xfffcu : 0) | ext);
    if (vm86) {
        push(c, base, &sp, mask, size, c->seg[SEG_GS].sel, mmu);
        push(c, base, &sp, mask, size, c->seg[SEG_FS].sel, mmu);
        push(c, base, &sp, mask, size, c->seg[SEG_DS].sel, mmu);
        push(c, base, &sp, mask, size, c->seg[SEG_ES].sel, mmu);
    }
    if (change || lm) {
        push(c, base, &sp, mask, size, c->seg[SEG_SS].sel, mmu);
        push(c, base, &sp, mask, size, old_sp, mmu);
    }
    push(c, base, &sp, mask, size, e->flags, mmu);
    push(c, base, &sp, mask, size, c->seg[SEG_CS].sel, mmu);
    push(c, base, &sp, mask, size, e->rip, mmu);
    if (e->has_error)
        push(c, base, &sp, mask, size, e->error, mmu);

    uint64_t flags = cpu_rflags(c) & ~(uint64_t)(FL_TF | FL_NT | FL_RF | FL_VM);
    if (!(type & 1))
        flags &= ~(uint64_t)FL_IF;
    if (vm86)
        for (int i = SEG_ES; i <= SEG_GS; i++)
            if (i != SEG_CS && i != SEG_SS)
                c->seg[i] = (struct segment){.attr = ATTR_UNUSABLE};
    c->seg[SEG_SS] = ss;
    cs.sel = (uint16_t)((sel & 0xfffc) | cpl);
    c->seg[SEG_CS] = cs;
    c->cpl = (uint8_t)cpl;
    c->gpr[RSP] = (c->gpr[RSP] & ~mask) | (sp & mask);
    cpu_set_rflags(c, flags);
    cpu_update_mode(c);
    c->rip = off;
}

static void deliver(struct cpu *c, const struct event *e)
{
    c->in_delivery = true;
    c->delivery_vector = e->external || e->soft ? 255 : (uint8_t)e->vector;
    if (c->cr0 & CR0_PE)
        protected_or_long(c, e);
    else
        real_mode(c, e);
    c->in_delivery = false;
    c->shadow = 0;
    c->step_trap = false;
}

/* What every #DB clears: DR7.GD (SDM vol. 3B 17.2.4), IA32_DEBUGCTL.BTF (17.4.3). */
static void enter_debug(struct cpu *c)
{
    c->dr[7] &= ~(1ull << 13);
    c->btf = false;
}

void deliver_exception(struct cpu *c)
{
    struct event e = {.vector = c->exc.vector, .has_error = c->exc.has_error, .error = c->exc.error, .soft = c->exc.soft, .rip = c->rip};
    if (c->in_delivery) {
        unsigned first = c->delivery_vector;
        if (first == EXC_DF) {
            c->in_delivery = false;
            cpu_stop(c, NULL, TCG_STOP_SHUTDOWN);
        }
        if ((contributory(first) && contributory(e.vector)) || (first == EXC_PF && (contributory(e.vector) || e.vector == EXC_PF))) {
            e.vector = EXC_DF;
            e.has_error = c->cr0 & CR0_PE;
            e.error = 0;
        }
    }
    e.flags = cpu_rflags(c);
    if (!c->exc.trap && e.vector != EXC_DB && e.vector != EXC_DF && !e.soft)
        e.flags |= FL_RF;
    if (e.vector == EXC_DB)
        enter_debug(c);
    deliver(c, &e);
}

void deliver_interrupt(struct cpu *c, unsigned vector, bool soft, bool nmi)
{
    struct event e = {.vector = vector, .soft = soft, .external = !soft, .rip = c->rip, .flags = cpu_rflags(c)};
    if (nmi)
        c->nmi_masked = true;
    c->exc.vector = (uint8_t)vector;
    deliver(c, &e);
}

/* The interrupt redirection bitmap of the TSS: 32 bytes below the I/O permission map (SDM vol. 3B 20.3.3). */
static bool redirected(struct cpu *c, const struct uop *u, unsigned vector)
{
    const struct segment *tr = &c->seg[SEG_TR];
    if ((tr->attr & 13) != 9 || tr->limit < 103)
        cpu_fault_code(c, u, EXC_GP, 0);
    uint32_t at = (uint32_t)sys_read(c, u, tr->base + 102, 2) - 32 + vector / 8;
    if (at > tr->limit)
        cpu_fault_code(c, u, EXC_GP, 0);
    return !(sys_read(c, u, tr->base + at, 1) >> (vector & 7) & 1);
}

/* INT n of a virtual-8086 program to its own handler: methods 5 and 6 of SDM vol. 3B table 20-2. */
static void to_8086_handler(struct cpu *c, const struct uop *u, unsigned vector)
{
    uint32_t target = (uint32_t)mode_read(c, mmu_index(c), u, vector * 4, 4, 0), off = RIP_AFTER(c, u);
    bool vif = virtual_if(c);
    uint64_t flags = cpu_rflags(c), sp = c->gpr[RSP], values[3] = {vif ? virtual_flags(c, flags) : flags, c->seg[SEG_CS].sel, off};
    stack_check(c, u, sp - 6, 6);
    mem_check_write(c, u, stack_lin(c, sp - 6), 6, 1);
    for (unsigned i = 0; i < 3; i++) {
        sp -= 2;
        mode_write(c, mmu_index(c), u, stack_lin(c, sp), 2, values[i] & 0xffff, 1);
    }
    set_sp(c, sp);
    seg_load_real(c, SEG_CS, (uint16_t)(target >> 16));
    c->rip = target & 0xffff;
    cpu_set_rflags(c, flags & ~(uint64_t)((vif ? FL_VIF : FL_IF) | FL_TF | FL_RF));
    cpu_update_mode(c);
    c->event_taken = true;
}

/* INT n, INT3, INTO and INT1 are traps: they return behind themselves; a fault on the way returns to them. */
void soft_interrupt(struct cpu *c, const struct uop *u, unsigned vector, int kind)
{
    c->rip = RIP_OF(c, u);
    if (kind == SOFT_INT3 && (c->guest_debug.flags & KVM_GUESTDBG_USE_SW_BP)) {
        c->debug_exit.exception = EXC_BP;
        c->debug_exit.pc = c->rip + (code64(c) ? 0 : c->segbase[SEG_CS]);
        c->debug_exit.dr6 = 0;
        c->debug_exit.dr7 = c->dr[7];
        cpu_stop(c, u, TCG_STOP_DEBUG);
    }
    if (kind == SOFT_INT && c->sysflags & FL_VM) {
        if (c->cr4 & CR4_VME && redirected(c, u, vector)) {
            to_8086_handler(c, u, vector);
            return;
        }
        if ((c->sysflags >> 12 & 3) < 3)
            cpu_fault_code(c, u, EXC_GP, 0);
    }
    if (kind == SOFT_INT1) {
        if (c->watch_hit & 15) { /* a data breakpoint of MOV SS waited: one #DB tells of both */
            c->dr[6] = (c->dr[6] & ~0xfull) | (c->watch_hit & 15);
            c->watch_hit &= 0xf0;
        }
        enter_debug(c);
    }
    struct event e = {.vector = vector, .soft = kind != SOFT_INT1, .rip = RIP_AFTER(c, u), .flags = cpu_rflags(c)};
    c->in_delivery = true;
    c->delivery_vector = 255;
    if (c->cr0 & CR0_PE)
        protected_or_long(c, &e);
    else
        real_mode(c, &e);
    c->in_delivery = false;
    c->event_taken = true; /* TF is clear now: no single-step trap after INT */
}
