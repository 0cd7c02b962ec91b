# SPDX-License-Identifier: Apache-2.0
"""The numbers of the KVM layer are those of the system's own <linux/kvm.h>, as a C compiler sees it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from kvmpy import _constants, _structs

COMPILER = shutil.which("cc")
PACKAGE = Path(_structs.__file__).parent

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C compiler")

CLASSES = [v for v in vars(_structs).values() if isinstance(v, type) and issubclass(v, _structs.Struct)]


def ask(tmp_path: Path, questions: dict[str, str], includes: str) -> dict[str, int]:
    """What C says each expression is."""
    lines = [
        f'    printf("{name} %llu\\n", (unsigned long long)({expression}));' for name, expression in questions.items()
    ]
    source = tmp_path / "ask.c"
    program = ["#include <stdio.h>", "#include <stddef.h>", includes, "int main(void)", "{", *lines, "}"]
    source.write_text("\n".join(program))
    command = [COMPILER, "-w", f"-I{PACKAGE}", "-o", tmp_path / "ask", source]
    subprocess.run(command, check=True, timeout=120)
    out = subprocess.run([tmp_path / "ask"], check=True, capture_output=True, text=True, timeout=60).stdout
    return {name: int(value) for name, value in (line.split() for line in out.splitlines())}


def test_sizes_and_offsets(tmp_path):
    questions, expected = {}, {}
    for cls in CLASSES:
        if cls is _structs.Struct or not cls.layout.origin.startswith("struct "):
            continue
        questions[cls.__name__] = f"sizeof({cls.layout.origin})"
        expected[cls.__name__] = cls.layout.size
        for name, field in cls.layout.fields.items():
            if not field.alias:
                key = f"{cls.__name__}.{name}"
                origin = cls.layout.origin
                questions[key] = f"offsetof({origin}, {name}) << 16 | sizeof((({origin} *)0)->{name})"
                expected[key] = field.offset << 16 | field.size
    assert len(expected) > 200
    assert ask(tmp_path, questions, "#include <linux/kvm.h>") == expected


def test_every_field_of_a_structure_is_named_or_reserved():
    """What no field covers is padding: 8 bytes at most in a row, but for the areas that the kernel reserves."""
    reserved = {"Debugregs", "VcpuEvents", "Xcrs", "PitState2", "X86Mce", "XenHvmConfig"}
    for cls in CLASSES:
        if cls is _structs.Struct or cls.__name__ in reserved:
            continue
        covered = [False] * cls.layout.size
        for field in cls.layout.fields.values():
            covered[field.offset : field.offset + field.size] = [True] * field.size
        gaps = "".join("x" if byte else "." for byte in covered).split("x")
        assert max(map(len, gaps)) <= 16, cls


def names() -> dict[str, int]:
    numbers = {f"KVM_CAP_{cap.name}": int(cap) for cap in _constants.Cap}
    numbers |= _constants.IOCTLS
    numbers |= {n: v for n, v in vars(_constants).items() if n.startswith(("KVM_", "GUEST_MEMFD_"))}
    return numbers


def test_constants_are_those_of_the_header(tmp_path):
    """With kvm_compat.h; a header that has a name itself wins, and must agree with what was built."""
    questions = {name: f"(__u64)({name})" for name in names()}
    assert ask(tmp_path, questions, '#include "kvm_compat.h"') == names()


def test_request_numbers_are_unique():
    assert len(set(_constants.IOCTLS.values())) == len(_constants.IOCTLS) >= 107


def test_kvm_compat_adds_only_what_the_header_lacks(tmp_path):
    """Every name that it defines stands under #ifndef, so that a newer header is never contradicted."""
    depth = 0
    for line in (PACKAGE / "kvm_compat.h").read_text().splitlines():
        if line.startswith(("#if", "#ifndef")):
            depth += 1
        elif line.startswith("#endif"):
            depth -= 1
        elif line.startswith("#define") and "KVMPY_" not in line:
            assert depth >= 2, line
