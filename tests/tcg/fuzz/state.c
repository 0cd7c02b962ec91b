/* SPDX-License-Identifier: Apache-2.0
 *
 * From an input to memory and processor state: page tables, descriptor tables, handlers, registers. Whatever the
 * header leaves open comes from its seed. Odd things are rare enough that most inputs run some instructions.
 */
#include "guest.h"

#include <string.h>

static struct cpu power_on; /* after cpu_init() */
static bool have_power_on;

static void put(uint64_t gpa, uint64_t value, unsigned size)
{
    memcpy(guest_ram(guest_page(gpa)) + (gpa & 0xfff), &value, size);
}

/* ---- memory ---- */

static uint64_t descriptor(uint32_t base, uint32_t limit, unsigned access, unsigned flags)
{
    return (limit & 0xffff) | (uint64_t)(base & 0xffffff) << 16 | (uint64_t)access << 40 | (uint64_t)(limit >> 16 & 15) << 48
         | (uint64_t)flags << 52 | (uint64_t)(base >> 24) << 56;
}

static uint64_t gate(unsigned type, uint16_t sel, uint32_t offset)
{
    return (offset & 0xffff) | (uint64_t)sel << 16 | (uint64_t)type << 40 | (uint64_t)(offset >> 16) << 48;
}

/* Selectors: 8 code64, 10 data, 18 code32, 20 code16, 28 data16, 30 code64/3, 38 data/3, 40 code32/3, 48 code16/3,
 * 50 conforming, 58 expand-down, 60 TSS, 70 LDT, 80 call gate, 90 a task, 98 task gate, a0 16-bit gate, a8 absent,
 * b0 read-only, b8 one page, c0 execute-only, c8 interrupt gate, d0 on anything. */
static void make_gdt(void)
{
    bool wide = guest.h.mode == LONG || guest.h.mode == COMPAT;
    const uint64_t table[] = {
        0, descriptor(0, 0xfffff, 0x9b, 0xa), descriptor(0, 0xfffff, 0x93, 0xc), descriptor(0, 0xfffff, 0x9b, 0xc),
        descriptor(0, 0xfffff, 0x9b, 0x8), descriptor(0, 0xffff, 0x93, 0), descriptor(0, 0xfffff, 0xfb, 0xa),
        descriptor(0, 0xfffff, 0xf3, 0xc), descriptor(0, 0xfffff, 0xfb, 0xc), descriptor(0, 0xfffff, 0xfb, 0x8),
        descriptor(0, 0xfffff, 0x9f, 0xc), descriptor(0, 0x7000, 0x97, 4), descriptor(TSS, 0x67 + 0x40, 0x89, 0), 0,
        descriptor(LDT, 0x7f, 0x82, 0), 0, gate(wide ? 0xec : 0xe4, wide ? 8 : 0x18, HANDLERS), 0,
        descriptor(TASK, 0x67, 0x89, 0), gate(0x85, 0x90, 0), gate(0xe4 & ~8u, 0x20, HANDLERS), descriptor(0, 0xfffff, 0x13, 0xc),
        descriptor(0, 0xfffff, 0xf1, 0xc), descriptor(DATA, 0xfff, 0xf3, 4), descriptor(0, 0xfffff, 0xf9, 0xc),
        gate(0x8e, 0x18, HANDLERS), chosen(1), chosen(2) | 1ull << 47, chosen(3) | 1ull << 44,
    };
    for (unsigned i = 0; i < sizeof table / 8; i++) {
        put(GDT + 8 * i, table[i], 8);
        put(LDT + 8 * (i & 15), table[i & 15], 8);
    }
}

