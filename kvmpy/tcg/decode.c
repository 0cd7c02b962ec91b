/* SPDX-License-Identifier: Apache-2.0
 *
 * Guest bytes to micro-ops.
 *
 * Decoding is a walk over the rows of one opcode (optable_data.h, made from table/): prefixes, then the opcode map,
 * then the first row whose prefix, ModRM, W and L fit, whose mode is right and whose CPUID features the guest has been
 * told of. Rows with a mandatory prefix come before those without, so an absent feature falls through to the older
 * meaning (TZCNT to BSF) as on hardware.
 *
 * All that can be decided from the mode is decided here, once per block: #UD, #NM and #GP for privilege become
 * micro-ops of their own (op_ud, op_nm, op_gp0), so handlers do not ask. Segment bases and limits are asked for at run
 * time only where a segment is not flat (EA_SEG, EA_CHECK).
 *
 * Addresses are base + (index << scale) + disp with byte offsets into struct cpu. Absent parts name the constant zero;
 * RIP-relative ones name bip, and disp then counts from the block's start. disp32 near the edge of its range could
 * overflow by that: a prefix micro-op puts the sum into a scratch register instead.
 */
#include "decode.h"

#include <string.h>

#include "optable_data.h"

OP_DECL(ud);
OP_DECL(gp0);
OP_DECL(nm);
OP_DECL(nop);
OP_DECL(ripbase);
OP_DECL(jcc_o16);
OP_DECL(jmp_o16);

struct state {
    const uint8_t *p;
    unsigned pos, avail, off;
    uint32_t mode;
    bool more;          /* ran out of bytes */
    bool p66, p67, lock;
    uint8_t rep;        /* 0, 0xf3 or 0xf2: the last one */
    uint8_t rex;
    int8_t seg;         /* override or -1 */
    bool vex;
    uint8_t w, l, vvvv, r, x, b;
    uint8_t modrm, mod, reg, rm;
    bool mem;
    bool riprel;
    int64_t disp;
};

static uint8_t byte(struct state *s)
{
    if (s->pos >= s->avail) {
        s->more = true;
        return 0;
    }
    return s->p[s->pos++];
}
static uint64_t bytes(struct state *s, unsigned n)
{
    uint64_t v = 0;
    for (unsigned i = 0; i < n; i++)
        v |= (uint64_t)byte(s) << 8 * i;
    return v;
}
static int64_t sbytes(struct state *s, unsigned n)
{
    uint64_t v = bytes(s, n);
    return n == 8 ? (int64_t)v : (int64_t)(v << (64 - 8 * n)) >> (64 - 8 * n);
}

static uint8_t gpr(unsigned n) { return (uint8_t)(n * 8); }
static uint8_t gpr8(const struct state *s, unsigned n) { return n >= 4 && n < 8 && !s->rex && !s->vex ? (uint8_t)((n & 3) * 8 + 1) : gpr(n); }

/* ModRM with SIB and displacement, into the address fields of u. Index 0xff: #UD, a vector index needs a SIB byte. */
static void address(struct state *s, struct uop *u, bool vsib)
{
    int seg = SEG_DS;
    bool a16 = s->mode & MODE_CODE64 ? false : !(s->mode & MODE_CODE32) != s->p67;
    u->base = u->index = REG_ZERO;
    if (a16) {
        static const uint8_t base[8] = {RBX, RBX, RBP, RBP, RSI, RDI, RBP, RBX}, index[4] = {RSI, RDI, RSI, RDI};
        u->aflags |= EA_A16;
        if (s->mod == 0 && s->rm == 6) {
            s->disp = sbytes(s, 2);
        } else {
            u->base = gpr(base[s->rm]);
            if (s->rm < 4)
                u->index = gpr(index[s->rm]);
            if (base[s->rm] == RBP)
                seg = SEG_SS;
            if (s->mod)
                s->disp = sbytes(s, s->mod);
        }
        if (vsib)
            u->index = 0xff;
    } else {
        unsigned base = s->rm;
        if (!(s->mode & MODE_CODE64) || s->p67)
            u->aflags |= EA_A32;
        if (s->rm == 4) {
            uint8_t sib = byte(s);
            unsigned index = (sib >> 3 & 7) | s->x << 3;
            base = sib & 7;
            if (vsib)
                u->index = (uint8_t)index;
            else if (index != 4)
                u->index = gpr(index);
            u->scale = sib >> 6;
        } else if (vsib) {
            u->index = 0xff;
        }
        if (s->mod == 0 && base == 5) {
            s->disp = sbytes(s, 4);
            if (s->rm == 5 && (s->mode & MODE_CODE64))
                s->riprel = true;
        } else {
            u->base = gpr(base | s->b << 3);
            if (base == 4 || base == 5)
                seg = (s->b ? SEG_DS : SEG_SS);
            if (s->mod == 1)
                s->disp = sbytes(s, 1);
            else if (s->mod == 2)
                s->disp = sbytes(s, 4);
        }
    }
    u->disp = (int32_t)s->disp;
    u->seg = (uint8_t)(s->seg >= 0 ? s->seg : seg);
}

