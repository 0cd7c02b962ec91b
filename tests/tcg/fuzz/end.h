/* SPDX-License-Identifier: Apache-2.0
 *
 * Where a run of the processor ended: all that the guest could look at. Two runs of one input must end the same.
 */
#ifndef FUZZ_END_H
#define FUZZ_END_H

#include "guest.h"

struct end {
    enum tcg_stop stop;
    uint64_t gpr[16], rip, rflags, cr[5], dr[8], xcr0, efer, msrs[10];
    struct segment seg[SEG_COUNT];
    struct dtable gdt, idt;
    struct x87 fpu;
    uint32_t mxcsr, pkru;
    uint8_t cpl;
    union vec v[16];
    uint8_t memory[(PAGES + HIGH_PAGES) * 4096ul];
};

void end_take(struct end *e, enum tcg_stop stop); /* of guest.cpu and guest.ram */
void must_equal(const char *what, const struct end *a, const struct end *b); /* or the process ends */

#endif
