# SPDX-License-Identifier: Apache-2.0
"""Run static test programs on the host, in a Linux guest on kvmpy, and in the same guest on QEMU, and compare.

    python -m benchmarks.suites.programs DIR [--sides native,kvmpy,qemu] [--only NAME ...] [--cpus N] [--logs DIR]

DIR holds the programs, such as Valgrind's instruction tests and Linux's selftests/x86. A line of output that ends in
"ok" or begins with "[OK]" counts as passed; one with "not ok" or "[FAIL]" as failed.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.suites import linux_guest
from benchmarks.suites.linux_guest import Ended

OK = re.compile(r"^\s*\[OK\]|(?<!not)\sok$", re.MULTILINE)
FAILED = re.compile(r"^\s*\[FAIL\]|\bnot ok\b", re.MULTILINE)
KILLED = 137
WIDTH = 22


def counts(ended: Ended) -> tuple[int, int]:
    """Lines that say ok, and lines that say the contrary."""
    return len(OK.findall(ended.output)), len(FAILED.findall(ended.output))


def _cell(ended: Ended | None) -> str:
    if ended is None:
        return f"{'did not run':>{WIDTH}}"
    ok, failed = counts(ended)
    status = {0: "ok", KILLED: "killed"}.get(ended.status, str(ended.status))
    return f"{ok:>6}{failed:>6}{status:>{WIDTH - 12}}"


def better_or_same(ours: Ended | None, theirs: Ended | None) -> bool:
    """Whether our outcome is as good: no more failures, no fewer passes, status 0 where theirs is."""
    if ours is None or theirs is None:
        return theirs is None
    (ok, failed), (their_ok, their_failed) = counts(ours), counts(theirs)
    return ok >= their_ok and failed <= their_failed and (ours.status == 0 or theirs.status != 0)


def print_table(names: Sequence[str], results: dict[str, dict[str, Ended]]) -> None:
    sides = list(results)
    print(f"{'program':<28}" + "".join(f"{side:>{WIDTH}}" for side in sides))
    print(f"{'':<28}" + "".join(f"{'ok':>6}{'fail':>6}{'status':>{WIDTH - 12}}" for _ in sides))
    for name in names:
        print(f"{name:<28}" + "".join(_cell(results[side].get(name)) for side in sides))
    total = f"{'in all, and of status 0':<28}"
    for found in results.values():
        ok, failed = (sum(counts(ended)[i] for ended in found.values()) for i in (0, 1))
        good = sum(ended.status == 0 for ended in found.values())
        total += f"{ok:>6}{failed:>6}{f'{good} of {len(names)}':>{WIDTH - 12}}"
    print(total)
    ours = results.get("kvmpy", {})
    for side in sides:
        if side != "kvmpy" and ours:
            worse = [n for n in names if not better_or_same(ours.get(n), results[side].get(n))]
            print(f"worse than {side}: {', '.join(worse) if worse else 'none'}")
            other = [n for n in names if n in ours and n in results[side] and ours[n].output != results[side][n].output]
            print(f"other output than {side}: {', '.join(other) if other else 'none'}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path, help="the programs, static ones")
    parser.add_argument("--sides", default=",".join(linux_guest.SIDES))
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--cpus", type=int, default=1, help="of the guests")
    parser.add_argument("--seconds", type=int, default=60, help="for each program")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep the consoles' output here")
    options = parser.parse_args()
    files = {path.name: path for path in sorted(options.directory.iterdir()) if path.is_file()}
    programs = {name: path for name, path in files.items() if os.access(path, os.X_OK) and not path.suffix}
    if options.only:
        programs = {name: path for name, path in programs.items() if name in options.only}
    results = {}
    for side in options.sides.split(","):
        log = options.logs / f"{options.directory.name}.{side}.log" if options.logs else None
        results[side] = linux_guest.run(side, programs, cpus=options.cpus, seconds=options.seconds, log=log)
    print_table(list(programs), results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
