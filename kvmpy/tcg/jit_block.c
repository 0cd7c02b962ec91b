/* SPDX-License-Identifier: Apache-2.0
 *
 * Host code of a block: which flags can be seen where, the instructions, the ways out.
 *
 * A trace is a block and what follows it behind a branch that is seldom taken, and so on: one piece of code with several
 * ways out, whose flags and registers know of each other. The blocks behind exist besides, for whoever comes there
 * another way.
 *
 * An instruction that crosses into the next page is a block of its own; its code looks first whether that still is the
 * page it was, as links out of the page do.
 *
 * The block's bytes are decoded once more, for the encodings; if that does not give the block's own micro-ops (a store
 * by another processor is on its way here), there is no host code.
 *
 * A way out to a known place is a link. Inside the page it is a jump (`near`) to a stub that saves the flags and jumps
 * on (`far`) to the exit. Linked to a block that may show the flags it gets, the stub's jump leads there; to one that
 * overwrites them first, the near jump itself does. Backward jumps look at requests; jumps out of the page prove the
 * translation by the context's serial number. Both clobber EFLAGS; with a recipe (jit_flags.c) they save them before
 * only when the target may show them.
 */
#include "jit_code.h"

#if HAVE_JIT
#include "optable.h"

#define MAX_INSNS 64
#define MAX_BYTES 255 /* offsets in a block are bytes */
#define FARTHEST ((1ll << 31) - 8192) /* of targets of links: pages are added and taken back as 32-bit immediates */

OP_DECL(fall);
OP_DECL(sti);

OP(jit_push)
{
    uint64_t sp = c->gpr[RSP] - 8;
    ststk64(c, u, sp, c->scratch[1]);
    c->gpr[RSP] = sp;
    NEXT;
}
OP(jit_top)
{
    c->scratch[1] = ldstk64(c, u, c->gpr[RSP]);
    NEXT;
}
OP(jit_load)
{
    c->scratch[1] = u->seg == SEG_SS ? ldstk64(c, u, ea(c, u)) : ld64(c, u, ea(c, u)); /* #SS or #GP where it is not canonical */
    NEXT;
}

/* ---- ways out ---- */

/* From `site` to the loop, with RIP at this offset and the state of now; EFLAGS are lost. */
static void leave_from(struct emit *e, uint8_t *site, uint32_t offset)
{
    e->leave[e->nleave++] = (struct leave){site, offset, e->dirty, jit_lost(e->flags), e->recipe};
}

void jit_leave_if(struct emit *e, unsigned cond, uint32_t offset) { leave_from(e, jcc32(&e->a, cond), offset); }

/* To the loop, at a constant RIP. */
static void leave_at(struct place_of_code *a, struct emit *e, uint32_t offset)
{
    jit_address(a, e, S0, (int32_t)offset);
    mov_store(a, FIELD(e, rip), S0);
    jump_to(a, e->j->exit_rip);
}

/* The running page is another one from here on, this far away from the block's own, and back again. */
static void move_page(struct place_of_code *a, struct emit *e, int32_t distance, bool back)
{
    int32_t page;
    if (jit_knows(e, back ? 0 : distance, &page))
        mov_imm(a, FIELD(e, jit.page), page);
    else
        alu_imm(a, true, 0, FIELD(e, jit.page), back ? -distance : distance);
}

/* CMP request, 0: where time may pass without end. NZ when somebody wants something. */
static void poll(struct place_of_code *a, struct emit *e)
{
    put_insn(a, 0, false, 0, 0x83, 7, rm_abs((const void *)&e->c->request), 1);
    put1(a, 0);
}

static void exit_by(struct place_of_code *a, struct emit *e, const struct jit_link *l)
{
    lea(a, true, S0, rm_abs(l));
    jump_to(a, e->j->exit_link);
}

/* A jump with this displacement; the code for it without a link comes next in `k`. */
static struct way way(const struct emit *e, const uint8_t *site, struct place_of_code *k)
{
    struct way w = {(uint32_t)(site - e->j->write), (uint32_t)(run_address(k) - e->j->run)};
    jit_lead_to_stub(e->j, w);
    return w;
}

