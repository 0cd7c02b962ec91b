# SPDX-License-Identifier: Apache-2.0
"""Words of the command line that name things: files, stock guests, serial lines, numbers."""

from __future__ import annotations

import argparse
from pathlib import Path

from kvmpy import chardev, guests
from kvmpy.chardev import CharBackend
from kvmpy.errors import KvmpyError

MAX_FW_CFG = 64 << 20


class UsageError(KvmpyError):
    """The command line asks for something that makes no sense; exit status 2."""


def number(text: str) -> int:
    """A non-negative number, also 0x... with _ between digits."""
    try:
        value = int(text, 0)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 0x10_0000") from None
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is negative")
    return value


def seconds(text: str) -> float:
    """A positive time in seconds."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time in seconds")
    return value


def stock(word: str, role: str) -> tuple[guests.Guest, Path] | None:
    """What a word such as "debian-6.1" or "seabios:bios-microvm" names in the cache of stock guests.

    Arguments: role, the file that is meant when the word names none.
    Returns: the guest and the file; None when the word is no stock guest, or a file of that name is there.
    Errors: GuestUnavailableError when it is not in the cache; UsageError when it has no such file.
    """
    name, _, wanted = word.partition(":")
    if name not in guests.NAMES or Path(word).exists():
        return None
    guest = guests.find(name)
    if guest is None:
        raise guests.GuestUnavailableError(
            f"guest {name} is not in the cache; get it with: kvmpy guest get {name}"
        )
    try:
        return guest, guest.file(wanted or role)
    except LookupError as error:
        raise UsageError(str(error)) from None


def file(word: str, role: str) -> Path:
    """A host file, or a stock guest's (see `stock()`)."""
    found = stock(word, role)
    return found[1] if found is not None else Path(word)


def module(word: str) -> tuple[Path, str]:
    """A boot module: "FILE", or "FILE ARGUMENTS" where no file has the whole name."""
    if Path(word).exists():
        return Path(word), ""
    path, _, arguments = word.partition(" ")
    return Path(path), arguments


def fw_cfg(words: list[str]) -> dict[str, bytes]:
    """fw_cfg files from "NAME=FILE" words. Errors: UsageError, OSError."""
    items: dict[str, bytes] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not (name and equals and path):
            raise UsageError(f"--fw-cfg {word}: it is NAME=FILE, such as opt/org.example/key=key.bin")
        if name in items:
            raise UsageError(f"--fw-cfg {name} is given twice")
        with Path(path).open("rb") as stream:
            data = stream.read(MAX_FW_CFG + 1)
        if len(data) > MAX_FW_CFG:
            raise UsageError(f"--fw-cfg {word}: more than {MAX_FW_CFG} bytes")
        items[name] = data
    return items


def serial(word: str) -> CharBackend:
    """A serial line: stdio, none, pty, unix:PATH (a server), file:PATH or a path. Errors: OSError."""
    try:
        return _serial(word)
    except OSError as error:
        error.filename = error.filename or word  # sockets do not say it
        raise


def _serial(word: str) -> CharBackend:
    kind, colon, path = word.partition(":")
    if word == "stdio":
        return chardev.Stdio()
    if word == "none":
        return chardev.Null()
    if word == "pty":
        return chardev.Pty()
    if colon and kind == "unix":
        return chardev.Socket.listen(path)
    return chardev.File(path if colon and kind == "file" else word)
