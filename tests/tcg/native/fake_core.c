/* SPDX-License-Identifier: Apache-2.0 */
#include "fake_core.h"

#include <errno.h>
#include <string.h>

#include "kvm_compat.h"

#include "cpu.h"
#include "xstate.h"

int cpu_init(struct cpu *c, struct tcg_vm_core *vm, uint32_t index)
{
    c->vm = vm;
    c->index = index;
    c->phys_bits = 40;
    c->linear_bits = 48;
    pthread_mutex_init(&c->inval_lock, NULL);
    cpu_reset(c, false);
    return 0;
}

void cpu_free(struct cpu *c)
{
    (void)c;
}

void cpu_reset(struct cpu *c, bool init)
{
    (void)init;
    memset(c->gpr, 0, sizeof c->gpr);
    memset(c->seg, 0, sizeof c->seg);
    c->rip = 0xFFF0;
    c->sysflags = 2;
    c->seg[SEG_CS] = (struct segment){.base = 0xFFFF0000, .sel = 0xF000, .limit = 0xFFFF, .attr = 0x93};
    c->cr0 = 0x10;
    c->io.state = IO_IDLE;
    c->dr[6] = 0xFFFF0FF0;
    c->dr[7] = 0x400;
    c->xcr0 = 1;
    c->fpu.cw = 0x37F;
    c->mxcsr = 0x1F80;
    c->cr4 = c->efer = c->cr2 = c->cr3 = 0;
}

/* ---- memory: one page of each kind cached, as a softTLB would ---- */

static uint8_t *host(struct cpu *c, uint64_t gpa, bool write)
{
    struct tlb_entry *entry = &c->tlbs[0].e[(gpa >> 12) & (TLB_SIZE - 1)];
    uint64_t page = gpa & ~0xFFFull;
    if ((write ? entry->wr : entry->rd) == page + 1)
        return (uint8_t *)(entry->addend + (gpa & 0xFFF));
    struct page_info info;
    tcg_phys_to_host(c->vm, page, &info);
    if (!info.host || (write && (info.flags & PAGE_READONLY)))
        return NULL;
    if (write && (info.flags & PAGE_LOG))
        tcg_mark_dirty(c, page);
    if (entry->rd != page + 1)
        *entry = (struct tlb_entry){.rd = page + 1, .addend = (uintptr_t)info.host};
    if (write)
        entry->wr = page + 1;
    return info.host + (gpa & 0xFFF);
}

void cpu_flush_tlb(struct cpu *c)
{
    memset(c->tlbs[0].e, 0, sizeof c->tlbs[0].e);
}

/* ---- accesses that user space answers ---- */

/* True: `*value` is the answer. False: the cpu stops. */
static bool ask(struct cpu *c, uint8_t kind, uint64_t addr, unsigned size, uint64_t *value)
{
    if (c->io.state == IO_DONE) {
        c->io.state = IO_IDLE;
        memcpy(value, c->io.data, 8);
        return true;
    }
    c->io.kind = kind;
    c->io.state = IO_WANT;
    c->io.addr = addr;
    c->io.size = size;
    c->io.count = 1;
    c->io.error = 0;
    c->io.reason = c->msr_reason;
    memcpy(c->io.data, value, 8);
    return false;
}

static bool access(struct cpu *c, const struct toy *t, bool pio, bool write)
{
    uint64_t value = c->gpr[RAX], addr = pio ? t->port : t->value;
    uint32_t small = (uint32_t)value;
    uint8_t *memory = pio ? NULL : host(c, addr, write);
    if (memory) {
        bool whole = t->size == 8 && !((uintptr_t)memory & 7); /* as a processor: in one piece */
        if (write && whole)
            __atomic_store_n((uint64_t *)memory, value, __ATOMIC_RELAXED);
        else if (whole)
            value = __atomic_load_n((uint64_t *)memory, __ATOMIC_RELAXED);
        else if (write)
            memcpy(memory, &value, t->size);
        else
            memcpy(&value, memory, t->size);
    } else if (c->io.state != IO_DONE && (pio ? tcg_pio(c, addr, t->size, write, &small) : tcg_mmio(c, addr, t->size, write, &value))) {
        if (pio)
            value = small;
    } else if (!ask(c, pio ? (write ? IO_PIO_OUT : IO_PIO_IN) : (write ? IO_MMIO_WRITE : IO_MMIO_READ), addr, t->size, &value)) {
        return false;
    }
    if (!write)
        c->gpr[RAX] = t->size < 8 ? value & ((1ull << t->size * 8) - 1) : value;
    return true;
}

