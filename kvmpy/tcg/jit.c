/* SPDX-License-Identifier: Apache-2.0
 *
 * Entering and leaving host code, linking blocks, forgetting them. See jit.h.
 *
 * Everything here runs on the vCPU's own thread, and so does the code: links are patched without ceremony.
 *
 * Contexts: a number per mode, until the softTLB of that mode is flushed; then the mode gets a new one. What was proved
 * under a context ("RIP leads to this host page") holds as long as the number: an evicted TLB entry changes nothing,
 * for a processor may keep a translation until it is told. MOV CR3 leaves the kernel's number alone as long as only
 * global pages were proved for it, and parks the user's with its PCID; INVLPG changes them only when the page may be
 * among those proved (a filter).
 */
#include "jit_code.h"

#if HAVE_JIT
#include <cpuid.h>
#include <stdlib.h>
#include <sys/auxv.h>

#include "fphost.h"

#define THRESHOLD 40
#ifndef HWCAP2_FSGSBASE
#define HWCAP2_FSGSBASE 2 /* asm/hwcap2.h: RDGSBASE and its like run in user mode */
#endif

OP_DECL(jit_count);
OP_DECL(jit_enter);
OP_DECL(jit_x87_enter);

/* Clang 14 has no __builtin_cpu_supports("lzcnt"). Asked once: under a hypervisor each CPUID is an exit. */
static bool host_lzcnt(void)
{
    static _Atomic int known; /* 0: not asked yet, else 1 + the answer; threads that race here find the same */
    if (!atomic_load(&known)) {
        unsigned a, b, ecx = 0, d;
        bool has = __get_cpuid(0x80000001, &a, &b, &ecx, &d) && ecx & 1 << 5; /* SDM vol. 2, CPUID */
        atomic_store(&known, 1 + has);
    }
    return atomic_load(&known) == 2;
}

static uint64_t host_features(unsigned word)
{
    uint64_t bits = 0;
    __builtin_cpu_init();
    for (unsigned f = word * 64; f < FEAT_COUNT && f < word * 64 + 64; f++) {
        bool has = f == FEAT_POPCNT  ? __builtin_cpu_supports("popcnt")
                   : f == FEAT_BMI1  ? __builtin_cpu_supports("bmi")
                   : f == FEAT_BMI2  ? __builtin_cpu_supports("bmi2")
                   : f == FEAT_LZCNT ? host_lzcnt()
                   : f == FEAT_SSE42 ? __builtin_cpu_supports("sse4.2")
                   : f == FEAT_MOVBE || f == FEAT_ADX ? false
                                     : fp_host_has(f);
        bits |= (uint64_t)has << (f & 63);
    }
    return bits;
}

static unsigned switched_off(const char *words)
{
    static const struct { const char *name; unsigned bit; } names[] = {
        {"all", JIT_ALL}, {"perf", JIT_PERF}, {"nochain", JIT_NO_CHAIN}, {"noflags", JIT_NO_FLAGS},
        {"noindirect", JIT_NO_INDIRECT}, {"novec", JIT_NO_VECTORS}, {"nox87", JIT_NO_X87}, {"nogroups", JIT_NO_GROUPS},
        {"nogs", JIT_NO_GS}, {"notraces", JIT_NO_TRACES}, {"nobinding", JIT_NO_BINDING}, {"nostrings", JIT_NO_STRINGS},
        {"nocrossing", JIT_NO_CROSSING}, {"noparking", JIT_NO_PARKING},
    };
    unsigned bits = 0;
    for (unsigned i = 0; words && i < sizeof names / sizeof names[0]; i++)
        if (strstr(words, names[i].name))
            bits |= names[i].bit;
    return bits;
}

