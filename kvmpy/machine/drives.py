# SPDX-License-Identifier: Apache-2.0
"""The disks of a machine: which image, in which format, written how."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

from kvmpy.block import Disk, Follow, open_disk, open_overlay
from kvmpy.block.formats import FORMATS
from kvmpy.machine import words
from kvmpy.virtio import Blk, RateLimit
from kvmpy.virtio.limits import NONE

Path = str | os.PathLike[str]

CACHES = ("writeback", "writethrough", "unsafe")
MAX_SERIAL = 20  # bytes, virtio 1.2, 5.2.6
MEMORY = "memory"


@dataclass(frozen=True, slots=True)
class Drive:
    """A disk of a machine: `Drive("root.qcow2", format="qcow2")`.

    image: a path (for "nbd" a socket), or an open `kvmpy.block.Disk`, which stays the caller's. format: "raw", "qcow2",
    "vdi", "vmdk" or "nbd"; it may be left out only if nothing is written to the image, for what a guest writes can look
    like any format. overlay: "memory" or a folder: what the guest writes goes there and is gone at the end, the image
    stays as it is. serial: up to 20 characters, in Linux /sys/block/vda/serial. cache: "writeback"; "writethrough",
    every write is on the host's disk before it completes; "unsafe", flushes wait for nothing. follow: folders whose
    files the image may name (backing files, extents). discard: freed space goes back to the host. queues: each has a
    thread. limit: how fast it may be. on_error(errno): called when the host could not do a request; the guest gets an
    I/O error.
    """

    image: Path | Disk
    format: str | None = None
    readonly: bool = False
    overlay: Path | None = None
    serial: str = ""
    cache: str = "writeback"
    follow: Sequence[Path] = ()
    discard: bool = True
    queues: int = 1
    limit: RateLimit = NONE
    on_error: Callable[[int], object] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.image, (str, os.PathLike)):
            if self.format is not None or self.overlay is not None or self.follow or self.cache == "unsafe":
                raise ValueError("format, overlay, follow and cache=unsafe are said when the disk is opened")
        elif self.format is None and not self.readonly and self.overlay is None:
            raise ValueError(
                f"{self.image}: a disk that the guest writes needs its format named, one of {', '.join(FORMATS)}: "
                "what a guest writes can look like any format"
            )
        if self.format is not None and self.format not in FORMATS:
            raise ValueError(f"{self.image}: the format is one of {', '.join(FORMATS)}, not {self.format!r}")
        if self.cache not in CACHES:
            raise ValueError(f"{self.image}: cache is one of {', '.join(CACHES)}, not {self.cache!r}")
        if len(self.serial) > MAX_SERIAL or not self.serial.isascii():
            raise ValueError(f"{self.image}: a serial number has up to {MAX_SERIAL} ASCII characters: {self.serial!r}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """A drive from "PATH[,format=F][,readonly=on][,overlay=memory|FOLDER][,serial=S][,cache=C][,follow=FOLDER]
        [,discard=off][,queues=N][,bps=BYTES][,iops=N][,bps_burst=BYTES][,iops_burst=N]"; a comma in a path is doubled.
        Raises ValueError.
        """
        path, options = words.split(text)
        if not path:
            raise ValueError(f"{text!r} names no image: it is PATH[,format=...]")
        known: dict[str, Callable[[str], object]] = {
            "format": str, "readonly": words.switch, "overlay": str, "serial": str, "cache": str,
            "follow": lambda folder: (folder,), "discard": words.switch, "queues": int,
        }  # fmt: skip
        limit = words.take_limit(text, options)
        return cls(path, limit=limit, **words.convert(text, options, known))

    def open(self) -> Disk:
        """Open the image (and its overlay). Raises what `kvmpy.block.open_disk` raises."""
        if not isinstance(self.image, (str, os.PathLike)):
            return self.image
        disk = open_disk(
            self.image,
            self.format,
            readonly=self.readonly or self.overlay is not None,
            follow=Follow(*self.follow),
            unsafe=self.cache == "unsafe",
            discard=self.discard,
        )
        if self.overlay is None:
            return disk
        try:
            return open_overlay(disk, None if os.fspath(self.overlay) == MEMORY else self.overlay)
        except BaseException:
            disk.close()
            raise

    @property
    def owned(self) -> bool:
        """Whether `open()` opens something that must be closed."""
        return isinstance(self.image, (str, os.PathLike))

    def device(self, disk: Disk, name: str) -> Blk:
        """The virtio device for the open disk."""
        return Blk(
            disk,
            name=name,
            serial=self.serial,
            readonly=self.readonly or None,
            queues=self.queues,
            writeback=self.cache != "writethrough",
            limit=self.limit,
            on_error=self.on_error,
        )
