/* SPDX-License-Identifier: Apache-2.0
 *
 * FXSAVE FXRSTOR, XSAVE XSAVEOPT XSAVEC XSAVES XRSTOR XRSTORS, and the same layout for KVM_GET/SET_XSAVE.
 *
 * Layout: SDM vol. 1 chapter 13. Components: 0 x87 and 1 SSE in the 512-byte legacy area, 2 AVX at 576, 9 PKRU at 2688
 * (the offset of real processors). The area is made in a local buffer and goes to memory as a whole, so a fault
 * changes nothing. XSAVEOPT may always save as XSAVE does; XINUSE is "everything", which the manual allows, but for
 * the components that are only carried for an assisted processor (xstate.h), whose XINUSE is known.
 */
#include "fphost.h"
#include "op.h"
#include "xstate.h"

#define X87 XSTATE_X87
#define SSE XSTATE_SSE
#define AVX XSTATE_AVX
#define PKRU XSTATE_PKRU
#define AREA 2696
#define OFF_AVX 576
#define OFF_PKRU 2688

static uint8_t abridged_tags(const struct cpu *c) { return c->fpu.valid; }

static void store_x87(const struct cpu *c, uint8_t *a, bool wide)
{
    const struct x87 *f = &c->fpu;
    uint16_t w[3] = {f->cw, (uint16_t)((f->sw & ~0x3800) | (f->top & 7) << 11), abridged_tags(c)};
    memcpy(a, w, 6);
    memcpy(a + 6, &f->fop, 2);
    if (wide) {
        memcpy(a + 8, &f->fip, 8);
        memcpy(a + 16, &f->fdp, 8);
    } else {
        memcpy(a + 8, &f->fip, 4);
        memcpy(a + 12, &f->fcs, 2);
        memcpy(a + 16, &f->fdp, 4);
        memcpy(a + 20, &f->fds, 2);
    }
    for (unsigned i = 0; i < 8; i++) {
        memset(a + 32 + 16 * i, 0, 16);
        memcpy(a + 32 + 16 * i, f->r[(f->top + i) & 7].raw, 10);
    }
}
static void load_x87(struct cpu *c, const uint8_t *a, bool wide)
{
    struct x87 *f = &c->fpu;
    uint16_t w[4];
    memcpy(w, a, 8);
    f->cw = w[0];
    f->sw = w[1] & ~0x3800;
    f->top = w[1] >> 11 & 7;
    f->valid = (uint8_t)w[2];
    f->fop = w[3] & 0x7ff;
    f->fip = f->fdp = f->fcs = f->fds = 0;
    memcpy(&f->fip, a + 8, wide ? 8 : 4);
    memcpy(&f->fdp, a + 16, wide ? 8 : 4);
    if (!wide) {
        memcpy(&f->fcs, a + 12, 2);
        memcpy(&f->fds, a + 20, 2);
    }
    for (unsigned i = 0; i < 8; i++)
        memcpy(f->r[(f->top + i) & 7].raw, a + 32 + 16 * i, 10);
}
static void init_x87(struct cpu *c)
{
    memset(&c->fpu, 0, sizeof c->fpu);
    c->fpu.cw = 0x37f;
}

static void store_parts(const struct cpu *c, uint8_t *a, uint64_t parts, bool wide, unsigned xmms)
{
    if (parts & X87)
        store_x87(c, a, wide);
    if (parts & (SSE | AVX)) {
        uint32_t m[2] = {c->mxcsr, 0xffff};
        memcpy(a + 24, m, 8);
    }
    if (parts & SSE)
        for (unsigned i = 0; i < xmms; i++)
            memcpy(a + 160 + 16 * i, c->v[i].b, 16);
}

void cpu_xsave_store(const struct cpu *c, uint8_t *a, uint64_t rfbm)
{
    store_parts(c, a, rfbm, true, 16);
    if (rfbm & AVX)
        for (unsigned i = 0; i < 16; i++)
            memcpy(a + OFF_AVX + 16 * i, c->v[i].b + 16, 16);
    if (rfbm & PKRU)
        memcpy(a + OFF_PKRU, &c->pkru, 4);
    memset(a + 512, 0, 64);
    uint64_t bv = rfbm & (X87 | SSE | AVX | PKRU);
    memcpy(a + 512, &bv, 8);
    xstate_store_carried(c, a);
}

