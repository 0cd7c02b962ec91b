# SPDX-License-Identifier: Apache-2.0
"""CPUID policy: what each vCPU answers to CPUID, made from what the engine supports.

    policy = CpuidPolicy(supported, "host,-avx512f,-cx16,+x2apic", cpus=4)
    vcpu.cpuid = policy.kvm_entries(index)       # for every vCPU, before it runs

The engine's list (KVM_GET_SUPPORTED_CPUID, api.rst 4.46) describes what can be had, not a processor:
topology, the APIC id, sizes that depend on features and the hypervisor leaves are made here, so that they
agree.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from kvmpy.arch.cpuid import FEATURES, LEVELS, feature_name, needed_by, without_orphans
from kvmpy.boot.topology import SIGNIFICANT_INDEX, CpuidEntry, Topology, describe_topology

if TYPE_CHECKING:
    from kvmpy._structs import CpuidEntry2

KVM_SIGNATURE = b"KVMKVMKVM\0\0\0"
HYPERVISOR = 0x4000_0000
HYPERVISOR_FEATURES = 0x4000_0001
HYPERVISOR_TIMING = 0x4000_0010
HYPERVISOR_END = 0x4000_FFFF
BRAND = 0x8000_0002  # to 0x8000_0004
LAPIC_BUS_KHZ = 1_000_000  # KVM's APIC timer counts nanoseconds
XSAVE_LEGACY_SIZE = 576  # legacy area and header (SDM volume 1, 13.4)
AMD_MIRROR = 0x0183_F3FF  # bits of 0x8000_0001 EDX that repeat leaf 1 on AMD processors

# Bits of XCR0 and IA32_XSS by the feature that owns the state (SDM volume 1, 13.1). x87 and SSE: always.
XCR0 = {"avx": 0x4, "mpx": 0x18, "avx512f": 0xE0, "pku": 0x200, "amx_tile": 0x6_0000}
XSS = {"intel_pt": 0x100, "shstk": 0x1800, "uintr": 0x4000, "arch_lbr": 0x8000}
XSS_OWNED = 0x100 | 0x1800 | 0x4000 | 0x8000

# Whole leaves that mean nothing without a feature.
LEAF_OF = {0x5: "monitor", 0x12: "sgx", 0x14: "intel_pt", 0x19: "kl", 0x1C: "arch_lbr", 0x1D: "amx_tile",
           0x1E: "amx_tile", 0x24: "avx10", 0x8000_000A: "svm", 0x8000_001B: "ibs"}  # fmt: skip

# In a named model as far as the engine has them: they make no difference to programs, only to their speed.
HELPFUL = frozenset({"x2apic", "tsc_deadline_timer", "arat", "mtrr"}) | {
    name
    for name, place in FEATURES.items()
    if place.function == HYPERVISOR_FEATURES and place.register == "eax"
}


# What "host" leaves out unless it is asked for by name ("host,+la57"): kernels choose five page-table levels as
# soon as they see them, which only costs time, and wait in MWAIT instead of HLT, which tells an engine less.
ON_REQUEST = frozenset({"la57", "monitor"})
LINEAR_48 = 48 << 8  # of 0x8000_0008 EAX


class CpuidPolicy:
    """CPUID for all processors of a machine.

    supported: the engine's list, of any objects with the fields of `CpuidEntry`. cpu: a model, then features
    to add and take away, as in "host,-avx512f" or "x86-64-v2,+aes,rdrand=on"; models are "host" (all that the
    engine has, but for `ON_REQUEST`) and "x86-64-v1" to "x86-64-v4". What a removed feature carries goes with
    it; what an added one needs comes with it. cpus, threads, sockets: processors in all, per core, and packages.
    allow: features that are not in `supported` though the engine has them (KVM keeps "tsc_deadline_timer" back,
    api.rst 4.46). tsc_khz: told in leaf 0x4000_0010 when given. Raises ValueError for unknown names, with close
    ones, and for what the engine cannot do.
    """

    def __init__(
        self,
        supported: Iterable[Any],
        cpu: str = "host",
        *,
        cpus: int = 1,
        threads: int = 1,
        sockets: int = 1,
        allow: Iterable[str] = (),
        tsc_khz: int | None = None,
    ) -> None:
        self.topology = Topology(cpus, threads, sockets)
        self._table = {
            (e.function, e.index): CpuidEntry(e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx)
            for e in supported
        }
        if (0, 0) not in self._table or (1, 0) not in self._table:
            raise ValueError("the supported CPUID entries lack leaf 0 or 1")
        leaf0 = self._table[0, 0]
        self.vendor = b"".join(r.to_bytes(4, "little") for r in (leaf0.ebx, leaf0.edx, leaf0.ecx)).decode(
            "latin-1"
        )
        self.is_amd = self.vendor in ("AuthenticAMD", "HygonGenuine")
        self._tsc_khz = tsc_khz
        available = frozenset(n for n in FEATURES if self._has(n)) | {feature_name(n) for n in allow}
        # Every engine has these, and the first follows CR4 while the guest runs.
        available = (available | {"hypervisor"}) - {"osxsave", "ospke"}
        self.model, wanted = _choose(cpu, available)
        self.features = wanted
        self._apply_features()
        self._apply_xsave()
        self._apply_hypervisor()
        self._apply_brand()

    def apic_id(self, index: int) -> int:
        """The APIC id of processor `index`; with KVM also the id to create its vCPU with."""
        return self.topology.apic_id(index)

    def entries(self, index: int) -> list[CpuidEntry]:
        """The table of processor `index`, by rising leaf and subleaf."""
        table = dict(self._table)
        describe_topology(table, self.topology, self.apic_id(index), index, self.is_amd)
        return [table[key] for key in sorted(table)]

    def kvm_entries(self, index: int) -> list[CpuidEntry2]:
        """The same for `vcpu.cpuid`."""
        from kvmpy._structs import CpuidEntry2

        return [CpuidEntry2(**asdict(entry)) for entry in self.entries(index)]

    def _has(self, name: str) -> bool:
        place = FEATURES[name]
        entry = self._table.get((place.function, place.index))
        return entry is not None and bool(getattr(entry, place.register) >> place.bit & 1)

    def _set(self, function: int, index: int = 0, **registers: int) -> None:
        entry = self._table.get((function, index), CpuidEntry(function, index))
        self._table[function, index] = replace(entry, **registers)

    def _apply_features(self) -> None:
        """Set the bit of every feature that is wanted and clear those of all others."""
        for name, place in FEATURES.items():
            entry = self._table.get((place.function, place.index))
            if entry is None and name not in self.features:
                continue
            value = getattr(entry, place.register) if entry else 0
            bit = 1 << place.bit
            value = value | bit if name in self.features else value & ~bit
            self._set(place.function, place.index, **{place.register: value})
        if self.model != "host":
            for function, index, register in {(f.function, f.index, f.register) for f in FEATURES.values()}:
                self._clear_nameless(function, index, register)
        if self.is_amd and (0x8000_0001, 0) in self._table:
            first, extended = self._table[1, 0].edx, self._table[0x8000_0001, 0].edx
            self._set(0x8000_0001, edx=extended & (first | ~AMD_MIRROR))
        for leaf, owner in LEAF_OF.items():
            if owner not in self.features:
                self._blank(leaf)
        sizes = self._table.get((0x8000_0008, 0))
        if sizes is not None and "la57" not in self.features:
            self._set(0x8000_0008, eax=(sizes.eax & ~0xFF00) | LINEAR_48)
        # A guest that trusts these counts time by them, and the engine's TSC need not run at that rate.
        self._blank(0x15)
        self._blank(0x16)
        # AMD's newer topology leaf would speak of the host's; 0xB says the same of ours.
        self._blank(0x8000_0026)

    def _clear_nameless(self, function: int, index: int, register: str) -> None:
        """A named model has no feature that has no name here."""
        entry = self._table.get((function, index))
        if entry is None:
            return
        place = (function, index, register)
        named = sum(1 << f.bit for f in FEATURES.values() if (f.function, f.index, f.register) == place)
        if function == 0x8000_0001 and register == "edx":
            named |= AMD_MIRROR
        self._set(function, index, **{register: getattr(entry, register) & named})

    def _blank(self, function: int) -> None:
        for key, entry in self._table.items():
            if key[0] == function:
                self._table[key] = CpuidEntry(function, key[1], entry.flags)

    def _apply_xsave(self) -> None:
        """Leaf 0xD offers exactly the state of the features that are there (SDM volume 1, 13.2)."""
        if "xsave" not in self.features:
            self._blank(0xD)
            return
        base = self._table.get((0xD, 0), CpuidEntry(0xD))
        one = self._table.get((0xD, 1), CpuidEntry(0xD, 1))
        owned = sum(XCR0.values())
        user = base.eax | base.edx << 32
        user &= ~owned | sum(mask for name, mask in XCR0.items() if name in self.features)
        user |= 3
        supervisor = one.ecx | one.edx << 32
        supervisor &= ~XSS_OWNED | sum(mask for name, mask in XSS.items() if name in self.features)
        if "xsaves" not in self.features:
            supervisor = 0
        size = XSAVE_LEGACY_SIZE
        for key in [k for k in self._table if k[0] == 0xD and k[1] > 1]:
            component = self._table[key]
            if not (user | supervisor) >> key[1] & 1:
                self._table[key] = CpuidEntry(0xD, key[1], SIGNIFICANT_INDEX)
            elif user >> key[1] & 1:
                size = max(size, component.ebx + component.eax)
        # EBX is for the present XCR0, which is 1 after reset; the engine keeps it current.
        low, high = user & 0xFFFF_FFFF, user >> 32
        self._set(0xD, 0, flags=SIGNIFICANT_INDEX, eax=low, ebx=XSAVE_LEGACY_SIZE, ecx=size, edx=high)
        compact = XSAVE_LEGACY_SIZE if self.features & {"xsavec", "xsaves"} else 0
        self._set(
            0xD, 1, flags=SIGNIFICANT_INDEX, ebx=compact, ecx=supervisor & 0xFFFF_FFFF, edx=supervisor >> 32
        )
        self._set(0, eax=max(self._table[0, 0].eax, 0xD))

    def _apply_hypervisor(self) -> None:
        """The KVM leaves (Documentation/virt/kvm/x86/cpuid.rst), or none when the hypervisor bit is off."""
        if "hypervisor" not in self.features:
            self._table = {k: e for k, e in self._table.items() if not HYPERVISOR <= k[0] <= HYPERVISOR_END}
            return
        ebx, ecx, edx = (int.from_bytes(KVM_SIGNATURE[i : i + 4], "little") for i in (0, 4, 8))
        last = HYPERVISOR_TIMING if self._tsc_khz else HYPERVISOR_FEATURES
        self._set(HYPERVISOR, eax=last, ebx=ebx, ecx=ecx, edx=edx)
        self._set(HYPERVISOR_FEATURES)
        if self._tsc_khz:
            self._set(HYPERVISOR_TIMING, eax=self._tsc_khz, ebx=LAPIC_BUS_KHZ)

    def _apply_brand(self) -> None:
        """A brand string where the engine gives none, and for models, whose name it is."""
        leaves = [self._table.get((BRAND + i, 0), CpuidEntry(BRAND + i)) for i in range(3)]
        if self.model == "host" and any(leaf.eax | leaf.ebx | leaf.ecx | leaf.edx for leaf in leaves):
            return
        text = f"kvmpy {self.model}".encode().ljust(48, b"\0")
        words = [int.from_bytes(text[i : i + 4], "little") for i in range(0, 48, 4)]
        for i in range(3):
            eax, ebx, ecx, edx = words[4 * i : 4 * i + 4]
            self._set(BRAND + i, eax=eax, ebx=ebx, ecx=ecx, edx=edx)
        self._set(0x8000_0000, eax=max(self._table.get((0x8000_0000, 0), CpuidEntry(0)).eax, BRAND + 2))


def _choose(cpu: str, available: frozenset[str]) -> tuple[str, frozenset[str]]:
    """The model and the features that a text like "host,-avx512f" stands for."""
    model, *changes = (part.strip() for part in cpu.split(","))
    model = "x86-64-v1" if model == "x86-64" else model
    models = ["host", *LEVELS]
    if model not in models:
        close = difflib.get_close_matches(model, models, n=3)
        raise ValueError(f"no CPU model is called {model!r}; there are {', '.join(close or models)}")
    added, removed = _changes(changes)
    features = available - ON_REQUEST
    if model != "host":
        level = needed_by(LEVELS[model])
        _demand(model, level - removed, available)
        features = level | (HELPFUL & available) | {"hypervisor"}
    _demand("+" + ", +".join(sorted(added)), needed_by(added), available)
    features = without_orphans((features | needed_by(added)) - removed)
    if lost := added - features:
        raise ValueError(f"{', '.join(sorted(lost))} cannot be had without {', '.join(sorted(removed))}")
    return model, features


def _changes(parts: Sequence[str]) -> tuple[frozenset[str], frozenset[str]]:
    """Features to add and to remove; each part is +name, -name, name=on or name=off. The last one wins."""
    chosen: dict[str, bool] = {}
    for part in filter(None, parts):
        name, _, value = part.lstrip("+-").partition("=")
        if part[0] in "+-" and not value:
            chosen[feature_name(name)] = part[0] == "+"
        elif part[0] not in "+-" and value in ("on", "off"):
            chosen[feature_name(name)] = value == "on"
        else:
            raise ValueError(f"{part!r}: write +feature, -feature, feature=on or feature=off")
    return frozenset(n for n, on in chosen.items() if on), frozenset(n for n, on in chosen.items() if not on)


def _demand(what: str, wanted: frozenset[str], available: frozenset[str]) -> None:
    if missing := sorted(wanted - available):
        raise ValueError(f"cpu {what}: the engine does not support {', '.join(missing)}")