void jit_init(struct cpu *c)
{
    const char *kind = getenv("KVMPY_TCG"), *threshold = getenv("KVMPY_JIT_THRESHOLD");
    if (kind && !strcmp(kind, "interp"))
        return;
    struct jit *j = calloc(1, sizeof *j);
    if (!j)
        return;
    j->target = calloc(1u << TARGET_BITS, sizeof *j->target);
    if (!j->target || !jit_map(c, j)) {
        free(j->target);
        free(j);
        return;
    }
    j->threshold = threshold ? (unsigned)strtoul(threshold, NULL, 0) : THRESHOLD;
    j->off = switched_off(getenv("KVMPY_JIT"));
    j->host_features[0] = host_features(0);
    j->host_features[1] = host_features(1);
    j->gs = !(j->off & JIT_NO_GS) && getauxval(AT_HWCAP2) & HWCAP2_FSGSBASE;
    j->rorx = __builtin_cpu_supports("bmi2");
    jit_thunks(c, j);
    c->jit.state = j;
    jit_flush(c);
    jit_forget_addresses(c, true);
}

void jit_free(struct cpu *c)
{
    struct jit *j = c->jit.state;
    if (!j)
        return;
    jit_unmap(j);
    free(j->target);
    free(j->calls);
    free(j);
    c->jit.state = NULL;
}

bool jit_is_full(const struct cpu *c) { return c->jit.state && c->jit.state->full; }

/* ---- the host's GS base ---- */

/* Nothing of Linux' user space uses GS; whoever else does has it back when the vCPU stops. */
uint64_t jit_borrow_gs(struct cpu *c)
{
    uint64_t base = 0;
    c->jit.gs = NULL;
    if (c->jit.state && c->jit.state->gs)
        __asm__ volatile("rdgsbase %0" : "=r"(base));
    return base;
}

void jit_return_gs(const struct cpu *c, uint64_t base)
{
    if (c->jit.state && c->jit.state->gs)
        __asm__ volatile("wrgsbase %0" : : "r"(base));
}

/* ---- contexts ---- */

static void forget_all_targets(struct jit *j)
{
    for (unsigned i = 0; i < 1u << TARGET_BITS; i++)
        j->target[i] = (struct target){.key = i};
}

/* An identity stands where a RIP of that place in the table says nothing: in its low bits, which are the index, and at
 * the top, where a canonical address has all zeros or all ones. The low part is never 0, so the index itself is no key. */
#define LOW_IDS ((1u << TARGET_BITS) - 1)
#define IDS (LOW_IDS << 6)

static void set_context(struct cpu *c, uint64_t serial)
{
    c->jit.serial = serial;
    c->jit.context = (serial % IDS % LOW_IDS + 1) | (serial % IDS / LOW_IDS) << 57;
}

void jit_update_context(struct cpu *c)
{
    struct jit *j = c->jit.state;
    if (!j)
        return;
    unsigned slot = MAX_CONTEXTS;
    for (unsigned i = 0; i < MAX_CONTEXTS; i++) {
        if (j->contexts[i].serial && j->contexts[i].mode == c->mode) {
            set_context(c, j->contexts[i].serial);
            return;
        }
        if (!j->contexts[i].serial)
            slot = i;
    }
    if (++j->last_serial % IDS == 0) { /* identities come round again */
        forget_all_targets(j);
        memset(j->contexts, 0, sizeof j->contexts);
        j->epoch++;
    }
    if (slot == MAX_CONTEXTS)
        slot = j->next_victim++ % MAX_CONTEXTS;
    j->contexts[slot].mode = c->mode;
    j->contexts[slot].serial = j->last_serial;
    set_context(c, j->last_serial);
}

void jit_forget_addresses(struct cpu *c, bool global_too)
{
    struct jit *j = c->jit.state;
    if (!j)
        return;
    global_too = global_too || j->kernel_local;
    for (unsigned i = 0; i < MAX_CONTEXTS; i++)
        if (global_too || (j->contexts[i].mode & MODE_USER))
            j->contexts[i].serial = 0;
    if (global_too) {
        j->kernel_local = false;
        j->epoch++;
        memset(j->pages, 0, sizeof j->pages);
    }
    jit_update_context(c);
}

struct jit_parked jit_park(const struct cpu *c)
{
    const struct jit *j = c->jit.state;
    for (unsigned i = 0; j && i < MAX_CONTEXTS; i++)
        if (j->contexts[i].serial && j->contexts[i].mode & MODE_USER)
            return (struct jit_parked){j->contexts[i].serial, j->epoch, j->contexts[i].mode};
    return (struct jit_parked){0};
}

