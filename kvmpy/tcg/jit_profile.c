/* SPDX-License-Identifier: Apache-2.0
 *
 * What a profiler asks of the JIT (profile.h): code, names of what it refers to, and counts of handler calls.
 *
 * Counting costs nothing while nobody asks: the helper thunk's C half is another function then.
 */
#include "jit_code.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#include "profile.h"

#if HAVE_JIT

static const uint8_t *count_call(struct cpu *c, const struct uop *u, const uint8_t *behind)
{
    struct jit *j = c->jit.state;
    if (u->row < OPROW_COUNT)
        j->calls[u->row][behind >= j->run + HOT_SIZE]++; /* slow paths are in the cold half */
    return jit_call(c, u, behind);
}

long cpu_profile(struct cpu *c, bool on)
{
    struct jit *j = c->jit.state;
    if (!j)
        return 0; /* nothing to count */
    if (on && !j->calls && !(j->calls = calloc(OPROW_COUNT, sizeof *j->calls)))
        return -ENOMEM;
    if (!on) {
        free(j->calls);
        j->calls = NULL;
    }
    uintptr_t half = on ? (uintptr_t)count_call : (uintptr_t)jit_call;
    memcpy(j->helper_half, &half, sizeof half);
    cpu_flush_code(c);
    return 0;
}

static long handler_calls(const struct cpu *c, struct kvmpy_handler_calls *out)
{
    const struct jit *j = c->jit.state;
    uint32_t room = out->count, n = 0;
    if (!j || !j->calls)
        return -ENOENT;
    for (unsigned row = 0; row < OPROW_COUNT; row++) {
        if (!j->calls[row][0] && !j->calls[row][1])
            continue;
        if (n < room) {
            struct kvmpy_handler_call *k = &out->call[n];
            memset(k, 0, sizeof *k);
            snprintf(k->name, sizeof k->name, "%s", decode_name(row));
            k->all = j->calls[row][0];
            k->slow = j->calls[row][1];
        }
        n++;
    }
    out->count = n;
    return n > room ? -E2BIG : 0;
}

static long host_code(struct cpu *c, struct kvmpy_host_code *out)
{
    const struct jit *j = c->jit.state;
    struct block *b = j ? block_at(c, out->address) : NULL;
    const struct jit_block *jb = b ? b->host_code : NULL;
    if (!jb)
        return -ENOENT;
    memcpy((void *)(uintptr_t)out->buffer, jb->entry, out->size < jb->hot_bytes ? out->size : jb->hot_bytes);
    out->size = jb->hot_bytes;
    out->out_of_line = jb->cold_bytes;
    out->host = (uintptr_t)jb->entry;
    out->guest_bytes = b->bytes + b->more;
    out->insns = jb->mapped ? jb->ninsn : 0;
    memset(out->at, 0, sizeof out->at);
    if (out->insns)
        memcpy(out->at, jit_at(jb), out->insns * sizeof out->at[0]);
    return 0;
}

/* Fields of struct cpu that host code uses. */
static const struct { uint32_t offset, size; const char *name; } fields[] = {
#define NAMED(field, name) {offsetof(struct cpu, field), sizeof(((struct cpu *)0)->field), name}
    NAMED(gpr[0], "rax"), NAMED(gpr[1], "rcx"), NAMED(gpr[2], "rdx"), NAMED(gpr[3], "rbx"), NAMED(gpr[4], "rsp"),
    NAMED(gpr[5], "rbp"), NAMED(gpr[6], "rsi"), NAMED(gpr[7], "rdi"), NAMED(gpr[8], "r8"), NAMED(gpr[9], "r9"),
    NAMED(gpr[10], "r10"), NAMED(gpr[11], "r11"), NAMED(gpr[12], "r12"), NAMED(gpr[13], "r13"), NAMED(gpr[14], "r14"),
    NAMED(gpr[15], "r15"), NAMED(scratch, "scratch"), NAMED(segbase[4], "fs.base"), NAMED(segbase[5], "gs.base"),
    NAMED(segbase, "segment base"), NAMED(cc, "flags"), NAMED(request, "request"), NAMED(tlb, "softTLB"),
    NAMED(budget, "budget"), NAMED(rip, "rip"), NAMED(mxcsr, "mxcsr"), NAMED(fpu.cw, "x87 cw"),
    NAMED(fpu.fip, "x87 fip"), NAMED(fpu.fdp, "x87 fdp"), NAMED(jit.page, "page"), NAMED(jit.context, "context"),
    NAMED(jit.serial, "serial"), NAMED(jit.once, "once"), NAMED(jit.x87.live, "x87 live"), NAMED(jit.x87, "x87 pointers"),
#undef NAMED
};

