# SPDX-License-Identifier: Apache-2.0
"""The `kvmpy` command: the words of the command line to one subcommand, exceptions to exit statuses."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from kvmpy._version import __version__
from kvmpy.cli import status
from kvmpy.cli.text import tell, uncollected
from kvmpy.errors import BackendError, BootError, GuestError, ImageError, KvmpyError, NetworkError

COMMANDS = ("run", "doctor", "guest", "image", "debug", "version")  # each is a module of this package

EPILOG = """\
examples:
  kvmpy doctor                              can this host run guests, and how
  kvmpy guest get debian-6.1                a stock kernel and initramfs, without root
  kvmpy run debian-6.1 --run 'uname -a'     boot it, run a command in it, power off
  kvmpy run vmlinuz --initrd initrd.gz --append console=ttyS0 --memory 512M --cpus 2

Each command has its own --help with examples; `kvmpy run --help` lists the exit statuses.
"""


def parser(only: str | None = None) -> argparse.ArgumentParser:
    """The command line's grammar, or that of one command alone, whose module then is the only one imported."""
    top = argparse.ArgumentParser(
        prog="kvmpy",
        description="Micro-VMs on KVM, or on kvmpy's own software CPU where there is no KVM.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"kvmpy {__version__}")
    top.add_argument("-v", "--verbose", action="count", default=0, help="log more to stderr; twice for all")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS if only is None else (only,):
        importlib.import_module(f"kvmpy.cli.{name}").add_parser(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the `kvmpy` command.

    Arguments: arguments, the words after the program's name; None for the process's own.
    Returns: the exit status. Raises SystemExit as argparse does, for wrong usage and --help.
    """
    words = sys.argv[1:] if arguments is None else arguments
    # With options before it the command is found by argparse, at the price of importing all.
    with uncollected():
        options = parser(words[0] if words and words[0] in COMMANDS else None).parse_args(words)
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(options.verbose, 2)]
    logging.basicConfig(level=level, format="%(name)s: %(message)s", stream=sys.stderr)
    try:
        code: int = options.function(options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return status.INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away, as `| head` does. Python flushes once more at exit; let it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return status.HOST_ERROR
    except (KvmpyError, OSError) as error:
        tell(describe(error))
        return status_of(error)


def status_of(error: BaseException) -> int:
    """The exit status for an error."""
    from kvmpy.guests import GuestUnavailableError, PackageError

    match error:
        case GuestError():
            return status.GUEST_FAILED
        case BootError() | ImageError() | PackageError():
            return status.BAD_IMAGE
        case BackendError() | GuestUnavailableError():
            return status.UNAVAILABLE
        case OSError() | NetworkError():
            return status.HOST_ERROR
    return status.FAILED


def describe(error: BaseException) -> str:
    """An error in one or a few lines: what, and of an OSError which file."""
    if isinstance(error, OSError) and not isinstance(error, KvmpyError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__
