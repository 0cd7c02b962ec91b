/* SPDX-License-Identifier: Apache-2.0
 *
 * Fuzz target: the processor core against any bytes in any mode.
 *
 * An input is a header, which chooses the state that a processor begins in (guest.h), and instructions. It runs three
 * times: twice as it is, which must give the same end bit by bit, and once instruction by instruction, which must give
 * the same end where nothing in it depends on how far a run goes. After each stop the state must be consistent.
 * The sanitizers and the inaccessible pages around each page of the guest see the rest.
 */
#include <stdio.h>
#include <stdlib.h>

#include "end.h"
#include "invariants.h"

enum { INSTRUCTIONS = 250, STOPS = 64, SLICE_MS = 50 };

struct ran {
    bool complete;      /* came to an end by itself: HLT with interrupts off, shutdown, error */
    bool kicked;        /* a tick came: the end is a matter of time */
    bool paging;        /* page tables or what they mean changed: stale translations are the guest's own fault */
};
static struct end first, again;
static bool tracing; /* $FUZZ_TRACE: print each stop */

static struct ran run(const uint8_t *data, size_t size, unsigned slice, struct end *end)
{
    struct cpu *c = guest.cpu;
    enum tcg_stop stop = TCG_STOP_CANCEL;
    struct ran ran = {0};
    unsigned halts = 0, stops = 0;

    guest_reset(data, size);
    remember_memory();
    if (guest.h.segments >> 5 & 1)
        cpu_raise(c, LINE_INTR);
    uint64_t limit = cpu_insns(c) + INSTRUCTIONS, cr3 = c->cr3, cr0 = c->cr0, cr4 = c->cr4;
    for (; !ran.complete && !ran.kicked && stops < STOPS && cpu_insns(c) < limit;) {
        c->deadline = cpu_insns(c) + slice < limit ? cpu_insns(c) + slice : limit;
        stop = cpu_run(c);
        ran.kicked = guest.kicks > 0;
        if (tracing)
            fprintf(stderr, "%llu: stop %d, %x:%llx, mxcsr %x, sw %x\n", (unsigned long long)cpu_insns(c), stop, c->seg[SEG_CS].sel,
                    (unsigned long long)c->rip, c->mxcsr, c->fpu.sw);
        check_registers(c);
        ran.paging |= c->cr3 != cr3 || c->cr0 != cr0 || c->cr4 != cr4;
        switch (stop) {
        case TCG_STOP_CANCEL:
            if (!ran.kicked && cpu_insns(c) < c->deadline && !c->io.answered) {
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
            ran.complete = !(c->sysflags & FL_IF) || ++halts > 4;
            if (!ran.complete)
                cpu_raise(c, halts & 1 ? LINE_INTR : LINE_NMI);
            break;
        case TCG_STOP_SHUTDOWN:
        case TCG_STOP_ERROR:
            ran.complete = true;
            break;
        default: /* nobody asked for these */
            fprintf(stderr, "stop %d\n", stop);
            abort();
        }
    }
    check_translations(c);
    check_dirty_log();
    end_take(end, stop);
    return ran;
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc, (void)argv;
    guest_open();
    tracing = getenv("FUZZ_TRACE") != NULL;
    guest_kick_every(SLICE_MS);
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct ran ran = run(data, size, INSTRUCTIONS, &first);
    if (ran.kicked || run(data, size, INSTRUCTIONS, &again).kicked)
        return 0;
    must_equal("two runs", &first, &again);
    if (!ran.complete || ran.paging)
        return 0;
    struct ran stepped = run(data, size, 1, &again);
    if (stepped.complete && !stepped.kicked)
        must_equal("blocks and single instructions", &first, &again);
    return 0;
}
