# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from kvmpy.arch import msr


@pytest.mark.parametrize(
    ("index", "name"),
    [
        (0xC000_0080, "IA32_EFER"),
        (0x1B, "IA32_APIC_BASE"),
        (0x202, "IA32_MTRR_PHYSBASE1"),
        (0x203, "IA32_MTRR_PHYSMASK1"),
        (0x26F, "IA32_MTRR_FIX4K_F8000"),
        (0x405, "IA32_MC1_STATUS"),
        (0x830, "IA32_X2APIC_ICR"),
        (0x827, "IA32_X2APIC_IRR7"),
        (0x4B56_4D01, "MSR_KVM_SYSTEM_TIME_NEW"),
        (0xDEAD, "0xdead"),
    ],
)
def test_names(index: int, name: str) -> None:
    assert msr.msr_name(index) == name


def test_every_name_is_there_once() -> None:
    assert len(msr.INDEXES) == len(msr.NAMES)