static void make_tasks(void)
{
    bool wide = guest.h.mode == LONG || guest.h.mode == COMPAT;
    if (wide) {
        for (unsigned i = 0; i < 10; i++)
            put(TSS + 4 + 8 * i, HANDLER_STACK - 0x100 * i, 8);
    } else {
        put(TSS + 4, HANDLER_STACK, 4);
        put(TSS + 8, 0x10, 4);
        put(TSS + 12, HANDLER_STACK - 0x200, 4);
        put(TSS + 16, chosen(10), 4);
    }
    put(TSS + 100, 0x68u << 16, 4); /* the I/O bitmap follows */
    for (unsigned i = 0; i < 8; i++)
        put(TSS + 0x68 + 8 * i, chosen(20 + i) & chosen(30 + i), 8);
    for (unsigned i = 0; i < 26; i++)
        put(TASK + 4 * i, chosen(40 + i) & 3 ? 0x10 : chosen(40 + i), 4);
    put(TASK + 4, HANDLER_STACK, 4);
    put(TASK + 28, guest.cpu->cr3, 4);
    put(TASK + 32, HANDLERS, 4);
    put(TASK + 36, 2, 4);
    put(TASK + 56, STACK, 4);
    put(TASK + 76, 0x18, 4);
}

static void make_idt(void)
{
    for (unsigned vector = 0; vector < 256; vector++) {
        uint64_t odd = guest.h.segments >> 6 & 1 ? chosen(0x100 + vector) : 0;
        uint32_t handler = HANDLERS + 16 * (vector & 31);
        unsigned type = odd >> 8 & 3 ? 0xee : 0x8e | (odd >> 16 & 0x6f);
        put(IVT + 4 * vector, handler >> 4 << 16, 4);
        if (guest.h.mode == LONG || guest.h.mode == COMPAT) {
            uint64_t ist = (odd & 7) == 7 ? odd >> 4 & 7 : 0;
            put(IDT + 16 * vector, gate(type, odd >> 24 & 7 ? 8 : odd >> 32 & 0xff, handler) | ist << 32, 8);
            put(IDT + 16 * vector + 8, 0, 8);
        } else {
            uint64_t entry = gate(type, (odd & 15) == 15 ? odd >> 32 & 0xff : 0x18, handler);
            put(IDT + 8 * vector, (odd & 31) == 9 ? gate(0xe5, 0x90, 0) : entry, 8);
        }
    }
    /* Handlers: HLT, or IRET in the operand size of the mode, or a store and HLT. */
    for (unsigned i = 0; i < 32; i++) {
        static const uint8_t kinds[4][8] = {{0xf4, 0xeb, 0xfd}, {0xcf, 0xf4}, {0x48, 0xcf, 0xf4}, {0x50, 0x9c, 0x58, 0x58, 0xf4, 0xeb, 0xfd}};
        memcpy(guest_ram(guest_page(HANDLERS)) + 16 * i, kinds[chosen(0x300 + i) & 3], 8);
    }
}

/* Rights of a linear page: present, writable and user almost always. */
static uint64_t rights(unsigned page, bool nx)
{
    uint64_t r = chosen(0x400 + page), flags = 0x7;
    if (!(guest.h.segments >> 4 & 1))
        return flags | (r & 0x60);
    if ((r & 15) == 0)
        flags &= ~1ull;
    if ((r >> 4 & 7) == 0)
        flags &= ~2ull;
    if ((r >> 7 & 3) == 0)
        flags &= ~4ull;
    flags |= (r >> 10 & 0x160) | (nx && (r >> 20 & 7) == 0 ? 1ull << 63 : 0) | (nx ? (r >> 24 & 3) << 59 : 0);
    return flags;
}

static uint64_t frame(unsigned page)
{
    if (page == (CODE >> 12) + 1)
        return 0xa; /* an instruction that crosses the page goes on elsewhere */
    return page == 0x1c || page == 0x1d ? page - 0x14 : page; /* two pages have a second name */
}

