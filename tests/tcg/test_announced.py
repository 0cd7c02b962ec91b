# SPDX-License-Identifier: Apache-2.0
"""CPUID and the processor agree: what is announced works, what is not announced raises #UD or cannot be switched on."""

from __future__ import annotations

import sys
from pathlib import Path

import lab
import pytest
from lab import GP, UD

from kvmpy.arch.cpuid import FEATURES, without_orphans
from kvmpy.boot.cpuid import CpuidPolicy
from kvmpy.engines import open_kvm

sys.path.insert(0, str(Path(__file__).parents[2] / "kvmpy" / "tcg"))
import optable

# The gate of a row in the table by the name of its CPUID bit, where the two differ.
GATES = {"pni": "sse3", "sse4_1": "sse41", "sse4_2": "sse42", "pclmulqdq": "pclmul", "sha_ni": "sha", "abm": "lzcnt",
         "lahf_lm": "lahf", "sep": "sysenter", "lm": "longmode", "vpclmulqdq": "vpclmul"}  # fmt: skip
# Gates that no CPUID bit opens: VMCALL works on every engine.
ALWAYS = {"vmcall"}
# Bits of CPUID without an instruction of their own: a control bit, an MSR, a device, a promise.
BEHAVIOUR = {
    *(name for name, place in FEATURES.items() if place.function == 0x4000_0001),
    *("3dnowprefetch", "apic", "arat", "arch_capabilities", "bhi_ctrl", "de", "erms", "fsrm", "hypervisor"),
    *("intel_stibp", "invtsc", "la57", "mca", "mcdt_no", "mce", "mtrr", "nx", "pae", "pat", "pcid", "pdpe1gb"),
    *("pge", "pse", "pse36", "smep", "spec_ctrl", "ssbd", "tsc_adjust", "tsc_deadline_timer", "umip", "vme"),
    *("x2apic", "xgetbv1"),
}

# An instruction of each, and one that raises nothing: RSI points to 64-byte aligned memory.
SAMPLES = {
    "adx": "adcx eax, ecx",
    "aes": "aesenc xmm0, xmm1",
    "avx": "vaddps ymm0, ymm1, ymm2",
    "avx2": "vpaddd ymm0, ymm1, ymm2",
    "bmi1": "andn eax, ecx, edx",
    "bmi2": "pdep eax, ecx, edx",
    "clflush": "clflush [rsi]",
    "clflushopt": "clflushopt [rsi]",
    "clwb": "clwb [rsi]",
    "cmov": "cmovz eax, ecx",
    "cx16": "cmpxchg16b [rsi]",
    "cx8": "cmpxchg8b [rsi]",
    "f16c": "vcvtph2ps xmm0, xmm1",
    "fma": "vfmadd132ps xmm0, xmm1, xmm2",
    "fpu": "fld1",
    "fsgsbase": "rdfsbase rax",
    "fxsr": "fxsave [rsi]",
    "invpcid": "invpcid rax, [rsi+4096]",
    "lahf_lm": "lahf",
    "mmx": "paddb mm0, mm1",
    "monitor": "monitor",
    "movbe": "movbe eax, [rsi]",
    "msr": "rdmsr",
    "pclmulqdq": "pclmulqdq xmm0, xmm1, 0",
    "pku": "rdpkru",
    "pni": "haddps xmm0, xmm1",
    "popcnt": "popcnt eax, ecx",
    "rdpid": "rdpid rax",
    "rdrand": "rdrand eax",
    "rdseed": "rdseed eax",
    "rdtscp": "rdtscp",
    "serialize": "serialize",
    "sha_ni": "sha1msg1 xmm0, xmm1",
    "smap": "clac",
    "sse": "addps xmm0, xmm1",
    "sse2": "addpd xmm0, xmm1",
    "sse4_1": "ptest xmm0, xmm1",
    "sse4_2": "pcmpgtq xmm0, xmm1",
    "ssse3": "pabsb xmm0, xmm1",
    "tsc": "rdtsc",
    "vaes": "vaesenc ymm0, ymm1, ymm2",
    "vpclmulqdq": "vpclmulqdq ymm0, ymm1, ymm2, 0",
    "xsave": "xsave [rsi]",
    "xsavec": "xsavec [rsi]",
    "xsaveopt": "xsaveopt [rsi]",
    "xsaves": "xsaves [rsi]",
}
# Not to be had by themselves: SYSCALL and SYSENTER leave, LZCNT is BSR without its bit, LM is there when this runs.
ELSEWHERE = {"syscall", "sep", "abm", "lm"}
CR4_BITS = {"vme": 0, "umip": 11, "fsgsbase": 16, "pcid": 17, "xsave": 18, "smep": 20, "smap": 21, "pku": 22}

