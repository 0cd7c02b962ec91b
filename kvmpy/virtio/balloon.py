# SPDX-License-Identifier: Apache-2.0
"""Traditional memory balloon, virtio 1.2 section 5.5: inflate, deflate, statistics, free page reporting.

The guest names pages it does not use; the host takes them back (`Ram.discard`). Queues exist only for negotiated
features, in the order inflate, deflate, statistics, free page hints (never offered), reporting; the numbering follows
Linux, which leaves no gaps.
"""

from __future__ import annotations

import struct
import threading
from typing import Any

from kvmpy.devices.base import StateReader
from kvmpy.memory import GuestMemory
from kvmpy.virtio._queue import IDLE, MORE, Chain
from kvmpy.virtio.device import VirtioDevice

# Features (5.5.3).
MUST_TELL_HOST = 1 << 0
STATS_VQ = 1 << 1
DEFLATE_ON_OOM = 1 << 2
PAGE_REPORTING = 1 << 5

PAGE = 4096
INFLATE, DEFLATE, STATS = 0, 1, 2
ACTUAL_AT = 4  # offset of `actual` in the configuration space
BATCH = 16
STATISTICS = (  # 5.5.6.4 by tag
    "swap_in", "swap_out", "major_faults", "minor_faults", "free_memory", "total_memory", "available_memory",
    "disk_caches", "hugetlb_allocations", "hugetlb_failures",
)  # fmt: skip


