# SPDX-License-Identifier: Apache-2.0
"""Bounded readers for what packages are made of: ar archives and compressed streams.

Everything here is lazy and has a limit, because a package file may come from anywhere: a stream that grows
past `limit`, an ar member that runs past its file, a huge xz dictionary, each is a PackageError.
"""

from __future__ import annotations

import importlib
import io
import lzma
import os
import shutil
import stat
import subprocess
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from kvmpy.guests.errors import GuestUnavailableError, PackageError

AR_MAGIC = b"!<arch>\n"
AR_HEADER = 60
AR_MEMBERS = 16
CODEC_MEMORY = 256 << 20
CHUNK = 1 << 20


def ar_members(path: Path) -> dict[str, tuple[int, int]]:
    """List the members of an ar archive: name -> (offset, size) in bytes, in file order. Source: deb(5)."""
    members: dict[str, tuple[int, int]] = {}
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise PackageError(f"{path}: not a regular file")
        if file.read(len(AR_MAGIC)) != AR_MAGIC:
            raise PackageError(f"{path}: not a Debian package (no ar archive)")
        offset = len(AR_MAGIC)
        while offset < status.st_size:
            file.seek(offset)
            header = file.read(AR_HEADER)
            if len(header) != AR_HEADER or header[58:] != b"`\n":
                raise PackageError(f"{path}: damaged ar header at {offset:#x}")
            name = header[:16].decode("ascii", "replace").rstrip().rstrip("/")
            digits = header[48:58].strip()
            size = int(digits) if digits.isdigit() else -1
            start = offset + AR_HEADER
            if size < 0 or start + size > status.st_size:
                raise PackageError(f"{path}: member {name!r} at {offset:#x} runs past the end of the file")
            if name in members or len(members) == AR_MEMBERS:
                raise PackageError(f"{path}: member {name!r} at {offset:#x} is one too many")
            members[name] = (start, size)
            offset = start + size + (size & 1)
    return members


def ar_stream(file: BinaryIO, start: int, size: int) -> BinaryIO:
    """A reader of `size` bytes of `file` from offset `start`."""

    def chunks() -> Iterator[bytes]:
        left = size
        file.seek(start)
        while left:
            data = file.read(min(CHUNK, left))
            if not data:
                raise EOFError("the file became shorter while it was read")
            left -= len(data)
            yield data

    return _reader(chunks())


def decompressed(source: BinaryIO, suffix: str, limit: int) -> BinaryIO:
    """A reader of what `source` holds packed.

    Arguments: suffix, ".xz", ".gz", ".zst" or "" for not packed; limit, the most bytes that may come out.
    Errors: PackageError when more comes out or the suffix is not known; GuestUnavailableError when this
    Python cannot read zstd and there is no zstd program. Reading a damaged stream gives EOFError,
    lzma.LZMAError or zlib.error.
    """
    codecs = {"": _plain, ".xz": _xz, ".gz": _gzip, ".zst": _zstd}
    if suffix not in codecs:
        known = ", ".join(filter(None, codecs))
        raise PackageError(f"compression {suffix!r} is not known; known are {known}")

    def bounded() -> Iterator[bytes]:
        total = 0
        for data in codecs[suffix](source):
            total += len(data)
            if total > limit:
                raise PackageError(f"it unpacks to more than {limit} bytes")
            yield data

    return _reader(bounded())


def _plain(source: BinaryIO) -> Iterator[bytes]:
    return iter(lambda: source.read(CHUNK), b"")


def _xz(source: BinaryIO) -> Iterator[bytes]:
    codec = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=CODEC_MEMORY)
    while not codec.eof:
        data = source.read(CHUNK) if codec.needs_input else b""
        if codec.needs_input and not data:
            raise EOFError("the xz stream is cut short")
        yield codec.decompress(data, CHUNK)


def _gzip(source: BinaryIO) -> Iterator[bytes]:
    codec = zlib.decompressobj(wbits=31)
    while not codec.eof:
        data = codec.unconsumed_tail or source.read(CHUNK)
        if not data:
            raise EOFError("the gzip stream is cut short")
        yield codec.decompress(data, CHUNK)


def _zstd(source: BinaryIO) -> Iterator[bytes]:
    """zstd came to the standard library with Python 3.14; before that the zstd program does it."""
    try:
        zstd: Any = importlib.import_module("compression.zstd")
    except ImportError:
        yield from _zstd_program(source)
        return
    window = {zstd.DecompressionParameter.window_log_max: CODEC_MEMORY.bit_length() - 1}
    codec = zstd.ZstdDecompressor(options=window)
    while not codec.eof:
        data = source.read(CHUNK) if codec.needs_input else b""
        if codec.needs_input and not data:
            raise EOFError("the zstd stream is cut short")
        yield codec.decompress(data, CHUNK)


def _zstd_program(source: BinaryIO) -> Iterator[bytes]:
    program = shutil.which("zstd")
    if program is None:
        raise GuestUnavailableError(
            "the package is packed with zstd, which Python reads only from 3.14 on, and there is no "
            "zstd program; install it (`apt install zstd`)"
        )
    with tempfile.TemporaryFile() as packed, tempfile.TemporaryFile() as complaints:
        shutil.copyfileobj(source, packed, CHUNK)
        packed.seek(0)
        command = [program, "-q", "-d", "-c", f"--memory={CODEC_MEMORY}"]
        with subprocess.Popen(command, stdin=packed, stdout=subprocess.PIPE, stderr=complaints) as process:
            stdout = process.stdout
            assert stdout is not None
            try:
                yield from iter(lambda: stdout.read(CHUNK), b"")
            except BaseException:  # the reader gave up
                process.kill()
                raise
        if process.returncode != 0:
            complaints.seek(0)
            raise PackageError(complaints.read(1000).decode("utf-8", "replace").strip() or "zstd failed")


def _reader(chunks: Iterable[bytes]) -> BinaryIO:
    return io.BufferedReader(_Chunks(chunks), CHUNK)


class _Chunks(io.RawIOBase):
    """A raw stream over an iterator of byte strings."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            data = next(self._chunks, None)
            if data is None:
                return 0
            self._rest = memoryview(data)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count
