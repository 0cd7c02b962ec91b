/* SPDX-License-Identifier: Apache-2.0
 *
 * Entering and leaving the guest's floating-point settings; #XM (SDM vol. 1, 11.5 and table 11-1). See fphost.h.
 */
#include "fphost.h"

#include <cpuid.h>
#include <string.h>

#include "optable.h"

struct fp_host fp_enter(struct cpu *c)
{
    struct fp_host was;
    was.mxcsr = host_stmxcsr();
    __asm__ volatile("fnstcw %0" : "=m"(was.cw));
    fp_reload(c);
    return was;
}

void fp_leave(struct cpu *c, struct fp_host was)
{
    fp_sync(c);
    host_ldmxcsr(was.mxcsr);
    __asm__ volatile("fnclex\n\tfldcw %0" : : "m"(was.cw));
}

void fp_reload_x87(struct cpu *c)
{
    __asm__ volatile("fnclex\n\tfldcw %0" : : "m"(c->fpu.cw));
}

void fp_reload(struct cpu *c)
{
    host_ldmxcsr(c->mxcsr | MX_MASKS);
    fp_reload_x87(c);
}

void fp_trap_begin(struct cpu *c, const union vec *dst)
{
    fp_sync(c);
    if (dst)
        c->v[30] = *dst;
    uint32_t run = (c->mxcsr & ~MX_FLAGS) | MX_MASKS;
    if (!(c->mxcsr & MX_UM))
        run &= ~MX_FTZ; /* flushing needs underflow to be masked: SDM vol. 1, 10.2.3.3 */
    host_ldmxcsr(run);
}

static bool tiny(const union vec *v, enum fp_kind kind, unsigned n)
{
    for (unsigned i = 0; i < n; i++) {
        if (kind == FP_S ? (v->d[i] & 0x7f800000) == 0 && v->d[i] << 1 != 0
            : kind == FP_D ? (v->q[i] & 0x7ff0000000000000) == 0 && v->q[i] << 1 != 0
            : kind == FP_H ? (v->w[i] & 0x7c00) == 0 && (v->w[i] & 0x3ff) != 0 : false)
            return true;
    }
    return false;
}

void fp_trap_end(struct cpu *c, const struct uop *u, union vec *dst, enum fp_kind kind, unsigned n)
{
    uint32_t flags = host_stmxcsr() & MX_FLAGS, open = ~(c->mxcsr >> MX_MASK_SHIFT) & MX_FLAGS;
    if ((open & 0x10) && dst && tiny(dst, kind, n))
        flags |= 0x10;
    if (flags & open & 7)
        flags &= 7; /* invalid, denormal, divide: found before anything is computed */
    c->mxcsr |= flags;
    host_ldmxcsr(c->mxcsr | MX_MASKS);
    if (flags & open) {
        if (dst)
            *dst = c->v[30];
        cpu_fault(c, u, c->cr4 & CR4_OSXMMEXCPT ? EXC_XM : EXC_UD);
    }
}

bool fp_host_has(unsigned feature)
{
    uint32_t a, b, cx, d, b7 = 0, c7 = 0;
    if (!__get_cpuid(1, &a, &b, &cx, &d))
        return false;
    if (__get_cpuid_max(0, NULL) >= 7)
        __cpuid_count(7, 0, a, b7, c7, d);
    bool ymm = false;
    if (cx & bit_OSXSAVE) {
        uint32_t lo, hi;
        __asm__("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
        ymm = (lo & 6) == 6;
    }
    switch (feature) {
    case FEAT_SSE3: return cx & bit_SSE3;
    case FEAT_SSSE3: return cx & bit_SSSE3;
    case FEAT_SSE41: return cx & bit_SSE4_1;
    case FEAT_SSE42: return cx & bit_SSE4_2;
    case FEAT_AES: return cx & bit_AES;
    case FEAT_PCLMUL: return cx & bit_PCLMUL;
    case FEAT_SHA: return b7 & bit_SHA;
    case FEAT_AVX: return ymm && (cx & bit_AVX);
    case FEAT_FMA: return ymm && (cx & bit_FMA);
    case FEAT_F16C: return ymm && (cx & bit_F16C);
    case FEAT_AVX2: return ymm && (b7 & bit_AVX2);
    case FEAT_VAES: return ymm && (c7 & bit_VAES);
    case FEAT_VPCLMUL: return ymm && (c7 & bit_VPCLMULQDQ);
    default: return true; /* what every x86-64 host has, or what is not the host's business */
    }
}