/* Linear 0..0x3ffff is physical but for frame(); 2 MiB (4 MiB) pages map the same from the second table entry on. */
static void make_tables(void)
{
    struct cpu *c = guest.cpu;
    uint64_t base = guest.h.segments >> 3 & 1 ? TABLES : ROM_FIRST << 12, top = base, pdpt = base + 0x1000, pd = base + 0x2000,
             pt = base + 0x3000;
    if (guest.h.mode == PAGED32 || (guest.h.mode == VM86 && guest.seed & 1)) {
        for (unsigned i = 0; i < 64; i++)
            put(pt + 4 * i, frame(i) << 12 | (uint32_t)rights(i, false), 4);
        put(pd, pt | 7, 4);
        put(pd + 4, 0x87 | (chosen(9) & 0x160), 4);
        put(pd + 4 * 1023, pd | 3, 4);
        c->cr3 = pd;
        c->cr0 |= CR0_PG;
        c->cr4 |= CR4_PSE;
        return;
    }
    for (unsigned i = 0; i < 64; i++)
        put(pt + 8 * i, frame(i) << 12 | rights(i, true), 8);
    put(pt + 8 * 64, HIGH_BASE | 0x67, 8);
    put(pd, pt | 7, 8);
    put(pd + 8, 0x87 | (chosen(9) & 0x160), 8);
    put(pd + 8 * 511, pd | 3, 8);
    bool pae = guest.h.mode == PAE;
    put(pdpt, pd | (pae ? 1 : 7), 8);
    put(pdpt + 8, pae ? pd | 1 : 0x87, 8);
    put(pdpt + 8 * 3, pd | (pae ? 1 : 7), 8);
    put(top, pdpt | 7, 8);
    put(top + 8 * 511, pdpt | 3, 8);
    put(top + 8 * 510, top | 3, 8);
    c->cr3 = pae ? pdpt : top;
    c->cr0 |= CR0_PG;
    c->cr4 |= CR4_PAE;
    c->efer |= EFER_NXE;
    if (pae)
        for (unsigned i = 0; i < 4; i++)
            memcpy(&c->pdpte[i], guest_ram(guest_page(pdpt)) + 8 * i, 8);
}

/* ---- registers ---- */

static uint64_t value_of(uint8_t kind, unsigned reg)
{
    uint64_t v = chosen(0x600 + reg), low = kind & 15;
    switch (kind >> 4) {
    case 0: return low;
    case 1: return CODE + 8 * low;
    case 2: return DATA + 256 * low;
    case 3: return DATA + 0xff0 + low;
    case 4: return (HOLE_FIRST << 12) + 0x3f8 * low;
    case 5: return (ROM_FIRST << 12) + 64 * low;
    case 6: return (LOGGED_FIRST << 12) + 0xff0 + low;
    case 7: return (0x1c << 12) + 0x7fc * (low & 3);
    case 8: return 0xffffff8000000000ull + DATA + 64 * low;
    case 9: return low & 1 ? 0x7ffffffffff0ull + low : 1ull << 48 | v;
    case 10: return -low;
    case 11: return (uint32_t)v;
    case 12: return v;
    case 13: return 0x200000 + DATA + 64 * low;
    case 14: return low & 1 ? IDT + 16 * low : GDT + 8 * low;
    default: return (1ull << (4 * low)) - (v & 1);
    }
}

static void make_units(struct cpu *c)
{
    static const uint64_t doubles[] = {0, 1ull << 63, 0x3ff0000000000000, 0x7ff0000000000000, 0x7ff8000000000000, 0x7ff4000000000000,
                                       1, 0x000fffffffffffff, 0x7fefffffffffffff, 0x4330000000000000};
    uint8_t units = guest.h.units;
    for (unsigned i = 0; i < 16; i++)
        for (unsigned j = 0; j < 4; j++) {
            uint64_t v = chosen(0x700 + 4 * i + j);
            c->v[i].q[j] = v & 3 ? v : doubles[(v >> 8) % 10];
        }
    c->mxcsr = units >> 5 & 1 ? chosen(0x780) & 0xffff : 0x1f80;
    c->fpu.cw = units >> 6 & 1 ? (chosen(0x781) & 0xf3f) | 0x40 : 0x37f;
    c->fpu.sw = chosen(0x782) & 0x4700;
    c->fpu.top = chosen(0x783) & 7;
    c->fpu.valid = (uint8_t)chosen(0x784);
    for (unsigned i = 0; i < 8; i++) {
        uint64_t v = chosen(0x790 + i);
        c->fpu.r[i].mant = v & 1 ? v | 1ull << 63 : doubles[(v >> 8) % 10];
        c->fpu.r[i].exp = v & 2 ? 0x3fff + (v >> 16 & 63) : v >> 20;
    }
}