void jit_unpark(struct cpu *c, struct jit_parked p)
{
    struct jit *j = c->jit.state;
    if (!j || !p.serial || p.epoch != j->epoch || j->off & JIT_NO_PARKING)
        return;
    for (unsigned i = 0; i < MAX_CONTEXTS; i++)
        if (!j->contexts[i].serial) {
            j->contexts[i].mode = p.mode;
            j->contexts[i].serial = p.serial;
            return;
        }
}

static unsigned page_bit(uint64_t lin) { return (unsigned)((lin >> 12) * 0x9e3779b97f4a7c15ull >> (64 - PROVED_BITS)); }

void jit_forget_page(struct cpu *c, uint64_t lin)
{
    struct jit *j = c->jit.state;
    if (!j)
        return;
    unsigned bit = page_bit(lin);
    if (j->pages[bit / 64] >> (bit % 64) & 1)
        jit_forget_addresses(c, true);
}

/* `lin` is about to be proved: what changes its translation must change the context. */
static void proving(struct cpu *c, uint64_t lin)
{
    struct jit *j = c->jit.state;
    unsigned bit = page_bit(lin), i = lin >> 12 & (TLB_SIZE - 1);
    j->pages[bit / 64] |= 1ull << (bit % 64);
    if (!(c->mode & MODE_USER) && (c->xtlb->e[i].ex != (lin & PAGE_MASK_4K) || c->xtlb->local[i / 64] >> (i % 64) & 1))
        j->kernel_local = true;
}

/* ---- links ---- */

/* On the way along a link that can make the flags again: are they saved? */
static void save_flags_before(const struct jit *j, struct jit_link *l, bool yes)
{
    static const uint8_t nop[5] = {0x0f, 0x1f, 0x44, 0x00, 0x00};
    if (l->near || !l->early.site)
        return;
    uint8_t *insn = j->write + l->early.site - 1;
    memcpy(insn, nop, sizeof nop);
    if (!yes)
        return;
    insn[0] = 0xe9;
    jit_lead_to_stub(j, l->early);
}

static void unlink_from(struct jit *j, struct jit_link *l)
{
    if (l->near)
        jit_lead_to_stub(j, l->early);
    if (l->far.site)
        jit_lead_to_stub(j, l->far);
    save_flags_before(j, l, true);
    if (l->proof)
        l->proof->serial = 0;
    l->to = NULL;
}

static void connect_link(struct cpu *c, struct jit_link *l, struct jit_block *to, uint64_t rip)
{
    struct jit *j = c->jit.state;
    const struct block *from = jit_from(l)->block;
    if (j->off & JIT_NO_CHAIN || from->dead || to->block->dead || from->mode != to->block->mode)
        return;
    if (!l->proof && from->gpa >> 12 != to->block->gpa >> 12)
        return; /* the page was remapped between leaving and coming back */
    if (!jit_runs_at(to, rip) || (to->bound && !jit_from(l)->bound && !l->proof))
        return;
    if (l->proof) {
        proving(c, rip);
        *l->proof = (struct jit_proof){c->jit.serial, (rip - (int64_t)l->delta) & PAGE_MASK_4K};
    }
    if (l->to == to)
        return;
    if (l->to) {
        for (struct jit_link **p = &l->to->incoming; *p; p = &(*p)->next)
            if (*p == l) {
                *p = l->next;
                break;
            }
    }
    l->to = to;
    l->next = to->incoming;
    to->incoming = l;
    if (l->near && (l->saved || !to->flags_in))
        jit_lead(j, l->early, to->entry);
    else if (l->near)
        jit_lead_to_stub(j, l->early);
    if (l->far.site)
        jit_lead(j, l->far, to->entry);
    save_flags_before(j, l, to->flags_in);
    c->stat.jit_links++;
}

static struct jit_block *block_of(const struct target *t) { return (struct jit_block *)(t->block & ~(uintptr_t)TARGET_FLAGS); }

