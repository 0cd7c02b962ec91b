# SPDX-License-Identifier: Apache-2.0
"""Compressed kernels: the vmlinux inside a bzImage, and whole images packed with gzip, xz, ...

gzip, bzip2, xz and lzma come with Python; lz4 and zstd are taken from the shared library that most systems
have (liblz4, libzstd). Output is bounded: a decompression bomb is a BootError.
"""

from __future__ import annotations

import bz2
import functools
import lzma
import zlib
from collections.abc import Callable
from typing import Any, Protocol, cast

from kvmpy.boot.image import Image, compression
from kvmpy.boot.linux import HAS_PAYLOAD, BzImage
from kvmpy.errors import BootError

MAX_OUTPUT = 1 << 30
LZ4_BLOCK = 8 << 20  # of output, in a legacy frame
FIRST_OUTPUT = 96 << 20  # bytes of address space; kernels are smaller, and what is not used is not touched

Decompress = Callable[[memoryview, int], bytes]


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    def decompress(self, data: memoryview, max_length: int, /) -> bytes: ...


def unpack(image: Image, limit: int = MAX_OUTPUT) -> Image:
    """The content of a compressed file, at most `limit` bytes. Raises BootError."""
    return Image(image.name, _decompress(str(image), memoryview(image.data), limit))


def unpack_kernel(kernel: BzImage) -> Image:
    """The vmlinux ELF inside a bzImage (boot.rst, payload_offset and payload_length). Raises BootError.

    The payload ends with the size of its content in 4 bytes, which bounds what is unpacked.
    """
    header, what = kernel.header, str(kernel.image)
    if header.version < HAS_PAYLOAD or not header.payload_length:
        raise BootError(f"{what}: the header names no payload to unpack")
    start, end = header.payload_offset, header.payload_offset + header.payload_length
    if end > len(kernel.kernel) or header.payload_length < 8:
        raise BootError(
            f"{what}: payload [{start:#x}, {end:#x}) is outside the kernel of {len(kernel.kernel):#x} bytes"
        )
    payload = kernel.kernel[start:end]
    size = int.from_bytes(payload[-4:], "little")
    if not 0 < size <= MAX_OUTPUT:
        raise BootError(
            f"{what}: the payload claims to hold {size:#x} bytes; at most {MAX_OUTPUT:#x} are unpacked"
        )
    return Image(kernel.image.name, _decompress(what, payload, size))


def _decompress(what: str, data: memoryview, limit: int) -> bytes:
    name = compression(data)
    if name is None:
        raise BootError(
            f"{what}: compressed in a way that is unknown here; it starts with {data[:6].hex(' ')}"
        )
    try:
        out = _FORMATS[name](data, limit)
    except (zlib.error, lzma.LZMAError, EOFError, OSError, ValueError) as e:
        raise e if isinstance(e, BootError) else BootError(f"{what}: damaged {name} data: {e}") from e
    if len(out) > limit:
        raise BootError(f"{what}: {name} data unpacks to more than the {limit:#x} bytes it may have")
    return out


def _stream(new: Callable[[], _Decompressor]) -> Decompress:
    def decompress(data: memoryview, limit: int) -> bytes:
        stream = new()
        out = stream.decompress(data, limit + 1)
        if len(out) <= limit and not stream.eof:
            raise EOFError("it ends too early")
        return out

    return decompress


class _Output:
    """A buffer that a C library writes to at `size`; it grows up to one byte more than `limit`."""

    def __init__(self, ffi: Any, limit: int) -> None:
        self._ffi, self._most, self.size = ffi, limit + 1, 0
        self._data = bytearray(min(self._most, FIRST_OUTPUT))
        self._view = ffi.from_buffer(self._data)

    def room(self) -> tuple[Any, int]:
        """Where to write, and how many bytes may be written there: none when the output is too large."""
        if self.size == len(self._data) < self._most:
            self._ffi.release(self._view)
            self._data += bytes(min(self._most, 2 * self.size) - self.size)
            self._view = self._ffi.from_buffer(self._data)
        return self._ffi.cast("char *", self._view) + self.size, len(self._data) - self.size

    def append(self, data: Any) -> None:
        """Add a few bytes that were written elsewhere; what goes beyond the limit is left out."""
        while data and self.room()[1]:
            count = min(len(data), len(self._data) - self.size)
            self._data[self.size : self.size + count] = data[:count]
            self.size += count
            data = data[count:]

    def take(self) -> bytes:
        """What was written, without a copy (see `Image.data`)."""
        self._ffi.release(self._view)
        del self._data[self.size :]
        return cast(bytes, self._data)