int cpu_xsave_load(struct cpu *c, const uint8_t *a, uint64_t rfbm)
{
    uint64_t bv;
    uint32_t mxcsr;
    memcpy(&bv, a + 512, 8);
    memcpy(&mxcsr, a + 24, 4);
    if (bv & ~(X87 | SSE | AVX | PKRU | c->carried) || mxcsr & ~0xffffu)
        return 1;
    if (rfbm & X87) {
        if (bv & X87)
            load_x87(c, a, true);
        else
            init_x87(c);
    }
    if (rfbm & (SSE | AVX))
        c->mxcsr = mxcsr;
    for (unsigned i = 0; i < 16; i++) {
        if (rfbm & SSE) {
            memset(c->v[i].b, 0, 16);
            if (bv & SSE)
                memcpy(c->v[i].b, a + 160 + 16 * i, 16);
        }
        if (rfbm & AVX) {
            memset(c->v[i].b + 16, 0, 48);
            if (bv & AVX)
                memcpy(c->v[i].b + 16, a + OFF_AVX + 16 * i, 16);
        }
    }
    if (rfbm & PKRU) {
        uint32_t pkru = 0;
        if (bv & PKRU)
            memcpy(&pkru, a + OFF_PKRU, 4);
        cpu_set_pkru(c, pkru);
    }
    return 0;
}

static void available(struct cpu *c, const struct uop *u)
{
    whole_xstate_only(c, u);
    if (!(c->cr4 & CR4_OSXSAVE))
        cpu_fault(c, u, EXC_UD);
    if (c->cr0 & CR0_TS)
        cpu_fault(c, u, EXC_NM);
}
static uint64_t requested(const struct cpu *c) { return (c->gpr[RDX] << 32 | (uint32_t)c->gpr[RAX]) & c->xcr0; }
static bool rexw(const struct cpu *c, const struct uop *u) { return u->imm & 1 && code64(c); }

/* The carried components go as they are; none is longer than a page. */
static void save_carried(struct cpu *c, const struct uop *u, uint64_t lin, uint64_t bits, uint64_t comp, bool check)
{
    for (; bits; bits &= bits - 1) {
        unsigned bit = (unsigned)__builtin_ctzll(bits);
        struct xcomponent x = xstate_component(bit);
        uint64_t to = lin + xstate_offset(comp, bit);
        if (check)
            mem_check_write(c, u, to, x.size, 0);
        else
            mem_write_bytes(c, u, to, c->carried_area + x.offset, x.size);
    }
}

static void save(struct cpu *c, const struct uop *u, bool compact)
{
    uint8_t a[AREA];
    available(c, u);
    uint64_t lin = ea(c, u), rfbm = requested(c), bv = 0;
    need_aligned(c, u, lin, 64);
    unsigned xmms = code64(c) ? 16 : 8, end = 576;
    mem_check_write(c, u, lin, 576, 0);
    fp_sync(c);
    mem_read_bytes(c, u, lin, a, 576); /* parts that are not saved keep what memory has */
    store_parts(c, a, rfbm, rexw(c, u), xmms);
    memcpy(&bv, a + 512, 8);
    uint64_t carried = rfbm & c->carried, comp = compact ? rfbm | 1ull << 63 : 0;
    bv = (compact ? 0 : bv & ~rfbm) | (rfbm & ~carried) | (carried & c->carried_inuse);
    memcpy(a + 512, &bv, 8);
    if (compact) {
        memset(a + 520, 0, 56);
        memcpy(a + 520, &comp, 8);
    }
    uint8_t avx[256];
    for (unsigned i = 0; i < 16; i++)
        memcpy(avx + 16 * i, c->v[i].b + 16, 16);
    uint64_t off_avx = OFF_AVX, off_pkru = xstate_offset(comp, 9);
    uint64_t pkru = c->pkru;
    if (rfbm & AVX)
        mem_check_write(c, u, lin + off_avx, 16 * xmms, 0);
    if (rfbm & PKRU)
        mem_check_write(c, u, lin + off_pkru, 8, 0);
    save_carried(c, u, lin, carried, comp, true);
    mem_write_bytes(c, u, lin, a, end);
    if (rfbm & AVX)
        mem_write_bytes(c, u, lin + off_avx, avx, 16 * xmms);
    if (rfbm & PKRU)
        mem_write_bytes(c, u, lin + off_pkru, &pkru, 8);
    save_carried(c, u, lin, carried, comp, false);
}

/* Reads all before it changes anything; what is not asked for stays. */
static void restore_carried(struct cpu *c, const struct uop *u, uint64_t lin, uint64_t rfbm, uint64_t bv, uint64_t comp)
{
    uint8_t area[XSTATE_AREA];
    memcpy(area, c->carried_area, sizeof area);
    for (uint64_t bits = c->carried & rfbm & bv; bits; bits &= bits - 1) {
        unsigned bit = (unsigned)__builtin_ctzll(bits);
        struct xcomponent x = xstate_component(bit);
        mem_read_bytes(c, u, lin + xstate_offset(comp, bit), area + x.offset, x.size);
    }
    xstate_load_carried(c, area, (bv & rfbm) | (c->carried_inuse & ~rfbm));
}

