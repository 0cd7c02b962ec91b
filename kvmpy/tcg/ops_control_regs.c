/* SPDX-License-Identifier: Apache-2.0
 *
 * Control and debug registers, descriptor tables, LAR and its family, MSRs, TSC, CPUID, random numbers, SMAP and PKU
 * switches, TLB maintenance. The cpu_set_*() functions do the checks of SDM vol. 2 (MOV CR) and vol. 3A 2.5 and the
 * consequences: mode, TLB flush, PDPTE load.
 */
#include "op.h"
#include "xstate.h"

#include <sys/random.h>

int cpu_set_cr0(struct cpu *c, uint64_t v)
{
    uint64_t old = c->cr0;
    v = (v & 0xe005003f) | CR0_ET;
    if ((v & CR0_PG && !(v & CR0_PE)) || (v & CR0_NW && !(v & CR0_CD)))
        return 1;
    if (v & CR0_PG && !(old & CR0_PG)) {
        if (c->efer & EFER_LME) {
            if (!(c->cr4 & CR4_PAE) || c->seg[SEG_CS].attr & ATTR_L)
                return 1;
            c->efer |= EFER_LMA;
        } else if (c->cr4 & CR4_PAE && !mmu_load_pdptes(c, c->cr3)) {
            return 1;
        }
    } else if (!(v & CR0_PG) && old & CR0_PG) {
        if (code64(c) || c->cr4 & CR4_PCIDE)
            return 1;
        c->efer &= ~(uint64_t)EFER_LMA;
    }
    c->cr0 = v;
    if ((old ^ v) & CR0_PE) {
        if (v & CR0_PE)
            c->cpl = 0;
        else
            c->cpl = 0;
    }
    if ((old ^ v) & (CR0_PG | CR0_WP | CR0_PE))
        cpu_flush_tlb(c);
    cpu_update_mode(c);
    return 0;
}

int cpu_set_cr3(struct cpu *c, uint64_t v)
{
    bool pcide = c->cr4 & CR4_PCIDE && long_mode(c), keep = pcide && v >> 63;
    if (pcide)
        v &= ~(1ull << 63);
    if (long_mode(c) && v >> c->phys_bits)
        return 1;
    if (!long_mode(c) && c->cr0 & CR0_PG && c->cr4 & CR4_PAE && !mmu_load_pdptes(c, v))
        return 1;
    unsigned from = c->cr3 & 0xfff;
    c->cr3 = v;
    if (pcide)
        pcid_switch(c, from, v & 0xfff, keep);
    else
        mmu_flush_local(c);
    return 0;
}

int cpu_set_cr4(struct cpu *c, uint64_t v)
{
    uint64_t old = c->cr4, may = CR4_TSD | CR4_DE | CR4_PSE | CR4_PAE | CR4_MCE | CR4_PGE | CR4_PCE | CR4_OSFXSR | CR4_OSXMMEXCPT;
    if (feature(c, FEAT_UMIP))
        may |= CR4_UMIP;
    if (feature(c, FEAT_FSGSBASE))
        may |= CR4_FSGSBASE;
    if (feature(c, FEAT_XSAVE))
        may |= CR4_OSXSAVE;
    if (feature(c, FEAT_SMEP))
        may |= CR4_SMEP;
    if (feature(c, FEAT_SMAP))
        may |= CR4_SMAP;
    if (feature(c, FEAT_PKU))
        may |= CR4_PKE;
    if (feature(c, FEAT_PCID))
        may |= CR4_PCIDE;
    if (feature(c, FEAT_LA57))
        may |= CR4_LA57;
    if (feature(c, FEAT_VME))
        may |= CR4_VME | CR4_PVI;
    if (v & ~may)
        return 1;
    if (long_mode(c) && (!(v & CR4_PAE) || (v ^ old) & CR4_LA57))
        return 1;
    if (v & CR4_PCIDE && !(old & CR4_PCIDE) && (!long_mode(c) || c->cr3 & 0xfff))
        return 1;
    if (!long_mode(c) && c->cr0 & CR0_PG && v & CR4_PAE && (old ^ v) & (CR4_PAE | CR4_PGE | CR4_PSE | CR4_SMEP) && !mmu_load_pdptes(c, c->cr3))
        return 1;
    c->cr4 = v;
    if ((old ^ v) & (CR4_PGE | CR4_PSE | CR4_PAE | CR4_SMEP | CR4_SMAP | CR4_PKE | CR4_PCIDE | CR4_LA57))
        cpu_flush_tlb(c);
    cpu_update_mode(c);
    return 0;
}

