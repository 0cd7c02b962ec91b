/* SPDX-License-Identifier: Apache-2.0
 *
 * x87, MMX, SSE and AVX instructions: the software CPU against the host's processor.
 *
 *     vector_diff SEED STATES < cases         (cases: tests/tcg/vectors.py)
 *
 * Every instruction runs with STATES random states, once on the host (between XRSTOR and XSAVE) and once through
 * decoder, blocks and handlers, on the same memory at the same address. Compared: general registers, arithmetic flags,
 * x87 control, status, tags and registers, MXCSR, all 256 bits of the vectors, memory, and the exception vector.
 * Values come from a pool that is rich in NaNs, infinities, denormals and boundaries; rounding, FTZ, DAZ, precision
 * and exception masks vary. Not compared: FIP FDP FOP (processors differ), state behind a page fault.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include "../../../kvmpy/tcg/cpu.h"

#define BASE 0x40000000ull
#define SIZE (2u << 20)
enum { GDT = 0x500, PML4 = 0x1000, PDPT = 0x2000, PD = 0x3000, IDT = 0x4000, STUBS = 0x5000, CODE = 0x6000, DATA = 0x8000, STACK = 0xf000 };
#define DATA_SIZE 256
static uint8_t *ram;
static _Atomic uint64_t code_bits[SIZE >> 12];

void tcg_phys_to_host(struct tcg_vm_core *vm, uint64_t gpa, struct page_info *page)
{
    (void)vm;
    memset(page, 0, sizeof *page);
    if (gpa < SIZE)
        *page = (struct page_info){ram + gpa, &code_bits[gpa >> 12], PAGE_RAM};
}
void tcg_mark_dirty(struct cpu *c, uint64_t gpa) { (void)c, (void)gpa; }
bool tcg_pio(struct cpu *c, uint16_t port, unsigned size, bool write, uint32_t *v) { (void)c, (void)port, (void)size, (void)write; *v = 0; return true; }
bool tcg_mmio(struct cpu *c, uint64_t gpa, unsigned size, bool write, uint64_t *v) { (void)c, (void)gpa, (void)size, (void)write; *v = 0; return true; }
int tcg_rdmsr(struct cpu *c, uint32_t index, uint64_t *v) { (void)c, (void)index; *v = 0; return 0; }
int tcg_wrmsr(struct cpu *c, uint32_t index, uint64_t v) { (void)c, (void)index, (void)v; return 0; }
int tcg_ack_interrupt(struct cpu *c) { (void)c; return -1; }
void tcg_cr8_changed(struct cpu *c) { (void)c; }
uint64_t tcg_read_cr8(struct cpu *c) { return c->cr8; }
uint64_t tcg_rdtsc(struct cpu *c) { (void)c; return 0; }
bool tcg_hypercall(struct cpu *c) { (void)c; return false; }
void tcg_wake(struct cpu *c) { (void)c; }

struct state {
    uint64_t gpr[16], flags;
    int vector; /* -1: none */
    uint8_t pad[256 - 17 * 8 - 4];
    uint8_t area[1088]; /* XSAVE, standard format */
} __attribute__((aligned(64)));
_Static_assert(offsetof(struct state, area) == 256, "known to the assembly");
enum { A_MXCSR = 24, A_ST = 32, A_XMM = 160, A_BV = 512, A_YMM = 576 };