static void segment_flags(const struct state *s, struct uop *u)
{
    if (u->seg >= SEG_FS)
        u->aflags |= EA_SEG;
    if (!(s->mode & MODE_CODE64) && (u->seg >= SEG_FS || u->seg == SEG_CS || (s->mode & MODE_SEGS)))
        u->aflags |= EA_SEG | EA_CHECK;
}

static void made_up(struct decoded *out, const struct state *s, uop_fn fn)
{
    memset(out, 0, sizeof *out);
    out->uop.fn = fn;
    out->uop.off = (uint8_t)s->off;
    out->uop.len = (uint8_t)s->pos;
    out->uop.base = out->uop.index = REG_ZERO;
    out->cond = 0xff;
    out->end = out->barrier = true;
}

static bool fits(const struct oprow *r, struct state *s, const uint64_t *features)
{
    switch (r->prefix) {
    case 1: if (s->p66 || s->rep) return false; break;
    case 2: if (!s->p66 || s->rep) return false; break;
    case 3: if (s->rep != 0xf3) return false; break;
    case 4: if (s->rep != 0xf2) return false; break;
    }
    if (r->modrm) {
        if (r->digit >= 0 && r->digit != (s->modrm >> 3 & 7))
            return false;
        bool reg = s->modrm >= 0xc0;
        if ((r->mod == 1 && !reg) || (r->mod == 2 && reg))
            return false;
        if (r->rm >= 0 && r->rm != (s->modrm & 7))
            return false;
    }
    if (r->w >= 0 && r->w != s->w)
        return false;
    if (r->l >= 0 && r->l != s->l)
        return false;
    if (r->attrs & (s->mode & MODE_CODE64 ? OPA_I64 : OPA_O64))
        return false;
    for (unsigned i = 0; i < 3 && r->feature[i]; i++) {
        unsigned bit = r->feature[i] - 1;
        if (!(features[bit / 64] >> (bit % 64) & 1))
            return false;
    }
    return true;
}

static bool prefixes(struct state *s, uint8_t *opcode)
{
    for (;;) {
        uint8_t b = byte(s);
        if (s->more || s->pos > 15)
            return false;
        switch (b) {
        case 0x66: s->p66 = true; break;
        case 0x67: s->p67 = true; break;
        case 0xf0: s->lock = true; break;
        case 0xf2: case 0xf3: s->rep = b; break;
        case 0x26: case 0x2e: case 0x36: case 0x3e:
            if (!(s->mode & MODE_CODE64))
                s->seg = (int8_t)(b >> 3 & 3);
            break;
        case 0x64: s->seg = SEG_FS; break;
        case 0x65: s->seg = SEG_GS; break;
        default:
            if ((b & 0xf0) == 0x40 && (s->mode & MODE_CODE64)) {
                s->rex = b;
                continue;
            }
            *opcode = b;
            return true;
        }
        s->rex = 0; /* REX counts only right before the opcode */
    }
}

