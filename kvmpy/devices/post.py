# SPDX-License-Identifier: Apache-2.0
"""POST code port 0x80: firmware shows how far it got; others write to it to pass a microsecond.

The last codes are kept, so that a failure report can tell where a boot stopped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from threading import Lock
from typing import Any

from kvmpy.devices.base import ByteRegisters, StateReader

KEPT = 32


class PostCode(ByteRegisters):
    """The port; a read gives the last code, as from the latch of the PC's DMA page register."""

    name = "post"
    size = 1

    def __init__(self) -> None:
        self._lock = Lock()
        self._codes: deque[int] = deque(maxlen=KEPT)

    @property
    def codes(self) -> list[int]:
        """The last 32 codes that differ from the one before, oldest first."""
        with self._lock:
            return list(self._codes)

    def read_byte(self, offset: int) -> int:
        with self._lock:
            return self._codes[-1] if self._codes else 0

    def write_byte(self, offset: int, value: int) -> None:
        with self._lock:
            # Linux writes here for delays: without this, that would push out what the firmware said.
            if not self._codes or self._codes[-1] != value:
                self._codes.append(value)

    def reset(self) -> None:
        with self._lock:
            self._codes.clear()

    def save(self) -> dict[str, Any]:
        return {"version": 1, "codes": self.codes}

    def load(self, state: Mapping[str, Any]) -> None:
        s = StateReader(self.name, state)
        codes = s.integers("codes", KEPT, 0xFF)
        s.end()
        with self._lock:
            self._codes = deque(codes, maxlen=KEPT)
