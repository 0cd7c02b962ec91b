/* SPDX-License-Identifier: Apache-2.0
 *
 * Hardware task switch (SDM vol. 3A 7.3), by JMP, CALL, IRET, or an interrupt through a task gate; 16- and 32-bit TSS.
 *
 * Order as in the manual: check the new TSS, save the old state, mark descriptors busy or not, then load; faults while
 * segments are loaded belong to the new task (#TS with the selector), with its EIP. Long mode has no task switches.
 */
#include "op.h"

static void set_busy(struct cpu *c, const struct uop *u, uint16_t sel, bool busy)
{
    uint64_t a = c->gdt.base + (sel & 0xfff8) + 5;
    uint64_t b = sys_read(c, u, a, 1);
    sys_write(c, u, a, 1, busy ? b | 2 : b & ~2ull);
}

static void load_checked(struct cpu *c, int seg, uint16_t sel)
{
    struct segment s = {.sel = sel, .attr = ATTR_UNUSABLE};
    uint64_t d;
    if (sel & 0xfffc) {
        if (!desc_fetch(c, NULL, sel, &d))
            cpu_fault_code(c, NULL, EXC_TS, sel & 0xfffc);
        desc_to_segment(sel, d, &s);
        bool code = s.attr & 8, good = s.attr & ATTR_S;
        if (seg == SEG_CS)
            good = good && code && ((s.attr & 4) ? seg_dpl(&s) <= (sel & 3u) : seg_dpl(&s) == (sel & 3u));
        else if (seg == SEG_SS)
            good = good && (s.attr & 0xa) == 2 && seg_dpl(&s) == c->cpl && (sel & 3u) == c->cpl;
        else
            good = good && (!code || (s.attr & 2)) && ((s.attr & 0xc) == 0xc || (seg_dpl(&s) >= c->cpl && seg_dpl(&s) >= (sel & 3u)));
        if (!good)
            cpu_fault_code(c, NULL, EXC_TS, sel & 0xfffc);
        if (!(s.attr & ATTR_P))
            cpu_fault_code(c, NULL, seg == SEG_SS ? EXC_SS : EXC_NP, sel & 0xfffc);
    } else if (seg == SEG_CS || seg == SEG_SS) {
        cpu_fault_code(c, NULL, EXC_TS, sel & 0xfffc);
    }
    c->seg[seg] = s;
}

