# SPDX-License-Identifier: Apache-2.0
"""Frames over a stream socket, each with its length before it: passt, gvproxy, QEMU's `-netdev stream`, another
kvmpy."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import threading
import time
from pathlib import Path

from kvmpy.errors import NetworkError
from kvmpy.net._hub import STREAM, VNET, Hub
from kvmpy.net.backend import OFFLOADS, Closing, wire

log = logging.getLogger("kvmpy.net")

GUEST, PEER = 0, 1  # ports of the relay


class StreamSocket(Closing):
    """A peer that speaks frames of Ethernet with a length of four bytes, big endian, before each.

    where: the path of a Unix socket, (host, port) for TCP, or a connected socket, which then belongs to the back end.
    listen: wait there for the peer, one at a time, and for the next when it leaves. reconnect: seconds between tries
    when the peer is lost or not there yet; None: it must be there, and when it leaves the card's cable is out.
    Checksums and segmentation that the guest leaves to its card are done here: the peer sees plain frames.

    Raises NetworkError when there is nobody and `reconnect` is None, ValueError.
    """

    vnet_header = True
    offloads = OFFLOADS

    def __init__(
        self,
        where: str | os.PathLike[str] | tuple[str, int] | socket.socket,
        *,
        listen: bool = False,
        reconnect: float | None = None,
    ) -> None:
        if reconnect is not None and (listen or not 0 < reconnect < 3600 or isinstance(where, socket.socket)):
            raise ValueError("reconnect is a number of seconds, for a peer that is connected to by its address")
        if isinstance(where, socket.socket) and listen:
            raise ValueError("a connected socket does not listen")
        self._where = where
        self._reconnect = reconnect
        self._closed = False
        self._peer: socket.socket | None = None
        self._listener = self._listen() if listen else None
        try:
            if isinstance(where, socket.socket):
                if where.type != socket.SOCK_STREAM:
                    raise ValueError("a framed stream needs a socket of type SOCK_STREAM")
                self._peer = where
            elif not listen:
                self._peer = self._connect()
            self._start()
        except BaseException:
            self._release()
            raise

    def _start(self) -> None:
        self._ours, self._theirs = wire()
        self.fd = self._ours.fileno()
        self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self._hub = Hub(relay=True)
            self._hub.add(VNET, self._theirs.fileno())
            self._hub.add(STREAM, -1)
            if self._peer is not None:
                self._plug(self._peer)
        except OSError as error:
            self._ours.close()
            self._theirs.close()
            os.close(self._stop)
            raise NetworkError(f"no stream to {self._where!r}: {error.strerror}") from error
        self._threads = [
            threading.Thread(target=self._hub.run, name="kvmpy-stream", daemon=True),
            threading.Thread(target=self._watch, name="kvmpy-stream-peer", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    # -- the peer

    def _address(self) -> tuple[int, str | tuple[str, int]]:
        if isinstance(self._where, tuple):
            return (socket.AF_INET6 if ":" in self._where[0] else socket.AF_INET), self._where
        assert not isinstance(self._where, socket.socket)
        return socket.AF_UNIX, os.fspath(self._where)

    def _listen(self) -> socket.socket:
        family, address = self._address()
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            if family == socket.AF_UNIX:
                _remove_stale(str(address))
            else:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(1)
            listener.setblocking(False)
        except OSError as error:
            listener.close()
            raise NetworkError(f"nobody can be waited for at {self._where!r}: {error.strerror or error}") from error
        return listener

    def _connect(self) -> socket.socket | None:
        family, address = self._address()
        peer = socket.socket(family, socket.SOCK_STREAM)
        try:
            peer.settimeout(10)
            peer.connect(address)
        except OSError as error:
            peer.close()
            if self._reconnect is not None:
                return None
            raise NetworkError(f"nobody at {self._where!r}: {error.strerror or error}") from error
        return peer

    def _plug(self, peer: socket.socket) -> None:
        peer.setblocking(False)
        if peer.family != socket.AF_UNIX:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._hub.plug(PEER, peer.fileno())

    @property
    def connected(self) -> bool:
        """Is there a peer now?"""
        return not self._closed and self._hub.state(PEER)[0]

    def _watch(self) -> None:
        """Ends, and begins anew if that was asked for, what the relay's thread found broken."""
        poll = select.poll()
        poll.register(self._stop, select.POLLIN)
        poll.register(self._hub.news, select.POLLIN)
        retry: float | None = None if self._peer is not None or self._reconnect is None else 0.0
        while not self._closed:
            if self._listener is not None:
                poll.register(self._listener, select.POLLIN if self._peer is None else 0)
            wait = None if retry is None else max(0.0, retry - time.monotonic()) * 1000
            ready = [fd for fd, _ in poll.poll(wait)]
            if self._closed:
                return
            if self._hub.news in ready:
                os.eventfd_read(self._hub.news)
                if self._peer is not None and not self._hub.state(PEER)[0]:
                    self._lost()
                    if self._listener is None and self._reconnect is None:
                        self._hub.unplug(GUEST)
                        self._theirs.shutdown(socket.SHUT_RDWR)  # the card sees that the cable is out
                        return
                    retry = None if self._reconnect is None else time.monotonic() + self._reconnect
            if self._listener is not None and self._listener.fileno() in ready:
                with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
                    self._use(self._listener.accept()[0])
            if retry is not None and time.monotonic() >= retry:
                peer = self._connect()
                retry = None if peer is not None else time.monotonic() + (self._reconnect or 0)
                if peer is not None:
                    self._use(peer)

    def _use(self, peer: socket.socket) -> None:
        self._peer = peer
        self._plug(peer)
        log.info("%r: a peer is there", self._where)

    def _lost(self) -> None:
        error = self._hub.state(PEER)[1]
        why = (
            "it sent no frame but nonsense" if error == errno.EBADMSG else os.strerror(error) if error else "it hung up"
        )
        log.warning("%r: the peer is gone: %s", self._where, why)
        assert self._peer is not None
        self._peer.close()
        self._peer = None

    # -- a back end

    def set_offloads(self, offloads: int) -> None:
        """What the guest's driver takes; the peer's frames need nothing."""

    def stats(self) -> dict[str, int]:
        """Live counters by name; rx is from the peer."""
        return self._hub.state(PEER)[2]

    def close(self) -> None:
        """Hang up; again is no error."""
        if self._closed:
            return
        self._closed = True
        self._hub.stop()
        os.eventfd_write(self._stop, 1)
        for thread in self._threads:
            thread.join()
        self._hub.close()
        os.close(self._stop)
        self.fd = -1
        self._ours.close()
        self._theirs.close()
        self._release()

    def _release(self) -> None:
        if self._peer is not None:
            self._peer.close()
        if self._listener is not None:
            name = self._listener.getsockname()
            self._listener.close()
            if isinstance(name, str) and name:
                Path(name).unlink(missing_ok=True)


def _remove_stale(path: str) -> None:
    """A socket file whose owner is gone: connecting to it is refused. Others are left, and bind(2) complains."""
    if not Path(path).is_socket():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as trial:
        try:
            trial.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink(missing_ok=True)
