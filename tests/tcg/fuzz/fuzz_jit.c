/* SPDX-License-Identifier: Apache-2.0
 *
 * Fuzz target: host code against the interpreter, for any 64-bit code.
 *
 * An input (guest.h) runs in the interpreter first. If it comes to an end by itself within some instructions (HLT,
 * triple fault, an error; handlers of exceptions mostly lead to HLT) it runs again, each block as host code from its first
 * or one of its next times on, and must come to the same end bit by bit. Host code counts instructions too low and looks
 * at requests at fewer places, so nothing here depends on either: no interrupts come, time stands still, and the second
 * run has no limit but PATIENCE kicks: then it has gone another way for good. Otherwise a kicked run is not compared, for
 * a REP that overwrites itself shows the kick.
 *
 * Two things may differ: flags that the manual leaves undefined (doubt.h), and anything once page tables changed, as it is
 * up to a processor how long a translation lives on.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "doubt.h"
#include "end.h"
#include "invariants.h"
#include "jit_code.h"
#include "optable.h"

enum { INSTRUCTIONS = 1000, STOPS = 64, SLICE_MS = 20, PATIENCE = 100, NO_JIT = 3 };

static struct end interpreted, compiled, a, b;
static struct jit *jit;
static bool tracing; /* $FUZZ_TRACE: print each stop */
static unsigned long inputs, compared, blocks;

/* The mappings of all page tables that make_tables() knows, without their A and D bits. */
static uint64_t translations(const struct cpu *c)
{
    static const uint64_t accessed_dirty = 0x60;
    uint64_t sum = mix(c->cr3) ^ (c->cr0 & (CR0_PG | CR0_WP)) ^ c->cr4;
    unsigned first = guest.h.segments >> 3 & 1 ? TABLES >> 12 : ROM_FIRST;
    for (unsigned page = first; page < first + 4; page++)
        for (unsigned i = 0; i < 4096; i += 8) {
            uint64_t entry;
            memcpy(&entry, guest_ram((int)page) + i, 8);
            sum = mix(sum + (entry & ~accessed_dirty));
        }
    return sum;
}

/* False: no end, a kick, or page tables changed. */
static bool run(const uint8_t *data, size_t size, bool host_code, struct end *end)
{
    struct cpu *c = guest.cpu;
    enum tcg_stop stop = TCG_STOP_CANCEL;
    unsigned answers = 0;

    guest_reset(data, size);
    remember_memory();
    jit->threshold = size & 3 ? 0 : 2; /* at once, or when it is known which way branches go */
    c->jit.state = host_code ? jit : NULL;
    c->deadline = host_code ? ~0ull : cpu_insns(c) + INSTRUCTIONS;
    uint64_t before = translations(c);
    bool goes_on = true;
    while (goes_on) {
        stop = cpu_run(c);
        if (tracing)
            fprintf(stderr, "%s: stop %d, %x:%llx, mxcsr %x\n", host_code ? "jit" : "interpreter", stop, c->seg[SEG_CS].sel, (unsigned long long)c->rip, c->mxcsr);
        check_registers(c);
        if (stop == TCG_STOP_IO)
            guest_answer(c);
        goes_on = stop == TCG_STOP_IO ? ++answers < STOPS : stop == TCG_STOP_CANCEL && (host_code ? guest.kicks < PATIENCE : cpu_insns(c) < c->deadline && !guest.kicks);
    }
    check_translations(c);
    check_dirty_log();
    end_take(end, stop);
    blocks += c->stat.jit_blocks;
    return stop != TCG_STOP_CANCEL && stop != TCG_STOP_IO && !guest.kicks && translations(c) == before;
}

static void tell(void)
{
    printf("%lu of %lu inputs came to an end, with %lu blocks of host code\n", compared, inputs, blocks);
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc, (void)argv;
    setenv("KVMPY_TCG", "jit", 1);
    setenv("KVMPY_JIT", "all", 0);
    guest_open();
    jit = guest.cpu->jit.state;
    if (!jit) {
        fprintf(stderr, "no executable memory here for a JIT\n");
        exit(NO_JIT);
    }
    guest.vm.deterministic = false; /* it has no JIT */
    guest.cpu->features[FEAT_RDRAND / 64] &= ~(1ull << FEAT_RDRAND % 64);
    guest.cpu->features[FEAT_RDSEED / 64] &= ~(1ull << FEAT_RDSEED % 64);
    tracing = getenv("FUZZ_TRACE") != NULL;
    guest_kick_every(SLICE_MS);
    return atexit(tell);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size <= sizeof(struct header) || (data[0] & 7) != LONG)
        return 0;
    inputs++;
    if (!run(data, size, false, &interpreted))
        return 0;
    compared++;
    bool ended = run(data, size, true, &compiled), endless = guest.kicks >= PATIENCE;
    if ((!ended && !endless) || (ended && !memcmp(&interpreted, &compiled, sizeof compiled)))
        return 0;
    a = interpreted;
    b = compiled;
    if (doubt_remove(data, size, INSTRUCTIONS, &a, &b))
        must_equal("interpreter and host code", &a, &b);
    return 0;
}
