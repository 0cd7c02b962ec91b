/* SPDX-License-Identifier: Apache-2.0
 *
 * What stands in struct kvm_run: filling it at an exit, and taking from it what user space answered. This file and
 * run.c are the only ones that know the structure. User space may write all of it at any time, so each field is
 * read once, and nothing that was written is believed when it comes back (sizes and counts are cpu.io's).
 */
#include <errno.h>
#include <string.h>

#include "vm.h"

static uint8_t *pio_page(struct vcpu *vcpu)
{
    return (uint8_t *)vcpu->run + KVM_PIO_PAGE_OFFSET * PAGE_SIZE;
}

/* ---- accesses ---- */

static size_t io_bytes(const struct cpu_io *io)
{
    size_t bytes = (size_t)io->size * (io->count ? io->count : 1);
    return bytes < sizeof io->data ? bytes : sizeof io->data;
}

void exit_io(struct vcpu *vcpu)
{
    struct kvm_run *run = vcpu->run;
    struct cpu_io *io = &vcpu->cpu.io;
    switch (io->kind) {
    case IO_PIO_IN:
    case IO_PIO_OUT:
        run->exit_reason = KVM_EXIT_IO;
        run->io.direction = io->kind == IO_PIO_OUT ? KVM_EXIT_IO_OUT : KVM_EXIT_IO_IN;
        run->io.size = io->size;
        run->io.port = io->addr;
        run->io.count = io->count ? io->count : 1;
        run->io.data_offset = KVM_PIO_PAGE_OFFSET * PAGE_SIZE;
        if (io->kind == IO_PIO_OUT)
            memcpy(pio_page(vcpu), io->data, io_bytes(io));
        vcpu->stats.io_exits++;
        break;
    case IO_MMIO_READ:
    case IO_MMIO_WRITE:
        run->exit_reason = KVM_EXIT_MMIO;
        run->mmio.phys_addr = io->addr;
        run->mmio.len = io->size;
        run->mmio.is_write = io->kind == IO_MMIO_WRITE;
        memset(run->mmio.data, 0, sizeof run->mmio.data);
        if (io->kind == IO_MMIO_WRITE)
            memcpy(run->mmio.data, io->data, io->size <= 8 ? io->size : 8);
        vcpu->stats.mmio_exits++;
        break;
    default:
        run->exit_reason = io->kind == IO_RDMSR ? KVM_EXIT_X86_RDMSR : KVM_EXIT_X86_WRMSR;
        run->msr.error = 0;
        run->msr.reason = io->reason;
        run->msr.index = io->addr;
        run->msr.data = 0;
        if (io->kind == IO_WRMSR)
            memcpy(&run->msr.data, io->data, 8);
        vcpu->stats.msr_exits++;
    }
    vcpu->pending_io = true;
}

void exit_complete(struct vcpu *vcpu)
{
    struct kvm_run *run = vcpu->run;
    struct cpu_io *io = &vcpu->cpu.io;
    if (vcpu->pending_hypercall) {
        vcpu->pending_hypercall = false;
        bool wide = (vcpu->cpu.efer & EFER_LMA) && (vcpu->cpu.seg[SEG_CS].attr & ATTR_L);
        vcpu->cpu.gpr[RAX] = wide ? run->hypercall.ret : (uint32_t)run->hypercall.ret;
    }
    if (!vcpu->pending_io)
        return;
    vcpu->pending_io = false;
    switch (io->kind) {
    case IO_PIO_IN:
        memcpy(io->data, pio_page(vcpu), io_bytes(io));
        break;
    case IO_MMIO_READ:
        memcpy(io->data, run->mmio.data, io->size <= 8 ? io->size : 8);
        break;
    case IO_RDMSR:
    case IO_WRMSR:
        io->error = run->msr.error;
        if (io->kind == IO_RDMSR)
            memcpy(io->data, &run->msr.data, 8);
        break;
    }
    io->state = IO_DONE;
}

/* ---- the other exits ---- */

void exit_hypercall(struct vcpu *vcpu)
{
    struct kvm_run *run = vcpu->run;
    const struct cpu *c = &vcpu->cpu;
    bool wide = (c->efer & EFER_LMA) && (c->seg[SEG_CS].attr & ATTR_L);
    run->exit_reason = KVM_EXIT_HYPERCALL;
    memset(&run->hypercall, 0, sizeof run->hypercall);
    run->hypercall.nr = c->gpr[RAX];
    run->hypercall.args[0] = c->gpr[RBX];
    run->hypercall.args[1] = c->gpr[RCX];
    run->hypercall.args[2] = c->gpr[RDX];
    run->hypercall.longmode = wide;
    vcpu->pending_hypercall = true;
}

