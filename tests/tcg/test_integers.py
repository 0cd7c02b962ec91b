# SPDX-License-Identifier: Apache-2.0
"""Integer instructions of the software CPU against the host's processor, and the table itself.

Once with flags from the host's instructions, once with the C of other hosts (-DTCG_PORTABLE). For a long run:
`python tests/tcg/instructions.py SEED 160 | diff SEED 200` is ten million cases.
"""

from __future__ import annotations

import platform
import random
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
import instructions  # noqa: E402

optable = instructions.optable
needs_host = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("cc") is None,
    reason="compares with an x86-64 host; needs a C compiler",
)


@pytest.fixture(scope="module", params=["host flags", "portable flags"])
def diff(request, tmp_path_factory):
    """The core and native/diff.c as one program."""
    folder = tmp_path_factory.mktemp("integers")
    optable.main(str(TCG))
    sources = [TCG / name for name in (TCG / "core_sources.txt").read_text().split()]
    sources.append(HERE / "native" / "diff.c")
    flags = ["-std=gnu11", "-O1", "-w", "-fno-strict-aliasing"]
    if request.param == "portable flags":
        flags.append("-DTCG_PORTABLE")

    def compile_one(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        subprocess.run(["cc", *flags, "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    program = folder / "diff"
    subprocess.run(["cc", "-no-pie", *objects, "-lpthread", "-o", str(program)], check=True)
    return program, request.param == "portable flags"


def records(seed: int, each: int, portable: bool) -> tuple[bytes, set[str]]:
    """Cases for every row that the host can run, and the handlers they reach.

    Portable: without SHLD and SHRD, whose 16-bit results are undefined for counts over 16.
    """
    rng = random.Random(seed)
    host = set(Path("/proc/cpuinfo").read_text().split())
    rows = [row for row in optable.load() if instructions.usable(row, host)]
    if portable:
        rows = [row for row in rows if not row.handler.startswith(("shld", "shrd"))]
    return b"".join(instructions.encode(row, rng) for row in rows for _ in range(each)), {row.handler for row in rows}


@needs_host
def test_host_and_software_agree(diff):
    program, portable = diff
    cases, handlers = records(1, 40, portable)
    assert len(handlers) > 100
    result = subprocess.run([program, "1", "4"], input=cases, capture_output=True, timeout=900, check=False)
    output = result.stdout.decode()
    summary = re.search(r"(\d+) cases, (\d+) differences", output)
    assert summary, output + result.stderr.decode()
    assert int(summary[1]) == len(cases) // 24 * 4
    assert int(summary[2]) == 0, output[:8000]


@needs_host
def test_the_harness_sees_a_difference(diff):
    """RDTSC cannot give the same on both sides."""
    rdtsc = b"\x02\x0f\x31" + bytes(14) + b"\xff\xff\xff" + bytes(4)
    result = subprocess.run([diff[0], "1", "1"], input=rdtsc, capture_output=True, timeout=60, check=False)
    assert b"1 cases, 1 differences" in result.stdout, result.stdout


def test_rows_of_one_opcode_can_be_told_apart():
    """A later row with the same encoding, gates and mode would never be reached."""
    seen: dict[tuple[object, ...], str] = {}
    for row in optable.load():
        key = (row.vex, row.map, row.prefix, row.opcode, row.digit, row.mod, row.rm, row.w, row.length, row.features,
               "i64" in row.attributes, "o64" in row.attributes)  # fmt: skip
        assert key not in seen, f"{row.source}: same encoding as {seen[key]}"
        seen[key] = row.source


def test_generated_tables_name_every_row():
    rows = optable.load()
    header, data = optable.generate(rows)
    assert f"OPROW_COUNT {len(rows)}" in header
    assert data.count("OPK(") >= len(rows) // 2


def test_missing_instructions_are_documented():
    """docs/software-cpu.md names every encoding that the table knows and nobody has written."""
    text = (HERE.parents[1] / "docs" / "software-cpu.md").read_text()
    for line in optable.missing(optable.load()):
        assert line in text