int cpu_set_efer(struct cpu *c, uint64_t v)
{
    uint64_t may = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE;
    if (v & ~may)
        return 1;
    if ((v ^ c->efer) & EFER_LME && c->cr0 & CR0_PG)
        return 1;
    bool flush = (v ^ c->efer) & EFER_NXE;
    c->efer = (v & ~(uint64_t)EFER_LMA) | (c->efer & EFER_LMA);
    if (flush)
        cpu_flush_tlb(c);
    cpu_update_mode(c);
    return 0;
}

int cpu_set_xcr0(struct cpu *c, uint64_t v)
{
    uint64_t may = 3 | (feature(c, FEAT_AVX) ? 4 : 0) | (feature(c, FEAT_PKU) ? 0x200 : 0);
    may |= c->carried;
    if (v & ~may || !(v & 1) || ((v & 4) && !(v & 2)))
        return 1;
    if ((v & XSTATE_AVX512) && ((v & XSTATE_AVX512) != XSTATE_AVX512 || !(v & 4)))
        return 1;
    c->xcr0 = v;
    cpu_update_mode(c);
    return 0;
}

/* ---- MOV CR, MOV DR, CLTS, LMSW, SMSW ---- */
static uint64_t word(const struct cpu *c, uint64_t v) { return code64(c) ? v : (uint32_t)v; }

