# SPDX-License-Identifier: Apache-2.0
"""Copying one disk to another: holes stay holes, zeroes become holes, several pieces at a time."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from kvmpy.block._disk import copy_data, is_zero
from kvmpy.block._python import as_core
from kvmpy.block.disk import Disk
from kvmpy.block.qcow2.compress import compressor
from kvmpy.block.qcow2.image import Qcow2Disk

CHUNK = 256 << 10  # bytes: stays in the processor's cache between read and write
STRETCH = 16  # chunks that a worker copies at a time
Progress = Callable[[int, int], None]  # bytes done, bytes in all


def convert(
    source: Disk,
    target: Disk,
    *,
    compress: bool = False,
    target_is_zero: bool = False,
    sparse_size: int = 4096,
    workers: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Copy all of `source` to the start of `target`; what `target` has more becomes zero.

    `compress`: write compressed clusters (qcow2 only). `target_is_zero`: it is known to be all zeroes, so
    zeroes need not be written. Runs of at least `sparse_size` zero bytes in the data are treated as holes
    (0: never). The target is not flushed.
    """
    if target.size < source.size:
        raise ValueError(f"the target has {target.size} bytes, the source {source.size}")
    if compress and not isinstance(target, Qcow2Disk):
        raise ValueError("only qcow2 images can have compressed clusters")
    count = workers or min(8, os.cpu_count() or 1)
    copy = _Copy(source, target, compress, target_is_zero, sparse_size)
    done = 0
    with ThreadPoolExecutor(count, thread_name_prefix="kvmpy-convert") as pool:
        waiting: deque[tuple[Future[None], int]] = deque()
        try:
            for offset, length, zero in copy.extents():
                waiting.append((pool.submit(copy.piece, offset, length, zero), length))
                while len(waiting) > 2 * count or (waiting and waiting[0][0].done()):
                    future, size = waiting.popleft()
                    future.result()
                    done += size
                    if progress is not None:
                        progress(done, target.size)
            for future, size in waiting:
                future.result()
                done += size
                if progress is not None:
                    progress(done, target.size)
        finally:
            for future, _ in waiting:
                future.cancel()


class _Copy:
    def __init__(self, source: Disk, target: Disk, compress: bool, target_is_zero: bool, sparse: int) -> None:
        self.source, self.target, self.target_is_zero = source, target, target_is_zero
        self.cores = as_core(source), as_core(target)
        self.unit, self.chunk, self.align = sparse, CHUNK, 1
        self.pack: Callable[[bytes], bytes] | None = None
        if isinstance(target, Qcow2Disk):
            # A hole within a cluster saves nothing once the cluster is there.
            self.unit = max(sparse, target.cluster_size) if sparse else 0
            self.chunk = max(CHUNK, target.cluster_size)
            if compress:
                self.pack = compressor(target.header.compression_type)
                self.align = target.cluster_size  # a cluster is compressed as a whole

    def extents(self) -> Iterator[tuple[int, int, bool]]:
        """(offset, length, zero): data in stretches that end where clusters do, zeroes as long as they are."""
        at, end = 0, self.source.size
        stretch = self.chunk if self.pack else self.chunk * STRETCH
        while at < end:
            found = self.source.block_status(at, min(end - at, 1 << 40))
            stop = min(at + found.length + -(at + found.length) % self.align, end)
            if found.zero and found.length == stop - at:
                yield at, stop - at, True
                at = stop
                continue
            while at < stop:
                n = min(stop - at, stretch - at % stretch)
                yield at, n, False
                at += n
        if self.target.size > end:
            yield end, self.target.size - end, True

    def piece(self, offset: int, length: int, zero: bool) -> None:
        if zero:
            self._zero(offset, length)
        elif self.pack and isinstance(self.target, Qcow2Disk):
            self._compressed(self.target, self.pack, offset, self.source.pread(offset, length))
        else:
            copy_data(*self.cores, offset, length, self.chunk, self.unit, self.target_is_zero)

    def _compressed(self, target: Qcow2Disk, pack: Callable[[bytes], bytes], offset: int, data: bytes) -> None:
        size = target.cluster_size
        for at in range(0, len(data), size):
            plain = data[at : at + size]
            if is_zero(plain):
                self._zero(offset + at, len(plain))
                continue
            plain = plain.ljust(size, b"\0")
            target.write_packed(offset + at, pack(plain), plain)

    def _zero(self, offset: int, length: int) -> None:
        if not self.target_is_zero:
            self.target.write_zeroes(offset, length)