static void restore(struct cpu *c, const struct uop *u, bool compact_only)
{
    uint8_t a[AREA];
    available(c, u);
    fp_sync(c);
    uint64_t lin = ea(c, u), rfbm = requested(c), bv, comp;
    need_aligned(c, u, lin, 64);
    memset(a, 0, sizeof a);
    mem_read_bytes(c, u, lin, a, 576);
    memcpy(&bv, a + 512, 8);
    memcpy(&comp, a + 520, 8);
    bool compact = comp >> 63;
    for (unsigned i = compact ? 528 : 520; i < (compact ? 576 : 536); i++)
        if (a[i])
            cpu_fault_code(c, u, EXC_GP, 0);
    if (compact_only && !compact)
        cpu_fault_code(c, u, EXC_GP, 0);
    if (bv & ~c->xcr0 || (compact && (bv & ~comp || comp << 1 >> 1 & ~c->xcr0)))
        cpu_fault_code(c, u, EXC_GP, 0);
    if (compact ? rfbm & bv & SSE || rfbm & bv & AVX : rfbm & (SSE | AVX)) {
        uint32_t mxcsr;
        memcpy(&mxcsr, a + 24, 4);
        if (mxcsr & ~0xffffu)
            cpu_fault_code(c, u, EXC_GP, 0);
    } else {
        uint32_t initial = compact && rfbm & (SSE | AVX) ? 0x1f80 : c->mxcsr;
        memcpy(a + 24, &initial, 4);
    }
    if (rfbm & bv & AVX)
        mem_read_bytes(c, u, lin + OFF_AVX, a + OFF_AVX, code64(c) ? 256 : 128);
    comp = compact ? comp : 0;
    if (rfbm & bv & PKRU)
        mem_read_bytes(c, u, lin + xstate_offset(comp, 9), a + OFF_PKRU, 8);
    if (unlikely(c->carried & rfbm))
        restore_carried(c, u, lin, rfbm, bv, comp);
    if (!code64(c)) { /* XMM8-15 are out of reach */
        for (unsigned i = 8; i < 16; i++) {
            memcpy(a + 160 + 16 * i, c->v[i].b, 16);
            memcpy(a + OFF_AVX + 16 * i, c->v[i].b + 16, 16);
        }
    }
    cpu_xsave_load(c, a, rfbm);
    if ((rfbm & bv & X87) && !rexw(c, u))
        load_x87(c, a, false);
    fp_reload(c);
}

OP(xsave_m) { save(c, u, false); NEXT_RETURN; }
OP(xsaveopt_m) { save(c, u, false); NEXT_RETURN; }
OP(xsavec_m) { save(c, u, true); NEXT_RETURN; }
OP(xsaves_m) { save(c, u, true); NEXT_RETURN; }
OP(xrstor_m) { restore(c, u, false); LEAVE_AFTER; }
/* IA32_XSS has no bits here, so supervisor state is what XRSTOR has; but the format must be the compacted one. */
OP(xrstors_m) { restore(c, u, true); LEAVE_AFTER; }

static void legacy_available(struct cpu *c, const struct uop *u)
{
    if (c->cr0 & (CR0_EM | CR0_TS))
        cpu_fault(c, u, EXC_NM);
}
OP(fxsave_m)
{
    uint8_t a[512];
    legacy_available(c, u);
    uint64_t lin = ea(c, u);
    need_aligned(c, u, lin, 16);
    mem_check_write(c, u, lin, 512, 0);
    fp_sync(c);
    mem_read_bytes(c, u, lin, a, 512);
    store_parts(c, a, X87 | SSE, rexw(c, u), code64(c) ? 16 : 8);
    mem_write_bytes(c, u, lin, a, 416);
    NEXT_RETURN;
}
OP(fxrstor_m)
{
    uint8_t a[512];
    uint32_t mxcsr;
    legacy_available(c, u);
    uint64_t lin = ea(c, u);
    need_aligned(c, u, lin, 16);
    mem_read_bytes(c, u, lin, a, 512);
    memcpy(&mxcsr, a + 24, 4);
    if (mxcsr & ~0xffffu)
        cpu_fault_code(c, u, EXC_GP, 0);
    load_x87(c, a, rexw(c, u));
    c->mxcsr = mxcsr;
    for (unsigned i = 0; i < (code64(c) ? 16u : 8u); i++)
        memcpy(c->v[i].b, a + 160 + 16 * i, 16);
    fp_reload(c);
    NEXT_RETURN;
}