/* VEX prefix after its first byte. False: #UD. */
static bool vex(struct state *s, uint8_t first, unsigned *map)
{
    uint8_t b = byte(s), c = b;
    *map = 1;
    s->vex = true;
    s->r = !(b & 0x80);
    if (first == 0xc4) {
        s->x = !(b & 0x40);
        s->b = !(b & 0x20);
        *map = b & 31;
        c = byte(s);
        s->w = c >> 7;
    }
    if (!(s->mode & MODE_CODE64))
        s->r = s->x = s->b = 0;
    s->vvvv = ~c >> 3 & 15;
    if (!(s->mode & MODE_CODE64))
        s->vvvv &= 7;
    s->l = c >> 2 & 1;
    if (s->p66 || s->rep || s->lock || s->rex || *map < 1 || *map > 3)
        return false;
    static const uint8_t pp[4] = {0, 0x66, 0xf3, 0xf2};
    s->p66 = pp[c & 3] == 0x66;
    s->rep = pp[c & 3] == 0x66 ? 0 : pp[c & 3];
    return true;
}

static unsigned operand_size(const struct state *s, const struct oprow *r)
{
    if (s->mode & MODE_CODE64) {
        if (r->attrs & OPA_F64)
            return 64;
        if (r->attrs & OPA_D64)
            return s->p66 && !s->w ? 16 : 64;
        return s->w ? 64 : s->p66 && r->prefix != 2 ? 16 : s->p66 && r->size == 1 ? 16 : 32;
    }
    return (bool)(s->mode & MODE_CODE32) != s->p66 ? 32 : 16;
}

enum decode_result decode_insn(const uint8_t *p, unsigned avail, uint32_t mode, const uint64_t *features, unsigned off,
                               struct decoded *out)
{
    struct state s = {.p = p, .avail = avail < 15 ? avail : 15, .mode = mode, .off = off, .seg = -1};
    uint8_t opcode = 0;
    unsigned map = 0;
    const struct oprow *r = NULL;

    if (!prefixes(&s, &opcode))
        goto short_or_long;
    s.w = s.rex >> 3 & 1;
    s.r = s.rex >> 2 & 1;
    s.x = s.rex >> 1 & 1;
    s.b = s.rex & 1;
    if ((opcode & 0xfe) == 0xc4) {
        if (s.pos >= s.avail)
            goto short_or_long;
        if ((mode & MODE_CODE64) || (s.p[s.pos] >= 0xc0 && (mode & MODE_PE) && !(mode & MODE_VM86))) {
            bool good = vex(&s, opcode, &map);
            if (s.more)
                goto short_or_long;
            if (!good)
                goto invalid;
            opcode = byte(&s);
        }
    } else if (opcode == 0x0f) {
        map = 1;
        opcode = byte(&s);
        if (opcode == 0x38 || opcode == 0x3a) {
            map = opcode == 0x38 ? 2 : 3;
            opcode = byte(&s);
        }
    }
    if (s.more)
        goto short_or_long;

    unsigned key = (map + 4 * s.vex) * 256 + opcode, n = opindex[key].count;
    const struct oprow *row = &oprows[opindex[key].first];
    if (n && row->modrm) {
        if (s.pos >= s.avail)
            goto short_or_long;
        s.modrm = s.p[s.pos];
    }
    for (; n; n--, row++)
        if (fits(row, &s, features)) {
            r = row;
            break;
        }
    if (!r)
        goto invalid;

    memset(out, 0, sizeof *out);
    struct uop *u = &out->uop;
    u->base = u->index = REG_ZERO;
    u->seg = (uint8_t)(s.seg >= 0 ? s.seg : SEG_DS);
    out->cond = 0xff;
    if (r->modrm) {
        byte(&s);
        s.mod = s.modrm >> 6;
        s.reg = (s.modrm >> 3 & 7) | s.r << 3;
        s.rm = s.modrm & 7;
        s.mem = s.mod != 3 && r->mod != 1 && r->mod != 3;
        if (s.mem) {
            bool vsib = (r->operand[0] & 0xff) == 'X' || (r->operand[1] & 0xff) == 'X';
            address(&s, u, vsib);
            if (vsib && u->index == 0xff)
                goto invalid;
        }
    }

