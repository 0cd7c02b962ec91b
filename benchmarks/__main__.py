# SPDX-License-Identifier: Apache-2.0
"""Run benchmarks and print a table of ratios: `python -m benchmarks [NAME ...] [--rounds N] [--json FILE]`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from benchmarks import cpu, disks, layer
from benchmarks.cpu.payload import BenchmarkError
from benchmarks.measure import HEADER, Result
from kvmpy.guests import GuestUnavailableError

ROUNDS = 7  # pairs per row of the layer benchmarks


class Row(Protocol):
    def row(self) -> str: ...
    def to_json(self) -> dict[str, object]: ...


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark by name: what it is in one line, the header of its table, how to run it."""

    about: str
    header: str
    run: Callable[[argparse.Namespace], Iterable[Row]]


def _layer(measure: Callable[[int], list[Result]]) -> Benchmark:
    about = (measure.__doc__ or "").splitlines()[0]
    return Benchmark(about, HEADER, lambda options: measure(options.rounds or ROUNDS))


def _cpu(options: argparse.Namespace) -> Iterable[Row]:
    return cpu.run(
        options.rounds,
        guest=options.guest,
        qemu=options.qemu,
        kvm=options.kvm,
        executor=options.executor,
        interp=options.interp,
        only=options.workload,
    )


def _disks(options: argparse.Namespace) -> Iterable[Row]:
    return disks.run(options.rounds, guest=options.guest, qemu=options.qemu)


KNOWN: Mapping[str, Benchmark] = {
    **{name: _layer(measure) for name, measure in layer.BENCHMARKS.items()},
    "cpu": Benchmark((cpu.__doc__ or "").strip(), cpu.HEADER, _cpu),
    "rings": Benchmark((disks.ring.__doc__ or "").strip(), HEADER, lambda options: disks.ring.run()),
    "disks": Benchmark((disks.__doc__ or "").strip(), disks.HEADER, _disks),
}


def main() -> int:
    listing = "\n".join(f"  {name:<10}{benchmark.about}" for name, benchmark in KNOWN.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure kvmpy beside its peers, in turn; a ratio is our time divided by the peer's.",
        epilog=f"benchmarks:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="which to run (default: all)")
    parser.add_argument("--rounds", type=int, help=f"rounds per row (default {ROUNDS}; cpu: {cpu.ROUNDS})")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the rows to FILE too")
    guest = parser.add_argument_group("cpu")
    guest.add_argument("--guest", default="debian-6.1", help="the stock guest to boot (default %(default)s)")
    guest.add_argument("--qemu", default="qemu-system-x86_64", metavar="PROGRAM", help="the peer (default %(default)s)")
    guest.add_argument("--kvm", action="store_true", help="measure kvmpy on the kernel's KVM too")
    guest.add_argument("--executor", choices=("interp", "jit"), help="of the software CPU (default: its own choice)")
    guest.add_argument("--interp", action="store_true", help="measure the software CPU's interpreter besides")
    guest.add_argument(
        "--workload", action="append", default=[], metavar="NAME", help="only this one, without boots (may be repeated)"
    )
    options = parser.parse_args()
    if unknown := set(options.names) - KNOWN.keys():
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(KNOWN)}")
    if options.rounds is not None and options.rounds < 1:
        parser.error("--rounds is at least 1")

    print(f"{os.cpu_count()} CPUs, Linux {platform.release()}, Python {platform.python_version()}")
    rows: list[Row] = []
    header = ""
    for benchmark in (KNOWN[name] for name in options.names or KNOWN):
        if benchmark.header != header:
            header = benchmark.header
            print(f"\n{header}", flush=True)
        try:
            for row in benchmark.run(options):
                print(row.row(), flush=True)
                rows.append(row)
        except (BenchmarkError, GuestUnavailableError) as error:
            print(f"benchmarks: {error}", file=sys.stderr)
            return 1
    if options.json:
        options.json.write_text(json.dumps([row.to_json() for row in rows], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