/* ---- the host ---- */
void native_run(struct state *s, const void *code);
extern char native_exit[], native_abort[];
__asm__(".text\n.globl native_run\nnative_run:\n\t"
        "push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15\n\t"
        "mov %rsp, native_rsp(%rip); mov %rdi, native_cur(%rip); mov %rsi, native_code(%rip)\n\t"
        "mov $7, %eax; xor %edx, %edx; xrstor 256(%rdi)\n\tpushq 128(%rdi); popfq\n\t"
        "mov (%rdi), %rax; mov 8(%rdi), %rcx; mov 16(%rdi), %rdx; mov 24(%rdi), %rbx; mov 40(%rdi), %rbp; mov 48(%rdi), %rsi\n\t"
        "mov 64(%rdi), %r8; mov 72(%rdi), %r9; mov 80(%rdi), %r10; mov 88(%rdi), %r11; mov 96(%rdi), %r12; mov 104(%rdi), %r13\n\t"
        "mov 112(%rdi), %r14; mov 120(%rdi), %r15; mov 56(%rdi), %rdi\n\tjmp *native_code(%rip)\n"
        ".globl native_exit\nnative_exit:\n\tmov %rdi, native_tmp(%rip); mov native_cur(%rip), %rdi\n\t"
        "mov %rax, (%rdi); mov %rcx, 8(%rdi); mov %rdx, 16(%rdi); mov %rbx, 24(%rdi); mov %rbp, 40(%rdi); mov %rsi, 48(%rdi)\n\t"
        "mov %r8, 64(%rdi); mov %r9, 72(%rdi); mov %r10, 80(%rdi); mov %r11, 88(%rdi); mov %r12, 96(%rdi); mov %r13, 104(%rdi)\n\t"
        "mov %r14, 112(%rdi); mov %r15, 120(%rdi); mov native_tmp(%rip), %rax; mov %rax, 56(%rdi)\n\t"
        "pushfq; popq 128(%rdi); mov $7, %eax; xor %edx, %edx; xsave 256(%rdi)\n"
        ".globl native_abort\nnative_abort:\n\tcld; fninit; vzeroupper; ldmxcsr native_mxcsr(%rip)\n\tmov native_rsp(%rip), %rsp\n\t"
        "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx; ret\n"
        ".data\n.balign 8\nnative_rsp: .quad 0\nnative_cur: .quad 0\nnative_code: .quad 0\nnative_tmp: .quad 0\nnative_mxcsr: .long 0x1f80\n.text\n");

static struct state *running;
static void on_fault(int sig, siginfo_t *info, void *context)
{
    (void)info;
    ucontext_t *uc = context;
    greg_t *g = uc->uc_mcontext.gregs;
    if (!running)
        signal(sig, SIG_DFL);
    static const int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                  REG_R8, REG_R9, REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    for (int i = 0; i < 16; i++)
        running->gpr[i] = (uint64_t)g[order[i]];
    running->vector = (int)g[REG_TRAPNO];
    const uint8_t *fp = (const uint8_t *)uc->uc_mcontext.fpregs;
    uint64_t bv;
    memcpy(&bv, fp + A_BV, 8);
    memset(running->area, 0, sizeof running->area);
    memcpy(running->area, fp, 512);
    if (bv & 4)
        memcpy(running->area + A_YMM, fp + A_YMM, 256);
    g[REG_RIP] = (greg_t)(uintptr_t)native_abort;
}

/* ---- random states ---- */
/* What a case needs: memory fit for MXCSR, small indices, no unmasked denormal (loads then differ between processors),
 * no unmasked SSE exception. */
enum { KIND_PLAIN, KIND_MXCSR, KIND_GATHER, KIND_X87, KIND_X87_LOAD, KIND_MASKED };
static uint64_t seed;
static uint64_t rnd(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed * 0x2545f4914f6cdd1dull;
}
#include "values.h"

