# SPDX-License-Identifier: Apache-2.0
"""x87, MMX, SSE and AVX of the software CPU against the host's processor, every form in the table.

For a long run: python tests/tcg/vectors.py SEED 1000 | vector_diff SEED 1000
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TCG = HERE.parents[1] / "kvmpy" / "tcg"
sys.path.insert(0, str(HERE))
import vectors  # noqa: E402

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("cc") is None,
    reason="compares with an x86-64 host; needs a C compiler",
)
STATES = 25


@pytest.fixture(scope="module")
def vector_diff(tmp_path_factory):
    """The core and the driver as one program."""
    folder = tmp_path_factory.mktemp("vectors")
    vectors.optable.main(str(TCG))
    sources = [TCG / name for name in (TCG / "core_sources.txt").read_text().split()]
    sources.append(HERE / "native" / "vector_diff.c")

    def compile_one(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        subprocess.run(["cc", "-std=gnu11", "-O1", "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    program = folder / "vector_diff"
    subprocess.run(["cc", *objects, "-lpthread", "-o", str(program)], check=True)
    return program


def test_every_form_is_in_the_cases():
    """Nothing of this family is left out but what the host cannot run."""
    host = vectors.host_features()
    names = {row.handler for row in vectors.rows(host)}
    for row in vectors.optable.load():
        if row.attributes & vectors.CLASSES and row.handler not in names:
            assert any(vectors.HOST_FLAGS.get(f, f) not in host for f in row.features)
    assert len(names) > 200


@pytest.mark.parametrize("seed", [1, 2])
def test_host_and_software_agree(vector_diff, seed):
    cases = vectors.cases(seed, 4)
    command = [vector_diff, str(seed), str(STATES)]
    result = subprocess.run(command, input=cases, capture_output=True, timeout=900, check=False)
    output = result.stdout.decode()
    summary = re.search(r"(\d+) runs, (\d+) faults on the host, (\d+) differences", output)
    assert summary, output + result.stderr.decode()
    assert int(summary[1]) == len(cases) // vectors.RECORD.size * STATES
    assert int(summary[2]) > 0, "no exception was ever raised: the states are too tame"
    assert int(summary[3]) == 0, output[:8000]
