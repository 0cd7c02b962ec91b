# SPDX-License-Identifier: Apache-2.0
"""A disk behind an NBD server on a Unix socket (qemu-nbd, nbdkit): the way to every format that kvmpy does
not know.

Protocol: fixed newstyle handshake, simple or structured replies, block status "base:allocation"
(github.com/NetworkBlockDevice/nbd, doc/proto.md). One request at a time; no TLS: the socket's file
permissions protect it.

The server is not trusted with our memory: every length it sends is checked against what was asked for.
"""

from __future__ import annotations

import errno
import itertools
import os
import socket
import struct
import threading

from kvmpy.block.disk import Extent, PythonDisk
from kvmpy.errors import StateError

_HELLO, _OPTION, _OPTION_REPLY = 0x4E42444D41474943, 0x49484156454F5054, 0x3E889045565A9
_REQUEST, _SIMPLE, _STRUCTURED = 0x25609513, 0x67446698, 0x668E33EF
_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2
_OPT_GO, _OPT_STRUCTURED, _OPT_SET_META = 7, 8, 10
_REP_ACK, _REP_INFO, _REP_META, _REP_ERROR = 1, 3, 4, 1 << 31
_INFO_EXPORT, _INFO_BLOCK_SIZE = 0, 3
_FLAG_READ_ONLY, _FLAG_FLUSH, _FLAG_TRIM, _FLAG_ZEROES = 1 << 1, 1 << 2, 1 << 5, 1 << 6
_READ, _WRITE, _DISCONNECT, _FLUSH, _TRIM, _ZEROES, _STATUS = 0, 1, 2, 3, 4, 6, 7
_CMD_NO_HOLE = 1 << 1
_CHUNK_NONE, _CHUNK_DATA, _CHUNK_HOLE, _CHUNK_STATUS, _CHUNK_ERROR = 0, 1, 2, 5, 1 << 15
_STATE_HOLE, _STATE_ZERO = 1, 2
_META = b"base:allocation"
_MAX_REPLY = 64 << 10  # of an option
_MAX_EXTENTS = 64 << 10  # bytes of a block status reply
_MAX_REQUEST = 32 << 20
_ERRORS = {
    1: errno.EPERM,
    5: errno.EIO,
    12: errno.ENOMEM,
    22: errno.EINVAL,
    28: errno.ENOSPC,
    75: errno.EOVERFLOW,
    95: errno.EOPNOTSUPP,
    108: errno.ESHUTDOWN,
}


