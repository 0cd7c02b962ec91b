# SPDX-License-Identifier: Apache-2.0
"""Run kvm-unit-tests' x86 flat images on kvmpy and on QEMU, and count what each passes.

    python -m benchmarks.suites.kvm_unit_tests DIR [--only NAME ...] [--sides kvmpy,qemu] [--logs DIR] [--json FILE]

DIR is its `x86` directory after a build: `unittests.cfg` and the `.flat` images. Processors are:
kvmpy's "host", QEMU's "max", and the features that the configuration adds or takes away by name (`-cpu NAME,+a,-b`).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from kvmpy.arch.cpuid import FEATURES, feature_name

NESTED = ("svm", "vmx", "nested_exception")  # groups that need a hypervisor's own virtualisation
MEMORY = "512"  # MiB, where the configuration does not say
PATIENCE = 1.5  # the configuration's timeouts are for hardware
RESULT = re.compile(r"^(PASS|FAIL|SKIP|XFAIL|XPASS)\b[: ]", re.MULTILINE)
SUMMARY = re.compile(r"^SUMMARY: ", re.MULTILINE)
EXITS = {1: "ok", 155: "skip"}  # of the debug-exit port: (value << 1) | 1, and the suite's 77 is "skipped"
DEFAULT_TIMEOUT = 90


@dataclass(slots=True)
class Case:
    """A section of unittests.cfg."""

    name: str
    image: Path
    cpus: int = 1
    arguments: str = ""
    groups: tuple[str, ...] = ()
    arch: str = ""
    accel: str = ""
    check: str = ""
    timeout: float = DEFAULT_TIMEOUT
    qemu: list[str] = field(default_factory=list)  # options other than -cpu and -m
    features: list[str] = field(default_factory=list)  # "+x2apic", "-pcid"
    vendor: str = ""
    memory: str = MEMORY


@dataclass(slots=True)
class Ran:
    """What a side made of a case."""

    status: str
    ok: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)


def read_config(directory: Path) -> list[Case]:
    """The cases of `unittests.cfg`. Errors: OSError, ValueError for what is not understood."""
    cases: list[Case] = []
    for raw in (directory / "unittests.cfg").read_text().splitlines():
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        if line.startswith("["):
            cases.append(Case(line.strip("[]"), Path()))
            continue
        key, _, value = (part.strip() for part in line.partition("="))
        case = cases[-1]
        match key:
            case "file":
                case.image = directory / value
            case "smp":
                case.cpus = int(value)
            case "test_args":
                words = value[1:-1] if value[:1] in "'\"" and value[-1:] == value[:1] else value
                case.arguments = words
            case "groups":
                case.groups = tuple(value.split())
            case "arch":
                case.arch = value
            case "accel":
                case.accel = value
            case "check":
                case.check = value
            case "timeout":
                case.timeout = float(value.rstrip("s"))
            case "qemu_params" | "extra_params":
                _take_options(case, shlex.split(value))
            case _:
                raise ValueError(f"unittests.cfg: {line!r} is not understood")
    return cases


def _take_options(case: Case, words: list[str]) -> None:
    while words:
        word = words.pop(0)
        if word == "-cpu":
            _, *flags = words.pop(0).split(",")
            case.features = [flag for flag in flags if flag[:1] in "+-"]
            case.vendor = next((flag[7:] for flag in flags if flag.startswith("vendor=")), "")
        elif word == "-m":
            size = words.pop(0)
            case.memory = str(int(size[:-1]) * 1024) if size[-1] in "gG" else size
        elif word == "-enable-kvm":
            case.accel = "kvm"
        else:
            case.qemu.append(word)


def why_not(case: Case, arch: str) -> str:
    """Why a case is left out on both sides; empty when it runs."""
    if case.arch and case.arch != arch:
        return f"{case.arch} only"
    if "nodefault" in case.groups:
        return "not run by default"
    if case.accel == "kvm":
        return "for the kernel's KVM only"
    if set(case.groups) & set(NESTED) or case.name.startswith("svm"):
        return "nested virtualisation"
    for word in case.check.split():
        path, _, wanted = word.partition("=")
        try:
            if Path(path).read_text().strip() != wanted:
                return f"{path} is not {wanted}"
        except OSError:
            return f"no {path}"
    return "" if case.image.exists() else f"no {case.image.name}"


def kvmpy_command(case: Case) -> list[str]:
    known = {*FEATURES}
    wanted = [flag for flag in case.features if _known(flag[1:], known)]
    cpu = ",".join(["host", *wanted])
    words = [sys.executable, "-m", "kvmpy", "run", str(case.image), "--backend", "tcg", "--testdev", "-q"]
    words += ["--cpu", cpu, "--cpus", str(case.cpus), "--memory", f"{case.memory}M"]
    return [*words, "--append", _now(case.arguments)] if case.arguments else words


def _now(arguments: str) -> str:
    return arguments.replace("`date +%s`", str(int(time.time())))


def _known(name: str, known: set[str]) -> bool:
    try:
        return feature_name(name.replace("-", "_")) in known
    except ValueError:
        return False


def qemu_command(case: Case, program: str) -> list[str]:
    cpu = ",".join(["max", *case.features, *([f"vendor={case.vendor}"] if case.vendor else [])])
    words = [program, "--no-reboot", "-nodefaults", "-display", "none", "-serial", "stdio", "-accel", "tcg"]
    words += ["-device", "pc-testdev", "-device", "isa-debug-exit,iobase=0xf4,iosize=0x4", "-device", "pci-testdev"]
    words += ["-kernel", str(case.image), "-smp", str(case.cpus), "-cpu", cpu, "-m", case.memory, *case.qemu]
    return [*words, "-append", _now(case.arguments)] if case.arguments else words


def run(command: list[str], timeout: float, log: Path) -> Ran:
    """Run a side and read its output, which goes to the file `log`."""
    start = time.monotonic()
    with log.open("wb") as out:
        out.write((shlex.join(command) + "\n").encode())
        out.flush()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout)
            status = EXITS.get(code, f"exit {code}")
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = "timeout"
    text = log.read_text(errors="replace").replace("\r", "")
    count = Counter(match[1] for match in RESULT.finditer(text))
    failures = [line for line in text.splitlines() if line.startswith(("FAIL: ", "FAIL ", "XPASS: "))]
    if status == "exit 3" and SUMMARY.search(text):
        status = "failed"  # it came to its end
    return Ran(
        status,
        count["PASS"],
        count["FAIL"] + count["XPASS"],
        count["SKIP"] + count["XFAIL"],
        time.monotonic() - start,
        failures,
    )


def _cell(ran: Ran | None) -> str:
    if ran is None:
        return f"{'-':>6}{'-':>6}{'-':>6}  {'-':<9}{'-':>7}"
    return f"{ran.ok:>6}{ran.failed:>6}{ran.skipped:>6}  {ran.status:<9}{ran.seconds:>7.1f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path, help="kvm-unit-tests' x86 directory, built")
    parser.add_argument("--arch", default="x86_64", choices=("x86_64", "i386"), help="of the build")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these cases only")
    parser.add_argument("--sides", default="kvmpy,qemu", help="which to run (default both)")
    parser.add_argument("--qemu", default="qemu-system-x86_64", metavar="PROGRAM")
    parser.add_argument("--patience", type=float, default=PATIENCE, help="times the configuration's timeouts")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep the output of each run here")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    options = parser.parse_args()
    sides = options.sides.split(",")
    logs = options.logs or Path(tempfile.mkdtemp(prefix="kvm-unit-tests-"))
    logs.mkdir(parents=True, exist_ok=True)

    head = f"{'ok':>6}{'fail':>6}{'skip':>6}  {'ended':<9}{'s':>7}"
    print(f"{'case':<30}{'':>10}kvmpy tcg{'':>20}QEMU tcg\n{'':<30}" + "   ".join(head for _ in sides))
    results: dict[str, dict[str, Ran]] = {}
    left_out: dict[str, str] = {}
    for case in read_config(options.directory):
        if options.only and case.name not in options.only:
            continue
        if reason := why_not(case, options.arch):
            left_out[case.name] = reason
            continue
        ran: dict[str, Ran] = {}
        for side in sides:
            command = kvmpy_command(case) if side == "kvmpy" else qemu_command(case, options.qemu)
            ran[side] = run(command, case.timeout * options.patience, logs / f"{case.name}.{side}.log")
        results[case.name] = ran
        print(f"{case.name:<30}" + "   ".join(_cell(ran.get(side)) for side in sides), flush=True)

    totals = {side: Ran("", *(sum(getattr(r[side], f) for r in results.values()) for f in ("ok", "failed", "skipped")))
              for side in sides}  # fmt: skip
    for side in sides:
        totals[side].seconds = sum(r[side].seconds for r in results.values())
        totals[side].status = f"{sum(r[side].status == 'ok' for r in results.values())} of {len(results)}"
    print(f"{'in all (ended: cases whole)':<30}\n{'':<30}" + "   ".join(_cell(totals[side]) for side in sides))
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}")
    if options.json:
        document = {name: {side: asdict(one) for side, one in ran.items()} for name, ran in results.items()}
        options.json.write_text(json.dumps({"cases": document, "left_out": left_out}, indent=1))
    print(f"output of each run: {logs}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
