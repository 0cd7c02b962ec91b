/* SPDX-License-Identifier: Apache-2.0
 *
 * The kernel's structures as tables: a line per field, from which _structs.pyx makes its classes. Name, offset and
 * size come from the compiler; only what a field means stands here.
 *
 *   U    unsigned integer           A    array of unsigned integers       S   nested structure
 *   I    signed integer             B    bytes                            T   array of structures
 *   R    array of byte strings      PAD  reserved: not shown, kept        V_  the same at an alias of another field
 *                                        as it is in copies and bytes()       (a union member): not shown twice
 */
#ifndef KVMPY_STRUCT_TABLES_H
#define KVMPY_STRUCT_TABLES_H

#include "kvm_compat.h"

enum { FIELD_UINT, FIELD_INT, FIELD_BYTES, FIELD_STRUCT, FIELD_UINTS, FIELD_STRUCTS, FIELD_BYTESTRINGS };

struct kvmpy_field {
    const char *name;
    uint16_t offset, size; /* bytes */
    uint16_t item;         /* size of an array's item */
    uint8_t kind, alias;
    const char *type; /* Python class of a nested structure */
};

struct kvmpy_layout {
    const char *name;   /* Python class */
    const char *origin; /* "struct kvm_regs" */
    size_t size;
    int tail; /* may be longer than `size`: what follows is data */
    const struct kvmpy_field *fields;
    size_t count;
};

#define OF(s, f) offsetof(struct s, f)
#define SZ(s, f) sizeof(((struct s *)0)->f)
#define U(s, f) {#f, OF(s, f), SZ(s, f), SZ(s, f), FIELD_UINT, 0, NULL}
#define I(s, f) {#f, OF(s, f), SZ(s, f), SZ(s, f), FIELD_INT, 0, NULL}
#define B(s, f) {#f, OF(s, f), SZ(s, f), 1, FIELD_BYTES, 0, NULL}
#define A(s, f) {#f, OF(s, f), SZ(s, f), SZ(s, f[0]), FIELD_UINTS, 0, NULL}
#define R(s, f) {#f, OF(s, f), SZ(s, f), SZ(s, f[0]), FIELD_BYTESTRINGS, 0, NULL}
#define S(s, f, t) {#f, OF(s, f), SZ(s, f), SZ(s, f), FIELD_STRUCT, 0, #t}
#define T(s, f, t) {#f, OF(s, f), SZ(s, f), SZ(s, f[0]), FIELD_STRUCTS, 0, #t}
#define V_U(s, n, f) {#n, OF(s, f), SZ(s, f), SZ(s, f), FIELD_UINT, 1, NULL}
#define V_I(s, n, f) {#n, OF(s, f), SZ(s, f), SZ(s, f), FIELD_INT, 1, NULL}
#define V_S(s, n, f, t) {#n, OF(s, f), SZ(s, f), SZ(s, f), FIELD_STRUCT, 1, #t}

#define SEG(s, f) S(s, f, Segment)
#define SEGMENTS(s) SEG(s, cs), SEG(s, ds), SEG(s, es), SEG(s, fs), SEG(s, gs), SEG(s, ss), SEG(s, tr), SEG(s, ldt)
#define CONTROL(s) \
    S(s, gdt, Dtable), S(s, idt, Dtable), U(s, cr0), U(s, cr2), U(s, cr3), U(s, cr4), U(s, cr8), U(s, efer), \
        U(s, apic_base)

