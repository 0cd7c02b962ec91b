/* SPDX-License-Identifier: Apache-2.0
 *
 * MOVS CMPS STOS LODS SCAS INS OUTS, with and without REP.
 *
 * REP MOVS and STOS forward on plain memory go page by page with the host's memmove and fill; TCG.md of a typical
 * kernel boot counts 7 % of all instructions as such iterations. Whatever is not plain (MMIO, code pages, page
 * crossings, faults, DF) takes one item, through the ordinary accessors, and the loop tries in bulk again. After each
 * item or page the registers are exact, so a fault or a stop leaves the instruction restartable at its own RIP, as
 * SDM vol. 1 7.3.9.3 asks. Requests are looked at after each page or 256 items; in step mode each item is a step.
 *
 * Overlap: MOVS copies upwards item by item; memmove does not do that when the destination lies a little above the
 * source (the pattern must repeat), so such ranges go by items.
 */
#include "op.h"

struct ctx {
    uint64_t mask;  /* of RSI, RDI, RCX by address size */
    int64_t step;   /* bytes per item, negative with DF */
    bool single;    /* step mode: one item */
};

static inline struct ctx context(struct cpu *c, const struct uop *u, unsigned size)
{
    struct ctx x;
    x.mask = u->aflags & EA_A32 ? 0xffffffff : u->aflags & EA_A16 ? 0xffff : code64(c) ? ~0ull : 0xffffffff;
    x.step = c->sysflags & FL_DF ? -(int64_t)size : (int64_t)size;
    x.single = c->block->mode & MODE_STEP;
    return x;
}
static inline uint64_t reg(const struct cpu *c, const struct ctx *x, int r) { return c->gpr[r] & x->mask; }
static inline void put(struct cpu *c, const struct ctx *x, int r, uint64_t v)
{
    c->gpr[r] = x->mask == 0xffff ? (c->gpr[r] & ~0xffffull) | (v & 0xffff) : v & x->mask;
}
static inline bool checked(const struct cpu *c, int seg)
{
    return !(c->mode & MODE_CODE64) && (c->mode & MODE_SEGS || seg >= SEG_FS || seg == SEG_CS);
}
/* linear address in the source segment (overridable) or ES */
static inline uint64_t at(struct cpu *c, const struct uop *u, int seg, uint64_t off, unsigned size, bool write)
{
    return unlikely(checked(c, seg)) ? seg_linear(c, u, seg, off, size, write) : off + c->segbase[seg];
}

static inline uint64_t load(struct cpu *c, const struct uop *u, uint64_t lin, unsigned size)
{
    return size == 1 ? ld8(c, u, lin) : size == 2 ? ld16(c, u, lin) : size == 4 ? ld32(c, u, lin) : ld64(c, u, lin);
}
static inline void store(struct cpu *c, const struct uop *u, uint64_t lin, unsigned size, uint64_t v)
{
    if (size == 1)
        st8(c, u, lin, (uint8_t)v);
    else if (size == 2)
        st16(c, u, lin, (uint16_t)v);
    else if (size == 4)
        st32(c, u, lin, (uint32_t)v);
    else
        st64(c, u, lin, v);
}

/* Items from `off` on that lie in one page, do not wrap around the address size and are all within the segment; at most n.
 * 0: do one by hand. */
static uint64_t stretch(const struct cpu *c, const struct ctx *x, int seg, uint64_t off, unsigned size, uint64_t n, bool write)
{
    if (x->step < 0 || x->single)
        return 0;
    uint64_t k = (4096 - ((off + c->segbase[seg]) & 0xfff)) / size, left = (x->mask - off) / size;
    k = k < n ? k : n;
    k = k < left ? k : left;
    return k && checked(c, seg) && !seg_can(c, seg, off, k * size, write) ? 0 : k;
}

