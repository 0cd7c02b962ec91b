# SPDX-License-Identifier: Apache-2.0
"""raw: the file or block device is the disk, byte for byte."""

from __future__ import annotations

import os

from kvmpy.block._disk import RawCore
from kvmpy.block.hostfile import HostFile


class RawDisk(RawCore):
    """A raw image. Holes in the file are known to `block_status` and made by `discard` and `write_zeroes`."""

    format = "raw"

    def __init__(
        self,
        fd: int,
        start: int,
        size: int,
        readonly: bool,
        unsafe: bool = False,
        discard: bool = True,
        owner: tuple[HostFile, ...] = (),
    ) -> None:
        # The C part took the arguments in its __cinit__.
        self._file = owner[0]

    @property
    def path(self) -> str:
        """Where the file was opened."""
        return self._file.path

    def resize(self, size: int, shrink: bool = False) -> None:
        """Make the disk `size` bytes long; new bytes are zero. `shrink` must say so if bytes are to be
        lost.
        """
        if size < self.size and not shrink:
            raise ValueError(f"{size} bytes are fewer than {self.size}; shrink=True if the rest may be lost")
        if self._file.is_block_device:
            raise ValueError("a block device cannot be resized")
        if self.readonly:
            raise PermissionError(30, "the disk is read-only")
        os.ftruncate(self._file.fd, size)
        self._set_size(size)


def open_raw(file: HostFile, *, unsafe: bool = False, discard: bool = True) -> RawDisk:
    """The disk in `file`, which it closes in the end."""
    return RawDisk(file.fd, 0, file.size, file.readonly, unsafe, discard, owner=(file,))


def create_raw(path: str | os.PathLike[str], size: int, *, preallocation: str = "off") -> None:
    """A new raw image of `size` bytes; `preallocation`: off (sparse), falloc (space reserved) or full
    (zeroes written).
    """
    if preallocation not in ("off", "falloc", "full"):
        raise ValueError(f"preallocation {preallocation!r} is not one of off, falloc, full")
    with HostFile.create(path) as file:
        if file.is_block_device:
            if file.size < size:
                raise ValueError(f"the device has {file.size} bytes, {size} were asked for")
            return
        file.truncate(size)
        preallocate(file, 0, size, preallocation)


def preallocate(file: HostFile, offset: int, length: int, how: str) -> None:
    """Reserve space for a range ("falloc") or fill it with zeroes ("full")."""
    if how == "falloc" and length:
        os.posix_fallocate(file.fd, offset, length)
    elif how == "full":
        zeroes = memoryview(bytes(1 << 20))
        for at in range(offset, offset + length, 1 << 20):
            file.pwrite(at, zeroes[: min(1 << 20, offset + length - at)])