static struct jit_link *begin_link(struct emit *e, int64_t offset)
{
    struct jit_link *l = &e->jb->link[e->nlinks];
    l->number = (uint8_t)e->nlinks++;
    l->delta = (int32_t)offset;
    return l;
}

/* Where a near jump leads that may not go straight on: the flags are saved. */
static void near_stub(struct emit *e, struct jit_link *l, const uint8_t *site)
{
    l->near = true;
    l->early = way(e, site, &e->k);
    jit_make_cc(&e->k, e, e->flags, &e->recipe);
    site = jmp32(&e->k);
    l->far = way(e, site, &e->k);
    exit_by(&e->k, e, l);
}

/* Jumps from here when the proof is not of this context, or, where the code may run elsewhere, of another place. */
static void unless_proved(struct place_of_code *a, struct emit *e, const struct jit_proof *proof, uint8_t *site[2])
{
    mov_load(a, S0, FIELD(e, jit.serial));
    put_insn(a, 0, true, 0, 0x3b, S0, rm_abs(&proof->serial), 0);
    site[0] = jcc32(a, COND_NZ);
    if (e->bound)
        return;
    mov_load(a, S0, FIELD(e, jit.page));
    put_insn(a, 0, true, 0, 0x3b, S0, rm_abs(&proof->page), 0);
    site[1] = jcc32(a, COND_NZ);
}

/* The way to `target` (an offset from the block's start) at the end of `a`; flags are e->flags. */
static void go(struct emit *e, struct place_of_code *a, int64_t target)
{
    int64_t offset = target + e->start;
    struct jit_link *l = begin_link(e, offset);
    intptr_t delta = a->delta;
    unsigned flags = e->flags;
    bool backward = target <= e->behind, cold = a == &e->k, leaves_page = offset < 0 || offset > 4095;
    if (leaves_page)
        l->proof = jit_data(e->j, sizeof *l->proof);
    if (leaves_page || backward) {
        struct place_of_code *k = cold ? a : &e->k;
        uint8_t *asked = NULL, *unproved[2] = {NULL}, *save = NULL, *far;
        if (!(flags & IN_CC) && flags & IN_RECIPE) { /* saved on the way only when `to` may show them */
            save = jmp32(a);
        } else if (!(flags & IN_CC)) {
            jit_make_cc(a, e, flags, &e->recipe);
            flags |= IN_CC;
        }
        const uint8_t *saved = run_address(a);
        if (backward)
            poll(a, e);
        if (backward && leaves_page)
            asked = jcc32(a, COND_NZ);
        if (leaves_page) {
            unless_proved(a, e, l->proof, unproved);
            move_page(a, e, (int32_t)(offset & ~0xfffll), false);
        }
        if (backward && !leaves_page) { /* a loop: one jump a turn */
            far = jcc32(a, COND_Z);
            asked = jmp32(a);
        } else {
            far = jmp32(a);
        }
        l->far = way(e, far, k);
        if (leaves_page) /* unlinked: the page is not yet changed in the exits above */
            move_page(k, e, (int32_t)(offset & ~0xfffll), true);
        if (asked)
            set_target(asked, delta, run_address(k));
        jit_make_cc(k, e, jit_lost(flags), &e->recipe);
        exit_by(k, e, l);
        if (unproved[0]) {
            for (unsigned i = 0; i < 2 && unproved[i]; i++)
                set_target(unproved[i], delta, run_address(k));
            jit_make_cc(k, e, jit_lost(flags), &e->recipe);
            lea(k, true, S0, rm_abs(l));
            jump_to(k, e->j->prove);
        }
        if (save) {
            l->early = way(e, save, k);
            jit_make_cc(k, e, flags, &e->recipe);
            jump_to(k, saved);
        }
        return;
    }
    l->saved = flags & IN_CC;
    near_stub(e, l, jmp32(a));
}

