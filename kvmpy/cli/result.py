# SPDX-License-Identifier: Apache-2.0
"""How a run ended, for people, for scripts and as an exit status."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvmpy.cli import status
from kvmpy.errors import CapabilityError, GuestError

if TYPE_CHECKING:
    from kvmpy.machine import Machine

FORMAT = 1

# Of the engine's many statistics, those that say why a vCPU left its guest.
COUNTERS = ("exits", "insn_emulation", "insn_emulation_fail", "hypercalls")

SENTENCES = {
    "poweroff": "",
    "debug-exit": "",
    "reset": "the guest asked for a reset",
    "halted": "every processor halted for good",
    "stopped": "stopped",
    "timeout": "the time is over",
    "interrupted": "interrupted",
    "terminated": "terminated",
}
STATUSES = {
    "poweroff": status.OK,
    "reset": status.RESET,
    "halted": status.HALTED,
    "stopped": status.INTERRUPTED,
    "timeout": status.TIMEOUT,
    "interrupted": status.INTERRUPTED,
    "terminated": status.TERMINATED,
}


@dataclass(slots=True)
class Result:
    """What is known about a run; filled while it goes on.

    `outcome` is a key of SENTENCES, or "guest-error", "error". `code` is what the guest said (debug-exit, or
    the command's status with --run). `seconds` is wall time from the start of the processors.
    """

    outcome: str = "error"
    status: int = status.FAILED
    code: int | None = None
    backend: str | None = None
    backend_reason: str | None = None
    image: str | None = None
    image_format: str | None = None
    seconds: float | None = None
    exits: dict[str, dict[str, int]] = field(default_factory=dict)
    unclaimed: dict[str, int] = field(default_factory=dict)
    error: BaseException | None = None

    def ended(self, outcome: str, code: int | None = None) -> None:
        """The guest, or the user, ended the run."""
        self.outcome, self.code = outcome, code
        if outcome == "debug-exit":
            self.status = (code or 0) & 0xFF
        else:
            self.status = STATUSES.get(outcome, status.FAILED)

    def failed(self, error: BaseException, exit_status: int) -> None:
        """The guest could not go on, or the host could not run it."""
        self.outcome = "guest-error" if isinstance(error, GuestError) else "error"
        self.error, self.status = error, exit_status

    def sentence(self) -> str:
        """What a person should be told, "" when all went as usual."""
        return SENTENCES.get(self.outcome, f"the run ended: {self.outcome}")

    def count(self, machine: Machine) -> None:
        """Take the exits of a machine that has stopped, and the accesses that nobody answered."""
        for vcpu in machine.vm.vcpus:
            if vcpu.running:  # a second Ctrl-C while the first one was still stopping it
                continue
            counts = {"total": sum(machine.vm.assist.exits(vcpu).values())}
            with contextlib.suppress(CapabilityError), vcpu.stats() as stats:
                counts |= {
                    name: value
                    for name, value in stats.read().items()
                    if isinstance(value, int) and name.endswith(COUNTERS)
                }
            self.exits[str(vcpu.id)] = counts
        buses = {"pio": machine.vm.pio, "mmio": machine.vm.mmio}
        self.unclaimed = {name: bus.unclaimed_total for name, bus in buses.items()}

    def as_json(self, describe: Any) -> str:
        """One line of JSON; `describe(error)` is the text for an error."""
        return json.dumps(
            {
                "format": FORMAT,
                "outcome": self.outcome,
                "status": self.status,
                "code": self.code,
                "backend": self.backend,
                "backend_reason": self.backend_reason,
                "image": self.image,
                "image_format": self.image_format,
                "seconds": None if self.seconds is None else round(self.seconds, 6),
                "exits": self.exits,
                "unclaimed": self.unclaimed,
                "error": None
                if self.error is None
                else {
                    "type": type(self.error).__name__,
                    "message": describe(self.error),
                    "report": self.error.report if isinstance(self.error, GuestError) else "",
                },
            }
        )
