/* SPDX-License-Identifier: Apache-2.0
 *
 * Between the files of the memory-management unit: paging.c walks page tables, tlb.c keeps what walks found, mmu.c
 * makes the accesses that missed. mem.h is what handlers see.
 */
#ifndef KVMPY_TCG_MMU_H
#define KVMPY_TCG_MMU_H

#include "core.h"

/* paging.c */
struct walk {
    uint64_t gpa;     /* of the 4 KiB page */
    unsigned shift;   /* size of the mapping as a power of two */
    bool read, write, exec; /* allowed for this mode */
    bool global, dirty, user, writable;
    uint8_t key;      /* 1 + protection key, of pages that PKRU guards; else 0 */
    uint32_t error;
};
/* Walks for `access` in mode `mmu`. true: allowed, w filled. false: w->error is the page fault's error code. With
 * `peek` nothing is changed (KVM_TRANSLATE). */
bool page_walk(struct cpu *c, uint64_t lin, enum access access, int mmu, bool peek, struct walk *w);

void walks_forget(struct cpu *c, bool global_too); /* after MOV CR3; with global pages, after everything else */
void walks_invlpg(struct cpu *c, uint64_t lin);

/* tlb.c */
struct place { uint8_t *host; uint64_t gpa; struct page_info page; }; /* where one byte is; host NULL: MMIO */
/* Translates one byte's page and fills the TLB entry; faults. */
struct place tlb_fill(struct cpu *c, int mmu, const struct uop *u, uint64_t lin, enum access access, int stack);
/* Linear addresses [lo, hi] are covered by large pages in `t`. */
void tlb_large(struct tlb *t, uint64_t lo, uint64_t hi);
/* These bits of PKRU changed: an entry that they decided about must be filled anew. */
void tlb_new_rights(struct tlb_entry *e, const struct tlb_info *info, uint32_t changed);

/* pcid.c */
void pcid_protect_code(struct cpu *c, uint64_t gpa);
void pcid_new_rights(struct cpu *c, uint32_t changed); /* in PKRU */

/* ea.c: an access near a segment limit, or through a segment that may not be written, is under way */
bool at_edge(const struct cpu *c);
void edge_check(struct cpu *c, const struct uop *u, uint64_t lin, unsigned size, bool write);

#endif
