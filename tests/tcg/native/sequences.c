/* SPDX-License-Identifier: Apache-2.0
 *
 * Sequences of random instructions in a loop, on the interpreter and on the JIT: registers of all kinds, flags, memory
 * and the place where they stop must be the same. Faults are welcome: they show whether state is exact in the middle
 * of a block.
 *
 *     sequences SEED ROUNDS [FIRST] < cases    cases: 24-byte records of instructions.py
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>

#include "../../../kvmpy/tcg/cpu.h"

#define DATA 0x10000000ull
#define DATA_SIZE 8192
#define RAM 0x20000u
#define COUNTER (DATA + 0x80)

struct record {
    uint8_t len, bytes[15];
    uint8_t undefined;  /* flags not compared: bit order o s z a p c */
    uint8_t base, index; /* GPR numbers that must hold addresses / small values, 0xff: none */
    uint8_t small;       /* another register with a small value */
    uint8_t flags;       /* 1: string (RSI, RDI, RCX prepared), 2: RBX is an address, 4: base is 16-byte aligned */
    uint8_t pad[3];
};

static uint8_t *ram, *guest_data, pristine[RAM];
static _Atomic uint64_t *marks;

void tcg_phys_to_host(struct tcg_vm_core *vm, uint64_t gpa, struct page_info *p)
{
    (void)vm;
    memset(p, 0, sizeof *p);
    if (gpa < RAM) {
        p->host = ram + gpa;
        p->code = &marks[gpa >> 12];
    } else if (gpa >= DATA && gpa < DATA + DATA_SIZE) {
        p->host = guest_data + (gpa - DATA);
        p->code = &marks[(RAM >> 12) + ((gpa - DATA) >> 12)];
    }
    bool tables = gpa >= 0x10000 && gpa < 0x13000; /* when they change, an engine may have walked before or not */
    p->flags = p->host ? PAGE_RAM | (tables ? PAGE_READONLY : 0) : 0;
}
void tcg_mark_dirty(struct cpu *c, uint64_t gpa) { (void)c, (void)gpa; }
bool tcg_pio(struct cpu *c, uint16_t port, unsigned size, bool w, uint32_t *v) { (void)c, (void)port, (void)size, (void)w; *v = 0; return true; }
bool tcg_mmio(struct cpu *c, uint64_t g, unsigned s, bool w, uint64_t *v) { (void)c, (void)g, (void)s, (void)w; *v = 0; return true; }
int tcg_rdmsr(struct cpu *c, uint32_t i, uint64_t *v) { (void)c, (void)i; *v = 0; return 0; }
int tcg_wrmsr(struct cpu *c, uint32_t i, uint64_t v) { (void)c, (void)i, (void)v; return 0; }
int tcg_ack_interrupt(struct cpu *c) { (void)c; return -1; }
void tcg_cr8_changed(struct cpu *c) { (void)c; }
uint64_t tcg_read_cr8(struct cpu *c) { return c->cr8; }
uint64_t tcg_rdtsc(struct cpu *c) { return cpu_insns(c); }
bool tcg_hypercall(struct cpu *c) { (void)c; return true; }
void tcg_wake(struct cpu *c) { (void)c; }

static uint64_t seed;
static uint64_t rnd(void)
{
    uint64_t z = (seed += 0x9e3779b97f4a7c15ull);
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}
static uint64_t interesting(void)
{
    static const uint64_t edge[] = {0, 1, ~0ull, 0x7f, 0x80, 0xff, 0x7fff, 0x8000, 0xffff, 0x7fffffff, 0x80000000, 0xffffffff,
                                    0x7fffffffffffffff, 0x8000000000000000, 0x9a, 0x10};
    uint64_t r = rnd();
    switch (r & 7) {
    case 0: case 1: return edge[r >> 8 & 15];
    case 2: return edge[r >> 8 & 15] + (r >> 16 & 3);
    case 3: return r >> 8 & 63;
    default: return rnd();
    }
}

