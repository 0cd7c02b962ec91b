/* SPDX-License-Identifier: Apache-2.0
 *
 * Accesses that leave the processor: ports, MMIO and filtered MSRs, and their replay.
 *
 * The chips in the engine are asked first. What they do not answer becomes c->io and an escape: the instruction has
 * changed nothing yet that it would not change again in the same way. When user space has answered, cpu_run() lets the
 * same instruction run again, alone; its accesses then take the recorded answers in order, and the first one that has
 * none leaves again. So an instruction with several accesses (a 16-byte MOVUPS, ADD to a device register, a page
 * crossing) needs no code of its own. The records end with the instruction.
 */
#include "core.h"

static bool recorded(struct cpu *c, enum cpu_io_kind kind, uint64_t addr, unsigned size, uint64_t *value, uint8_t *error)
{
    struct cpu_io *io = &c->io;
    if (io->taken >= io->answered)
        return false;
    unsigned i = io->taken;
    if (io->past[i].kind != kind || io->past[i].addr != addr || io->past[i].size != size || io->past[i].count != 1) {
        cpu_io_forget(c); /* state was changed meanwhile: this is another access */
        return false;
    }
    io->taken++;
    if (value)
        *value = io->past[i].data;
    if (error)
        *error = io->past[i].error;
    return true;
}

_Noreturn static void want_items(struct cpu *c, const struct uop *u, enum cpu_io_kind kind, uint64_t addr, unsigned size, uint32_t count,
                                 const void *items)
{
    struct cpu_io *io = &c->io;
    if (c->in_delivery || io->answered >= CPU_IO_MAX) { /* an event cannot be run again; KVM ends such a guest too */
        c->error_text = c->in_delivery ? "an exception or interrupt needs a stack or table that is device memory"
                                       : "an instruction needs more device accesses than the engine records";
        cpu_stop(c, u, TCG_STOP_ERROR);
    }
    io->kind = (uint8_t)kind;
    io->size = (uint8_t)size;
    io->addr = addr;
    io->count = count;
    io->error = 0;
    io->reason = c->msr_reason;
    memmove(io->data, items, count > 1 ? (size_t)count * size : 8); /* items may be io->data */
    io->state = IO_WANT;
    cpu_stop(c, u, TCG_STOP_IO);
}
_Noreturn static void want(struct cpu *c, const struct uop *u, enum cpu_io_kind kind, uint64_t addr, unsigned size, uint64_t value)
{
    want_items(c, u, kind, addr, size, 1, &value);
}

uint64_t dev_read(struct cpu *c, const struct uop *u, enum cpu_io_kind kind, uint64_t addr, unsigned size)
{
    uint64_t value = 0;
    if (recorded(c, kind, addr, size, &value, NULL))
        return value;
    if (kind == IO_PIO_IN) {
        uint32_t v = 0;
        if (tcg_pio(c, (uint16_t)addr, size, false, &v))
            return v;
    } else if (tcg_mmio(c, addr, size, false, &value)) {
        return value;
    }
    want(c, u, kind, addr, size, 0);
}

void dev_write(struct cpu *c, const struct uop *u, enum cpu_io_kind kind, uint64_t addr, unsigned size, uint64_t value)
{
    if (recorded(c, kind, addr, size, NULL, NULL))
        return;
    if (kind == IO_PIO_OUT) {
        uint32_t v = (uint32_t)value;
        if (tcg_pio(c, (uint16_t)addr, size, true, &v))
            return;
    } else if (tcg_mmio(c, addr, size, true, &value)) {
        return;
    }
    want(c, u, kind, addr, size, value);
}

uint32_t dev_items_answered(struct cpu *c, enum cpu_io_kind kind, uint16_t port, unsigned size, uint64_t most)
{
    struct cpu_io *io = &c->io;
    if (io->taken >= io->answered)
        return 0;
    unsigned i = io->taken;
    if (io->past[i].kind != kind || io->past[i].addr != port || io->past[i].size != size || io->past[i].count < 2 || io->past[i].count > most)
        return 0;
    io->taken++;
    return io->past[i].count;
}

uint32_t dev_items(struct cpu *c, const struct uop *u, enum cpu_io_kind kind, uint16_t port, unsigned size, uint32_t count, uint8_t *items)
{
    uint32_t v = 0;
    if (kind == IO_PIO_OUT)
        memcpy(&v, items, size);
    if (tcg_pio(c, port, size, kind == IO_PIO_OUT, &v)) { /* the engine's own chips take one at a time */
        if (kind == IO_PIO_IN)
            memcpy(items, &v, size);
        return 1;
    }
    uint32_t room = (uint32_t)(sizeof c->io.data / size);
    want_items(c, u, kind, port, size, count < room ? count : room, kind == IO_PIO_IN ? c->io.data : items);
}

/* RDMSR and WRMSR with user space's filter: 0 done, 1 #GP. */
int io_msr(struct cpu *c, const struct uop *u, bool write, uint32_t index, uint64_t *value)
{
    enum cpu_io_kind kind = write ? IO_WRMSR : IO_RDMSR;
    uint8_t error = 0;
    uint64_t answer = 0;
    if (recorded(c, kind, index, 8, &answer, &error)) {
        if (!write)
            *value = answer;
        return error != 0;
    }
    int r = write ? tcg_wrmsr(c, index, *value) : tcg_rdmsr(c, index, value);
    if (r == 2)
        want(c, u, kind, index, 8, write ? *value : 0);
    return r;
}

void cpu_io_forget(struct cpu *c)
{
    c->io.answered = c->io.taken = 0;
    c->io.state = IO_IDLE;
}

/* user space answered: the answer joins the records of the instruction that will run again */
void io_answered(struct cpu *c)
{
    struct cpu_io *io = &c->io;
    unsigned i = io->answered++;
    io->past[i].kind = io->kind;
    io->past[i].size = io->size;
    io->past[i].error = io->error;
    io->past[i].addr = io->addr;
    io->past[i].count = io->count;
    io->past[i].data = 0;
    memcpy(&io->past[i].data, io->data, io->size > 8 ? 8 : io->size);
    io->taken = 0; /* the instruction begins anew and takes them all again */
    io->state = IO_IDLE;
}