def _lz4(data: memoryview, limit: int) -> bytes:
    """A legacy frame: blocks of up to 8 MiB, each after its size (lz4_Frame_format.md, Legacy frame)."""
    lz4, ffi = _library("lz4", "int LZ4_decompress_safe(const char *, char *, int, int);")
    out, spare, at = _Output(ffi, limit), None, 4
    while at + 4 <= len(data) and out.size <= limit:
        size = int.from_bytes(data[at : at + 4], "little")
        at += 4
        # What follows the last block is no block: the kernel's own size field, or another frame's magic.
        if size > len(data) - at:
            if len(data) - at > 0 or not out.size:
                raise ValueError(f"a block of {size:#x} bytes at {at:#x} goes past the end")
            break
        source = ffi.from_buffer(data[at : at + size])
        place, room = out.room()
        if room >= LZ4_BLOCK:
            count = lz4.LZ4_decompress_safe(source, place, size, LZ4_BLOCK)
            out.size += max(count, 0)
        else:
            spare = spare or ffi.new("char[]", LZ4_BLOCK)
            count = lz4.LZ4_decompress_safe(source, spare, size, LZ4_BLOCK)
            out.append(ffi.buffer(spare, max(count, 0)))
        if count < 0:
            raise ValueError(f"block at {at:#x}: liblz4 says {count}")
        at += size
    return out.take()


def _zstd(data: memoryview, limit: int) -> bytes:
    zstd, ffi = _library(
        "zstd",
        """
        typedef struct { void *dst; size_t size; size_t pos; } ZSTD_outBuffer;
        typedef struct { const void *src; size_t size; size_t pos; } ZSTD_inBuffer;
        void *ZSTD_createDStream(void); size_t ZSTD_freeDStream(void *);
        size_t ZSTD_decompressStream(void *, ZSTD_outBuffer *, ZSTD_inBuffer *);
        unsigned ZSTD_isError(size_t); const char *ZSTD_getErrorName(size_t);
        """,
    )
    stream = ffi.gc(zstd.ZSTD_createDStream(), zstd.ZSTD_freeDStream)
    if stream == ffi.NULL:
        raise MemoryError("ZSTD_createDStream")
    source, out = ffi.from_buffer(data), _Output(ffi, limit)
    taken, given = ffi.new("ZSTD_inBuffer *", [source, len(data), 0]), ffi.new("ZSTD_outBuffer *")
    while out.size <= limit:
        (given.dst, given.size), given.pos = out.room(), 0
        left = zstd.ZSTD_decompressStream(stream, given, taken)
        if zstd.ZSTD_isError(left):
            raise ValueError(ffi.string(zstd.ZSTD_getErrorName(left)).decode())
        out.size += given.pos
        if left == 0:
            break
        if taken.pos == taken.size and given.pos < given.size:
            raise ValueError("it ends too early")
    return out.take()


@functools.cache
def _library(name: str, definitions: str) -> tuple[Any, Any]:
    """lib`name` and the cffi that knows its functions."""
    from cffi import FFI

    ffi = FFI()
    ffi.cdef(definitions)
    try:
        return ffi.dlopen(f"lib{name}.so.1"), ffi
    except OSError as e:
        raise BootError(
            f"this kernel is packed with {name}: install lib{name} (Debian: lib{name}-1 or lib{name}1)"
        ) from e


_FORMATS: dict[str, Decompress] = {
    "gzip": _stream(lambda: zlib.decompressobj(zlib.MAX_WBITS | 16)),
    "bzip2": _stream(bz2.BZ2Decompressor),
    "xz": _stream(lzma.LZMADecompressor),
    "lzma": _stream(lambda: lzma.LZMADecompressor(lzma.FORMAT_ALONE)),
    "lz4": _lz4,
    "zstd": _zstd,
}