void task_switch(struct cpu *c, const struct uop *u, uint16_t sel, int why, uint64_t next_rip, bool has_error, uint32_t error)
{
    unsigned bad = why == TASK_IRET ? EXC_TS : EXC_GP;
    uint64_t d;
    struct segment t, old = c->seg[SEG_TR];
    if (!(sel & 0xfffc) || sel & 4 || !desc_fetch(c, u, sel, &d))
        cpu_fault_code(c, u, bad, sel & 0xfffc);
    desc_to_segment(sel, d, &t);
    unsigned type = t.attr & 0x1f, wanted = why == TASK_IRET ? 2 : 0;
    if ((type & ~8u) != (1 | wanted))
        cpu_fault_code(c, u, bad, sel & 0xfffc);
    if (!(t.attr & ATTR_P))
        cpu_fault_code(c, u, EXC_NP, sel & 0xfffc);
    bool wide = type & 8, old_wide = old.attr & 8;
    if (t.limit < (wide ? 0x67 : 0x2b))
        cpu_fault_code(c, u, EXC_TS, sel & 0xfffc);

    /* save */
    uint64_t flags = cpu_rflags(c), b = old.base;
    if (why == TASK_IRET)
        flags &= ~(uint64_t)FL_NT;
    sys_check_write(c, u, b, old_wide ? 0x60 : 0x2a);
    if (old_wide) {
        sys_write(c, u, b + 0x20, 4, next_rip);
        sys_write(c, u, b + 0x24, 4, flags);
        for (unsigned i = 0; i < 8; i++)
            sys_write(c, u, b + 0x28 + 4 * i, 4, (uint32_t)c->gpr[i]);
        for (unsigned i = 0; i < 6; i++)
            sys_write(c, u, b + 0x48 + 4 * i, 2, c->seg[i].sel);
    } else {
        sys_write(c, u, b + 0x0e, 2, next_rip & 0xffff);
        sys_write(c, u, b + 0x10, 2, flags & 0xffff);
        for (unsigned i = 0; i < 8; i++)
            sys_write(c, u, b + 0x12 + 2 * i, 2, (uint16_t)c->gpr[i]);
        for (unsigned i = 0; i < 4; i++)
            sys_write(c, u, b + 0x22 + 2 * i, 2, c->seg[i].sel);
    }
    /* read the new one before anything is committed */
    uint32_t eip, efl, regs[8], cr3 = 0;
    uint16_t segs[6] = {0}, ldt;
    if (wide) {
        cr3 = (uint32_t)sys_read(c, u, t.base + 0x1c, 4);
        eip = (uint32_t)sys_read(c, u, t.base + 0x20, 4);
        efl = (uint32_t)sys_read(c, u, t.base + 0x24, 4);
        for (unsigned i = 0; i < 8; i++)
            regs[i] = (uint32_t)sys_read(c, u, t.base + 0x28 + 4 * i, 4);
        for (unsigned i = 0; i < 6; i++)
            segs[i] = (uint16_t)sys_read(c, u, t.base + 0x48 + 4 * i, 2);
        ldt = (uint16_t)sys_read(c, u, t.base + 0x60, 2);
    } else {
        eip = (uint32_t)sys_read(c, u, t.base + 0x0e, 2);
        efl = (uint32_t)sys_read(c, u, t.base + 0x10, 2);
        for (unsigned i = 0; i < 8; i++)
            regs[i] = 0xffff0000u | (uint32_t)sys_read(c, u, t.base + 0x12 + 2 * i, 2);
        for (unsigned i = 0; i < 4; i++)
            segs[i] = (uint16_t)sys_read(c, u, t.base + 0x22 + 2 * i, 2);
        ldt = (uint16_t)sys_read(c, u, t.base + 0x2a, 2);
    }
    if (why == TASK_JMP || why == TASK_IRET)
        set_busy(c, u, old.sel, false);
    if (why == TASK_CALL || why == TASK_INT) {
        sys_write(c, u, t.base, 2, old.sel);
        efl |= FL_NT;
    }
    if (why != TASK_IRET)
        set_busy(c, u, sel, true);

    /* commit: from here on faults belong to the new task */
    c->in_delivery = false;
    t.attr |= 2;
    c->seg[SEG_TR] = t;
    c->cr0 |= CR0_TS;
    if (wide && (c->cr0 & CR0_PG))
        cpu_set_cr3(c, cr3);
    c->rip = eip;
    for (unsigned i = 0; i < 8; i++)
        c->gpr[i] = regs[i];
    c->dr[7] &= ~0x155ull;
    c->cpl = 3; /* cpu_set_rflags below must not see an old CPL 0 mode */
    cpu_set_rflags(c, (efl & 0x3f7fd7) | 2);
    cpu_rf_loaded(c);
    c->seg[SEG_LDT] = (struct segment){.sel = ldt, .attr = ATTR_UNUSABLE};
    if (ldt & 0xfffc) {
        if (ldt & 4 || !desc_fetch(c, NULL, ldt, &d) || (d >> 40 & 0x1f) != 2 || !(d >> 47 & 1))
            cpu_fault_code(c, NULL, EXC_TS, ldt & 0xfffc);
        desc_to_segment(ldt, d, &c->seg[SEG_LDT]);
    }
    if (efl & FL_VM) {
        for (int i = 0; i < 6; i++)
            seg_load_real(c, i, segs[i]);
        c->cpl = 3;
    } else {
        c->cpl = segs[SEG_CS] & 3;
        load_checked(c, SEG_SS, segs[SEG_SS]);
        load_checked(c, SEG_CS, segs[SEG_CS]);
        load_checked(c, SEG_ES, segs[SEG_ES]);
        load_checked(c, SEG_DS, segs[SEG_DS]);
        load_checked(c, SEG_FS, segs[SEG_FS]);
        load_checked(c, SEG_GS, segs[SEG_GS]);
    }
    cpu_update_mode(c);
    if (has_error) {
        c->gpr[RSP] -= wide ? 4 : 2;
        mode_write(c, c->cpl == 3 ? MMU_USER : MMU_KERNEL, NULL, stack_lin(c, c->gpr[RSP]), wide ? 4 : 2, error, 1);
    }
    if (eip > c->seg[SEG_CS].limit)
        cpu_fault_code(c, NULL, EXC_GP, 0);
    if (wide && (sys_read(c, NULL, t.base + 0x64, 2) & 1))
        c->step_trap = true;
}
