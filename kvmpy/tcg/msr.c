/* SPDX-License-Identifier: Apache-2.0
 *
 * Model-specific registers: one function that reads, one that writes, for the guest (RDMSR, WRMSR) and for user space
 * (KVM_GET_MSRS, KVM_SET_MSRS). `host` is set for user space, which may write what a guest may not.
 * Registers of the core are fields of struct cpu; the others live in vcpu.msr.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "vm.h"

enum {
    IA32_P5_MC_ADDR = 0x00, IA32_P5_MC_TYPE = 0x01, IA32_TSC = 0x10, KVM_WALL_CLOCK_OLD = 0x11, KVM_SYSTEM_TIME_OLD = 0x12,
    IA32_PLATFORM_ID = 0x17, IA32_APIC_BASE = 0x1B, EBL_CR_POWERON = 0x2A, EBC_FREQUENCY_ID = 0x2C, SMI_COUNT = 0x34,
    IA32_FEATURE_CONTROL = 0x3A, IA32_TSC_ADJUST = 0x3B, IA32_SPEC_CTRL = 0x48, IA32_PRED_CMD = 0x49,
    IA32_UCODE_WRITE = 0x79, IA32_UCODE_REV = 0x8B, PLATFORM_INFO = 0xCE, IA32_MTRRCAP = 0xFE, IA32_ARCH_CAPABILITIES = 0x10A,
    IA32_SYSENTER_CS = 0x174, IA32_SYSENTER_ESP, IA32_SYSENTER_EIP, IA32_MCG_CAP = 0x179, IA32_MCG_STATUS = 0x17A,
    P6_PERFCTR0 = 0xC1, P6_PERFCTR1 = 0xC2, P6_EVNTSEL0 = 0x186, P6_EVNTSEL1 = 0x187, IA32_PERF_STATUS = 0x198,
    IA32_PERF_CTL = 0x199, IA32_MISC_ENABLE = 0x1A0, IA32_DEBUGCTL = 0x1D9, LAST_BRANCH_FROM = 0x1DB, LAST_INT_TO = 0x1DE,
    MTRR_VARIABLE = 0x200, MTRR_FIX_64K = 0x250, MTRR_FIX_16K_80000 = 0x258, MTRR_FIX_16K_A0000 = 0x259,
    MTRR_FIX_4K = 0x268, IA32_PAT = 0x277, MTRR_DEF_TYPE = 0x2FF, RAPL_POWER_UNIT = 0x606, PKG_ENERGY_STATUS = 0x611,
    DRAM_ENERGY_STATUS = 0x619, PP0_ENERGY_STATUS = 0x639, PP1_ENERGY_STATUS = 0x641, IA32_TSC_DEADLINE = 0x6E0,
    X2APIC_FIRST = 0x800, X2APIC_LAST = 0x8FF, IA32_XSS = 0xDA0, KVM_WALL_CLOCK = 0x4B564D00, KVM_SYSTEM_TIME = 0x4B564D01,
};
#define MSR_EFER 0xC0000080u
#define MSR_STAR 0xC0000081u
#define MSR_LSTAR 0xC0000082u
#define MSR_CSTAR 0xC0000083u
#define MSR_FMASK 0xC0000084u
#define MSR_FS_BASE 0xC0000100u
#define MSR_GS_BASE 0xC0000101u
#define MSR_KERNEL_GS_BASE 0xC0000102u
#define MSR_TSC_AUX 0xC0000103u
#define AMD_SYSCFG 0xC0010010u
#define AMD_HWCR 0xC0010015u
#define AMD_NB_CFG 0xC001001Fu
#define AMD_PATCH_LEVEL_LOADER 0xC0010020u
#define AMD_INT_PENDING 0xC0010055u
#define AMD_MMIO_CONF_BASE 0xC0010058u
#define AMD_BU_CFG2 0xC001102Au
#define AMD_DC_CFG 0xC0011022u

#define DEBUGCTL_BTF (1ull << 1)

enum { MSR_OK = 0, MSR_FAULT = 1, MSR_UNKNOWN = -1 };

#define MTRR_PAIRS 8u
#define MTRRCAP (MTRR_PAIRS | 1u << 8 | 1u << 10) /* fixed ranges, write combining */
/* IA32_ARCH_CAPABILITIES: nothing here speculates on behalf of the guest, so none of the "vulnerable unless" bits is missing:
 * RDCL, IBRS_ALL, L1DFL, SSB, MDS, IF_PSCHANGE_MC, TAA, SBDR_SSDP, FBSDP, PSDP, BHI, PBRSB, GDS, RFDS, ITS. Linux wants to
 * see the controls in IA32_SPEC_CTRL besides (CPUID 7), else it clears a branch history by a loop at every system call. They
 * are kept and change nothing. */
