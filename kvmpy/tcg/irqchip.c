/* SPDX-License-Identifier: Apache-2.0
 *
 * The chips of one VM: making them (KVM_CREATE_IRQCHIP, split irqchip, PIT), their ports and pages, the wires between
 * them and the vCPUs, and their state ioctls.
 */
#include <errno.h>
#include <string.h>

#include "vm.h"

/* ---- wires ---- */

static void set_intr(void *opaque, unsigned cpu, bool level)
{
    struct tcg_vm *vm = opaque;
    struct vcpu *vcpu = atomic_load(&vm->vcpu[cpu]);
    if (!vcpu)
        return; /* being made: vcpu_create() looks at the line afterwards */
    if (level) {
        cpu_raise(&vcpu->cpu, LINE_INTR);
        vcpu_wake(vcpu);
    } else {
        cpu_lower(&vcpu->cpu, LINE_INTR);
    }
}

static void send_nmi(void *opaque, unsigned cpu)
{
    struct vcpu *vcpu = atomic_load(&((struct tcg_vm *)opaque)->vcpu[cpu]);
    if (vcpu) {
        cpu_nmi(&vcpu->cpu);
        vcpu_wake(vcpu);
    }
}

static void send_init(void *opaque, unsigned cpu)
{
    struct vcpu *vcpu = atomic_load(&((struct tcg_vm *)opaque)->vcpu[cpu]);
    if (vcpu) {
        atomic_fetch_and(&vcpu->events, ~EVENT_SIPI); /* a SIPI before this INIT is void */
        vcpu_post(vcpu, EVENT_INIT);
    }
}

static void send_sipi(void *opaque, unsigned cpu, uint8_t vector)
{
    struct vcpu *vcpu = atomic_load(&((struct tcg_vm *)opaque)->vcpu[cpu]);
    if (vcpu) {
        atomic_store(&vcpu->sipi_vector, vector);
        vcpu_post(vcpu, EVENT_SIPI);
    }
}

static void lapic_eoi(void *opaque, unsigned cpu, uint8_t vector, bool level_triggered)
{
    struct tcg_vm *vm = opaque;
    if (vm->has_ioapic) {
        ioapic_eoi(&vm->ioapic, vector, level_triggered);
    } else if (vm->eoi_exits[vector / 8] & (1u << (vector & 7))) {
        struct vcpu *vcpu = atomic_load(&vm->vcpu[cpu]);
        vcpu->eoi_vector = vector; /* its own thread is the one that writes EOI */
        vcpu_post(vcpu, EVENT_EOI_EXIT);
    }
}

static const struct apic_bus_ops bus_ops = {
    .intr = set_intr, .nmi = send_nmi, .init = send_init, .sipi = send_sipi, .eoi = lapic_eoi,
};

static void pic_intr(void *opaque, bool level)
{
    apic_bus_set_pic(&((struct tcg_vm *)opaque)->apics, level);
}

static void pic_eoi(void *opaque, unsigned pin)
{
    irq_notify_eoi(opaque, pin < 8 ? KVM_IRQCHIP_PIC_MASTER : KVM_IRQCHIP_PIC_SLAVE, pin & 7);
}

static void ioapic_pin_eoi(void *opaque, unsigned pin)
{
    irq_notify_eoi(opaque, KVM_IRQCHIP_IOAPIC, pin);
}

static void pit_irq(void *opaque, bool level)
{
    struct tcg_vm *vm = opaque;
    vm->stats.timer_ticks += level;
    irq_set(vm, 0, SOURCE_PIT, level);
}

/* The interrupt that the core takes now: the PIC's before the LAPIC's, as KVM has it. */
int tcg_ack_interrupt(struct cpu *c)
{
    struct vcpu *vcpu = vcpu_of(c);
    struct tcg_vm *vm = vcpu->vm;
    int vector = -1;
    pthread_mutex_lock(&vm->chips_lock);
    if (!vcpu->has_apic) {
        cpu_lower(c, LINE_INTR);
    } else if (lapic_accepts_pic(&vcpu->apic) && vm->has_pic && vm->pic.output) {
        vector = pic_ack(&vm->pic);
    } else if (lapic_accepts_pic(&vcpu->apic) && vcpu->apic.extint) {
        vector = vcpu->extint_vector;
        vcpu->extint_vector = -1;
        vcpu->apic.extint = false;
        lapic_update(&vcpu->apic);
    } else {
        vector = lapic_ack(&vcpu->apic);
    }
    pthread_mutex_unlock(&vm->chips_lock);
    vcpu->stats.irq_injections += vector >= 0;
    return vector;
}

/* ---- making them; vm.lock held ---- */

long irq_create_chip(struct tcg_vm *vm)
{
    if (vm->has_lapics)
        return -EEXIST;
    if (vm->created)
        return -EINVAL;
    pthread_mutex_lock(&vm->chips_lock);
    vm->has_lapics = vm->has_pic = vm->has_ioapic = true;
    pthread_mutex_unlock(&vm->chips_lock);
    long error = irq_init_default_routes(vm);
    if (!error)
        error = timers_start(&vm->timers);
    if (error)
        vm->has_lapics = vm->has_pic = vm->has_ioapic = false;
    return error;
}

long irq_create_split(struct tcg_vm *vm, uint32_t pins)
{
    if (pins > KVM_IOAPIC_NUM_PINS)
        return -EINVAL;
    if (vm->has_lapics)
        return -EEXIST;
    if (vm->created)
        return -EINVAL;
    int error = timers_start(&vm->timers);
    if (error)
        return error;
    vm->has_lapics = true;
    vm->split_pins = pins;
    return 0;
}