static uint64_t bulk_movs(struct cpu *c, const struct uop *u, const struct ctx *x, unsigned size, uint64_t n)
{
    uint64_t si = reg(c, x, RSI), di = reg(c, x, RDI);
    uint64_t k = stretch(c, x, u->seg, si, size, n, false);
    k = k < 2 ? 0 : stretch(c, x, SEG_ES, di, size, k, true);
    if (k < 2)
        return 0;
    uint64_t from = at(c, u, u->seg, si, size, false), to = at(c, u, SEG_ES, di, size, true);
    uint8_t *src = tlb_read(c, from, 1), *dst = tlb_write(c, to, 1);
    if (!src || !dst || (dst > src && dst < src + k * size))
        return 0;
    memmove(dst, src, k * size);
    put(c, x, RSI, si + k * size);
    put(c, x, RDI, di + k * size);
    return k;
}

static uint64_t bulk_stos(struct cpu *c, const struct uop *u, const struct ctx *x, unsigned size, uint64_t n)
{
    uint64_t di = reg(c, x, RDI), v = c->gpr[RAX];
    uint64_t k = stretch(c, x, SEG_ES, di, size, n, true);
    uint8_t *dst = k < 2 ? NULL : tlb_write(c, at(c, u, SEG_ES, di, size, true), 1);
    if (!dst)
        return 0;
    if (size == 1 || (size < 8 ? (v & ((1ull << 8 * size) - 1)) == 0 : v == 0)) {
        memset(dst, (int)(uint8_t)v, k * size);
    } else {
        for (uint64_t i = 0; i < k; i++)
            memcpy(dst + i * size, &v, size);
    }
    put(c, x, RDI, di + k * size);
    return k;
}

enum kind { MOVS, STOS, LODS, CMPS, SCAS, INS, OUTS };

static inline void compare(struct cpu *c, unsigned size, uint64_t a, uint64_t b)
{
    if (size == 1)
        alu_sub8((uint8_t)a, (uint8_t)b, &c->cc);
    else if (size == 2)
        alu_sub16((uint16_t)a, (uint16_t)b, &c->cc);
    else if (size == 4)
        alu_sub32((uint32_t)a, (uint32_t)b, &c->cc);
    else
        alu_sub64(a, b, &c->cc);
}

void io_permission(struct cpu *c, const struct uop *u, uint16_t port, unsigned size); /* ops_io.c */

static inline __attribute__((always_inline)) void item(struct cpu *c, const struct uop *u, const struct ctx *x, enum kind kind, unsigned size)
{
    uint64_t si = reg(c, x, RSI), di = reg(c, x, RDI), v;
    switch (kind) {
    case MOVS:
        v = load(c, u, at(c, u, u->seg, si, size, false), size);
        store(c, u, at(c, u, SEG_ES, di, size, true), size, v);
        put(c, x, RSI, si + (uint64_t)x->step);
        put(c, x, RDI, di + (uint64_t)x->step);
        break;
    case STOS:
        store(c, u, at(c, u, SEG_ES, di, size, true), size, c->gpr[RAX]);
        put(c, x, RDI, di + (uint64_t)x->step);
        break;
    case LODS:
        v = load(c, u, at(c, u, u->seg, si, size, false), size);
        if (size == 1)
            SET8(0, v);
        else if (size == 2)
            SET16(0, v);
        else
            c->gpr[RAX] = v;
        put(c, x, RSI, si + (uint64_t)x->step);
        break;
    case CMPS: {
        uint64_t a = load(c, u, at(c, u, u->seg, si, size, false), size), b = load(c, u, at(c, u, SEG_ES, di, size, false), size);
        compare(c, size, a, b);
        put(c, x, RSI, si + (uint64_t)x->step);
        put(c, x, RDI, di + (uint64_t)x->step);
        break;
    }
    case SCAS:
        compare(c, size, c->gpr[RAX], load(c, u, at(c, u, SEG_ES, di, size, false), size));
        put(c, x, RDI, di + (uint64_t)x->step);
        break;
    case INS: {
        uint64_t to = at(c, u, SEG_ES, di, size, true);
        mem_check_write(c, u, to, size, 0); /* the device must not lose a byte to a page fault */
        store(c, u, to, size, dev_read(c, u, IO_PIO_IN, R16(c, RDX * 8), size));
        put(c, x, RDI, di + (uint64_t)x->step);
        break;
    }
    case OUTS:
        v = load(c, u, at(c, u, u->seg, si, size, false), size);
        dev_write(c, u, IO_PIO_OUT, R16(c, RDX * 8), size, v);
        put(c, x, RSI, si + (uint64_t)x->step);
        break;
    }
}

