# SPDX-License-Identifier: Apache-2.0
"""The counters of a running machine in a file, for the textfile collector of node_exporter or anything that reads."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

from kvmpy.cli.text import tell
from kvmpy.machine import Machine

SECONDS = 5.0


class MetricsFile:
    """Writes `machine.stats().prometheus()` to `path` every few seconds and at the end; None: does nothing.

    The file is replaced as a whole, so that nobody reads half of it. Raises OSError when it cannot be written at first.
    """

    def __init__(self, machine: Machine, path: str | None, seconds: float = SECONDS) -> None:
        self._machine, self._seconds = machine, seconds
        self._path = None if path is None else Path(path)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def write(self) -> None:
        """Write it now."""
        if self._path is not None:
            new = self._path.with_name(f".{self._path.name}.new")
            new.write_text(self._machine.stats().prometheus())
            new.replace(self._path)

    def _run(self) -> None:
        while not self._stop.wait(self._seconds):
            try:
                self.write()
            except OSError as error:
                tell(f"the metrics cannot be written: {error}")
                return

    def __enter__(self) -> MetricsFile:
        if self._path is not None:
            self.write()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._path is not None:
            self._thread.join()
            self.write()
