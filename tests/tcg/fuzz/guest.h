/* SPDX-License-Identifier: Apache-2.0
 *
 * The small machine around the core that fuzz_cpu.c and fuzz_jit.c drive: guest memory in which every page stands alone
 * between inaccessible ones, so that a byte too far ends the process; ports and devices that answer by their address; and
 * the state a processor begins in, made from an input.
 */
#ifndef FUZZ_GUEST_H
#define FUZZ_GUEST_H

#include <signal.h>
#include <stddef.h>
#include <stdint.h>

#include "core.h"

/* Guest physical memory: 48 pages from 0 on, with holes, and four above 4 GiB. */
enum {
    PAGES = 0x38,            /* 0x00000..0x37fff */
    HOLE_FIRST = 0x10, HOLE_LAST = 0x13,
    ROM_FIRST = 0x14, ROM_LAST = 0x17,
    LOGGED_FIRST = 0x18, LOGGED_LAST = 0x1b,
    HIGH_PAGES = 4,
    IVT = 0x0000, GDT = 0x1000, TSS = 0x1800, TASK = 0x1a00, IDT = 0x2000, HANDLERS = 0x3000, LDT = 0x3800,
    CODE = 0x5000, DATA = 0x7000, STACK = 0xd000, TABLES = 0x20000, HANDLER_STACK = 0xe800,
};
#define HIGH_BASE 0x100000000ull

/* The first bytes of an input; instructions follow. Each byte decides one thing, so that mutations are small steps. */
struct header {
    uint8_t mode;      /* MODE_*, below */
    uint8_t ring;      /* bits 0-1 CPL, 2-3 IOPL, 4 IF, 5 AC, 6 DF, 7 TF */
    uint8_t control;   /* 0 WP, 1 AM, 2 SMEP, 3 SMAP, 4 PKE, 5 PGE, 6 UMIP, 7 devices answer at once */
    uint8_t units;     /* 0 TS, 1 EM, 2 MP, 3 no OSFXSR, 4 no AVX, 5 unmasked MXCSR, 6 unmasked x87, 7 FSGSBASE */
    uint8_t segments;  /* 0-1 kind of data segments, 2 small CS, 3 page tables in RAM, 4 odd pages, 5 interrupts, 6 IDT, 7 debug */
    uint8_t place;     /* where in the code page the first instruction stands */
    uint8_t seed[2];   /* of everything else */
    uint8_t regs[16];  /* what kind of value each register holds */
};
enum { REAL, PROT16, PROT32, PAGED32, PAE, LONG, COMPAT, VM86 };

struct guest {
    struct tcg_vm_core vm;
    struct cpu *cpu;
    uint8_t *arena;                          /* as the core sees them: at every other page, the rest PROT_NONE */
    uint8_t *ram;                            /* the same memory in one piece, all writable */
    _Atomic uint64_t code[PAGES + HIGH_PAGES];
    bool reported[PAGES + HIGH_PAGES];       /* tcg_mark_dirty() named it */
    struct header h;
    uint64_t seed;
    uint32_t asked;                          /* times somebody looked at the TSC */
    uint32_t interrupts;                     /* taken so far */
    volatile sig_atomic_t kicks;             /* since guest_reset() */
};

extern struct guest guest;

static inline uint64_t mix(uint64_t x)
{
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
}
/* A number that depends on the input's seed and on `what` alone. */
static inline uint64_t chosen(uint64_t what) { return mix(guest.seed ^ mix(what + 0x9e3779b97f4a7c15ull)); }

void guest_open(void);                      /* once per process */
/* Page number of an address, -1 where there is nothing. */
int guest_page(uint64_t gpa);
uint8_t *guest_host(int page);              /* for the core; ROM cannot be written there */
static inline uint8_t *guest_ram(int page) { return guest.ram + (size_t)page * 4096; }
bool guest_is_rom(int page);
bool guest_is_logged(int page);
/* Memory and processor as the input says; the same input gives the same, byte by byte. */
void guest_reset(const uint8_t *data, size_t size);
void guest_answer(struct cpu *c);           /* what user space would, for TCG_STOP_IO */
/* From now on kicks, as the engine's ticker gives them: the core has to leave soon, wherever it is. An input that takes
 * a minute of processor time ends the process; less would not do, as a bus lock can take some hosts a second. */
void guest_kick_every(unsigned ms);

#endif