/* To `target` on a condition of EFLAGS; else the code that follows. */
static void branch(struct emit *e, unsigned cond, int64_t target)
{
    if (target <= e->behind || target + e->start > 4095) { /* what the taken way needs stands in line when it is a loop */
        bool loop = target <= e->behind;
        struct place_of_code *a = loop ? &e->a : &e->k;
        uint8_t *site = jcc32(&e->a, loop ? cond ^ 1 : cond);
        if (!loop)
            set_target(site, e->a.delta, run_address(&e->k));
        go(e, a, target);
        if (loop)
            set_target(site, e->a.delta, run_address(&e->a));
        return;
    }
    /* a near forward branch: the Jcc itself is the link */
    struct jit_link *l = begin_link(e, target + e->start);
    l->saved = e->flags & IN_CC;
    near_stub(e, l, jcc32(&e->a, cond));
}

/* Bits above a canonical address. */
static unsigned noncanonical(const struct emit *e) { return e->b->mode & MODE_LA57 ? 7 : 16; }

/* SHL, SAR by the bits above a canonical address, CMP: is S0 one? Clobbers S1. */
static uint8_t *unless_canonical(struct emit *e, struct place_of_code *a)
{
    mov_rr(a, S1, S0);
    shift_imm(a, true, 4, S1, noncanonical(e));
    shift_imm(a, true, 7, S1, noncanonical(e));
    put_insn(a, 0, true, 0, 0x3b, S1, rm_reg(S0), 0);
    return jcc32(a, COND_NZ);
}

static void drop_stack(struct place_of_code *a, int32_t bytes)
{
    if (bytes)
        lea(a, true, GUEST_SP, rm_mem(GUEST_SP, bytes));
}

/* S0: where to. Looks it up; `drop`: bytes to take from the stack when it is sure. `again`: offset of the instruction,
 * for a target that is not canonical: the handler shall fault. Flags that are not in c->cc go there only when the
 * target may show them, or when it is not known. */
static void go_indirect(struct emit *e, int32_t drop, bool canonical_known, uint32_t again)
{
    struct place_of_code *a = &e->a, *k = &e->k;
    unsigned flags = jit_lost(e->flags);
    if (e->j->off & JIT_NO_INDIRECT) {
        if (!canonical_known)
            leave_from(e, unless_canonical(e, a), again);
        jit_make_cc(a, e, flags, &e->recipe);
        drop_stack(a, drop);
        mov_store(a, FIELD(e, rip), S0);
        jump_to(a, e->j->exit_rip);
        return;
    }
    put_insn(a, 0, false, 0, 0x8b, S1, rm_reg(S0), 0);
    alu_imm(a, false, 4, rm_reg(S1), (1 << TARGET_BITS) - 1);
    shift_imm(a, false, 4, S1, 5);
    put_insn(a, 0, true, 0, 0x03, S1, rm_abs(e->j->data_target), 0);
    put_insn(a, 0, true, 0, 0x33, S0, FIELD(e, jit.context), 0);
    put_insn(a, 0, true, 0, 0x3b, S0, rm_mem(S1, offsetof(struct target, key)), 0);
    uint8_t *miss = jcc32(a, COND_NZ), *shown = NULL;
    mov_load(a, S0, rm_mem(S1, offsetof(struct target, page)));
    if (!(flags & IN_CC)) {
        put_insn(a, 0, false, 0, 0xf6, 0, rm_mem(S1, offsetof(struct target, block)), 1); /* TEST block, TARGET_FLAGS */
        put1(a, TARGET_FLAGS);
        shown = jcc32(a, COND_NZ);
    }
    drop_stack(a, drop);
    mov_store(a, FIELD(e, jit.page), S0);
    put_insn(a, 0, false, 0, 0xff, 4, rm_mem(S1, offsetof(struct target, code)), 0);
    if (shown) {
        set_target(shown, a->delta, run_address(k));
        mov_store(k, FIELD(e, jit.page), S0);
        mov_load(k, S0, rm_mem(S1, offsetof(struct target, code)));
        jit_make_cc(k, e, flags, &e->recipe);
        drop_stack(k, drop);
        put_insn(k, 0, false, 0, 0xff, 4, rm_reg(S0), 0);
    }
    set_target(miss, a->delta, run_address(k));
    put_insn(k, 0, true, 0, 0x33, S0, FIELD(e, jit.context), 0);
    if (!canonical_known)
        leave_from(e, unless_canonical(e, k), again);
    jit_make_cc(k, e, flags, &e->recipe);
    drop_stack(k, drop);
    mov_store(k, FIELD(e, rip), S0);
    jump_to(k, e->j->find);
}

