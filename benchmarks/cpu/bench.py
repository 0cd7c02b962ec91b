# SPDX-License-Identifier: Apache-2.0
"""Run every side in turn, round by round, and make the table of ratios."""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from benchmarks.cpu import payload, sides
from benchmarks.cpu.payload import CONSOLE, BenchmarkError, Payload
from benchmarks.cpu.sides import Side, Timed

T = TypeVar("T")

ROUNDS = 3
REPEATS = 5  # of a workload within a guest
TIMEOUT = 180.0  # of a guest, in seconds
KVM_TIMEOUT = 60.0  # a kernel that emulates ring 0 may need minutes to fail
LEAST = 0.01  # of the peer's processor time: below it there is nothing but what the subtracted start left over
BUSY = 0.8  # of a processor: with less, times say more of the machine than of the program

WORKLOADS: Mapping[str, str] = {
    "integer": "64-bit xorshift",
    "sieve": "sieve, byte stores",
    "chase": "pointer chase, 2 MiB",
    "memcpy": "memcpy of all sizes",
    "calls": "recursive calls",
    "qsort": "qsort with a callback",
    "dispatch": "indirect jumps of a bytecode interpreter",
    "rep": "REP MOVS, STOS, CMPS, SCAS",
    "strings": "strlen, strcmp, strchr",
    "snprintf": "snprintf",
    "sse": "SSE matrix product, float",
    "matrix": "matrix product, double",
    "nbody": "n-body, double",
    "avx": "AVX loop, float",
    "x87": "x87 series",
    "syscalls": "getppid system calls",
    "faults": "page faults, 16 MiB",
    "pipe": "pipe ping-pong of two processes",
    "fork": "fork and wait",
    "shell": "busybox shell loop",
}
UNITS: Mapping[str, str] = {"boot": "s", "quick": "s", "scale": "x", "memory": "MiB"}
HEADER = (
    f"{'what':<44}{'native':>10}{'kvm':>10}{'interp':>10}{'ours':>10}{'QEMU':>10} {'unit':<5}"
    f"{'/native':>8}{'/QEMU':>7}{'by cpu':>8}"
)


@dataclass(frozen=True, slots=True)
class Row:
    """Medians of each side, and of the ratios ours / QEMU's round by round; None is "not measured".

    `ours` is the software CPU, `interp` the same without its JIT; `of_native` is ours / native; `cpu_ratio` is ours /
    QEMU's processor time on the host: the same on a quiet machine, and on a busy one what to trust.
    """

    name: str
    unit: str
    native: float | None = None
    kvm: float | None = None
    interp: float | None = None
    ours: float | None = None
    qemu: float | None = None
    of_native: float | None = None
    ratio: float | None = None
    cpu_ratio: float | None = None

    def row(self) -> str:
        times = "".join(_cell(value, 10, 3) for value in (self.native, self.kvm, self.interp, self.ours, self.qemu))
        ratios = _cell(self.of_native, 8, 1) + _cell(self.ratio, 7, 2) + _cell(self.cpu_ratio, 8, 2)
        return f"{self.name:<44}{times} {self.unit:<5}{ratios}"

    def to_json(self) -> dict[str, object]:
        return asdict(self)


Times = dict[str, float]  # name of a row -> seconds


@dataclass(frozen=True, slots=True)
class Round:
    """One turn of every side; the last two are processor time on the host."""

    native: Times
    ours: Times
    qemu: Times
    ours_cpu: Times
    qemu_cpu: Times
    interp: Times


def run(
    rounds: int | None,
    *,
    guest: str,
    qemu: str,
    kvm: bool,
    executor: str | None = None,
    interp: bool = False,
    only: Sequence[str] = (),
) -> Iterator[Row]:
    """Measure and yield the rows; says on standard error what it does.

    rounds: None for `ROUNDS`; guest: a stock Linux guest; qemu: the peer's program (left out when there is
    none); kvm: try the kernel's engine too; executor: of the software CPU, None for its default; interp: measure its
    interpreter beside it; only: names of workloads, without boots (default: all). Raises BenchmarkError,
    GuestUnavailableError.
    """
    if unknown := set(only) - WORKLOADS.keys():
        raise BenchmarkError(f"no workload {', '.join(sorted(unknown))}; there are {', '.join(WORKLOADS)}")
    with tempfile.TemporaryDirectory(prefix="kvmpy-bench-") as directory:
        made = payload.make(Path(directory), guest)
        ours = sides.kvmpy("tcg", TIMEOUT, executor)
        slow = sides.kvmpy("tcg", TIMEOUT, "interp") if interp else None
        kernel = _kernel_engine(made) if kvm else {}
        yield from _measure(made, rounds or ROUNDS, ours, slow, _peer(qemu), kernel, only)