static void know_target(struct cpu *c, struct jit_block *jb, uint64_t rip)
{
    struct jit *j = c->jit.state;
    struct target *t = &j->target[rip & ((1u << TARGET_BITS) - 1)];
    uint64_t key = rip ^ c->jit.context;
    if ((t->key == key && block_of(t) == jb) || j->off & JIT_NO_INDIRECT)
        return;
    proving(c, rip);
    *t = (struct target){key, jb->entry, rip & PAGE_MASK_4K, (uintptr_t)jb | (jb->flags_in ? TARGET_FLAGS : 0)};
    jb->cached_often |= jb->cached && jb->cached != t;
    jb->cached = t;
}

/* ---- called by host code ---- */

/* Where the page of `rip` is in host memory, if the softTLB knows it as code. */
static const uint8_t *known_code(const struct cpu *c, uint64_t rip)
{
    const struct tlb_entry *e = &c->xtlb->e[rip >> 12 & (TLB_SIZE - 1)];
    return e->ex == (rip & PAGE_MASK_4K) ? (const uint8_t *)(rip + e->addend) : NULL;
}

/* A link out of the page was proved under another context. Most often it still leads where it did. */
const uint8_t *jit_prove(struct cpu *c, struct jit_link *l)
{
    uint64_t rip = c->jit.page + (int64_t)l->delta;
    if (!l->to || known_code(c, rip) != l->to->block->host || !jit_runs_at(l->to, rip))
        return NULL;
    proving(c, rip);
    *l->proof = (struct jit_proof){c->jit.serial, c->jit.page};
    c->jit.page = rip & PAGE_MASK_4K;
    return l->to->entry;
}

/* The same for the page behind the running one. */
uintptr_t jit_prove_second(struct cpu *c, struct jit_second *s)
{
    uint64_t next = c->jit.page + 4096;
    if (known_code(c, next) != s->host)
        return 0;
    proving(c, next);
    s->proof = (struct jit_proof){c->jit.serial, c->jit.page};
    return 1;
}

/* Host code for c->rip, in the present mode; NULL: the loop shall look. */
const uint8_t *jit_find(struct cpu *c)
{
    struct jit *j = c->jit.state;
    uint64_t rip = c->rip;
    struct target *t = &j->target[rip & ((1u << TARGET_BITS) - 1)];
    struct jit_block *jb = block_of(t);
    if (jb && t->page == (rip & PAGE_MASK_4K) && jb->block->mode == c->mode && known_code(c, rip) == jb->block->host) {
        proving(c, rip);
        t->key = rip ^ c->jit.context;
    } else {
        struct block *b = block_peek(c);
        if (!b || !b->host_code || !jit_runs_at(b->host_code, rip))
            return NULL;
        jb = b->host_code;
        know_target(c, jb, rip);
    }
    c->jit.page = rip & PAGE_MASK_4K;
    return jb->entry;
}

static bool asked_to_leave(const struct cpu *c)
{
    return atomic_load_explicit(&c->request, memory_order_relaxed) || c->budget <= 0 || c->jit.once;
}

/* Runs micro-ops up to op_jit_back; `behind` is where host code goes on then. When a handler went elsewhere (a system
 * call), host code does too, if it has been there before. */
const uint8_t *jit_call(struct cpu *c, const struct uop *u, const uint8_t *behind)
{
    jit_x87_behind(c);
    while (u && u->fn != op_jit_back)
        u = u->fn(c, u);
    if (u && unlikely(c->jit.stop)) {
        const struct uop *last = u[-1].fn == op_jit_x87_enter ? u - 2 : u - 1;
        if (last->len) { /* a whole instruction, perhaps the one by which the running code was forgotten */
            c->rip = RIP_AFTER(c, last);
            return NULL;
        }
    }
    if (u)
        return behind;
    c->jit.stop = false; /* what is forgotten by now has been left */
    c->budget--; /* a loop of such instructions has no other poll */
    return unlikely(asked_to_leave(c)) ? NULL : jit_find(c);
}

/* ---- forgetting ---- */

static void forget_target(struct target *t, uint64_t index, const struct jit_block *jb)
{
    if (block_of(t) == jb)
        *t = (struct target){.key = index};
}

