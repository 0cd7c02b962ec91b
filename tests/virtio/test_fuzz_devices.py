# SPDX-License-Identifier: Apache-2.0
"""A fixed part of fuzzing in every test run: rings, devices, qcow2 and networks in C, under the sanitizers; seeds and a
number of changed ones. `make fuzz` is the open-ended, coverage-guided version of the same targets.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "fuzz.py"
NO_COMPILER = 77


@pytest.mark.parametrize(("target", "runs"), [("virtio", 20000), ("qcow2", 2000), ("network", 5000)])
def test_fixed_seed(target, runs, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    command = [sys.executable, TOOL, target, "--runs", str(runs), "--seed", "1", "--folder", folder]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    if result.returncode == NO_COMPILER:
        pytest.skip(result.stderr.strip())
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{runs} changed ones" in result.stdout
