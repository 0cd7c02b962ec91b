# SPDX-License-Identifier: Apache-2.0
"""The stubs of the compiled modules tell the truth."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def test_generated_stubs_are_up_to_date():
    command = [sys.executable, "tools/struct_stubs.py", "--check"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_stubs_match_the_runtime():
    pytest.importorskip("mypy")
    command = [sys.executable, "tools/check_stubs.py"]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
