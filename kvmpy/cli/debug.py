# SPDX-License-Identifier: Apache-2.0
"""`kvmpy debug`: look into a guest while it runs."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmpy.cli import inputs, run

if TYPE_CHECKING:
    from kvmpy.machine import Machine
    from kvmpy.profile import Profiler

EPILOG = """\
examples:
  kvmpy debug profile debian-6.1 --run 'sha256sum /bin/busybox'
  kvmpy debug profile vmlinuz --append 'console=ttyS0 nokaslr' --symbols System.map --report boot.txt

The report has the engine's counters (instructions, translations, TLB misses, exits by kind ...), which handlers
of the interpreter the software CPU's host code called how often, functions by samples when there are symbols, and
the hottest blocks disassembled (with the package iced-x86), host code beside the guest's. An address is the start
of the block that would have run next. For the addresses of System.map or of a vmlinux the kernel must
not be moved: say nokaslr. The profiler needs no KVM and no JIT, and works with both.
"""


def add_parser(commands: Any) -> None:
    """Add `debug` to the command line."""
    parser = commands.add_parser(
        "debug",
        help="look into a running guest",
        description="Look into a guest while it runs.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    profile = what.add_parser(
        "profile",
        help="run a guest and show where its time goes",
        description="Run a guest, as `kvmpy run` does, and show where its time goes.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    profile.set_defaults(function=_profile)
    group = profile.add_argument_group("the profile")
    group.add_argument("--symbols", metavar="FILE", type=Path,
                       help="System.map, a copy of /proc/kallsyms, or an ELF file")  # fmt: skip
    group.add_argument("--interval", metavar="S", type=inputs.seconds, default=0.001,
                       help="seconds between samples (default 0.001)")  # fmt: skip
    group.add_argument("--top", metavar="N", type=inputs.number, default=15,
                       help="functions and blocks shown (default 15)")  # fmt: skip
    group.add_argument("--report", metavar="FILE", type=Path, help="where the report goes (default standard error)")
    run.add_arguments(profile)


def _software_leads() -> bool:
    from kvmpy.vm import Vm

    with Vm("auto", lead=True) as vm:
        return vm.assist.leads


def _profile(options: argparse.Namespace) -> int:
    from kvmpy.profile import Profiler, Symbols

    symbols = Symbols.read(options.symbols) if options.symbols else Symbols()
    if options.backend == "auto" and _software_leads():
        options.backend = "tcg"  # by itself: each sample would cost a move of all state to the kernel's vCPU
        print("kvmpy: this KVM emulates ring 0; profiling on the software CPU alone", file=sys.stderr)
    profilers: list[Profiler] = []

    @contextlib.contextmanager
    def watch(machine: Machine) -> Iterator[None]:
        profilers.append(Profiler(machine, options.interval))
        with profilers[0]:
            yield

    status = run.run(options, watch)
    if profilers:
        report = profilers[0].profile.report(symbols, options.top)
        if options.report:
            options.report.write_text(report)
        else:
            print(report, file=sys.stderr, end="", flush=True)
    return status
