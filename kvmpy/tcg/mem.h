/* SPDX-License-Identifier: Apache-2.0
 *
 * Guest memory as handlers see it: ea() makes the linear address, ld*() and st*() access it.
 *
 * The fast path is one softTLB probe: the tag must equal the page of the *last* byte while the index comes from the
 * first, so an access that crosses a page misses by itself. Whatever is not plain RAM under the right permission
 * (page fault, MMIO, a page holding decoded code, a page that is clean, alignment checks) has no matching tag and
 * goes to mem_*_slow() in mmu.c, which may longjmp. The segment in the micro-op only decides #SS or #GP for addresses
 * that are not canonical; accesses to the stack by PUSH and friends use the `stk` versions.
 *
 * Vectors: ld128 / ld256 fill a union vec; the `a` versions raise #GP(0) unless aligned (SSE without VEX, MOVAPS).
 * Read-modify-write: p = rmw_host(c, u, lin, size); if p, work on it (with atomics under LOCK); if not, it is a page
 * crossing, MMIO or code: v = ld_rmw(c, u, lin, size) (checks for writing first), then mem_write_slow().
 */
#ifndef KVMPY_TCG_MEM_H
#define KVMPY_TCG_MEM_H

#include <string.h>

#include "uop.h"

#define PAGE_MASK_4K (~0xfffull)

/* mmu.c. `stack`: 1 when the access is through SS whatever the micro-op says. */
uint64_t mem_read_slow(struct cpu *c, const struct uop *u, uint64_t lin, unsigned size, int stack);
void mem_write_slow(struct cpu *c, const struct uop *u, uint64_t lin, unsigned size, uint64_t value, int stack);
void mem_read_bytes(struct cpu *c, const struct uop *u, uint64_t lin, void *buffer, unsigned size);
void mem_write_bytes(struct cpu *c, const struct uop *u, uint64_t lin, const void *buffer, unsigned size); /* all or nothing */
uint64_t ld_rmw(struct cpu *c, const struct uop *u, uint64_t lin, unsigned size);
uint8_t *rmw_host_slow(struct cpu *c, const struct uop *u, uint64_t lin, unsigned size);
void mem_check_write(struct cpu *c, const struct uop *u, uint64_t lin, unsigned size, int stack); /* faults now or never */
uint64_t ea_slow(struct cpu *c, const struct uop *u, uint64_t offset);

/* Linear address of the memory operand. For operands larger than 8 bytes with segment limits use ea_size(). */
static inline uint64_t ea(struct cpu *c, const struct uop *u)
{
    uint64_t a = R64(c, u->base) + (R64(c, u->index) << u->scale) + (int64_t)u->disp;
    if (unlikely(u->aflags))
        a = ea_slow(c, u, a);
    return a;
}

/* The offset part only, as LEA gives it (not truncated to the operand size). */
static inline uint64_t ea_offset(struct cpu *c, const struct uop *u)
{
    uint64_t a = R64(c, u->base) + (R64(c, u->index) << u->scale) + (int64_t)u->disp;
    return u->aflags & EA_A32 ? (uint32_t)a : u->aflags & EA_A16 ? (uint16_t)a : a;
}

static inline struct tlb_entry *tlb_slot(struct cpu *c, uint64_t lin) { return &c->tlb->e[(lin >> 12) & (TLB_SIZE - 1)]; }

/* NULL: take the slow path */
static inline uint8_t *tlb_read(struct cpu *c, uint64_t lin, unsigned size)
{
    struct tlb_entry *e = tlb_slot(c, lin);
    return likely(((lin + size - 1) & PAGE_MASK_4K) == e->rd) ? (uint8_t *)(lin + e->addend) : NULL;
}
static inline uint8_t *tlb_write(struct cpu *c, uint64_t lin, unsigned size)
{
    struct tlb_entry *e = tlb_slot(c, lin);
    return likely(((lin + size - 1) & PAGE_MASK_4K) == e->wr) ? (uint8_t *)(lin + e->addend) : NULL;
}

/* One host access each: other vCPUs must not see halves (packed: guests do not align). */
struct host16 { uint16_t v; } __attribute__((packed));
struct host32 { uint32_t v; } __attribute__((packed));
struct host64 { uint64_t v; } __attribute__((packed));
struct host8 { uint8_t v; };
#define HOST(bits, p) (((volatile struct host##bits *)(p))->v)