void exit_debug(struct vcpu *vcpu)
{
    const struct cpu *c = &vcpu->cpu;
    vcpu->run->exit_reason = KVM_EXIT_DEBUG;
    vcpu->run->debug.arch = (struct kvm_debug_exit_arch){
        .exception = c->debug_exit.exception, .pc = c->debug_exit.pc, .dr6 = c->debug_exit.dr6, .dr7 = c->debug_exit.dr7,
    };
    vcpu->stats.debug_exits++;
}

/* The bytes at RIP, as far as they can be read: 0..15 of them. */
static unsigned fetch(struct vcpu *vcpu, uint8_t bytes[15])
{
    struct cpu *c = &vcpu->cpu;
    unsigned count = 0;
    bool writable, user, wide = (c->efer & EFER_LMA) && (c->seg[SEG_CS].attr & ATTR_L);
    uint64_t linear = wide ? c->rip : (uint32_t)(c->seg[SEG_CS].base + c->rip), gpa;
    while (count < 15 && cpu_translate(c, linear + count, &gpa, &writable, &user) && memory_read(vcpu, gpa, &bytes[count], 1))
        count++;
    return count;
}

/* Inside an epoch. The text of the core goes where api.rst allows "arbitrary debug data". */
void exit_error(struct vcpu *vcpu)
{
    struct kvm_run *run = vcpu->run;
    uint8_t bytes[15] = {0};
    unsigned count = fetch(vcpu, bytes);
    const char *text = vcpu->cpu.error_text ? vcpu->cpu.error_text : "";
    run->exit_reason = KVM_EXIT_INTERNAL_ERROR;
    memset(&run->internal, 0, sizeof run->internal);
    run->emulation_failure.suberror = KVM_INTERNAL_ERROR_EMULATION;
    run->emulation_failure.ndata = 16;
    if (count) {
        run->emulation_failure.flags = KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES;
        run->emulation_failure.insn_size = count;
        memcpy(run->emulation_failure.insn_bytes, bytes, sizeof bytes);
    }
    strncpy((char *)&run->internal.data[3], text, 13 * 8 - 1);
}

/* ---- inputs and outputs of every KVM_RUN ---- */

static long load_sync_regs(struct vcpu *vcpu)
{
    struct kvm_run *run = vcpu->run;
    uint64_t valid = run->kvm_valid_regs, dirty = run->kvm_dirty_regs;
    if ((valid | dirty) & ~(uint64_t)KVM_SYNC_X86_VALID_FIELDS)
        return -EINVAL;
    if (dirty & KVM_SYNC_X86_REGS) {
        struct kvm_regs regs = run->s.regs.regs;
        state_set_regs(vcpu, &regs);
    }
    if (dirty & KVM_SYNC_X86_SREGS) {
        struct kvm_sregs sregs = run->s.regs.sregs;
        if (state_set_sregs(vcpu, &sregs))
            return -EINVAL;
    }
    if (dirty & KVM_SYNC_X86_EVENTS) {
        struct kvm_vcpu_events events = run->s.regs.events;
        if (state_set_events(vcpu, &events))
            return -EINVAL;
    }
    run->kvm_dirty_regs = 0;
    return 0;
}

/* Inside an epoch. */
long exit_load(struct vcpu *vcpu)
{
    long error = load_sync_regs(vcpu);
    if (error)
        return error;
    if (!vcpu->has_apic) { /* then kvm_run carries the task priority */
        uint64_t cr8 = vcpu->run->cr8;
        if (cr8 > 15)
            return -EINVAL;
        vcpu->cpu.cr8 = vcpu->last_cr8 = cr8;
    }
    return 0;
}

void exit_save(struct vcpu *vcpu)
{
    struct kvm_run *run = vcpu->run;
    struct cpu *c = &vcpu->cpu;
    run->if_flag = (c->sysflags & FL_IF) != 0;
    run->cr8 = tcg_read_cr8(c);
    run->apic_base = c->apic_base;
    bool user_pic = !vcpu->has_apic
                 || (!vcpu->vm->has_pic && vcpu->extint_vector < 0 && lapic_accepts_pic(&vcpu->apic));
    run->ready_for_interrupt_injection = vcpu->vm->has_pic || (user_pic && !c->inject.exc && cpu_interruptible(c));
    uint64_t valid = run->kvm_valid_regs;
    if (valid & KVM_SYNC_X86_REGS)
        state_get_regs(vcpu, &run->s.regs.regs);
    if (valid & KVM_SYNC_X86_SREGS)
        state_get_sregs(vcpu, &run->s.regs.sregs);
    if (valid & KVM_SYNC_X86_EVENTS)
        state_get_events(vcpu, &run->s.regs.events);
}
