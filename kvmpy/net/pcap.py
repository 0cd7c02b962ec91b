# SPDX-License-Identifier: Apache-2.0
"""Capture: a back end that writes what passes through it to a file for tcpdump and Wireshark."""

from __future__ import annotations

import errno
import logging
import os
import stat
import threading
from pathlib import Path

from kvmpy.errors import NetworkError, StateError
from kvmpy.net._hub import LARGEST, PLAIN, VNET, Hub
from kvmpy.net.backend import Closing, NetBackend, wire

log = logging.getLogger("kvmpy.net")


class Pcap(Closing):
    """`backend`, with every frame in both directions written to `file` (pcap, nanoseconds, Ethernet).

    backend: closed with it. file: a path, made anew (mode 0600: it holds what the guest says). snaplen: bytes of a
    frame that are kept. With offloads, frames are captured as they pass: long, their checksums not filled in.
    When the file cannot be written any more (a full disk), the capture ends and the network goes on; see `stats()`.
    Raises NetworkError; the back end is then closed too.
    """

    def __init__(self, backend: NetBackend, file: str | os.PathLike[str], *, snaplen: int = LARGEST) -> None:
        self._backend = backend
        self._path = Path(file)
        self.vnet_header, self.offloads = backend.vnet_header, backend.offloads
        self._closed = False
        try:
            if backend.fd < 0:
                raise StateError(f"{backend!r} is closed")
            if not 14 <= snaplen <= LARGEST:
                raise ValueError(f"14 to {LARGEST} bytes of a frame are captured, not {snaplen}")
            self._file = self._open()
        except BaseException:
            backend.close()
            raise
        self._ours, self._theirs = wire()
        self.fd = self._ours.fileno()
        kind = VNET if backend.vnet_header else PLAIN
        try:
            self._hub = Hub(relay=True)
            # Nobody changes a frame here: the card and the other end have agreed on the offloads.
            self._hub.add(kind, self._theirs.fileno(), 0xFF)
            self._hub.add(kind, backend.fd, 0xFF)
            self._hub.capture(self._file, snaplen)
        except OSError as error:
            self._release()
            raise NetworkError(f"no capture to {self._path}: {error.strerror}") from error
        self._thread = threading.Thread(target=self._hub.run, name="kvmpy-pcap", daemon=True)
        self._thread.start()
        self._watch = threading.Thread(target=self._gone, name="kvmpy-pcap-end", daemon=True)
        self._watch.start()

    def _open(self) -> int:
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise NetworkError(f"no capture to {self._path}: {error.strerror}") from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise NetworkError(f"no capture to {self._path}: not a regular file")
        os.ftruncate(fd, 0)
        return fd

    def _gone(self) -> None:
        """When the other end hangs up, so do we, and the card sees it."""
        import select

        poll = select.poll()
        poll.register(self._hub.news, select.POLLIN)
        poll.poll()
        if not self._closed and not self._hub.state(1)[0]:
            self._hub.unplug(0)
            self._theirs.shutdown(2)

    def set_offloads(self, offloads: int) -> None:
        """What the guest's driver takes: the other end must know."""
        if not self._closed:
            self._backend.set_offloads(offloads)

    def stats(self) -> dict[str, int]:
        """Frames captured and lost; error is the errno that ended the capture, or 0."""
        frames, lost, error = self._hub.captured
        return {"captured": frames, "lost": lost, "error": error}

    def close(self) -> None:
        """End the capture and close the back end; again is no error."""
        if self._closed:
            return
        self._closed = True
        self._hub.stop()
        self._hub.unplug(0)  # also wakes the watcher
        self._thread.join()
        self._watch.join()
        frames, lost, error = self._hub.captured
        if lost or error:
            log.warning(
                "%s: %s; %d of %d frames were captured",
                self._path,
                os.strerror(error or errno.EIO),
                frames,
                frames + lost,
            )
        self._hub.close()
        self._release()

    def _release(self) -> None:
        self.fd = -1
        os.close(self._file)
        self._ours.close()
        self._theirs.close()
        self._backend.close()
