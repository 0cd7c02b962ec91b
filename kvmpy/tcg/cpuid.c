/* SPDX-License-Identifier: Apache-2.0
 *
 * What the processor says it can do, and what the decoder may then decode.
 *
 * cpu_supported_cpuid() is KVM_GET_SUPPORTED_CPUID: the bits below are exactly the features whose instructions are in
 * table/. A feature is written once, in `bits`: where CPUID shows it and which gate (FEAT_*) it opens. The guest's table
 * (KVM_SET_CPUID2) closes gates: an instruction of a feature that it does not show raises #UD. Without a table all
 * gates are open, as with KVM.
 *
 * CPUID itself answers from the guest's table; the parts that follow the state of the processor (OSXSAVE, OSPKE, the size of
 * the XSAVE area) are put in when it is executed. Not announced: 0x15/0x16 (the TSC has no crystal).
 */
#include "fphost.h"
#include "op.h"

#include <linux/kvm.h>

#define ANY 0xff
static const struct { uint32_t leaf, subleaf; uint8_t reg, bit, feature; } bits[] = {
    /* 1 ECX */
    {1, 0, 2, 0, FEAT_SSE3}, {1, 0, 2, 1, FEAT_PCLMUL}, {1, 0, 2, 3, FEAT_MONITOR}, {1, 0, 2, 9, FEAT_SSSE3}, {1, 0, 2, 12, FEAT_FMA}, {1, 0, 2, 13, FEAT_CX16},
    {1, 0, 2, 17, FEAT_PCID}, {1, 0, 2, 19, FEAT_SSE41}, {1, 0, 2, 20, FEAT_SSE42}, {1, 0, 2, 22, FEAT_MOVBE}, {1, 0, 2, 23, FEAT_POPCNT},
    {1, 0, 2, 25, FEAT_AES}, {1, 0, 2, 26, FEAT_XSAVE}, {1, 0, 2, 28, FEAT_AVX}, {1, 0, 2, 29, FEAT_F16C}, {1, 0, 2, 30, FEAT_RDRAND},
    /* 1 EDX */
    {1, 0, 3, 0, FEAT_FPU}, {1, 0, 3, 1, FEAT_VME}, {1, 0, 3, 4, FEAT_TSC}, {1, 0, 3, 5, FEAT_MSR}, {1, 0, 3, 8, FEAT_CX8}, {1, 0, 3, 11, FEAT_SYSENTER},
    {1, 0, 3, 13, FEAT_PGE}, {1, 0, 3, 15, FEAT_CMOV}, {1, 0, 3, 19, FEAT_CLFLUSH}, {1, 0, 3, 23, FEAT_MMX}, {1, 0, 3, 24, FEAT_FXSR},
    {1, 0, 3, 25, FEAT_SSE}, {1, 0, 3, 26, FEAT_SSE2},
    /* 7 EBX, ECX, EDX */
    {7, 0, 1, 0, FEAT_FSGSBASE}, {7, 0, 1, 3, FEAT_BMI1}, {7, 0, 1, 5, FEAT_AVX2}, {7, 0, 1, 7, FEAT_SMEP}, {7, 0, 1, 8, FEAT_BMI2},
    {7, 0, 1, 9, FEAT_ERMS}, {7, 0, 1, 10, FEAT_INVPCID}, {7, 0, 1, 18, FEAT_RDSEED}, {7, 0, 1, 19, FEAT_ADX}, {7, 0, 1, 20, FEAT_SMAP},
    {7, 0, 1, 23, FEAT_CLFLUSHOPT}, {7, 0, 1, 24, FEAT_CLWB}, {7, 0, 1, 29, FEAT_SHA},
    {7, 0, 2, 2, FEAT_UMIP}, {7, 0, 2, 3, FEAT_PKU}, {7, 0, 2, 9, FEAT_VAES}, {7, 0, 2, 10, FEAT_VPCLMUL}, {7, 0, 2, 16, FEAT_LA57}, {7, 0, 2, 22, FEAT_RDPID}, {7, 0, 3, 4, FEAT_FSRM}, {7, 0, 3, 14, FEAT_SERIALIZE},
    /* 0xd.1 EAX */
    {0xd, 1, 0, 0, FEAT_XSAVEOPT}, {0xd, 1, 0, 1, FEAT_XSAVEC}, {0xd, 1, 0, 2, FEAT_XGETBV1}, {0xd, 1, 0, 3, FEAT_XSAVES},
    /* extended */
    {0x80000001, 0, 2, 0, FEAT_LAHF}, {0x80000001, 0, 2, 5, FEAT_LZCNT}, {0x80000001, 0, 2, 8, FEAT_PREFETCHW},
    {0x80000001, 0, 3, 11, FEAT_SYSCALL}, {0x80000001, 0, 3, 20, FEAT_NX}, {0x80000001, 0, 3, 26, FEAT_GBPAGES},
    {0x80000001, 0, 3, 27, FEAT_RDTSCP}, {0x80000001, 0, 3, 29, FEAT_LONGMODE},
};
/* Announced although no instruction hangs on them: DE PSE PAE MCE APIC MTRR MCA PAT PSE36 (leaf 1 EDX); HYPERVISOR. */
#define LEAF1_EDX_PLAIN (1u << 2 | 1u << 3 | 1u << 6 | 1u << 7 | 1u << 9 | 1u << 12 | 1u << 14 | 1u << 16 | 1u << 17)
#define LEAF7_EBX_PLAIN (1u << 1) /* IA32_TSC_ADJUST */
#define LEAF1_ECX_PLAIN (1u << 21 | 1u << 24 | 1u << 31) /* x2APIC, TSC deadline, hypervisor */

