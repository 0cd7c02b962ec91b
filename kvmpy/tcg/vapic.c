/* SPDX-License-Identifier: Apache-2.0
 *
 * The task priority, as some guests need it to be fast or seen: TPR access reporting (api.rst 4.68: every access to
 * the TPR register leaves to user space, which may patch the instruction) and the virtual APIC page that such
 * patched code uses instead (4.69): one word with TPR, the class in service and the highest request.
 */
#include <errno.h>
#include <string.h>

#include "vm.h"

enum { TPR_OFFSET = 0x80 };

bool vapic_reports(const struct vcpu *vcpu, uint64_t gpa)
{
    return vcpu->tpr_reporting && (gpa & 0xFFF) == TPR_OFFSET && !vcpu->tpr_exit;
}

/* cpu_run() stopped for an access to the TPR: do it here, so that the instruction finds it done, and report it. */
bool vapic_exit(struct vcpu *vcpu)
{
    struct cpu_io *io = &vcpu->cpu.io;
    bool write = io->kind == IO_MMIO_WRITE;
    uint64_t value;
    if (!vcpu->tpr_reporting || (io->kind != IO_MMIO_READ && !write) || (io->addr & 0xFFF) != TPR_OFFSET)
        return false;
    memcpy(&value, io->data, sizeof value);
    vcpu->tpr_exit = true;
    bool ours = irq_mmio(vcpu, io->addr, io->size, write, &value);
    vcpu->tpr_exit = false;
    if (!ours)
        return false; /* another page */
    memcpy(io->data, &value, sizeof value);
    io->state = IO_DONE;
    vcpu->run->exit_reason = KVM_EXIT_TPR_ACCESS;
    vcpu->run->tpr_access.rip = vcpu->cpu.rip;
    vcpu->run->tpr_access.is_write = write;
    return true;
}

long vapic_set_reporting(struct vcpu *vcpu, struct kvm_tpr_access_ctl *control)
{
    if (control->flags)
        return -EINVAL;
    vcpu->tpr_reporting = control->enabled;
    return 0;
}

long vapic_set_address(struct vcpu *vcpu, const struct kvm_vapic_addr *address)
{
    if (!vcpu->has_apic)
        return -EINVAL;
    uint32_t probe;
    if (address->vapic_addr && !memory_read(vcpu, address->vapic_addr, &probe, sizeof probe))
        return -EINVAL;
    vcpu->vapic_address = address->vapic_addr;
    return 0;
}

/* Inside an epoch. The guest may have written the page: its TPR counts. */
void vapic_load(struct vcpu *vcpu)
{
    uint32_t word;
    if (likely(!vcpu->vapic_address) || !memory_read(vcpu, vcpu->vapic_address, &word, sizeof word))
        return;
    pthread_mutex_lock(&vcpu->vm->chips_lock);
    lapic_set_tpr(&vcpu->apic, word);
    pthread_mutex_unlock(&vcpu->vm->chips_lock);
}

void vapic_store(struct vcpu *vcpu)
{
    if (likely(!vcpu->vapic_address))
        return;
    pthread_mutex_lock(&vcpu->vm->chips_lock);
    uint32_t word = lapic_summary(&vcpu->apic);
    pthread_mutex_unlock(&vcpu->vm->chips_lock);
    memory_write(vcpu, vcpu->vapic_address, &word, sizeof word);
}
