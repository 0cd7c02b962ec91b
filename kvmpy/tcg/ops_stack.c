/* SPDX-License-Identifier: Apache-2.0
 *
 * PUSH POP PUSHA POPA PUSHF POPF ENTER LEAVE, and segment registers on the stack.
 *
 * 64-bit operands exist only in 64-bit mode, where the stack is flat and 64 bits wide: those handlers go straight to
 * memory. The others honour SS.base, SS.B and (when SS is not flat) its limit. RSP changes last, so a fault leaves it.
 * POP to memory computes its address with the RSP after the pop; POP SP keeps the popped value.
 */
#include "op.h"

/* In modes with segments the stack has limits. */
#define PUSH(bits, value)                                              \
    do {                                                               \
        U(bits) v_ = (value);                                          \
        uint64_t sp_ = c->gpr[RSP] - bits / 8;                         \
        if (bits == 64) {                                              \
            ststk##bits(c, u, sp_, v_);                                \
            c->gpr[RSP] = sp_;                                         \
        } else {                                                       \
            if (unlikely(c->mode & MODE_SEGS))                         \
                stack_check(c, u, sp_, bits / 8);                      \
            ststk##bits(c, u, stack_lin(c, sp_), v_);                  \
            set_sp(c, sp_);                                            \
        }                                                              \
    } while (0)