#define ARCH_CAPABILITIES_NO                                                                                            \
    (1ull | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 13 | 1 << 14 | 1 << 15 | 1 << 20 | 1 << 24 | 1 << 26 | \
     1 << 27 | 1ull << 62)
#define SPEC_CTRL_BITS (7ull | 1 << 10) /* IBRS, STIBP, SSBD; BHI_DIS_S */

bool msr_feature(uint32_t index, __u64 *value)
{
    switch (index) {
    case IA32_UCODE_REV: *value = 0x100000000ull; return true;
    case IA32_ARCH_CAPABILITIES: *value = ARCH_CAPABILITIES_NO; return true;
    default: return false;
    }
}

void msr_reset(struct vcpu *vcpu)
{
    memset(&vcpu->msr, 0, sizeof vcpu->msr);
    msr_feature(IA32_UCODE_REV, &vcpu->msr.ucode_rev);
    msr_feature(IA32_ARCH_CAPABILITIES, &vcpu->msr.arch_capabilities);
}

static bool cpuid_bit(struct vcpu *vcpu, uint32_t leaf, unsigned reg, unsigned bit)
{
    uint32_t out[4];
    cpu_cpuid(&vcpu->cpu, leaf, 0, out);
    return out[reg] & (1u << bit);
}
enum { CPUID_EAX, CPUID_EBX, CPUID_ECX, CPUID_EDX };

/* ---- time ---- */

uint64_t vcpu_tsc(struct vcpu *vcpu)
{
#if defined(__x86_64__)
    if (unlikely(vcpu->host_tsc))
        return __builtin_ia32_rdtsc() + vcpu->tsc_offset;
#endif
    return clock_ns_to_ticks(clock_now(&vcpu->vm->clock), vcpu->tsc_khz) + vcpu->tsc_offset;
}

uint64_t vcpu_tsc_to_clock(struct vcpu *vcpu, uint64_t tsc)
{
    uint64_t now = vcpu_tsc(vcpu);
    if ((int64_t)(tsc - now) <= 0)
        return clock_now(&vcpu->vm->clock);
    return clock_now(&vcpu->vm->clock) + clock_ticks_to_ns(tsc - now, vcpu->tsc_khz);
}

uint64_t tcg_rdtsc(struct cpu *c)
{
    time_sync(vcpu_of(c));
    return vcpu_tsc(vcpu_of(c));
}

static void write_tsc(struct vcpu *vcpu, uint64_t value, bool host)
{
    uint64_t delta = value - vcpu_tsc(vcpu);
    vcpu->tsc_offset += delta;
    if (!host) /* SDM vol. 3B 18.17.3: a write to the TSC moves TSC_ADJUST by the same amount */
        vcpu->tsc_adjust += delta;
    atomic_fetch_or(&vcpu->events, EVENT_CLOCK);
}

static void write_deadline(struct vcpu *vcpu, uint64_t tsc)
{
    uint64_t when = tsc ? vcpu_tsc_to_clock(vcpu, tsc) : 0;
    pthread_mutex_lock(&vcpu->vm->chips_lock);
    lapic_set_tsc_deadline(&vcpu->apic, tsc, when);
    pthread_mutex_unlock(&vcpu->vm->chips_lock);
}

static uint64_t read_deadline(struct vcpu *vcpu)
{
    pthread_mutex_lock(&vcpu->vm->chips_lock);
    uint64_t tsc = lapic_get_tsc_deadline(&vcpu->apic);
    pthread_mutex_unlock(&vcpu->vm->chips_lock);
    return tsc;
}

/* ---- local APIC ---- */