static const struct kvmpy_field fields_regs[] = {
    U(kvm_regs, rax), U(kvm_regs, rbx), U(kvm_regs, rcx), U(kvm_regs, rdx), U(kvm_regs, rsi), U(kvm_regs, rdi),
    U(kvm_regs, rsp), U(kvm_regs, rbp), U(kvm_regs, r8), U(kvm_regs, r9), U(kvm_regs, r10), U(kvm_regs, r11),
    U(kvm_regs, r12), U(kvm_regs, r13), U(kvm_regs, r14), U(kvm_regs, r15), U(kvm_regs, rip), U(kvm_regs, rflags),
};
static const struct kvmpy_field fields_segment[] = {
    U(kvm_segment, base), U(kvm_segment, limit), U(kvm_segment, selector), U(kvm_segment, type),
    U(kvm_segment, present), U(kvm_segment, dpl), U(kvm_segment, db), U(kvm_segment, s), U(kvm_segment, l),
    U(kvm_segment, g), U(kvm_segment, avl), U(kvm_segment, unusable),
};
static const struct kvmpy_field fields_dtable[] = {U(kvm_dtable, base), U(kvm_dtable, limit)};
static const struct kvmpy_field fields_sregs[] = {
    SEGMENTS(kvm_sregs), CONTROL(kvm_sregs), A(kvm_sregs, interrupt_bitmap),
};
static const struct kvmpy_field fields_sregs2[] = {
    SEGMENTS(kvm_sregs2), CONTROL(kvm_sregs2), U(kvm_sregs2, flags), A(kvm_sregs2, pdptrs),
};
static const struct kvmpy_field fields_fpu[] = {
    R(kvm_fpu, fpr), U(kvm_fpu, fcw), U(kvm_fpu, fsw), U(kvm_fpu, ftwx), U(kvm_fpu, last_opcode),
    U(kvm_fpu, last_ip), U(kvm_fpu, last_dp), R(kvm_fpu, xmm), U(kvm_fpu, mxcsr),
};
static const struct kvmpy_field fields_xsave[] = {A(kvm_xsave, region)};
static const struct kvmpy_field fields_xcr[] = {U(kvm_xcr, xcr), U(kvm_xcr, value)};
static const struct kvmpy_field fields_xcrs[] = {U(kvm_xcrs, nr_xcrs), U(kvm_xcrs, flags), T(kvm_xcrs, xcrs, Xcr)};
static const struct kvmpy_field fields_debugregs[] = {
    A(kvm_debugregs, db), U(kvm_debugregs, dr6), U(kvm_debugregs, dr7), U(kvm_debugregs, flags),
};
static const struct kvmpy_field fields_lapic[] = {B(kvm_lapic_state, regs)};
static const struct kvmpy_field fields_mp_state[] = {U(kvm_mp_state, mp_state)};

/* The parts of kvm_vcpu_events are anonymous in the kernel's header. */
typedef __typeof__(((struct kvm_vcpu_events *)0)->exception) kvmpy_ev_exception;
typedef __typeof__(((struct kvm_vcpu_events *)0)->interrupt) kvmpy_ev_interrupt;
typedef __typeof__(((struct kvm_vcpu_events *)0)->nmi) kvmpy_ev_nmi;
typedef __typeof__(((struct kvm_vcpu_events *)0)->smi) kvmpy_ev_smi;
typedef __typeof__(((struct kvm_vcpu_events *)0)->triple_fault) kvmpy_ev_triple_fault;
#define EV(t, f) {#f, offsetof(t, f), sizeof(((t *)0)->f), sizeof(((t *)0)->f), FIELD_UINT, 0, NULL}
static const struct kvmpy_field fields_ev_exception[] = {
    EV(kvmpy_ev_exception, injected), EV(kvmpy_ev_exception, nr), EV(kvmpy_ev_exception, has_error_code),
    EV(kvmpy_ev_exception, pending), EV(kvmpy_ev_exception, error_code),
};
static const struct kvmpy_field fields_ev_interrupt[] = {
    EV(kvmpy_ev_interrupt, injected), EV(kvmpy_ev_interrupt, nr), EV(kvmpy_ev_interrupt, soft),
    EV(kvmpy_ev_interrupt, shadow),
};
static const struct kvmpy_field fields_ev_nmi[] = {
    EV(kvmpy_ev_nmi, injected), EV(kvmpy_ev_nmi, pending), EV(kvmpy_ev_nmi, masked),
};
static const struct kvmpy_field fields_ev_smi[] = {
    EV(kvmpy_ev_smi, smm), EV(kvmpy_ev_smi, pending), EV(kvmpy_ev_smi, smm_inside_nmi), EV(kvmpy_ev_smi, latched_init),
};
static const struct kvmpy_field fields_ev_triple_fault[] = {EV(kvmpy_ev_triple_fault, pending)};
static const struct kvmpy_field fields_vcpu_events[] = {
    S(kvm_vcpu_events, exception, EventsException), S(kvm_vcpu_events, interrupt, EventsInterrupt),
    S(kvm_vcpu_events, nmi, EventsNmi), U(kvm_vcpu_events, sipi_vector), U(kvm_vcpu_events, flags),
    S(kvm_vcpu_events, smi, EventsSmi), S(kvm_vcpu_events, triple_fault, EventsTripleFault),
    U(kvm_vcpu_events, exception_has_payload), U(kvm_vcpu_events, exception_payload),
};
static const struct kvmpy_field fields_sync_regs[] = {
    S(kvm_sync_regs, regs, Regs), S(kvm_sync_regs, sregs, Sregs), S(kvm_sync_regs, events, VcpuEvents),
};
static const struct kvmpy_field fields_guest_debug_arch[] = {A(kvm_guest_debug_arch, debugreg)};
static const struct kvmpy_field fields_guest_debug[] = {
    U(kvm_guest_debug, control), S(kvm_guest_debug, arch, GuestDebugArch),
};
static const struct kvmpy_field fields_translation[] = {
    U(kvm_translation, linear_address), U(kvm_translation, physical_address), U(kvm_translation, valid),
    U(kvm_translation, writeable), U(kvm_translation, usermode),
};
static const struct kvmpy_field fields_msr_entry[] = {U(kvm_msr_entry, index), U(kvm_msr_entry, data)};
static const struct kvmpy_field fields_cpuid_entry[] = {
    U(kvm_cpuid_entry, function), U(kvm_cpuid_entry, eax), U(kvm_cpuid_entry, ebx), U(kvm_cpuid_entry, ecx),
    U(kvm_cpuid_entry, edx),
};
static const struct kvmpy_field fields_cpuid_entry2[] = {
    U(kvm_cpuid_entry2, function), U(kvm_cpuid_entry2, index), U(kvm_cpuid_entry2, flags), U(kvm_cpuid_entry2, eax),
    U(kvm_cpuid_entry2, ebx), U(kvm_cpuid_entry2, ecx), U(kvm_cpuid_entry2, edx),
};
static const struct kvmpy_field fields_x86_mce[] = {
    U(kvm_x86_mce, status), U(kvm_x86_mce, addr), U(kvm_x86_mce, misc), U(kvm_x86_mce, mcg_status),
    U(kvm_x86_mce, bank),
};

