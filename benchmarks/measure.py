# SPDX-License-Identifier: Apache-2.0
"""How things are measured here: in pairs, alternating, so that a noisy machine hits both sides alike."""

from __future__ import annotations

import statistics
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Result:
    """One row of the table: ours and the peer's median, and the median of the ratios pair by pair."""

    name: str
    unit: str
    ours: float
    peer: float | None = None
    ratio: float | None = None
    goal: str = ""
    met: bool | None = None

    def row(self) -> str:
        peer = "" if self.peer is None else f"{self.peer:10.2f}"
        ratio = "" if self.ratio is None else f"{self.ratio:6.2f}"
        met = {True: "met", False: "NOT met", None: ""}[self.met]
        return f"{self.name:<44}{self.ours:10.2f}{peer:>10} {self.unit:<6}{ratio:>7}  {self.goal} {met}".rstrip()

    def to_json(self) -> dict[str, object]:
        return asdict(self)


HEADER = f"{'what':<44}{'ours':>10}{'peer':>10} {'unit':<6}{'ratio':>7}  goal"


def pairs(ours: Callable[[], float], peer: Callable[[], float], rounds: int) -> tuple[float, float, float]:
    """Run both `rounds` times in turn, after one warm-up; returns the medians of ours, peer, and ours / peer."""
    ours(), peer()
    measured = [(ours(), peer()) for _ in range(rounds)]
    return (
        statistics.median(a for a, _ in measured),
        statistics.median(b for _, b in measured),
        statistics.median(a / b for a, b in measured),
    )


def compile_c(source: str) -> Path:
    """Build benchmarks/`source` with the system's compiler; returns the program."""
    program = Path(tempfile.mkdtemp(prefix="kvmpy-bench-")) / Path(source).stem
    subprocess.run(["cc", "-O2", "-Wall", "-o", program, HERE / source], check=True)
    return program


def seconds(program: Path, *arguments: object) -> float:
    """Run a C peer, which prints the seconds that its own work took."""
    command = [str(program), *map(str, arguments)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout)
