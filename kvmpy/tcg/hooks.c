/* SPDX-License-Identifier: Apache-2.0
 *
 * What the core asks of the machine on the vCPU's thread: ports and device memory that the engine answers itself
 * (chips, ioeventfds, coalesced zones), and hypercalls.
 */
#include "vm.h"

bool tcg_pio(struct cpu *c, uint16_t port, unsigned size, bool write, uint32_t *value)
{
    struct vcpu *vcpu = vcpu_of(c);
    time_sync(vcpu);
    bool done = irq_pio(vcpu, port, size, write, value) || (write && io_write(vcpu->vm, true, port, size, *value));
    vcpu->stats.engine_io += done;
    return done;
}

bool tcg_mmio(struct cpu *c, uint64_t gpa, unsigned size, bool write, uint64_t *value)
{
    struct vcpu *vcpu = vcpu_of(c);
    time_sync(vcpu);
    bool done = irq_mmio(vcpu, gpa, size, write, value) || (write && io_write(vcpu->vm, false, gpa, size, *value));
    vcpu->stats.engine_io += done;
    return done;
}

void tcg_wake(struct cpu *c)
{
    vcpu_wake(vcpu_of(c));
}

/* ---- hypercalls: Documentation/virt/kvm/x86/hypercalls.rst ---- */

enum { HC_VAPIC_POLL_IRQ = 1, HC_KICK_CPU = 5, HC_CLOCK_PAIRING = 9, HC_SEND_IPI = 10, HC_SCHED_YIELD = 11, HC_MAP_GPA_RANGE = 12 };
enum { HC_EPERM = 1, HC_EINVAL = 22, HC_EOPNOTSUPP = 95, HC_ENOSYS = 1000 };

static void kick_cpu(struct vcpu *vcpu, uint32_t apic_id)
{
    struct tcg_vm *vm = vcpu->vm;
    for (unsigned i = 0; i < TCG_MAX_CPUS; i++) {
        struct vcpu *other = atomic_load(&vm->vcpu[i]);
        if (other && other->has_apic && lapic_id(&other->apic) == apic_id)
            vcpu_post(other, EVENT_UNHALT);
    }
}

/* Two bitmaps of 64 APIC ids each from `first` on; returns how many vCPUs it reached. */
static int64_t send_ipi(struct vcpu *vcpu, const uint64_t bitmap[2], uint32_t first, uint64_t icr, bool wide)
{
    struct tcg_vm *vm = vcpu->vm;
    unsigned bits = wide ? 64 : 32;
    int64_t count = 0;
    struct apic_message message = {.mode = (icr >> 8) & 7, .vector = icr, .ipi = true};
    if (!vcpu->has_apic)
        return -HC_EINVAL;
    if (message.mode != APIC_FIXED && message.mode != APIC_NMI)
        return -HC_EINVAL;
    pthread_mutex_lock(&vm->chips_lock);
    for (unsigned i = 0; i < 2 * bits; i++) {
        if (!(bitmap[i / bits] & (1ull << (i % bits))))
            continue;
        message.dest = first + i;
        count += apic_bus_send(&vm->apics, &message) >= 0;
    }
    pthread_mutex_unlock(&vm->chips_lock);
    return count;
}

bool tcg_hypercall(struct cpu *c)
{
    struct vcpu *vcpu = vcpu_of(c);
    bool wide = (c->efer & EFER_LMA) && (c->seg[SEG_CS].attr & ATTR_L);
    uint64_t mask = wide ? ~0ull : 0xFFFFFFFF;
    uint64_t number = c->gpr[RAX] & mask, a0 = c->gpr[RBX] & mask, a1 = c->gpr[RCX] & mask, a2 = c->gpr[RDX] & mask,
             a3 = c->gpr[RSI] & mask;
    int64_t result;
    time_sync(vcpu);
    vcpu->stats.hypercalls++;
    if (c->cpl) {
        result = -HC_EPERM;
    } else if (c->assist_leads) {
        result = -HC_ENOSYS; /* the local APICs, and the others that it could ask for, are not here */
    } else if (number == HC_VAPIC_POLL_IRQ) {
        vapic_load(vcpu);
        result = 0;
    } else if (number == HC_SCHED_YIELD) {
        result = 0;
    } else if (number == HC_KICK_CPU) {
        kick_cpu(vcpu, a1);
        result = 0;
    } else if (number == HC_SEND_IPI) {
        result = send_ipi(vcpu, (const uint64_t[2]){a0, a1}, a2, a3, wide);
    } else if (number == HC_CLOCK_PAIRING) {
        result = -HC_EOPNOTSUPP;
    } else if (number == HC_MAP_GPA_RANGE && (atomic_load(&vcpu->vm->hypercall_exits) & (1u << HC_MAP_GPA_RANGE))) {
        return false;
    } else {
        result = -HC_ENOSYS;
    }
    c->gpr[RAX] = result & mask;
    return true;
}
