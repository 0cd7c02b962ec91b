# SPDX-License-Identifier: Apache-2.0
"""The rings alone, without a guest: ring.c has a driver's side and ours in one thread."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

from benchmarks.cpu.payload import BenchmarkError
from benchmarks.measure import Result

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parents[1] / "kvmpy"
NAMES = {
    "split": "a request over a split ring",
    "split-indirect": "... with an indirect table",
    "packed": "a request over a packed ring",
    "packed-indirect": "... with an indirect table",
}


def run() -> list[Result]:
    """Nanoseconds per request, the driver's part included: the best of seven times 200000. Raises BenchmarkError."""
    sources = [PACKAGE / "virtio" / f"{name}.c" for name in ("queue", "queue_split", "queue_packed")]
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "ring"
        command = ["cc", "-O2", "-std=gnu11", f"-I{PACKAGE}", "-o", program, HERE / "ring.c", *sources]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        if built.returncode:
            raise BenchmarkError(f"ring.c does not compile:\n{built.stderr}")
        done = subprocess.run([program], capture_output=True, text=True, check=False)
    found = dict(re.findall(r"bench: ([\w-]+) ([0-9.]+)", done.stdout))
    if found.keys() != NAMES.keys():
        raise BenchmarkError(f"ring.c failed: {done.stdout}")
    return [Result(words, "ns", float(found[name])) for name, words in NAMES.items()]
