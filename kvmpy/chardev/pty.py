# SPDX-License-Identifier: Apache-2.0
"""A serial line on a pseudo terminal."""

from __future__ import annotations

import os
import tty

from kvmpy.chardev.backend import Input
from kvmpy.chardev.pump import Pump


class Pty(Input):
    """A pseudo terminal; other programs open `path` (/dev/pts/N), e.g. `screen /dev/pts/5`.

    It is raw: bytes pass unchanged. Nobody needs to be there; then the kernel's buffer and 1 MiB of output
    are kept and the rest is dropped (`dropped`). Raises OSError.
    """

    def __init__(self) -> None:
        super().__init__()
        master, self._slave = os.openpty()
        tty.setraw(self._slave)
        self.path = os.ttyname(self._slave)
        # Our own open slave keeps the terminal alive: else reads fail while no program has it open.
        pump = Pump(master, self.deliver, _nothing, f"kvmpy {self.path}")
        self._pump: Pump | None = pump
        pump.start()

    @property
    def dropped(self) -> int:
        """Output bytes that were lost because nobody read them."""
        return self._pump.dropped if self._pump is not None else 0

    def write(self, data: bytes) -> None:
        """Bytes from the guest; never blocks, ignored after `close()`."""
        pump = self._pump
        if pump is not None:
            pump.send(data)

    def close(self) -> None:
        """Close both ends; again is no error."""
        pump, self._pump = self._pump, None
        if pump is not None:
            pump.close(flush=0)
            os.close(self._slave)


def _nothing() -> None:
    pass
