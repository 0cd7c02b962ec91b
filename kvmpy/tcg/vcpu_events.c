/* SPDX-License-Identifier: Apache-2.0
 *
 * Events under way (KVM_GET/SET_VCPU_EVENTS), guest debugging and translation.
 */
#include <errno.h>
#include <string.h>

#include "vm.h"

#define DR6_DEFAULT 0xFFFF0FF0ull

/* KVM and the core number the two kinds of interrupt shadow the other way round. */
static uint8_t shadow_to_kvm(uint8_t shadow)
{
    return (shadow & SHADOW_STI ? KVM_X86_SHADOW_INT_STI : 0) | (shadow & SHADOW_MOVSS ? KVM_X86_SHADOW_INT_MOV_SS : 0);
}

static uint8_t shadow_from_kvm(uint8_t shadow)
{
    return (shadow & KVM_X86_SHADOW_INT_STI ? SHADOW_STI : 0) | (shadow & KVM_X86_SHADOW_INT_MOV_SS ? SHADOW_MOVSS : 0);
}

void state_get_events(struct vcpu *vcpu, struct kvm_vcpu_events *events)
{
    struct cpu *c = &vcpu->cpu;
    memset(events, 0, sizeof *events);
    events->exception.injected = c->inject.exc;
    events->exception.nr = c->inject.vector;
    events->exception.has_error_code = c->inject.has_error;
    events->exception.error_code = c->inject.error;
    events->interrupt.injected = c->inject.intr && !c->inject.soft;
    events->interrupt.nr = c->inject.intr_vector;
    events->interrupt.shadow = shadow_to_kvm(c->shadow);
    events->nmi.injected = c->inject.nmi;
    uint32_t lines = atomic_load(&c->lines);
    events->nmi.pending = !!(lines & LINE_NMI) + !!(lines & LINE_NMI2);
    events->nmi.masked = c->nmi_masked;
    events->flags = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW;
    if (vcpu->vm->exception_payload)
        events->flags |= KVM_VCPUEVENT_VALID_PAYLOAD;
    if (vcpu->vm->triple_fault_event) {
        events->triple_fault.pending = vcpu->triple_fault;
        events->flags |= KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
    }
}

/* What a pending exception brings along: CR2 of a page fault, the new DR6 bits of a debug exception. */
static void apply_payload(struct cpu *c, uint8_t vector, uint64_t payload)
{
    if (vector == EXC_PF)
        c->cr2 = payload;
    else if (vector == EXC_DB)
        c->dr[6] = (c->dr[6] & ~0xFull) | (payload & 0xE00F) | DR6_DEFAULT;
}

long state_set_events(struct vcpu *vcpu, const struct kvm_vcpu_events *events)
{
    const uint32_t known = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SIPI_VECTOR | KVM_VCPUEVENT_VALID_SHADOW
                         | KVM_VCPUEVENT_VALID_SMM | KVM_VCPUEVENT_VALID_PAYLOAD | KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
    struct cpu *c = &vcpu->cpu;
    bool injected = events->exception.injected, pending = false;
    if (events->flags & ~known)
        return -EINVAL;
    if (events->flags & KVM_VCPUEVENT_VALID_PAYLOAD) {
        if (!vcpu->vm->exception_payload)
            return -EINVAL;
        pending = events->exception.pending;
    }
    if ((injected || pending) && (events->exception.nr > 31 || events->exception.nr == EXC_NMI))
        return -EINVAL;
    bool smm = events->smi.smm || events->smi.pending;
    if ((events->flags & KVM_VCPUEVENT_VALID_SMM) && smm)
        return -EINVAL; /* there is no SMM here */
    if ((events->flags & KVM_VCPUEVENT_VALID_TRIPLE_FAULT) && !vcpu->vm->triple_fault_event)
        return -EINVAL;

    if (pending && events->exception_has_payload)
        apply_payload(c, events->exception.nr, events->exception_payload);
    c->inject.exc = injected || pending;
    c->inject.vector = events->exception.nr;
    c->inject.has_error = events->exception.has_error_code;
    c->inject.error = events->exception.error_code;
    c->inject.intr = events->interrupt.injected;
    c->inject.intr_vector = events->interrupt.nr;
    c->inject.soft = events->interrupt.soft;
    if (events->flags & KVM_VCPUEVENT_VALID_SHADOW)
        c->shadow = shadow_from_kvm(events->interrupt.shadow);
    c->inject.nmi = events->nmi.injected;
    if (events->flags & KVM_VCPUEVENT_VALID_NMI_PENDING) {
        cpu_lower(c, LINE_NMI | LINE_NMI2);
        for (unsigned i = 0; i < events->nmi.pending && i < 2; i++)
            cpu_nmi(c);
    }
    c->nmi_masked = events->nmi.masked;
    if (events->flags & KVM_VCPUEVENT_VALID_SIPI_VECTOR)
        atomic_store(&vcpu->sipi_vector, events->sipi_vector);
    if (events->flags & KVM_VCPUEVENT_VALID_TRIPLE_FAULT)
        vcpu->triple_fault = events->triple_fault.pending;
    cpu_io_forget(c);
    cpu_request(c, CPU_REQ_LINES | CPU_REQ_STEP);
    return 0;
}

long state_set_guest_debug(struct vcpu *vcpu, const struct kvm_guest_debug *debug)
{
    struct cpu *c = &vcpu->cpu;
    if (debug->control & (KVM_GUESTDBG_INJECT_DB | KVM_GUESTDBG_INJECT_BP)) {
        if (c->inject.exc)
            return -EBUSY;
        c->inject.exc = true;
        c->inject.has_error = false;
        c->inject.vector = debug->control & KVM_GUESTDBG_INJECT_DB ? EXC_DB : EXC_BP;
    }
    c->guest_debug.flags = debug->control & KVM_GUESTDBG_ENABLE ? debug->control : 0;
    for (unsigned i = 0; i < 8; i++)
        c->guest_debug.dr[i] = c->guest_debug.flags & KVM_GUESTDBG_USE_HW_BP ? debug->arch.debugreg[i] : 0;
    cpu_update(c);
    return 0;
}