static bool name_of_field(const struct cpu *c, uintptr_t at, char *name, size_t size)
{
    uintptr_t offset = at - (uintptr_t)c;
    if (at < (uintptr_t)c || offset >= sizeof *c)
        return false;
    if (offset >= offsetof(struct cpu, v) && offset < offsetof(struct cpu, v) + sizeof c->v) {
        offset -= offsetof(struct cpu, v);
        snprintf(name, size, "ymm%zu%s", offset / sizeof c->v[0], offset % sizeof c->v[0] ? ".high" : "");
        return true;
    }
    for (unsigned i = 0; i < sizeof fields / sizeof fields[0]; i++)
        if (offset >= fields[i].offset && offset < (size_t)fields[i].offset + fields[i].size) {
            snprintf(name, size, "%s", fields[i].name);
            return true;
        }
    snprintf(name, size, "cpu+%#zx", (size_t)offset);
    return true;
}

static bool name_of_code(const struct jit *j, const uint8_t *at, char *name, size_t size)
{
    const struct { const uint8_t *at; const char *name; } thunks[] = {
        {j->helper, "handler"}, {j->exit_link, "leave by link"}, {j->exit_rip, "leave"}, {j->prove, "prove link"}, {j->find, "find target"},
    };
    for (unsigned i = 0; i < sizeof thunks / sizeof thunks[0]; i++)
        if (thunks[i].at == at) {
            snprintf(name, size, "%s", thunks[i].name);
            return true;
        }
    if (at < j->run + HOT_SIZE || at >= j->run + HOT_SIZE + COLD_SIZE)
        return false;
    snprintf(name, size, "(out of line)");
    return true;
}

/* Somewhere in the JIT's data there may be a micro-op: what is no row has no name. */
static bool name_of_data(const struct jit *j, const uint8_t *at, char *name, size_t size)
{
    uintptr_t offset = (uintptr_t)at - (uintptr_t)j->data; /* of any address: it may wrap */
    if (offset >= j->used || j->used - offset < sizeof(struct uop) || offset % 8)
        return false;
    if (at == (const uint8_t *)j->data_target) {
        snprintf(name, size, "target table");
        return true;
    }
    const struct uop *u = (const struct uop *)at;
    if (u->row >= OPROW_COUNT || !u->fn)
        return false;
    snprintf(name, size, "micro-op %s", decode_name(u->row));
    return true;
}

static long host_name(const struct cpu *c, struct kvmpy_host_name *n)
{
    const struct jit *j = c->jit.state;
    const uint8_t *at = (const uint8_t *)(uintptr_t)n->address;
    memset(n->name, 0, sizeof n->name);
    if (j && (name_of_field(c, (uintptr_t)at, n->name, sizeof n->name) || name_of_code(j, at, n->name, sizeof n->name) ||
              name_of_data(j, at, n->name, sizeof n->name)))
        return 0;
    return -ENOENT;
}

long cpu_profile_ioctl(struct cpu *c, unsigned long request, void *p)
{
    switch (request) {
    case KVMPY_GET_HOST_CODE:
        return host_code(c, p);
    case KVMPY_GET_HOST_NAME:
        return host_name(c, p);
    case KVMPY_GET_HANDLER_CALLS:
        return handler_calls(c, p);
    default:
        return -ENOTTY;
    }
}
#else
long cpu_profile(struct cpu *c, bool on) { return (void)c, (void)on, 0; }
long cpu_profile_ioctl(struct cpu *c, unsigned long request, void *p) { return (void)c, (void)request, (void)p, -ENOTTY; }
#endif
