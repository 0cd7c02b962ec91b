/* SPDX-License-Identifier: Apache-2.0
 *
 * Registers of a vCPU in the kernel's structures: general, x87/SSE, XSAVE, XCR0, debug registers.
 * The vCPU is not running: struct cpu is exact.
 */
#include <errno.h>
#include <string.h>

#include "vm.h"
#include "xstate.h"

void state_get_regs(struct vcpu *vcpu, struct kvm_regs *regs)
{
    const struct cpu *c = &vcpu->cpu;
    *regs = (struct kvm_regs){
        .rax = c->gpr[RAX], .rbx = c->gpr[RBX], .rcx = c->gpr[RCX], .rdx = c->gpr[RDX],
        .rsi = c->gpr[RSI], .rdi = c->gpr[RDI], .rsp = c->gpr[RSP], .rbp = c->gpr[RBP],
        .r8 = c->gpr[R8], .r9 = c->gpr[R9], .r10 = c->gpr[R10], .r11 = c->gpr[R11],
        .r12 = c->gpr[R12], .r13 = c->gpr[R13], .r14 = c->gpr[R14], .r15 = c->gpr[R15],
        .rip = c->rip, .rflags = cpu_rflags(c),
    };
}

void state_set_regs(struct vcpu *vcpu, const struct kvm_regs *regs)
{
    struct cpu *c = &vcpu->cpu;
    uint32_t vm86 = c->sysflags & FL_VM;
    const uint64_t gpr[16] = {
        [RAX] = regs->rax, [RBX] = regs->rbx, [RCX] = regs->rcx, [RDX] = regs->rdx,
        [RSI] = regs->rsi, [RDI] = regs->rdi, [RSP] = regs->rsp, [RBP] = regs->rbp,
        [R8] = regs->r8, [R9] = regs->r9, [R10] = regs->r10, [R11] = regs->r11,
        [R12] = regs->r12, [R13] = regs->r13, [R14] = regs->r14, [R15] = regs->r15,
    };
    memcpy(c->gpr, gpr, sizeof gpr);
    if (c->rip != regs->rip) { /* the access that waits for its answer belongs to an instruction that is left */
        cpu_io_forget(c);
        vcpu->pending_io = false;
    }
    c->rip = regs->rip;
    cpu_set_rflags(c, regs->rflags | 2);
    c->inject.exc = false;
    if (vm86 != (c->sysflags & FL_VM)) {
        cpu_update(c);
    } else {
        cpu_io_forget(c);
        cpu_request(c, CPU_REQ_LINES | CPU_REQ_STEP);
    }
}

void state_get_fpu(struct vcpu *vcpu, struct kvm_fpu *fpu)
{
    const struct cpu *c = &vcpu->cpu;
    memset(fpu, 0, sizeof *fpu); /* mxcsr too: KVM_GET_FPU and KVM_SET_FPU do not carry it, KVM_GET_XSAVE does */
    for (unsigned i = 0; i < 8; i++)
        memcpy(fpu->fpr[i], c->fpu.r[(c->fpu.top + i) & 7].raw, 10);
    fpu->fcw = c->fpu.cw;
    fpu->fsw = (c->fpu.sw & ~(7u << 11)) | (c->fpu.top & 7u) << 11;
    fpu->ftwx = c->fpu.valid;
    fpu->last_opcode = c->fpu.fop;
    fpu->last_ip = c->fpu.fip;
    fpu->last_dp = c->fpu.fdp;
    for (unsigned i = 0; i < 16; i++)
        memcpy(fpu->xmm[i], c->v[i].b, 16);
}

void state_set_fpu(struct vcpu *vcpu, const struct kvm_fpu *fpu)
{
    struct cpu *c = &vcpu->cpu;
    c->fpu.top = (fpu->fsw >> 11) & 7;
    c->fpu.sw = fpu->fsw & ~(7u << 11);
    c->fpu.cw = fpu->fcw;
    c->fpu.valid = fpu->ftwx;
    c->fpu.fop = fpu->last_opcode & 0x7FF;
    c->fpu.fip = fpu->last_ip;
    c->fpu.fdp = fpu->last_dp;
    for (unsigned i = 0; i < 8; i++)
        memcpy(c->fpu.r[(c->fpu.top + i) & 7].raw, fpu->fpr[i], 10);
    for (unsigned i = 0; i < 16; i++)
        memcpy(c->v[i].b, fpu->xmm[i], 16);
}