static bool access_msr(struct cpu *c, uint32_t index, bool write)
{
    uint64_t value = c->gpr[RAX];
    int result = 2;
    if (c->io.state != IO_DONE)
        result = write ? tcg_wrmsr(c, index, value) : tcg_rdmsr(c, index, &value);
    if (result == 2 && !ask(c, write ? IO_WRMSR : IO_RDMSR, index, 8, &value))
        return false;
    if (result == 1 || (result == 2 && c->io.error))
        value = 0xDEAD; /* what stands for #GP here */
    if (!write || value == 0xDEAD)
        c->gpr[RAX] = value;
    return true;
}

/* ---- the loop ---- */

static void take_interrupt(struct cpu *c, int vector)
{
    if (vector < 0)
        return;
    c->gpr[RBX] = c->rip;
    c->rip = VECTORS + 16 * (uint64_t)vector;
    c->sysflags &= ~FL_IF;
}

static void look_at_lines(struct cpu *c)
{
    if (c->inject.intr) {
        c->inject.intr = false;
        take_interrupt(c, c->inject.intr_vector);
    } else if (atomic_load(&c->lines) & LINE_NMI) {
        cpu_lower(c, LINE_NMI);
        take_interrupt(c, EXC_NMI);
    } else if ((atomic_load(&c->lines) & LINE_INTR) && (c->sysflags & FL_IF)) {
        take_interrupt(c, tcg_ack_interrupt(c));
    }
}

static int step(struct cpu *c)
{
    const struct toy *t = (const struct toy *)host(c, c->rip, false);
    uint64_t next = c->rip + sizeof *t;
    if (!t) {
        c->error_text = "no memory at RIP";
        return TCG_STOP_ERROR;
    }
    switch (t->op) {
    case TOY_HLT: c->rip = next; return TCG_STOP_HLT;
    case TOY_IN: case TOY_OUT:
        if (!access(c, t, true, t->op == TOY_OUT))
            return TCG_STOP_IO;
        break;
    case TOY_LOAD: case TOY_STORE:
        if (!access(c, t, false, t->op == TOY_STORE))
            return TCG_STOP_IO;
        break;
    case TOY_RDMSR: case TOY_WRMSR:
        if (!access_msr(c, t->value, t->op == TOY_WRMSR))
            return TCG_STOP_IO;
        break;
    case TOY_SET: c->gpr[RAX] = t->value; break;
    case TOY_ADD: c->gpr[RAX] += t->value; break;
    case TOY_JUMP: next = t->value; break;
    case TOY_STI: c->sysflags |= FL_IF; break;
    case TOY_CLI: c->sysflags &= ~FL_IF; break;
    case TOY_IRET: next = c->gpr[RBX]; c->sysflags |= FL_IF; break;
    case TOY_TRIPLE: return TCG_STOP_SHUTDOWN;
    case TOY_TSC: c->gpr[RAX] = tcg_rdtsc(c); break;
    case TOY_HYPERCALL:
        if (!tcg_hypercall(c)) {
            c->rip = next;
            return TCG_STOP_HYPERCALL;
        }
        break;
    default: c->error_text = "an instruction this toy has not"; return TCG_STOP_ERROR;
    }
    c->rip = next;
    c->budget--;
    return -1;
}

