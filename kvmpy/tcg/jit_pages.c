/* SPDX-License-Identifier: Apache-2.0
 *
 * Memory of the JIT, and the thunks between C and host code.
 *
 * Code lies in a memfd that is mapped twice, once to write and once to execute: no page is ever both. Where that is
 * refused (no executable memfds, seccomp, no room within 2 GiB of struct cpu) there is no JIT and the interpreter does
 * everything.
 */
#define _GNU_SOURCE
#include "jit_code.h"

#if HAVE_JIT
#include <sys/mman.h>
#include <unistd.h>

#define NEAR_SIZE (HOT_SIZE + COLD_SIZE + DATA_SIZE)
#define REACH (1ll << 31)

static uint8_t *reserve_near(const void *what)
{
    uintptr_t at = (uintptr_t)what & ~0x1fffffull;
    for (int64_t step = 0; step < REACH - 2 * (int64_t)NEAR_SIZE; step += 32 << 20)
        for (int side = -1; side <= 1; side += 2) {
            int64_t want = (int64_t)at + (side < 0 ? -(int64_t)NEAR_SIZE - step - (2 << 20) : step + (4 << 20));
            if (want <= 0x100000 || want + (int64_t)NEAR_SIZE > 0x7fffffffffff)
                continue;
            void *p = mmap((void *)want, NEAR_SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
            if (p == (void *)want)
                return p;
            if (p != MAP_FAILED)
                munmap(p, NEAR_SIZE);
        }
    return NULL;
}

bool jit_map(struct cpu *c, struct jit *j)
{
    int fd = memfd_create("kvmpy-code", MFD_CLOEXEC);
    if (fd < 0)
        return false;
    if (ftruncate(fd, HOT_SIZE + COLD_SIZE) < 0 || !(j->near_memory = reserve_near(c))) {
        close(fd);
        return false;
    }
    j->write = mmap(NULL, HOT_SIZE + COLD_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    j->run = mmap(j->near_memory, HOT_SIZE + COLD_SIZE, PROT_READ | PROT_EXEC, MAP_SHARED | MAP_FIXED, fd, 0);
    j->data = mmap(j->near_memory + HOT_SIZE + COLD_SIZE, DATA_SIZE, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    close(fd);
    if (j->write == MAP_FAILED || j->run == MAP_FAILED || j->data == MAP_FAILED) {
        jit_unmap(j);
        return false;
    }
    /* A forked child must not write into its parent's code. */
    madvise(j->write, HOT_SIZE + COLD_SIZE, MADV_DONTFORK);
    madvise(j->near_memory, NEAR_SIZE, MADV_DONTFORK);
    return true;
}

void jit_unmap(struct jit *j)
{
    if (j->write && j->write != MAP_FAILED)
        munmap(j->write, HOT_SIZE + COLD_SIZE);
    munmap(j->near_memory, NEAR_SIZE);
}

void *jit_data(struct jit *j, size_t size)
{
    void *p = j->data + j->used;
    j->used += (size + 15) & ~15ull;
    memset(p, 0, size);
    return p;
}

static const uint8_t pinned[] = {RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R9, R12, R13, R14};

static void save_pins(struct place_of_code *a, struct cpu *c)
{
    for (unsigned i = 0; i < sizeof pinned; i++)
        mov_store(a, rm_abs(&c->gpr[pinned[i]]), host_reg(pinned[i]));
}
static void load_pins(struct place_of_code *a, struct cpu *c)
{
    for (unsigned i = 0; i < sizeof pinned; i++)
        mov_load(a, host_reg(pinned[i]), rm_abs(&c->gpr[pinned[i]]));
}

static const uint8_t kept[] = {RBX, RBP, R12, R13, R14, R15}; /* by callees of the C ABI */

static void epilogue(struct place_of_code *a)
{
    put_insn(a, 0, true, 0, 0x83, 0, rm_reg(RSP), 1);
    put1(a, 8);
    for (unsigned i = sizeof kept; i--;) {
        if (kept[i] >= 8)
            put1(a, 0x41);
        put1(a, 0x58 | (kept[i] & 7));
    }
    put1(a, 0xc3);
}

/* Calls C with the guest's registers in struct cpu: RDI is the cpu, RSI set by the caller; RAX comes back. Returns where
 * the function stands. */
static uint8_t *call_c(struct place_of_code *a, struct cpu *c, uintptr_t function)
{
    lea(a, true, RDI, rm_abs(c));
    put1(a, 0x48);
    put1(a, 0xb8); /* MOV RAX, imm64 */
    put8(a, function);
    uint8_t *where = a->p - 8;
    put_insn(a, 0, false, 0, 0xff, 2, rm_reg(RAX), 0);
    put_insn(a, 0, true, 0, 0x85, RAX, rm_reg(RAX), 0);
    return where;
}

/* To the host code that RAX names, with the guest's registers. */
static void go_on(struct place_of_code *a, struct cpu *c)
{
    mov_rr(a, S0, RAX);
    load_pins(a, c);
    put_insn(a, 0, false, 0, 0xff, 4, rm_reg(S0), 0);
}

/* GS is c->tlb: at first, and behind C that may have changed it. Clobbers S1. */
static void load_gs(struct place_of_code *a, struct cpu *c, const struct jit *j)
{
    if (!j->gs)
        return;
    mov_load(a, S1, rm_abs(&c->tlb));
    put_insn(a, 0, true, 0, 0x3b, S1, rm_abs(&c->jit.gs), 0);
    uint8_t *same = jcc32(a, COND_Z);
    mov_store(a, rm_abs(&c->jit.gs), S1);
    wrgsbase(a, S1);
    set_target(same, a->delta, run_address(a));
}

void jit_thunks(struct cpu *c, struct jit *j)
{
    struct place_of_code a = {j->write, j->run - j->write};

    j->enter = (const uint8_t *(*)(const uint8_t *))(uintptr_t)run_address(&a);
    for (unsigned i = 0; i < sizeof kept; i++) {
        if (kept[i] >= 8)
            put1(&a, 0x41);
        put1(&a, 0x50 | (kept[i] & 7));
    }
    put_insn(&a, 0, true, 0, 0x83, 5, rm_reg(RSP), 1);
    put1(&a, 8);
    mov_rr(&a, RAX, RDI);
    load_gs(&a, c, j);
    go_on(&a, c);

    j->exit_rip = run_address(&a); /* c->rip is set */
    save_pins(&a, c);
    const uint8_t *left = run_address(&a); /* registers are saved already */
    put_insn(&a, 0, false, 0, 0x31, RAX, rm_reg(RAX), 0);
    epilogue(&a);
    j->exit_link = run_address(&a); /* S0: the link */
    save_pins(&a, c);
    mov_rr(&a, RAX, S0);
    epilogue(&a);

    j->prove = run_address(&a); /* S0: a link whose proof is out of date */
    save_pins(&a, c);
    mov_rr(&a, RBX, S0);
    mov_rr(&a, RSI, S0);
    call_c(&a, c, (uintptr_t)jit_prove);
    uint8_t *not_proved = jcc32(&a, COND_Z);
    go_on(&a, c);
    set_target(not_proved, a.delta, run_address(&a));
    mov_rr(&a, RAX, RBX);
    epilogue(&a);

    j->find = run_address(&a); /* c->rip is set: an indirect jump that the target table does not know */
    save_pins(&a, c);
    call_c(&a, c, (uintptr_t)jit_find);
    set_target(jcc32(&a, COND_Z), a.delta, left);
    go_on(&a, c);

    j->second = run_address(&a); /* S0: a struct jit_second. Called: NZ when it holds */
    save_pins(&a, c);
    mov_rr(&a, RSI, S0);
    alu_imm(&a, true, 5, rm_reg(RSP), 8);
    call_c(&a, c, (uintptr_t)jit_prove_second);
    lea(&a, true, RSP, rm_mem(RSP, 8));
    load_pins(&a, c);
    put1(&a, 0xc3);

    /* S0: the micro-op, 8 bytes before it the block's offset in its page. Called: mostly it comes back. */
    j->helper = run_address(&a);
    save_pins(&a, c);
    mov_load(&a, RAX, rm_mem(S0, -8));
    put_insn(&a, 0, true, 0, 0x03, RAX, rm_abs(&c->jit.page), 0);
    mov_store(&a, rm_abs(&c->bip), RAX);
    mov_rr(&a, RSI, S0);
    mov_load(&a, RDX, rm_mem(RSP, 0));
    alu_imm(&a, true, 5, rm_reg(RSP), 8);
    j->helper_half = call_c(&a, c, (uintptr_t)jit_call);
    lea(&a, true, RSP, rm_mem(RSP, 8));
    uint8_t *gone = jcc32(&a, COND_Z);
    load_gs(&a, c, j);
    put_insn(&a, 0, true, 0, 0x3b, RAX, rm_mem(RSP, 0), 0);
    uint8_t *elsewhere = jcc32(&a, COND_NZ);
    load_pins(&a, c);
    put1(&a, 0xc3);
    set_target(elsewhere, a.delta, run_address(&a));
    lea(&a, true, RSP, rm_mem(RSP, 8)); /* the return address */
    go_on(&a, c);
    set_target(gone, a.delta, run_address(&a));
    lea(&a, true, RSP, rm_mem(RSP, 8));
    jump_to(&a, left);
    j->first_hot = j->hot = (size_t)(a.p - j->write + 63) & ~63ull;
    j->first_cold = j->cold = HOT_SIZE;
}
#endif
