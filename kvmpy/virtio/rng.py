# SPDX-License-Identifier: Apache-2.0
"""Entropy device, virtio 1.2 section 5.4: random bytes from the host's getrandom(2)."""

from __future__ import annotations

from typing import Any

from kvmpy.virtio.device import VirtioDevice


class Rng(VirtioDevice):
    """A source of random bytes for the guest."""

    device_id = 4

    def __init__(self, name: str = "rng", *, threaded: bool = True) -> None:
        super().__init__(name, [64], threaded=threaded)
        self._bytes = 0

    def serve(self, index: int) -> int:
        """Fill the driver's buffers; at most 64 KiB each."""
        result, count = self.queues[index].serve_rng()
        self._bytes += count
        return result

    def stats(self) -> dict[str, Any]:
        """Live counters by name."""
        return {**super().stats(), "bytes": self._bytes}
