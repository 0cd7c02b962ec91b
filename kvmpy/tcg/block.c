/* SPDX-License-Identifier: Apache-2.0
 *
 * Blocks: found, built, linked, forgotten.
 *
 * Each vCPU has its own cache, so looking up and linking needs no locks. The key is the host address of the first byte
 * (that is: the physical page, through whatever mapping) and the mode; RIP is not part of it. Three ways lead to a
 * block, from fast to slow: a link of a direct branch; the jump cache, indexed by RIP and proved by a TLB probe, for
 * returns and indirect jumps; the hash table. None of them has to be emptied when page tables change, since each
 * compares the host address that the TLB gives for RIP now.
 *
 * A block ends at a branch, at the end of its page, or after MAX_INSNS. An instruction that crosses into the next page
 * is a block alone, remembers both pages, and is entered only by the hash table, which compares both.
 *
 * Flags: going backwards through a finished block, an instruction whose flags are all overwritten before anybody can
 * see them gets its `quiet` handler. Whatever may fault or leave is somebody who can see them.
 *
 * Self-modifying code. When a block is made, the granules (64 bytes) it came from are marked in the slot's word for
 * the page, and write entries for the page leave all softTLBs; then the bytes are compared once more, so that a store
 * racing with the decoder is either seen in the bytes or sees the marks. A store to a marked granule kills the
 * blocks there, in this cache at once, in those of other vCPUs by a message. A killed block stays in memory (somebody
 * may be in it) but all its micro-ops become op_resync: the store that killed it ends, and the next step leaves for
 * the loop with RIP there. Memory of dead blocks comes back when the cache is full and emptied as a whole.
 */
#include "core.h"
#include "jit.h"
#include "xstate.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>

#define MAX_INSNS 64
#define ARENA_SIZE (48u << 20)
#define ARENA_START 64u /* a block_ref of 0 is none */
#define HASH_BITS 15
#define PAGE_BITS 12
#define JUMP_BITS 12

struct jump { uint64_t rip; struct block *block; };
struct block_cache {
    uint8_t *arena;
    size_t used;
    block_ref hash[1 << HASH_BITS];
    block_ref page[1 << PAGE_BITS];
    struct jump jump[1 << JUMP_BITS];
};

OP_DECL(resync);
OP_DECL(fall);
OP_DECL(nop);

static unsigned hash_of(const uint8_t *host, uint32_t mode)
{
    uint64_t h = ((uintptr_t)host ^ (uint64_t)mode << 40) * 0x9e3779b97f4a7c15ull;
    return (unsigned)(h >> (64 - HASH_BITS));
}
static unsigned page_of(uint64_t gpa) { return (unsigned)((gpa >> 12) * 0x9e3779b1u >> (32 - PAGE_BITS)) & ((1 << PAGE_BITS) - 1); }