    /* operands */
    unsigned osize = operand_size(&s, r);
    if ((mode & MODE_CODE64) && r->size == 2)
        osize = s.w ? 64 : 32;
    uint8_t *slot[4] = {&u->d, &u->s, &u->x, NULL};
    unsigned gsize = osize; /* of the sized operand */
    bool branch = false, used_vvvv = false;
    int64_t rel = 0;
    unsigned tail = s.pos;
    for (unsigned i = 0; i < 4 && r->operand[i]; i++) {
        unsigned kind = r->operand[i] & 0xff, size = r->operand[i] >> 8;
        bool b8 = size == SZ_B;
        unsigned rm = s.rm | s.b << 3, value = 0;
        switch (kind) {
        case 'E': case 'R': value = b8 ? gpr8(&s, rm) : gpr(rm); break;
        case 'G': value = b8 ? gpr8(&s, s.reg) : gpr(s.reg); break;
        case 'Z': value = b8 ? gpr8(&s, (opcode & 7) | s.b << 3) : gpr((opcode & 7) | s.b << 3); break;
        case 'B': value = gpr(s.vvvv); used_vvvv = true; break;
        case 'H': value = s.vvvv; used_vvvv = true; break;
        case 'V': value = s.reg; break;
        case 'W': case 'U': value = rm; break;
        case 'P': value = s.reg & 7; break;
        case 'Q': case 'N': case 'T': value = s.rm; break;
        case 'S':
            value = s.reg & 7;
            if (value > SEG_GS)
                goto invalid;
            break;
        case 'C':
            value = s.reg;
            if (value == 0 && s.lock) { /* AMD's way to CR8 is not announced */
                goto invalid;
            }
            break;
        case 'D':
            value = s.reg;
            if (value > 7)
                goto invalid;
            break;
        case 'I': {
            uint64_t imm;
            if (size == SZ_UB)
                imm = byte(&s);
            else if (size == SZ_B)
                imm = (uint64_t)sbytes(&s, 1);
            else if (size == SZ_W)
                imm = bytes(&s, 2);
            else if (size == SZ_V)
                imm = (uint64_t)sbytes(&s, osize / 8);
            else
                imm = (uint64_t)sbytes(&s, osize == 16 ? 2 : 4);
            if (r->attrs & OPA_IMM2 && i == 1)
                u->imm |= imm << 16;
            else
                u->imm = imm;
            continue;
        }
        case 'L': u->imm = byte(&s); continue;
        case 'J': rel = sbytes(&s, size == SZ_B ? 1 : osize == 16 ? 2 : 4); branch = true; continue;
        case 'O':
            u->imm = bytes(&s, mode & MODE_CODE64 ? (s.p67 ? 4 : 8) : !(mode & MODE_CODE32) != s.p67 ? 2 : 4);
            s.mem = true;
            continue;
        case 'A': u->imm = bytes(&s, osize / 8); u->imm |= bytes(&s, 2) << 32; continue;
        default: continue;
        }
        if (slot[i])
            *slot[i] = (uint8_t)value;
    }
    if (!r->operand[2])
        u->x = osize == 16; /* for the few handlers that ask: MOV from a segment register, LGDT */
    if (s.more)
        goto short_or_long;
    if (s.vex && !used_vvvv && s.vvvv)
        goto invalid;
    if (s.mem)
        segment_flags(&s, u);
    else if (!(r->modrm && r->operand[0]) || (r->attrs & OPA_RDI)) { /* implicit memory: strings, XLAT: the address size matters */
        if (mode & MODE_CODE64 ? s.p67 : !(mode & MODE_CODE32) == s.p67)
            u->aflags |= EA_A32;
        else if (!(mode & MODE_CODE64))
            u->aflags |= EA_A16;
        segment_flags(&s, u);
    }

    /* gates that depend on the mode */
    if ((r->attrs & OPA_PE) && (!(mode & MODE_PE) || (mode & MODE_VM86)))
        goto invalid;
    if (s.lock && (!(r->attrs & OPA_LOCK) || !s.mem))
        goto invalid;
    if (r->attrs & OPA_X87 && mode & (MODE_EM | MODE_TS))
        goto no_math;
    if (r->attrs & OPA_MMXCLASS && mode & (MODE_EM | MODE_TS)) {
        if (mode & MODE_EM)
            goto invalid;
        goto no_math;
    }
    if (r->attrs & OPA_SSECLASS) {
        if ((mode & MODE_EM) || !(mode & MODE_SSE))
            goto invalid;
        if (mode & MODE_TS)
            goto no_math;
    }
    if (r->attrs & OPA_AVXCLASS) {
        if (!(mode & MODE_AVX))
            goto invalid;
        if (mode & MODE_TS)
            goto no_math;
    }
    if (r->attrs & OPA_PRIV && !(mode & MODE_CPL0)) {
        made_up(out, &s, op_gp0);
        return DECODE_OK;
    }