class Balloon(VirtioDevice):
    """A balloon in the guest's memory.

    memory: the same that the transport has. deflate_on_oom: the guest may take pages back before it kills processes.
    statistics, reporting: offer them. The host's file-backed shared memory gets holes; see `Ram.discard`.
    """

    device_id = 5

    def __init__(
        self,
        memory: GuestMemory,
        *,
        name: str = "balloon",
        deflate_on_oom: bool = True,
        statistics: bool = True,
        reporting: bool = True,
        threaded: bool = True,
    ) -> None:
        features = (STATS_VQ * statistics) | (DEFLATE_ON_OOM * deflate_on_oom) | (PAGE_REPORTING * reporting)
        super().__init__(name, [128] * 4, features, struct.pack("<IIII", 0, 0, 0, 0), threaded=threaded)
        self._memory = memory
        self._lock = threading.Lock()
        self._held: Chain | None = None  # the statistics buffer: given back when we want new ones (5.5.6.3)
        self._wanted = False
        self.statistics: dict[str, int] = {}  # the last that the guest sent, bytes or counts
        self.discarded = 0  # bytes given back to the host
        self.refused = 0  # pages named that are not memory

    # -- for the host

    @property
    def target(self) -> int:
        """Bytes that the guest is asked to give."""
        return int.from_bytes(self._config[0:4], "little") * PAGE

    @target.setter
    def target(self, size: int) -> None:
        if size < 0 or size % PAGE or size // PAGE >= 1 << 32:
            raise ValueError(f"a balloon's size is a multiple of {PAGE}, not {size:#_x}")
        self.put_config(0, struct.pack("<I", size // PAGE))

    @property
    def actual(self) -> int:
        """Bytes that the guest says it gave."""
        return int.from_bytes(self._config[ACTUAL_AT : ACTUAL_AT + 4], "little") * PAGE

    def request_statistics(self) -> None:
        """Ask the guest for new statistics; they appear in `statistics` when it answers."""
        with self._lock:
            self._wanted = True
        self.kick(STATS)

    # -- queues

    def was_reset(self) -> None:
        """Nothing is in the balloon."""
        self._held = None
        self.put_config(ACTUAL_AT, bytes(4), notify=False)

    def queue_was_reset(self, index: int) -> None:
        """The statistics buffer is gone with its queue."""
        if index == STATS:
            self._held = None

    def write_config(self, offset: int, size: int, value: int) -> None:
        """The driver writes `actual`."""
        if (offset, size) == (ACTUAL_AT, 4):
            self.put_config(ACTUAL_AT, struct.pack("<I", value), notify=False)

    def _purpose(self, index: int) -> str:
        """What a queue is for: Linux numbers the queues of negotiated features without gaps."""
        names = ["inflate", "deflate"]
        names += ["stats"] if self.accepted(STATS_VQ) else []
        names += ["reporting"] if self.accepted(PAGE_REPORTING) else []
        return names[index] if index < len(names) else ""

    def serve(self, index: int) -> int:
        """A batch of one queue."""
        purpose = self._purpose(index)
        queue = self.queues[index]
        if purpose == "stats":
            return self._statistics()
        for _ in range(BATCH):
            chain = queue.pop()
            if chain is None:
                return IDLE
            if purpose == "inflate":
                self._inflate(chain)
            elif purpose == "reporting":
                self._report(chain)
            # deflate: the pages are the guest's again as they are
            queue.push(chain)
        return MORE

    def _inflate(self, chain: Chain) -> None:
        # 32-bit page numbers (5.5.6); runs of them are one madvise.
        data = chain.read()
        pages = sorted(struct.unpack(f"<{len(data) // 4}I", data[: len(data) // 4 * 4]))
        start = count = 0
        for page in pages:
            if count and page == start + count:
                count += 1
            elif not count or page != start + count - 1:  # twice the same is once
                self._discard(start * PAGE, count * PAGE)
                start, count = page, 1
        self._discard(start * PAGE, count * PAGE)

    def _report(self, chain: Chain) -> None:
        """Free page reporting (5.5.6.7): the writable buffers are the free pages."""
        for gpa, size in chain.ranges():
            start = (gpa + PAGE - 1) & ~(PAGE - 1)
            end = (gpa + size) & ~(PAGE - 1)
            self._discard(start, max(0, end - start))

    def _discard(self, gpa: int, size: int) -> None:
        """Give guest pages back to the host, where they are RAM; a ring in one is lost, which harms the guest alone."""
        while size > 0:
            region = self._memory.region_at(gpa)
            count = PAGE if region is None else min(size, region.end - gpa)
            if region is None or region.readonly:
                self.refused += count // PAGE
            else:
                unit = region.ram.page_size  # parts of huge pages cannot be given back
                offset = region.offset + gpa - region.gpa
                low, high = (offset + unit - 1) & ~(unit - 1), (offset + count) & ~(unit - 1)
                if low < high:
                    region.ram.discard(low, high - low)
                    self._memory.wrote(region.gpa + low - region.offset, high - low)
                    self.discarded += high - low
            gpa += count
            size -= count

    def _statistics(self) -> int:
        queue = self.queues[STATS]
        with self._lock:
            wanted, self._wanted = self._wanted, False
        if wanted and self._held is not None:
            queue.push(self._held)
            self._held = None
        while (chain := queue.pop()) is not None:
            data = chain.read(0, 10 * len(STATISTICS) * 4)
            found = {}
            for at in range(0, len(data) // 10 * 10, 10):
                tag, value = struct.unpack_from("<HQ", data, at)
                if tag < len(STATISTICS):
                    found[STATISTICS[tag]] = value
            if found:
                self.statistics = found
            if self._held is not None:  # a driver has one such buffer; another one takes its place
                queue.push(self._held)
            self._held = chain
        return IDLE

    # -- state

    def save_device(self) -> dict[str, Any]:
        """Target and size; a held statistics buffer is given back, so that the driver asks with it again."""
        if self._held is not None:
            self.queues[STATS].push(self._held)
            self._held = None
            self.finish(self.queues[STATS])
        return {"version": 1, "target": self.target // PAGE, "actual": self.actual // PAGE}

    def load_device(self, state: dict[str, Any]) -> None:
        """Raises ValueError."""
        reader = StateReader(self.name, state)
        target, actual = reader.bits("target", 0xFFFF_FFFF), reader.bits("actual", 0xFFFF_FFFF)
        reader.end()
        self.put_config(0, struct.pack("<II", target, actual), notify=False)

    def stats(self) -> dict[str, Any]:
        """Live counters by name, and what the guest said last."""
        guest = {f"guest_{name}": value for name, value in self.statistics.items()}
        counts = {"target": self.target, "actual": self.actual, "discarded": self.discarded, "refused": self.refused}
        return {**super().stats(), **counts, **guest}
