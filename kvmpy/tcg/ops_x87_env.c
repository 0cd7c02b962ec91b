/* SPDX-License-Identifier: Apache-2.0
 *
 * x87 control: initialisation, control and status words, environment and state images, tags and TOP.
 *
 * Images (SDM vol. 1, figures 8-9 to 8-12) come in a 16-bit and a 32-bit form, each for protected mode (selector and
 * offset) and for real and virtual-8086 mode (a linear address in pieces). The full tag word of the images is made from
 * the register contents; loading one only asks which registers are empty.
 */
#include "x87.h"

const x87_reg x87_indefinite = {.mant = 0xc000000000000000, .exp = 0xffff};

static void load_cw(struct cpu *c, uint16_t cw)
{
    c->fpu.cw = (cw & 0x1f3f) | 0x40;
    x87_summary(c);
    fp_reload_x87(c);
}
static void init(struct cpu *c)
{
    c->fpu.sw = c->fpu.fop = c->fpu.fcs = c->fpu.fds = 0;
    c->fpu.fip = c->fpu.fdp = 0;
    c->fpu.top = c->fpu.valid = 0;
    load_cw(c, 0x37f);
}
static uint16_t status(const struct cpu *c) { return (uint16_t)(c->fpu.sw | c->fpu.top << 11); }
static void set_status(struct cpu *c, uint16_t sw)
{
    c->fpu.sw = sw & ~0x3800;
    c->fpu.top = sw >> 11 & 7;
}

OP(fninit) { init(c); NEXT; }
OP(fnclex) { c->fpu.sw &= SW_CC; fp_reload_x87(c); NEXT; }
OP(fnstcw_m) { st16(c, u, ea(c, u), c->fpu.cw); NEXT; }
OP(fnstsw_m) { st16(c, u, ea(c, u), status(c)); NEXT; }
OP(fnstsw_ax) { SET16(RAX * 8, status(c)); NEXT; }
OP(fldcw_m)
{
    x87_wait(c, u);
    load_cw(c, ld16(c, u, ea(c, u)));
    NEXT;
}
OP(fwait)
{
    if ((c->cr0 & (CR0_MP | CR0_TS)) == (CR0_MP | CR0_TS))
        cpu_fault(c, u, EXC_NM);
    x87_wait(c, u);
    NEXT;
}
OP(fnop) { x87_wait(c, u); NEXT; }
OP(fincstp) { x87_wait(c, u); c->fpu.top = (c->fpu.top + 1) & 7; c->fpu.sw &= ~SW_C1; NEXT; }
OP(fdecstp) { x87_wait(c, u); c->fpu.top = (c->fpu.top + 7) & 7; c->fpu.sw &= ~SW_C1; NEXT; }
OP(ffree_r) { x87_wait(c, u); c->fpu.sw &= ~SW_C1; x87_free(c, u->d); NEXT; }
OP(ffreep_r) { x87_wait(c, u); c->fpu.sw &= ~SW_C1; x87_free(c, u->d); x87_pop(c); NEXT; }
OP(emms) { x87_wait(c, u); c->fpu.valid = c->fpu.top = 0; NEXT; }
/* FNENI, FNDISI, FNSETPM of older coprocessors */
OP(fnold) { (void)c; NEXT; }

static uint16_t full_tags(const struct cpu *c)
{
    unsigned tags = 0;
    for (unsigned i = 0; i < 8; i++) {
        const x87_reg *r = &c->fpu.r[i];
        unsigned exp = r->exp & 0x7fff, tag = 3;
        if (c->fpu.valid >> i & 1)
            tag = exp == 0x7fff || (exp == 0 && r->mant) || (exp && !(r->mant >> 63)) ? 2 : exp == 0 ? 1 : 0;
        tags |= tag << 2 * i;
    }
    return (uint16_t)tags;
}

