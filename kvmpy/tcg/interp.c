/* SPDX-License-Identifier: Apache-2.0
 *
 * cpu_run(): the loop around blocks.
 *
 * A turn of the loop: look at requests, find the block for RIP, connect the link that led here, run. Most blocks go
 * to the next by themselves (follow() in control.h) and the loop sees only what they cannot do: indirect jumps that
 * the jump cache missed, faults (they arrive by longjmp), requests, the end of the budget (every 2^16 instructions,
 * to look at immediate_exit and deadlines).
 *
 * Step mode: single-step by TF or by the debugger, the instruction after STI or MOV SS, code breakpoints, and the
 * replay of an instruction that user space answered all use blocks of one instruction (MODE_STEP is part of the key),
 * so ordinary blocks need no checks for them. CPU_REQ_STEP stays set meanwhile, which makes every block come back.
 *
 * Interrupt lines: CPU_REQ_LINES means "look at cpu.lines". When IF is 0 the request is dropped and cpu_irq_enabled()
 * sets it again, so code that runs with interrupts off is not slowed by a waiting one.
 */
#include "core.h"
#include "fphost.h"
#include "jit.h"
#include "xstate.h"

#include <errno.h>
#include <linux/kvm.h>
#include <stdlib.h>

#define BUDGET 65536

OP(resync)
{
    c->rip = RIP_OF(c, u);
    give_back_budget(c, u);
    LEAVE;
}

OP(ripbase)
{
    c->scratch[0] = c->bip + u->imm;
    NEXT;
}

uint64_t cpu_rflags(const struct cpu *c) { return c->sysflags | cc_to_eflags(c->cc) | 2; }

void cpu_set_rflags(struct cpu *c, uint64_t f)
{
    uint32_t old = c->sysflags;
    c->cc = cc_from_eflags(f);
    c->sysflags = (uint32_t)(f & 0x3f7fd7 & ~(uint64_t)FL_ARITH) | 2;
    if ((old ^ c->sysflags) & (FL_AC | FL_VM | FL_IOPL))
        cpu_update_mode(c);
    if (c->sysflags & FL_IF & ~old)
        cpu_irq_enabled(c);
    if (c->sysflags & FL_TF)
        cpu_request(c, CPU_REQ_STEP);
}

void cpu_irq_enabled(struct cpu *c)
{
    if (atomic_load_explicit(&c->lines, memory_order_relaxed) || c->want_window)
        cpu_request(c, CPU_REQ_LINES);
}

void cpu_raise(struct cpu *c, uint32_t line)
{
    atomic_fetch_or(&c->lines, line);
    cpu_request(c, CPU_REQ_LINES);
}
void cpu_nmi(struct cpu *c)
{
    uint32_t lines = atomic_load(&c->lines);
    while (!atomic_compare_exchange_weak(&c->lines, &lines, lines | (lines & LINE_NMI ? LINE_NMI2 : LINE_NMI)))
        ;
    cpu_request(c, CPU_REQ_LINES);
}
void cpu_lower(struct cpu *c, uint32_t line) { atomic_fetch_and(&c->lines, ~line); }

static bool flat(const struct segment *s)
{
    return !s->base && s->limit == 0xffffffff && !(s->attr & ATTR_UNUSABLE) && (s->attr & 0xe) == 2; /* data, writable */
}

