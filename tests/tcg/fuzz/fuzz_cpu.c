/* SPDX-License-Identifier: Apache-2.0
 *
 * Fuzz target: the processor core against any bytes in any mode.
 *
 * An input is a header, which chooses the state that a processor begins in (guest.h), and instructions. It runs three
 * times: twice as it is, which must give the same end bit by bit, and once instruction by instruction, which must give
 * the same end where nothing in it depends on how far a run goes. After each stop the state must be consistent.
 * The sanitizers and the inaccessible pages around each page of the guest see the rest.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <unistd.h>

#include "invariants.h"

enum { INSTRUCTIONS = 250, STOPS = 64, SLICE_MS = 50 };

struct end {
    enum tcg_stop stop;
    bool complete;      /* came to an end by itself: HLT with interrupts off, shutdown, error */
    bool kicked;        /* a tick came: the end is a matter of time */
    bool paging;        /* page tables or what they mean changed: stale translations are the guest's own fault */
    uint64_t gpr[16], rip, rflags, cr[5], dr[8], xcr0, efer, msrs[10];
    struct segment seg[SEG_COUNT];
    struct dtable gdt, idt;
    struct x87 fpu;
    uint32_t mxcsr, pkru;
    uint8_t cpl;
    union vec v[16];
};
static uint8_t memory[2][(PAGES + HIGH_PAGES) * 4096ul];
static volatile sig_atomic_t ticks;
static bool tracing; /* $FUZZ_TRACE: print each stop */

/* A kick, as the engine's ticker gives it: the core has to leave soon, wherever it is. */
static void tick(int signal)
{
    (void)signal;
    if (++ticks > 100) {
        static const char text[] = "kicked for five seconds, still running\n";
        ssize_t n = write(2, text, sizeof text - 1);
        (void)n;
        abort();
    }
    cpu_request(guest.cpu, CPU_REQ_EXIT);
}

static struct end end_of(const struct cpu *c, enum tcg_stop stop)
{
    struct end e;
    memset(&e, 0, sizeof e); /* compared with memcmp */
    e.stop = stop;
    memcpy(e.gpr, c->gpr, sizeof e.gpr);
    e.rip = c->rip;
    e.rflags = cpu_rflags(c);
    memcpy(e.cr, (const uint64_t[]){c->cr0, c->cr2, c->cr3, c->cr4, c->cr8}, sizeof e.cr);
    memcpy(e.dr, c->dr, sizeof e.dr);
    memcpy(e.msrs, (const uint64_t[]){c->star, c->lstar, c->cstar, c->fmask, c->kernel_gs_base, c->tsc_aux, c->sysenter_cs,
                                      c->sysenter_esp, c->sysenter_eip, c->pat}, sizeof e.msrs);
    e.xcr0 = c->xcr0;
    e.efer = c->efer;
    for (unsigned i = 0; i < SEG_COUNT; i++) {
        e.seg[i].base = c->seg[i].base;
        e.seg[i].limit = c->seg[i].limit;
        e.seg[i].attr = c->seg[i].attr;
        e.seg[i].sel = c->seg[i].sel;
    }
    e.gdt.base = c->gdt.base, e.gdt.limit = c->gdt.limit;
    e.idt.base = c->idt.base, e.idt.limit = c->idt.limit;
    for (unsigned i = 0; i < 8; i++)
        memcpy(e.fpu.r[i].raw, c->fpu.r[i].raw, 10);
    e.fpu.cw = c->fpu.cw, e.fpu.sw = c->fpu.sw, e.fpu.top = c->fpu.top, e.fpu.valid = c->fpu.valid;
    e.fpu.fop = c->fpu.fop, e.fpu.fip = c->fpu.fip, e.fpu.fdp = c->fpu.fdp, e.fpu.fcs = c->fpu.fcs, e.fpu.fds = c->fpu.fds;
    e.mxcsr = c->mxcsr;
    e.pkru = c->pkru;
    e.cpl = c->cpl;
    memcpy(e.v, c->v, sizeof e.v);
    return e;
}

/* Pages that changed must have been reported, and ROM (which the core cannot write) must be as it was. */
static void check_dirty_log(const uint8_t *before)
{
    for (int page = LOGGED_FIRST; page <= LOGGED_LAST; page++)
        if (!guest.reported[page] && memcmp(before + 4096 * page, guest_ram(page), 4096)) {
            fprintf(stderr, "page %#x was written and is not in the dirty log\n", page);
            abort();
        }
}

static struct end run(const uint8_t *data, size_t size, unsigned slice)
{
    static uint8_t before[(PAGES + HIGH_PAGES) * 4096ul];
    struct cpu *c = guest.cpu;
    enum tcg_stop stop = TCG_STOP_CANCEL;
    bool complete = false, kicked = false, paging = false;
    unsigned halts = 0, stops = 0;

