# SPDX-License-Identifier: Apache-2.0
"""Output into a file."""

from __future__ import annotations

import os
import threading

from kvmpy.chardev.backend import Receive


class File:
    """Writes what the guest sends to `path`, unbuffered; there is no input.

    append: keep what the file has; else it starts empty. Raises OSError.
    """

    def __init__(self, path: str | os.PathLike[str], append: bool = False) -> None:
        mode = os.O_APPEND if append else os.O_TRUNC
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | mode, 0o644)
        self._lock = threading.Lock()

    def write(self, data: bytes) -> None:
        """Append `data`; ignored after `close()`. Raises OSError, e.g. on a full disk."""
        with self._lock:
            while data and self._fd >= 0:
                data = data[os.write(self._fd, data) :]

    def attach(self, receive: Receive) -> None:
        """`receive` is never called."""

    def close(self) -> None:
        """Close the file; again is no error."""
        with self._lock:
            fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