#include "values.h"

static const char *regs[] = {"rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"};

struct start {
    uint64_t gpr[16], rip, flags;
    struct x87 fpu;
    uint32_t mxcsr;
    union vec v[16];
    uint8_t data[DATA_SIZE];
};
struct outcome {
    uint64_t gpr[16], rip, flags, cr2;
    int stop;
    uint32_t mxcsr;
    uint16_t cw, sw, tags, fop, fcs, fds;
    uint64_t fip, fdp;
    uint8_t st[8][10], v[16][32];
    uint8_t data[DATA_SIZE], ram[RAM];
};

/* INC or DEC of a register other than `base`, and perhaps a short branch over LEA R8, [R8+1]. */
static unsigned count(uint8_t *p, unsigned base)
{
    unsigned reg = pick(8), size = 0;
    if (reg == base || reg == RSP)
        reg = RSI;
    const uint8_t counts[] = {0x48, 0xff, (uint8_t)((pick(2) ? 0xc0 : 0xc8) | reg)};
    memcpy(p, counts, sizeof counts);
    size += sizeof counts;
    if (pick(2)) {
        const uint8_t over[] = {(uint8_t)(0x70 | pick(16)), 4, 0x4d, 0x8d, 0x40, 0x01};
        memcpy(p + size, over, sizeof over);
        size += sizeof over;
    }
    return size;
}

/* Mostly all masked and nothing pending, as programs have it. */
static void random_fpu(struct x87 *f)
{
    memset(f, 0, sizeof *f);
    f->cw = (uint16_t)(0x40 | pick(4) << 10 | (pick(2) ? 0x300 : pick(2) ? 0x200 : 0) | (pick(8) ? 0x3f : pick(64)));
    f->sw = (uint16_t)(rnd() & 0x477f & (pick(8) ? ~0u : 0x4700u));
    if (f->sw & ~f->cw & 0x3f)
        f->sw |= 0x8080;
    f->top = (uint8_t)pick(8);
    f->valid = pick(8) < 3 ? 0xff : (uint8_t)rnd();
    if (pick(2)) /* room for two more */
        f->valid &= (uint8_t)~(1 << ((f->top + 7) & 7) | 1 << ((f->top + 6) & 7));
    for (unsigned i = 0; i < 8; i++)
        x87_value(f->r[i].raw);
    f->fip = rnd() & 0xffff;
    f->fdp = rnd() & 0xffff;
    f->fcs = (uint16_t)pick(2);
    f->fds = (uint16_t)pick(2);
}

static struct cpu *make_cpu(struct tcg_vm_core *vm, const char *kind)
{
    setenv("KVMPY_TCG", kind, 1);
    struct cpu *c = aligned_alloc(64, (sizeof *c + 63) & ~63ul);
    if (cpu_init(c, vm, 0))
        exit(2);
    c->features[0] = c->features[1] = ~0ull;
    return c;
}

/* A sequence may overwrite its own counter, and then it runs for minutes. */
static struct cpu *running;
static void tired(int number)
{
    (void)number;
    cpu_request(running, CPU_REQ_EXIT);
}