static void random_state(struct state *s, uint8_t *data, unsigned kind)
{
    memset(s, 0, sizeof *s);
    s->vector = -1;
    for (int i = 0; i < 16; i++)
        s->gpr[i] = pick(3) ? rnd() : (uint64_t)(int64_t)(int)(pick(41) - 20);
    s->gpr[RBX] = BASE + DATA + 32;
    s->gpr[RDI] = BASE + DATA + 64 + pick(32);
    s->flags = 0x202 | (rnd() & 0x8d5);
    fill(data, DATA_SIZE);
    if (kind == KIND_MXCSR)
        for (unsigned i = 2; i < DATA_SIZE; i += 4)
            data[i] = data[i + 1] = 0;
    if (pick(3) == 0)
        for (unsigned i = 32; i + 16 <= DATA_SIZE; i += 32)
            x87_value(data + i);
    fill(s->area + A_XMM, 256);
    fill(s->area + A_YMM, 256);
    if (kind == KIND_GATHER)
        for (unsigned i = 0; i < 2; i++)
            for (unsigned k = 0; k < 2; k++) {
                uint64_t small = pick(16);
                memcpy(s->area + (i ? A_YMM : A_XMM) + 32 + 8 * k, &small, 8);
            }
    uint32_t mxcsr = (uint32_t)(rnd() & 0xe07f) & (pick(2) ? ~0u : 0x7fbf);
    mxcsr |= pick(10) < 7 || kind == KIND_MASKED ? 0x1f80 : (uint32_t)rnd() & 0x1f80;
    if (pick(2))
        mxcsr &= ~0x3fu;
    memcpy(s->area + A_MXCSR, &mxcsr, 4);
    uint16_t cw = (uint16_t)(0x40 | pick(4) << 10 | (pick(2) ? 0x300 : pick(2) ? 0x200 : 0) | (pick(10) < 7 ? 0x3f : pick(64)));
    uint16_t sw = (uint16_t)(rnd() & 0x7f7f);
    if (pick(8))
        sw &= (uint16_t) ~(~cw & 0x3f);
    if (kind == KIND_X87_LOAD)
        cw |= 2;
    if (sw & ~cw & 0x3f)
        sw |= 0x8080;
    uint16_t tag = pick(10) < 6 ? 0xff : (uint16_t)(rnd() & 0xff);
    unsigned top = sw >> 11 & 7;
    if (pick(2)) /* room for one more */
        tag &= (uint16_t) ~(1 << ((top + 7) & 7));
    memcpy(s->area, &cw, 2);
    memcpy(s->area + 2, &sw, 2);
    memcpy(s->area + 4, &tag, 2);
    for (unsigned i = 0; i < 8; i++)
        x87_value(s->area + A_ST + 16 * i);
    s->area[A_BV] = 7;
}

/* ---- the guest ---- */
static void put64(uint64_t at, uint64_t v) { memcpy(ram + at, &v, 8); }
static struct cpu *start_guest(void)
{
    static struct tcg_vm_core vm;
    struct cpu *c = aligned_alloc(64, (sizeof *c + 63) & ~63ul);
    pthread_mutex_init(&vm.lock, NULL);
    if (cpu_init(c, &vm, 0))
        exit(2);
    vm.cpu[0] = c;
    vm.ncpu = 1;
    put64(GDT + 8, 0x00af9b000000ffff);
    put64(GDT + 16, 0x00cf93000000ffff);
    put64(PML4, PDPT | 3);
    put64(PDPT + 8, PD | 3);
    put64(PD, 0x83);
    for (unsigned i = 0; i < 256; i++) {
        uint64_t at = BASE + STUBS + i;
        put64(IDT + 16 * i, (at & 0xffff) | 8 << 16 | 0x8e00ull << 32 | (at >> 16 & 0xffff) << 48);
        ram[STUBS + i] = 0xf4;
    }
    struct segment flat = {.sel = 0x10, .limit = 0xffffffff, .attr = 0xc093};
    for (int i = 0; i <= SEG_GS; i++)
        c->seg[i] = flat;
    c->seg[SEG_CS] = (struct segment){.sel = 8, .limit = 0xffffffff, .attr = 0xa09b};
    c->gdt = (struct dtable){BASE + GDT, 0x17};
    c->idt = (struct dtable){BASE + IDT, 0xfff};
    c->cr0 = CR0_PE | CR0_PG | CR0_NE | CR0_MP | CR0_ET;
    c->cr3 = PML4;
    c->cr4 = CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_OSXSAVE;
    c->efer = EFER_LME | EFER_LMA;
    c->xcr0 = 7;
    cpu_update(c);
    return c;
}
static bool run_guest(struct cpu *c, struct state *s, unsigned len)
{
    memcpy(c->gpr, s->gpr, sizeof c->gpr);
    c->gpr[RSP] = BASE + STACK;
    cpu_set_rflags(c, s->flags & ~0x200ull);
    if (cpu_xsave_load(c, s->area, 7))
        return false;
    c->rip = BASE + CODE;
    c->halted = false;
    c->deadline = cpu_insns(c) + 100;
    if (cpu_run(c) != TCG_STOP_HLT)
        return false;
    memcpy(s->gpr, c->gpr, sizeof c->gpr);
    s->flags = cpu_rflags(c);
    s->vector = -1;
    if (c->rip > BASE + STUBS && c->rip <= BASE + STUBS + 256)
        s->vector = (int)(c->rip - 1 - BASE - STUBS);
    else if (c->rip != BASE + CODE + len + 1)
        return false;
    cpu_xsave_store(c, s->area, 7);
    return true;
}