/* Chips */
#define P(f) U(kvm_pic_state, f)
static const struct kvmpy_field fields_pic[] = {
    P(last_irr), P(irr), P(imr), P(isr), P(priority_add), P(irq_base), P(read_reg_select), P(poll), P(special_mask),
    P(init_state), P(auto_eoi), P(rotate_on_auto_eoi), P(special_fully_nested_mode), P(init4), P(elcr), P(elcr_mask),
};
#undef P
static const struct kvmpy_field fields_ioapic[] = {
    U(kvm_ioapic_state, base_address), U(kvm_ioapic_state, ioregsel), U(kvm_ioapic_state, id), U(kvm_ioapic_state, irr),
    A(kvm_ioapic_state, redirtbl),
};
static const struct kvmpy_field fields_irqchip[] = {
    U(kvm_irqchip, chip_id), {"chip", OF(kvm_irqchip, chip), SZ(kvm_irqchip, chip), 1, FIELD_BYTES, 0, NULL},
    V_S(kvm_irqchip, pic, chip.pic, PicState), V_S(kvm_irqchip, ioapic, chip.ioapic, IoapicState),
};
#define P(f) U(kvm_pit_channel_state, f)
static const struct kvmpy_field fields_pit_channel[] = {
    P(count), P(latched_count), P(count_latched), P(status_latched), P(status), P(read_state), P(write_state),
    P(write_latch), P(rw_mode), P(mode), P(bcd), P(gate), I(kvm_pit_channel_state, count_load_time),
};
#undef P
static const struct kvmpy_field fields_pit[] = {T(kvm_pit_state, channels, PitChannelState)};
static const struct kvmpy_field fields_pit2[] = {
    T(kvm_pit_state2, channels, PitChannelState), U(kvm_pit_state2, flags),
};
static const struct kvmpy_field fields_clock_data[] = {
    U(kvm_clock_data, clock), U(kvm_clock_data, flags), U(kvm_clock_data, realtime), U(kvm_clock_data, host_tsc),
};
static const struct kvmpy_field fields_route_irqchip[] = {
    U(kvm_irq_routing_irqchip, irqchip), U(kvm_irq_routing_irqchip, pin),
};
static const struct kvmpy_field fields_route_msi[] = {
    U(kvm_irq_routing_msi, address_lo), U(kvm_irq_routing_msi, address_hi), U(kvm_irq_routing_msi, data),
    U(kvm_irq_routing_msi, devid),
};
static const struct kvmpy_field fields_route_hv_sint[] = {
    U(kvm_irq_routing_hv_sint, vcpu), U(kvm_irq_routing_hv_sint, sint),
};
static const struct kvmpy_field fields_route_xen[] = {
    U(kvm_irq_routing_xen_evtchn, port), U(kvm_irq_routing_xen_evtchn, vcpu), U(kvm_irq_routing_xen_evtchn, priority),
};
static const struct kvmpy_field fields_route[] = {
    U(kvm_irq_routing_entry, gsi), U(kvm_irq_routing_entry, type), U(kvm_irq_routing_entry, flags),
    {"u", OF(kvm_irq_routing_entry, u), SZ(kvm_irq_routing_entry, u), 1, FIELD_BYTES, 0, NULL},
    V_S(kvm_irq_routing_entry, irqchip, u.irqchip, IrqRoutingIrqchip),
    V_S(kvm_irq_routing_entry, msi, u.msi, IrqRoutingMsi),
    V_S(kvm_irq_routing_entry, hv_sint, u.hv_sint, IrqRoutingHvSint),
    V_S(kvm_irq_routing_entry, xen_evtchn, u.xen_evtchn, IrqRoutingXenEvtchn),
};