/* REP INS and OUTS on plain memory: as many items in one exit as a page and cpu_io hold. The instruction runs again for
 * the answer, alone, and finds the count there; registers change only then. */
static uint64_t bulk_io(struct cpu *c, const struct uop *u, const struct ctx *x, enum kind kind, unsigned size, uint64_t n)
{
    bool in = kind == INS;
    int seg = in ? SEG_ES : u->seg, r = in ? RDI : RSI;
    enum cpu_io_kind way = in ? IO_PIO_IN : IO_PIO_OUT;
    uint16_t port = R16(c, RDX * 8);
    uint64_t off = reg(c, x, r), k = dev_items_answered(c, way, port, size, n);
    if (k) {
        if (in)
            mem_write_bytes(c, u, at(c, u, seg, off, (unsigned)k * size, true), c->io.data, (unsigned)k * size);
        put(c, x, r, off + k * size);
        return k;
    }
    k = stretch(c, x, seg, off, size, n, in);
    if (k < 2)
        return 0;
    uint64_t lin = at(c, u, seg, off, size, in);
    if (in && !tlb_write(c, lin, 1))
        mem_check_write(c, u, lin, 1, 0); /* the device must not lose a byte to a page fault */
    else if (!in && !tlb_read(c, lin, 1))
        return 0;
    uint8_t *host = in ? tlb_write(c, lin, 1) : tlb_read(c, lin, 1);
    if (!host)
        return 0; /* device memory, a page with code, a watched one */
    k = dev_items(c, u, way, port, size, (uint32_t)k, host);
    put(c, x, r, off + k * size);
    return k;
}

/* true: the instruction is complete; false: leave for the loop with RIP at it */
static inline __attribute__((always_inline)) bool string(struct cpu *c, const struct uop *u, enum kind kind, unsigned size)
{
    struct ctx x = context(c, u, size);
    if (kind >= INS)
        io_permission(c, u, R16(c, RDX * 8), size);
    if (!u->imm) {
        item(c, u, &x, kind, size);
        return true;
    }
    for (uint64_t n = reg(c, &x, RCX), turns = 0; n;) {
        uint64_t k = 0;
        if (!x.single && kind == MOVS)
            k = bulk_movs(c, u, &x, size, n);
        else if (!x.single && kind == STOS)
            k = bulk_stos(c, u, &x, size, n);
        else if (kind >= INS)
            k = bulk_io(c, u, &x, kind, size, n);
        if (!k) {
            item(c, u, &x, kind, size);
            k = 1;
        }
        n -= k;
        put(c, &x, RCX, n);
        if ((kind == CMPS || kind == SCAS) && !(c->cc & CC_ZF) == (u->imm == 1))
            break;
        if (!n)
            break;
        turns += k > 1 ? 256 : 1;
        if (x.single || c->io.answered || (turns >= 256 && atomic_load_explicit(&c->request, memory_order_relaxed))) {
            c->rip = RIP_OF(c, u);
            give_back_budget(c, u); /* however often it is interrupted, it counts once, in step mode too */
            return false;
        }
        if (turns >= 256)
            turns = 0;
    }
    return true;
}

#define STRING(name, kind, size)            \
    OP(name)                                \
    {                                       \
        if (unlikely(!string(c, u, kind, size))) \
            LEAVE;                          \
        NEXT_RETURN;                        \
    }
#define WIDTHS(name, kind) STRING(name##b, kind, 1) STRING(name##_16, kind, 2) STRING(name##_32, kind, 4)
WIDTHS(movs, MOVS)
WIDTHS(cmps, CMPS)
WIDTHS(stos, STOS)
WIDTHS(lods, LODS)
WIDTHS(scas, SCAS)
WIDTHS(ins, INS)
WIDTHS(outs, OUTS)
STRING(movs_64, MOVS, 8)
STRING(cmps_64, CMPS, 8)
STRING(stos_64, STOS, 8)
STRING(lods_64, LODS, 8)
STRING(scas_64, SCAS, 8)