static int access_x2apic(struct vcpu *vcpu, uint32_t index, uint64_t *value, bool write)
{
    if (!vcpu->has_apic)
        return MSR_FAULT;
    pthread_mutex_lock(&vcpu->vm->chips_lock);
    bool ok = write ? lapic_write_msr(&vcpu->apic, index, *value) : lapic_read_msr(&vcpu->apic, index, value);
    pthread_mutex_unlock(&vcpu->vm->chips_lock);
    return ok ? MSR_OK : MSR_FAULT;
}

static int write_apic_base(struct vcpu *vcpu, uint64_t value, bool host)
{
    if (vcpu->has_apic) {
        uint64_t reserved = 0x2FF | ~((1ull << vcpu->cpu.phys_bits) - 1);
        if (!host && !cpuid_bit(vcpu, 1, CPUID_ECX, 21))
            reserved |= APIC_BASE_X2APIC;
        pthread_mutex_lock(&vcpu->vm->chips_lock);
        bool ok = lapic_set_base(&vcpu->apic, value, host, reserved);
        pthread_mutex_unlock(&vcpu->vm->chips_lock);
        if (!ok)
            return MSR_FAULT;
    }
    vcpu->cpu.apic_base = value;
    cpu_update_features(&vcpu->cpu); /* CPUID's APIC bit follows it */
    return MSR_OK;
}

/* ---- MTRRs and PAT: kept, without effect: guest memory is all write-back ---- */

static uint64_t *mtrr(struct vcpu *vcpu, uint32_t index)
{
    if (index >= MTRR_VARIABLE && index < MTRR_VARIABLE + 2 * MTRR_PAIRS)
        return &vcpu->msr.mtrr_variable[index - MTRR_VARIABLE];
    if (index == MTRR_FIX_64K)
        return &vcpu->msr.mtrr_fixed[0];
    if (index == MTRR_FIX_16K_80000 || index == MTRR_FIX_16K_A0000)
        return &vcpu->msr.mtrr_fixed[1 + index - MTRR_FIX_16K_80000];
    if (index >= MTRR_FIX_4K && index < MTRR_FIX_4K + 8)
        return &vcpu->msr.mtrr_fixed[3 + index - MTRR_FIX_4K];
    return index == MTRR_DEF_TYPE ? &vcpu->msr.mtrr_def_type : NULL;
}

static bool valid_memory_type(uint8_t type, bool pat)
{
    return type == 0 || type == 1 || type == 4 || type == 5 || type == 6 || (pat && type == 7);
}

static bool valid_types(uint64_t eight, bool pat)
{
    for (unsigned i = 0; i < 8; i++)
        if (!valid_memory_type(eight >> (i * 8), pat))
            return false;
    return true;
}

static bool valid_mtrr(struct vcpu *vcpu, uint32_t index, uint64_t value)
{
    if (index == MTRR_DEF_TYPE)
        return !(value & ~0xCFFull) && valid_memory_type(value, false);
    if (index >= MTRR_FIX_64K)
        return valid_types(value, false);
    uint64_t beyond = ~((1ull << vcpu->cpu.phys_bits) - 1);
    if (index & 1)
        return !(value & (beyond | 0x7FF));
    return !(value & (beyond | 0xF00)) && valid_memory_type(value, false);
}

/* ---- the registers ---- */

/* Those that are there but hold nothing: they read 0, and a write of 0 goes through. */
static bool is_zero_msr(uint32_t index)
{
    switch (index) {
    case IA32_P5_MC_ADDR: case IA32_P5_MC_TYPE: case IA32_PLATFORM_ID: case EBL_CR_POWERON: case SMI_COUNT: case PLATFORM_INFO:
    case IA32_MCG_CAP: case P6_PERFCTR0: case P6_PERFCTR1: case P6_EVNTSEL0: case P6_EVNTSEL1: case IA32_PERF_CTL:
    case RAPL_POWER_UNIT: case PKG_ENERGY_STATUS: case DRAM_ENERGY_STATUS: case PP0_ENERGY_STATUS: case PP1_ENERGY_STATUS:
    case IA32_XSS: case AMD_SYSCFG: case AMD_HWCR: case AMD_NB_CFG: case AMD_INT_PENDING: case AMD_MMIO_CONF_BASE:
    case AMD_BU_CFG2: case AMD_DC_CFG:
        return true;
    default:
        return index >= LAST_BRANCH_FROM && index <= LAST_INT_TO;
    }
}