/* The environment: 14 or 28 bytes. */
static unsigned store_env(const struct cpu *c, const struct uop *u, uint8_t *a)
{
    const struct x87 *f = &c->fpu;
    bool real = real_or_vm86(c);
    uint64_t ip = f->fip + (real ? (uint64_t)f->fcs << 4 : 0), dp = f->fdp + (real ? (uint64_t)f->fds << 4 : 0);
    if (u->x) {
        uint16_t w[7] = {f->cw, status(c), full_tags(c), (uint16_t)ip, f->fcs, (uint16_t)dp, f->fds};
        if (real) {
            w[4] = (uint16_t)((ip >> 16 & 15) << 12 | (f->fop & 0x7ff));
            w[6] = (uint16_t)((dp >> 16 & 15) << 12);
        }
        memcpy(a, w, 14);
        return 14;
    }
    uint32_t d[7] = {0xffff0000u | f->cw, 0xffff0000u | status(c), 0xffff0000u | full_tags(c), (uint32_t)ip,
                     f->fcs | (uint32_t)(f->fop & 0x7ff) << 16, (uint32_t)dp, 0xffff0000u | f->fds};
    if (real) {
        d[3] = 0xffff0000u | (uint16_t)ip;
        d[4] = ((uint32_t)ip >> 16) << 12 | (f->fop & 0x7ff);
        d[5] = 0xffff0000u | (uint16_t)dp;
        d[6] = ((uint32_t)dp >> 16) << 12;
    }
    memcpy(a, d, 28);
    return 28;
}
static void load_env(struct cpu *c, const struct uop *u, const uint8_t *a)
{
    struct x87 *f = &c->fpu;
    bool real = real_or_vm86(c);
    uint16_t cw, sw, tags;
    memcpy(&cw, a, 2);
    memcpy(&sw, a + (u->x ? 2 : 4), 2);
    memcpy(&tags, a + (u->x ? 4 : 8), 2);
    if (u->x) {
        uint16_t w[4];
        memcpy(w, a + 6, 8);
        f->fip = w[0] | (real ? (uint64_t)(w[1] >> 12) << 16 : 0);
        f->fdp = w[2] | (real ? (uint64_t)(w[3] >> 12) << 16 : 0);
        f->fcs = real ? 0 : w[1];
        f->fds = real ? 0 : w[3];
        if (real)
            f->fop = w[1] & 0x7ff;
    } else {
        uint32_t d[4];
        memcpy(d, a + 12, 16);
        f->fip = real ? (d[0] & 0xffff) | (d[1] >> 12 & 0xffff) << 16 : d[0];
        f->fdp = real ? (d[2] & 0xffff) | (d[3] >> 12 & 0xffff) << 16 : d[2];
        f->fcs = real ? 0 : (uint16_t)d[1];
        f->fds = real ? 0 : (uint16_t)d[3];
        f->fop = (real ? d[1] : d[1] >> 16) & 0x7ff;
    }
    set_status(c, sw);
    f->valid = 0;
    for (unsigned i = 0; i < 8; i++)
        if ((tags >> 2 * i & 3) != 3)
            f->valid |= (uint8_t)(1 << i);
    load_cw(c, cw);
}

OP(fnstenv_m)
{
    uint8_t a[28];
    mem_write_bytes(c, u, ea(c, u), a, store_env(c, u, a));
    load_cw(c, c->fpu.cw | 0x3f);
    NEXT_RETURN;
}
OP(fldenv_m)
{
    uint8_t a[28];
    x87_wait(c, u);
    mem_read_bytes(c, u, ea(c, u), a, u->x ? 14 : 28);
    load_env(c, u, a);
    NEXT_RETURN;
}
OP(fnsave_m)
{
    uint8_t a[108];
    unsigned n = store_env(c, u, a);
    for (unsigned i = 0; i < 8; i++)
        memcpy(a + n + 10 * i, ST(i)->raw, 10);
    mem_write_bytes(c, u, ea(c, u), a, n + 80);
    init(c);
    NEXT_RETURN;
}
OP(frstor_m)
{
    uint8_t a[108];
    unsigned n = u->x ? 14 : 28;
    x87_wait(c, u);
    mem_read_bytes(c, u, ea(c, u), a, n + 80);
    load_env(c, u, a);
    for (unsigned i = 0; i < 8; i++)
        memcpy(ST(i)->raw, a + n + 10 * i, 10);
    NEXT_RETURN;
}