/* Features whose instructions are not (all) written yet are not announced. */
#include "announced.h"

static bool announced(unsigned feature) { return !(not_announced[feature / 64] >> (feature % 64) & 1) && fp_host_has(feature); }

static uint32_t feature_bits(uint32_t leaf, uint32_t subleaf, unsigned reg)
{
    uint32_t v = 0;
    for (unsigned i = 0; i < sizeof bits / sizeof bits[0]; i++)
        if (bits[i].leaf == leaf && bits[i].subleaf == subleaf && bits[i].reg == reg && announced(bits[i].feature))
            v |= 1u << bits[i].bit;
    return v;
}

static uint32_t xsave_size(uint64_t xcr0) { return xcr0 & 0x200 ? 2696 : xcr0 & 4 ? 832 : 576; }
static uint64_t xcr0_all(void) { return 3 | (announced(FEAT_AVX) ? 4 : 0) | (announced(FEAT_PKU) ? 0x200 : 0); }

uint32_t cpu_supported_cpuid(struct kvm_cpuid_entry2 *e, uint32_t max)
{
    static const char brand[48] = "kvmpy software CPU";
    uint32_t n = 0;
#define ENTRY(f, i, fl, a, b, cc, d)                                                                                       \
    do {                                                                                                                   \
        if (n < max)                                                                                                       \
            e[n] = (struct kvm_cpuid_entry2){.function = (f), .index = (i), .flags = (fl), .eax = (a), .ebx = (b), .ecx = (cc), .edx = (d)}; \
        n++;                                                                                                               \
    } while (0)
    const uint32_t indexed = KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
    ENTRY(0, 0, 0, 0xd, 0x756e6547, 0x6c65746e, 0x49656e69); /* GenuineIntel: see ops_system.c */
    ENTRY(1, 0, 0, 0x000506e3, 0x00010800, feature_bits(1, 0, 2) | LEAF1_ECX_PLAIN, feature_bits(1, 0, 3) | LEAF1_EDX_PLAIN);
    ENTRY(2, 0, 0, 0x00feff01, 0, 0, 0);
    ENTRY(4, 0, indexed, 0x121, 0x01c0003f, 0x3f, 1);
    ENTRY(4, 1, indexed, 0x122, 0x01c0003f, 0x3f, 1);
    ENTRY(4, 2, indexed, 0x143, 0x03c0003f, 0x3ff, 1);
    ENTRY(4, 3, indexed, 0, 0, 0, 0);
    ENTRY(5, 0, 0, 64, 64, 3, 0x10); /* MONITOR: lines of 64 bytes, ECX[0] of MWAIT works, one C1 */
    ENTRY(6, 0, 0, 4, 0, 0, 0); /* ARAT */
    /* Speculation controls, see ARCH_CAPABILITIES_NO in msr.c: IBRS and IBPB, STIBP, ARCH_CAPABILITIES, SSBD; then BHI_CTRL, MCDT_NO */
    ENTRY(7, 0, indexed, 2, feature_bits(7, 0, 1) | LEAF7_EBX_PLAIN, feature_bits(7, 0, 2), feature_bits(7, 0, 3) | 1u << 26 | 1u << 27 | 1u << 29 | 1u << 31);
    ENTRY(7, 1, indexed, 0, 0, 0, 0);
    ENTRY(7, 2, indexed, 0, 0, 0, 1u << 4 | 1u << 5);
    ENTRY(0xb, 0, indexed, 0, 1, 0x100, 0);
    ENTRY(0xb, 1, indexed, 0, 1, 0x201, 0);
    if (announced(FEAT_XSAVE)) {
        uint32_t all = (uint32_t)xcr0_all();
        ENTRY(0xd, 0, indexed, all, xsave_size(all), xsave_size(all), 0);
        ENTRY(0xd, 1, indexed, feature_bits(0xd, 1, 0), xsave_size(all), 0, 0);
        if (all & 4)
            ENTRY(0xd, 2, indexed, 256, 576, 0, 0);
        if (all & 0x200)
            ENTRY(0xd, 9, indexed, 8, 2688, 0, 0);
    }
    ENTRY(0x80000000, 0, 0, 0x80000008, 0, 0, 0);
    ENTRY(0x80000001, 0, 0, 0, 0, feature_bits(0x80000001, 0, 2), feature_bits(0x80000001, 0, 3));
    for (uint32_t i = 0; i < 3; i++) {
        uint32_t w[4];
        memcpy(w, brand + 16 * i, 16);
        ENTRY(0x80000002 + i, 0, 0, w[0], w[1], w[2], w[3]);
    }
    ENTRY(0x80000006, 0, 0, 0, 0, 0x01006040, 0);
    ENTRY(0x80000007, 0, 0, 0, 0, 0, 1u << 8); /* invariant TSC */
    ENTRY(0x80000008, 0, 0, 40 | (announced(FEAT_LA57) ? 57 : 48) << 8, 0, 0, 0);
    return n;
}