long irq_create_pit(struct tcg_vm *vm, const struct kvm_pit_config *config)
{
    if (vm->has_pit)
        return -EEXIST;
    if (!vm->has_pic)
        return -ENOENT;
    if (config->flags & ~KVM_PIT_SPEAKER_DUMMY)
        return -EINVAL;
    pthread_mutex_lock(&vm->chips_lock);
    pit_init(&vm->pit, &vm->timers, config->flags & KVM_PIT_SPEAKER_DUMMY, pit_irq, vm);
    vm->has_pit = true;
    pthread_mutex_unlock(&vm->chips_lock);
    return 0;
}

void irq_init(struct tcg_vm *vm)
{
    apic_bus_init(&vm->apics, &bus_ops, vm, &vm->timers);
    pic_init(&vm->pic, pic_intr, pic_eoi, vm);
    ioapic_init(&vm->ioapic, &vm->apics, ioapic_pin_eoi, vm);
}

/* ---- ports and pages, on the vCPU's thread ---- */

static bool owns_port(struct tcg_vm *vm, uint32_t port)
{
    return port <= 0xFFFF && ((vm->has_pic && pic_owns_port(port)) || (vm->has_pit && pit_owns_port(&vm->pit, port)));
}

/* Eight-bit chips: a wider access is one to each port in turn, as the ISA bus splits it. */
bool irq_pio(struct vcpu *vcpu, uint16_t port, unsigned size, bool write, uint32_t *value)
{
    struct tcg_vm *vm = vcpu->vm;
    if (!owns_port(vm, port))
        return false;
    uint32_t result = 0;
    pthread_mutex_lock(&vm->chips_lock);
    for (unsigned i = 0; i < size; i++) {
        uint32_t at = port + i;
        uint8_t byte = 0xFF;
        if (owns_port(vm, at) && write)
            (pic_owns_port(at) ? pic_write(&vm->pic, at, *value >> (i * 8)) : pit_write(&vm->pit, at, *value >> (i * 8)));
        else if (owns_port(vm, at))
            byte = pic_owns_port(at) ? pic_read(&vm->pic, at) : pit_read(&vm->pit, at);
        result |= (uint32_t)byte << (i * 8);
    }
    pthread_mutex_unlock(&vm->chips_lock);
    if (!write)
        *value = result;
    return true;
}

bool irq_mmio(struct vcpu *vcpu, uint64_t gpa, unsigned size, bool write, uint64_t *value)
{
    struct tcg_vm *vm = vcpu->vm;
    struct lapic *apic = &vcpu->apic;
    uint64_t page = gpa & ~0xFFFull;
    bool local = vcpu->has_apic && lapic_enabled(apic) && !lapic_x2(apic) && page == (apic->base & ~0xFFFull);
    uint64_t offset = gpa - IOAPIC_DEFAULT_BASE;
    if (local && unlikely(vapic_reports(vcpu, gpa)))
        return false; /* leaves, and is done in vapic_exit() */
    if (!local && !(vm->has_ioapic && offset < IOAPIC_SIZE))
        return false;
    pthread_mutex_lock(&vm->chips_lock);
    if (local && write)
        lapic_write(apic, gpa & 0xFFF, size, *value);
    else if (local)
        *value = lapic_read(apic, gpa & 0xFFF, size);
    else if (write)
        ioapic_write(&vm->ioapic, offset, size, *value);
    else
        *value = ioapic_read(&vm->ioapic, offset, size);
    pthread_mutex_unlock(&vm->chips_lock);
    return true;
}

/* ---- state ---- */

long irq_get_chip(struct tcg_vm *vm, struct kvm_irqchip *chip)
{
    if (!vm->has_pic)
        return -ENXIO;
    if (chip->chip_id >= KVM_NR_IRQCHIPS)
        return -EINVAL;
    memset(&chip->chip, 0, sizeof chip->chip);
    pthread_mutex_lock(&vm->chips_lock);
    if (chip->chip_id == KVM_IRQCHIP_IOAPIC)
        chip->chip.ioapic = vm->ioapic.state;
    else
        chip->chip.pic = vm->pic.chip[chip->chip_id];
    pthread_mutex_unlock(&vm->chips_lock);
    return 0;
}

long irq_set_chip(struct tcg_vm *vm, const struct kvm_irqchip *chip)
{
    if (!vm->has_pic)
        return -ENXIO;
    if (chip->chip_id >= KVM_NR_IRQCHIPS)
        return -EINVAL;
    pthread_mutex_lock(&vm->chips_lock);
    if (chip->chip_id == KVM_IRQCHIP_IOAPIC)
        ioapic_set_state(&vm->ioapic, &chip->chip.ioapic);
    else
        pic_set_state(&vm->pic, chip->chip_id, &chip->chip.pic);
    pthread_mutex_unlock(&vm->chips_lock);
    return 0;
}

long irq_get_pit(struct tcg_vm *vm, struct kvm_pit_state2 *state)
{
    if (!vm->has_pit)
        return -ENXIO;
    pthread_mutex_lock(&vm->chips_lock);
    pit_get_state(&vm->pit, state);
    pthread_mutex_unlock(&vm->chips_lock);
    return 0;
}

long irq_set_pit(struct tcg_vm *vm, const struct kvm_pit_state2 *state)
{
    if (!vm->has_pit)
        return -ENXIO;
    pthread_mutex_lock(&vm->chips_lock);
    pit_set_state(&vm->pit, state);
    pthread_mutex_unlock(&vm->chips_lock);
    return 0;
}

long irq_reinject(struct tcg_vm *vm, const struct kvm_reinject_control *control)
{
    if (!vm->has_pit)
        return -ENXIO;
    pthread_mutex_lock(&vm->chips_lock);
    pit_set_reinject(&vm->pit, control->pit_reinject);
    pthread_mutex_unlock(&vm->chips_lock);
    return 0;
}