/* ---- terminators ---- */

static void poll_or_leave(struct emit *e, uint32_t offset)
{
    if (e->shadow) /* no interrupt right behind STI */
        return;
    poll(&e->a, e);
    jit_leave_if(e, COND_NZ, offset);
}

/* Here the slow path of a terminator's access comes back: its own, or that of a group which ends with it. */
static struct slow *part_ends(struct emit *e, const struct decoded *d, struct slow *s, uop_fn part)
{
    if (!s) {
        s = e->group;
        jit_group_end(e, d - e->group_last, part);
    } else {
        s->uop = jit_copy_uop(e, d, part);
        s->resume = run_address(&e->a);
    }
    return s;
}

/* What the slow path loaded is wanted in S0. */
static void comes_by_scratch(struct emit *e, struct slow *s)
{
    const uint8_t *behind = s->resume;
    s->resume = run_address(&e->k);
    mov_load(&e->k, S0, FIELD(e, scratch[1]));
    jump_to(&e->k, behind);
}

/* Stores the address `behind` (offset in the page) on the stack. */
static void push_return(struct emit *e, const struct decoded *d, uint32_t behind)
{
    struct slow *s = jit_begin_access(e);
    struct rm m = jit_probe(e, GUEST_SP, -8, 8, true, s);
    int32_t address;
    if (jit_knows(e, behind, &address)) {
        mov_imm(&e->a, m, address);
    } else {
        jit_address(&e->a, e, S1, (int32_t)behind);
        mov_store(&e->a, m, S1);
    }
    lea(&e->a, true, GUEST_SP, rm_mem(GUEST_SP, -8));
    part_ends(e, d, s, op_jit_push)->return_offset = behind;
    jit_stack_has_moved(e, d);
}

/* Loads the target of an indirect branch into S0. */
static bool indirect_target(struct emit *e, const struct decoded *d)
{
    unsigned guest = d->uop.d / 8;
    if (d->enc.osize != 8 || d->has_prefix || (d->enc.mem && !jit_can_address(e, d)))
        return false;
    jit_lose_eflags(e);
    if (!d->enc.mem) {
        if (homed(guest))
            mov_load(&e->a, S0, rm_abs(&e->c->gpr[guest]));
        else
            mov_rr(&e->a, S0, host_reg(guest));
        return true;
    }
    struct slow *s = jit_begin_access(e);
    mov_load(&e->a, S0, jit_operand(e, d, 8, false, s, false));
    comes_by_scratch(e, part_ends(e, d, s, op_jit_load));
    return true;
}

static bool near(const struct decoded *d) { return (int64_t)d->uop.imm > -FARTHEST && (int64_t)d->uop.imm < FARTHEST; }
static bool branches(const struct decoded *d) { return d->row && d->row->jit == JIT_JCC && d->cond != 0xff && near(d); }