def _measure(
    made: Payload, rounds: int, ours: Side, interp: Side | None, peer: Side | None, kvm: Times, only: Sequence[str]
) -> Iterator[Row]:
    expected = sides.native(made, REPEATS, only)
    done: list[Round] = []
    for number in range(rounds):
        _tell(f"round {number + 1} of {rounds}")
        native = sides.native(made, REPEATS, only)
        _check(native, expected, "native")
        mine, my_cpu = _turn(ours, made, expected, only)
        theirs, their_cpu = _turn(peer, made, expected, only) if peer else ({}, {})
        slow = _turn(interp, made, expected, only)[0] if interp else {}
        done.append(Round(native.seconds, mine, theirs, my_cpu, their_cpu, slow))

    ratios, cpu_ratios = [], []
    for name, title in {**WORKLOADS, **_titles(made)}.items():
        row = _row(name, title, done, kvm)
        if only and name not in only:
            continue
        if name in WORKLOADS and row.ratio is not None and row.cpu_ratio is not None:
            ratios.append(row.ratio)
            cpu_ratios.append(max(row.cpu_ratio, LEAST))
        yield row
    if ratios:
        title = f"geometric mean of the {len(ratios)} workloads"
        yield Row(title, "", ratio=statistics.geometric_mean(ratios), cpu_ratio=statistics.geometric_mean(cpu_ratios))


def _turn(side: Side, made: Payload, expected: Timed, only: Sequence[str] = ()) -> tuple[Times, Times]:
    """Boot and run the workloads once: the times, and the processor times."""
    if only:
        work = _again(side, lambda: side.work(made, REPEATS, only))
        _check(work, expected, side.name)
        return work.seconds, work.cpu
    boot = _again(side, lambda: side.boot(made.bzimage, made.initrd, CONSOLE))
    quick = _again(side, lambda: side.boot(made.bzimage, made.initrd, f"{CONSOLE} cryptomgr.notests"))
    work = _again(side, lambda: side.work(made, REPEATS))
    _check(work, expected, side.name)
    other = {"scale": _again(side, lambda: side.scale(made, REPEATS)), "memory": work.memory / (1 << 20)}
    return (
        {"boot": boot.wall, "quick": quick.wall} | other | work.seconds,
        {"boot": boot.cpu, "quick": quick.cpu, "all": work.total} | work.cpu,
    )


def _again(side: Side, run: Callable[[], T]) -> T:
    """A run, as often as this side may fail: with QEMU 7.2 most boots of Linux 6.12 end in a panic."""
    for left in range(side.attempts - 1, -1, -1):
        try:
            return run()
        except BenchmarkError as error:
            if not left:
                raise
            _tell(f"{error}\n{side.name} failed and may try again, {left} more times")
    raise AssertionError("a side has at least one attempt")


def _row(name: str, title: str, done: list[Round], kvm: Times) -> Row:
    scale, unit = (1e3, "ms") if name in WORKLOADS else (1, UNITS.get(name, ""))

    def median(times: list[Times]) -> float | None:
        values = [t[name] * scale for t in times if name in t]
        return statistics.median(values) if values else None

    def ratio(pairs: list[tuple[Times, Times]]) -> float | None:
        values = [a[name] / b[name] for a, b in pairs if name in a and name in b]
        return statistics.median(values) if values else None

    return Row(
        title,
        unit,
        native=median([r.native for r in done]),
        kvm=kvm[name] * scale if name in kvm else None,
        interp=median([r.interp for r in done]),
        ours=median([r.ours for r in done]),
        qemu=median([r.qemu for r in done]),
        of_native=ratio([(r.ours, r.native) for r in done]),
        ratio=ratio([(r.ours, r.qemu) for r in done]),
        cpu_ratio=ratio([(r.ours_cpu, r.qemu_cpu) for r in done]),
    )


def _titles(made: Payload) -> dict[str, str]:
    linux = f"Linux {'.'.join(made.release.split('.')[:2])}"
    return {
        "boot": f"{linux} to power-off",
        "quick": f"{linux} to power-off, notests",
        "all": "all workloads and a boot",
        "scale": "a worker beside another on 2 CPUs",
        "memory": "memory beside guest RAM",
    }


def _check(timed: Timed, expected: Timed, side: str) -> None:
    """Each workload must give what it gives on the host: a processor that errs is not fast."""
    for name, result in timed.results.items():
        if expected.results.get(name, result) != result:
            raise BenchmarkError(f"{side}: {name} gave {result}, natively {expected.results[name]}")
    if missing := expected.seconds.keys() - timed.seconds.keys():
        _tell(f"{side}: left out, the guest lacks the instructions: {', '.join(sorted(missing))}")
    if timed.share < BUSY:
        _tell(f"{side} had {timed.share:.0%} of a processor: the machine is busy, trust the ratios by cpu")


def _kernel_engine(made: Payload) -> Times:
    """Times on the kernel's KVM, once; nothing where it cannot boot Linux."""
    _tell("trying the kernel's KVM")
    try:
        return _turn(sides.kvmpy("kvm", KVM_TIMEOUT), made, sides.native(made, 1))[0]
    except BenchmarkError as error:
        _tell(f"kvmpy kvm is left out, it cannot boot this kernel here: {error}")
        return {}


def _peer(program: str) -> Side | None:
    found = shutil.which(program)
    if found is None:
        _tell(f"{program} is not installed; there will be no ratios to QEMU")
        return None
    done = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
    version = re.match(r"QEMU emulator version (.+)", done.stdout)
    _tell(f"peer: QEMU {version[1]}" if version else f"peer: {found}")
    return sides.qemu(found, TIMEOUT)


def _cell(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
