# SPDX-License-Identifier: Apache-2.0
"""What an examination of the host gives: checks in sections, each with a finding and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

FORMAT = 1


class Status(StrEnum):
    """What a check found."""

    OK = "ok"  # works
    LIMITED = "limited"  # works, with a limit worth knowing
    LACKING = "lacking"  # does not work; `advice` says what to do
    INFO = "info"  # neither good nor bad


@dataclass(frozen=True, slots=True)
class Check:
    """One finding: `text` for people, `data` (JSON values) for programs, `advice` on a lack."""

    name: str
    status: Status
    text: str
    advice: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Section:
    """Checks that belong together."""

    name: str
    title: str
    checks: tuple[Check, ...]

    def find(self, name: str) -> Check | None:
        return next((check for check in self.checks if check.name == name), None)


@dataclass(frozen=True, slots=True)
class Report:
    """The whole examination.

    `usable`: some processor engine runs guests. `backend`: what "auto" takes ("" if none), `reason`: why.
    """

    version: str
    usable: bool
    backend: str
    reason: str
    sections: tuple[Section, ...]

    def section(self, name: str) -> Section:
        """A section by name. Errors: KeyError."""
        for section in self.sections:
            if section.name == name:
                return section
        raise KeyError(name)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values; `format` rises when this shape changes incompatibly."""
        return {
            "format": FORMAT,
            "kvmpy": self.version,
            "usable": self.usable,
            "backend": self.backend,
            "reason": self.reason,
            "sections": {
                section.name: {
                    check.name: {
                        "status": str(check.status),
                        "text": check.text,
                        "advice": check.advice,
                        "data": dict(check.data),
                    }
                    for check in section.checks
                }
                for section in self.sections
            },
        }


def ok(name: str, text: str, **data: Any) -> Check:
    return Check(name, Status.OK, text, data=data)


def info(name: str, text: str, **data: Any) -> Check:
    return Check(name, Status.INFO, text, data=data)


def limited(name: str, text: str, advice: str = "", **data: Any) -> Check:
    return Check(name, Status.LIMITED, text, advice, data)


def lacking(name: str, text: str, advice: str, **data: Any) -> Check:
    return Check(name, Status.LACKING, text, advice, data)
