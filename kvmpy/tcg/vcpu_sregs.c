/* SPDX-License-Identifier: Apache-2.0
 *
 * KVM_GET/SET_SREGS and SREGS2: segments, tables, control registers, EFER, APIC base. The checks are those of
 * the kernel (a combination that no processor can be in is EINVAL).
 */
#include <errno.h>
#include <string.h>

#include "vm.h"

#define CR4_KNOWN                                                                                                   \
    (CR4_VME | CR4_PVI | CR4_TSD | CR4_DE | CR4_PSE | CR4_PAE | CR4_MCE | CR4_PGE | CR4_PCE | CR4_OSFXSR           \
     | CR4_OSXMMEXCPT | CR4_UMIP | CR4_LA57 | CR4_FSGSBASE | CR4_PCIDE | CR4_OSXSAVE | CR4_SMEP | CR4_SMAP | CR4_PKE)

/* struct kvm_sregs and kvm_sregs2 are the same up to apic_base; this is that part. */
struct common {
    struct kvm_segment cs, ds, es, fs, gs, ss, tr, ldt;
    struct kvm_dtable gdt, idt;
    uint64_t cr0, cr2, cr3, cr4, cr8, efer, apic_base;
};
_Static_assert(offsetof(struct kvm_sregs, interrupt_bitmap) == sizeof(struct common), "kvm_sregs changed");
_Static_assert(offsetof(struct kvm_sregs2, flags) == sizeof(struct common), "kvm_sregs2 changed");

static struct kvm_segment get_segment(const struct segment *s)
{
    return (struct kvm_segment){
        .base = s->base, .limit = s->limit, .selector = s->sel, .type = s->attr & 15, .s = (s->attr >> 4) & 1,
        .dpl = (s->attr >> ATTR_DPL_SHIFT) & 3, .present = (s->attr >> 7) & 1, .avl = (s->attr >> 12) & 1,
        .l = (s->attr >> 13) & 1, .db = (s->attr >> 14) & 1, .g = (s->attr >> 15) & 1, .unusable = (s->attr >> 16) & 1,
    };
}

static struct segment set_segment(const struct kvm_segment *s)
{
    return (struct segment){
        .base = s->base, .limit = s->limit, .sel = s->selector,
        .attr = (s->type & 15u) | (s->s & 1u) << 4 | (s->dpl & 3u) << ATTR_DPL_SHIFT | (s->present & 1u) << 7
              | (s->avl & 1u) << 12 | (s->l & 1u) << 13 | (s->db & 1u) << 14 | (s->g & 1u) << 15
              | (s->unusable & 1u) << 16,
    };
}

static void get_common(struct vcpu *vcpu, struct common *out)
{
    const struct cpu *c = &vcpu->cpu;
    out->cs = get_segment(&c->seg[SEG_CS]);
    out->ds = get_segment(&c->seg[SEG_DS]);
    out->es = get_segment(&c->seg[SEG_ES]);
    out->fs = get_segment(&c->seg[SEG_FS]);
    out->gs = get_segment(&c->seg[SEG_GS]);
    out->ss = get_segment(&c->seg[SEG_SS]);
    out->tr = get_segment(&c->seg[SEG_TR]);
    out->ldt = get_segment(&c->seg[SEG_LDT]);
    out->gdt = (struct kvm_dtable){.base = c->gdt.base, .limit = c->gdt.limit};
    out->idt = (struct kvm_dtable){.base = c->idt.base, .limit = c->idt.limit};
    out->cr0 = c->cr0;
    out->cr2 = c->cr2;
    out->cr3 = c->cr3;
    out->cr4 = c->cr4;
    out->cr8 = tcg_read_cr8(&vcpu->cpu);
    out->efer = c->efer;
    out->apic_base = c->apic_base;
}

static bool valid(const struct common *s)
{
    if (s->cr0 >> 32 || ((s->cr0 & CR0_NW) && !(s->cr0 & CR0_CD)) || ((s->cr0 & CR0_PG) && !(s->cr0 & CR0_PE)))
        return false;
    if (s->cr4 & ~(uint64_t)CR4_KNOWN)
        return false;
    if ((s->efer & EFER_LME) && (s->cr0 & CR0_PG))
        return (s->cr4 & CR4_PAE) && (s->efer & EFER_LMA) && !(s->cr3 >> 63);
    return !(s->efer & EFER_LMA) && !s->cs.l;
}

static bool set_apic_base(struct vcpu *vcpu, uint64_t base)
{
    if (vcpu->has_apic) {
        pthread_mutex_lock(&vcpu->vm->chips_lock);
        bool ok = lapic_set_base(&vcpu->apic, base, true, 0x2FF | ~((1ull << 52) - 1));
        pthread_mutex_unlock(&vcpu->vm->chips_lock);
        if (!ok)
            return false;
    }
    vcpu->cpu.apic_base = base;
    return true;
}