static void run(struct cpu *c, const struct start *s, struct outcome *o)
{
    memcpy(guest_data, s->data, DATA_SIZE);
    memcpy(ram, pristine, RAM);
    cpu_flush_code(c);
    memset(marks, 0, ((RAM >> 12) + 2) * 8);
    cpu_reset(c, false);
    c->gdt = (struct dtable){0x500, 0x17};
    c->idt = (struct dtable){0x2000, 0x1ff};
    c->seg[SEG_TR] = (struct segment){.base = 0x3000, .limit = 0x67, .attr = 0x8b, .sel = 8};
    for (int i = 0; i <= SEG_GS; i++)
        c->seg[i] = (struct segment){.sel = 0x10, .limit = 0xffffffff, .attr = 0xc093};
    c->seg[SEG_CS] = (struct segment){.sel = 8, .limit = 0xffffffff, .attr = 0xa09b};
    c->cr0 = CR0_PE | CR0_PG | CR0_ET | CR0_NE;
    c->cr3 = 0x10000;
    c->cr4 = CR4_PAE | 0x600 | CR4_OSXSAVE;
    c->xcr0 = 7;
    c->efer = EFER_LME | EFER_LMA | EFER_SCE;
    memcpy(c->gpr, s->gpr, sizeof c->gpr);
    c->rip = s->rip;
    c->fpu = s->fpu;
    c->mxcsr = s->mxcsr;
    memcpy(c->v, s->v, sizeof s->v);
    cpu_set_rflags(c, s->flags);
    cpu_update(c);
    running = c;
    setitimer(ITIMER_REAL, &(struct itimerval){.it_value.tv_usec = 100000}, NULL);
    o->stop = cpu_run(c);
    setitimer(ITIMER_REAL, &(struct itimerval){0}, NULL);
    memcpy(o->gpr, c->gpr, sizeof o->gpr);
    o->rip = c->rip;
    o->flags = cpu_rflags(c);
    o->cr2 = c->cr2;
    o->mxcsr = c->mxcsr;
    o->cw = c->fpu.cw;
    o->sw = (uint16_t)(c->fpu.sw | c->fpu.top << 11);
    o->tags = c->fpu.valid;
    o->fop = c->fpu.fop;
    o->fcs = c->fpu.fcs;
    o->fds = c->fpu.fds;
    o->fip = c->fpu.fip;
    o->fdp = c->fpu.fdp;
    for (unsigned i = 0; i < 8; i++)
        memcpy(o->st[i], c->fpu.r[i].raw, 10);
    for (unsigned i = 0; i < 16; i++)
        memcpy(o->v[i], c->v[i].b, 32);
    memcpy(o->data, guest_data, DATA_SIZE);
    memcpy(o->ram, ram, RAM);
}

static void show(const struct outcome *a, const struct outcome *b)
{
    printf("\n  stop %d %d rip %llx %llx flags %llx %llx\n", a->stop, b->stop, (unsigned long long)a->rip, (unsigned long long)b->rip,
           (unsigned long long)a->flags, (unsigned long long)b->flags);
    for (int i = 0; i < 16; i++)
        if (a->gpr[i] != b->gpr[i])
            printf("  %s %llx %llx\n", regs[i], (unsigned long long)a->gpr[i], (unsigned long long)b->gpr[i]);
    const struct outcome *both[2] = {a, b};
    for (int i = 0; i < 2 && memcmp(&a->mxcsr, &b->mxcsr, offsetof(struct outcome, data) - offsetof(struct outcome, mxcsr)); i++) {
        const struct outcome *o = both[i];
        printf("  mxcsr %x cw %x sw %x tags %x fop %x fip %x:%llx fdp %x:%llx\n   ", o->mxcsr, o->cw, o->sw, o->tags, o->fop, o->fcs,
               (unsigned long long)o->fip, o->fds, (unsigned long long)o->fdp);
        for (int r = 0; r < 8; r++)
            for (int n = 10; n--;)
                printf("%s%02x", n == 9 ? " " : "", o->st[r][n]);
        printf("\n");
    }
    for (int i = 0; i < 16; i++)
        if (memcmp(a->v[i], b->v[i], 32))
            printf("  ymm%d\n", i);
    for (int i = 0; i < DATA_SIZE; i++)
        if (a->data[i] != b->data[i])
            printf("  data +%x %02x %02x\n", i, a->data[i], b->data[i]);
    for (unsigned i = 0; i < RAM; i++)
        if (a->ram[i] != b->ram[i])
            printf("  %x %02x %02x\n", i, a->ram[i], b->ram[i]);
}