void cpu_update_mode(struct cpu *c)
{
    uint32_t m = 0;
    bool pe = c->cr0 & CR0_PE, vm86 = pe && (c->sysflags & FL_VM);
    bool is64 = (c->efer & EFER_LMA) && (c->seg[SEG_CS].attr & ATTR_L);
    unsigned iopl = c->sysflags >> 12 & 3;

    if (pe)
        m |= MODE_PE;
    if (vm86)
        m |= MODE_VM86;
    if (is64)
        m |= MODE_CODE64 | MODE_STACK32;
    else if (c->seg[SEG_CS].attr & ATTR_DB)
        m |= MODE_CODE32;
    if (!is64 && (c->seg[SEG_SS].attr & ATTR_DB))
        m |= MODE_STACK32;
    if (c->cpl == 3)
        m |= MODE_USER;
    if (c->cpl == 0)
        m |= MODE_CPL0;
    if (!is64 && !(flat(&c->seg[SEG_DS]) && flat(&c->seg[SEG_ES]) && flat(&c->seg[SEG_SS])))
        m |= MODE_SEGS;
    if (!is64 && c->seg[SEG_CS].limit != 0xffffffff)
        m |= MODE_LIMIT;
    if (c->cr0 & CR0_EM)
        m |= MODE_EM;
    if (c->cr0 & CR0_TS)
        m |= MODE_TS;
    if (c->cr0 & CR0_MP)
        m |= MODE_MP;
    if (c->cr4 & CR4_OSFXSR)
        m |= MODE_SSE;
    if ((c->cr4 & CR4_OSXSAVE) && (c->xcr0 & 6) == 6 && pe && !vm86)
        m |= MODE_AVX;
    if (c->cpl <= iopl)
        m |= MODE_IOPL;
    if (c->cr4 & CR4_LA57)
        m |= MODE_LA57;
    c->mode = m;
    c->ipmask = is64 ? ~0ull : m & MODE_CODE32 ? 0xffffffff : 0xffff;
    c->stack_mask = is64 ? ~0ull : m & MODE_STACK32 ? 0xffffffff : 0xffff;
    for (int i = SEG_ES; i <= SEG_GS; i++)
        c->segbase[i] = is64 && i < SEG_FS ? 0 : c->seg[i].base;
    bool ac = c->sysflags & FL_AC;
    c->tlb = &c->tlbs[c->cpl == 3 ? (ac && (c->cr0 & CR0_AM) ? MMU_USER_AC : MMU_USER) : ac ? MMU_KERNEL_AC : MMU_KERNEL];
    c->xtlb = &c->tlbs[c->cpl == 3 ? MMU_USER : MMU_KERNEL];
    jit_update_context(c);
}

void cpu_update(struct cpu *c)
{
    c->cpl = !(c->cr0 & CR0_PE) ? 0 : c->sysflags & FL_VM ? 3 : c->seg[SEG_SS].attr >> ATTR_DPL_SHIFT & 3;
    c->zero = 0;
    cpu_update_mode(c);
    cpu_flush_tlb(c);
    cpu_io_forget(c);
    cpu_request(c, CPU_REQ_LINES | CPU_REQ_STEP);
}

void cpu_set_segbase(struct cpu *c, int seg, uint64_t base)
{
    c->seg[seg].base = base;
    if (seg >= SEG_FS || !code64(c))
        c->segbase[seg] = base;
}

/* ---- ways out of a handler ---- */

_Noreturn void cpu_stop(struct cpu *c, const struct uop *u, enum tcg_stop stop)
{
    if (u)
        c->rip = RIP_OF(c, u);
    if (u)
        give_back_budget(c, u);
    c->stop = stop;
    longjmp(c->escape, ESCAPE_STOP);
}

_Noreturn void cpu_fault_full(struct cpu *c, const struct uop *u, unsigned vector, bool has_error, uint32_t code)
{
    if (u)
        c->rip = RIP_OF(c, u);
    if (u)
        give_back_budget(c, u);
    if (unlikely(cpu_only_helps(c)) && vector == EXC_UD) {
        c->stop = TCG_STOP_HANDBACK; /* the other processor may know more instructions */
        longjmp(c->escape, ESCAPE_STOP);
    }
    c->stat.faults++;
    c->budget--; /* a handler that faults at its first instruction for ever must come to an end of the budget too */
    c->exc.vector = (uint8_t)vector;
    c->exc.has_error = has_error;
    c->exc.error = code;
    c->exc.soft = c->exc.trap = false;
    longjmp(c->escape, ESCAPE_FAULT);
}
_Noreturn void cpu_fault(struct cpu *c, const struct uop *u, unsigned vector) { cpu_fault_full(c, u, vector, false, 0); }
_Noreturn void cpu_fault_code(struct cpu *c, const struct uop *u, unsigned vector, uint32_t code)
{
    cpu_fault_full(c, u, vector, real_or_vm86(c) && !(c->cr0 & CR0_PE) ? false : true, code);
}