static void set_segments(struct cpu *c, unsigned cpl)
{
    static const struct segment data[4] = {
        {.sel = 0x10, .limit = 0xffffffff, .attr = 0xc093}, {.sel = 0xb8, .base = DATA, .limit = 0xfff, .attr = 0x40f3},
        {.sel = 0x58, .limit = 0x7000, .attr = 0x4097}, {.sel = 0x28, .limit = 0xffff, .attr = 0x93},
    };
    unsigned mode = guest.h.mode, dpl = cpl << ATTR_DPL_SHIFT;
    if (mode == REAL || mode == VM86) {
        for (unsigned i = 0; i <= SEG_GS; i++) {
            uint16_t sel = i == SEG_CS ? 0 : i == SEG_SS ? 0 : (chosen(0x800 + i) & 3) * 0x700;
            c->seg[i] = (struct segment){.sel = sel, .base = sel << 4, .limit = 0xffff, .attr = mode == VM86 ? 0xf3 : i == SEG_CS ? 0x9b : 0x93};
        }
        return;
    }
    for (unsigned i = 0; i <= SEG_GS; i++) {
        c->seg[i] = data[i == SEG_SS || mode == LONG ? 0 : i == SEG_DS || i >= SEG_FS ? guest.h.segments & 3 : chosen(0x800 + i) & 1];
        if (!(c->seg[i].sel & 3))
            c->seg[i].sel |= cpl;
        c->seg[i].attr = (c->seg[i].attr & ~(3u << ATTR_DPL_SHIFT)) | dpl;
    }
    if (cpl == 3)
        c->seg[SEG_SS].sel = c->seg[SEG_ES].sel = 0x3b;
    if (mode == LONG) {
        c->seg[SEG_FS].base = chosen(0x810) & 1 ? DATA : 0xffffff8000000000ull + DATA;
        c->seg[SEG_GS].base = DATA + 0x800;
    }
    unsigned code = mode == LONG ? (cpl == 3 ? 0x30 : 8) : mode == PROT16 ? (cpl == 3 ? 0x48 : 0x20) : (cpl == 3 ? 0x40 : 0x18);
    c->seg[SEG_CS] = (struct segment){.sel = code | cpl, .limit = 0xffffffff, .attr = (mode == LONG ? 0xa09b : mode == PROT16 ? 0x809b : 0xc09b) | dpl};
    if ((guest.h.segments & 4) && mode != LONG) {
        c->seg[SEG_CS].limit = CODE + 0x1000 + (chosen(0x811) & 0xff);
        c->seg[SEG_CS].attr &= ~ATTR_G;
    }
}