/* Xen, nested virtualisation */
static const struct kvmpy_field fields_xen_config[] = {
    U(kvm_xen_hvm_config, flags), U(kvm_xen_hvm_config, msr), U(kvm_xen_hvm_config, blob_addr_32),
    U(kvm_xen_hvm_config, blob_addr_64), U(kvm_xen_hvm_config, blob_size_32), U(kvm_xen_hvm_config, blob_size_64),
};
#define X kvm_xen_hvm_attr
static const struct kvmpy_field fields_xen_hvm_attr[] = {
    U(X, type), {"u", OF(X, u), SZ(X, u), 1, FIELD_BYTES, 0, NULL}, V_U(X, long_mode, u.long_mode),
    V_U(X, vector, u.vector), V_U(X, shared_info, u.shared_info), V_U(X, xen_version, u.xen_version),
    V_U(X, evtchn_send_port, u.evtchn.send_port), V_U(X, evtchn_type, u.evtchn.type),
    V_U(X, evtchn_flags, u.evtchn.flags), V_U(X, evtchn_port, u.evtchn.deliver.port.port),
    V_U(X, evtchn_vcpu, u.evtchn.deliver.port.vcpu), V_U(X, evtchn_priority, u.evtchn.deliver.port.priority),
    V_I(X, evtchn_fd, u.evtchn.deliver.eventfd.fd),
};
#undef X
#define X kvm_xen_vcpu_attr
static const struct kvmpy_field fields_xen_vcpu_attr[] = {
    U(X, type), {"u", OF(X, u), SZ(X, u), 1, FIELD_BYTES, 0, NULL}, V_U(X, gpa, u.gpa), V_U(X, vcpu_id, u.vcpu_id),
    V_U(X, vector, u.vector), V_U(X, state, u.runstate.state), V_U(X, state_entry_time, u.runstate.state_entry_time),
    V_U(X, time_running, u.runstate.time_running), V_U(X, time_runnable, u.runstate.time_runnable),
    V_U(X, time_blocked, u.runstate.time_blocked), V_U(X, time_offline, u.runstate.time_offline),
    V_U(X, timer_port, u.timer.port), V_U(X, timer_priority, u.timer.priority),
    V_U(X, timer_expires_ns, u.timer.expires_ns),
};
#undef X
static const struct kvmpy_field fields_nested[] = {
    U(kvm_nested_state, flags), U(kvm_nested_state, format), U(kvm_nested_state, size),
    {"hdr", OF(kvm_nested_state, hdr), SZ(kvm_nested_state, hdr), 1, FIELD_BYTES, 0, NULL},
    V_U(kvm_nested_state, vmx_vmxon_pa, hdr.vmx.vmxon_pa), V_U(kvm_nested_state, vmx_vmcs12_pa, hdr.vmx.vmcs12_pa),
    V_U(kvm_nested_state, vmx_smm_flags, hdr.vmx.smm.flags), V_U(kvm_nested_state, vmx_flags, hdr.vmx.flags),
    V_U(kvm_nested_state, vmx_preemption_timer_deadline, hdr.vmx.preemption_timer_deadline),
    V_U(kvm_nested_state, svm_vmcb_pa, hdr.svm.vmcb_pa),
};

#define COUNT(table) (sizeof(table) / sizeof(table[0]))
#define LAYOUT(name, origin, table) {#name, "struct " #origin, sizeof(struct origin), 0, table, COUNT(table)}
#define TAILED(name, origin, table) {#name, "struct " #origin, sizeof(struct origin), 1, table, COUNT(table)}
#define PART(name, type, origin, table) {#name, origin, sizeof(type), 0, table, COUNT(table)}