OP(ud) { cpu_fault(c, u, EXC_UD); }
OP(gp0) { cpu_fault_code(c, u, EXC_GP, 0); }
OP(nm) { cpu_fault(c, u, EXC_NM); }

/* ---- the loop ---- */

static void raise_db(struct cpu *c, uint64_t dr6)
{
    if (c->guest_debug.flags & KVM_GUESTDBG_SINGLESTEP && dr6 & 0x4000) {
        c->debug_exit.exception = EXC_DB;
        c->debug_exit.pc = c->rip + (code64(c) ? 0 : c->segbase[SEG_CS]);
        c->debug_exit.dr6 = dr6 | 0xffff0ff0;
        c->debug_exit.dr7 = c->guest_debug.flags & KVM_GUESTDBG_USE_HW_BP ? c->guest_debug.dr[7] : c->dr[7];
        cpu_stop(c, NULL, TCG_STOP_DEBUG);
    }
    c->dr[6] = (c->dr[6] & ~0xfull) | dr6;
    cpu_fault_full(c, NULL, EXC_DB, false, 0);
}

/* Did the one instruction of `b` take a branch? */
static bool branched(const struct cpu *c, const struct block *b)
{
    return c->rip != ((c->bip + b->bytes) & c->ipmask) && !decode_repeats(b->uops[0].row);
}

/* Code breakpoints at RIP, the guest's or the debugger's. */
static void code_breakpoint(struct cpu *c)
{
    bool host = c->guest_debug.flags & KVM_GUESTDBG_USE_HW_BP;
    const uint64_t *dr = host ? c->guest_debug.dr : c->dr;
    uint64_t lin = c->rip + (code64(c) ? 0 : c->segbase[SEG_CS]), hit = 0;
    for (unsigned i = 0; i < 4; i++)
        if (dr[7] >> (2 * i) & 3 && !(dr[7] >> (16 + 4 * i) & 15) && dr[i] == lin)
            hit |= 1u << i;
    if (!hit)
        return;
    if (host) {
        c->debug_exit.exception = EXC_DB;
        c->debug_exit.pc = lin;
        c->debug_exit.dr6 = hit | 0xffff0ff0;
        c->debug_exit.dr7 = dr[7];
        cpu_stop(c, NULL, TCG_STOP_DEBUG);
    }
    if (c->sysflags & FL_RF)
        return;
    c->dr[6] = (c->dr[6] & ~0xfull) | hit;
    cpu_fault_full(c, NULL, EXC_DB, false, 0);
}

static bool watches(const uint64_t *dr)
{
    for (unsigned i = 0; i < 4; i++)
        if (dr[7] >> (2 * i) & 3 && dr[7] >> (16 + 4 * i) & 1)
            return true;
    return false;
}

static bool breakpoints_armed(struct cpu *c)
{
    bool watching = watches(c->dr) || (c->guest_debug.flags & KVM_GUESTDBG_USE_HW_BP && watches(c->guest_debug.dr));
    if (unlikely(watching != c->watching)) {
        c->watching = watching;
        cpu_flush_tlb(c);
    }
    return (c->dr[7] & 0xff) || ((c->guest_debug.flags & KVM_GUESTDBG_USE_HW_BP) && (c->guest_debug.dr[7] & 0xff));
}

static void injected(struct cpu *c)
{
    if (c->inject.exc) {
        c->inject.exc = false;
        c->exc.vector = c->inject.vector;
        c->exc.has_error = c->inject.has_error;
        c->exc.error = c->inject.error;
        c->exc.soft = c->exc.trap = false;
        deliver_exception(c);
    }
    if (c->inject.intr) {
        c->inject.intr = false;
        deliver_interrupt(c, c->inject.intr_vector, c->inject.soft, false);
    }
}