/* `on`: host code goes on behind the branch. */
static bool terminator(struct emit *e, const struct decoded *d, bool on)
{
    uint32_t at = e->start + d->uop.off, behind = at + d->uop.len;
    int64_t target = (int64_t)d->uop.imm;
    const struct oprow *r = d->row;
    jit_flush_vectors(e);
    e->behind = d->uop.off + d->uop.len;
    switch (r ? r->jit : JIT_NONE) {
    case JIT_JCC:
        if (!branches(d))
            return false;
        jit_need_eflags(e, d->flags_read);
        branch(e, d->cond, target);
        if (!on)
            go(e, &e->a, e->behind);
        return true;
    case JIT_JMP:
        if (d->enc.osize != 8 || !near(d))
            return false;
        go(e, &e->a, target);
        return true;
    case JIT_CALL:
        if (d->enc.osize != 8 || !near(d))
            return false;
        push_return(e, d, behind);
        go(e, &e->a, target);
        return true;
    case JIT_JMPIND:
        if (!indirect_target(e, d))
            return false;
        poll_or_leave(e, at);
        go_indirect(e, 0, false, at);
        return true;
    case JIT_CALLIND: {
        if (!indirect_target(e, d))
            return false;
        struct place_of_code *a = &e->a;
        poll_or_leave(e, at);
        leave_from(e, unless_canonical(e, a), at);
        mov_store(a, FIELD(e, scratch[2]), S0);
        push_return(e, d, behind);
        mov_load(a, S0, FIELD(e, scratch[2]));
        go_indirect(e, 0, true, at);
        return true;
    }
    case JIT_RET: {
        if (d->enc.osize != 8)
            return false;
        jit_lose_eflags(e);
        poll_or_leave(e, at);
        struct slow *s = jit_begin_access(e);
        mov_load(&e->a, S0, jit_probe(e, GUEST_SP, 0, 8, false, s));
        comes_by_scratch(e, part_ends(e, d, s, op_jit_top));
        go_indirect(e, 8 + (int32_t)(uint16_t)(r->operand[0] ? d->uop.imm : 0), false, at);
        return true;
    }
    default:
        break;
    }
    /* the others set c->rip themselves and go back to the loop; those with links would look for them behind their micro-op */
    if (r && (r->jit != JIT_NONE || r->attrs & (OPA_LINK1 | OPA_LINK2)))
        return false;
    jit_helper(e, d);
    e->helpers--; /* the interpreter would do the same */
    leave_at(&e->a, e, behind); /* not reached unless the handler says NEXT */
    return true;
}

/* ---- the block ---- */

/* decode_insn() gave these micro-ops when the block was made. */
static bool same_uop(const struct uop *a, const struct uop *b)
{
    return !memcmp((const char *)a + sizeof a->fn, (const char *)b + sizeof b->fn, sizeof *a - sizeof a->fn);
}

/* `at`: bytes of the trace before the block. */
static bool decode_again(struct cpu *c, const struct block *b, unsigned at, uint8_t *bytes, struct decoded *d)
{
    const struct uop *u = b->uops;
    unsigned pos = 0;
    unsigned first = b->crosses ? 4096 - (b->gpa & 0xfff) : b->bytes;
    memset(bytes, 0, 16 + b->bytes);
    for (unsigned i = 0; i < b->bytes; i++)
        bytes[i] = *(i < first ? (const volatile uint8_t *)b->host + i : (const volatile uint8_t *)block_second(b) + (i - first));
    for (unsigned i = 0; i < b->ninsn; i++) {
        if (pos >= b->bytes || decode_insn(bytes + pos, b->bytes - pos, b->mode, c->features, pos, &d[i]) != DECODE_OK)
            return false;
        if (d[i].has_prefix && !same_uop(&d[i].prefix, u++))
            return false;
        if (!same_uop(&d[i].uop, u++))
            return false;
        if (at && decode_insn(bytes + pos, b->bytes - pos, b->mode, c->features, at + pos, &d[i]) != DECODE_OK)
            return false;
        pos += d[i].uop.len;
    }
    return pos == b->bytes;
}

/* The block behind a branch that ends a trace of `size` bytes and n instructions, when it runs about as often as the
 * trace's head: mostly the branch is not taken. */
static struct block *next_of_trace(struct cpu *c, const struct block *head, const struct decoded *last, unsigned size, unsigned n)
{
    const struct jit *j = c->jit.state;
    if (j->off & JIT_NO_TRACES || !branches(last) || (head->gpa & 0xfff) + size > 4095)
        return NULL;
    struct block *b = block_known(c, head->host + size, head->mode);
    if (!b || b->crosses || n + b->ninsn > MAX_INSNS || size + b->bytes > MAX_BYTES || b->count * 4 < j->threshold)
        return NULL;
    return b;
}

