# SPDX-License-Identifier: Apache-2.0
"""State that the software CPU only carries for the processor it assists: the upper halves of AVX-512's registers."""

from __future__ import annotations

import pytest

import kvmpy
from kvmpy._exits import Hlt
from kvmpy.vcpu.partner import CAP_ASSIST

CODE, DATA = 0x1000, 0x2000
SSE_AVX, ZMM_HI256 = 0x7, 0x40
PRESENT = 512  # XSTATE_BV in an XSAVE area
AVX_END = 832
UPPER = 32  # bytes of a register above AVX's

# What runs, and the registers whose upper halves it zeroes (SDM vol. 1, 15.5: a VEX instruction zeroes its
# destination up to the end).
CASES = {
    "vaddps ymm1, ymm2, ymm3": ("c5ec58cb", {1}),
    "vaddps xmm9, xmm2, xmm3": ("c56858cb", {9}),
    "vmovups xmm4, [0x2000]": ("c5f8102425 00200000", {4}),
    "vmovd xmm5, eax": ("c5f96ee8", {5}),
    "vmovups ymm5, ymm4": ("c5fc11e5", {5}),  # in the store's encoding
    "vpsrlw ymm6, ymm7, 1": ("c5cd71d701", {6}),
    "vzeroupper": ("c5f877", set(range(16))),
    "vzeroall": ("c5fc77", set(range(16))),
    "vmovups [0x2000], ymm4": ("c5fc112425 00200000", set()),
    "vmovd eax, xmm5": ("c5f97ee8", set()),
    "vptest ymm1, ymm2": ("c4e27d17ca", set()),
    "vucomiss xmm1, xmm2": ("c5f82eca", set()),
    "addps xmm1, xmm2": ("0f58ca", set()),
    "andn eax, ebx, ecx": ("c4e260f2c1", set()),
}


@pytest.fixture
def vcpu():
    pytest.importorskip("kvmpy.tcg._tcg")
    with kvmpy.Vm("tcg") as vm:
        vm.add_ram(0, size=0x10000)
        vcpu = vm.create_vcpu()
        vcpu.cpuid = vm.kvm.get_supported_cpuid()
        vcpu.enter_long_mode(CODE)
        sregs = vcpu.sregs
        sregs.cr4 |= 1 << 9 | 1 << 18  # OSFXSR, OSXSAVE
        vcpu.sregs = sregs
        xcrs = vcpu.xcrs
        xcrs.nr_xcrs, xcrs.xcrs[0].value = 1, SSE_AVX
        vcpu.xcrs = xcrs
        vcpu.enable_cap(CAP_ASSIST, 100, ZMM_HI256)
        yield vcpu


def fill(vcpu) -> slice:
    """Ones into all upper halves; where they are in the XSAVE area, which is the host's business."""
    raw = bytearray(bytes(vcpu.xsave))
    raw[PRESENT] |= ZMM_HI256
    raw[AVX_END:] = b"\xff" * (len(raw) - AVX_END)
    vcpu.xsave = type(vcpu.xsave).from_bytes(bytes(raw))
    start = bytes(vcpu.xsave).find(b"\xff", AVX_END)
    if start < 0:
        pytest.skip("this processor has no AVX-512")
    return slice(start, start + 16 * UPPER)


@pytest.mark.parametrize("instruction", CASES)
def test_vex_instructions_zero_the_upper_halves_of_what_they_write(vcpu, instruction):
    code, zeroed = CASES[instruction]
    vcpu.vm.memory.write(CODE, bytes.fromhex(code) + b"\xf4")
    place = fill(vcpu)
    assert vcpu.run() == Hlt()
    upper = bytes(vcpu.xsave)[place]
    found = [upper[n * UPPER : (n + 1) * UPPER] for n in range(16)]
    assert set(found) <= {bytes(UPPER), b"\xff" * UPPER}
    assert {n for n, half in enumerate(found) if half == bytes(UPPER)} == zeroed


def test_whoever_carries_nothing_zeroes_nothing(vcpu):
    """The micro-op is there for an assisted processor alone: without a carried component the area does not exist."""
    vcpu.enable_cap(CAP_ASSIST, 100, 1 << 62)  # no such component
    vcpu.vm.memory.write(CODE, bytes.fromhex(CASES["vaddps ymm1, ymm2, ymm3"][0]) + b"\xf4")
    assert vcpu.run() == Hlt()
    assert bytes(vcpu.xsave)[AVX_END:] == bytes(len(bytes(vcpu.xsave)) - AVX_END)
