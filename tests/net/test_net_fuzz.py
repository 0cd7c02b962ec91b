# SPDX-License-Identifier: Apache-2.0
"""The user-mode network under ASan and UBSan, with a fixed seed: fuzz_user.c."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parent.parent / "kvmpy"
FLAGS = ["-std=gnu11", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory):
    compiler = shutil.which("gcc") or shutil.which("clang-14")
    if compiler is None:
        pytest.skip("no C compiler: install the package gcc")
    program = tmp_path_factory.mktemp("fuzz") / "fuzz_user"
    sources = [HERE / "fuzz_user.c", SOURCE / "net/wire.c", *sorted((SOURCE / "net/user").glob("[!_]*.c"))]
    wrap = "-Wl,--wrap=clock_gettime"
    subprocess.run([compiler, *FLAGS, wrap, f"-I{SOURCE}", *sources, "-lpthread", "-o", program], check=True)
    return program


@pytest.mark.parametrize("seed", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_frames_of_a_hostile_guest(fuzzer, seed):
    frames = 1_000_000 if seed == 3 else 60_000
    done = subprocess.run([fuzzer, str(seed), str(frames)], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    counts = dict(re.findall(r"(\w+) (\d+)", done.stdout))
    # It came everywhere: connections, datagrams, questions, and frames that were refused.
    assert int(counts["tcp"]) > 500 and int(counts["udp"]) > 100
    assert int(counts["dns"]) > 500 and int(counts["malformed"]) > 1000 and int(counts["back"]) > 5000
