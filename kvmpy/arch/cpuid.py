# SPDX-License-Identifier: Apache-2.0
"""CPUID features by name: which bit of which leaf, other names, and what each one needs.

Names are those of Linux' /proc/cpuinfo, in lower case with underscores; where Linux shows none, the SDM's or
APM's. Bits: SDM volume 2, CPUID; APM volume 3, appendix E; kernel Documentation/virt/kvm/x86/cpuid.rst.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Feature:
    """A feature's place: CPUID leaf and subleaf, "eax" to "edx", bit number."""

    function: int
    index: int
    register: str
    bit: int


# Names in the order of the bits; "-" is a bit that is reserved or no feature.
_WORDS: dict[tuple[int, int, str], str] = {
    (1, 0, "edx"): (
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - ds acpi "
        "mmx fxsr sse sse2 ss ht tm ia64 pbe"
    ),
    (1, 0, "ecx"): (
        "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca "
        "sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand "
        "hypervisor"
    ),
    (6, 0, "eax"): ("dtherm ida arat - pln ecmd pts hwp hwp_notify hwp_act_window hwp_epp hwp_pkg_req"),
    (7, 0, "ebx"): (
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm "
        "zero_fcs_fds mpx rdt_a avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb intel_pt "
        "avx512pf avx512er avx512cd sha_ni avx512bw avx512vl"
    ),
    (7, 0, "ecx"): (
        "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq "
        "avx512_vnni avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid kl bus_lock_detect "
        "cldemote - movdiri movdir64b enqcmd sgx_lc pks"
    ),
    (7, 0, "edx"): (
        "- sgx_keys avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl md_clear "
        "rtm_always_abort - tsx_force_abort serialize hybrid tsxldtrk - pconfig arch_lbr ibt - amx_bf16 "
        "avx512_fp16 amx_tile amx_int8 spec_ctrl intel_stibp flush_l1d arch_capabilities "
        "core_capabilities ssbd"
    ),
    (7, 1, "eax"): (
        "sha512 sm3 sm4 rao_int avx_vnni avx512_bf16 lass cmpccxadd arch_perfmon_ext - fzrm fsrs fsrc - - "
        "- - fred lkgs wrmsrns nmi_src amx_fp16 hreset avx_ifma - - lam msrlist"
    ),
    (7, 1, "edx"): (
        "- - - - avx_vnni_int8 avx_ne_convert - - amx_complex - avx_vnni_int16 - - - prefetchiti - - - "
        "cet_sss avx10"
    ),
    (7, 2, "edx"): ("psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no"),
    (0xD, 1, "eax"): ("xsaveopt xsavec xgetbv1 xsaves xfd"),
    (0x4000_0001, 0, "eax"): (
        "kvmclock kvm_nopiodelay kvm_mmu kvmclock2 kvm_asyncpf kvm_steal_time kvm_pv_eoi kvm_pv_unhalt - "
        "kvm_pv_tlb_flush kvm_asyncpf_vmexit kvm_pv_ipi kvm_poll_control kvm_pv_sched_yield "
        "kvm_asyncpf_int kvm_msi_ext_dest_id kvm_hc_map_gpa_range kvm_migration_control - - - - - - "
        "kvmclock_stable"
    ),
    (0x4000_0001, 0, "edx"): ("kvm_hint_dedicated"),
    (0x8000_0001, 0, "edx"): (
        "- - - - - - - - - - - syscall - - - - - - - mp nx - mmxext - - fxsr_opt pdpe1gb rdtscp - lm "
        "3dnowext 3dnow"
    ),
    (0x8000_0001, 0, "ecx"): (
        "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop "
        "skinit wdt - lwp fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc "
        "perfctr_llc mwaitx"
    ),
    (0x8000_0007, 0, "ebx"): ("overflow_recov succor - smca"),
    (0x8000_0007, 0, "edx"): ("- - - - - - - - invtsc"),
    (0x8000_0008, 0, "ebx"): (
        "clzero irperf xsaveerptr - rdpru - - - mcommit wbnoinvd - - ibpb - ibrs stibp - stibp_always_on "
        "- - - - - ppin amd_ssbd virt_ssbd amd_ssb_no cppc amd_psfd btc_no ibpb_ret"
    ),
    (0x8000_0021, 0, "eax"): (
        "no_nested_data_bp - lfence_serializing - - - null_sel_clr_base - autoibrs no_smm_ctl_msr - - - - "
        "- - - - - - prefetchi - - - - - - sbpb ibpb_brtype srso_no"
    ),
}

FEATURES: dict[str, Feature] = {
    name: Feature(*place, bit)
    for place, names in _WORDS.items()
    for bit, name in enumerate(names.split())
    if name != "-"
}

# What other lists (QEMU, the SDM, compilers) call them.
ALIASES = {
    "sse3": "pni",
    "pclmul": "pclmulqdq",
    "pclmuldq": "pclmulqdq",
    "lzcnt": "abm",
    "sha": "sha_ni",
    "avx512_ifma": "avx512ifma",
    "avx512_vbmi": "avx512vbmi",
    "tsc_deadline": "tsc_deadline_timer",
    "cmpxchg16b": "cx16",
    "cmpxchg8b": "cx8",
    "htt": "ht",
    "lahf": "lahf_lm",
    "constant_tsc": "invtsc",
    "nonstop_tsc": "invtsc",
    "clfsh": "clflush",
    "xd": "nx",
    "monitor_mwait": "monitor",
    "stibp_intel": "intel_stibp",
    "sse4a_amd": "sse4a",
    "dts": "ds",
}

