# SPDX-License-Identifier: Apache-2.0
"""The examination of a host: which processor engine runs guests, and what else is there or lacking.

    report = kvmpy.doctor.examine()
    if not report.usable: print(report.reason)

Everything is tried, not guessed: tiny guests run on each engine, a tap is made and removed. It takes well
under a second and leaves nothing behind. Nothing is printed; `kvmpy doctor` does that.
"""

from __future__ import annotations

from kvmpy.doctor.examination import examine
from kvmpy.doctor.report import Check, Report, Section, Status

__all__ = ["Check", "Report", "Section", "Status", "examine"]