/* At the start of an instruction that crosses into the next page: is it the page that was decoded? Else the
 * interpreter's. */
static void check_second(struct emit *e)
{
    struct jit_second *s = jit_data(e->j, sizeof *s);
    struct place_of_code *a = &e->a, *k = &e->k;
    uint8_t *unproved[2] = {NULL};
    s->host = block_second(e->b);
    unless_proved(a, e, &s->proof, unproved);
    for (unsigned i = 0; i < 2 && unproved[i]; i++)
        set_target(unproved[i], a->delta, run_address(k));
    lea(k, true, S0, rm_abs(s));
    call_to(k, e->j->second);
    leave_from(e, jcc32(k, COND_Z), e->start);
    jump_to(k, run_address(a));
}

static void slow_paths(struct emit *e)
{
    struct place_of_code *k = &e->k;
    for (unsigned i = 0; i < e->nslow; i++) {
        struct slow *s = &e->slow[i];
        for (unsigned n = 0; n < s->sites; n++)
            set_target(s->site[n], k->delta, run_address(k));
        jit_make_cc(k, e, s->flags, &s->recipe);
        if (s->return_offset) {
            jit_address(k, e, S1, (int32_t)s->return_offset);
            mov_store(k, FIELD(e, scratch[1]), S1);
        }
        jit_spill(k, e, s->spill);
        lea(k, true, S0, rm_abs(s->uop));
        call_to(k, e->j->helper);
        jit_reload(k, e, s->reload);
        if (s->restore)
            jit_restore_flags(k, e);
        jump_to(k, s->resume);
    }
    for (unsigned i = 0; i < e->nleave; i++) {
        set_target(e->leave[i].site, k->delta, run_address(k));
        jit_make_cc(k, e, e->leave[i].flags, &e->leave[i].recipe);
        jit_spill(k, e, e->leave[i].spill);
        put_insn(k, 0, false, 0, 0xc6, 0, FIELD(e, jit.once), 1);
        put1(k, 1);
        leave_at(k, e, e->leave[i].offset);
    }
}

/* False: nothing here for the JIT, or, with e->group, a group was wrong about an instruction. */
static bool emit_block(struct emit *e, struct cpu *c, struct block *b, const struct decoded *d, unsigned n, const uint8_t *bytes,
                       const uint8_t *observed, uint8_t flags_in, bool no_groups)
{
    struct jit *j = c->jit.state;
    unsigned done = 0, nlinks = 1;
    bool end = false;
    for (unsigned i = 0; i < n; i++)
        nlinks += branches(&d[i]);

    memset(e, 0, offsetof(struct emit, slow));
    e->a = (struct place_of_code){j->write + j->hot, j->run - j->write};
    e->k = (struct place_of_code){j->write + j->cold, j->run - j->write};
    e->c = c;
    e->j = j;
    e->b = b;
    e->bytes = bytes;
    e->start = (uint32_t)(b->gpa & 0xfff);
    e->page = c->bip & PAGE_MASK_4K;
    e->bound = !b->roams && !(j->off & JIT_NO_BINDING) && (int64_t)e->page == (int32_t)e->page;
    e->flags = IN_CC;
    e->no_groups = no_groups || j->off & JIT_NO_GROUPS;
    e->jb = jit_data(j, sizeof *e->jb + nlinks * sizeof e->jb->link[0] + (j->calls ? n * sizeof *jit_at(e->jb) : 0));
    e->jb->mapped = j->calls;
    e->jb->ninsn = (uint8_t)n;
    e->jb->nlinks = (uint8_t)nlinks;
    e->jb->block = b;
    e->jb->bound = e->bound;
    e->jb->page = e->page;
    e->jb->entry = run_address(&e->a);
    e->jb->flags_in = flags_in;
    if (b->crosses)
        check_second(e);
    for (; done < n && !end; done++) {
        const struct decoded *i = &d[done];
        if (e->jb->mapped)
            jit_at(e->jb)[done] = (uint16_t)(e->a.p - (j->write + j->hot));
        bool sti = i->uop.fn == op_sti;
        bool on = i->end && done + 1 < n; /* a branch within the trace */
        end = (i->end && !on) || (sti && done + 1 == n); /* STI at the end: its shadow is the interpreter's business */
        e->shadow = done && d[done - 1].uop.fn == op_sti;
        if (!e->group)
            jit_group_begin(e, d, done, n);
        if (i->row)
            jit_registers_will_change(e, i, observed[done]);
        if (on || (end && !sti) ? terminator(e, i, on) : jit_insn(e, i, observed[done])) {
            if (e->group && e->group_last == done)
                jit_group_end(e, d, NULL);
            if (!end)
                jit_stack_has_moved(e, i);
            continue;
        }
        if (e->group)
            return false;
        if (end && i->row && (sti || i->row->jit != JIT_NONE || i->row->attrs & (OPA_LINK1 | OPA_LINK2))) {
            if (!done)
                return false;
            jit_need_cc(e);
            jit_flush_vectors(e);
            leave_at(&e->a, e, e->start + i->uop.off);
            continue;
        }
        jit_helper(e, i);
    }
    jit_flush_vectors(e);
    const struct decoded *last = d + n - 1;
    e->behind = last->uop.off + last->uop.len;
    if (!end)
        go(e, &e->a, e->behind);
    return e->helpers * 2 <= n || j->off & JIT_ALL; /* else the interpreter goes from handler to handler faster */
}

