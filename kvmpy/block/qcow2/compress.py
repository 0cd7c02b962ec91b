# SPDX-License-Identifier: Apache-2.0
"""Compressed clusters: raw deflate with a window of 4 KiB, or one zstd frame. Never trust a length."""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable
from typing import Any

from kvmpy.block.qcow2.header import COMPRESSION_NAMES, ZLIB
from kvmpy.errors import ImageError

_WINDOW = -12  # raw deflate; QEMU's decoder has no larger window


def compressor(kind: int, level: int | None = None) -> Callable[[bytes], bytes]:
    """A function that compresses one cluster; `kind` is the header's compression_type."""
    if kind == ZLIB:

        def deflate(data: bytes) -> bytes:
            stream = zlib.compressobj(zlib.Z_DEFAULT_COMPRESSION if level is None else level, zlib.DEFLATED, _WINDOW)
            return stream.compress(data) + stream.flush()

        return deflate
    module, style = _zstd()
    if style == "zstandard":
        make = module.ZstdCompressor
        return lambda data: bytes(make(level=3 if level is None else level).compress(data))
    return lambda data: bytes(module.compress(data, level=level))


def decompressor(kind: int) -> Callable[[bytes, memoryview], None]:
    """A function that decompresses (packed bytes and trailing junk) into a buffer of exactly one cluster.

    It makes at most one cluster, whatever the data claims, and raises if it is less.
    """
    if kind == ZLIB:
        return _inflate
    module, style = _zstd()
    if style == "zstandard":

        def zstandard(packed: bytes, out: memoryview) -> None:
            reader = module.ZstdDecompressor().stream_reader(packed, read_across_frames=False)
            at = 0
            while at < len(out):
                n = reader.readinto(out[at:])
                if not n:
                    raise ImageError(f"compressed data ends after {at} of {len(out)} bytes")
                at += n

        return zstandard

    def stdlib(packed: bytes, out: memoryview) -> None:
        stream, at = module.ZstdDecompressor(), 0
        while at < len(out):
            data = stream.decompress(packed, max_length=len(out) - at)
            if not data:
                raise ImageError(f"compressed data ends after {at} of {len(out)} bytes")
            out[at : at + len(data)] = data
            at, packed = at + len(data), b""
            if stream.eof and at < len(out):
                raise ImageError(f"compressed data ends after {at} of {len(out)} bytes")

    return stdlib


def _inflate(packed: bytes, out: memoryview) -> None:
    data = zlib.decompressobj(_WINDOW).decompress(packed, len(out))
    if len(data) != len(out):
        raise ImageError(f"compressed data gives {len(data)} of {len(out)} bytes")
    out[:] = data


def _zstd() -> tuple[Any, str]:
    """The zstd module of this Python: standard from 3.14 on, else a package."""
    for name, style in (
        ("compression.zstd", "stdlib"),
        ("backports.zstd", "stdlib"),
        ("zstandard", "zstandard"),
    ):
        try:
            return importlib.import_module(name), style
        except ImportError:
            continue
    raise ImageError(
        f"{COMPRESSION_NAMES[1]} compression needs Python 3.14, or the package backports.zstd or zstandard"
    )
