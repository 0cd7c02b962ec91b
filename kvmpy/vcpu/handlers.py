# SPDX-License-Identifier: Apache-2.0
"""Exit handlers: which function serves which exit. `kvmpy.Vm` offers them as decorators.

    @vm.on_io_out(0x3F8)
    def out(exit): ...

A handler takes the exit. It returns None to go on, or an `Outcome` to end the run; a handler of a read
may return the answer (an int, or bytes for a string read) instead of calling `exit.answer()`.
Ports and memory ranges are claimed on the bus, so a second owner is refused by name.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from kvmpy import _exits as x
from kvmpy.bus import Bus
from kvmpy.errors import OverlapError

if TYPE_CHECKING:
    from kvmpy.vcpu.vcpu import Vcpu

Handler = Callable[[Any], object]
H = TypeVar("H", bound=Handler)


class Ranges:
    """Handlers by address range; ranges never overlap (the bus sees to that)."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._entries: list[tuple[int, Handler]] = []  # (end, handler), sorted like _starts

    def add(self, start: int, size: int, handler: Handler) -> None:
        at = bisect.bisect(self._starts, start)
        self._entries.insert(at, (start + size, handler))
        self._starts.insert(at, start)

    def find(self, address: int) -> Handler | None:
        at = bisect.bisect(self._starts, address) - 1
        if at < 0:
            return None
        end, handler = self._entries[at]
        return handler if address < end else None


class Handlers:
    """The registered handlers of one VM."""

    def __init__(self, pio: Bus, mmio: Bus) -> None:
        self._pio = pio
        self._mmio = mmio
        self.io_out: dict[int, Handler] = {}
        self.io_in: dict[int, Handler] = {}
        self.mmio_read = Ranges()
        self.mmio_write = Ranges()
        self.hypercall: dict[int | None, Handler] = {}
        self.msr_read: dict[int, Handler] = {}
        self.msr_write: dict[int, Handler] = {}
        self.by_type: dict[type[x.Exit], Handler] = {}
        self.kicked: Callable[[Vcpu], None] | None = None  # in the vCPU's thread, each time a kick took it out

    def on_port(self, port: int, count: int, handler: Handler, *, write: bool) -> None:
        """Claim `count` ports from `port` in one direction."""
        _claim(self._pio, port, count, handler, write=write)
        table = self.io_out if write else self.io_in
        table.update(dict.fromkeys(range(port, port + count), handler))

    def on_memory(self, gpa: int, size: int, handler: Handler, *, write: bool) -> None:
        """Claim `size` bytes of guest physical address space from `gpa` in one direction."""
        _claim(self._mmio, gpa, size, handler, write=write)
        (self.mmio_write if write else self.mmio_read).add(gpa, size, handler)

    def on_key(self, table: dict[Any, Handler], key: object, what: str, handler: Handler) -> None:
        """Register in one of the tables by number or exit class; one owner each."""
        if key in table:
            raise OverlapError(f"{what} is already handled by {name_of(table[key])}; refused {name_of(handler)}")
        table[key] = handler


def name_of(handler: Handler) -> str:
    """How a handler is called in errors: name, file and line."""
    code = getattr(handler, "__code__", None)
    name = getattr(handler, "__qualname__", repr(handler))
    return f"{name} ({code.co_filename}:{code.co_firstlineno})" if code is not None else name


def _claim(bus: Bus, base: int, size: int, handler: Handler, *, write: bool) -> None:
    # The loop gives a handler the accesses that start in its range, as exits, before it asks the bus.
    # What still comes through the bus is the tail of a wide access to a neighbour: nobody's, as on real buses.
    if write:
        bus.claim(base, size, name_of(handler), write=lambda offset, size, value: None)
    else:
        bus.claim(base, size, name_of(handler), read=lambda offset, size: (1 << 8 * size) - 1)