GUEST = """
start:
    mov rax, cr4
    or eax, 0x600
    mov cr4, rax
    mov rax, cr4
    bts eax, 18
    TRY mov cr4, rax
    mov rax, cr4
    bts eax, 22
    TRY mov cr4, rax
    mov rax, cr4
    bts eax, 16
    TRY mov cr4, rax
    xor ecx, ecx
    mov eax, 1
    xor edx, edx
    TRY xsetbv
    mov eax, 3
    TRY xsetbv
    mov eax, 7
    TRY xsetbv
    mov esi, 0x50000
"""


def supported() -> frozenset[str]:
    """All that the software CPU has here."""
    with open_kvm("tcg") as kvm:
        return CpuidPolicy(kvm.get_supported_cpuid(), "host,+la57,+monitor").features


def outcome(cpu: str, *instructions: str) -> list[int]:
    """What instructions give on a processor."""
    ready = "xor eax, eax\n xor edx, edx\n xor ecx, ecx"
    body = "\n".join(f"{ready}\n mov ecx, {0x10 if text == 'rdmsr' else 0}\n TRIED {text}" for text in instructions)
    return lab.run("tcg", f"{GUEST}\n{body}\n DONE", cpu=cpu)


def test_every_gate_is_announced_and_whole():
    rows = optable.load()
    gates = {gate for row in rows for gate in row.features}
    announced = {GATES.get(name, name) for name in supported()}
    assert gates - announced - ALWAYS == set()
    assert optable.missing(rows) == []


def test_every_announced_bit_is_accounted_for():
    assert supported() - set(SAMPLES) - BEHAVIOUR - ELSEWHERE == set()


def test_what_is_announced_works():
    has = supported()
    names = [name for name in SAMPLES if name in has]
    assert len(names) > 40
    results = outcome("host,+monitor", *(SAMPLES[name] for name in names))
    assert [name for name, result in zip(names, results, strict=True) if result != lab.NONE] == []


@pytest.mark.parametrize("name", sorted(set(SAMPLES) - {"fpu"}))
def test_what_is_taken_away_is_gone(name):
    """#UD without the bit, and what needs that feature goes with it."""
    has = supported()
    if name not in has:
        pytest.skip(f"no {name} on this host")
    left = without_orphans(has - {name})
    lost = [other for other in SAMPLES if other in has - left and other not in ("sse", "fxsr", "fpu", "mmx", "msr")]
    results = outcome(f"host,-{name}", *(SAMPLES[other] for other in lost))
    assert [other for other, result in zip(lost, results, strict=True) if result != UD] == []


@pytest.mark.parametrize("name", sorted(CR4_BITS))
def test_control_bits_follow(name):
    bit = CR4_BITS[name]
    not_user = "and byte [0x9000], ~4\n mov rax, cr3\n mov cr3, rax"  # what SMEP and SMAP forbid
    body = f"start:\n {not_user}\n mov rax, cr4\n bts eax, {bit}\n TRIED mov cr4, rax\n DONE"
    assert lab.run("tcg", body) == [lab.NONE]
    assert lab.run("tcg", body, cpu=f"host,-{name}") == [GP]


def test_xsaves_and_xrstors():
    """The compacted format and no other; IA32_XSS has no bits."""
    body = """
    vpcmpeqb ymm1, ymm1, ymm1
    mov eax, 7
    xor edx, edx
    TRIED xsaves [rsi]
    SAVE [rsi+512]
    SAVE [rsi+520]
    vpxor ymm1, ymm1, ymm1
    mov eax, 7
    TRIED xrstors [rsi]
    vextracti128 xmm2, ymm1, 1
    movq rbx, xmm2
    SAVE rbx
    mov qword [rsi+520], 0
    mov eax, 7
    TRIED xrstors [rsi]
    TRIED xrstor [rsi]
    mov ecx, 0xda0
    mov eax, 0x100
    TRIED wrmsr
    DONE
    """
    results = lab.run("tcg", GUEST + body)
    assert results == [lab.NONE, 7, 7 | 1 << 63, lab.NONE, 0xFFFF_FFFF_FFFF_FFFF, GP, lab.NONE, GP]
