# SPDX-License-Identifier: Apache-2.0
"""The examples run as a reader would run them, on every engine, and print what they promise."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"

PROMISES = {
    "hello.py": ["4\n"],
    "mmio.py": ["reads 4 bytes at device register 0x0", "writes 42 to device register 0x4"],
    "long_mode.py": ["1 + 2 + ... + 100 = 5050", "RAX says 5050"],
    "custom_device.py": ["the guest says: 42", "the run ended: halted"],
    "two_vcpus.py": ["2 processors counted to 2000"],
    "demo.py": ["guest reports        <- 500500", "ud2", "last exits"],
}


def run(backend, *command):
    environment = os.environ | {"KVMPY_BACKEND": backend}
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", PROMISES)
def test_an_example_prints_what_it_promises(backend, name):
    done = run(backend, EXAMPLES / name)
    assert done.returncode == 0, done.stderr
    for promise in PROMISES[name]:
        assert promise in done.stdout
    assert "\x1b" not in done.stdout  # it would be the terminal of whoever tries it that answers


def test_the_hypervisor_tests_of_the_examples_pass(backend):
    done = run(backend, "-m", "pytest", "-q", "-p", "no:cacheprovider", EXAMPLES / "exit_handlers.py")
    assert done.returncode == 0, done.stdout
    assert "5 passed" in done.stdout


def test_every_example_is_tried_here():
    # All but the first need a stock guest.
    elsewhere = {"exit_handlers.py", "boot_linux.py", "linux_disk.py", "web_server.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == PROMISES.keys() | elsewhere


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short_enough_to_read(path):
    assert len(path.read_text().splitlines()) <= 90


def test_the_readme_shows_the_hello_example_as_it_is():
    readme = (ROOT / "README.md").read_text()
    shown = re.findall(r"```python\n(.*?)```", readme, re.S)[0]
    hello = (EXAMPLES / "hello.py").read_text()

    def statements(text):
        return [line.split("  #")[0].rstrip() for line in text.splitlines() if line and not line.startswith(('"', "#"))]

    assert statements(shown) == statements(hello)