static int read_core_msr(struct vcpu *vcpu, uint32_t index, uint64_t *value)
{
    const struct cpu *c = &vcpu->cpu;
    switch (index) {
    case IA32_APIC_BASE: *value = c->apic_base; return MSR_OK;
    case IA32_SYSENTER_CS: *value = c->sysenter_cs; return MSR_OK;
    case IA32_SYSENTER_ESP: *value = c->sysenter_esp; return MSR_OK;
    case IA32_SYSENTER_EIP: *value = c->sysenter_eip; return MSR_OK;
    case IA32_PAT: *value = c->pat; return MSR_OK;
    case IA32_MISC_ENABLE: *value = c->misc_enable; return MSR_OK;
    case MSR_EFER: *value = c->efer; return MSR_OK;
    case MSR_STAR: *value = c->star; return MSR_OK;
    case MSR_LSTAR: *value = c->lstar; return MSR_OK;
    case MSR_CSTAR: *value = c->cstar; return MSR_OK;
    case MSR_FMASK: *value = c->fmask; return MSR_OK;
    case MSR_FS_BASE: *value = c->seg[SEG_FS].base; return MSR_OK;
    case MSR_GS_BASE: *value = c->seg[SEG_GS].base; return MSR_OK;
    case MSR_KERNEL_GS_BASE: *value = c->kernel_gs_base; return MSR_OK;
    case MSR_TSC_AUX: *value = c->tsc_aux; return MSR_OK;
    default: return MSR_UNKNOWN;
    }
}

static int write_core_msr(struct vcpu *vcpu, uint32_t index, uint64_t value, bool host)
{
    struct cpu *c = &vcpu->cpu;
    switch (index) {
    case IA32_SYSENTER_ESP: case IA32_SYSENTER_EIP: case MSR_LSTAR: case MSR_CSTAR: case MSR_FS_BASE: case MSR_GS_BASE:
    case MSR_KERNEL_GS_BASE:
        if (!cpu_canonical_base(c, value))
            return MSR_FAULT;
    }
    switch (index) {
    case IA32_APIC_BASE: return write_apic_base(vcpu, value, host);
    case IA32_SYSENTER_CS: c->sysenter_cs = value; return MSR_OK;
    case IA32_SYSENTER_ESP: c->sysenter_esp = value; return MSR_OK;
    case IA32_SYSENTER_EIP: c->sysenter_eip = value; return MSR_OK;
    case IA32_PAT:
        if (!valid_types(value, true))
            return MSR_FAULT;
        c->pat = value;
        return MSR_OK;
    case IA32_MISC_ENABLE: c->misc_enable = value; cpu_update_features(c); return MSR_OK;
    case MSR_EFER:
        if (!host)
            return cpu_set_efer(c, value) ? MSR_FAULT : MSR_OK;
        if (value & ~(uint64_t)(EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE | EFER_FFXSR))
            return MSR_FAULT;
        c->efer = value;
        cpu_update(c);
        cpu_flush_tlb(c);
        return MSR_OK;
    case MSR_STAR: c->star = value; return MSR_OK;
    case MSR_LSTAR: c->lstar = value; return MSR_OK;
    case MSR_CSTAR: c->cstar = value; return MSR_OK;
    case MSR_FMASK: c->fmask = value & 0xFFFFFFFF; return MSR_OK;
    case MSR_FS_BASE: cpu_set_segbase(c, SEG_FS, value); return MSR_OK;
    case MSR_GS_BASE: cpu_set_segbase(c, SEG_GS, value); return MSR_OK;
    case MSR_KERNEL_GS_BASE: c->kernel_gs_base = value; return MSR_OK;
    case MSR_TSC_AUX:
        if (value >> 32)
            return MSR_FAULT;
        c->tsc_aux = value;
        return MSR_OK;
    default: return MSR_UNKNOWN;
    }
}

