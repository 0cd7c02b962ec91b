# SPDX-License-Identifier: Apache-2.0
"""Processor topology in CPUID: threads, cores and sockets, APIC ids, and the leaves that tell of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvmpy.arch.cpuid import FEATURES

SIGNIFICANT_INDEX = 1  # KVM_CPUID_FLAG_SIGNIFCANT_INDEX: the answer depends on ECX


@dataclass(frozen=True, slots=True)
class CpuidEntry:
    """The answer to CPUID for one leaf and subleaf; fields as in `struct kvm_cpuid_entry2`."""

    function: int
    index: int = 0
    flags: int = 0
    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0


@dataclass(frozen=True, slots=True)
class Topology:
    """`cpus` processors: `threads` per core, cores filling up to `sockets` packages evenly."""

    cpus: int = 1
    threads: int = 1
    sockets: int = 1

    def __post_init__(self) -> None:
        if min(self.cpus, self.threads, self.sockets) < 1 or self.cpus % (self.threads * self.sockets):
            raise ValueError(
                f"{self.cpus} processors do not make {self.sockets} sockets of {self.threads}-thread cores"
            )

    @property
    def cores(self) -> int:
        """Cores per socket."""
        return self.cpus // (self.threads * self.sockets)

    @property
    def thread_bits(self) -> int:
        """Bits of the APIC id that number the threads of a core."""
        return (self.threads - 1).bit_length()

    @property
    def package_bits(self) -> int:
        """Bits of the APIC id that number the processors of a socket."""
        return self.thread_bits + (self.cores - 1).bit_length()

    def apic_id(self, index: int) -> int:
        """The APIC id of processor `index`: socket, core and thread in bit fields (SDM volume 3, 9.9.1)."""
        if not 0 <= index < self.cpus:
            raise ValueError(f"processor {index} of {self.cpus}")
        core, thread = divmod(index, self.threads)
        socket, core = divmod(core, self.cores)
        return socket << self.package_bits | core << self.thread_bits | thread


def describe_topology(
    table: dict[tuple[int, int], CpuidEntry], topology: Topology, apic_id: int, index: int, is_amd: bool
) -> None:
    """The leaves that say who this processor is and what it shares (SDM volume 3, 9.9; APM volume 3, E.5)."""
    t = topology
    per_package = t.cores * t.threads
    addressable = 1 << t.package_bits

    def put(function: int, sub: int = 0, **registers: int) -> None:
        table[function, sub] = replace(table.get((function, sub), CpuidEntry(function, sub)), **registers)

    one = table[1, 0]
    count = per_package if is_amd else addressable
    ebx = one.ebx & 0xFFFF | min(count, 255) << 16 | (apic_id & 0xFF) << 24
    ht = 1 << FEATURES["ht"].bit
    put(1, ebx=ebx, edx=one.edx | ht if per_package > 1 else one.edx & ~ht)

    levels = ((t.thread_bits, t.threads, 1), (t.package_bits, per_package, 2), (0, 0, 0))
    leaves = [0xB]
    if table[0, 0].eax >= 0x1F and (0x1F, 0) in table:
        leaves.append(0x1F)
    for leaf in leaves:
        for key in [k for k in table if k[0] == leaf]:
            del table[key]
        for sub, (shift, processors, kind) in enumerate(levels):
            table[leaf, sub] = CpuidEntry(
                leaf, sub, SIGNIFICANT_INDEX, shift, processors, sub | kind << 8, apic_id
            )
    put(0, eax=max(table[0, 0].eax, 0xB))

    for (leaf, sub), entry in list(table.items()):
        if leaf in (4, 0x8000_001D) and entry.eax & 0x1F:
            level = entry.eax >> 5 & 7
            shares = (t.threads if level < 3 else per_package) if is_amd else (
                1 << (t.thread_bits if level < 3 else t.package_bits)
            )  # fmt: skip
            eax = entry.eax & 0x3FFF | (min(shares, 4096) - 1) << 14
            if leaf == 4:
                eax |= min((1 << t.package_bits - t.thread_bits) - 1, 63) << 26
            put(leaf, sub, eax=eax)
    if is_amd and (0x8000_0008, 0) in table:
        sizes = table[0x8000_0008, 0]
        bits = t.package_bits
        put(0x8000_0008, ecx=sizes.ecx & ~0xF0FF | min(per_package - 1, 255) | bits << 12)
        extended = table[0x8000_0001, 0]
        legacy = 1 << FEATURES["cmp_legacy"].bit
        put(0x8000_0001, ecx=extended.ecx | legacy if per_package > 1 else extended.ecx & ~legacy)
        core = index // t.threads % t.cores
        socket = index // per_package
        put(0x8000_001E, eax=apic_id, ebx=core & 0xFF | t.threads - 1 << 8, ecx=socket & 0xFF, edx=0)