static long set_common(struct vcpu *vcpu, const struct common *in)
{
    struct cpu *c = &vcpu->cpu;
    if (!valid(in) || !set_apic_base(vcpu, in->apic_base))
        return -EINVAL;
    c->seg[SEG_CS] = set_segment(&in->cs);
    c->seg[SEG_DS] = set_segment(&in->ds);
    c->seg[SEG_ES] = set_segment(&in->es);
    c->seg[SEG_FS] = set_segment(&in->fs);
    c->seg[SEG_GS] = set_segment(&in->gs);
    c->seg[SEG_SS] = set_segment(&in->ss);
    c->seg[SEG_TR] = set_segment(&in->tr);
    c->seg[SEG_LDT] = set_segment(&in->ldt);
    c->gdt = (struct dtable){in->gdt.base, in->gdt.limit};
    c->idt = (struct dtable){in->idt.base, in->idt.limit};
    c->cr0 = in->cr0;
    c->cr2 = in->cr2;
    c->cr3 = in->cr3;
    c->cr4 = in->cr4;
    c->efer = in->efer;
    c->cr8 = vcpu->last_cr8 = in->cr8 & 15;
    tcg_cr8_changed(c);
    return 0;
}

static bool pae_paging(const struct cpu *c)
{
    return (c->cr0 & CR0_PG) && (c->cr4 & CR4_PAE) && !(c->efer & EFER_LMA);
}

static void finish(struct vcpu *vcpu)
{
    struct cpu *c = &vcpu->cpu;
    cpu_update(c);
    cpu_flush_tlb(c);
    /* User space that resets a vCPU by hand does not un-halt it; the kernel forgives that, so this does. */
    bool at_reset = c->rip == 0xFFF0 && c->seg[SEG_CS].sel == 0xF000 && c->seg[SEG_CS].base == 0xFFFF0000;
    if (at_reset && vcpu->id == vcpu->vm->boot_cpu_id && !(c->cr0 & CR0_PE))
        atomic_store(&vcpu->mp_state, KVM_MP_STATE_RUNNABLE);
}

void state_get_sregs(struct vcpu *vcpu, struct kvm_sregs *sregs)
{
    memset(sregs, 0, sizeof *sregs);
    get_common(vcpu, (struct common *)sregs);
    if (vcpu->cpu.inject.intr && !vcpu->cpu.inject.soft)
        sregs->interrupt_bitmap[vcpu->cpu.inject.intr_vector / 64] |= 1ull << (vcpu->cpu.inject.intr_vector % 64);
}

long state_set_sregs(struct vcpu *vcpu, const struct kvm_sregs *sregs)
{
    long error = set_common(vcpu, (const struct common *)sregs);
    if (error)
        return error;
    struct cpu *c = &vcpu->cpu;
    if (pae_paging(c)) /* as MOV CR3 does; entries that cannot be read are not present */
        if (!memory_read(vcpu, c->cr3 & 0xFFFFFFE0, c->pdpte, sizeof c->pdpte))
            memset(c->pdpte, 0, sizeof c->pdpte);
    for (unsigned vector = 0; vector < KVM_NR_INTERRUPTS; vector++) {
        if (sregs->interrupt_bitmap[vector / 64] & (1ull << (vector % 64))) {
            c->inject.intr = true;
            c->inject.soft = false;
            c->inject.intr_vector = vector;
            break;
        }
    }
    finish(vcpu);
    return 0;
}

void state_get_sregs2(struct vcpu *vcpu, struct kvm_sregs2 *sregs)
{
    memset(sregs, 0, sizeof *sregs);
    get_common(vcpu, (struct common *)sregs);
    if (pae_paging(&vcpu->cpu)) {
        memcpy(sregs->pdptrs, vcpu->cpu.pdpte, sizeof sregs->pdptrs);
        sregs->flags = KVM_SREGS2_FLAGS_PDPTRS_VALID;
    }
}

long state_set_sregs2(struct vcpu *vcpu, const struct kvm_sregs2 *sregs)
{
    bool pdptrs = sregs->flags & KVM_SREGS2_FLAGS_PDPTRS_VALID;
    bool pae = (sregs->cr0 & CR0_PG) && (sregs->cr4 & CR4_PAE) && !(sregs->efer & EFER_LMA);
    if ((sregs->flags & ~(uint64_t)KVM_SREGS2_FLAGS_PDPTRS_VALID) || (pdptrs && !pae))
        return -EINVAL;
    long error = set_common(vcpu, (const struct common *)sregs);
    if (error)
        return error;
    struct cpu *c = &vcpu->cpu;
    if (pdptrs)
        memcpy(c->pdpte, sregs->pdptrs, sizeof c->pdpte);
    else if (pae && !memory_read(vcpu, c->cr3 & 0xFFFFFFE0, c->pdpte, sizeof c->pdpte))
        memset(c->pdpte, 0, sizeof c->pdpte);
    finish(vcpu);
    return 0;
}