static const struct kvm_cpuid_entry2 *find(const struct cpu *c, uint32_t leaf, uint32_t subleaf)
{
    for (uint32_t i = 0; i < c->cpuid_count; i++) {
        const struct kvm_cpuid_entry2 *e = &c->cpuid[i];
        if (e->function == leaf && (!(e->flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX) || e->index == subleaf))
            return e;
    }
    return NULL;
}

void cpu_cpuid(struct cpu *c, uint32_t leaf, uint32_t subleaf, uint32_t out[4])
{
    const struct kvm_cpuid_entry2 *e = find(c, leaf, subleaf);
    memset(out, 0, 16);
    if (!e && !find(c, leaf, 0)) { /* beyond the last leaf Intel processors answer as for the highest basic one */
        const struct kvm_cpuid_entry2 *top = find(c, leaf & 0x80000000u, 0);
        if (top && leaf > top->eax && (leaf < 0x40000000 || leaf >= 0x80000000)) {
            const struct kvm_cpuid_entry2 *zero = find(c, 0, 0);
            if (zero)
                e = find(c, leaf = zero->eax, subleaf);
        }
    }
    if (!e) {
        if (leaf == 0xb)
            out[2] = subleaf & 0xff, out[3] = c->index;
        return;
    }
    out[0] = e->eax;
    out[1] = e->ebx;
    out[2] = e->ecx;
    out[3] = e->edx;
    if (leaf == 1) {
        if (!(c->apic_base & 0x800)) /* the local APIC is switched off in IA32_APIC_BASE */
            out[3] &= ~(1u << 9);
        out[2] = (out[2] & ~(1u << 27)) | (c->cr4 & CR4_OSXSAVE ? 1u << 27 : 0);
    }
    else if (leaf == 7 && subleaf == 0)
        out[2] = (out[2] & ~(1u << 4)) | (c->cr4 & CR4_PKE ? 1u << 4 : 0);
    else if (leaf == 0xd && subleaf == 0)
        out[1] = xsave_size(c->xcr0);
    else if (leaf == 0xd && subleaf == 1)
        out[1] = 576 + (c->xcr0 & 4 ? 256 : 0) + (c->xcr0 & 0x200 ? 8 : 0);
}

void cpu_update_features(struct cpu *c)
{
    if (!c->cpuid_count) {
        for (unsigned f = 0; f < FEAT_COUNT; f++)
            if (announced(f))
                c->features[f / 64] |= 1ull << f % 64;
        c->linear_bits = feature(c, FEAT_LA57) ? 57 : 48;
        return;
    }
    uint64_t gates[2] = {0, 0};
    for (unsigned f = 0; f < FEAT_COUNT; f++) { /* features without a CPUID bit of their own are always there */
        bool shown = true;
        for (unsigned i = 0; i < sizeof bits / sizeof bits[0]; i++)
            if (bits[i].feature == f) {
                const struct kvm_cpuid_entry2 *e = find(c, bits[i].leaf, bits[i].subleaf);
                uint32_t v = !e ? 0 : bits[i].reg == 0 ? e->eax : bits[i].reg == 1 ? e->ebx : bits[i].reg == 2 ? e->ecx : e->edx;
                shown = v >> bits[i].bit & 1;
            }
        if (shown && announced(f))
            gates[f / 64] |= 1ull << f % 64;
    }
    memcpy(c->features, gates, sizeof gates);
    c->linear_bits = feature(c, FEAT_LA57) ? 57 : 48;
    const struct kvm_cpuid_entry2 *sizes = find(c, 0x80000008, 0);
    if (sizes && (sizes->eax & 0xff) >= 32 && (sizes->eax & 0xff) <= 52)
        c->phys_bits = sizes->eax & 0xff;
    cpu_flush_code(c);
    cpu_flush_tlb(c);
}