class NbdDisk(PythonDisk):
    """An export of an NBD server.

    `path` is the server's Unix socket, `export` the name of the export, `timeout` how many seconds an
    answer may take (None: forever). Raises OSError if the server refuses, is silent, or breaks the protocol
    (EPROTO); after that the connection is dead.
    """

    format = "nbd"

    def __init__(
        self,
        path: str | os.PathLike[str],
        export: str = "",
        *,
        readonly: bool = False,
        timeout: float | None = 30.0,
    ) -> None:
        self.path = os.fspath(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._lock = threading.Lock()  # the connection: one request at a time
        self._whole_blocks = threading.Lock()  # writes, if the server wants whole blocks: read, change, write
        self._cookies = itertools.count(1)
        self._structured = False
        self._context: int | None = None  # of base:allocation
        self._dead = False
        self._minimum, self._maximum = 1, _MAX_REQUEST
        self._flags = 0
        try:
            self._socket.settimeout(timeout)
            self._socket.connect(self.path)
            size = self._negotiate(export.encode())
        except BaseException:
            self._socket.close()
            raise
        super().__init__(size, readonly or bool(self._flags & _FLAG_READ_ONLY))
        if self._flags & _FLAG_READ_ONLY and not readonly:
            self.close()
            raise PermissionError(errno.EROFS, "the NBD export is read-only", self.path)

    # --- handshake

    def _negotiate(self, export: bytes) -> int:
        hello, option, flags = struct.unpack(">QQH", self._receive(18))
        if hello != _HELLO or option != _OPTION or not flags & _FIXED_NEWSTYLE:
            raise self._broken("no fixed newstyle NBD server")
        self._socket.sendall(struct.pack(">I", _FIXED_NEWSTYLE | flags & _NO_ZEROES))
        self._structured = bool(self._option(_OPT_STRUCTURED, b""))
        name = struct.pack(">I", len(export)) + export
        if self._structured:
            query = name + struct.pack(">II", 1, len(_META)) + _META
            for kind, data in self._option(_OPT_SET_META, query) or []:
                if kind == _REP_META and data[4:] == _META:
                    (self._context,) = struct.unpack_from(">I", data)
        answers = self._option(_OPT_GO, name + struct.pack(">HH", 1, _INFO_BLOCK_SIZE))
        if answers is None:
            raise OSError(errno.ENOENT, f"the NBD server has no export {export.decode()!r}", self.path)
        size = None
        for kind, data in answers:
            if kind != _REP_INFO or len(data) < 2:
                continue
            (info,) = struct.unpack_from(">H", data)
            if info == _INFO_EXPORT and len(data) == 12:
                size, self._flags = struct.unpack_from(">QH", data, 2)
            elif info == _INFO_BLOCK_SIZE and len(data) == 14:
                minimum, _, maximum = struct.unpack_from(">III", data, 2)
                if minimum & (minimum - 1) or not 1 <= minimum <= 65536 or maximum < minimum:
                    raise self._broken(f"block sizes {minimum}..{maximum}")
                self._minimum, self._maximum = minimum, min(maximum & -minimum, _MAX_REQUEST)
        if size is None or size >= 1 << 63:
            raise self._broken(f"export size {size}")
        return int(size)

    def _option(self, option: int, data: bytes) -> list[tuple[int, bytes]] | None:
        """The server's replies to an option, the last one an acknowledgement; None if it refused."""
        self._socket.sendall(struct.pack(">QII", _OPTION, option, len(data)) + data)
        replies: list[tuple[int, bytes]] = []
        while True:
            magic, about, kind, length = struct.unpack(">QIII", self._receive(20))
            if magic != _OPTION_REPLY or about != option or length > _MAX_REPLY or len(replies) > 1000:
                raise self._broken(f"reply {magic:#x} of {length} bytes to option {option}")
            payload = self._receive(length)
            if kind & _REP_ERROR:
                return None
            replies.append((kind, payload))
            if kind == _REP_ACK:
                return replies

    # --- requests

    def _broken(self, what: str) -> OSError:
        self._dead = True
        return OSError(errno.EPROTO, f"the NBD server broke the protocol: {what}", self.path)

    def _receive(self, length: int) -> bytes:
        data = bytearray(length)
        self._receive_into(memoryview(data))
        return bytes(data)

    def _receive_into(self, view: memoryview) -> None:
        try:
            while view:
                n = self._socket.recv_into(view)
                if not n:
                    raise OSError(errno.ECONNRESET, "the NBD server closed the connection", self.path)
                view = view[n:]
        except OSError:
            self._dead = True  # half an answer has been read: nobody knows where the next one starts
            raise

    def _request(
        self,
        command: int,
        offset: int,
        length: int,
        data: memoryview | None = None,
        out: memoryview | None = None,
        flags: int = 0,
    ) -> list[tuple[int, int]]:
        """Send a request and take its answer; (length, state) pairs for a block status."""
        with self._lock:
            if self._dead:
                raise StateError("the connection to the NBD server is broken")
            cookie = next(self._cookies)
            try:
                self._socket.sendall(struct.pack(">IHHQQI", _REQUEST, flags, command, cookie, offset, length))
                if data is not None:
                    self._socket.sendall(data)
            except OSError:
                self._dead = True
                raise
            (magic,) = struct.unpack(">I", self._receive(4))
            if magic == _SIMPLE and not (self._structured and command == _READ):
                error, answered = struct.unpack(">IQ", self._receive(12))
                if answered != cookie:
                    raise self._broken("answer to another request")
                self._raise(error, "")
                if out is not None:
                    self._receive_into(out)
                return []
            if magic != _STRUCTURED or not self._structured:
                raise self._broken(f"answer with magic {magic:#x}")
            return self._chunks(cookie, offset, out)

    def _chunks(self, cookie: int, offset: int, out: memoryview | None) -> list[tuple[int, int]]:
        extents: list[tuple[int, int]] = []
        failure: tuple[int, str] | None = None
        missing = len(out) if out is not None else 0
        first = True
        while True:
            if not first and struct.unpack(">I", self._receive(4))[0] != _STRUCTURED:
                raise self._broken("a chunk without its magic")
            first = False
            flags, kind, answered, length = struct.unpack(">HHQI", self._receive(16))
            if answered != cookie:
                raise self._broken("answer to another request")
            if kind == _CHUNK_NONE and not length:
                pass
            elif kind in (_CHUNK_DATA, _CHUNK_HOLE) and out is not None and length >= 8:
                (at,) = struct.unpack(">Q", self._receive(8))
                size = length - 8
                if kind == _CHUNK_HOLE:
                    if length != 12:
                        raise self._broken(f"a hole of {length} bytes")
                    (size,) = struct.unpack(">I", self._receive(4))
                if at < offset or at + size > offset + len(out) or size > missing:
                    raise self._broken("data outside the request")
                missing -= size
                part = out[at - offset : at - offset + size]
                if kind == _CHUNK_HOLE:
                    part[:] = bytes(size)
                else:
                    self._receive_into(part)
            elif kind == _CHUNK_STATUS and out is None and 4 <= length <= _MAX_EXTENTS and length % 8 == 4:
                data = self._receive(length)
                if struct.unpack_from(">I", data)[0] == self._context:
                    extents = list(struct.iter_unpack(">II", data[4:]))
            elif kind & _CHUNK_ERROR and 6 <= length <= _MAX_REPLY:
                data = self._receive(length)
                error, text = struct.unpack_from(">IH", data)
                failure = (error or 5, data[6 : 6 + text].decode("utf-8", "replace"))
            else:
                raise self._broken(f"chunk {kind:#x} of {length} bytes")
            if flags & 1:
                break
        if failure is not None:
            self._raise(*failure)
        if missing:
            raise self._broken(f"{missing} bytes of the data are missing")
        return extents

    def _raise(self, error: int, text: str) -> None:
        if error:
            number = _ERRORS.get(error, errno.EIO)
            raise OSError(number, f"NBD: {text or os.strerror(number)}", self.path)

    # --- the disk

    def _read(self, offset: int, out: memoryview) -> None:
        head = offset % self._minimum
        if head or len(out) % self._minimum:
            whole = self._around(offset, len(out))
            out[:] = memoryview(whole)[head : head + len(out)]
        else:
            self._read_blocks(offset, out)

    def _read_blocks(self, offset: int, out: memoryview) -> None:
        while out:
            n = min(len(out), self._maximum)
            self._request(_READ, offset, n, out=out[:n])
            offset, out = offset + n, out[n:]

    def _around(self, offset: int, length: int) -> bytearray:
        """The whole blocks around a range."""
        start = offset - offset % self._minimum
        end = offset + length
        whole = bytearray(min(end + -end % self._minimum, self._size) - start)
        self._read_blocks(start, memoryview(whole))
        return whole

    def _write(self, offset: int, data: memoryview) -> None:
        if self._minimum == 1:
            self._write_blocks(offset, data)
            return
        with self._whole_blocks:
            head = offset % self._minimum
            if head or len(data) % self._minimum:
                whole = self._around(offset, len(data))
                whole[head : head + len(data)] = data
                offset, data = offset - head, memoryview(whole)
            self._write_blocks(offset, data)

    def _write_blocks(self, offset: int, data: memoryview) -> None:
        while data:
            n = min(len(data), self._maximum)
            self._request(_WRITE, offset, n, data=data[:n])
            offset, data = offset + n, data[n:]

    def _flush(self) -> None:
        if self._flags & _FLAG_FLUSH:
            self._request(_FLUSH, 0, 0)

    def _aligned(self, command: int, offset: int, length: int, flags: int = 0) -> None:
        while length:
            n = min(length, 1 << 30)
            self._request(command, offset, n, flags=flags)
            offset, length = offset + n, length - n

    def _write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        if not self._flags & _FLAG_ZEROES or (offset | length) % self._minimum:
            super()._write_zeroes(offset, length, unmap)
        else:
            self._aligned(_ZEROES, offset, length, 0 if unmap else _CMD_NO_HOLE)

    def _discard(self, offset: int, length: int) -> None:
        start = offset + -offset % self._minimum
        end = (offset + length) // self._minimum * self._minimum
        if self._flags & _FLAG_TRIM and start < end:
            self._aligned(_TRIM, start, end - start)

    def _status(self, offset: int, length: int) -> Extent:
        if self._context is None or (offset | length) % self._minimum:
            return super()._status(offset, length)
        extents = self._request(_STATUS, offset, min(length, 1 << 30))
        if not extents or not extents[0][0]:
            raise self._broken("a block status without an extent")
        n, state = extents[0]
        zero = bool(state & _STATE_ZERO)
        return Extent(offset, min(n, length), data=not zero, zero=zero, allocated=not state & _STATE_HOLE)

    def _close(self) -> None:
        try:
            if not self._dead:
                self._socket.sendall(struct.pack(">IHHQQI", _REQUEST, 0, _DISCONNECT, 0, 0, 0))
        except OSError:
            pass  # the server is gone already, and that is all we wanted to tell it
        finally:
            self._socket.close()