    /* handler */
    unsigned size_index = r->size == 1 ? (gsize == 16 ? 0 : gsize == 32 ? 1 : 2) : r->size == 2 ? (gsize == 64 ? 2 : 1) : r->size == 3 ? s.l : 0;
    if (r->size == 2 && !(mode & MODE_CODE64))
        size_index = 1;
    const uop_fn *pool = handler_pool[r->pool] + size_index * 6 + s.mem * 3;
    u->fn = pool[0];
    out->quiet = pool[1];
    if (s.lock)
        u->fn = pool[2];
    if (!u->fn)
        goto invalid;
    if (r->attrs & OPA_X87)
        u->imm = (uint64_t)(opcode & 7) << 8 | s.modrm; /* FOP */
    if (r->attrs & OPA_REP)
        u->imm = s.rep == 0xf3 ? 1 : s.rep == 0xf2 ? 2 : 0;
    if ((r->attrs & OPA_NOP0) && !s.b && u->d == 0)
        u->fn = op_nop;
    if (s.lock || !out->quiet)
        out->quiet = NULL;
    u->len = (uint8_t)s.pos;
    u->off = (uint8_t)off;
    u->row = (uint16_t)(r - oprows);
    out->row = r;
    out->enc = (struct encoding){.map = (uint8_t)map, .opcode = opcode, .modrm = s.modrm, .osize = (uint8_t)(osize / 8),
                                 .imm = (uint8_t)(s.pos - tail), .l = s.l, .vex = s.vex, .w = s.w, .lock = s.lock, .mem = s.mem};
    if (branch) {
        u->imm = (uint64_t)((int64_t)off + s.pos + rel);
        bool jcc = (map == 0 && (opcode & 0xf0) == 0x70) || (map == 1 && (opcode & 0xf0) == 0x80);
        if (jcc)
            out->cond = opcode & 15;
        if (osize == 16 && (mode & MODE_CODE32) && (jcc || opcode == 0xe9 || opcode == 0xeb)) {
            u->fn = jcc ? op_jcc_o16 : op_jmp_o16;
            u->d = opcode & 15;
            out->cond = 0xff;
        }
    }
    if (s.riprel) {
        int64_t disp = s.disp + off + s.pos;
        u->base = REG_BIP;
        if (disp != (int32_t)disp) {
            out->prefix = *u;
            out->prefix.fn = op_ripbase;
            out->prefix.len = 0;
            out->prefix.imm = off + s.pos;
            out->has_prefix = true;
            u->base = REG_SCRATCH;
            disp = s.disp;
        }
        u->disp = (int32_t)disp;
    }
    out->end = r->attrs & OPA_END;
    out->links = r->attrs & (OPA_LINK1 | OPA_LINK2) ? 1 : 0;
    out->flags_written = r->written;
    out->flags_read = r->attrs & OPA_COUNT && u->imm & (osize == 64 ? 63 : 31) ? 0 : r->read;
    out->barrier = s.mem || out->end || (r->attrs & (OPA_FAULT | OPA_X87 | OPA_MMXCLASS | OPA_SSECLASS | OPA_AVXCLASS));
    return DECODE_OK;

short_or_long:
    if (s.avail == 15 && (s.more || s.pos >= 15)) { /* longer than 15 bytes: #GP, SDM vol. 2 2.3.11 */
        made_up(out, &s, op_gp0);
        return DECODE_OK;
    }
    return DECODE_MORE;
invalid:
    if (s.more)
        goto short_or_long;
    made_up(out, &s, op_ud);
    return DECODE_OK;
no_math:
    made_up(out, &s, op_nm);
    return DECODE_OK;
}

bool decode_repeats(unsigned row) { return row < OPROW_COUNT && oprows[row].attrs & OPA_REP; }
const char *decode_name(unsigned row) { return row < OPROW_COUNT ? oprows[row].name : "?"; }