enum tcg_stop cpu_run(struct cpu *c)
{
    bool completing = c->io.state == IO_DONE;
    if (c->seg[SEG_CS].sel != 0xF000) { /* a SIPI: the toy is flat but for this */
        c->rip += c->seg[SEG_CS].base;
        c->seg[SEG_CS].sel = 0xF000;
    }
    for (unsigned n = 0;; n++) {
        uint32_t request = completing ? 0 : atomic_exchange(&c->request, 0);
        if (request & CPU_REQ_TLB)
            cpu_flush_tlb(c);
        if (request & CPU_REQ_EXIT)
            return TCG_STOP_CANCEL;
        if ((n & 0xFFF) == 0xFFF && c->immediate_exit && *c->immediate_exit)
            return TCG_STOP_CANCEL;
        if (cpu_insns(c) >= c->deadline && c->vm->deterministic)
            return TCG_STOP_CANCEL;
        if (!completing) {
            look_at_lines(c);
            if (c->want_window && cpu_interruptible(c))
                return TCG_STOP_WINDOW;
        }
        completing = false;
        int stop = step(c);
        if (stop >= 0)
            return stop;
    }
}

/* ---- the rest of the contract, as far as the machine half looks at it ---- */

void cpu_assist(struct cpu *c, uint32_t count, uint32_t flags) { c->assist_left = count; (void)flags; }
long cpu_profile(struct cpu *c, bool on) { return (void)c, (void)on, 0; }
long cpu_profile_ioctl(struct cpu *c, unsigned long request, void *p) { return (void)c, (void)request, (void)p, -ENOTTY; }
void cpu_io_forget(struct cpu *c) { c->io.state = IO_IDLE; }
uint64_t cpu_rflags(const struct cpu *c) { return c->sysflags; }
void cpu_set_rflags(struct cpu *c, uint64_t rflags) { c->sysflags = rflags; }
void cpu_update(struct cpu *c) { cpu_request(c, CPU_REQ_TLB); }
void cpu_update_features(struct cpu *c) { (void)c; }
void cpu_raise(struct cpu *c, uint32_t line) { atomic_fetch_or(&c->lines, line); }
void cpu_nmi(struct cpu *c)
{
    if (atomic_fetch_or(&c->lines, LINE_NMI) & LINE_NMI)
        atomic_fetch_or(&c->lines, LINE_NMI2);
    cpu_request(c, CPU_REQ_LINES);
}
void cpu_lower(struct cpu *c, uint32_t line) { atomic_fetch_and(&c->lines, ~line); }
int cpu_set_efer(struct cpu *c, uint64_t v) { c->efer = v; return 0; }
void cpu_set_segbase(struct cpu *c, int seg, uint64_t base) { c->seg[seg].base = base; }
void cpu_code_written(struct tcg_vm_core *vm, struct cpu *self, uint64_t gpa, uint64_t size) { (void)vm; (void)self; (void)gpa; (void)size; }

void cpu_cpuid(struct cpu *c, uint32_t leaf, uint32_t subleaf, uint32_t out[4])
{
    (void)subleaf;
    memset(out, 0, 16);
    for (uint32_t i = 0; i < c->cpuid_count; i++)
        if (c->cpuid[i].function == leaf)
            memcpy(out, &c->cpuid[i].eax, 16);
}

uint32_t cpu_supported_cpuid(struct kvm_cpuid_entry2 *entries, uint32_t max)
{
    if (max)
        entries[0] = (struct kvm_cpuid_entry2){.function = 1, .ecx = 1u << 21};
    return 1;
}

bool cpu_translate(struct cpu *c, uint64_t linear, uint64_t *gpa, bool *writable, bool *user)
{
    (void)c;
    *gpa = linear;
    *writable = *user = true;
    return linear < (1ull << 40);
}

void cpu_xsave_store(const struct cpu *c, uint8_t *area, uint64_t rfbm)
{
    memcpy(area, &c->fpu.cw, 2);
    memcpy(area + 24, &c->mxcsr, 4);
    area[512] = rfbm & 3;
}

int cpu_xsave_load(struct cpu *c, const uint8_t *area, uint64_t rfbm)
{
    (void)rfbm;
    memcpy(&c->fpu.cw, area, 2);
    memcpy(&c->mxcsr, area + 24, 4);
    return 0;
}
/* The toy carries no state for another processor. */
uint64_t xstate_carry(struct cpu *c, uint64_t xcr0)
{
    (void)xcr0;
    return c->carried;
}
void xstate_load_carried(struct cpu *c, const uint8_t *area, uint64_t present)
{
    (void)area;
    c->carried_inuse = present & c->carried;
}