int msr_read(struct vcpu *vcpu, uint32_t index, uint64_t *value, bool host)
{
    int result = read_core_msr(vcpu, index, value);
    if (result != MSR_UNKNOWN)
        return result;
    if (index >= X2APIC_FIRST && index <= X2APIC_LAST)
        return access_x2apic(vcpu, index, value, false);
    const uint64_t *range = mtrr(vcpu, index);
    if (range) {
        *value = *range;
        return MSR_OK;
    }
    switch (index) {
    case IA32_TSC: *value = vcpu_tsc(vcpu); return MSR_OK;
    case IA32_TSC_ADJUST:
        if (!host && !cpuid_bit(vcpu, 7, CPUID_EBX, 1))
            return MSR_UNKNOWN;
        *value = vcpu->tsc_adjust;
        return MSR_OK;
    case IA32_TSC_DEADLINE:
        *value = vcpu->has_apic ? read_deadline(vcpu) : 0;
        return vcpu->has_apic || host ? MSR_OK : MSR_FAULT;
    case KVM_WALL_CLOCK_OLD: case KVM_WALL_CLOCK: *value = vcpu->msr.wall_clock; return MSR_OK;
    case KVM_SYSTEM_TIME_OLD: case KVM_SYSTEM_TIME: *value = vcpu->msr.system_time; return MSR_OK;
    case IA32_FEATURE_CONTROL: *value = 1; return MSR_OK; /* locked, nothing enabled: there is no VMX */
    case EBC_FREQUENCY_ID: *value = 1u << 24; return MSR_OK;
    case IA32_UCODE_REV: *value = vcpu->msr.ucode_rev; return MSR_OK;
    case AMD_PATCH_LEVEL_LOADER: *value = 0; return MSR_OK;
    case IA32_MTRRCAP: *value = MTRRCAP; return MSR_OK;
    case IA32_PERF_STATUS: *value = 1000ull | 4ull << 40; return MSR_OK; /* as KVM: TSC increment, bus ratio */
    case IA32_MCG_STATUS: *value = vcpu->msr.mcg_status; return MSR_OK;
    case IA32_DEBUGCTL: *value = vcpu->cpu.btf ? DEBUGCTL_BTF : 0; return MSR_OK;
    case IA32_ARCH_CAPABILITIES:
        if (!host && !cpuid_bit(vcpu, 7, CPUID_EDX, 29))
            return MSR_UNKNOWN;
        *value = vcpu->msr.arch_capabilities;
        return MSR_OK;
    case IA32_SPEC_CTRL:
        if (!host && !cpuid_bit(vcpu, 7, CPUID_EDX, 26))
            return MSR_UNKNOWN;
        *value = vcpu->msr.spec_ctrl;
        return MSR_OK;
    default:
        *value = 0;
        return is_zero_msr(index) ? MSR_OK : MSR_UNKNOWN;
    }
}

int msr_write(struct vcpu *vcpu, uint32_t index, uint64_t value, bool host)
{
    int result = write_core_msr(vcpu, index, value, host);
    if (result != MSR_UNKNOWN)
        return result;
    if (index >= X2APIC_FIRST && index <= X2APIC_LAST)
        return access_x2apic(vcpu, index, &value, true);
    uint64_t *range = mtrr(vcpu, index);
    if (range) {
        if (!valid_mtrr(vcpu, index, value))
            return MSR_FAULT;
        *range = value;
        return MSR_OK;
    }
    switch (index) {
    case IA32_TSC: write_tsc(vcpu, value, host); return MSR_OK;
    case IA32_TSC_ADJUST:
        if (!host && !cpuid_bit(vcpu, 7, CPUID_EBX, 1))
            return MSR_UNKNOWN;
        if (!host) {
            vcpu->tsc_offset += value - vcpu->tsc_adjust;
            atomic_fetch_or(&vcpu->events, EVENT_CLOCK);
        }
        vcpu->tsc_adjust = value;
        return MSR_OK;
    case IA32_TSC_DEADLINE:
        if (!vcpu->has_apic)
            return host && !value ? MSR_OK : MSR_FAULT;
        write_deadline(vcpu, value);
        return MSR_OK;
    case KVM_WALL_CLOCK_OLD: case KVM_WALL_CLOCK: case KVM_SYSTEM_TIME_OLD: case KVM_SYSTEM_TIME:
        return kvmclock_write_msr(vcpu, index == KVM_SYSTEM_TIME || index == KVM_SYSTEM_TIME_OLD, value) ? MSR_OK : MSR_FAULT;
    case IA32_FEATURE_CONTROL: return host && value <= 1 ? MSR_OK : MSR_FAULT;
    case IA32_UCODE_WRITE: case AMD_PATCH_LEVEL_LOADER: return MSR_OK; /* an update that changes nothing */
    case IA32_UCODE_REV:
        if (host)
            vcpu->msr.ucode_rev = value;
        return MSR_OK; /* guests write 0 before they read it */
    case IA32_MCG_STATUS:
        if (!host && value)
            return MSR_FAULT;
        vcpu->msr.mcg_status = value;
        return MSR_OK;
    case IA32_DEBUGCTL: /* no LBR */
        if (value & ~DEBUGCTL_BTF)
            return MSR_FAULT;
        vcpu->cpu.btf = value & DEBUGCTL_BTF;
        return MSR_OK;
    case IA32_ARCH_CAPABILITIES:
        if (!host)
            return MSR_FAULT;
        vcpu->msr.arch_capabilities = value;
        return MSR_OK;
    case IA32_SPEC_CTRL:
        if (!host && !cpuid_bit(vcpu, 7, CPUID_EDX, 26))
            return MSR_UNKNOWN;
        if (value & ~SPEC_CTRL_BITS)
            return MSR_FAULT;
        vcpu->msr.spec_ctrl = value;
        return MSR_OK;
    case IA32_PRED_CMD:
        return (host || cpuid_bit(vcpu, 7, CPUID_EDX, 26)) && !(value & ~1ull) ? MSR_OK : MSR_FAULT;
    case IA32_MTRRCAP: case IA32_PERF_STATUS: case EBC_FREQUENCY_ID: return host ? MSR_OK : MSR_FAULT; /* read only */
    default:
        if (!is_zero_msr(index))
            return MSR_UNKNOWN;
        return value ? MSR_FAULT : MSR_OK;
    }
}

