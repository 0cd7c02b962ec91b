# SPDX-License-Identifier: Apache-2.0
"""A machine without /dev/kvm: everything works on the software CPU, and says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HIDE = ROOT / "tools" / "without_kvm.sh"
AUTO = """
import json, os, kvmpy
with kvmpy.Vm() as vm:
    vm.add_ram(0x1000, size=0x1000)
    vm.memory.write(0x1000, b"\\xf4")
    vm.create_vcpu().enter_real_mode(0x1000)
    outcome = vm.run(timeout=60)
    print(json.dumps([os.path.exists("/dev/kvm"), vm.backend, vm.kvm.reason, outcome.reason]))
try:
    kvmpy.Vm("kvm")
except kvmpy.BackendError as error:
    print(error)
"""


def hidden(*command, timeout=300):
    """What the command prints and its status where /dev/kvm is hidden; skips where that cannot be done."""
    probe = subprocess.run([HIDE, "true"], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"no mount namespace here: {probe.stderr.strip()}")
    environment = {key: value for key, value in os.environ.items() if key != "KVMPY_BACKEND"}
    return subprocess.run(
        [HIDE, *command], capture_output=True, text=True, timeout=timeout, check=False, cwd=ROOT, env=environment
    )


def test_auto_takes_the_software_cpu_and_says_why():
    done = hidden(sys.executable, "-c", AUTO)
    assert done.returncode == 0, done.stderr
    first, asked = done.stdout.splitlines()
    there, backend, reason, outcome = json.loads(first)
    assert (there, backend, outcome) == (False, "tcg", "halted")
    assert "/dev/kvm" in reason
    assert "kvmpy doctor" in reason
    assert asked == reason  # the same words when KVM was asked for


def test_the_doctor_says_that_guests_run():
    done = hidden(sys.executable, "-m", "kvmpy", "doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--backend auto takes tcg" in done.stdout


def test_the_demo_runs():
    done = hidden(sys.executable, "examples/demo.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "engine: tcg" in done.stdout
    assert "guest reports        <- 500500" in done.stdout
