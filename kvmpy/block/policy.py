# SPDX-License-Identifier: Apache-2.0
"""Which other files an image may have opened in its name.

An image names files: backing files, data files, extents. Whoever can write the image (a guest, an upload)
chooses those names, so by default none is followed (CVE-2015-5163, CVE-2022-47951, CVE-2024-32498: images
that read the host's files).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from kvmpy.block.hostfile import HostFile
from kvmpy.errors import ImageError

MAX_DEPTH = 16


class Follow:
    """Permission to open files that an image names, if they are in one of `folders` (or below).

    `depth` is how many layers of images may follow each other.
    """

    def __init__(self, *folders: str | os.PathLike[str], depth: int = MAX_DEPTH) -> None:
        if not 0 <= depth <= MAX_DEPTH:
            raise ValueError(f"depth {depth} is not within 0..{MAX_DEPTH}")
        self.folders = tuple(Path(os.path.realpath(folder)) for folder in folders)
        self.depth = depth

    def deeper(self) -> Self:
        """The permission for the images that the next layer names."""
        if self.depth == 0:
            raise ImageError("the chain of images is too deep")
        other = type(self).__new__(type(self))
        other.folders, other.depth = self.folders, self.depth - 1
        return other

    def open(self, name: str, beside: Path, readonly: bool, what: str) -> HostFile:
        """Open the file that an image in folder `beside` calls `name`; `what` is its part, e.g. "backing
        file".

        ImageError if the policy forbids it. The path is resolved first, then walked again without following
        any link: a link that is put there in between makes the walk fail, not escape.
        """
        scheme = name.split("/", 1)[0]
        if ":" in scheme:
            raise ImageError(f"{what} {name!r} is not a plain path; protocols and json: are not followed")
        if "\0" in name or not name:
            raise ImageError(f"{what} {name!r} is not a path")
        if not self.folders:
            raise ImageError(f"the image names {what} {name!r}; following it was not allowed (follow=, --follow)")
        path = Path(os.path.realpath(beside / name))
        for folder in self.folders:
            if path.is_relative_to(folder) and path != folder:
                fd = _open_beneath(folder, path.relative_to(folder).parts, readonly, what)
                return HostFile.adopt(fd, path, readonly)
        allowed = ", ".join(str(folder) for folder in self.folders)
        raise ImageError(f"{what} {name!r} is {str(path)!r}, which is outside the allowed folders ({allowed})")


NOTHING = Follow()


def _open_beneath(folder: Path, parts: Iterable[str], readonly: bool, what: str) -> int:
    *way, last = parts
    at = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in way:
            deeper = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
            os.close(at)
            at = deeper
        mode = os.O_RDONLY if readonly else os.O_RDWR
        return os.open(last, mode | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=at)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise ImageError(f"{what} {folder.joinpath(*way, last)} changed into a link while it was opened") from error
        raise
    finally:
        os.close(at)