/* ---- for the core ---- */

/* #GP in the guest, or a question to user space if it wants this kind (KVM_CAP_X86_USER_SPACE_MSR). */
static int refuse(struct cpu *c, uint32_t reason)
{
    if (!(atomic_load(&vcpu_of(c)->vm->msr_exit_reasons) & reason))
        return 1;
    c->msr_reason = reason;
    return 2;
}

int tcg_rdmsr(struct cpu *c, uint32_t index, uint64_t *value)
{
    struct vcpu *vcpu = vcpu_of(c);
    time_sync(vcpu);
    if (!msr_allowed(vcpu->vm, index, false))
        return refuse(c, KVM_MSR_EXIT_REASON_FILTER);
    int result = msr_read(vcpu, index, value, false);
    if (!result)
        return 0;
    return refuse(c, result == MSR_UNKNOWN ? KVM_MSR_EXIT_REASON_UNKNOWN : KVM_MSR_EXIT_REASON_INVAL);
}

int tcg_wrmsr(struct cpu *c, uint32_t index, uint64_t value)
{
    struct vcpu *vcpu = vcpu_of(c);
    time_sync(vcpu);
    if (!msr_allowed(vcpu->vm, index, true))
        return refuse(c, KVM_MSR_EXIT_REASON_FILTER);
    int result = msr_write(vcpu, index, value, false);
    if (!result)
        return 0;
    return refuse(c, result == MSR_UNKNOWN ? KVM_MSR_EXIT_REASON_UNKNOWN : KVM_MSR_EXIT_REASON_INVAL);
}

/* CR8 and the task priority: of the LAPIC where there is one. */
void tcg_cr8_changed(struct cpu *c)
{
    struct vcpu *vcpu = vcpu_of(c);
    if (!vcpu->has_apic) {
        if (c->cr8 < vcpu->last_cr8) /* user space's PIC may now have something that beats it */
            vcpu_post(vcpu, EVENT_SET_TPR);
        vcpu->last_cr8 = c->cr8;
        return;
    }
    pthread_mutex_lock(&vcpu->vm->chips_lock);
    lapic_set_tpr(&vcpu->apic, (c->cr8 & 15) << 4);
    pthread_mutex_unlock(&vcpu->vm->chips_lock);
}

uint64_t tcg_read_cr8(struct cpu *c)
{
    struct vcpu *vcpu = vcpu_of(c);
    if (vcpu->has_apic)
        c->cr8 = lapic_get_tpr(&vcpu->apic) >> 4; /* only this thread writes it */
    return c->cr8;
}
