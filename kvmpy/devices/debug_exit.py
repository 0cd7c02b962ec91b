# SPDX-License-Identifier: Apache-2.0
"""Debug-exit port: one write of the guest ends the run with a status (as QEMU's isa-debug-exit).

A guest writes VALUE and the machine exits with status (VALUE << 1) | 1, which is never 0: the status 0 is
kept for a guest that shuts down in an orderly way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from kvmpy.devices.base import StateReader

log = logging.getLogger("kvmpy.devices.debug_exit")


class DebugExit:
    """The port.

    Args:
        on_exit: called with the exit status, without locks.
    """

    name = "debug-exit"
    size = 4

    def __init__(self, on_exit: Callable[[int], object]) -> None:
        self._on_exit = on_exit

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        if offset:
            log.debug("write of %#x at offset %d ignored: the value goes to offset 0", value, offset)
            return
        self._on_exit((value & (1 << 8 * size) - 1) << 1 | 1)

    def reset(self) -> None:
        """There is nothing to reset."""

    def save(self) -> dict[str, Any]:
        return {"version": 1}

    def load(self, state: Mapping[str, Any]) -> None:
        StateReader(self.name, state).end()