bool block_init(struct cpu *c)
{
    c->cache = calloc(1, sizeof *c->cache);
    if (!c->cache)
        return false;
    void *arena = mmap(NULL, ARENA_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (arena == MAP_FAILED) {
        free(c->cache);
        c->cache = NULL;
        return false;
    }
    c->cache->arena = arena;
    c->cache->used = ARENA_START;
    jit_init(c);
    return true;
}

void block_free(struct cpu *c)
{
    if (!c->cache)
        return;
    jit_free(c);
    munmap(c->cache->arena, ARENA_SIZE);
    free(c->cache);
    c->cache = NULL;
}

void cpu_flush_code(struct cpu *c)
{
    struct block_cache *k = c->cache;
    memset(k->hash, 0, sizeof k->hash);
    memset(k->page, 0, sizeof k->page);
    memset(k->jump, 0, sizeof k->jump);
    k->used = ARENA_START;
    c->link = NULL;
    jit_flush(c);
}

static struct link *link_of(struct block *b) { return b->nlinks ? (struct link *)&b->uops[b->nuop] : NULL; }
static struct crossing *crossing_of(const struct block *b) { return b->crosses ? (struct crossing *)&b->uops[b->nuop + b->nlinks] : NULL; }
static struct block *block_by(const struct block_cache *k, block_ref ref) { return ref ? (struct block *)(k->arena + ref) : NULL; }
static block_ref ref_of(const struct block_cache *k, const struct block *b) { return (block_ref)((const uint8_t *)b - k->arena); }

/* ---- building ---- */

static void quiet_flags(struct decoded *d, unsigned n)
{
    uint8_t live = 0x3f;
    while (n--) {
        struct decoded *i = &d[n];
        if (i->barrier)
            live = 0x3f;
        if (i->quiet && !(i->flags_written & live))
            i->uop.fn = i->quiet;
        live = (uint8_t)((live & ~i->flags_written) | i->flags_read);
        if (i->barrier) /* its flags are seen before it begins */
            live = 0x3f;
    }
}

uop_fn fuse_pair(const struct decoded *a, const struct decoded *b); /* ops_fused.c */

/* [gpa, gpa + size) was written: does `o` wait for that (MWAIT)? Any thread. */
static void end_wait(struct cpu *o, uint64_t gpa, uint64_t size)
{
    uint64_t line = atomic_load(&o->monitor);
    if (unlikely(line) && gpa < (line & ~63ull) + 64 && (line & ~63ull) < gpa + size && atomic_exchange(&o->monitor, 0))
        tcg_wake(o);
}

static void post(struct cpu *o, uint64_t gpa, uint64_t size)
{
    pthread_mutex_lock(&o->inval_lock);
    if (o->inval_count < INVAL_MAX)
        o->inval[o->inval_count] = (struct inval){gpa, size};
    o->inval_count += o->inval_count <= INVAL_MAX;
    pthread_mutex_unlock(&o->inval_lock);
    cpu_request(o, CPU_REQ_CODE);
    if (size)
        end_wait(o, gpa, size);
}

/* Marks [gpa, gpa+size) as code for all vCPUs. */
static void mark_code(struct cpu *c, uint64_t gpa, unsigned size, const struct page_info *page)
{
    if (!page->code)
        return;
    unsigned a = (gpa & 0xfff) >> 6, b = ((gpa & 0xfff) + size - 1) >> 6;
    uint64_t bits = (b == 63 ? ~0ull : (2ull << b) - 1) & ~((1ull << a) - 1);
    uint64_t old = atomic_fetch_or(page->code, bits);
    if (old)
        return;
    mmu_protect_code(c, gpa);
    struct tcg_vm_core *vm = c->vm;
    if (!vm || atomic_load(&vm->ncpu) < 2)
        return;
    pthread_mutex_lock(&vm->lock);
    for (unsigned i = 0; i < atomic_load(&vm->ncpu); i++) {
        struct cpu *o = vm->cpu[i];
        if (!o || o == c)
            continue;
        post(o, gpa & PAGE_MASK_4K, 0);
    }
    pthread_mutex_unlock(&vm->lock);
}

/* MONITOR: writes to this line are to be told as if code had been decoded from it. False: the engine does not see them. */
bool block_monitor(struct cpu *c, uint64_t gpa)
{
    struct page_info page;
    gpa &= ~63ull;
    tcg_phys_to_host(c->vm, gpa & PAGE_MASK_4K, &page);
    if (!page.host || !page.code)
        return false;
    atomic_store(&c->monitor, gpa | 1);
    mark_code(c, gpa, 64, &page);
    return true;
}

static struct block *build(struct cpu *c, uint8_t *host, uint64_t gpa, uint64_t lin, uint32_t mode)
{
    struct decoded d[MAX_INSNS];
    uint8_t copy[256 + 16];
    struct block_cache *k = c->cache;
    struct page_info page, page2 = {0};
    uint64_t gpa2 = ~0ull;
    unsigned in_page = 4096 - (gpa & 0xfff), avail = in_page < sizeof copy ? in_page : sizeof copy;
    unsigned max = mode & MODE_STEP ? 1 : MAX_INSNS, n, uops, bytes, limit = 240;
    bool end;

    if (mode & MODE_LIMIT) { /* the rest of the code segment */
        uint64_t left = (uint64_t)c->seg[SEG_CS].limit + 1 - c->rip;
        if (left < avail)
            avail = (unsigned)left;
        in_page = avail < in_page ? avail : in_page;
    }
    if (k->used + sizeof(struct block) + (2 * MAX_INSNS + 4) * sizeof(struct uop) > ARENA_SIZE)
        cpu_flush_code(c);
    tcg_phys_to_host(c->vm, gpa & PAGE_MASK_4K, &page);
again:
    for (unsigned i = 0; i < avail; i++)
        copy[i] = ((volatile uint8_t *)host)[i];
    n = uops = bytes = 0;
    end = false;
    while (n < max && bytes < limit && !end) {
        if (bytes >= avail)
            break;
        if (decode_insn(copy + bytes, avail - bytes, mode, c->features, bytes, &d[n]) == DECODE_MORE)
            break;
        xstate_zero_upper(c, &d[n]);
        bytes += d[n].uop.len;
        uops += 1 + d[n].has_prefix;
        end = d[n].end;
        n++;
    }
    uint8_t *host2 = NULL;
    if (!n) { /* the first instruction crosses the page */
        uint8_t bytes2[32];
        if (mode & MODE_LIMIT && (uint64_t)c->seg[SEG_CS].limit + 1 - c->rip <= avail)
            cpu_fault_code(c, NULL, EXC_GP, 0);
        host2 = mmu_fetch(c, lin + in_page, &gpa2);
        if (!host2) {
            c->error_text = "instruction fetch from a page that is not memory";
            cpu_stop(c, NULL, TCG_STOP_ERROR);
        }
        tcg_phys_to_host(c->vm, gpa2 & PAGE_MASK_4K, &page2);
        memcpy(bytes2, copy, avail);
        for (unsigned i = 0; i < 16; i++)
            bytes2[avail + i] = copy[avail + i] = ((volatile uint8_t *)host2)[i];
        decode_insn(bytes2, avail + 16, mode, c->features, 0, &d[0]);
        xstate_zero_upper(c, &d[0]);
        bytes = d[0].uop.len;
        uops = 1 + d[0].has_prefix;
        end = d[0].end;
        n = 1;
        if (bytes <= avail) { /* it did not need the second page after all */
            host2 = NULL;
            gpa2 = ~0ull;
        }
    }
    unsigned size1 = bytes < in_page ? bytes : in_page;
    mark_code(c, gpa, size1, &page);
    if (host2)
        mark_code(c, gpa2, bytes - size1, &page2);
    atomic_thread_fence(memory_order_seq_cst);
    if (memcmp(copy, host, size1) || (host2 && memcmp(copy + size1, host2, bytes - size1)))
        goto again;

    struct block *b = (struct block *)(k->arena + k->used);
    bool links = n && d[n - 1].links;
    *b = (struct block){.host = host, .gpa = gpa, .mode = mode, .bytes = (uint16_t)bytes, .ninsn = (uint8_t)n, .crosses = host2 != NULL};
    quiet_flags(d, n);
    struct uop *u = b->uops;
    for (unsigned i = 0; i < n; i++) {
        if (d[i].has_prefix)
            *u++ = d[i].prefix;
        *u = d[i].uop;
        if (i + 1 == n - 1 && d[i + 1].cond != 0xff && !d[i].has_prefix && links) {
            uop_fn f = fuse_pair(&d[i], &d[i + 1]);
            if (f)
                u->fn = f;
        }
        u++;
    }
    if (!end) {
        *u++ = (struct uop){.fn = op_fall, .imm = bytes, .off = (uint8_t)bytes, .base = REG_ZERO, .index = REG_ZERO};
        links = true;
    }
    b->nuop = (uint8_t)(u - b->uops);
    b->nlinks = !links ? 0 : end && d[n - 1].row->attrs & OPA_LINK2 ? 2 : 1;
    for (unsigned i = 0; i < b->nlinks; i++)
        *(struct link *)u++ = (struct link){.from = b};
    struct crossing *other = host2 ? (struct crossing *)u++ : NULL;
    k->used = (size_t)((uint8_t *)u - k->arena);
    jit_new_block(c, b);
    unsigned h = hash_of(host, mode);
    b->hash_next = k->hash[h];
    k->hash[h] = ref_of(k, b);
    b->page_next = k->page[page_of(gpa)];
    k->page[page_of(gpa)] = ref_of(k, b);
    if (other) {
        *other = (struct crossing){.gpa = gpa2, .host = host2};
        if (page_of(gpa2) != page_of(gpa)) {
            other->page_next = k->page[page_of(gpa2)];
            k->page[page_of(gpa2)] = ref_of(k, b);
        }
    }
    c->stat.blocks++;
    return b;
}

/* ---- finding ---- */

struct block *block_find(struct cpu *c, uint32_t mode)
{
    struct block_cache *k = c->cache;
    uint64_t lin = c->rip;
    if (unlikely(jit_is_full(c)))
        cpu_flush_code(c);
    struct jump *j = &k->jump[(c->rip ^ c->rip >> JUMP_BITS) & ((1 << JUMP_BITS) - 1)];
    if (!(mode & MODE_CODE64))
        lin = (uint32_t)(lin + c->segbase[SEG_CS]);
    else if (unlikely(!canonical(c, lin)))
        cpu_fault_code(c, NULL, EXC_GP, 0);
    struct block *b = j->block;
    struct tlb_entry *e = &c->xtlb->e[lin >> 12 & (TLB_SIZE - 1)];
    if (j->rip == c->rip && b && b->mode == mode && e->ex == (lin & PAGE_MASK_4K) && (uint8_t *)(lin + e->addend) == b->host &&
        !b->dead && !(mode & MODE_LIMIT))
        return b;
    c->stat.lookups++;
    if (unlikely(mode & MODE_LIMIT) && c->rip > c->seg[SEG_CS].limit)
        cpu_fault_code(c, NULL, EXC_GP, 0);
    uint64_t gpa;
    uint8_t *host = mmu_fetch(c, lin, &gpa);
    if (unlikely(!host)) {
        c->error_text = "instruction fetch from a page that is not memory";
        cpu_stop(c, NULL, TCG_STOP_ERROR);
    }
    for (b = block_by(k, k->hash[hash_of(host, mode)]); b; b = block_by(k, b->hash_next)) {
        if (b->host != host || b->mode != mode || b->dead)
            continue;
        if (unlikely(mode & MODE_LIMIT) && c->rip + b->bytes - 1 > c->seg[SEG_CS].limit)
            continue;
        if (b->crosses) {
            uint64_t gpa2;
            if (mmu_fetch(c, (lin | 0xfff) + 1, &gpa2) != crossing_of(b)->host)
                continue;
            return b;
        }
        break;
    }
    if (!b)
        b = build(c, host, gpa, lin, mode);
    if (!b->crosses) {
        j->rip = c->rip;
        j->block = b;
    }
    return b;
}

/* The jump cache alone, for 64-bit code: no faults, no building. */
struct block *block_peek(struct cpu *c)
{
    uint64_t rip = c->rip;
    const struct jump *j = &c->cache->jump[(rip ^ rip >> JUMP_BITS) & ((1 << JUMP_BITS) - 1)];
    struct block *b = j->block;
    const struct tlb_entry *e = &c->xtlb->e[rip >> 12 & (TLB_SIZE - 1)];
    if (j->rip == rip && b && b->mode == c->mode && e->ex == (rip & PAGE_MASK_4K) && (uint8_t *)(rip + e->addend) == b->host && !b->dead)
        return b;
    return NULL;
}

const uint8_t *block_second(const struct block *b) { return crossing_of(b)->host; }

struct block *block_known(struct cpu *c, const uint8_t *host, uint32_t mode)
{
    for (struct block *b = block_by(c->cache, c->cache->hash[hash_of(host, mode)]); b; b = block_by(c->cache, b->hash_next))
        if (b->host == host && b->mode == mode && !b->dead)
            return b;
    return NULL;
}

struct block *block_at(struct cpu *c, uint64_t lin)
{
    struct page_info page;
    uint64_t gpa;
    bool writable, user;
    if (!cpu_translate(c, lin, &gpa, &writable, &user))
        return NULL;
    tcg_phys_to_host(c->vm, gpa & PAGE_MASK_4K, &page);
    if (!page.host)
        return NULL;
    return block_known(c, page.host + (gpa & 0xfff), c->mode);
}

void block_connect(struct cpu *c, struct link *link, struct block *to)
{
    if (to->crosses || link->to || link->from->dead || to->dead || link->from->mode != to->mode || to->mode & (MODE_STEP | MODE_LIMIT))
        return;
    /* A branch inside its page is the same however the page is mapped; others are proved by the TLB each time. */
    bool same = link->from->gpa >> 12 == to->gpa >> 12 && (c->bip & PAGE_MASK_4K) == (c->rip & PAGE_MASK_4K) && !link->from->crosses;
    if (!same && c->segbase[SEG_CS])
        return;
    link->unused = !same;
    link->to = to;
    link->next = to->incoming;
    to->incoming = link;
}

/* ---- forgetting ---- */

static void kill(struct cpu *c, struct block *b)
{
    struct block_cache *k = c->cache;
    if (b->dead)
        return;
    b->dead = true;
    for (block_ref *p = &k->hash[hash_of(b->host, b->mode)]; *p; p = &block_by(k, *p)->hash_next)
        if (*p == ref_of(k, b)) {
            *p = b->hash_next;
            break;
        }
    for (struct link *l = b->incoming; l; l = l->next)
        l->to = NULL;
    b->incoming = NULL;
    struct link *own = link_of(b);
    for (unsigned i = 0; i < b->nlinks; i++) {
        if (!own[i].to)
            continue;
        for (struct link **p = &own[i].to->incoming; *p; p = &(*p)->next)
            if (*p == &own[i]) {
                *p = own[i].next;
                break;
            }
        own[i].to = NULL;
    }
    if (c->link && c->link->from == b)
        c->link = NULL;
    if (b->host_code)
        jit_kill(c, b);
    for (unsigned i = 0; i < b->nuop; i++)
        if (b->uops[i].fn != op_fall)
            b->uops[i].fn = op_resync;
}

static bool overlaps(const struct block *b, uint64_t gpa, uint64_t size)
{
    const struct crossing *x = crossing_of(b);
    uint64_t first = x ? 4096 - (b->gpa & 0xfff) : (uint64_t)b->bytes + b->more;
    return (b->gpa < gpa + size && gpa < b->gpa + first) || (x && x->gpa < gpa + size && gpa < x->gpa + b->bytes - first);
}

/* Kills what overlaps within one page; returns the granules that still hold code. */
static uint64_t forget(struct cpu *c, uint64_t gpa, uint64_t size)
{
    uint64_t left = 0;
    block_ref *p = &c->cache->page[page_of(gpa)];
    while (*p) {
        struct block *b = block_by(c->cache, *p);
        struct crossing *x = crossing_of(b);
        /* a block stands in the list of each of its pages through a reference of its own */
        block_ref *next = page_of(b->gpa) == page_of(gpa) ? &b->page_next : &x->page_next;
        if (!b->dead && overlaps(b, gpa, size))
            kill(c, b);
        if (b->dead) {
            *p = *next;
            continue;
        }
        uint64_t start = b->gpa >> 12 == gpa >> 12 ? b->gpa & 0xfff : 0;
        if (b->gpa >> 12 == gpa >> 12 || (x && x->gpa >> 12 == gpa >> 12)) {
            uint64_t stop = start + b->bytes + b->more - 1;
            stop = stop > 4095 ? 4095 : stop;
            for (uint64_t g = start >> 6; g <= stop >> 6; g++)
                left |= 1ull << g;
        }
        p = next;
    }
    return left;
}

void cpu_code_written(struct tcg_vm_core *vm, struct cpu *self, uint64_t gpa, uint64_t size)
{
    if (!size)
        return;
    pthread_mutex_lock(&vm->lock);
    for (unsigned i = 0; i < atomic_load(&vm->ncpu); i++)
        if (vm->cpu[i] && vm->cpu[i] != self)
            post(vm->cpu[i], gpa, size);
    pthread_mutex_unlock(&vm->lock);
    if (self) {
        end_wait(self, gpa, size);
        for (uint64_t page = gpa & PAGE_MASK_4K; page < gpa + size; page += 4096) {
            uint64_t start = page < gpa ? gpa : page, stop = gpa + size < page + 4096 ? gpa + size : page + 4096;
            forget(self, start, stop - start);
        }
    }
}

/* A store of this vCPU went to a page that has marks. */
void block_page_is_written(struct cpu *c, uint64_t gpa, unsigned size, const struct page_info *page)
{
    atomic_thread_fence(memory_order_seq_cst); /* the store comes before the look at the marks: MONITOR does it the other way round */
    uint64_t code = atomic_load(page->code);
    unsigned a = (gpa & 0xfff) >> 6, b = ((gpa & 0xfff) + size - 1) >> 6;
    if (b > 63)
        b = 63;
    uint64_t bits = (b == 63 ? ~0ull : (2ull << b) - 1) & ~((1ull << a) - 1);
    if (!(code & bits))
        return;
    c->stat.smc++;
    if (atomic_load(&c->vm->ncpu) < 2) {
        end_wait(c, gpa & PAGE_MASK_4K, 4096); /* its mark goes with the others that nobody needs */
        uint64_t left = forget(c, gpa, size);
        atomic_store(page->code, left);
        return;
    }
    /* Others may hold code of this granule that this cache does not know: the marks go only with the whole page. */
    atomic_store(page->code, 0);
    cpu_code_written(c->vm, c, gpa & PAGE_MASK_4K, 4096);
}

void block_drain(struct cpu *c)
{
    struct inval list[INVAL_MAX];
    pthread_mutex_lock(&c->inval_lock);
    unsigned n = c->inval_count;
    memcpy(list, c->inval, (n < INVAL_MAX ? n : INVAL_MAX) * sizeof list[0]);
    c->inval_count = 0;
    pthread_mutex_unlock(&c->inval_lock);
    if (n > INVAL_MAX) {
        cpu_flush_tlb(c);
        cpu_flush_code(c);
        return;
    }
    for (unsigned i = 0; i < n; i++) {
        if (!list[i].size) { /* another vCPU decoded from this page: our stores must be seen from now on ... */
            mmu_protect_code(c, list[i].gpa);
            /* ... and what we stored until now it may have missed */
            cpu_code_written(c->vm, c, list[i].gpa, 4096);
            continue;
        }
        uint64_t stop = list[i].gpa + list[i].size;
        if (list[i].size > 1u << 20) {
            cpu_flush_code(c);
            continue;
        }
        for (uint64_t page = list[i].gpa & PAGE_MASK_4K; page < stop; page += 4096) {
            uint64_t start = page < list[i].gpa ? list[i].gpa : page, last = stop < page + 4096 ? stop : page + 4096;
            forget(c, start, last - start);
        }
    }
}