#define MEM_ACCESS(bits)                                                                                         \
    static inline uint##bits##_t ld##bits(struct cpu *c, const struct uop *u, uint64_t lin)                      \
    {                                                                                                            \
        uint8_t *p = tlb_read(c, lin, bits / 8);                                                                 \
        return likely(p) ? HOST(bits, p) : (uint##bits##_t)mem_read_slow(c, u, lin, bits / 8, 0);                \
    }                                                                                                            \
    static inline uint##bits##_t ldstk##bits(struct cpu *c, const struct uop *u, uint64_t lin)                   \
    {                                                                                                            \
        uint8_t *p = tlb_read(c, lin, bits / 8);                                                                 \
        return likely(p) ? HOST(bits, p) : (uint##bits##_t)mem_read_slow(c, u, lin, bits / 8, 1);                \
    }                                                                                                            \
    static inline void st##bits(struct cpu *c, const struct uop *u, uint64_t lin, uint##bits##_t value)          \
    {                                                                                                            \
        uint8_t *p = tlb_write(c, lin, bits / 8);                                                                \
        if (likely(p))                                                                                           \
            HOST(bits, p) = value;                                                                               \
        else                                                                                                     \
            mem_write_slow(c, u, lin, bits / 8, value, 0);                                                       \
    }                                                                                                            \
    static inline void ststk##bits(struct cpu *c, const struct uop *u, uint64_t lin, uint##bits##_t value)       \
    {                                                                                                            \
        uint8_t *p = tlb_write(c, lin, bits / 8);                                                                \
        if (likely(p))                                                                                           \
            HOST(bits, p) = value;                                                                               \
        else                                                                                                     \
            mem_write_slow(c, u, lin, bits / 8, value, 1);                                                       \
    }
MEM_ACCESS(8)
MEM_ACCESS(16)
MEM_ACCESS(32)
MEM_ACCESS(64)

static inline uint8_t *rmw_host(struct cpu *c, const struct uop *u, uint64_t lin, unsigned size)
{
    uint8_t *p = tlb_write(c, lin, size);
    return likely(p) ? p : rmw_host_slow(c, u, lin, size);
}

/* For LOCK. Across two cache lines an atomic access is the host's bus lock, which many hosts slow down, some to seconds;
 * a processor alone needs none. Then, as at the end of a page, NULL. */
static inline uint8_t *locked_host(struct cpu *c, const struct uop *u, uint64_t lin, unsigned size)
{
    if (unlikely((lin & 63) + size > 64) && cpu_is_alone(c))
        return NULL;
    return rmw_host(c, u, lin, size);
}

static inline void need_aligned(struct cpu *c, const struct uop *u, uint64_t lin, unsigned size)
{
    if (unlikely(lin & (size - 1)))
        cpu_fault_code(c, u, EXC_GP, 0);
}

#define MEM_VECTOR(bits)                                                                                         \
    static inline void ld##bits(struct cpu *c, const struct uop *u, uint64_t lin, void *value)                   \
    {                                                                                                            \
        uint8_t *p = tlb_read(c, lin, bits / 8);                                                                 \
        if (likely(p))                                                                                           \
            memcpy(value, p, bits / 8);                                                                          \
        else                                                                                                     \
            mem_read_bytes(c, u, lin, value, bits / 8);                                                          \
    }                                                                                                            \
    static inline void st##bits(struct cpu *c, const struct uop *u, uint64_t lin, const void *value)             \
    {                                                                                                            \
        uint8_t *p = tlb_write(c, lin, bits / 8);                                                                \
        if (likely(p))                                                                                           \
            memcpy(p, value, bits / 8);                                                                          \
        else                                                                                                     \
            mem_write_bytes(c, u, lin, value, bits / 8);                                                         \
    }                                                                                                            \
    static inline void ld##bits##a(struct cpu *c, const struct uop *u, uint64_t lin, void *value)                \
    {                                                                                                            \
        need_aligned(c, u, lin, bits / 8);                                                                       \
        ld##bits(c, u, lin, value);                                                                              \
    }                                                                                                            \
    static inline void st##bits##a(struct cpu *c, const struct uop *u, uint64_t lin, const void *value)          \
    {                                                                                                            \
        need_aligned(c, u, lin, bits / 8);                                                                       \
        st##bits(c, u, lin, value);                                                                              \
    }
MEM_VECTOR(80)
MEM_VECTOR(128)
MEM_VECTOR(256)
#undef MEM_ACCESS
#undef MEM_VECTOR

#endif
