# SPDX-License-Identifier: Apache-2.0
"""Which C files of the software CPU another host could compile today, and that the others say what they lack.

Needs gcc-aarch64-linux-gnu; only the compiler runs.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

TCG = Path(__file__).parents[2] / "kvmpy" / "tcg"
GCC = "aarch64-linux-gnu-gcc"
# Floating point and vectors run the host's own instructions (fphost.h).
HOST_UNIT = {"fphost.c", "interp.c"} | {
    path.name for pattern in ("ops_x87*.c", "ops_mmx.c", "ops_sse*.c", "ops_avx.c") for path in TCG.glob(pattern)
}
HOST_UNIT |= {"ops_crypto.c", "ops_fma.c", "ops_xsave.c", "cpuid.c"}
# These use structures and constants of <asm/kvm.h>, which describe the host's kind of processor.
X86_ABI = {"mmu.c"}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(GCC) is None, reason=f"no {GCC} (Debian package gcc-aarch64-linux-gnu)"),
]


def compiles(name: str) -> subprocess.CompletedProcess:
    """What the cross compiler says of a file."""
    flags = ["-std=gnu11", "-O1", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"]
    flags += ["-Wno-missing-field-initializers", "-Wno-sign-compare", f"-I{TCG.parent}"]
    return subprocess.run([GCC, *flags, str(TCG / name)], capture_output=True, text=True, check=False)


def sources(which: str) -> list[str]:
    """The files of one half."""
    return (TCG / which).read_text().split()


@pytest.mark.parametrize("name", [name for name in sources("core_sources.txt") if name not in HOST_UNIT | X86_ABI])
def test_integer_core_compiles(name):
    done = compiles(name)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", sorted(HOST_UNIT))
def test_floating_point_says_what_it_lacks(name):
    assert "execute the host's own x86-64 instructions; no portable version exists yet" in compiles(name).stderr


def test_machine_says_what_it_lacks():
    assert "kvmpy knows the KVM ABI of x86-64 only" in compiles("run.c").stderr