OP(movfromcr_rr)
{
    uint64_t v;
    switch (u->s) {
    case 0: v = c->cr0; break;
    case 2: v = c->cr2; break;
    case 3: v = c->cr3; break;
    case 4: v = c->cr4; break;
    case 8: v = tcg_read_cr8(c); break;
    default: cpu_fault(c, u, EXC_UD);
    }
    R64(c, u->d) = word(c, v);
    NEXT;
}
OP(movtocr_rr)
{
    uint64_t v = word(c, R64(c, u->s));
    int bad = 0;
    switch (u->d) {
    case 0: bad = v >> 32 ? 1 : cpu_set_cr0(c, v); break;
    case 2: c->cr2 = v; break;
    case 3: bad = cpu_set_cr3(c, v); break;
    case 4: bad = cpu_set_cr4(c, v); break;
    case 8:
        bad = v > 15;
        if (!bad) {
            c->cr8 = v;
            tcg_cr8_changed(c);
        }
        break;
    default: cpu_fault(c, u, EXC_UD);
    }
    if (bad)
        cpu_fault_code(c, u, EXC_GP, 0);
    LEAVE_AFTER;
}
OP(movfromdr_rr)
{
    unsigned n = u->s;
    if ((n == 4 || n == 5) && c->cr4 & CR4_DE)
        cpu_fault(c, u, EXC_UD);
    if (c->dr[7] >> 13 & 1) {
        c->dr[6] |= 1 << 13;
        cpu_fault_full(c, u, EXC_DB, false, 0);
    }
    R64(c, u->d) = word(c, c->dr[n == 4 || n == 5 ? n + 2 : n]);
    NEXT;
}
OP(movtodr_rr)
{
    unsigned n = u->d;
    uint64_t v = word(c, R64(c, u->s));
    if ((n == 4 || n == 5) && c->cr4 & CR4_DE)
        cpu_fault(c, u, EXC_UD);
    if (c->dr[7] >> 13 & 1) {
        c->dr[6] |= 1 << 13;
        cpu_fault_full(c, u, EXC_DB, false, 0);
    }
    if (n == 4 || n == 5)
        n += 2;
    if (n >= 6 && v >> 32)
        cpu_fault_code(c, u, EXC_GP, 0);
    c->dr[n] = n == 6 ? (v & 0xe00f) | 0xffff0ff0 : n == 7 ? (v & 0xffff2bff) | 0x400 : v;
    if (n == 7)
        cpu_request(c, CPU_REQ_STEP);
    LEAVE_AFTER;
}
OP(clts)
{
    c->cr0 &= ~(uint64_t)CR0_TS;
    cpu_update_mode(c);
    LEAVE_AFTER;
}
static void umip(struct cpu *c, const struct uop *u)
{
    if (c->cr4 & CR4_UMIP && c->cpl)
        cpu_fault_code(c, u, EXC_GP, 0);
}
#define STORE_WORD(name, value)                                                                \
    OP(name##_r16) { umip(c, u); SET16(u->d, value); NEXT; }                                   \
    OP(name##_r32) { umip(c, u); SET32(u->d, value); NEXT; }                                   \
    OP(name##_r64) { umip(c, u); SET64(u->d, value); NEXT; }                                   \
    OP(name##_m16) { umip(c, u); st16(c, u, ea(c, u), (uint16_t)(value)); NEXT; }              \
    OP(name##_m32) { umip(c, u); st16(c, u, ea(c, u), (uint16_t)(value)); NEXT; }              \
    OP(name##_m64) { umip(c, u); st16(c, u, ea(c, u), (uint16_t)(value)); NEXT; }
STORE_WORD(sldt, c->seg[SEG_LDT].sel)
STORE_WORD(str, c->seg[SEG_TR].sel)
STORE_WORD(smsw, c->cr0)
static const struct uop *lmsw(struct cpu *c, const struct uop *u, uint16_t v)
{
    uint64_t cr0 = (c->cr0 & ~0xeull) | (v & 0xf); /* can set PE, cannot clear it */
    if (cpu_set_cr0(c, cr0))
        cpu_fault_code(c, u, EXC_GP, 0);
    LEAVE_AFTER;
}
OP(lmsw_r) { return lmsw(c, u, GET16(u->d)); }
OP(lmsw_m) { return lmsw(c, u, ld16(c, u, ea(c, u))); }

/* ---- descriptor tables ---- */
static void store_table(struct cpu *c, const struct uop *u, const struct dtable *t)
{
    umip(c, u);
    uint64_t a = ea(c, u);
    mem_check_write(c, u, a, code64(c) ? 10 : 6, 0);
    st16(c, u, a, t->limit);
    if (code64(c))
        st64(c, u, a + 2, t->base);
    else
        st32(c, u, a + 2, (uint32_t)t->base);
}
static void load_table(struct cpu *c, const struct uop *u, struct dtable *t)
{
    uint64_t a = ea(c, u);
    uint16_t limit = ld16(c, u, a);
    uint64_t base = code64(c) ? ld64(c, u, a + 2) : ld32(c, u, a + 2);
    if (code64(c) && !cpu_canonical_base(c, base))
        cpu_fault_code(c, u, EXC_GP, 0);
    if (u->x && !code64(c)) /* 16-bit operand: 24 bits of base */
        base &= 0xffffff;
    t->limit = limit;
    t->base = base;
}
OP(sgdt_m) { store_table(c, u, &c->gdt); NEXT; }
OP(sidt_m) { store_table(c, u, &c->idt); NEXT; }
OP(lgdt_m) { load_table(c, u, &c->gdt); LEAVE_AFTER; }
OP(lidt_m) { load_table(c, u, &c->idt); LEAVE_AFTER; }

static void system_segment(struct cpu *c, const struct uop *u, uint16_t sel, struct segment *s)
{
    uint64_t d, high;
    if (sel & 4 || !desc_fetch(c, u, sel, &d))
        cpu_fault_code(c, u, EXC_GP, sel & 0xfffc);
    desc_to_segment(sel, d, s);
    if (long_mode(c)) {
        if (!desc_fetch(c, u, (uint16_t)(sel + 8), &high) || high >> 40 & 31)
            cpu_fault_code(c, u, EXC_GP, sel & 0xfffc);
        s->base |= high << 32;
        if (!cpu_canonical_base(c, s->base))
            cpu_fault_code(c, u, EXC_GP, sel & 0xfffc);
    }
}
static const struct uop *lldt(struct cpu *c, const struct uop *u, uint16_t sel)
{
    struct segment s = {.sel = sel, .attr = ATTR_UNUSABLE};
    if (sel & 0xfffc) {
        system_segment(c, u, sel, &s);
        if ((s.attr & 0x1f) != 2)
            cpu_fault_code(c, u, EXC_GP, sel & 0xfffc);
        if (!(s.attr & ATTR_P))
            cpu_fault_code(c, u, EXC_NP, sel & 0xfffc);
    }
    c->seg[SEG_LDT] = s;
    LEAVE_AFTER;
}
OP(lldt_r) { return lldt(c, u, GET16(u->d)); }
OP(lldt_m) { return lldt(c, u, ld16(c, u, ea(c, u))); }
static const struct uop *ltr(struct cpu *c, const struct uop *u, uint16_t sel)
{
    struct segment s;
    if (!(sel & 0xfffc))
        cpu_fault_code(c, u, EXC_GP, 0);
    system_segment(c, u, sel, &s);
    if ((s.attr & 0x1f) != 9 && (long_mode(c) || (s.attr & 0x1f) != 1))
        cpu_fault_code(c, u, EXC_GP, sel & 0xfffc);
    if (!(s.attr & ATTR_P))
        cpu_fault_code(c, u, EXC_NP, sel & 0xfffc);
    sys_write(c, u, c->gdt.base + (sel & 0xfff8) + 5, 1, (s.attr & 0xff) | 2);
    s.attr |= 2;
    c->seg[SEG_TR] = s;
    LEAVE_AFTER;
}
OP(ltr_r) { return ltr(c, u, GET16(u->d)); }
OP(ltr_m) { return ltr(c, u, ld16(c, u, ea(c, u))); }

static void set_zf(struct cpu *c, bool z) { c->cc = (uint16_t)((c->cc & ~CC_ZF) | (z ? CC_ZF : 0)); }
/* Is `sel` visible at this level? Types: bit mask of system types that count. */
static bool visible(struct cpu *c, const struct uop *u, uint16_t sel, uint32_t types, uint64_t *d)
{
    struct segment s;
    if (!(sel & 0xfffc) || !desc_fetch(c, u, sel, d))
        return false;
    desc_to_segment(sel, *d, &s);
    if (!(s.attr & ATTR_S)) {
        if (!(types >> (s.attr & 15) & 1))
            return false;
    } else if ((s.attr & 0xc) == 0xc) {
        return true;
    }
    return seg_dpl(&s) >= c->cpl && seg_dpl(&s) >= (sel & 3u);
}
static bool lar(struct cpu *c, const struct uop *u, uint16_t sel, uint64_t *v)
{
    uint64_t d;
    bool ok = visible(c, u, sel, long_mode(c) ? 0x1a04 : 0x1a3e, &d);
    set_zf(c, ok);
    *v = d >> 32 & 0x00f0ff00;
    return ok;
}
static bool lsl(struct cpu *c, const struct uop *u, uint16_t sel, uint64_t *v)
{
    uint64_t d;
    struct segment s;
    bool ok = visible(c, u, sel, long_mode(c) ? 0x0a04 : 0x0a0e, &d);
    set_zf(c, ok);
    if (ok) {
        desc_to_segment(sel, d, &s);
        *v = s.limit;
    }
    return ok;
}
#define LAR(bits, name)                                                                                \
    OP(name##_rr##bits) { uint64_t v; if (name(c, u, GET16(u->s), &v)) SET##bits(u->d, v); NEXT_RETURN; } \
    OP(name##_rm##bits) { uint64_t v; if (name(c, u, ld16(c, u, ea(c, u)), &v)) SET##bits(u->d, v); NEXT_RETURN; }
EACH_WIDE(LAR, lar)
EACH_WIDE(LAR, lsl)
static void verify(struct cpu *c, const struct uop *u, uint16_t sel, bool write)
{
    uint64_t d;
    bool ok = visible(c, u, sel, 0, &d);
    if (ok) {
        bool code = d >> 43 & 1, rw = d >> 41 & 1;
        ok = write ? !code && rw : !code || rw;
    }
    set_zf(c, ok);
}
OP(verr_r) { verify(c, u, GET16(u->d), false); NEXT; }
OP(verr_m) { verify(c, u, ld16(c, u, ea(c, u)), false); NEXT; }
OP(verw_r) { verify(c, u, GET16(u->d), true); NEXT; }
OP(verw_m) { verify(c, u, ld16(c, u, ea(c, u)), true); NEXT; }
OP(arpl_rr)
{
    uint16_t a = GET16(u->d), b = GET16(u->s);
    bool less = (a & 3) < (b & 3);
    set_zf(c, less);
    if (less)
        SET16(u->d, (a & ~3) | (b & 3));
    NEXT;
}
OP(arpl_mr)
{
    uint64_t lin = ea(c, u);
    uint16_t a = (uint16_t)ld_rmw(c, u, lin, 2), b = GET16(u->s);
    bool less = (a & 3) < (b & 3);
    st16(c, u, lin, less ? (uint16_t)((a & ~3) | (b & 3)) : a);
    set_zf(c, less);
    NEXT;
}

/* ---- TLB ---- */
OP(invlpg_m) { mmu_invlpg(c, ea(c, u)); LEAVE_AFTER; }
OP(invpcid_rm)
{
    uint64_t a = ea(c, u), type = word(c, R64(c, u->d)), d0 = ld64(c, u, a), lin = ld64(c, u, a + 8);
    if (type > 3 || d0 >> 12 || (type == 0 && !cpu_canonical_base(c, lin)) || (type < 2 && d0 && !(c->cr4 & CR4_PCIDE)))
        cpu_fault_code(c, u, EXC_GP, 0);
    bool present = !(c->cr4 & CR4_PCIDE) || d0 == (c->cr3 & 0xfff);
    if (type == 2) { /* everything, global translations too */
        cpu_flush_tlb(c);
    } else if (type == 3) { /* all but those */
        mmu_flush_local(c);
        pcid_forget_all(c);
    } else if (!present) { /* one address or one PCID that is not loaded: its entries are all in a bag */
        pcid_forget(c, (unsigned)d0);
    } else if (type == 1) {
        mmu_flush_local(c);
    } else {
        mmu_invlpg(c, lin);
    }
    LEAVE_AFTER;
}

/* ---- MSRs, time, identification, randomness ---- */
OP(rdmsr)
{
    uint64_t v = 0;
    if (io_msr(c, u, false, GET32(RCX * 8), &v))
        cpu_fault_code(c, u, EXC_GP, 0);
    SET32(0, (uint32_t)v);
    SET32(RDX * 8, (uint32_t)(v >> 32));
    LEAVE_AFTER;
}
OP(wrmsr)
{
    uint64_t v = (uint64_t)GET32(RDX * 8) << 32 | GET32(0);
    if (io_msr(c, u, true, GET32(RCX * 8), &v))
        cpu_fault_code(c, u, EXC_GP, 0);
    LEAVE_AFTER;
}
static void tsc(struct cpu *c, const struct uop *u)
{
    processor_only(c, u);
    if (c->cr4 & CR4_TSD && c->cpl)
        cpu_fault_code(c, u, EXC_GP, 0);
    uint64_t v = tcg_rdtsc(c);
    SET32(0, (uint32_t)v);
    SET32(RDX * 8, (uint32_t)(v >> 32));
}
OP(rdtsc) { tsc(c, u); LEAVE_AFTER; }
OP(rdtscp)
{
    tsc(c, u);
    SET32(RCX * 8, (uint32_t)c->tsc_aux);
    LEAVE_AFTER;
}
OP(rdpid_r32) { SET64(u->d, (uint32_t)c->tsc_aux); NEXT; }
OP(rdpid_r64) { SET64(u->d, (uint32_t)c->tsc_aux); NEXT; }
OP(rdpmc) { cpu_fault_code(c, u, EXC_GP, 0); } /* there are no counters */
OP(cpuid)
{
    processor_only(c, u);
    uint32_t out[4];
    cpu_cpuid(c, GET32(0), GET32(RCX * 8), out);
    SET32(0, out[0]);
    SET32(RBX * 8, out[1]);
    SET32(RCX * 8, out[2]);
    SET32(RDX * 8, out[3]);
    LEAVE_AFTER;
}
static uint64_t random64(struct cpu *c)
{
    uint64_t v = 0;
    if (c->vm && c->vm->deterministic) { /* splitmix64 */
        uint64_t z = (c->vm->seed += 0x9e3779b97f4a7c15ull);
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ z >> 27) * 0x94d049bb133111ebull;
        return z ^ z >> 31;
    }
    while (getrandom(&v, sizeof v, 0) != sizeof v)
        ;
    return v;
}
#define RANDOM(bits, name) OP(name##_r##bits) { SET##bits(u->d, random64(c)); c->cc = CC_ONE | CC_CF; NEXT_RETURN; }
EACH_WIDE(RANDOM, rdrand)
EACH_WIDE(RANDOM, rdseed)

/* ---- SMAP, PKU, XCR0 ---- */
static inline void set_ac(struct cpu *c, bool on)
{
    c->sysflags = on ? c->sysflags | FL_AC : c->sysflags & ~(uint32_t)FL_AC;
    c->tlb = &c->tlbs[on ? MMU_KERNEL_AC : MMU_KERNEL];
}
OP(stac) { set_ac(c, true); NEXT; }
OP(clac) { set_ac(c, false); NEXT; }
OP(rdpkru)
{
    if (!(c->cr4 & CR4_PKE))
        cpu_fault(c, u, EXC_UD);
    if (GET32(RCX * 8))
        cpu_fault_code(c, u, EXC_GP, 0);
    SET32(0, c->pkru);
    SET32(RDX * 8, 0);
    NEXT;
}
OP(wrpkru)
{
    if (!(c->cr4 & CR4_PKE))
        cpu_fault(c, u, EXC_UD);
    if (GET32(RCX * 8) || GET32(RDX * 8))
        cpu_fault_code(c, u, EXC_GP, 0);
    cpu_set_pkru(c, GET32(0));
    LEAVE_AFTER;
}
OP(xgetbv)
{
    whole_xstate_only(c, u);
    if (!(c->cr4 & CR4_OSXSAVE))
        cpu_fault(c, u, EXC_UD);
    uint32_t n = GET32(RCX * 8);
    if (n > feature(c, FEAT_XGETBV1))
        cpu_fault_code(c, u, EXC_GP, 0);
    SET32(0, (uint32_t)c->xcr0); /* 1: XINUSE; saying "all in use" is allowed */
    SET32(RDX * 8, 0);
    NEXT;
}
OP(xsetbv)
{
    whole_xstate_only(c, u);
    if (!(c->cr4 & CR4_OSXSAVE))
        cpu_fault(c, u, EXC_UD);
    if (GET32(RCX * 8) || cpu_set_xcr0(c, (uint64_t)GET32(RDX * 8) << 32 | GET32(0)))
        cpu_fault_code(c, u, EXC_GP, 0);
    LEAVE_AFTER;
}