/* ---- XSAVE ---- */

enum { XSTATE_BV = 512, XCOMP_BV = 520, MXCSR = 24 };
#define XCR0_X87 1u
#define XCR0_SSE 2u
#define XCR0_AVX 4u

static uint64_t find_supported_xcr0(void)
{
    struct kvm_cpuid_entry2 entries[256];
    uint32_t count = cpu_supported_cpuid(entries, 256);
    for (uint32_t i = 0; i < count && i < 256; i++)
        if (entries[i].function == 0xD && entries[i].index == 0)
            return entries[i].eax | (uint64_t)entries[i].edx << 32;
    return XCR0_X87 | XCR0_SSE;
}

/* XCR0 bits that this processor has (CPUID 0xD). Asked once: under a hypervisor each of the host's CPUID is an exit. */
static uint64_t supported_xcr0(void)
{
    static _Atomic uint64_t known;
    uint64_t value = atomic_load_explicit(&known, memory_order_relaxed);
    if (!value)
        atomic_store_explicit(&known, value = find_supported_xcr0(), memory_order_relaxed);
    return value;
}

void state_get_xsave(struct vcpu *vcpu, struct kvm_xsave *xsave)
{
    memset(xsave->region, 0, sizeof xsave->region);
    cpu_xsave_store(&vcpu->cpu, (uint8_t *)xsave->region, supported_xcr0());
}

long state_set_xsave(struct vcpu *vcpu, const struct kvm_xsave *xsave)
{
    const uint8_t *area = (const uint8_t *)xsave->region;
    struct cpu *c = &vcpu->cpu;
    uint64_t present, compacted, supported = supported_xcr0();
    uint32_t mxcsr;
    memcpy(&present, area + XSTATE_BV, 8);
    memcpy(&compacted, area + XCOMP_BV, 8);
    memcpy(&mxcsr, area + MXCSR, 4);
    if ((present & ~(supported | c->carried)) || compacted || (mxcsr & ~0xFFFFu))
        return -EINVAL;
    if (cpu_xsave_load(c, area, supported))
        return -EINVAL;
    xstate_load_carried(c, area, present);
    return 0;
}

void state_get_xcrs(struct vcpu *vcpu, struct kvm_xcrs *xcrs)
{
    memset(xcrs, 0, sizeof *xcrs);
    xcrs->nr_xcrs = 1;
    xcrs->xcrs[0].value = vcpu->cpu.xcr0;
}

long state_set_xcrs(struct vcpu *vcpu, const struct kvm_xcrs *xcrs)
{
    if (xcrs->nr_xcrs > KVM_MAX_XCRS || xcrs->flags)
        return -EINVAL;
    for (uint32_t i = 0; i < xcrs->nr_xcrs; i++) {
        if (xcrs->xcrs[i].xcr != 0)
            continue;
        uint64_t value = xcrs->xcrs[i].value;
        bool avx_alone = (value & XCR0_AVX) && !(value & XCR0_SSE);
        if (!(value & XCR0_X87) || (value & ~(supported_xcr0() | vcpu->cpu.carried)) || avx_alone)
            return -EINVAL;
        vcpu->cpu.xcr0 = value;
        cpu_update(&vcpu->cpu);
        return 0;
    }
    return 0;
}

/* ---- debug registers ---- */

void state_get_debugregs(struct vcpu *vcpu, struct kvm_debugregs *regs)
{
    memset(regs, 0, sizeof *regs);
    memcpy(regs->db, vcpu->cpu.dr, sizeof regs->db);
    regs->dr6 = vcpu->cpu.dr[6];
    regs->dr7 = vcpu->cpu.dr[7];
}

long state_set_debugregs(struct vcpu *vcpu, const struct kvm_debugregs *regs)
{
    if (regs->flags || regs->dr6 >> 32 || regs->dr7 >> 32)
        return -EINVAL;
    memcpy(vcpu->cpu.dr, regs->db, sizeof regs->db);
    vcpu->cpu.dr[6] = regs->dr6;
    vcpu->cpu.dr[7] = regs->dr7;
    cpu_update(&vcpu->cpu);
    return 0;
}
