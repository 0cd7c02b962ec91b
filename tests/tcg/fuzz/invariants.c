/* SPDX-License-Identifier: Apache-2.0
 *
 * What must hold of a processor whenever it is not running, whatever the guest did.
 */
#include "invariants.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MUST(condition)                                                                  \
    do {                                                                                 \
        if (!(condition)) {                                                              \
            fprintf(stderr, "%s:%d: broken: %s\n", __FILE__, __LINE__, #condition);      \
            abort();                                                                     \
        }                                                                                \
    } while (0)

void check_registers(const struct cpu *c)
{
    bool pe = c->cr0 & CR0_PE, pg = c->cr0 & CR0_PG, vm86 = c->sysflags & FL_VM;
    MUST(c->zero == 0);
    MUST(c->sysflags & 2 && !(c->sysflags & (FL_ARITH | 0xffc08028)));
    MUST(c->cpl <= 3);
    MUST(pe || c->cpl == 0);
    MUST(!pe || !vm86 || c->cpl == 3);
    MUST(!pg || pe);
    MUST(!(c->cr0 >> 32) && (!(c->cr0 & CR0_NW) || c->cr0 & CR0_CD));
    MUST(!!(c->efer & EFER_LMA) == (pg && c->efer & EFER_LME));
    MUST(!(c->efer & EFER_LMA) || (c->cr4 & CR4_PAE && !vm86));
    MUST(!(c->efer & ~(uint64_t)(EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE | EFER_FFXSR)));
    MUST(c->mode & MODE_CODE64 ? (c->efer & EFER_LMA) != 0 : !(c->rip >> 32));
    MUST(c->xcr0 & 1 && (!(c->xcr0 & 4) || c->xcr0 & 2) && !(c->xcr0 & ~0x207ull));
    MUST(c->fpu.top < 8 && !(c->fpu.sw & 0x3800));
    MUST(!(c->mxcsr >> 16));
    MUST(c->cr8 < 16);
    MUST(!c->block && !c->in_delivery);
    MUST(c->io.taken <= c->io.answered && c->io.answered <= CPU_IO_MAX);
    MUST(mmu_index(c) >= 0 && mmu_index(c) < MMU_COUNT);
}

static int page_at(const uint8_t *host)
{
    ptrdiff_t distance = host - guest_host(0);
    MUST(distance >= 0 && distance % (2 * 4096) == 0);
    int page = (int)(distance / (2 * 4096));
    MUST(page < PAGES + HIGH_PAGES);
    return page;
}

/* Each filled entry leads to the page it names, and stores go nowhere that somebody must hear of. */
void check_translations(const struct cpu *c)
{
    for (unsigned m = 0; m < MMU_COUNT; m++)
        for (unsigned i = 0; i < TLB_SIZE; i++) {
            const struct tlb_entry *e = &c->tlbs[m].e[i];
            const uint64_t tags[3] = {e->rd, e->wr, e->ex};
            for (unsigned k = 0; k < 3; k++) {
                if (tags[k] == TLB_INVALID)
                    continue;
                MUST(!(tags[k] & 0xfff) && (tags[k] >> 12 & (TLB_SIZE - 1)) == i);
                MUST(c->tlbs[m].used[i / 64] >> (i % 64) & 1);
                int page = page_at((uint8_t *)(tags[k] + e->addend));
                MUST(page == guest_page(c->tlbs[m].info[i].gpa));
                if (k != 1)
                    continue;
                MUST(!guest_is_rom(page));
                MUST(!guest_is_logged(page) || guest.reported[page]);
                MUST(!atomic_load(&guest.code[page]));
            }
        }
}

static uint8_t before[(PAGES + HIGH_PAGES) * 4096ul];
void remember_memory(void) { memcpy(before, guest.ram, sizeof before); }

/* Pages that changed must have been reported, and ROM (which the core cannot write) must be as it was. */
void check_dirty_log(void)
{
    for (int page = LOGGED_FIRST; page <= LOGGED_LAST; page++)
        if (!guest.reported[page] && memcmp(before + 4096 * page, guest_ram(page), 4096)) {
            fprintf(stderr, "page %#x was written and is not in the dirty log\n", page);
            abort();
        }
}
