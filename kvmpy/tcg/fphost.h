/* SPDX-License-Identifier: Apache-2.0
 *
 * The host's floating-point unit as the guest's: control state, sticky flags and exceptions.
 *
 * Floating-point handlers execute the guest's own instruction on the host (results, NaNs and flags are then the
 * processor's, and it is fast). For that the host's control registers hold the guest's settings while cpu_run() is
 * active: fp_enter() loads them, fp_leave() brings the caller's back.
 *
 *   MXCSR   rounding, FTZ and DAZ of the guest; all exceptions masked. Flags collect in the host's register as they
 *           do in the guest's and come into c->mxcsr when somebody looks: fp_sync(). So a handler pays nothing for
 *           them. When the guest has unmasked an exception, its handler runs between fp_trap_begin() and
 *           fp_trap_end(), which look at the flags of this one instruction and raise #XM before anything is changed.
 *           Known limit: with overflow or underflow unmasked the inexact flag that goes with it is the masked one's
 *           (the result in range), not that of a result with unbounded exponent.
 *   x87 CW  exactly the guest's, exceptions included: an unmasked one only becomes pending (the next waiting
 *           instruction would trap) and handlers clear it before they use the unit again. The host's x87 stack is
 *           empty between handlers; its sticky flags are always among the guest's.
 *
 * Nothing between fp_enter() and fp_leave() may compute with floating point outside of handlers (hooks do not).
 */
#ifndef KVMPY_TCG_FPHOST_H
#define KVMPY_TCG_FPHOST_H

#include "cpu.h"

#if !defined(__x86_64__)
#error "the floating-point and vector handlers execute the host's own x86-64 instructions; no portable version exists yet"
#endif

#define MX_FLAGS 0x3fu
#define MX_MASKS 0x1f80u
#define MX_MASK_SHIFT 7
#define MX_UM 0x0800u
#define MX_FTZ 0x8000u

static inline void host_ldmxcsr(uint32_t v) { __asm__ volatile("ldmxcsr %0" : : "m"(v)); }
static inline uint32_t host_stmxcsr(void)
{
    uint32_t v;
    __asm__ volatile("stmxcsr %0" : "=m"(v));
    return v;
}

struct fp_host { uint32_t mxcsr; uint16_t cw; };
struct fp_host fp_enter(struct cpu *c);           /* returns the caller's settings */
void fp_leave(struct cpu *c, struct fp_host was); /* c->mxcsr is exact afterwards */
/* Inside cpu_run(): bring c->mxcsr up to date, before something reads it (FXSAVE, XSAVE). */
static inline void fp_sync(struct cpu *c) { c->mxcsr |= host_stmxcsr() & MX_FLAGS; }
/* Inside cpu_run(): c->mxcsr and c->fpu were replaced (FXRSTOR, XRSTOR) after fp_sync(); c->fpu alone (FLDENV, FNCLEX). */
void fp_reload(struct cpu *c);
void fp_reload_x87(struct cpu *c);

/* Does this host execute instructions of FEAT_*? */
bool fp_host_has(unsigned feature);

/* What results an instruction makes, so that an unmasked underflow is seen when the tiny result is exact. */
enum fp_kind { FP_NONE, FP_S, FP_D, FP_H };
static inline bool fp_unmasked(const struct cpu *c) { return (c->mxcsr & MX_MASKS) != MX_MASKS; }
void fp_trap_begin(struct cpu *c, const union vec *dst);
/* Merges the flags; raises #XM and restores *dst if one of them is unmasked. `n`: elements of `kind` in *dst. */
void fp_trap_end(struct cpu *c, const struct uop *u, union vec *dst, enum fp_kind kind, unsigned n);

/* Runs the statement with the guest's exceptions; dst may be NULL when the statement changes no guest state yet. */
#define FP(dst, kind, n, ...)                          \
    do {                                               \
        bool trap_ = unlikely(fp_unmasked(c));         \
        if (trap_)                                     \
            fp_trap_begin(c, dst);                     \
        __VA_ARGS__;                                   \
        if (trap_)                                     \
            fp_trap_end(c, u, dst, kind, n);           \
    } while (0)

#endif