bool jit_compile(struct cpu *c, struct block *b)
{
    struct jit *j = c->jit.state;
    static _Thread_local struct decoded d[MAX_INSNS];
    static _Thread_local struct emit e;
    uint8_t bytes[MAX_BYTES + 16], observed[MAX_INSNS], live = 0x3f;

    if (j->hot + CODE_SLACK > HOT_SIZE || j->cold + CODE_SLACK > HOT_SIZE + COLD_SIZE || j->used + CODE_SLACK > DATA_SIZE) {
        j->full = true;
        return false;
    }
    if (b->dead || b->bytes > MAX_BYTES || b->ninsn > MAX_INSNS || !decode_again(c, b, 0, bytes, d))
        return false;
    unsigned n = b->ninsn, size = b->bytes;
    for (const struct block *more; (more = next_of_trace(c, b, d + n - 1, size, n)) && decode_again(c, more, size, bytes + size, d + n);) {
        n += more->ninsn;
        size += more->bytes;
        c->stat.jit_joined++;
    }
    for (unsigned i = n; i--;) {
        observed[i] = live; /* after instruction i */
        bool helper = !d[i].row || d[i].row->jit == JIT_NONE;
        live = d[i].barrier || d[i].end || helper ? 0x3f : (uint8_t)((live & ~d[i].flags_written) | d[i].flags_read);
    }

    size_t used = j->used;
    if (!emit_block(&e, c, b, d, n, bytes, observed, live, false)) {
        j->used = used;
        if (!e.group || !emit_block(&e, c, b, d, n, bytes, observed, live, true)) {
            j->used = used;
            return false;
        }
    }
    slow_paths(&e);
    e.jb->hot_bytes = (uint32_t)(e.a.p - (j->write + j->hot));
    e.jb->cold_bytes = (uint32_t)(e.k.p - (j->write + j->cold));
    const struct piece pieces[] = {{e.jb->entry, e.jb->hot_bytes}, {j->run + j->cold, e.jb->cold_bytes}};
    j->hot = (size_t)(e.a.p - j->write + 15) & ~15ull;
    j->cold = (size_t)(e.k.p - j->write + 15) & ~15ull;
    c->stat.jit_blocks++;
    c->stat.jit_helpers += e.helpers;
    c->stat.jit_insns += n;
    if (j->off & JIT_PERF)
        jit_tell_perf(c->bip, pieces, 2);
    b->host_code = e.jb;
    b->more = (uint8_t)(size - b->bytes);
    return true;
}
#endif
