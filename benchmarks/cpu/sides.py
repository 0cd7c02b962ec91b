# SPDX-License-Identifier: Apache-2.0
"""The sides that are compared: each is a command that runs a kernel with its console on standard output."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.cpu.payload import CONSOLE, BenchmarkError, Payload

CPUCLOCK_SCHED = 2  # linux/posix-timers_types.h: time on a processor, exact to the nanosecond
MEMORY = 512  # MiB
LINE = re.compile(r"bench: (\w+) (\d+\.\d+)(?: ([0-9a-f]{16}))?\s*$")
WORKERS = re.compile(r"bench: workers (\d) (\d+\.\d+)\s*$")
WAITS = re.compile(r"bench: (ready|end) ")
# How far the guest's clock may be from the host's over a whole run: a part of it, and seconds until a line is read.
CLOCK_DRIFT, CLOCK_DELAY = 0.03, 0.2
NOTHING = "nothing"  # the workload that costs what all cost besides their work
QUICK = f"{CONSOLE} quiet cryptomgr.notests"


@dataclass(frozen=True, slots=True)
class Timed:
    """What a run of the workloads gave, by name: the best of their times in seconds, and their results.

    `seconds` is by the guest's clock, `cpu` is the processor time that the host spent on the guest meanwhile.
    `total` is that for all of it, boot included; `share` is `total` by the time that passed. `memory` is what the
    process had of host memory at the end beside guest RAM, in bytes.
    """

    seconds: dict[str, float]
    cpu: dict[str, float]
    results: dict[str, str]
    total: float
    share: float
    memory: int


@dataclass(frozen=True, slots=True)
class Line:
    """A line of output, with the host's time and the processor time of the process until then (seconds)."""

    at: float
    cpu: float
    text: str


@dataclass(frozen=True, slots=True)
class Ended:
    """A process that ended well: seconds from start to end, of processor time, and each line with its time."""

    wall: float
    cpu: float
    lines: list[Line]
    memory: int = 0  # as in Timed

    def tail(self) -> str:
        return "\n".join(f"    {line.text}" for line in self.lines[-12:])


@dataclass(frozen=True, slots=True)
class Side:
    """A virtual machine monitor; `command(kernel, initrd, cmdline, cpus)` starts it, with `environment` besides."""

    name: str
    command: Callable[[Path, Path, str, int], list[str]]
    timeout: float
    environment: Mapping[str, str] = field(default_factory=dict)
    attempts: int = 1  # a peer may fail now and then, we may not

    def boot(self, kernel: Path, initrd: Path, cmdline: str) -> Ended:
        """Run a guest that powers off as soon as its init starts."""
        ended = self._run(kernel, initrd, f"{cmdline} -- off")
        if not any("reboot: Power down" in line.text for line in ended.lines):
            raise BenchmarkError(f"{self.name}: the guest did not power off; its last words:\n{ended.tail()}")
        return ended

    def work(self, payload: Payload, repeats: int, only: Sequence[str] = ()) -> Timed:
        """Run the workloads, or only those named, each `repeats` times, in a guest."""
        cmdline = " ".join([f"{QUICK} -- run {repeats} /bin/busybox", *only])
        return _timed(self.name, self._run(payload.bzimage, payload.initrd, cmdline))

    def scale(self, payload: Payload, repeats: int) -> float:
        """How many times longer a worker takes when another runs on a second processor; 1.0 is perfect."""
        ended = self._run(payload.bzimage, payload.initrd, f"{QUICK} -- scale {repeats}", cpus=2)
        times: dict[str, list[float]] = {"1": [], "2": []}
        for line in ended.lines:
            if match := WORKERS.search(line.text):
                times[match[1]].append(float(match[2]))
        if len(times["1"]) != repeats or len(times["2"]) != repeats:
            raise BenchmarkError(f"{self.name}: the workers did not end; the last words:\n{ended.tail()}")
        return min(times["2"]) / min(times["1"])

    def _run(self, kernel: Path, initrd: Path, cmdline: str, cpus: int = 1) -> Ended:
        # Bytecode is cached, as it is for an installed package.
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | dict(self.environment)
        return run_timed(self.command(kernel, initrd, cmdline, cpus), self.timeout, environment)


def kvmpy(backend: str, timeout: float, executor: str | None = None) -> Side:
    """kvmpy on one of its engines, by its own command; executor: "interp" or "jit" of the software CPU."""

    def command(kernel: Path, initrd: Path, cmdline: str, cpus: int) -> list[str]:
        start = [sys.executable, "-m", "kvmpy", "run", str(kernel), "--initrd", str(initrd), "--append", cmdline]
        return [*start, "--backend", backend, "--memory", f"{MEMORY}M", "--cpus", str(cpus), "-q"]

    name = f"kvmpy {backend}" + (f" {executor}" if executor else "")
    return Side(name, command, timeout, {"KVMPY_TCG": executor} if executor else {})