/* ---- comparison ---- */
struct record { uint8_t len, code[15]; uint16_t flags, skip, skip_len; uint8_t kind; char name[31]; } __attribute__((packed));
static char why[200];
static bool same(const struct state *h, const struct state *g, const uint8_t *hd, const uint8_t *gd, const struct record *r)
{
    why[0] = 0;
#define DIFF(...) return snprintf(why, sizeof why, __VA_ARGS__), false
    if (h->vector != g->vector)
        DIFF("vector host %d guest %d", h->vector, g->vector);
    if (h->vector == EXC_PF)
        return true;
    for (int i = 0; i < 16; i++)
        if (i != RSP && h->gpr[i] != g->gpr[i])
            DIFF("gpr %d host %llx guest %llx", i, (unsigned long long)h->gpr[i], (unsigned long long)g->gpr[i]);
    uint16_t status;
    memcpy(&status, h->area + 2, 2);
    if (h->vector < 0 && (h->flags ^ g->flags) & r->flags && !(status & 0x80 && r->kind == KIND_X87))
        DIFF("flags host %llx guest %llx", (unsigned long long)h->flags, (unsigned long long)g->flags);
    uint16_t hw[3], gw[3];
    memcpy(hw, h->area, 6);
    memcpy(gw, g->area, 6);
    hw[2] &= 0xff;
    gw[2] &= 0xff;
    bool pending = hw[1] & 0x80; /* unmasked: condition codes are only defined for the masked response */
    if (pending) {
        hw[1] &= ~0x4700;
        gw[1] &= ~0x4700;
    }
    if (memcmp(hw, gw, 6))
        DIFF("x87 cw sw tags host %04x %04x %02x guest %04x %04x %02x", hw[0], hw[1], hw[2], gw[0], gw[1], gw[2]);
    uint32_t hm, gm;
    memcpy(&hm, h->area + A_MXCSR, 4);
    memcpy(&gm, g->area + A_MXCSR, 4);
    if (h->vector == EXC_XM && hm & 0x18)
        hm |= 0x20, gm |= 0x20; /* unmasked overflow and underflow: inexact is judged with an unbounded exponent there */
    if (hm != gm)
        DIFF("mxcsr host %x guest %x", hm, gm);
    for (int i = 0; i < 8; i++)
        if (memcmp(h->area + A_ST + 16 * i, g->area + A_ST + 16 * i, 10)) {
            uint64_t a[2] = {0}, b[2] = {0};
            memcpy(a, h->area + A_ST + 16 * i, 10);
            memcpy(b, g->area + A_ST + 16 * i, 10);
            DIFF("st%d host %04llx:%016llx guest %04llx:%016llx", i, (unsigned long long)a[1], (unsigned long long)a[0], (unsigned long long)b[1], (unsigned long long)b[0]);
        }
    for (int i = 0; i < 32; i++) {
        unsigned at = i < 16 ? A_XMM + 16 * i : A_YMM + 16 * (i - 16);
        uint64_t a[2], b[2];
        memcpy(a, h->area + at, 16);
        memcpy(b, g->area + at, 16);
        if (memcmp(a, b, 16))
            DIFF("%s%d host %016llx%016llx guest %016llx%016llx", i < 16 ? "xmm" : "ymm_high", i & 15, (unsigned long long)a[1], (unsigned long long)a[0],
                 (unsigned long long)b[1], (unsigned long long)b[0]);
    }
    for (unsigned i = 0; i < DATA_SIZE; i++)
        if (hd[i] != gd[i] && (i < r->skip + 32u || i >= r->skip + 32u + r->skip_len))
            DIFF("memory +%u host %02x guest %02x", i, hd[i], gd[i]);
    return true;
}

