# SPDX-License-Identifier: Apache-2.0
"""`kvmpy doctor`: what this host can do for guests."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from kvmpy.cli import status
from kvmpy.cli.text import fill, paint, width

if TYPE_CHECKING:
    from kvmpy.doctor import Report

EPILOG = """\
examples:
  kvmpy doctor
  kvmpy doctor --json | jq .sections.kvm.speed.data

KVM is judged by running guests on it, not by processor flags.
Exit status 0: some processor engine runs guests; 69: none does.
"""

COLOURS = {"ok": "green", "limited": "yellow", "lacking": "red", "info": "dim"}


def add_parser(commands: Any) -> None:
    """Add `doctor` to the command line."""
    parser = commands.add_parser(
        "doctor",
        help="say whether guests can run here, and what to do about each lack",
        description="Examine this host: KVM (by running tiny guests), permissions, memory, networks.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(function=run)


def run(options: argparse.Namespace) -> int:
    """Examine the host and print the report."""
    from kvmpy.doctor import examine

    report = examine()
    print(json.dumps(report.as_dict(), indent=2) if options.json else render(report))
    return status.OK if report.usable else status.UNAVAILABLE


def render(report: Report) -> str:
    """The report as aligned text for stdout."""
    columns = width(sys.stdout)
    names = max(len(check.name) for section in report.sections for check in section.checks)
    marks = max(map(len, COLOURS))
    indent = 2 + names + 2 + marks + 2
    lines: list[str] = []
    for section in report.sections:
        lines.append(paint(section.title, "bold", sys.stdout))
        for check in section.checks:
            painted = paint(f"{check.status:<{marks}}", COLOURS[check.status], sys.stdout)
            lines.append(f"  {check.name:<{names}}  {painted}  {fill(check.text, indent, columns)}")
            if check.advice:
                lines.append(" " * indent + "-> " + fill(check.advice, indent + 3, columns))
        lines.append("")
    if report.usable:
        verdict = f"Guests run here. --backend auto takes {report.backend}: {report.reason}"
        lines.append(paint(fill(verdict, 0, columns), "bold", sys.stdout))
    else:
        verdict = f"Guests cannot run here: {report.reason}"
        lines.append(paint(fill(verdict, 0, columns), "red", sys.stdout))
    return "\n".join(lines)
