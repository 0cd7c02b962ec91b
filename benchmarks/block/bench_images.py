# SPDX-License-Identifier: Apache-2.0
"""Disk images beside qemu-img, in one run: random 4 KiB reads and conversions of 2 GiB.

    python benchmarks/block/bench_images.py [--size 2G] [--rounds 5] [--folder /dev/shm] [--json]

Both read from the page cache, so what is measured is the code above it. qemu-img bench reads with a fixed
step; the step here is a large odd number of blocks, which visits them as randomly as any order, and both
sides use it. Reads are made at depth 1 here and at depths 1 and 64 in qemu-img bench. A figure is the best
of the rounds.

Conversions are the two commands, start-up included, in pairs that begin with one and the other by turns;
a figure is the median of the rounds. Each copy is removed, and the disk synced, before the next, and the
first pair does not count: it meets memory that this (virtual) machine has not had yet. "by cpu" is the same
by processor time, for hosts that have other work.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from kvmpy.block import as_core, open_disk
from kvmpy.block._disk import time_reads
from kvmpy.cli.image_actions import parse_size

BLOCK = 4096


def best(rounds: int, *functions: Callable[[], float]) -> list[float]:
    """The shortest time of each, taken in turn."""
    times = [[one() for one in functions] for _ in range(rounds)]
    return [min(column) for column in zip(*times, strict=True)]


def our_reads(path: Path, format: str, count: int, step: int) -> float:
    with open_disk(path, format, readonly=True) as disk:
        return time_reads(as_core(disk), count, BLOCK, step) / 1e9


def qemu_reads(path: Path, format: str, count: int, step: int, depth: int) -> float:
    words = [
        "qemu-img",
        "bench",
        "-f",
        format,
        "-t",
        "writeback",
        "-c",
        count,
        "-d",
        depth,
        "-s",
        BLOCK,
        "-S",
        step,
        path,
    ]
    text = subprocess.run([str(one) for one in words], capture_output=True, text=True, check=True).stdout
    found = re.search(r"completed in ([0-9.]+) seconds", text)
    assert found, text
    return float(found[1])


OURS = (sys.executable, "-m", "kvmpy", "image", "convert")
QEMU = ("qemu-img", "convert")


def conversion(program: tuple[str, ...], source: Path, source_format: str, format: str) -> tuple[float, float]:
    """Seconds and processor seconds of one conversion; the copy is removed."""
    target = source.with_name("copy")
    os.sync()  # the dirty pages of the last round would slow down this one
    start = time.perf_counter()
    running = subprocess.Popen([*program, "-f", source_format, "-O", format, str(source), str(target)])
    _, status, usage = os.wait4(running.pid, 0)
    took = time.perf_counter() - start
    running.returncode = os.waitstatus_to_exitcode(status)
    if running.returncode:
        raise subprocess.CalledProcessError(running.returncode, running.args)
    target.unlink()
    return took, usage.ru_utime + usage.ru_stime


def conversions(rounds: int, source: Path, source_format: str, format: str) -> list[tuple[float, float]]:
    """Medians for us and QEMU."""
    columns: list[list[tuple[float, float]]] = [[], []]
    for count in range(rounds + 1):
        for side in (0, 1) if count % 2 else (1, 0):
            one = conversion((OURS, QEMU)[side], source, source_format, format)
            if count:
                columns[side].append(one)
    return [tuple(map(statistics.median, zip(*column, strict=True))) for column in columns]  # type: ignore[misc]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", type=parse_size, default=2 << 30, help="of the disk (2G)")
    parser.add_argument("--reads", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    figures: dict[str, dict[str, float]] = {}

    def note(name: str, ours: float, qemu: float, unit: str, amount: float) -> None:
        figures[name] = {"ours": amount / ours, "qemu": amount / qemu, "ratio": qemu / ours}
        if not options.json:
            print(f"{name:<36}{amount / ours:>12.0f}{amount / qemu:>12.0f} {unit:<8}{qemu / ours:>8.2f}", flush=True)

    if not options.json:
        print(f"{'':<36}{'kvmpy':>12}{'QEMU':>12} {'':<8}{'ratio':>8}")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        raw, qcow2 = folder / "disk.raw", folder / "disk.qcow2"
        with raw.open("wb") as file:
            for _ in range(options.size >> 20):
                file.write(os.urandom(1 << 20))
        subprocess.run([*QEMU, "-f", "raw", "-O", "qcow2", str(raw), str(qcow2)], check=True)
        step = (options.size // BLOCK // 3 | 1) * BLOCK
        for format, path in (("raw", raw), ("qcow2", qcow2)):
            ours, one, many = best(
                options.rounds,
                lambda: our_reads(path, format, options.reads, step),  # noqa: B023
                lambda: qemu_reads(path, format, options.reads, step, 1),  # noqa: B023
                lambda: qemu_reads(path, format, options.reads, step, 64),  # noqa: B023
            )
            note(f"{format}: 4 KiB reads, depth 1", ours, one, "IOPS", options.reads)
            note(f"{format}: 4 KiB reads, QEMU's depth 64", ours, many, "IOPS", options.reads)
        for a, b, path in (("raw", "qcow2", raw), ("qcow2", "raw", qcow2)):
            (ours, our_cpu), (theirs, their_cpu) = conversions(options.rounds, path, a, b)
            note(f"convert {a} to {b}", ours, theirs, "MiB/s", options.size / (1 << 20))
            note("  ... by cpu", our_cpu, their_cpu, "MiB/s", options.size / (1 << 20))
    if options.json:
        print(json.dumps(figures, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