/* Neighbours that access memory through one base register, moved and used between; `base`: RSP or a low register. */
static unsigned near_access(uint8_t *p, unsigned base)
{
    unsigned r = rnd() & 15, rex = 0x48 | (r >> 3) << 2, modrm = 0x40 | (r & 7) << 3 | (base == RSP ? 4 : base), n = 0;
    int8_t disp = (int8_t)(rnd() & 3 ? rnd() & 0x38 : rnd());
    if (r == RSP)
        r = RAX, modrm &= 0xc7, rex = 0x48;
    switch (rnd() % (base == RSP ? 12 : 8)) {
    case 0: case 1: case 2: p[n++] = (uint8_t)rex, p[n++] = 0x8b; break; /* MOV r, [base + disp] */
    case 3: case 4: p[n++] = (uint8_t)rex, p[n++] = 0x89; break;
    case 5: p[n++] = (uint8_t)rex, p[n++] = 0x01; break; /* ADD [base + disp], r */
    case 6: p[n++] = (uint8_t)rex, p[n++] = 0x39; break; /* CMP */
    case 7: p[n++] = (uint8_t)rex, p[n++] = 0x8d; break; /* LEA: no access */
    case 8: case 9:
        if (r >= 8)
            p[n++] = 0x41;
        p[n++] = (uint8_t)(0x50 | (r & 7)); /* PUSH r */
        return n;
    case 10:
        if (r >= 8)
            p[n++] = 0x41;
        p[n++] = (uint8_t)(0x58 | (r & 7));
        return n;
    default: /* ADD or SUB RSP, imm8 */
        p[n++] = 0x48, p[n++] = 0x83, p[n++] = rnd() & 1 ? 0xc4 : 0xec, p[n++] = (uint8_t)(rnd() & 0x38);
        return n;
    }
    p[n++] = (uint8_t)modrm;
    if (base == RSP)
        p[n++] = 0x24;
    p[n++] = (uint8_t)disp;
    return n;
}

