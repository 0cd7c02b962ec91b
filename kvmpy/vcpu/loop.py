# SPDX-License-Identifier: Apache-2.0
"""The run loop: run the vCPU, look at the exit, do what it asks, run again. The same for every engine.

An exit goes, in this order, to the handler registered for it, to the device on its bus, to the default.
In-kernel conveniences (irqchip, irqfd, ioeventfd, coalesced I/O) only mean that fewer exits come here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvmpy import _exits as x
from kvmpy.errors import EmulationFailure, EntryFailure, GuestError, GuestShutdown, UnexpectedExit

if TYPE_CHECKING:
    from kvmpy.bus import Bus
    from kvmpy.vcpu.assist import Assist
    from kvmpy.vcpu.handlers import Handlers
    from kvmpy.vcpu.vcpu import Vcpu

log = logging.getLogger("kvmpy.vcpu")

_SYSTEM_EVENTS = {1: "poweroff", 2: "reset"}  # KVM_SYSTEM_EVENT_SHUTDOWN, _RESET


@dataclass(frozen=True, slots=True)
class Outcome:
    """Why a run ended, when it ended well.

    `reason` is "halted" (HLT and no interrupt controller to wake it), "poweroff", "reset", "debug-exit",
    "stopped" (by the host) or what a handler said; `code` is the guest's exit code where it gave one;
    `vcpu` is the id of the vCPU that ended it.
    """

    reason: str
    code: int = 0
    vcpu: int | None = None


class Loop:
    """Serves the exits of one vCPU until one of them ends the run."""

    def __init__(self, vcpu: Vcpu, pio: Bus, mmio: Bus, handlers: Handlers, assist: Assist | None = None) -> None:
        self.vcpu = vcpu
        self._assist = assist
        self._pio = pio
        self._mmio = mmio
        self._handlers = handlers
        self._io_out_handlers = handlers.io_out
        self._io_in_handlers = handlers.io_in
        self._by_type: dict[type[x.Exit], Callable[[Any], Outcome | None]] = {
            x.IoOut: self._io_out,
            x.IoIn: self._io_in,
            x.MmioWrite: self._mmio_write,
            x.MmioRead: self._mmio_read,
            x.Hlt: self._hlt,
            x.Hypercall: self._hypercall,
            x.RdMsr: self._rdmsr,
            x.WrMsr: self._wrmsr,
            x.Shutdown: self._shutdown,
            x.SystemEvent: self._system_event,
            x.InternalError: self._internal_error,
            x.FailEntry: self._fail_entry,
            x.IrqWindowOpen: self._nothing,
            x.IoapicEoi: self._nothing,
        }

    def run(self) -> Outcome | None:
        """Serve exits until one of them ends the run (returns its outcome) or the vCPU is kicked (None)."""
        if self._assist is None or not self._assist.leads:
            return self._serve(self.vcpu.run)
        lead = self._assist.lead(self.vcpu, self._handlers, self.vcpu.memory)
        try:
            return self._serve(lead.run)
        finally:
            lead.leave()

    def _serve(self, run: Callable[[], x.Exit]) -> Outcome | None:
        table = self._by_type
        while True:
            exit = run()
            kind = type(exit)
            if kind is x.Interrupted:
                if self._handlers.kicked is not None:
                    self._handlers.kicked(self.vcpu)
                return None
            serve = table.get(kind)
            outcome = self._other(exit) if serve is None else serve(exit)
            if outcome is not None:
                return outcome

    def _io_out(self, exit: x.IoOut) -> Outcome | None:
        handler = self._io_out_handlers.get(exit.port)
        if handler is not None:
            returned = handler(exit)
            return None if returned is None else _outcome(returned)
        if exit.count == 1:
            self._pio.write(exit.port, exit.size, exit.value)
        else:
            for i in range(0, len(exit.data), exit.size):
                self._pio.write(exit.port, exit.size, int.from_bytes(exit.data[i : i + exit.size], "little"))
        return None

    def _io_in(self, exit: x.IoIn) -> Outcome | None:
        handler = self._io_in_handlers.get(exit.port)
        if handler is not None:
            return _answer(exit, handler(exit))
        if exit.count == 1:
            exit.answer(self._pio.read(exit.port, exit.size))
        else:
            items = (self._pio.read(exit.port, exit.size) for _ in range(exit.count))
            exit.answer(b"".join(item.to_bytes(exit.size, "little") for item in items))
        return None

    def _mmio_write(self, exit: x.MmioWrite) -> Outcome | None:
        handler = self._handlers.mmio_write.find(exit.addr)
        if handler is not None:
            return _outcome(handler(exit))
        self._mmio.write(exit.addr, exit.size, exit.value)
        return None

    def _mmio_read(self, exit: x.MmioRead) -> Outcome | None:
        handler = self._handlers.mmio_read.find(exit.addr)
        if handler is not None:
            return _answer(exit, handler(exit))
        exit.answer(self._mmio.read(exit.addr, exit.size))
        return None

    def _rdmsr(self, exit: x.RdMsr) -> Outcome | None:
        handler = self._handlers.msr_read.get(exit.index)
        if handler is None:
            exit.fail()  # the guest sees #GP, as for any MSR that is not there
            return None
        return _answer(exit, handler(exit))

    def _wrmsr(self, exit: x.WrMsr) -> Outcome | None:
        handler = self._handlers.msr_write.get(exit.index)
        if handler is None:
            exit.fail()
            return None
        exit.answer()  # the write succeeds, unless the handler calls fail()
        return _outcome(handler(exit))

    def _hypercall(self, exit: x.Hypercall) -> Outcome | None:
        handler = self._handlers.hypercall.get(exit.nr) or self._handlers.hypercall.get(None)
        if handler is None:
            exit.answer(-1000 & 0xFFFF_FFFF_FFFF_FFFF)  # -KVM_ENOSYS (linux/kvm_para.h)
            return None
        return _answer(exit, handler(exit))

    def _nothing(self, exit: x.Exit) -> Outcome | None:
        handler = self._handlers.by_type.get(type(exit))
        return None if handler is None else _outcome(handler(exit))

    def _hlt(self, exit: x.Exit) -> Outcome | None:
        handler = self._handlers.by_type.get(x.Hlt)
        if handler is not None:
            return _outcome(handler(exit))
        return Outcome("halted", vcpu=self.vcpu.id)

    def _shutdown(self, exit: x.Exit) -> Outcome | None:
        return self._handled_or_dead(exit, GuestShutdown, "triple fault")

    def _internal_error(self, exit: x.InternalError) -> Outcome | None:
        if self._assist is not None and not self._assist.leads and x.InternalError not in self._handlers.by_type:
            instead = self._assist.take(self.vcpu, exit, self.vcpu.memory)
            if instead is not exit:
                return None if instead is None else self._by_type.get(type(instead), self._other)(instead)
        return self._handled_or_dead(exit, EmulationFailure, exit.suberror_name)

    def _fail_entry(self, exit: x.FailEntry) -> Outcome | None:
        return self._handled_or_dead(exit, EntryFailure, f"hardware reason {exit.hardware_reason:#x}")

    def _system_event(self, exit: x.SystemEvent) -> Outcome | None:
        handler = self._handlers.by_type.get(x.SystemEvent)
        if handler is not None:
            return _outcome(handler(exit))
        reason = _SYSTEM_EVENTS.get(exit.type)
        if reason is not None:
            return Outcome(reason, vcpu=self.vcpu.id)
        return self._handled_or_dead(exit, GuestError, f"system event {exit.type}")

    def _other(self, exit: x.Exit) -> Outcome | None:
        return self._handled_or_dead(exit, UnexpectedExit, "no handler for this exit")

    def _handled_or_dead(self, exit: x.Exit, error: type[GuestError], what: str) -> Outcome | None:
        handler = self._handlers.by_type.get(type(exit))
        if handler is not None:
            return _outcome(handler(exit))
        from kvmpy.vcpu.report import explain  # only needed now, and not at import

        raise error(f"vCPU {self.vcpu.id}: {exit!r}: {what}", explain(self.vcpu, exit))


def _outcome(returned: object) -> Outcome | None:
    """What a handler returned: an Outcome ends the run, None goes on."""
    if returned is None or isinstance(returned, Outcome):
        return returned
    raise TypeError(f"an exit handler returns None or an Outcome, not {returned!r}")


def _answer(exit: Any, returned: object) -> Outcome | None:
    """A read handler may return its answer instead of calling `exit.answer`."""
    if isinstance(returned, (int, bytes)):
        exit.answer(returned)
        return None
    return _outcome(returned)
