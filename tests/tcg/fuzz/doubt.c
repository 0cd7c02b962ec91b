/* SPDX-License-Identifier: Apache-2.0
 *
 * Undefined flags; see doubt.h. Which instruction leaves which in doubt stands in doubtful.h, made of the optable.
 */
#include "doubt.h"

#include <string.h>

#include "decode.h"
#include "doubtful.h"

static uint64_t rflags_of(uint8_t flags)
{
    static const uint16_t bit[] = {FL_OF, FL_SF, FL_ZF, FL_AF, FL_PF, FL_CF}; /* in the order of FLAG_* */
    uint64_t r = 0;
    for (unsigned i = 0; i < 6; i++)
        r |= flags >> i & 1 ? bit[i] : 0;
    return r;
}

/* Byte of guest.ram behind a linear address; NULL where there is none. */
static uint8_t *byte_at(uint64_t lin)
{
    uint64_t gpa;
    uint32_t pkru = guest.cpu->pkru;
    bool writable, user;
    guest.cpu->pkru = 0; /* protection keys keep nobody from running code */
    bool mapped = cpu_translate(guest.cpu, lin, &gpa, &writable, &user);
    guest.cpu->pkru = pkru;
    if (!mapped || guest_page(gpa) < 0)
        return NULL;
    return guest_ram(guest_page(gpa)) + (gpa & 0xfff);
}

/* The instruction at RIP. False: there is none, so that fetching or decoding it faults. */
static bool next_instruction(struct decoded *d)
{
    const struct cpu *c = guest.cpu;
    uint8_t bytes[32] = {0};
    unsigned n = 0;
    uint64_t lin = c->rip + (c->mode & MODE_CODE64 ? 0 : c->segbase[SEG_CS]);
    for (const uint8_t *p; n < 16 && (p = byte_at(lin + n)); n++)
        bytes[n] = *p;
    return n && decode_insn(bytes, n, c->mode, c->features, 0, d) == DECODE_OK && d->row;
}

/* RFLAGS in the frame of the exception that was just delivered are not compared. */
static bool mask_frame(uint8_t doubt, struct end *a, struct end *b)
{
    const struct cpu *c = guest.cpu;
    const uint8_t *p = c->efer & EFER_LMA ? byte_at(c->gpr[RSP] + 16 + 8 * c->exc.has_error) : NULL;
    if (!p)
        return false;
    uint64_t mask = ~rflags_of(doubt), both[2];
    size_t at = (size_t)(p - guest.ram);
    memcpy(&both[0], a->memory + at, 8);
    memcpy(&both[1], b->memory + at, 8);
    both[0] &= mask;
    both[1] &= mask;
    memcpy(a->memory + at, &both[0], 8);
    memcpy(b->memory + at, &both[1], 8);
    return true;
}

bool doubt_remove(const uint8_t *data, size_t size, unsigned instructions, struct end *a, struct end *b)
{
    struct cpu *c = guest.cpu;
    enum tcg_stop stop = TCG_STOP_CANCEL;
    uint8_t doubt = 0;

    guest_reset(data, size);
    c->jit.state = NULL;
    for (uint64_t limit = cpu_insns(c) + instructions; cpu_insns(c) < limit && (stop == TCG_STOP_CANCEL || stop == TCG_STOP_IO);) {
        struct decoded d;
        bool known = next_instruction(&d);
        uint64_t faults = c->stat.faults;
        c->deadline = cpu_insns(c) + 1;
        stop = cpu_run(c);
        if (stop == TCG_STOP_IO) {
            guest_answer(c);
            continue;
        }
        if (c->stat.faults != faults) {
            if (doubt && (c->stat.faults != faults + 1 || !mask_frame(doubt, a, b)))
                return false;
        } else if (known) {
            if (d.flags_read & doubt)
                return false;
            doubt = (uint8_t)((doubt & ~d.flags_written) | doubtful[d.uop.row]);
        }
    }
    a->rflags &= ~rflags_of(doubt);
    b->rflags &= ~rflags_of(doubt);
    return true;
}