/* A nested structure stands before the one that holds it. */
static const struct kvmpy_layout kvmpy_layouts[] = {
    LAYOUT(Regs, kvm_regs, fields_regs),
    LAYOUT(Segment, kvm_segment, fields_segment),
    LAYOUT(Dtable, kvm_dtable, fields_dtable),
    LAYOUT(Sregs, kvm_sregs, fields_sregs),
    LAYOUT(Sregs2, kvm_sregs2, fields_sregs2),
    LAYOUT(Fpu, kvm_fpu, fields_fpu),
    TAILED(Xsave, kvm_xsave, fields_xsave),
    LAYOUT(Xcr, kvm_xcr, fields_xcr),
    LAYOUT(Xcrs, kvm_xcrs, fields_xcrs),
    LAYOUT(Debugregs, kvm_debugregs, fields_debugregs),
    LAYOUT(LapicState, kvm_lapic_state, fields_lapic),
    LAYOUT(MpState, kvm_mp_state, fields_mp_state),
    PART(EventsException, kvmpy_ev_exception, "kvm_vcpu_events.exception", fields_ev_exception),
    PART(EventsInterrupt, kvmpy_ev_interrupt, "kvm_vcpu_events.interrupt", fields_ev_interrupt),
    PART(EventsNmi, kvmpy_ev_nmi, "kvm_vcpu_events.nmi", fields_ev_nmi),
    PART(EventsSmi, kvmpy_ev_smi, "kvm_vcpu_events.smi", fields_ev_smi),
    PART(EventsTripleFault, kvmpy_ev_triple_fault, "kvm_vcpu_events.triple_fault", fields_ev_triple_fault),
    LAYOUT(VcpuEvents, kvm_vcpu_events, fields_vcpu_events),
    LAYOUT(SyncRegs, kvm_sync_regs, fields_sync_regs),
    LAYOUT(GuestDebugArch, kvm_guest_debug_arch, fields_guest_debug_arch),
    LAYOUT(GuestDebug, kvm_guest_debug, fields_guest_debug),
    LAYOUT(Translation, kvm_translation, fields_translation),
    LAYOUT(MsrEntry, kvm_msr_entry, fields_msr_entry),
    LAYOUT(CpuidEntry, kvm_cpuid_entry, fields_cpuid_entry),
    LAYOUT(CpuidEntry2, kvm_cpuid_entry2, fields_cpuid_entry2),
    LAYOUT(X86Mce, kvm_x86_mce, fields_x86_mce),
    LAYOUT(PicState, kvm_pic_state, fields_pic),
    LAYOUT(IoapicState, kvm_ioapic_state, fields_ioapic),
    LAYOUT(Irqchip, kvm_irqchip, fields_irqchip),
    LAYOUT(PitChannelState, kvm_pit_channel_state, fields_pit_channel),
    LAYOUT(PitState, kvm_pit_state, fields_pit),
    LAYOUT(PitState2, kvm_pit_state2, fields_pit2),
    LAYOUT(ClockData, kvm_clock_data, fields_clock_data),
    LAYOUT(IrqRoutingIrqchip, kvm_irq_routing_irqchip, fields_route_irqchip),
    LAYOUT(IrqRoutingMsi, kvm_irq_routing_msi, fields_route_msi),
    LAYOUT(IrqRoutingHvSint, kvm_irq_routing_hv_sint, fields_route_hv_sint),
    LAYOUT(IrqRoutingXenEvtchn, kvm_irq_routing_xen_evtchn, fields_route_xen),
    LAYOUT(IrqRoutingEntry, kvm_irq_routing_entry, fields_route),
    LAYOUT(XenHvmConfig, kvm_xen_hvm_config, fields_xen_config),
    LAYOUT(XenHvmAttr, kvm_xen_hvm_attr, fields_xen_hvm_attr),
    LAYOUT(XenVcpuAttr, kvm_xen_vcpu_attr, fields_xen_vcpu_attr),
    TAILED(NestedState, kvm_nested_state, fields_nested),
};
enum { KVMPY_LAYOUT_COUNT = COUNT(kvmpy_layouts) };

/* Short macro names stay in this file. */
#undef OF
#undef SZ
#undef U
#undef I
#undef B
#undef A
#undef R
#undef S
#undef T
#undef EV
#undef SEG
#undef SEGMENTS
#undef CONTROL
#undef V_U
#undef V_I
#undef V_S
#undef COUNT
#undef LAYOUT
#undef TAILED
#undef PART

#endif