#define TOP(bits)                                                                                             \
    (bits == 64 ? ldstk##bits(c, u, c->gpr[RSP])                                                              \
                : ((unlikely(c->mode & MODE_SEGS) ? stack_check(c, u, c->gpr[RSP], bits / 8) : (void)0),      \
                   ldstk##bits(c, u, stack_lin(c, c->gpr[RSP]))))
#define DROP(bytes) (code64(c) ? (void)(c->gpr[RSP] += (bytes)) : set_sp(c, c->gpr[RSP] + (bytes)))

#define STACK(bits)                                                                                           \
    OP(push_r##bits) { PUSH(bits, GET##bits(u->d)); NEXT; }                                                   \
    OP(push_i##bits) { PUSH(bits, (U(bits))u->imm); NEXT; }                                                   \
    OP(push_m##bits) { PUSH(bits, ld##bits(c, u, ea(c, u))); NEXT; }                                          \
    OP(pop_r##bits) { U(bits) v = TOP(bits); if (bits == 64) c->gpr[RSP] += 8; else DROP(bits / 8); SET##bits(u->d, v); NEXT; } \
    OP(pop_m##bits)                                                                                           \
    {                                                                                                         \
        U(bits) v = TOP(bits);                                                                                \
        uint64_t sp = c->gpr[RSP];                                                                            \
        if (u->base == RSP * 8) {                                                                             \
            DROP(bits / 8);                                                                                   \
            uint64_t a = R64(c, u->base) + (R64(c, u->index) << u->scale) + (int64_t)u->disp;                 \
            c->gpr[RSP] = sp;                                                                                 \
            st##bits(c, u, u->aflags ? ea_slow(c, u, a) : a, v);                                              \
        } else {                                                                                              \
            st##bits(c, u, ea(c, u), v);                                                                      \
        }                                                                                                     \
        DROP(bits / 8);                                                                                       \
        NEXT;                                                                                                 \
    }                                                                                                         \
    OP(leave_##bits)                                                                                          \
    {                                                                                                         \
        uint64_t bp = c->gpr[RBP];                                                                            \
        if (bits != 64 && unlikely(c->mode & MODE_SEGS))                                                      \
            stack_check(c, u, bp, bits / 8);                                                                  \
        U(bits) v = ldstk##bits(c, u, stack_lin(c, bp));                                                      \
        set_sp(c, bp + bits / 8);                                                                             \
        SET##bits(RBP * 8, v);                                                                                \
        NEXT;                                                                                                 \
    }                                                                                                         \
    OP(enter_ii##bits)                                                                                        \
    {                                                                                                         \
        unsigned locals = u->imm & 0xffff, level = u->imm >> 16 & 31;                                         \
        uint64_t sp = c->gpr[RSP] - bits / 8, bp = c->gpr[RBP];                                               \
        mem_check_write(c, u, stack_lin(c, sp - (level ? level * (bits / 8) : 0) - locals), 1, 1);            \
        ststk##bits(c, u, stack_lin(c, sp), GET##bits(RBP * 8));                                              \
        uint64_t frame = sp;                                                                                  \
        for (unsigned i = 1; i < level; i++) {                                                                \
            bp -= bits / 8;                                                                                   \
            sp -= bits / 8;                                                                                   \
            ststk##bits(c, u, stack_lin(c, sp), ldstk##bits(c, u, stack_lin(c, bp)));                         \
        }                                                                                                     \
        if (level) {                                                                                          \
            sp -= bits / 8;                                                                                   \
            ststk##bits(c, u, stack_lin(c, sp), (U(bits))frame);                                              \
        }                                                                                                     \
        SET##bits(RBP * 8, frame);                                                                            \
        set_sp(c, sp - locals);                                                                               \
        NEXT;                                                                                                 \
    }                                                                                                         \
    OP(pushf_##bits)                                                                                          \
    {                                                                                                         \
        if ((c->mode & MODE_VM86) && !(c->mode & MODE_IOPL)) {                                                \
            if (bits != 16 || !virtual_if(c))                                                                 \
                cpu_fault_code(c, u, EXC_GP, 0);                                                              \
            PUSH(16, virtual_flags(c, cpu_rflags(c)));                                                        \
            NEXT;                                                                                             \
        }                                                                                                     \
        PUSH(bits, (U(bits))(cpu_rflags(c) & ~(uint64_t)(FL_VM | FL_RF)));                                    \
        NEXT;                                                                                                 \
    }                                                                                                         \
    OP(popf_##bits)                                                                                           \
    {                                                                                                         \
        if ((c->mode & MODE_VM86) && !(c->mode & MODE_IOPL)) {                                                \
            if (bits != 16 || !virtual_if(c))                                                                 \
                cpu_fault_code(c, u, EXC_GP, 0);                                                              \
            set_virtual_flags(c, u, (uint16_t)TOP(16));                                                       \
            DROP(2);                                                                                          \
            LEAVE_AFTER;                                                                                      \
        }                                                                                                     \
        uint64_t v = TOP(bits), may = FL_ARITH | FL_TF | FL_DF | FL_NT | FL_AC | FL_ID;                       \
        if (c->mode & MODE_IOPL)                                                                              \
            may |= FL_IF;                                                                                     \
        if ((c->mode & MODE_CPL0) && !(c->mode & MODE_VM86))                                                  \
            may |= FL_IOPL;                                                                                   \
        if (bits == 16)                                                                                       \
            may &= 0xffff;                                                                                    \
        DROP(bits / 8);                                                                                       \
        bool was_tf = c->sysflags & FL_TF;                                                                    \
        cpu_set_rflags(c, (cpu_rflags(c) & ~may & ~(uint64_t)FL_RF) | (v & may));                             \
        if (was_tf)                                                                                           \
            c->step_trap = true;                                                                              \
        LEAVE_AFTER;                                                                                          \
    }
EACH_WIDE(STACK)

#define PUSH_SEG(bits, name, n) OP(push_##name##_##bits) { PUSH(bits, c->seg[n].sel); NEXT; }
#define POP_SEG(bits, name, n)                               \
    OP(pop_##name##_##bits)                                  \
    {                                                        \
        uint16_t sel = (uint16_t)TOP(bits);                  \
        seg_load(c, u, n, sel);                              \
        DROP(bits / 8);                                      \
        if (n == SEG_SS)                                     \
            c->shadow = SHADOW_MOVSS, cpu_request(c, CPU_REQ_STEP); \
        LEAVE_AFTER;                                         \
    }
PUSH_SEG(16, es, SEG_ES) PUSH_SEG(32, es, SEG_ES) PUSH_SEG(16, cs, SEG_CS) PUSH_SEG(32, cs, SEG_CS)
PUSH_SEG(16, ss, SEG_SS) PUSH_SEG(32, ss, SEG_SS) PUSH_SEG(16, ds, SEG_DS) PUSH_SEG(32, ds, SEG_DS)
EACH_WIDE(PUSH_SEG, fs, SEG_FS)
EACH_WIDE(PUSH_SEG, gs, SEG_GS)
POP_SEG(16, es, SEG_ES) POP_SEG(32, es, SEG_ES) POP_SEG(16, ss, SEG_SS) POP_SEG(32, ss, SEG_SS)
POP_SEG(16, ds, SEG_DS) POP_SEG(32, ds, SEG_DS)
EACH_WIDE(POP_SEG, fs, SEG_FS)
EACH_WIDE(POP_SEG, gs, SEG_GS)

#define ALL_REGISTERS(bits)                                                                       \
    OP(pusha_##bits)                                                                              \
    {                                                                                             \
        uint64_t sp = c->gpr[RSP];                                                                \
        if (c->mode & MODE_SEGS)                                                                  \
            stack_check(c, u, sp - bits, bits);                                                   \
        mem_check_write(c, u, stack_lin(c, sp - bits), 1, 1);                                     \
        mem_check_write(c, u, stack_lin(c, sp - bits / 8), 1, 1);                                 \
        for (unsigned i = 0; i < 8; i++)                                                          \
            ststk##bits(c, u, stack_lin(c, sp - (i + 1) * (bits / 8)), (U(bits))c->gpr[i]);       \
        set_sp(c, sp - bits);                                                                     \
        NEXT;                                                                                     \
    }                                                                                             \
    OP(popa_##bits)                                                                               \
    {                                                                                             \
        U(bits) v[8];                                                                             \
        uint64_t sp = c->gpr[RSP];                                                                \
        if (c->mode & MODE_SEGS)                                                                  \
            stack_check(c, u, sp, bits);                                                          \
        for (unsigned i = 0; i < 8; i++)                                                          \
            v[i] = ldstk##bits(c, u, stack_lin(c, sp + (7 - i) * (bits / 8)));                    \
        for (unsigned i = 0; i < 8; i++)                                                          \
            if (i != RSP)                                                                         \
                SET##bits(i * 8, v[i]);                                                           \
        set_sp(c, sp + bits);                                                                     \
        NEXT_RETURN;                                                                              \
    }
ALL_REGISTERS(16)
ALL_REGISTERS(32)
