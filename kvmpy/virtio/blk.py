# SPDX-License-Identifier: Apache-2.0
"""Block device, virtio 1.2 section 5.2, over any disk of `kvmpy.block`.

The data path is C without the GIL (serve_blk.c); disks written in Python take the GIL inside it. Every queue has a
thread of its own. A flush that the guest saw completed is on the host's disk.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from typing import Any

from kvmpy.block import Disk
from kvmpy.devices.base import StateReader
from kvmpy.virtio._queue import BlkServer
from kvmpy.virtio.device import VirtioDevice
from kvmpy.virtio.limits import NONE, RateLimit

# Features (5.2.3).
SEG_MAX = 1 << 2
RO = 1 << 5
BLK_SIZE = 1 << 6
FLUSH = 1 << 9
TOPOLOGY = 1 << 10
CONFIG_WCE = 1 << 11
MQ = 1 << 12
DISCARD = 1 << 13
WRITE_ZEROES = 1 << 14

SECTOR = 512
QUEUE_SIZE = 256
MAX_QUEUES = 16
MAX_RANGES = 32  # serve_blk.c has the same
MAX_RANGE_SECTORS = 1 << 22
WRITEBACK_AT = 32  # offset of `writeback` in the configuration space


class Blk(VirtioDevice):
    """A disk for the guest.

    disk: stays the caller's and cannot be closed while the device exists; its size in bytes is rounded down to
    sectors of 512. serial: up to 20 bytes of ASCII (Linux: /sys/block/vda/serial). readonly: default as the disk.
    queues: how many, each with a thread. block_size: logical, in bytes; physical_block_size: for TOPOLOGY.
    writeback: False: every write is on the host's disk before it completes, until the driver says otherwise.
    limit: of all requests together.
    on_error(errno): called in the worker when the host failed to do a request (ENOSPC: the host is full); the guest
    gets an I/O error.
    """

    device_id = 2

    def __init__(
        self,
        disk: Disk,
        *,
        name: str = "blk",
        serial: str = "",
        readonly: bool | None = None,
        queues: int = 1,
        block_size: int = SECTOR,
        physical_block_size: int = 4096,
        writeback: bool = True,
        limit: RateLimit = NONE,
        on_error: Callable[[int], object] | None = None,
        threaded: bool = True,
    ) -> None:
        if not 1 <= queues <= MAX_QUEUES:
            raise ValueError(f"a block device has 1 to {MAX_QUEUES} queues, not {queues}")
        for size in (block_size, physical_block_size):
            if size < SECTOR or size > 1 << 20 or size & (size - 1):
                raise ValueError(f"a block size is a power of two from {SECTOR} to 1 MiB, not {size}")
        if physical_block_size < block_size:
            raise ValueError(f"physical blocks ({physical_block_size}) are smaller than logical ({block_size})")
        self.disk = disk
        self.readonly = disk.readonly if readonly is None else readonly or disk.readonly
        self._writeback = writeback
        self._on_error = on_error
        self._server = BlkServer(disk, serial.encode("ascii"))
        self.limit = limit
        features = SEG_MAX | BLK_SIZE | TOPOLOGY | FLUSH | CONFIG_WCE
        features |= RO if self.readonly else DISCARD | WRITE_ZEROES
        if queues > 1:
            features |= MQ
        per_physical = physical_block_size // block_size
        config = struct.pack(
            "<QIIHBBI BBHI BxH III II B3x",
            disk.size // SECTOR,
            0,  # size_max: not offered
            QUEUE_SIZE - 2,  # seg_max: header and status take two descriptors
            0, 0, 0,  # geometry: not offered
            block_size,
            per_physical.bit_length() - 1, 0, 1, 0,  # exponent, offset, smallest and best transfer in blocks
            writeback,
            queues,
            MAX_RANGE_SECTORS, MAX_RANGES, physical_block_size // SECTOR,
            MAX_RANGE_SECTORS, MAX_RANGES,
            1,  # write_zeroes may unmap
        )  # fmt: skip
        super().__init__(
            name, [QUEUE_SIZE] * queues, features, config, groups=[[i] for i in range(queues)], threaded=threaded
        )

    @property
    def limit(self) -> RateLimit:
        """How fast it may be; can be changed at any time."""
        return self._limit

    @limit.setter
    def limit(self, limit: RateLimit) -> None:
        self._limit = limit
        limit.apply(self._server.limiter)

    def activated(self) -> None:
        """What the driver accepted decides about requests and about the cache."""
        self._server.negotiated(
            readonly=self.readonly,
            flush=self.accepted(FLUSH),
            discard=self.accepted(DISCARD),
            write_zeroes=self.accepted(WRITE_ZEROES),
            # Without FLUSH the driver cannot flush: then every write must be on disk at once (5.2.6.2).
            writeback=bool(self._config[WRITEBACK_AT]) and (self.accepted(CONFIG_WCE) or self.accepted(FLUSH)),
        )

    def was_reset(self) -> None:
        """The cache mode is back at the host's choice."""
        self.put_config(WRITEBACK_AT, bytes([self._writeback]), notify=False)

    def write_config(self, offset: int, size: int, value: int) -> None:
        """Only `writeback` can be written, by a driver that accepted CONFIG_WCE."""
        if (offset, size) == (WRITEBACK_AT, 1) and value in (0, 1) and self.accepted(CONFIG_WCE):
            self.put_config(WRITEBACK_AT, bytes([value]), notify=False)
            self._server.writeback = bool(value)

    def serve(self, index: int) -> int:
        """A batch of requests."""
        result = self._server.serve(self.queues[index])
        error = self._server.take_error()
        if error:
            self.warn("%s: the host failed: %s", self.name, os.strerror(error))
            if error in (errno.ENOSPC, errno.EDQUOT):
                self.warn("%s: the host has no space left; the guest gets I/O errors", self.name)
            if self._on_error is not None:
                self._on_error(error)
        return result

    def resized(self) -> None:
        """The disk has another size now: tell the driver (2.5)."""
        self.put_config(0, struct.pack("<Q", self.disk.size // SECTOR))

    def save_device(self) -> dict[str, Any]:
        """The cache mode that the driver chose."""
        return {"version": 1, "writeback": self._config[WRITEBACK_AT]}

    def load_device(self, state: dict[str, Any]) -> None:
        """Raises ValueError."""
        reader = StateReader(self.name, state)
        writeback = reader.integer("writeback", 0, 1)
        reader.end()
        self.put_config(WRITEBACK_AT, bytes([writeback]), notify=False)

    def stats(self) -> dict[str, Any]:
        """Live counters by name."""
        return {**super().stats(), **self._server.counts, "throttled": self._server.limiter.throttled}

    def close(self) -> None:
        """Stop; the disk can be closed afterwards."""
        super().close()
        self._server.close()
