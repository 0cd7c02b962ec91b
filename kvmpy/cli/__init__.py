# SPDX-License-Identifier: Apache-2.0
"""The `kvmpy` command, one file per subcommand."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the `kvmpy` command with these words (None: the process's own); returns its exit status."""
    from kvmpy.cli.command import main as run

    return run(arguments)