def qemu(program: str, timeout: float) -> Side:
    """QEMU's TCG; without the default devices (disk, network, screen), which would slow its boot."""

    def command(kernel: Path, initrd: Path, cmdline: str, cpus: int) -> list[str]:
        machine = [program, "-M", "q35,accel=tcg", "-cpu", "max", "-smp", str(cpus), "-m", str(MEMORY)]
        quiet = ["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot"]
        return [*machine, *quiet, "-kernel", str(kernel), "-initrd", str(initrd), "-append", cmdline]

    return Side("QEMU", command, timeout, attempts=6)


def native(payload: Payload, repeats: int, only: Sequence[str] = ()) -> Timed:
    """The same program on the host, without a guest."""
    command = [str(payload.work), "run", str(repeats), str(payload.busybox), *only]
    return _timed("native", run_timed(command, timeout=120))


def _timed(side: str, ended: Ended) -> Timed:
    """Read the program's lines, and check the guest's clock by the host's."""
    timed = Timed({}, {}, {}, ended.cpu, ended.cpu / ended.wall, ended.memory)
    clock: dict[str, tuple[float, float]] = {}
    started = 0.0
    for line in ended.lines:
        if WAITS.search(line.text):
            started = line.cpu
        if not (match := LINE.search(line.text)):
            continue
        name, seconds, result = match[1], float(match[2]), match[3]
        if result is None:
            clock[name] = (line.at, seconds)
            continue
        # The best: whatever else runs on the host can only add.
        timed.seconds[name] = min(seconds, timed.seconds.get(name, seconds))
        timed.cpu[name] = min(line.cpu - started, timed.cpu.get(name, math.inf))
        if timed.results.setdefault(name, result) != result:
            raise BenchmarkError(f"{side}: {name} gave {timed.results[name]}, then {result}")
    if clock.keys() != {"begin", "end"}:
        raise BenchmarkError(f"{side}: the workloads did not end; the last words:\n{ended.tail()}")
    host, guest = (clock["end"][i] - clock["begin"][i] for i in (0, 1))
    if abs(guest - host) > CLOCK_DRIFT * host + CLOCK_DELAY:
        raise BenchmarkError(f"{side}: the clock is wrong: {guest:.3f} s in the guest, {host:.3f} s on the host")
    idle = timed.cpu.pop(NOTHING)
    del timed.seconds[NOTHING]
    for name in timed.cpu:
        timed.cpu[name] -= idle
    return timed


def _beside_ram(pid: int) -> int:
    """Bytes of host memory of a process, its share of shared pages, without mappings as large as guest RAM."""
    total, large = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        word, _, rest = line.partition(":")
        if word == "Size":
            large = int(rest.split()[0]) >= MEMORY << 10
        elif word == "Pss" and not large:
            total += int(rest.split()[0]) << 10
    return total


def run_timed(command: list[str], timeout: float, environment: Mapping[str, str] | None = None) -> Ended:
    """Run a command to its end. Raises BenchmarkError when it fails or takes more than `timeout` seconds."""
    lines: list[Line] = []
    memory = 0
    late = threading.Event()
    started = time.monotonic()
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, env=environment) as process:

        def kill() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(timeout, kill)
        timer.start()
        try:
            assert process.stdin is not None and process.stdout is not None
            for raw in process.stdout:
                text = raw.decode(errors="replace").rstrip()
                # Only while it lives: before it waits, and after it worked it waits again.
                ours = text.startswith("bench: ")
                lines.append(Line(time.monotonic(), _processor_time(process.pid) if ours else 0.0, text))
                if text.startswith("bench: end "):
                    memory = _beside_ram(process.pid)
                if WAITS.search(text):
                    process.stdin.write(b"\n")
                    process.stdin.flush()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        except BaseException:
            process.kill()
            raise
        finally:
            timer.cancel()
    ended = Ended(time.monotonic() - started, usage.ru_utime + usage.ru_stime, lines, memory)
    if late.is_set():
        raise BenchmarkError(f"`{' '.join(command)}` did not end within {timeout:.0f} s:\n{ended.tail()}")
    if process.returncode != 0:
        raise BenchmarkError(f"`{' '.join(command)}` ended with {process.returncode}:\n{ended.tail()}")
    return ended


def _processor_time(pid: int) -> float:
    """Seconds of processor time of a process with all its threads, as clock_getcpuclockid(3) finds its clock."""
    return time.clock_gettime(~pid << 3 | CPUCLOCK_SCHED)