/* Everything that is not "run the next block". Returns true when cpu_run() must return c->stop. */
static bool attend(struct cpu *c)
{
    uint32_t r = atomic_exchange(&c->request, 0);
    if (r & CPU_REQ_TLB)
        cpu_flush_tlb(c);
    if (r & CPU_REQ_CODE)
        block_drain(c);
    if (r & CPU_REQ_EXIT && !c->io.answered) {
        cpu_request(c, r & (CPU_REQ_LINES | CPU_REQ_STEP));
        c->stop = TCG_STOP_CANCEL;
        return true;
    }
    if (c->io.answered) { /* the answered instruction comes before anything else */
        cpu_request(c, (r & ~(CPU_REQ_TLB | CPU_REQ_CODE)) | CPU_REQ_STEP);
        return false;
    }
    if (c->inject.exc || c->inject.intr)
        injected(c);
    if (r & CPU_REQ_LINES && !c->shadow) {
        uint32_t lines = atomic_load(&c->lines);
        if ((lines & LINE_NMI) && !c->nmi_masked) {
            uint32_t before = atomic_fetch_and(&c->lines, ~(uint32_t)(LINE_NMI | LINE_NMI2));
            if (before & LINE_NMI2)
                cpu_raise(c, LINE_NMI); /* when this one has ended */
            c->halted = false;
            deliver_interrupt(c, EXC_NMI, false, true);
        } else if (lines & LINE_NMI2) {
            cpu_lower(c, LINE_NMI2); /* while one runs, one more is kept */
        }
        if ((lines & LINE_INTR) && (c->sysflags & FL_IF)) {
            int vector = tcg_ack_interrupt(c);
            if (vector >= 0) {
                c->halted = false;
                c->stat.irqs++;
                deliver_interrupt(c, (unsigned)vector, false, false);
            }
            if (atomic_load(&c->lines) & LINE_INTR)
                cpu_irq_enabled(c);
        }
    } else if (r & CPU_REQ_LINES) {
        cpu_request(c, CPU_REQ_LINES);
    }
    if (c->want_window && cpu_interruptible(c)) {
        cpu_request(c, r & CPU_REQ_STEP);
        c->stop = TCG_STOP_WINDOW;
        return true;
    }
    if (c->shadow || (c->sysflags & (FL_TF | FL_RF)) || (c->guest_debug.flags & KVM_GUESTDBG_SINGLESTEP) || breakpoints_armed(c) ||
        (c->deadline == c->insns_end && c->budget < 64))
        cpu_request(c, CPU_REQ_STEP);
    return false;
}

/* After an instruction in step mode. */
static void stepped(struct cpu *c, const struct block *b, bool trap, uint8_t shadow)
{
    bool event = c->event_taken;
    uint8_t hit = c->watch_hit;
    c->io.answered = c->io.taken = 0;
    c->event_taken = false;
    if (c->shadow == shadow)
        c->shadow = 0;
    if (c->shadow & SHADOW_MOVSS)
        return; /* debug traps wait for the next instruction; watch_hit stays */
    c->watch_hit = 0;
    if (hit & 0xf0) {
        c->debug_exit.exception = EXC_DB;
        c->debug_exit.pc = c->rip + (code64(c) ? 0 : c->segbase[SEG_CS]);
        c->debug_exit.dr6 = (hit >> 4) | 0xffff0ff0;
        c->debug_exit.dr7 = c->guest_debug.dr[7];
        cpu_stop(c, NULL, TCG_STOP_DEBUG);
    }
    bool single = (trap || c->step_trap) && !event;
    if (unlikely(c->btf) && !(c->guest_debug.flags & KVM_GUESTDBG_SINGLESTEP))
        single = single && branched(c, b);
    c->step_trap = false;
    if (single || hit)
        raise_db(c, (single ? 0x4000 : 0) | hit);
}

static bool refill(struct cpu *c)
{
    uint64_t now = cpu_insns(c), next = now + BUDGET;
    if (c->deadline <= now)
        c->stop = TCG_STOP_CANCEL;
    else if (c->immediate_exit && *c->immediate_exit)
        c->stop = TCG_STOP_CANCEL;
    else
        c->stop = (enum tcg_stop)-1;
    if (c->deadline > now && c->deadline < next)
        next = c->deadline;
    if (c->assist_left) {
        c->stop = TCG_STOP_HANDBACK;
        c->assist_left = 0;
    }
    c->insns_end = next;
    c->budget = (int64_t)(next - now);
    return c->stop != (enum tcg_stop)-1;
}