static void set_registers(struct cpu *c)
{
    const struct header *h = &guest.h;
    unsigned mode = h->mode, cpl = mode == REAL ? 0 : mode == VM86 ? 3 : h->ring & 3;
    c->cr0 |= (mode == REAL ? 0 : CR0_PE) | (h->control & 1 ? CR0_WP : 0) | (h->control & 2 ? CR0_AM : 0) | (h->units & 1 ? CR0_TS : 0)
            | (h->units & 2 ? CR0_EM : 0) | (h->units & 4 ? CR0_MP : 0) | (chosen(0x820) & 1 ? CR0_NE : 0);
    c->cr0 &= ~(CR0_CD | CR0_NW);
    c->cr4 |= (h->control & 4 ? CR4_SMEP : 0) | (h->control & 8 ? CR4_SMAP : 0) | (h->control & 16 ? CR4_PKE : 0) | (h->control & 32 ? CR4_PGE : 0)
            | (h->control & 64 ? CR4_UMIP : 0) | (h->units & 8 ? 0 : CR4_OSFXSR | CR4_OSXMMEXCPT) | CR4_OSXSAVE
            | (h->units & 128 ? CR4_FSGSBASE : 0) | (chosen(0x821) & CR4_DE);
    c->xcr0 = h->units & 16 ? 3 : 0x207;
    c->pkru = chosen(0x822) & chosen(0x823) & 0xfffffff0;
    if (mode == LONG || mode == COMPAT)
        c->efer |= EFER_LME | EFER_LMA;
    if (chosen(0x824) & 7)
        c->efer |= EFER_SCE;
    set_segments(c, cpl);
    c->gdt = (struct dtable){GDT, 0xe7};
    c->idt = mode == REAL ? (struct dtable){IVT, 0x3ff} : (struct dtable){IDT, mode == LONG || mode == COMPAT ? 0xfff : 0x7ff};
    c->seg[SEG_TR] = (struct segment){.sel = 0x60, .base = TSS, .limit = 0x67 + 0x40, .attr = 0x8b};
    c->seg[SEG_LDT] = (struct segment){.sel = 0x70, .base = LDT, .limit = 0x7f, .attr = 0x82};
    for (unsigned i = 0; i < 16; i++)
        c->gpr[i] = value_of(h->regs[i], i);
    c->gpr[RSP] = h->regs[RSP] & 0x80 ? value_of(h->regs[RSP] & 0x7f, RSP) : STACK + 8 * h->regs[RSP];
    c->star = 0x0023000800000000ull | chosen(0x830) << 32;
    c->lstar = c->cstar = HANDLERS + 16 * (chosen(0x831) & 31);
    c->fmask = chosen(0x832) & 0x47700;
    c->kernel_gs_base = DATA + 0x100;
    c->sysenter_cs = 8;
    c->sysenter_esp = HANDLER_STACK;
    c->sysenter_eip = HANDLERS;
    uint64_t flags = 2 | (chosen(0x840) & FL_ARITH) | (h->ring & 0xc) << 10 | (h->ring & 16 ? FL_IF : 0) | (h->ring & 32 ? FL_AC : 0)
                   | (h->ring & 64 ? FL_DF : 0) | (h->ring & 128 ? FL_TF : 0) | (mode == VM86 ? FL_VM : 0);
    cpu_set_rflags(c, flags);
    if (h->segments >> 7 & 1) {
        for (unsigned i = 0; i < 4; i++)
            c->dr[i] = i & 1 ? CODE + (chosen(0x850 + i) & 63) : DATA + (chosen(0x850 + i) & 0xfff);
        c->dr[7] = chosen(0x858) & 0xffff23ff;
    }
}

void guest_reset(const uint8_t *data, size_t size)
{
    struct cpu *c = guest.cpu;
    struct block_cache *cache = c->cache;
    if (!have_power_on) {
        power_on = *c;
        have_power_on = true;
    }
    guest.kicks = 0; /* before it is forgotten that one was wanted */
    *c = power_on;
    c->cache = cache;
    memset(&guest.h, 0, sizeof guest.h);
    memcpy(&guest.h, data, size < sizeof guest.h ? size : sizeof guest.h);
    size_t skip = size < sizeof guest.h ? size : sizeof guest.h;
    data += skip;
    size -= skip;
    guest.h.mode &= 7;
    guest.seed = mix(guest.h.seed[0] | (uint64_t)guest.h.seed[1] << 8 | 0x10000);
    guest.vm.seed = guest.seed;
    guest.asked = guest.interrupts = 0;

    memset(guest.ram, 0, (PAGES + HIGH_PAGES) * 4096ul);
    memset(guest.reported, 0, sizeof guest.reported);
    for (int page = 0; page < PAGES + HIGH_PAGES; page++)
        atomic_store_explicit(&guest.code[page], 0, memory_order_relaxed);
    for (unsigned i = 0; i < 0x2000; i += 8)
        put(DATA + i, chosen(0x1000 + (i & 0x1ff)), 8);
    make_gdt();
    if (guest.h.mode >= PAGED32 && (guest.h.mode != VM86 || guest.seed & 1))
        make_tables();
    make_tasks();
    make_idt();
    make_units(c);

    /* The code, from its place to the end of the page and on in the page that follows it; HLT behind. */
    unsigned at = guest.h.place < 0xc0 ? guest.h.place * 4u : 0xf80 + (guest.h.place & 0x3f) * 2u;
    bool paged = c->cr0 & CR0_PG;
    if (size > 1024)
        size = 1024;
    for (size_t i = 0; i <= size; i++) {
        unsigned lin = CODE + at + (unsigned)i;
        uint64_t gpa = lin < CODE + 0x1000 || !paged ? lin : frame(lin >> 12) << 12 | (lin & 0xfff);
        put(gpa, i < size ? data[i] : 0xf4, 1);
    }
    set_registers(c);
    c->rip = CODE + at;
    cpu_update(c);
    cpu_flush_code(c);
}
