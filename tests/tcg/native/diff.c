/* SPDX-License-Identifier: Apache-2.0
 *
 * The host processor as oracle: runs each instruction of a list both natively, here, and in the core, from the same
 * registers, flags and memory, and compares all of them afterwards.
 *
 *     diff seed rounds < cases        cases: 24-byte records of instructions.py
 *
 * The instruction runs natively in this process: all registers are loaded from `in`, the bytes executed, and what is left
 * stored in `out`, RIP-relative, so that no register is needed. Signals are caught on another stack and compared with
 * the exception the core raised (an IDT of HLTs tells which). Guest linear 0x10000000 is a buffer of the guest's; the
 * same address of this process is the native one.
 */
#define _GNU_SOURCE
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include "../../../kvmpy/tcg/cpu.h"

#define DATA 0x10000000ull
#define DATA_SIZE 8192
#define RAM (4u << 20)

struct record {
    uint8_t len, bytes[15];
    uint8_t undefined;  /* flags not compared: bit order o s z a p c */
    uint8_t base, index; /* GPR numbers that must hold addresses / small values, 0xff: none */
    uint8_t small;       /* another register with a small value */
    uint8_t flags;       /* 1: string (RSI, RDI, RCX prepared), 2: RBX is an address, 4: base is 16-byte aligned */
    uint8_t pad[3];
};

struct state { uint64_t gpr[16], flags; };
struct state native_in, native_out;
uint64_t native_stack;
void native_enter(void *target);
extern char native_leave[];
__asm__(".text\n.globl native_enter, native_leave\nnative_enter:\n"
        "push %rbx\npush %rbp\npush %r12\npush %r13\npush %r14\npush %r15\n"
        "mov %rsp, native_stack(%rip)\nmov %rdi, native_target(%rip)\n"
        "pushq native_in+128(%rip)\npopfq\n"
        "mov native_in+0(%rip),%rax\nmov native_in+8(%rip),%rcx\nmov native_in+16(%rip),%rdx\nmov native_in+24(%rip),%rbx\n"
        "mov native_in+32(%rip),%rsp\nmov native_in+40(%rip),%rbp\nmov native_in+48(%rip),%rsi\nmov native_in+56(%rip),%rdi\n"
        "mov native_in+64(%rip),%r8\nmov native_in+72(%rip),%r9\nmov native_in+80(%rip),%r10\nmov native_in+88(%rip),%r11\n"
        "mov native_in+96(%rip),%r12\nmov native_in+104(%rip),%r13\nmov native_in+112(%rip),%r14\nmov native_in+120(%rip),%r15\n"
        "jmp *native_target(%rip)\n"
        "native_leave:\n"
        "mov %rax,native_out+0(%rip)\nmov %rcx,native_out+8(%rip)\nmov %rdx,native_out+16(%rip)\nmov %rbx,native_out+24(%rip)\n"
        "mov %rsp,native_out+32(%rip)\nmov %rbp,native_out+40(%rip)\nmov %rsi,native_out+48(%rip)\nmov %rdi,native_out+56(%rip)\n"
        "mov %r8,native_out+64(%rip)\nmov %r9,native_out+72(%rip)\nmov %r10,native_out+80(%rip)\nmov %r11,native_out+88(%rip)\n"
        "mov %r12,native_out+96(%rip)\nmov %r13,native_out+104(%rip)\nmov %r14,native_out+112(%rip)\nmov %r15,native_out+120(%rip)\n"
        "mov native_stack(%rip),%rsp\npushfq\npopq native_out+128(%rip)\ncld\n"
        "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbp\npop %rbx\nret\n"
        ".data\n.globl native_target\nnative_target: .quad 0\n.text\n");

static uint8_t *ram, *guest_data, *native_data;
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
    p->flags = p->host ? PAGE_RAM : 0;
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

static sigjmp_buf caught;
static int caught_signal;
static void on_signal(int s, siginfo_t *i, void *ctx)
{
    (void)i, (void)ctx;
    caught_signal = s;
    siglongjmp(caught, 1);
}

static const char *regs[] = {"rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"};

