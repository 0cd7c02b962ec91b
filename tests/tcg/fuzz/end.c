/* SPDX-License-Identifier: Apache-2.0
 *
 * Taking and comparing ends; see end.h.
 */
#include "end.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void end_take(struct end *e, enum tcg_stop stop)
{
    const struct cpu *c = guest.cpu;
    memset(e, 0, sizeof *e); /* compared with memcmp */
    e->stop = stop;
    memcpy(e->gpr, c->gpr, sizeof e->gpr);
    e->rip = c->rip;
    e->rflags = cpu_rflags(c);
    memcpy(e->cr, (const uint64_t[]){c->cr0, c->cr2, c->cr3, c->cr4, c->cr8}, sizeof e->cr);
    memcpy(e->dr, c->dr, sizeof e->dr);
    memcpy(e->msrs, (const uint64_t[]){c->star, c->lstar, c->cstar, c->fmask, c->kernel_gs_base, c->tsc_aux, c->sysenter_cs,
                                      c->sysenter_esp, c->sysenter_eip, c->pat}, sizeof e->msrs);
    e->xcr0 = c->xcr0;
    e->efer = c->efer;
    for (unsigned i = 0; i < SEG_COUNT; i++) {
        e->seg[i].base = c->seg[i].base;
        e->seg[i].limit = c->seg[i].limit;
        e->seg[i].attr = c->seg[i].attr;
        e->seg[i].sel = c->seg[i].sel;
    }
    e->gdt.base = c->gdt.base, e->gdt.limit = c->gdt.limit;
    e->idt.base = c->idt.base, e->idt.limit = c->idt.limit;
    for (unsigned i = 0; i < 8; i++)
        memcpy(e->fpu.r[i].raw, c->fpu.r[i].raw, 10);
    e->fpu.cw = c->fpu.cw, e->fpu.sw = c->fpu.sw, e->fpu.top = c->fpu.top, e->fpu.valid = c->fpu.valid;
    e->fpu.fop = c->fpu.fop, e->fpu.fip = c->fpu.fip, e->fpu.fdp = c->fpu.fdp, e->fpu.fcs = c->fpu.fcs, e->fpu.fds = c->fpu.fds;
    e->mxcsr = c->mxcsr;
    e->pkru = c->pkru;
    e->cpl = c->cpl;
    memcpy(e->v, c->v, sizeof e->v);
    memcpy(e->memory, guest.ram, sizeof e->memory);
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
    for (size_t i = 0; i < offsetof(struct end, memory); i++)
        if (((const uint8_t *)a)[i] != ((const uint8_t *)b)[i]) {
            fprintf(stderr, "first different byte of the state: %zu of %zu\n", i, offsetof(struct end, memory));
            break;
        }
    for (size_t i = 0; i < sizeof a->memory; i++)
        if (a->memory[i] != b->memory[i]) {
            fprintf(stderr, "memory page %zx offset %zx: %02x %02x\n", i >> 12, i & 4095, a->memory[i], b->memory[i]);
            break;
        }
}

void must_equal(const char *what, const struct end *a, const struct end *b)
{
    if (memcmp(a, b, sizeof *a)) {
        show(what, a, b);
        abort();
    }
}
