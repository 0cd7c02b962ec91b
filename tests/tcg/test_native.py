# SPDX-License-Identifier: Apache-2.0
"""The machine half of the software CPU in C, with a toy processor (native/fake_core.h), under the sanitizers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TCG = ROOT / "kvmpy" / "tcg"
NATIVE = Path(__file__).parent / "native"
CFLAGS = ["-std=gnu11", "-g", "-O1", "-pthread", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror"]
CFLAGS += ["-Wno-sign-compare", "-Wno-missing-field-initializers", "-Wno-unknown-warning-option"]
CFLAGS += ["-Wno-gnu-variable-sized-type-not-at-end", "-Wno-unused-command-line-argument"]


def works(compiler: str, flags: list[str], folder: Path) -> bool:
    """Can this compiler make a program that runs with these flags?"""
    source = folder / "probe.c"
    source.write_text("int main(void) { return 0; }\n")
    program = folder / "probe"
    command = [compiler, *flags, "-pthread", str(source), "-o", str(program)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        return False
    return subprocess.run([program], capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module", params=["address,undefined", pytest.param("thread", marks=pytest.mark.slow)])
def build(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """Builds a test program with one kind of sanitizer and gives its path."""
    sanitizer = f"-fsanitize={request.param}"
    folder = tmp_path_factory.mktemp("native")
    found = [name for name in ("cc", "clang", "clang-14") if shutil.which(name)]
    compiler = next((name for name in found if works(name, [sanitizer], folder)), None)
    if compiler is None:
        pytest.skip(f"no C compiler here has {sanitizer}")
    common = [compiler, *CFLAGS, sanitizer, f"-I{ROOT / 'kvmpy'}", f"-I{TCG}", f"-I{NATIVE}"]
    sources = [TCG / name for name in (TCG / "machine_sources.txt").read_text().split()] + [NATIVE / "fake_core.c"]
    objects = []
    for source in sources:
        target = folder / f"{source.stem}.o"
        subprocess.run([*common, "-c", str(source), "-o", str(target)], check=True)
        objects.append(str(target))

    def make(name: str) -> Path:
        program = folder / name
        subprocess.run([*common, str(NATIVE / f"{name}.c"), *objects, "-o", str(program)], check=True)
        return program

    return make


@pytest.mark.parametrize("name", ["test_chips", "test_machine", "test_threads"])
def test_native(build, name):
    result = subprocess.run([build(name)], capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stderr
    assert "WARNING: ThreadSanitizer" not in result.stderr