int main(int argc, char **argv)
{
    static struct record list[65536];
    static struct tcg_vm_core vm;
    static struct outcome a, b;
    static struct start s;
    static uint8_t tables[RAM];
    unsigned long rounds = argc > 2 ? strtoul(argv[2], NULL, 0) : 1000, first = argc > 3 ? strtoul(argv[3], NULL, 0) : 0, bad = 0, faults = 0;
    size_t all = fread(list, sizeof list[0], 65536, stdin), n = 0;
    for (size_t i = 0; i < all; i++)
        /* A string instruction may run for years from a random RCX. Undefined flags are the handler's or the host's;
         * only AF, of logic, is the host's in both. */
        if (!(list[i].flags & 1) && !(list[i].undefined & ~8u))
            list[n++] = list[i];
    guest_data = aligned_alloc(4096, DATA_SIZE);
    ram = aligned_alloc(4096, RAM);
    memset(ram, 0, RAM);
    marks = calloc((RAM >> 12) + 2, 8);
    pthread_mutex_init(&vm.lock, NULL);

    struct cpu *interp = make_cpu(&vm, "interp"), *jit = make_cpu(&vm, "jit");
    if (!jit->jit.state) {
        printf("no JIT here\n");
        return 3;
    }
    vm.ncpu = 1;
    uint64_t *q = (uint64_t *)(ram + 0x10000);
    q[0] = 0x11063;
    ((uint64_t *)(ram + 0x11000))[0] = 0x12063;
    for (uint64_t i = 0; i < 512; i++)
        ((uint64_t *)(ram + 0x12000))[i] = i << 21 | 0xe3;
    for (unsigned v = 0; v < 32; v++) { /* an IDT whose handlers are HLT at 0x4000 + 16 * vector */
        uint64_t at = 0x4000 + 16 * v;
        ram[at] = 0xf4;
        ((uint64_t *)(ram + 0x2000))[2 * v] = (at & 0xffff) | 8 << 16 | 0x8e01ull << 32; /* IST 1 */
    }
    uint64_t ist = 0x9000;
    memcpy(ram + 0x3000 + 0x24, &ist, 8);
    ((uint64_t *)(ram + 0x500))[1] = 0x00af9b000000ffff;
    ((uint64_t *)(ram + 0x500))[2] = 0x00cf93000000ffff;

    memcpy(tables, ram, RAM);
    signal(SIGALRM, tired);
    for (unsigned long round = first; n && round < rounds; round++) {
        seed = strtoull(argc > 1 ? argv[1] : "1", NULL, 0) * 1000003 + round;
        uint8_t code[512];
        s.flags = (rnd() & 0x8d5) | 2;
        s.rip = 0x1000 + (rnd() & 3 ? 0 : 0xfc0 + rnd() % 0x3f); /* or across a page */
        random_fpu(&s.fpu);
        s.mxcsr = (uint32_t)(rnd() & 0xe07f) | (pick(8) ? 0x1f80 : (uint32_t)rnd() & 0x1f80);
        for (int i = 0; i < 16; i++)
            fill(s.v[i].b, 32);
        unsigned size = 0, insns = 1 + rnd() % 12;
        for (int i = 0; i < 16; i++)
            s.gpr[i] = rnd() & 3 ? DATA + 0x800 + (rnd() & 0x3f0) : interesting();
        static const uint8_t bases[] = {RSP, RSP, RBX, RBP, RDI};
        unsigned base = bases[rnd() % 5];
        bool tight = rnd() & 1; /* most accesses near one base, perhaps across a page or out of memory */
        s.gpr[RSP] = DATA + 0x1c00;
        if (tight && rnd() & 1)
            s.gpr[base] = DATA + (rnd() & 3 ? 0x1000 : DATA_SIZE) - (rnd() & 0x78);
        for (int i = 0; i < DATA_SIZE; i += 32) {
            for (int n = 0; n < 32; n += 8) {
                uint64_t v = interesting();
                memcpy(s.data + i + n, &v, 8);
            }
            if (!pick(3))
                fill(s.data + i, 32);
            else if (!pick(4))
                x87_value(s.data + i);
        }
        s.data[COUNTER - DATA] = 3;
        memset(s.data + (COUNTER - DATA) + 1, 0, 7);
        for (unsigned i = 0; i < insns; i++) {
            if (tight && rnd() & 3) {
                size += near_access(code + size, base);
                if (!pick(3))
                    size += count(code + size, base);
                continue;
            }
            const struct record *r = &list[rnd() % n];
            if (rnd() % 4 == 0) { /* a short branch over it */
                code[size++] = (uint8_t)(0x70 | (rnd() & 15));
                code[size++] = r->len;
            }
            memcpy(code + size, r->bytes, r->len);
            size += r->len;
        }
        const uint8_t again[] = {0x83, 0x2c, 0x25, COUNTER & 0xff, COUNTER >> 8 & 0xff, COUNTER >> 16 & 0xff, COUNTER >> 24, 1, 0x0f, 0x85};
        memcpy(code + size, again, sizeof again); /* SUB DWORD [COUNTER], 1; JNZ start; HLT */
        size += sizeof again;
        int32_t back = -(int32_t)(size + 4);
        memcpy(code + size, &back, 4);
        size += 4;
        code[size++] = 0xf4;
        memcpy(pristine, tables, RAM);
        memcpy(pristine + s.rip, code, size);
        run(interp, &s, &a);
        run(jit, &s, &b);
        if (a.stop == TCG_STOP_CANCEL || b.stop == TCG_STOP_CANCEL)
            continue;
        faults += a.rip >= 0x4000 && a.rip < 0x4200;
        if (!memcmp(&a, &b, sizeof a))
            continue;
        if (bad++ < 20) {
            printf("round %lu at %llx:", round, (unsigned long long)s.rip);
            for (unsigned n = 0; n < size; n++)
                printf(" %02x", code[n]);
            show(&a, &b);
        }
    }
    printf("%lu sequences, %lu faults, %lu differences\n", rounds, faults, bad);
    return bad != 0;
}
