/* SPDX-License-Identifier: Apache-2.0
 *
 * The core without a machine: loads a flat binary at 0x1000, runs it in real, 32-bit or 64-bit mode until it stops,
 * prints why, the registers and the speed. For work on handlers and as the smallest example of the cpu.h contract.
 *
 *     flat 16|32|64 code.bin [instructions limit]
 *
 * 64-bit: identity map of 1 GiB by 2 MiB pages at 0x10000; GDT at 0x500: 8 code64, 0x10 data, 0x18 code32, 0x20 code16.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "../../../kvmpy/tcg/cpu.h"

#define RAM (64u << 20)
static uint8_t *ram;
static _Atomic uint64_t *code;

void tcg_phys_to_host(struct tcg_vm_core *vm, uint64_t gpa, struct page_info *page)
{
    (void)vm;
    memset(page, 0, sizeof *page);
    if (gpa >= RAM)
        return;
    page->host = ram + gpa;
    page->code = &code[gpa >> 12];
    page->flags = PAGE_RAM;
}
void tcg_mark_dirty(struct cpu *c, uint64_t gpa) { (void)c, (void)gpa; }
bool tcg_pio(struct cpu *c, uint16_t port, unsigned size, bool write, uint32_t *value)
{
    (void)c, (void)size;
    if (port == 0xe9 && write)
        putchar((int)*value);
    else if (!write)
        *value = ~0u;
    return true;
}
bool tcg_mmio(struct cpu *c, uint64_t gpa, unsigned size, bool write, uint64_t *value)
{
    (void)c, (void)gpa, (void)size;
    if (!write)
        *value = ~0ull;
    return true;
}
int tcg_rdmsr(struct cpu *c, uint32_t index, uint64_t *value)
{
    (void)c;
    *value = index == 0xc0000080 ? c->efer : 0;
    return 0;
}
int tcg_wrmsr(struct cpu *c, uint32_t index, uint64_t value) { return index == 0xc0000080 ? cpu_set_efer(c, value) : 0; }
int tcg_ack_interrupt(struct cpu *c) { (void)c; return -1; }
void tcg_cr8_changed(struct cpu *c) { (void)c; }
uint64_t tcg_read_cr8(struct cpu *c) { return c->cr8; }
uint64_t tcg_rdtsc(struct cpu *c) { return cpu_insns(c); }
bool tcg_hypercall(struct cpu *c) { (void)c; return false; }
void tcg_wake(struct cpu *c) { (void)c; }

static void put64(uint64_t gpa, uint64_t v) { memcpy(ram + gpa, &v, 8); }

int main(int argc, char **argv)
{
    if (argc < 3)
        return 2;
    int bits = atoi(argv[1]);
    ram = mmap(NULL, RAM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    code = calloc(RAM >> 12, 8);
    FILE *f = fopen(argv[2], "rb");
    if (!f || ram == MAP_FAILED || !fread(ram + 0x1000, 1, RAM - 0x1000, f))
        return 2;
    fclose(f);
    struct cpu *c = aligned_alloc(64, (sizeof *c + 63) & ~63ul);
    static struct tcg_vm_core vm;
    pthread_mutex_init(&vm.lock, NULL);
    cpu_init(c, &vm, 0);
    vm.cpu[0] = c;
    vm.ncpu = 1;
    put64(0x508, 0x00af9b000000ffff);
    put64(0x510, 0x00cf93000000ffff);
    put64(0x518, 0x00cf9b000000ffff);
    put64(0x520, 0x000f9b000000ffff);
    c->gdt = (struct dtable){0x500, 0x27};
    c->cr4 = 0x600 | CR4_FSGSBASE;
    c->seg[SEG_CS] = (struct segment){.sel = 0, .limit = 0xffff, .attr = 0x9b};
    if (bits != 16) {
        struct segment flat = {.sel = 0x10, .limit = 0xffffffff, .attr = 0xc093};
        for (int i = 0; i <= SEG_GS; i++)
            c->seg[i] = flat;
        c->cr0 |= CR0_PE;
        c->seg[SEG_CS] = (struct segment){.sel = 0x18, .limit = 0xffffffff, .attr = 0xc09b};
    }
    if (bits == 64) {
        put64(0x10000, 0x11003);
        put64(0x11000, 0x12003);
        for (uint64_t i = 0; i < 512; i++)
            put64(0x12000 + 8 * i, i << 21 | 0x83);
        c->seg[SEG_CS] = (struct segment){.sel = 8, .limit = 0xffffffff, .attr = 0xa09b};
        c->cr3 = 0x10000;
        c->cr4 |= CR4_PAE;
        c->efer = EFER_LME | EFER_LMA;
        c->cr0 |= CR0_PG;
    }
    c->rip = 0x1000;
    c->gpr[RSP] = bits == 16 ? 0xf000 : 0x200000;
    cpu_update(c);
    if (argc > 3)
        c->deadline = strtoull(argv[3], NULL, 0);
    struct timespec a, b;
    clock_gettime(CLOCK_MONOTONIC, &a);
    enum tcg_stop stop = cpu_run(c);
    clock_gettime(CLOCK_MONOTONIC, &b);
    static const char *names[] = {"cancel", "io", "hlt", "shutdown", "debug", "window", "hypercall", "handback", "mwait", "error"};
    static const char *regs[] = {"rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"};
    double s = (double)(b.tv_sec - a.tv_sec) + (double)(b.tv_nsec - a.tv_nsec) / 1e9;
    printf("stop=%s rip=%llx rflags=%llx%s%s\n", names[stop], (unsigned long long)c->rip, (unsigned long long)cpu_rflags(c),
           stop == TCG_STOP_ERROR ? " " : "", stop == TCG_STOP_ERROR ? c->error_text : "");
    for (int i = 0; i < 16; i++)
        printf("%s=%llx%c", regs[i], (unsigned long long)c->gpr[i], i % 8 == 7 ? '\n' : ' ');
    fprintf(stderr, "%.0f M instructions, %.0f M/s; blocks %llu lookups %llu tlb misses %llu smc %llu\n", (double)cpu_insns(c) / 1e6,
            (double)cpu_insns(c) / s / 1e6, (unsigned long long)c->stat.blocks, (unsigned long long)c->stat.lookups,
            (unsigned long long)c->stat.tlb_miss, (unsigned long long)c->stat.smc);
    cpu_free(c);
    free(c);
    return 0;
}
