/* SPDX-License-Identifier: Apache-2.0
 *
 * The counters behind KVM_GET_STATS_FD, in the binary format of api.rst 4.133. One list of names makes the
 * structure, the descriptors and the data.
 */
#ifndef KVMPY_TCG_STATS_H
#define KVMPY_TCG_STATS_H

#include <stddef.h>
#include <stdint.h>

#define VM_STATS(X) X(slot_changes) X(vcpu_stops) X(msi_sent) X(irq_lines) X(timer_ticks)
#define VCPU_STATS(X)                                                                                              \
    X(exits) X(io_exits) X(mmio_exits) X(halt_exits) X(signal_exits) X(irq_window_exits) X(debug_exits)            \
    X(msr_exits) X(hypercalls) X(request_exits) X(irq_injections) X(nmi_injections) X(halt_sleeps) X(engine_io)    \
    X(insns) X(blocks) X(lookups) X(tlb_misses) X(page_walks) X(tlb_flushes) X(code_invalidations) X(faults) X(slow_path) \
    X(jit_blocks) X(jit_insns) X(jit_helpers) X(jit_links) X(jit_joined)

#define STAT_FIELD(name) uint64_t name;
struct vm_stats { VM_STATS(STAT_FIELD) };
struct vcpu_stats { VCPU_STATS(STAT_FIELD) };
#undef STAT_FIELD

struct tcg_vm;
struct vcpu;
/* pread(2) of a stats handle; `vcpu` is NULL for the VM's. */
long stats_pread(struct tcg_vm *vm, struct vcpu *vcpu, void *buffer, size_t size, uint64_t offset);

#endif
