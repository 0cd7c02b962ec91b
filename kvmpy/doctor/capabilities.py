# SPDX-License-Identifier: Apache-2.0
"""KVM's capabilities, grouped by what they are for (api.rst 4.4 and sections 6 to 8)."""

from __future__ import annotations

from collections.abc import Mapping

from kvmpy.doctor.report import Check, Section, info, lacking, ok

# What kvmpy's machines cannot do without.
NEEDED = frozenset({"USER_MEMORY", "IRQCHIP", "PIT2", "IRQFD", "IOEVENTFD", "IMMEDIATE_EXIT", "EXT_CPUID"})

GROUPS: Mapping[str, tuple[str, ...]] = {
    "interrupts": (
        "IRQCHIP", "PIT2", "IRQ_ROUTING", "IRQFD", "IRQFD_RESAMPLE", "SIGNAL_MSI", "SPLIT_IRQCHIP",
        "X2APIC_API", "IRQ_INJECT_STATUS", "USER_NMI",
    ),
    "memory": (
        "USER_MEMORY", "USER_MEMORY2", "READONLY_MEM", "SYNC_MMU", "GUEST_MEMFD", "MEMORY_ATTRIBUTES",
        "MEMORY_FAULT_INFO", "PRE_FAULT_MEMORY", "MULTI_ADDRESS_SPACE",
    ),
    "dirty pages": (
        "DIRTY_LOG_RING", "DIRTY_LOG_RING_ACQ_REL", "DIRTY_LOG_RING_WITH_BITMAP", "MANUAL_DIRTY_LOG_PROTECT2",
    ),
    "exits": (
        "IMMEDIATE_EXIT", "IOEVENTFD", "COALESCED_MMIO", "COALESCED_PIO", "X86_USER_SPACE_MSR",
        "X86_MSR_FILTER", "X86_BUS_LOCK_EXIT", "X86_NOTIFY_VMEXIT", "EXIT_HYPERCALL",
        "EXIT_ON_EMULATION_FAILURE", "X86_DISABLE_EXITS",
    ),
    "vCPU state": (
        "EXT_CPUID", "XSAVE", "XSAVE2", "XCRS", "DEBUGREGS", "SREGS2", "VCPU_EVENTS", "MP_STATE", "SYNC_REGS",
        "GET_MSR_FEATURES", "NESTED_STATE", "X86_SMM", "EXCEPTION_PAYLOAD", "X86_TRIPLE_FAULT_EVENT",
    ),
    "time": (
        "ADJUST_CLOCK", "TSC_CONTROL", "VM_TSC_CONTROL", "GET_TSC_KHZ", "TSC_DEADLINE_TIMER", "KVMCLOCK_CTRL",
    ),
    "debugging": ("SET_GUEST_DEBUG", "SET_GUEST_DEBUG2", "BINARY_STATS_FD", "PMU_CAPABILITY"),
    "hyper-v and xen": ("HYPERV", "HYPERV_CPUID", "HYPERV_ENFORCE_CPUID", "XEN_HVM"),
}  # fmt: skip

# Capabilities whose value is a number and not yes or no.
LIMITS = ("NR_VCPUS", "MAX_VCPUS", "MAX_VCPU_ID", "NR_MEMSLOTS")


def examine(offered: Mapping[str, int]) -> Section:
    """Sort what an engine offers into groups.

    Arguments: offered, name without KVM_CAP_ -> what KVM_CHECK_EXTENSION gave (0: absent).
    """
    checks = [_group(title, names, offered) for title, names in GROUPS.items()]
    grouped = {name for names in GROUPS.values() for name in names} | set(LIMITS)
    others = sorted(name for name, value in offered.items() if value and name not in grouped)
    if others:
        checks.append(info("others", ", ".join(others), offered=others))
    limits = {name: offered[name] for name in LIMITS if offered.get(name)}
    checks.append(info("limits", ", ".join(f"{name} {value}" for name, value in limits.items()), **limits))
    return Section("capabilities", "What KVM offers", tuple(checks))


def _group(title: str, names: tuple[str, ...], offered: Mapping[str, int]) -> Check:
    present = {name: offered[name] for name in names if offered.get(name)}
    absent = [name for name in names if name not in present]
    text = ", ".join(present) or "nothing"
    if absent:
        text += f"; not {', '.join(absent)}"
    needed = [name for name in absent if name in NEEDED]
    name = title.replace(" ", "-").lower()
    if needed:
        advice = f"kvmpy's machines need {', '.join(needed)}: use a newer kernel, or --backend tcg"
        return lacking(name, text, advice, offered=present, absent=absent)
    return (ok if present else info)(name, text, offered=present, absent=absent)