int main(int argc, char **argv)
{
    unsigned long rounds = argc > 2 ? strtoul(argv[2], NULL, 0) : 1;
    static unsigned long bad, total;
    uint64_t first_seed = argc > 1 ? strtoull(argv[1], NULL, 0) : 1;
    uint8_t *exec = mmap((void *)0x20000000, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    native_data = mmap((void *)DATA, DATA_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    if (exec == MAP_FAILED || native_data != (void *)DATA) {
        fprintf(stderr, "no memory at the wanted addresses\n");
        return 2;
    }
    guest_data = aligned_alloc(4096, DATA_SIZE);
    ram = aligned_alloc(4096, RAM);
    memset(ram, 0, RAM);
    marks = calloc((RAM >> 12) + 2, 8);
    stack_t alt = {.ss_sp = malloc(65536), .ss_size = 65536};
    sigaltstack(&alt, NULL);
    struct sigaction sa = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};
    int sigs[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP};
    for (int i = 0; i < 5; i++)
        sigaction(sigs[i], &sa, NULL);

    static struct tcg_vm_core vm;
    pthread_mutex_init(&vm.lock, NULL);
    struct cpu *c = aligned_alloc(64, (sizeof *c + 63) & ~63ul);
    cpu_init(c, &vm, 0);
    vm.cpu[0] = c;
    vm.ncpu = 1;
    c->features[0] = c->features[1] = ~0ull; /* also what is not announced yet */
    uint64_t *q = (uint64_t *)(ram + 0x10000);
    q[0] = 0x11003;
    ((uint64_t *)(ram + 0x11000))[0] = 0x12003;
    for (uint64_t i = 0; i < 512; i++)
        ((uint64_t *)(ram + 0x12000))[i] = i << 21 | 0x83;
    for (unsigned v = 0; v < 32; v++) { /* an IDT whose handlers are HLT at 0x4000 + 16 * vector */
        uint64_t a = 0x4000 + 16 * v;
        ram[a] = 0xf4;
        ((uint64_t *)(ram + 0x2000))[2 * v] = (a & 0xffff) | 8 << 16 | 0x8e01ull << 32; /* IST 1 */
    }
    uint64_t ist = 0x9000;
    memcpy(ram + 0x3000 + 0x24, &ist, 8);
    ((uint64_t *)(ram + 0x500))[1] = 0x00af9b000000ffff;
    ((uint64_t *)(ram + 0x500))[2] = 0x00cf93000000ffff;
    static struct record list[65536];
    size_t n = fread(list, sizeof list[0], 65536, stdin);

    for (unsigned long round = 0; round < rounds; round++)
        for (size_t k = 0; k < n; k++) {
            const struct record *r = &list[k];
            uint64_t case_seed = first_seed * 1000003 + round * 65537 + k;
            seed = case_seed;
            for (int i = 0; i < 16; i++)
                native_in.gpr[i] = interesting();
            if (r->small != 0xff)
                native_in.gpr[r->small] = (native_in.gpr[r->small] & ~0xffffull) | (rnd() & 0x3ff), native_in.gpr[r->small] &= 0x3ff;
            if (r->index != 0xff)
                native_in.gpr[r->index] = rnd() & 63;
            if (r->base != 0xff)
                native_in.gpr[r->base] = DATA + 0x800 + (r->flags & 4 ? (rnd() & 0x3f0) : (rnd() & 0x3ff));
            if (r->flags & 1) {
                native_in.gpr[RSI] = DATA + 0x800 + (rnd() & 0x1ff);
                native_in.gpr[RDI] = DATA + 0xa00 + (rnd() & 0x1ff) - (rnd() & 1 ? 0x200 : 0);
                native_in.gpr[RCX] = rnd() & 15;
            }
            if (r->flags & 2)
                native_in.gpr[RBX] = DATA + 0x800;
            if (r->base != RSP)
                native_in.gpr[RSP] = DATA + 0x1c00;
            native_in.flags = (rnd() & 0x8d5) | 0x202 | (r->flags & 1 ? rnd() & 0x400 : 0);
            for (int i = 0; i < DATA_SIZE / 8; i++)
                ((uint64_t *)native_data)[i] = ((uint64_t *)guest_data)[i] = interesting();

            memcpy(exec, r->bytes, r->len);
            exec[r->len] = 0xff;
            exec[r->len + 1] = 0x25;
            memset(exec + r->len + 2, 0, 4);
            uint64_t leave = (uint64_t)native_leave;
            memcpy(exec + r->len + 6, &leave, 8);
            caught_signal = 0;
            if (!sigsetjmp(caught, 1))
                native_enter(exec);

            memcpy(ram + 0x1000, r->bytes, r->len);
            ram[0x1000 + r->len] = 0xf4;
            cpu_flush_code(c);
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
            memcpy(c->gpr, native_in.gpr, sizeof c->gpr);
            c->rip = 0x1000;
            cpu_set_rflags(c, native_in.flags & ~0x200ull);
            cpu_update(c);
            enum tcg_stop stop = cpu_run(c);
            total++;

            int vector = c->rip > 0x4000 && c->rip < 0x4200 ? (int)(c->rip - 0x4001) / 16 : -1;
            char why[256] = "";
            if (stop != TCG_STOP_HLT)
                snprintf(why, sizeof why, "stop %d", stop);
            else if (caught_signal || vector >= 0) {
                int expect = caught_signal == SIGFPE ? EXC_DE : caught_signal == SIGILL ? EXC_UD : caught_signal == SIGSEGV ? EXC_GP : caught_signal == SIGBUS ? EXC_AC : -1;
                if (vector != expect && !(expect == EXC_GP && vector == EXC_PF))
                    snprintf(why, sizeof why, "native signal %d, core vector %d", caught_signal, vector);
            } else {
                static const uint32_t bit[6] = {FL_OF, FL_SF, FL_ZF, FL_AF, FL_PF, FL_CF};
                uint32_t mask = FL_ARITH | FL_DF;
                for (int i = 0; i < 6; i++)
                    if (r->undefined >> i & 1)
                        mask &= ~bit[i];
                uint64_t f = cpu_rflags(c);
                if ((f ^ native_out.flags) & mask)
                    snprintf(why, sizeof why, "flags native %03llx core %03llx (in %03llx)", (unsigned long long)native_out.flags & 0xfff, (unsigned long long)f & 0xfff, (unsigned long long)native_in.flags & 0xfff);
                for (int i = 0; i < 16 && !*why; i++)
                    if (c->gpr[i] != native_out.gpr[i])
                        snprintf(why, sizeof why, "%s native %llx core %llx (in %llx)", regs[i], (unsigned long long)native_out.gpr[i], (unsigned long long)c->gpr[i], (unsigned long long)native_in.gpr[i]);
                for (int i = 0; i < DATA_SIZE && !*why; i++)
                    if (native_data[i] != guest_data[i])
                        snprintf(why, sizeof why, "memory +%x native %02x core %02x", i, native_data[i], guest_data[i]);
            }
            if (*why) {
                if (bad++ < 60) {
                    printf("case %zu round %lu:", k, round);
                    for (int i = 0; i < r->len; i++)
                        printf(" %02x", r->bytes[i]);
                    printf(": %s\n", why);
                }
            }
        }
    printf("%lu cases, %lu differences\n", total, bad);
    return bad != 0;
}