static enum tcg_stop run(struct cpu *c)
{
    if (c->io.state == IO_DONE)
        io_answered(c);
    cpu_request(c, CPU_REQ_LINES);
    if (c->deadline < c->insns_end) { /* it came nearer meanwhile: the budget ends here, refill() plans anew */
        c->insns_end = cpu_insns(c);
        c->budget = 0;
    }
    switch (setjmp(c->escape)) {
    case ESCAPE_FAULT:
        c->io.answered = c->io.taken = 0;
        c->shadow = 0;
        c->watch_hit = 0;
        c->event_taken = false;
        c->block = NULL;
        c->link = NULL;
        c->budget--; /* time goes on, and kicks are seen, where a handler does nothing but fault */
        deliver_exception(c); /* may come here again: then in_delivery makes it a double fault */
        break;
    case ESCAPE_STOP:
        c->in_delivery = false;
        c->block = NULL;
        c->link = NULL;
        return c->stop;
    }
    for (;;) {
        bool step = false, trap = false;
        uint32_t mode = c->mode;
        uint8_t shadow = 0;
        if (unlikely(atomic_load_explicit(&c->request, memory_order_relaxed))) {
            c->link = NULL;
            if (attend(c))
                return c->stop;
            step = atomic_load_explicit(&c->request, memory_order_relaxed) & CPU_REQ_STEP;
            mode = c->mode;
            if (step) {
                mode |= MODE_STEP;
                c->event_taken = false; /* an INT since the last step says nothing about this one */
                if (breakpoints_armed(c) && !(c->shadow & SHADOW_MOVSS)) /* SDM vol. 3A, 6.8.3 */
                    code_breakpoint(c);
                trap = (c->sysflags & FL_TF) || (c->guest_debug.flags & KVM_GUESTDBG_SINGLESTEP);
                shadow = c->shadow;
                c->sysflags &= ~(uint32_t)FL_RF;
            }
        }
        if (unlikely(c->budget <= 0) && !c->io.answered && refill(c))
            return c->stop;
        struct block *b = block_find(c, mode);
        if (c->link && !step)
            block_connect(c, c->link, b);
        c->link = NULL;
        c->bip = c->rip;
        c->block = b;
        c->budget -= b->ninsn;
        if (c->budget < 0 && c->deadline == c->insns_end && b->ninsn > 1) { /* deterministic mode stops at the very instruction */
            c->budget += b->ninsn;
            c->block = NULL;
            cpu_request(c, CPU_REQ_STEP);
            continue;
        }
        const struct uop *u = b->uops;
        while (u)
            u = u->fn(c, u);
        c->block = NULL;
        if (unlikely(step))
            stepped(c, b, trap, shadow);
    }
}

enum tcg_stop cpu_run(struct cpu *c)
{
    struct fp_host host = fp_enter(c);
    uint64_t gs = jit_borrow_gs(c);
    enum tcg_stop stop = run(c);
    jit_return_gs(c, gs);
    c->tlb = &c->tlbs[mmu_index(c)]; /* not at a segment's edge (ea.c): that ended with the instruction */
    fp_leave(c, host);
    return stop;
}

void cpu_assist(struct cpu *c, uint32_t count, uint32_t flags)
{
    uint64_t now = cpu_insns(c);
    if (!(flags & ASSIST_KEEP))
        cpu_flush_code(c);
    cpu_io_forget(c);
    c->halted = false;
    c->assist_left = count;
    c->assist_partial = flags & ASSIST_PARTIAL;
    c->assist_leads = flags & ASSIST_LEADS;
    c->budget = count;
    c->insns_end = now + count;
}

/* ---- life ---- */

static void segment_reset(struct segment *s, uint16_t sel, uint64_t base, uint32_t attr)
{
    *s = (struct segment){.sel = sel, .base = base, .limit = 0xffff, .attr = attr};
}