void jit_kill(struct cpu *c, struct block *b)
{
    struct jit *j = c->jit.state;
    struct jit_block *jb = b->host_code;
    if (!j || !jb)
        return;
    while (jb->incoming) {
        struct jit_link *l = jb->incoming;
        jb->incoming = l->next;
        unlink_from(j, l);
    }
    for (unsigned i = 0; i < jb->nlinks; i++) {
        struct jit_link *l = &jb->link[i];
        if (!l->to)
            continue;
        for (struct jit_link **p = &l->to->incoming; *p; p = &(*p)->next)
            if (*p == l) {
                *p = l->next;
                break;
            }
        unlink_from(j, l);
    }
    if (jb->cached_often)
        for (unsigned i = 0; i < 1u << TARGET_BITS; i++)
            forget_target(&j->target[i], i, jb);
    else if (jb->cached)
        forget_target(jb->cached, (uint64_t)(jb->cached - j->target), jb);
    b->host_code = NULL;
    c->jit.stop = true;
}

void jit_flush(struct cpu *c)
{
    struct jit *j = c->jit.state;
    if (!j)
        return;
    forget_all_targets(j);
    j->hot = j->first_hot;
    j->cold = j->first_cold;
    j->used = 0;
    j->data_target = jit_data(j, sizeof *j->data_target);
    *j->data_target = j->target;
    j->full = false;
    j->pending = NULL;
    c->jit.stop = true;
}

/* ---- running ---- */

void jit_new_block(struct cpu *c, struct block *b)
{
    b->first = b->uops[0].fn;
    if (!c->jit.state || (b->crosses && c->jit.state->off & JIT_NO_CROSSING) || !(b->mode & MODE_CODE64) || b->mode & (MODE_STEP | MODE_LIMIT))
        return;
    b->uops[0].fn = op_jit_count;
}

OP(jit_back) { return u; }

OP(jit_count)
{
    struct block *b = c->block;
    struct jit *j = c->jit.state;
    if (b->count++ < j->threshold || cpu_only_helps(c) || (c->vm && c->vm->deterministic))
        return b->first(c, u);
    if (jit_compile(c, b)) {
        b->uops[0].fn = op_jit_enter;
        return op_jit_enter(c, u);
    }
    if (j->full) { /* the loop empties the cache before it looks for the next block */
        c->budget += b->ninsn;
        c->rip = c->bip;
        return NULL;
    }
    b->uops[0].fn = b->first;
    return b->first(c, u);
}

/* Host code that is bound to one page is needed in another: the next will not be. */
static void roam(struct cpu *c, struct block *b)
{
    jit_kill(c, b);
    b->uops[0].fn = op_jit_count;
    b->count = 0;
    b->more = 0;
    b->roams = true;
}

OP(jit_enter)
{
    struct block *b = c->block;
    struct jit *j = c->jit.state;
    struct jit_block *jb = b->host_code;
    if (unlikely(c->jit.once) || unlikely(cpu_only_helps(c)) || unlikely(c->deadline != ~0ull)) {
        c->jit.once = false;
        return b->first(c, u);
    }
    uint64_t rip = c->bip;
    if (unlikely(!jit_runs_at(jb, rip))) {
        roam(c, b);
        return b->first(c, u);
    }
    c->budget += b->ninsn;
    c->jit.stop = false;
    for (;;) {
        if (j->pending && j->pending_rip == rip)
            connect_link(c, j->pending, jb, rip);
        j->pending = NULL;
        know_target(c, jb, rip);
        c->jit.page = rip & PAGE_MASK_4K;
        c->block = &j->nowhere;
        struct jit_link *l = (struct jit_link *)(uintptr_t)j->enter(jb->entry);
        jit_x87_behind(c);
        c->block = NULL;
        if (l) {
            c->rip = c->jit.page + (int64_t)l->delta;
            if (!c->jit.stop) {
                j->pending = l;
                j->pending_rip = c->rip;
            }
        }
        if (unlikely(asked_to_leave(c)))
            return NULL;
        b = block_peek(c);
        if (!b || !b->host_code || !jit_runs_at(b->host_code, c->rip))
            return NULL;
        jb = b->host_code;
        rip = c->rip;
        c->jit.stop = false;
    }
}
#endif
