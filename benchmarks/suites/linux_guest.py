# SPDX-License-Identifier: Apache-2.0
"""A stock Linux guest that runs static programs, on kvmpy's software CPU and on QEMU's TCG, and the host itself.

All three sides run the same shell script, which prints a program's output between two marks, then its status.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kvmpy import guests
from kvmpy.guests import initramfs, parameters

SIDES = ("native", "kvmpy", "qemu")
FOLDER = "suite"
MEMORY = "1024"  # MiB
CMDLINE = "console=ttyS0 quiet loglevel=1 panic=-1 cryptomgr.notests"
BEGIN = "@@begin "
ENDED = re.compile(r"^@@end (\S+) (\d+)$")

# $1: seconds for each program. The output goes through a file: a program may leave children that write on.
SCRIPT = r"""
cd "$(dirname "$0")"
for program in $(cat programs); do
    echo "@@begin $program"
    $TIMEOUT timeout -s KILL "$1" ./$program $(cat "$program.arguments" 2>/dev/null) </dev/null >"$OUT" 2>&1
    status=$?
    tail -c 400000 "$OUT" | tr -d '\000'
    echo
    echo "@@end $program $status"
done
"""


@dataclass(frozen=True, slots=True)
class Ended:
    """A program's output and status (137: it was killed, as a rule because its time was over)."""

    output: str
    status: int


class SuiteError(Exception):
    """A side could not be run at all."""


def run(
    side: str,
    programs: Mapping[str, Path | bytes],
    *,
    files: Mapping[str, Path | bytes] | None = None,
    arguments: Mapping[str, Iterable[str]] | None = None,
    guest: str = "debian-6.1",
    cpus: int = 1,
    seconds: int = 120,
    timeout: float = 3600,
    log: Path | None = None,
) -> dict[str, Ended]:
    """Run programs one after the other on a side ("native", "kvmpy", "qemu"), in a directory of their own.

    programs, files: name -> contents or host file; files lie beside the programs. seconds: for each program.
    timeout: for all, in seconds. log: where to keep the console's output. Raises SuiteError.
    """
    with tempfile.TemporaryDirectory(prefix="suite-") as name:
        folder = Path(name)
        tree: dict[str, bytes] = {"run": SCRIPT.encode(), "programs": "\n".join(programs).encode()}
        for key, value in {**programs, **(files or {})}.items():
            tree[key] = value if isinstance(value, bytes) else value.read_bytes()
        for key, words in (arguments or {}).items():
            tree[f"{key}.arguments"] = shlex.join(words).encode()
        if side == "native":
            command = _native(folder, tree, programs, seconds)
        else:
            command = _guest(side, folder, tree, programs, guest, cpus, seconds)
        return _parse(side, command, timeout, log)


def _native(folder: Path, tree: Mapping[str, bytes], programs: Iterable[str], seconds: int) -> list[str]:
    for key, data in tree.items():
        path = folder / key
        path.write_bytes(data)
        path.chmod(0o755 if key in programs else 0o644)
    return ["env", "TIMEOUT=", f"OUT={folder}/output", "sh", str(folder / "run"), str(seconds)]


def _guest(
    side: str,
    folder: Path,
    tree: Mapping[str, bytes],
    programs: Iterable[str],
    guest_name: str,
    cpus: int,
    seconds: int,
) -> list[str]:
    guest = guests.get(guest_name)
    initrd = folder / "initrd"
    entries = {f"{FOLDER}/{key}": initramfs.File(data, 0o755) for key, data in tree.items()}
    initrd.write_bytes(guest.files["initrd"].read_bytes() + initramfs.build(entries))
    command = f"TIMEOUT= OUT=/tmp/output sh /{FOLDER}/run {seconds}"
    cmdline = f"{CMDLINE} {parameters(command)}"
    if side == "kvmpy":
        start = [sys.executable, "-m", "kvmpy", "run", str(guest.kernel), "--initrd", str(initrd), "--backend", "tcg"]
        return [*start, "--memory", f"{MEMORY}M", "--cpus", str(cpus), "--append", cmdline, "-q"]
    quiet = ["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot"]
    machine = ["qemu-system-x86_64", "-M", "q35,accel=tcg", "-cpu", "max", "-smp", str(cpus), "-m", MEMORY]
    return [*machine, *quiet, "-kernel", str(guest.kernel), "-initrd", str(initrd), "-append", cmdline]


def _parse(side: str, command: list[str], timeout: float, log: Path | None) -> dict[str, Ended]:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout,
            env={**os.environ, "LC_ALL": "C"}, check=False,
        )  # fmt: skip
        text = done.stdout.decode(errors="replace")
    except subprocess.TimeoutExpired as error:
        text = (error.stdout or b"").decode(errors="replace") + f"\n{side}: no end within {timeout} s\n"
    if log is not None:
        log.write_text(f"{shlex.join(command)}\n{text}")
    results: dict[str, Ended] = {}
    lines: list[str] | None = None
    for line in text.replace("\r", "").splitlines():
        if line.startswith(BEGIN):
            lines = []
        elif (match := ENDED.match(line)) and lines is not None:
            results[match[1]] = Ended("\n".join(lines).strip(), int(match[2]))
            lines = None
        elif lines is not None:
            lines.append(line)
    if not results:
        raise SuiteError(f"{side}: no program ran; the last words were:\n{text[-2000:]}")
    return results