void cpu_reset(struct cpu *c, bool init)
{
    uint64_t cr0_keep = init ? c->cr0 & (CR0_CD | CR0_NW) : CR0_CD | CR0_NW;
    memset(c->gpr, 0, sizeof c->gpr);
    c->zero = 0;
    c->gpr[RDX] = 0x600;
    c->cc = CC_ONE;
    c->sysflags = 2;
    c->rip = 0xfff0;
    segment_reset(&c->seg[SEG_CS], 0xf000, 0xffff0000, 0x9b);
    for (int i = 0; i <= SEG_GS; i++)
        if (i != SEG_CS)
            segment_reset(&c->seg[i], 0, 0, 0x93);
    segment_reset(&c->seg[SEG_TR], 0, 0, 0x8b);
    segment_reset(&c->seg[SEG_LDT], 0, 0, 0x82);
    c->gdt = c->idt = (struct dtable){0, 0xffff};
    c->cr0 = cr0_keep | CR0_ET;
    c->cr2 = c->cr3 = c->cr4 = c->cr8 = c->efer = 0;
    memset(c->dr, 0, sizeof c->dr);
    c->btf = false;
    c->dr[6] = 0xffff0ff0;
    c->dr[7] = 0x400;
    c->shadow = 0;
    atomic_store(&c->monitor, 0);
    c->nmi_masked = c->halted = c->in_delivery = false;
    memset(&c->inject, 0, sizeof c->inject);
    if (!init) {
        memset(&c->fpu, 0, sizeof c->fpu);
        memset(c->v, 0, sizeof c->v);
        c->fpu.cw = 0x40;
        c->fpu.valid = 0xff;
        c->mxcsr = 0x1f80;
        c->xcr0 = 1;
        c->xss = 0;
        c->pkru = 0;
        c->star = c->lstar = c->cstar = c->fmask = c->kernel_gs_base = c->tsc_aux = 0;
        c->sysenter_cs = c->sysenter_esp = c->sysenter_eip = 0;
        c->pat = 0x0007040600070406ull;
        c->misc_enable = 1;
    }
    cpu_update(c);
}

/* From here on the others' stores to code, and the host's, are told to this vCPU. */
static bool attach(struct cpu *c, struct tcg_vm_core *vm)
{
    pthread_mutex_lock(&vm->lock);
    uint32_t n = atomic_load(&vm->ncpu), i = 0;
    while (i < n && vm->cpu[i])
        i++;
    if (i < TCG_MAX_CPUS) {
        vm->cpu[i] = c;
        if (i == n)
            atomic_store(&vm->ncpu, n + 1);
    }
    pthread_mutex_unlock(&vm->lock);
    return i < TCG_MAX_CPUS;
}

static void detach(struct cpu *c, struct tcg_vm_core *vm)
{
    pthread_mutex_lock(&vm->lock);
    for (uint32_t i = 0; i < atomic_load(&vm->ncpu); i++)
        if (vm->cpu[i] == c)
            vm->cpu[i] = NULL;
    pthread_mutex_unlock(&vm->lock);
}

int cpu_init(struct cpu *c, struct tcg_vm_core *vm, uint32_t index)
{
    memset(c, 0, sizeof *c);
    c->vm = vm;
    c->index = index;
    c->phys_bits = 40;
    c->linear_bits = 48;
    c->deadline = ~0ull;
    for (unsigned m = 0; m < MMU_COUNT; m++) {
        for (unsigned i = 0; i < TLB_SIZE; i++)
            c->tlbs[m].e[i].rd = c->tlbs[m].e[i].wr = c->tlbs[m].e[i].ex = TLB_INVALID;
        c->tlbs[m].large_lo = 1;
    }
    pthread_mutex_init(&c->inval_lock, NULL);
    if (!block_init(c))
        return -ENOMEM;
    cpu_reset(c, false);
    cpu_update_features(c);
    return !vm || attach(c, vm) ? 0 : -ENOMEM;
}

void cpu_free(struct cpu *c)
{
    if (c->vm)
        detach(c, c->vm);
    block_free(c);
    xstate_free(c);
    pcid_free(c);
    pthread_mutex_destroy(&c->inval_lock);
}