    ticks = 0;
    guest_reset(data, size);
    memcpy(before, guest.ram, sizeof before);
    if (guest.h.segments >> 5 & 1)
        cpu_raise(c, LINE_INTR);
    uint64_t limit = cpu_insns(c) + INSTRUCTIONS, cr3 = c->cr3, cr0 = c->cr0, cr4 = c->cr4;
    for (; !complete && !kicked && stops < STOPS && cpu_insns(c) < limit;) {
        c->deadline = cpu_insns(c) + slice < limit ? cpu_insns(c) + slice : limit;
        stop = cpu_run(c);
        kicked = ticks > 0;
        if (tracing)
            fprintf(stderr, "%llu: stop %d, %x:%llx, mxcsr %x\n", (unsigned long long)cpu_insns(c), stop, c->seg[SEG_CS].sel,
                    (unsigned long long)c->rip, c->mxcsr);
        check_registers(c);
        paging |= c->cr3 != cr3 || c->cr0 != cr0 || c->cr4 != cr4;
        switch (stop) {
        case TCG_STOP_CANCEL:
            if (!kicked && cpu_insns(c) < c->deadline && !c->io.answered) {
                fprintf(stderr, "stopped %llu instructions before the deadline\n", (unsigned long long)(c->deadline - cpu_insns(c)));
                abort();
            }
            break;
        case TCG_STOP_IO:
            guest_answer(c);
            stops++;
            break;
        case TCG_STOP_HLT:
        case TCG_STOP_MWAIT:
            complete = !(c->sysflags & FL_IF) || ++halts > 4;
            if (!complete)
                cpu_raise(c, halts & 1 ? LINE_INTR : LINE_NMI);
            break;
        case TCG_STOP_SHUTDOWN:
        case TCG_STOP_ERROR:
            complete = true;
            break;
        default: /* nobody asked for these */
            fprintf(stderr, "stop %d\n", stop);
            abort();
        }
    }
    check_translations(c);
    check_dirty_log(before);
    struct end e = end_of(c, stop);
    e.complete = complete;
    e.kicked = kicked;
    e.paging = paging;
    return e;
}

static void show(const char *what, const struct end *a, const struct end *b)
{
    fprintf(stderr, "%s differ: stop %d %d, rip %llx %llx, rflags %llx %llx\n", what, a->stop, b->stop, (unsigned long long)a->rip,
            (unsigned long long)b->rip, (unsigned long long)a->rflags, (unsigned long long)b->rflags);
    for (unsigned i = 0; i < 16; i++)
        if (a->gpr[i] != b->gpr[i])
            fprintf(stderr, "r%u %llx %llx\n", i, (unsigned long long)a->gpr[i], (unsigned long long)b->gpr[i]);
    for (unsigned i = 0; i < 16; i++)
        for (unsigned j = 0; j < 8; j++)
            if (a->v[i].q[j] != b->v[i].q[j])
                fprintf(stderr, "v%u[%u] %llx %llx\n", i, j, (unsigned long long)a->v[i].q[j], (unsigned long long)b->v[i].q[j]);
    if (a->mxcsr != b->mxcsr)
        fprintf(stderr, "mxcsr %x %x\n", a->mxcsr, b->mxcsr);
    for (unsigned i = 0; i < sizeof *a; i++)
        if (((const uint8_t *)a)[i] != ((const uint8_t *)b)[i]) {
            fprintf(stderr, "first different byte of the state: %u of %zu\n", i, sizeof *a);
            break;
        }
    for (size_t i = 0; i < sizeof memory[0]; i++)
        if (memory[0][i] != memory[1][i]) {
            fprintf(stderr, "memory page %zx offset %zx: %02x %02x\n", i >> 12, i & 4095, memory[0][i], memory[1][i]);
            break;
        }
}

static void must_equal(const char *what, const struct end *a, const struct end *b)
{
    if (memcmp(a, b, sizeof *a) || memcmp(memory[0], memory[1], sizeof memory[0])) {
        show(what, a, b);
        abort();
    }
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc, (void)argv;
    guest_open();
    tracing = getenv("FUZZ_TRACE") != NULL;
    struct sigaction action = {.sa_handler = tick, .sa_flags = SA_RESTART};
    sigaction(SIGVTALRM, &action, NULL);
    struct itimerval every = {{0, SLICE_MS * 1000}, {0, SLICE_MS * 1000}};
    return setitimer(ITIMER_VIRTUAL, &every, NULL);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct end first = run(data, size, INSTRUCTIONS);
    memcpy(memory[0], guest.ram, sizeof memory[0]);
    if (first.kicked)
        return 0;
    struct end second = run(data, size, INSTRUCTIONS);
    memcpy(memory[1], guest.ram, sizeof memory[1]);
    if (second.kicked)
        return 0;
    must_equal("two runs", &first, &second);
    if (!first.complete || first.paging)
        return 0;
    struct end stepped = run(data, size, 1);
    memcpy(memory[1], guest.ram, sizeof memory[1]);
    if (stepped.complete && !stepped.kicked)
        must_equal("blocks and single instructions", &first, &stepped);
    return 0;
}
