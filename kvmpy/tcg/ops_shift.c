/* SPDX-License-Identifier: Apache-2.0
 *
 * Shifts and rotates: by an immediate, by 1, by CL; SHLD, SHRD; and the flagless RORX SARX SHLX SHRX.
 *
 * The count is masked to 5 bits (6 for 64-bit operands) and a masked count of 0 changes no flag; alu_*() in flags.h do
 * both. So the table says that these read all flags, and only immediates, whose count is known, have `_nf` versions.
 */
#include "op.h"

#define SHIFT(bits, name)                                                                                         \
    OP(name##_ri##bits) { SET##bits(u->d, alu_##name##bits(GET##bits(u->d), (uint8_t)u->imm, &c->cc)); NEXT; }    \
    OP(name##_mi##bits) { RMW(bits, U(bits) r = alu_##name##bits(a, (uint8_t)u->imm, &f)); NEXT; }                \
    OP(name##1_r##bits) { SET##bits(u->d, alu_##name##bits(GET##bits(u->d), 1, &c->cc)); NEXT; }                  \
    OP(name##1_m##bits) { RMW(bits, U(bits) r = alu_##name##bits(a, 1, &f)); NEXT; }                              \
    OP(name##cl_r##bits) { SET##bits(u->d, alu_##name##bits(GET##bits(u->d), GET8(RCX * 8), &c->cc)); NEXT; }     \
    OP(name##cl_m##bits) { RMW(bits, U(bits) r = alu_##name##bits(a, GET8(RCX * 8), &f)); NEXT; }
EACH_SIZE(SHIFT, rol)
EACH_SIZE(SHIFT, ror)
EACH_SIZE(SHIFT, rcl)
EACH_SIZE(SHIFT, rcr)
EACH_SIZE(SHIFT, shl)
EACH_SIZE(SHIFT, shr)
EACH_SIZE(SHIFT, sar)

#define COUNT(bits) (u->imm & (bits == 64 ? 63 : 31))
#define QUIET_SHIFT(bits)                                                                                              \
    OP(shl_ri##bits##_nf) { SET##bits(u->d, (uint64_t)GET##bits(u->d) << COUNT(bits)); NEXT; }                         \
    OP(shr_ri##bits##_nf) { SET##bits(u->d, (uint64_t)GET##bits(u->d) >> COUNT(bits)); NEXT; }                         \
    OP(sar_ri##bits##_nf) { SET##bits(u->d, (int64_t)(S(bits))GET##bits(u->d) >> COUNT(bits)); NEXT; }                 \
    OP(shl_mi##bits##_nf) { RMW(bits, U(bits) r = (U(bits))((uint64_t)a << COUNT(bits))); NEXT; }                      \
    OP(shr_mi##bits##_nf) { RMW(bits, U(bits) r = (U(bits))((uint64_t)a >> COUNT(bits))); NEXT; }                      \
    OP(sar_mi##bits##_nf) { RMW(bits, U(bits) r = (U(bits))((int64_t)(S(bits))a >> COUNT(bits))); NEXT; }
EACH_WIDE(QUIET_SHIFT)

#define DOUBLE(bits, name)                                                                                             \
    OP(name##_rri##bits) { SET##bits(u->d, alu_##name##bits(GET##bits(u->d), GET##bits(u->s), (uint8_t)u->imm, &c->cc)); NEXT; } \
    OP(name##_mri##bits) { RMW(bits, U(bits) r = alu_##name##bits(a, GET##bits(u->s), (uint8_t)u->imm, &f)); NEXT; }   \
    OP(name##cl_rr##bits) { SET##bits(u->d, alu_##name##bits(GET##bits(u->d), GET##bits(u->s), GET8(RCX * 8), &c->cc)); NEXT; } \
    OP(name##cl_mr##bits) { RMW(bits, U(bits) r = alu_##name##bits(a, GET##bits(u->s), GET8(RCX * 8), &f)); NEXT; }
EACH_WIDE(DOUBLE, shld)
EACH_WIDE(DOUBLE, shrd)

#define FLAGLESS(bits, name, type, op)                                                                      \
    OP(name##_rrr##bits) { SET##bits(u->d, (type)GET##bits(u->s) op (GET##bits(u->x) & (bits - 1))); NEXT; } \
    OP(name##_rmr##bits) { SET##bits(u->d, (type)ld##bits(c, u, ea(c, u)) op (GET##bits(u->x) & (bits - 1))); NEXT; }
FLAGLESS(32, sarx, int32_t, >>)
FLAGLESS(64, sarx, int64_t, >>)
FLAGLESS(32, shlx, uint32_t, <<)
FLAGLESS(64, shlx, uint64_t, <<)
FLAGLESS(32, shrx, uint32_t, >>)
FLAGLESS(64, shrx, uint64_t, >>)
#define RORX(bits)                                                                                                \
    static inline U(bits) rorx##bits(U(bits) a, unsigned n) { n &= bits - 1; return n ? a >> n | a << (bits - n) : a; } \
    OP(rorx_rri##bits) { SET##bits(u->d, rorx##bits(GET##bits(u->s), (unsigned)u->imm)); NEXT; }                  \
    OP(rorx_rmi##bits) { SET##bits(u->d, rorx##bits(ld##bits(c, u, ea(c, u)), (unsigned)u->imm)); NEXT; }
RORX(32)
RORX(64)
