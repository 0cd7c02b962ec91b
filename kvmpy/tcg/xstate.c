/* SPDX-License-Identifier: Apache-2.0
 *
 * Carried XSAVE components: see xstate.h.
 */
#include "xstate.h"

#include <cpuid.h>
#include <stdlib.h>
#include <string.h>

#include "uop.h"

static struct xcomponent host_components[63];

/* Once: under a hypervisor each of the host's CPUID is an exit. */
static void ask_host(void)
{
    uint32_t size, offset, flags, d;
    for (unsigned bit = 3; bit < 63; bit++)
        if (__get_cpuid_count(0xd, bit, &size, &offset, &flags, &d) && !(flags & 1)) /* bit 0: under IA32_XSS */
            host_components[bit] = (struct xcomponent){offset, size, flags & 2};
    host_components[2] = (struct xcomponent){576, 256, false}; /* what this processor has itself stays where cpuid.c says */
    host_components[9] = (struct xcomponent){2688, 8, false};
}

struct xcomponent xstate_component(unsigned bit)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, ask_host);
    return bit < 63 ? host_components[bit] : (struct xcomponent){0, 0, false};
}

uint32_t xstate_offset(uint64_t xcomp_bv, unsigned bit)
{
    if (!xcomp_bv)
        return xstate_component(bit).offset;
    uint32_t at = 576;
    for (unsigned i = 2; i <= bit; i++) {
        if (!(xcomp_bv >> i & 1))
            continue;
        struct xcomponent x = xstate_component(i);
        if (x.aligned)
            at = (at + 63) & ~63u;
        if (i == bit)
            break;
        at += x.size;
    }
    return at;
}

uint64_t xstate_carry(struct cpu *c, uint64_t xcr0)
{
    c->carried = c->carried_inuse = 0;
    for (unsigned bit = 3; bit < 63; bit++) {
        if (bit == 9 || !(xcr0 >> bit & 1))
            continue;
        struct xcomponent x = xstate_component(bit);
        if (x.size && x.offset >= 832 && x.offset < XSTATE_AREA && x.size <= XSTATE_AREA - x.offset)
            c->carried |= 1ull << bit;
    }
    if (c->carried && !c->carried_area && !(c->carried_area = calloc(1, XSTATE_AREA)))
        c->carried = 0;
    return c->carried;
}

void xstate_free(struct cpu *c)
{
    free(c->carried_area);
    c->carried_area = NULL;
    c->carried = c->carried_inuse = 0;
}

void xstate_store_carried(const struct cpu *c, uint8_t *area)
{
    uint64_t present;
    memcpy(&present, area + 512, 8);
    present |= c->carried_inuse;
    memcpy(area + 512, &present, 8);
    for (uint64_t bits = c->carried_inuse; bits; bits &= bits - 1) {
        struct xcomponent x = xstate_component((unsigned)__builtin_ctzll(bits));
        memcpy(area + x.offset, c->carried_area + x.offset, x.size);
    }
}

void xstate_load_carried(struct cpu *c, const uint8_t *area, uint64_t present)
{
    c->carried_inuse = present & c->carried;
    for (uint64_t bits = c->carried; bits; bits &= bits - 1) {
        unsigned bit = (unsigned)__builtin_ctzll(bits);
        struct xcomponent x = xstate_component(bit);
        if (c->carried_inuse >> bit & 1)
            memcpy(c->carried_area + x.offset, area + x.offset, x.size);
        else
            memset(c->carried_area + x.offset, 0, x.size);
    }
}

enum { ALL_REGISTERS = 0xff };

OP(zero_upper)
{
    uint8_t *upper = c->carried_area + xstate_component(6).offset;
    if (u->d == ALL_REGISTERS)
        memset(upper, 0, 16 * 32);
    else
        memset(upper + 32 * (u->d & 15), 0, 32);
    NEXT_RETURN;
}

void xstate_zero_upper(const struct cpu *c, struct decoded *d)
{
    if (!(c->carried & XSTATE_ZMM_HI256) || !d->row || !(d->row->attrs & OPA_AVXCLASS) || d->row->written || d->has_prefix)
        return;
    unsigned kind = d->row->operand[0] & 0xff;
    bool stored = kind == 'W' && d->enc.mem;
    if (stored || (kind && kind != 'V' && kind != 'H' && kind != 'W' && kind != 'U'))
        return; /* to memory or a general register */
    d->prefix = (struct uop){.fn = op_zero_upper, .d = kind ? d->uop.d : ALL_REGISTERS, .base = REG_ZERO, .index = REG_ZERO};
    d->has_prefix = true;
}
