# SPDX-License-Identifier: Apache-2.0
"""The file an image is in: opened once, locked, and read only in complete pieces."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from types import TracebackType
from typing import Self

from kvmpy.block.locks import lock_image
from kvmpy.errors import ImageError


class HostFile:
    """An open image file or block device; owns the descriptor `fd`.

    `path` is for messages and as the place that relative names in the image are relative to.
    """

    def __init__(self, fd: int, path: str | os.PathLike[str], readonly: bool) -> None:
        self.fd = fd
        self.path = os.fspath(path)
        self.readonly = readonly

    @classmethod
    def open(cls, path: str | os.PathLike[str], readonly: bool = False, lock: bool = True) -> Self:
        """Open `path`; anything but a regular file or a block device is refused, so that a FIFO cannot hang
        us.
        """
        mode = os.O_RDONLY if readonly else os.O_RDWR
        return cls.adopt(os.open(path, mode | os.O_CLOEXEC | os.O_NONBLOCK), path, readonly, lock)

    @classmethod
    def adopt(cls, fd: int, path: str | os.PathLike[str], readonly: bool, lock: bool = True) -> Self:
        """Take over an open descriptor; it is closed if it cannot be used."""
        try:
            kind = os.fstat(fd).st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
                raise ImageError(f"{os.fspath(path)!r} is neither a file nor a block device")
            if lock:
                lock_image(fd, os.fspath(path), writes=not readonly)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, path, readonly)

    @classmethod
    def create(cls, path: str | os.PathLike[str], exclusive: bool = False) -> Self:
        """A new or emptied file, or a block device as it is."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | (os.O_EXCL if exclusive else 0)
        file = cls.adopt(os.open(path, flags, 0o644), path, readonly=False)
        try:
            # Emptied only now, when the lock says that nobody uses it.
            if not file.is_block_device:
                os.ftruncate(file.fd, 0)
        except BaseException:
            file.close()
            raise
        return file

    @property
    def folder(self) -> Path:
        return Path(self.path).absolute().parent

    @property
    def is_block_device(self) -> bool:
        return stat.S_ISBLK(os.fstat(self.fd).st_mode)

    @property
    def size(self) -> int:
        """Bytes; of a block device as well."""
        return os.lseek(self.fd, 0, os.SEEK_END)

    def pread(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes, or ImageError: the file is too short for what it says of itself."""
        data = self.pread_some(offset, length)
        if len(data) != length:
            raise ImageError(f"the file ends within {length} bytes that belong to the image", offset)
        return data

    def pread_some(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes; fewer only at the end of the file."""
        parts: list[bytes] = []
        while length and offset < 1 << 62:  # no file reaches further
            part = os.pread(self.fd, min(length, 1 << 30), offset)
            if not part:
                break
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write all of `data`."""
        view = memoryview(data).cast("B")
        while view:
            n = os.pwrite(self.fd, view, offset)
            offset += n
            view = view[n:]

    def sync(self) -> None:
        os.fdatasync(self.fd)

    def truncate(self, size: int) -> None:
        if not self.is_block_device:
            os.ftruncate(self.fd, size)

    def reserve(self, offset: int, length: int) -> None:
        """Room for what will be written there, so that it finds some. Raises OSError."""
        if not self.is_block_device:
            os.posix_fallocate(self.fd, offset, length)

    def close(self) -> None:
        """Close the descriptor and with it release the locks; a second call does nothing."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
