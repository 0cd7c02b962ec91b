/* SPDX-License-Identifier: Apache-2.0
 *
 * Far transfers and interrupts as instructions, segment registers, SYSCALL and SYSENTER, HLT and friends, I/O.
 *
 * These are rare, so they are plain functions around seg.c and excp.c and all end their block. Where vendors differ
 * (SYSRET, SYSENTER in compatibility mode, the operand size of near branches) this is an Intel processor.
 */
#include "op.h"

#include <linux/kvm.h>

#define FAR(bits)                                                                                                  \
    OP(callf_m##bits) { uint64_t a = ea(c, u); uint64_t off = ld##bits(c, u, a); far_call(c, u, ld16(c, u, a + bits / 8), off, bits); LEAVE; } \
    OP(jmpf_m##bits) { uint64_t a = ea(c, u); uint64_t off = ld##bits(c, u, a); far_jump(c, u, ld16(c, u, a + bits / 8), off, bits); LEAVE; }  \
    OP(retf_##bits) { far_return(c, u, bits, 0); LEAVE; }                                                          \
    OP(retf_i##bits) { far_return(c, u, bits, (uint16_t)u->imm); LEAVE; }                                          \
    OP(iret_##bits) { iret(c, u, bits); LEAVE; }
EACH_WIDE(FAR)
#define FAR_POINTER(bits)                                                                            \
    OP(callf_ptr_##bits) { far_call(c, u, (uint16_t)(u->imm >> 32), (uint32_t)u->imm, bits); LEAVE; } \
    OP(jmpf_ptr_##bits) { far_jump(c, u, (uint16_t)(u->imm >> 32), (uint32_t)u->imm, bits); LEAVE; }
FAR_POINTER(16)
FAR_POINTER(32)

OP(int3) { soft_interrupt(c, u, EXC_BP, SOFT_INT3); LEAVE; }
OP(int_i) { soft_interrupt(c, u, (uint8_t)u->imm, SOFT_INT); LEAVE; }
OP(int1) { soft_interrupt(c, u, EXC_DB, SOFT_INT1); LEAVE; }
OP(into)
{
    if (c->cc & CC_OF) {
        soft_interrupt(c, u, EXC_OF, SOFT_INTO);
        LEAVE;
    }
    LEAVE_AFTER;
}
#define BOUND(bits)                                                                                         \
    OP(bound_rm##bits)                                                                                      \
    {                                                                                                       \
        uint64_t a = ea(c, u);                                                                              \
        S(bits) v = (S(bits))GET##bits(u->d), lo = (S(bits))ld##bits(c, u, a), hi = (S(bits))ld##bits(c, u, a + bits / 8); \
        if (v < lo || v > hi)                                                                               \
            cpu_fault(c, u, EXC_BR);                                                                        \
        NEXT;                                                                                               \
    }
BOUND(16)
BOUND(32)
OP(ud_r16) { cpu_fault(c, u, EXC_UD); }
OP(ud_r32) { cpu_fault(c, u, EXC_UD); }
OP(ud_r64) { cpu_fault(c, u, EXC_UD); }
OP(ud_m16) { cpu_fault(c, u, EXC_UD); }
OP(ud_m32) { cpu_fault(c, u, EXC_UD); }
OP(ud_m64) { cpu_fault(c, u, EXC_UD); }

/* ---- segment registers ---- */
/* to a register: 16 bits with a 16-bit operand, zero-extended otherwise */
OP(movfromseg_rr)
{
    if (u->x) /* set by the decoder for a 16-bit operand */
        SET16(u->d, c->seg[u->s].sel);
    else
        SET64(u->d, c->seg[u->s].sel);
    NEXT;
}
OP(movfromseg_mr) { st16(c, u, ea(c, u), c->seg[u->s].sel); NEXT; }
static const struct uop *load_segment(struct cpu *c, const struct uop *u, uint16_t sel)
{
    if (u->d == SEG_CS)
        cpu_fault(c, u, EXC_UD);
    seg_load(c, u, u->d, sel);
    if (u->d == SEG_SS) {
        c->shadow = SHADOW_MOVSS;
        cpu_request(c, CPU_REQ_STEP);
    }
    LEAVE_AFTER;
}
OP(movtoseg_rr) { return load_segment(c, u, GET16(u->s)); }
OP(movtoseg_rm) { return load_segment(c, u, ld16(c, u, ea(c, u))); }
#define FAR_LOAD(bits, name, n)                                  \
    OP(name##_rm##bits)                                          \
    {                                                            \
        uint64_t a = ea(c, u);                                   \
        U(bits) v = ld##bits(c, u, a);                           \
        uint16_t sel = ld16(c, u, a + bits / 8);                 \
        seg_load(c, u, n, sel);                                  \
        SET##bits(u->d, v);                                      \
        LEAVE_AFTER;                                             \
    }
EACH_WIDE(FAR_LOAD, lss, SEG_SS)
EACH_WIDE(FAR_LOAD, lfs, SEG_FS)
EACH_WIDE(FAR_LOAD, lgs, SEG_GS)
FAR_LOAD(16, les, SEG_ES)
FAR_LOAD(32, les, SEG_ES)
FAR_LOAD(16, lds, SEG_DS)
FAR_LOAD(32, lds, SEG_DS)

/* ---- fast system calls, SDM vol. 2 ---- */
static void flat_cs(struct cpu *c, uint16_t sel, unsigned dpl, bool l)
{
    c->seg[SEG_CS] = (struct segment){.sel = sel, .limit = 0xffffffff, .attr = 0x809bu | dpl << ATTR_DPL_SHIFT | (l ? ATTR_L : ATTR_DB)};
}
static void flat_ss(struct cpu *c, uint16_t sel, unsigned dpl)
{
    c->seg[SEG_SS] = (struct segment){.sel = sel, .limit = 0xffffffff, .attr = 0xc093u | dpl << ATTR_DPL_SHIFT};
}
OP(syscall)
{
    if (!(c->efer & EFER_SCE) || !code64(c))
        cpu_fault(c, u, EXC_UD);
    c->gpr[RCX] = c->bip + u->off + u->len;
    c->gpr[R11] = cpu_rflags(c) & ~(uint64_t)FL_RF;
    uint16_t sel = (uint16_t)(c->star >> 32);
    flat_cs(c, sel & 0xfffc, 0, true);
    flat_ss(c, (uint16_t)((sel & 0xfffc) + 8), 0);
    c->cpl = 0;
    bool tf = c->sysflags & FL_TF;
    cpu_set_rflags(c, c->gpr[R11] & ~c->fmask & ~(uint64_t)FL_RF);
    c->step_trap = tf && (c->sysflags & FL_TF);
    cpu_update_mode(c);
    JUMP(c->lstar);
}
static const struct uop *sysret(struct cpu *c, const struct uop *u, bool to64)
{
    if (!(c->efer & EFER_SCE) || !code64(c))
        cpu_fault(c, u, EXC_UD);
    if (c->cpl || (to64 && !canonical(c, c->gpr[RCX])))
        cpu_fault_code(c, u, EXC_GP, 0);
    uint16_t base = (uint16_t)(c->star >> 48);
    flat_cs(c, (uint16_t)((base + (to64 ? 16 : 0)) | 3), 3, to64);
    flat_ss(c, (uint16_t)((base + 8) | 3), 3);
    c->cpl = 3;
    cpu_set_rflags(c, (c->gpr[R11] & 0x3c7fd7) | 2);
    cpu_update_mode(c);
    c->rip = to64 ? c->gpr[RCX] : (uint32_t)c->gpr[RCX];
    return jump_cached(c);
}
OP(sysret_32) { return sysret(c, u, false); }
OP(sysret_64) { return sysret(c, u, true); }

OP(sysenter)
{
    if (!(c->cr0 & CR0_PE) || !(c->sysenter_cs & 0xfffc))
        cpu_fault_code(c, u, EXC_GP, 0);
    uint16_t sel = c->sysenter_cs & 0xfffc;
    bool lm = long_mode(c);
    flat_cs(c, sel, 0, lm);
    flat_ss(c, (uint16_t)(sel + 8), 0);
    c->cpl = 0;
    cpu_set_rflags(c, cpu_rflags(c) & ~(uint64_t)(FL_VM | FL_IF | FL_RF));
    cpu_update_mode(c);
    c->gpr[RSP] = lm ? c->sysenter_esp : (uint32_t)c->sysenter_esp;
    CONTINUE_AT(lm ? c->sysenter_eip : (uint32_t)c->sysenter_eip);
}
static const struct uop *sysexit(struct cpu *c, const struct uop *u, bool to64)
{
    if (c->cpl || !(c->cr0 & CR0_PE) || !(c->sysenter_cs & 0xfffc) || (to64 && (!canonical(c, c->gpr[RCX]) || !canonical(c, c->gpr[RDX]))))
        cpu_fault_code(c, u, EXC_GP, 0);
    uint16_t sel = c->sysenter_cs & 0xfffc;
    flat_cs(c, (uint16_t)((sel + (to64 ? 32 : 16)) | 3), 3, to64);
    flat_ss(c, (uint16_t)((sel + (to64 ? 40 : 24)) | 3), 3);
    c->gpr[RSP] = to64 ? c->gpr[RCX] : (uint32_t)c->gpr[RCX];
    uint64_t rip = to64 ? c->gpr[RDX] : (uint32_t)c->gpr[RDX];
    set_cpl(c, 3);
    CONTINUE_AT(rip);
}
OP(sysexit_32) { return sysexit(c, u, false); }
OP(sysexit_64) { return sysexit(c, u, true); }

OP(swapgs)
{
    uint64_t t = c->seg[SEG_GS].base;
    cpu_set_segbase(c, SEG_GS, c->kernel_gs_base);
    c->kernel_gs_base = t;
    NEXT;
}
#define FSGS(name, n)                                                                                    \
    static inline void name##_check(struct cpu *c, const struct uop *u)                                  \
    {                                                                                                    \
        if (!(c->cr4 & CR4_FSGSBASE))                                                                    \
            cpu_fault(c, u, EXC_UD);                                                                     \
    }                                                                                                    \
    OP(rd##name##base_r32) { name##_check(c, u); SET32(u->d, c->segbase[n]); NEXT; }                     \
    OP(rd##name##base_r64) { name##_check(c, u); SET64(u->d, c->segbase[n]); NEXT; }                     \
    OP(wr##name##base_r32) { name##_check(c, u); cpu_set_segbase(c, n, GET32(u->d)); NEXT; }             \
    OP(wr##name##base_r64)                                                                               \
    {                                                                                                    \
        name##_check(c, u);                                                                              \
        if (!cpu_canonical_base(c, GET64(u->d)))                                                         \
            cpu_fault_code(c, u, EXC_GP, 0);                                                             \
        cpu_set_segbase(c, n, GET64(u->d));                                                              \
        NEXT;                                                                                            \
    }
FSGS(fs, SEG_FS)
FSGS(gs, SEG_GS)

/* ---- interrupt flag, halting ---- */
OP(cli)
{
    if (!(c->mode & MODE_IOPL)) {
        if (!virtual_if(c))
            cpu_fault_code(c, u, EXC_GP, 0);
        c->sysflags &= ~(uint32_t)FL_VIF;
        NEXT;
    }
    c->sysflags &= ~(uint32_t)FL_IF;
    NEXT;
}
/* The instruction after STI runs before any interrupt. When nothing waits, that is so anyway: interrupts are taken
 * between blocks only; so the block goes on, unless this is its last instruction. */
OP(fall);
OP(sti)
{
    if (!(c->mode & MODE_IOPL)) {
        if (!virtual_if(c) || c->sysflags & FL_VIP)
            cpu_fault_code(c, u, EXC_GP, 0);
        c->sysflags |= FL_VIF;
        NEXT;
    }
    if (c->sysflags & FL_IF)
        NEXT;
    c->sysflags |= FL_IF;
    if (u[1].fn != op_fall && !atomic_load_explicit(&c->lines, memory_order_relaxed) && !c->want_window && !(c->block->mode & MODE_STEP))
        NEXT;
    c->shadow = SHADOW_STI;
    cpu_request(c, CPU_REQ_STEP | CPU_REQ_LINES);
    give_back_budget(c, u + 1);
    LEAVE_AFTER;
}
OP(hlt)
{
    c->rip = RIP_AFTER(c, u);
    c->shadow = 0;
    if (c->sysflags & FL_TF)
        LEAVE; /* the single-step trap wakes it at once */
    if ((atomic_load(&c->lines) & LINE_INTR && c->sysflags & FL_IF) || (atomic_load(&c->lines) & LINE_NMI && !c->nmi_masked)) {
        cpu_request(c, CPU_REQ_LINES); /* an interrupt waits already: do not even begin to sleep */
        LEAVE;
    }
    c->halted = true;
    cpu_stop(c, NULL, TCG_STOP_HLT);
}
static void monitor_checks(struct cpu *c, const struct uop *u, uint32_t extensions)
{
    machine_only(c, u);
    if (c->cpl)
        cpu_fault(c, u, EXC_UD);
    if (GET32(RCX * 8) & ~extensions)
        cpu_fault_code(c, u, EXC_GP, 0);
}
OP(monitor)
{
    uint64_t lin = u->aflags ? ea_slow(c, u, c->gpr[RAX]) : c->gpr[RAX], gpa;
    bool writable, user;
    monitor_checks(c, u, 0);
    ld8(c, u, lin);
    atomic_store(&c->monitor, 0);
    if (cpu_translate(c, lin, &gpa, &writable, &user))
        block_monitor(c, gpa);
    LEAVE_AFTER; /* what others do about it is seen from here on */
}
OP(mwait)
{
    monitor_checks(c, u, 1);
    c->rip = RIP_AFTER(c, u);
    c->shadow = 0;
    c->mwait_break = GET32(RCX * 8) & 1;
    uint32_t lines = atomic_load(&c->lines);
    if (!atomic_load(&c->monitor) || c->sysflags & FL_TF || (lines & LINE_INTR && (c->sysflags & FL_IF || c->mwait_break)) ||
        (lines & LINE_NMI && !c->nmi_masked)) {
        atomic_store(&c->monitor, 0);
        cpu_request(c, CPU_REQ_LINES);
        LEAVE;
    }
    cpu_stop(c, NULL, TCG_STOP_MWAIT);
}
OP(vmcall)
{
    processor_only(c, u);
    c->rip = RIP_AFTER(c, u);
    if (!tcg_hypercall(c))
        cpu_stop(c, NULL, TCG_STOP_HYPERCALL);
    LEAVE;
}
OP(serialize) { LEAVE_AFTER; }
OP(wbinvd) { NEXT; }
OP(clflush_m) { ld8(c, u, ea(c, u)); NEXT; }

/* ---- ports ---- */
static void permitted(struct cpu *c, const struct uop *u, uint16_t port, unsigned size)
{
    if ((c->mode & MODE_IOPL) && !(c->mode & MODE_VM86))
        return;
    if (!(c->cr0 & CR0_PE))
        return;
    const struct segment *tr = &c->seg[SEG_TR];
    unsigned type = tr->attr & 15;
    if ((type == 9 || type == 11) && tr->limit >= 103) {
        uint32_t map = (uint32_t)sys_read(c, u, tr->base + 102, 2) + port / 8;
        if (map + 1 <= tr->limit) {
            uint32_t bits = (uint32_t)sys_read(c, u, tr->base + map, 2);
            if (!(bits >> (port & 7) & ((1u << size) - 1)))
                return;
        }
    }
    cpu_fault_code(c, u, EXC_GP, 0);
}
void io_permission(struct cpu *c, const struct uop *u, uint16_t port, unsigned size)
{
    permitted(c, u, port, size);
    if (unlikely(c->dr[7] & 0xff) && c->cr4 & CR4_DE)
        watch_port(c, port, size);
}
static uint64_t in(struct cpu *c, const struct uop *u, uint16_t port, unsigned size)
{
    io_permission(c, u, port, size);
    return dev_read(c, u, IO_PIO_IN, port, size);
}
static void out(struct cpu *c, const struct uop *u, uint16_t port, unsigned size, uint64_t v)
{
    io_permission(c, u, port, size);
    dev_write(c, u, IO_PIO_OUT, port, size, v);
}
#define PORT_DX R16(c, RDX * 8)
OP(in_ib_i) { SET8(0, in(c, u, (uint8_t)u->imm, 1)); NEXT; }
OP(in_i_i16) { SET16(0, in(c, u, (uint8_t)u->imm, 2)); NEXT; }
OP(in_i_i32) { SET32(0, in(c, u, (uint8_t)u->imm, 4)); NEXT; }
OP(in_dxb) { SET8(0, in(c, u, PORT_DX, 1)); NEXT; }
OP(in_dx_16) { SET16(0, in(c, u, PORT_DX, 2)); NEXT; }
OP(in_dx_32) { SET32(0, in(c, u, PORT_DX, 4)); NEXT; }
OP(out_ib_i) { out(c, u, (uint8_t)u->imm, 1, GET8(0)); NEXT; }
OP(out_i_i16) { out(c, u, (uint8_t)u->imm, 2, GET16(0)); NEXT; }
OP(out_i_i32) { out(c, u, (uint8_t)u->imm, 4, GET32(0)); NEXT; }
OP(out_dxb) { out(c, u, PORT_DX, 1, GET8(0)); NEXT; }
OP(out_dx_16) { out(c, u, PORT_DX, 2, GET16(0)); NEXT; }
OP(out_dx_32) { out(c, u, PORT_DX, 4, GET32(0)); NEXT; }
