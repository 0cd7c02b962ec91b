# SPDX-License-Identifier: Apache-2.0
"""Locks against two writers, in the byte ranges that QEMU uses, so that the two see each other.

QEMU (block/file-posix.c) keeps for each permission it holds a shared lock on byte 100 + n, and for each
that it grants to nobody else one on byte 200 + n. They are open-file-description locks: threads do not
release each other's.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

HELD, REFUSED = 100, 200
CONSISTENT_READ, WRITE, RESIZE = 0, 1, 3

_FLOCK = struct.Struct("hhqqi4x")  # struct flock: l_type, l_whence, l_start, l_len, l_pid


def _taken_elsewhere(fd: int, byte: int) -> bool:
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def lock_image(fd: int, path: str, writes: bool) -> None:
    """Lock an open image file: with other readers, or alone if `writes`.

    The locks go when the last descriptor of this open file closes. Raises BlockingIOError if somebody
    else's use does not allow ours. File systems without locks are used without.
    """
    held = (CONSISTENT_READ, WRITE, RESIZE) if writes else (CONSISTENT_READ,)
    refused = (WRITE, RESIZE)
    try:
        for byte in [HELD + n for n in held] + [REFUSED + n for n in refused]:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
        # First ours, then the look at theirs: of two who come at once, at least one sees the other.
        clash = any(_taken_elsewhere(fd, REFUSED + n) for n in held) or any(
            _taken_elsewhere(fd, HELD + n) for n in refused
        )
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            return
        raise
    if clash:
        unlock_image(fd)
        wish = "writing" if writes else "reading"
        raise BlockingIOError(errno.EAGAIN, f"the image is in use and cannot be opened for {wish}", path)


def unlock_image(fd: int) -> None:
    """Release what `lock_image` took."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, HELD, 200, 0))