# A feature is of no use, or breaks what software expects, without those that it needs (SDM volume 1,
# chapters 10 to 19).
_NEEDS = {
    "fxsr": "fpu",
    "mmx": "fpu",
    "sse": "fxsr",
    "sse2": "sse",
    "pni": "sse2",
    "ssse3": "pni",
    "sse4_1": "ssse3",
    "sse4_2": "sse4_1",
    "sse4a": "pni",
    "pclmulqdq": "sse2",
    "aes": "sse2",
    "sha_ni": "sse2",
    "gfni": "sse2",
    "mmxext": "mmx",
    "fxsr_opt": "fxsr",
    "xsave": "fxsr",
    "3dnow": "mmx",
    "3dnowext": "3dnow",
    "xsaveopt": "xsave",
    "xsavec": "xsave",
    "xgetbv1": "xsave",
    "xsaves": "xsave xsavec",
    "xfd": "xsave xgetbv1",
    "osxsave": "xsave",
    "avx": "xsave sse4_2",
    "fma": "avx",
    "f16c": "avx",
    "avx2": "avx",
    "xop": "avx",
    "fma4": "avx",
    "vaes": "avx aes",
    "vpclmulqdq": "avx pclmulqdq",
    "avx_vnni": "avx2",
    "avx_ifma": "avx2",
    "avx_vnni_int8": "avx2",
    "avx_vnni_int16": "avx2",
    "avx_ne_convert": "avx2",
    "sha512": "avx2",
    "sm3": "avx",
    "sm4": "avx2",
    "avx512f": "avx2 fma f16c",
    "avx512pf": "avx512f",
    "avx512er": "avx512f",
    "avx512cd": "avx512f",
    "avx512dq": "avx512f",
    "avx512bw": "avx512f",
    "avx512vl": "avx512f",
    "avx512ifma": "avx512f",
    "avx512vbmi": "avx512bw",
    "avx512_vbmi2": "avx512bw",
    "avx512_bitalg": "avx512bw",
    "avx512_vnni": "avx512f",
    "avx512_vpopcntdq": "avx512f",
    "avx512_4vnniw": "avx512f",
    "avx512_4fmaps": "avx512f",
    "avx512_bf16": "avx512bw",
    "avx512_fp16": "avx512bw avx512vl",
    "avx512_vp2intersect": "avx512f",
    "avx10": "avx512f",
    "amx_tile": "xfd",
    "amx_bf16": "amx_tile",
    "amx_int8": "amx_tile",
    "amx_fp16": "amx_tile",
    "amx_complex": "amx_tile",
    "pku": "xsave",
    "ospke": "pku",
    "mpx": "xsave",
    "shstk": "xsaves",
    "enqcmd": "xsaves",
    "uintr": "xsaves",
    "invpcid": "pcid",
    "x2apic": "apic",
    "tsc_deadline_timer": "apic tsc",
    "rdtscp": "tsc",
    "la57": "lm",
    "lm": "pae",
    "pdpe1gb": "lm",
    "svm": "lm",
    "hle": "rtm",
    "tsxldtrk": "rtm",
    "sgx_lc": "sgx",
    "sgx_keys": "sgx",
    "fred": "lkgs",
}
NEEDS: dict[str, frozenset[str]] = {name: frozenset(needs.split()) for name, needs in _NEEDS.items()}

# The micro-architecture levels of the x86-64 psABI, each with those before it, on top of what every 64-bit
# operating system takes for granted.
_V1 = [
    "fpu",
    "de",
    "pse",
    "tsc",
    "msr",
    "pae",
    "mce",
    "cx8",
    "apic",
    "sep",
    "pge",
    "mca",
    "cmov",
    "pat",
    "clflush",
    "mmx",
    "fxsr",
    "sse",
    "sse2",
    "syscall",
    "nx",
    "lm",
]
_V2 = ["cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"]
_V3 = ["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"]
_V4 = ["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"]
LEVELS: dict[str, frozenset[str]] = {
    "x86-64-v1": frozenset(_V1),
    "x86-64-v2": frozenset(_V1 + _V2),
    "x86-64-v3": frozenset(_V1 + _V2 + _V3),
    "x86-64-v4": frozenset(_V1 + _V2 + _V3 + _V4),
}


def feature_name(text: str) -> str:
    """The name in `FEATURES` for a feature as people write it ("SSE4.1", "tsc-deadline", "sse3").

    Raises ValueError with the closest names when there is none.
    """
    name = text.strip().lower().replace("-", "_").replace(".", "_")
    name = ALIASES.get(name, name)
    if name not in FEATURES:
        close = difflib.get_close_matches(name, [*FEATURES, *ALIASES], n=4, cutoff=0.6)
        hint = f"; close to it are {', '.join(close)}" if close else ""
        raise ValueError(f"no CPU feature is called {text!r}{hint}")
    return name


def needed_by(names: frozenset[str]) -> frozenset[str]:
    """`names` and everything that they need."""
    result = set(names)
    todo = list(names)
    while todo:
        for need in NEEDS.get(todo.pop(), ()):
            if need not in result:
                result.add(need)
                todo.append(need)
    return frozenset(result)


def without_orphans(names: frozenset[str]) -> frozenset[str]:
    """`names` without those that need something which is not among them."""
    result = set(names)
    while lost := {name for name in result if not NEEDS.get(name, frozenset()) <= result}:
        result -= lost
    return frozenset(result)
