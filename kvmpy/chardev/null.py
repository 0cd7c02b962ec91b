# SPDX-License-Identifier: Apache-2.0
"""A serial line that is not connected."""

from __future__ import annotations

from kvmpy.chardev.backend import Receive


class Null:
    """Output goes nowhere, input never comes."""

    def write(self, data: bytes) -> None:
        """Forget `data`."""

    def attach(self, receive: Receive) -> None:
        """`receive` is never called."""

    def close(self) -> None:
        """Nothing to do."""
