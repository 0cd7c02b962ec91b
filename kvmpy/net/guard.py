# SPDX-License-Identifier: Apache-2.0
"""A shell that waits for this process to end, and takes back what it left in a network namespace if it was killed.

The shell reads a pipe whose other end only this process has: a word says that all was removed, the pipe's end that
nobody will any more. Then it becomes a Python that calls `clean()`, in the namespace that it was started in.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

from kvmpy.net import owner

log = logging.getLogger("kvmpy.net")

SCRIPT = 'read -r word; [ "$word" = done ] || exec "$@"'
PROGRAM = "import sys; from kvmpy.net.guard import clean; clean(sys.argv[1])"
PATIENCE = 10.0  # seconds from the end of the pipe to the end of its process


class Guard:
    """Started in the calling thread's namespace, before there is anything to remove."""

    def __init__(self) -> None:
        self._shell: subprocess.Popen[bytes] | None = None
        path = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        words = ["sh", "-c", SCRIPT, "kvmpy-guard", sys.executable, "-P", "-c", PROGRAM, owner.mark()]
        try:
            self._shell = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # what kills the group or the terminal is not for it
                cwd="/",
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
            )
        except OSError as error:
            log.warning("no guard: if this process is killed, the next tap cleans up (%s)", error)

    def close(self) -> None:
        """Nothing is left to remove; again is no error."""
        shell, self._shell = self._shell, None
        if shell is not None:
            shell.communicate(b"done\n")


def clean(word: str) -> list[str]:
    """When the process of this `owner.mark()` is gone, remove what it left here; the names. It may still be ending."""
    from kvmpy.net.tap import reclaim

    end = time.monotonic() + PATIENCE
    while not owner.is_gone(word):
        if time.monotonic() > end:
            return []
        time.sleep(0.02)
    return reclaim()
