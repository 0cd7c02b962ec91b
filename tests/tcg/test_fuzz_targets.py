# SPDX-License-Identifier: Apache-2.0
"""A fixed part of fuzzing in every test run: known inputs, seeds, and a number of changed ones, under the sanitizers.

`make fuzz` is the open-ended, coverage-guided version of the same targets.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "fuzz.py"
CANNOT = 77


@pytest.mark.parametrize(("target", "runs"), [("cpu", 20000), ("jit", 20000), ("machine", 400)])
def test_fixed_seed(target, runs, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "fuzz"  # the targets share objects
    command = [sys.executable, TOOL, target, "--runs", str(runs), "--seed", "1", "--folder", folder]
    result = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
    if result.returncode == CANNOT:
        pytest.skip(result.stderr.strip())
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{runs} changed ones" in result.stdout
    if target == "jit":
        compared, blocks = re.search(r"(\d+) of \d+ inputs came to an end, with (\d+) blocks", result.stdout).groups()
        assert int(compared) > runs // 2 and int(blocks) > runs // 2, "hardly anything was compared"