int main(int argc, char **argv)
{
    if (argc < 3)
        return 2;
    seed = strtoull(argv[1], NULL, 0) * 0x9e3779b97f4a7c15ull + 1;
    unsigned states = (unsigned)atoi(argv[2]);
    ram = mmap((void *)BASE, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    uint8_t *exec = mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (ram != (void *)BASE || exec == MAP_FAILED) {
        perror("mmap");
        return 2;
    }
    stack_t stack = {.ss_sp = malloc(1 << 16), .ss_size = 1 << 16};
    sigaltstack(&stack, NULL);
    struct sigaction act = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};
    int sigs[] = {SIGFPE, SIGILL, SIGSEGV, SIGBUS, SIGTRAP};
    for (unsigned i = 0; i < 5; i++)
        sigaction(sigs[i], &act, NULL);
    struct cpu *c = start_guest();
    static struct state initial, host, guest;
    static uint8_t data[DATA_SIZE], host_data[DATA_SIZE];
    struct record r;
    unsigned long run = 0, bad = 0, bad_here = 0, faults = 0;
    char last[32] = "";
    while (fread(&r, sizeof r, 1, stdin) == 1) {
        memcpy(ram + CODE, r.code, r.len);
        ram[CODE + r.len] = 0xf4;
        cpu_flush_code(c);
        memcpy(exec, r.code, r.len);
        memcpy(exec + r.len, "\xff\x25\0\0\0\0", 6);
        uint64_t back = (uint64_t)(uintptr_t)native_exit;
        memcpy(exec + r.len + 6, &back, 8);
        if (strncmp(last, r.name, 31)) {
            snprintf(last, sizeof last, "%.30s", r.name);
            bad_here = 0;
        }
        for (unsigned n = 0; n < states; n++, run++) {
            random_state(&initial, data, r.kind);
            memcpy(ram + DATA, data, DATA_SIZE);
            host = initial;
            running = &host;
            native_run(&host, exec);
            running = NULL;
            memcpy(host_data, ram + DATA, DATA_SIZE);
            memcpy(ram + DATA, data, DATA_SIZE);
            guest = initial;
            bool ok = run_guest(c, &guest, r.len);
            faults += host.vector >= 0;
            if (ok ? same(&host, &guest, host_data, ram + DATA, &r) : (snprintf(why, sizeof why, "the guest did not come back: rip %llx", (unsigned long long)c->rip), false))
                continue;
            bad++;
            if (bad_here++ < 2) {
                uint32_t mx;
                uint16_t w[3];
                memcpy(&mx, initial.area + A_MXCSR, 4);
                memcpy(w, initial.area, 6);
                printf("%-14.30s", r.name);
                for (unsigned i = 0; i < r.len; i++)
                    printf(" %02x", r.code[i]);
                printf(" | mxcsr %x cw %x sw %x tags %x | %s\n", mx, w[0], w[1], w[2] & 0xff, why);
            }
        }
    }
    printf("%lu runs, %lu faults on the host, %lu differences\n", run, faults, bad);
    return bad != 0;
}
