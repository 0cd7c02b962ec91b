/* SPDX-License-Identifier: Apache-2.0
 *
 * CPUID tables between user space and the core. What the core implements the core says (cpu_supported_cpuid);
 * here the leaves of the hypervisor are added, and those are true of this engine too.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "vm.h"

#define MAX_ENTRIES 256u /* KVM_MAX_CPUID_ENTRIES */
#define SIGNATURE_LEAF 0x40000000u
#define FEATURES_LEAF 0x40000001u

/* Documentation/virt/kvm/x86/cpuid.rst */
enum {
    FEATURE_CLOCKSOURCE = 1 << 0, FEATURE_NOP_IO_DELAY = 1 << 1, FEATURE_CLOCKSOURCE2 = 1 << 3,
    FEATURE_PV_UNHALT = 1 << 7, FEATURE_PV_SEND_IPI = 1 << 11, FEATURE_PV_SCHED_YIELD = 1 << 13,
    FEATURE_CLOCKSOURCE_STABLE = 1 << 24,
};

static uint32_t supported(struct kvm_cpuid_entry2 *entries, uint32_t max)
{
    uint32_t count = cpu_supported_cpuid(entries, max);
    for (uint32_t i = 0; i < count && i < max; i++)
        if (entries[i].function == SIGNATURE_LEAF)
            return count;
    if (count + 2 <= max) {
        static const char signature[12] = "KVMKVMKVM";
        struct kvm_cpuid_entry2 *e = &entries[count];
        memset(e, 0, 2 * sizeof *e);
        e[0].function = SIGNATURE_LEAF;
        e[0].eax = FEATURES_LEAF;
        memcpy(&e[0].ebx, signature, 4);
        memcpy(&e[0].ecx, signature + 4, 4);
        memcpy(&e[0].edx, signature + 8, 4);
        e[1].function = FEATURES_LEAF;
        e[1].eax = FEATURE_CLOCKSOURCE | FEATURE_NOP_IO_DELAY | FEATURE_CLOCKSOURCE2 | FEATURE_PV_UNHALT
                 | FEATURE_PV_SEND_IPI | FEATURE_PV_SCHED_YIELD | FEATURE_CLOCKSOURCE_STABLE;
    }
    return count + 2;
}

long cpuid_get_supported(uintptr_t user)
{
    struct kvm_cpuid2 *out = (struct kvm_cpuid2 *)user;
    struct kvm_cpuid_entry2 entries[MAX_ENTRIES];
    if (!out)
        return -EFAULT;
    uint32_t count = supported(entries, MAX_ENTRIES);
    if (out->nent < count)
        return -E2BIG;
    memcpy(out->entries, entries, count * sizeof entries[0]);
    out->nent = count;
    return 0;
}

static bool same(const struct kvm_cpuid_entry2 *a, const struct kvm_cpuid_entry2 *b)
{
    return a->function == b->function && a->index == b->index && a->flags == b->flags && a->eax == b->eax
        && a->ebx == b->ebx && a->ecx == b->ecx && a->edx == b->edx;
}

static long replace(struct vcpu *vcpu, const struct kvm_cpuid_entry2 *entries, uint32_t count)
{
    struct cpu *c = &vcpu->cpu;
    if (vcpu->has_run) { /* as the kernel: what the guest has seen stays true */
        bool equal = count == c->cpuid_count;
        for (uint32_t i = 0; i < count && equal; i++)
            equal = same(&entries[i], &c->cpuid[i]);
        return equal ? 0 : -EINVAL;
    }
    for (uint32_t i = 0; i < count; i++) {
        uint8_t linear = entries[i].eax >> 8;
        if (entries[i].function == 0x80000008 && linear != 0 && linear != 48 && linear != 57)
            return -EINVAL;
    }
    struct kvm_cpuid_entry2 *table = calloc(count ? count : 1, sizeof *table);
    if (!table)
        return -ENOMEM;
    memcpy(table, entries, count * sizeof *table);
    free(c->cpuid);
    c->cpuid = table;
    c->cpuid_count = count;
    cpu_update_features(c);
    cpu_update(c);
    return 0;
}

long cpuid_set(struct vcpu *vcpu, uintptr_t user)
{
    const struct kvm_cpuid2 *in = (const struct kvm_cpuid2 *)user;
    return in->nent > MAX_ENTRIES ? -E2BIG : replace(vcpu, in->entries, in->nent);
}

long cpuid_set_old(struct vcpu *vcpu, uintptr_t user)
{
    const struct kvm_cpuid *in = (const struct kvm_cpuid *)user;
    struct kvm_cpuid_entry2 entries[MAX_ENTRIES];
    if (in->nent > MAX_ENTRIES)
        return -E2BIG;
    memset(entries, 0, in->nent * sizeof entries[0]);
    for (uint32_t i = 0; i < in->nent; i++) {
        entries[i].function = in->entries[i].function;
        entries[i].eax = in->entries[i].eax;
        entries[i].ebx = in->entries[i].ebx;
        entries[i].ecx = in->entries[i].ecx;
        entries[i].edx = in->entries[i].edx;
    }
    return replace(vcpu, entries, in->nent);
}

long cpuid_get(struct vcpu *vcpu, uintptr_t user)
{
    struct kvm_cpuid2 *out = (struct kvm_cpuid2 *)user;
    uint32_t room = out->nent, count = vcpu->cpu.cpuid_count;
    out->nent = count;
    if (room < count)
        return -E2BIG;
    if (count)
        memcpy(out->entries, vcpu->cpu.cpuid, count * sizeof out->entries[0]);
    return 0;
}
