# SPDX-License-Identifier: Apache-2.0
"""MSR handlers become a filter: what has a handler is denied to KVM, so that it comes out as an exit."""

from __future__ import annotations

from collections.abc import Iterable

from kvmpy._constants import (
    KVM_MSR_FILTER_MAX_BITMAP_SIZE,
    KVM_MSR_FILTER_MAX_RANGES,
    KVM_MSR_FILTER_READ,
    KVM_MSR_FILTER_WRITE,
)

Range = tuple[int, int, bytes]  # (flags, first MSR, a bit per MSR: 1 allows)


def filter_ranges(read: Iterable[int], write: Iterable[int]) -> list[Range]:
    """The ranges for `Vm.set_msr_filter` that deny reads of `read` and writes of `write`, and nothing else.

    Raises ValueError when they lie too far apart for KVM's 16 ranges of 12,288 MSRs (api.rst 4.97).
    """
    ranges = _ranges(KVM_MSR_FILTER_READ, read) + _ranges(KVM_MSR_FILTER_WRITE, write)
    if len(ranges) > KVM_MSR_FILTER_MAX_RANGES:
        raise ValueError(f"MSR handlers need {len(ranges)} filter ranges, KVM has {KVM_MSR_FILTER_MAX_RANGES}")
    return ranges


def _ranges(flags: int, indices: Iterable[int]) -> list[Range]:
    reach = KVM_MSR_FILTER_MAX_BITMAP_SIZE * 8
    ranges: list[Range] = []
    group: list[int] = []
    for index in sorted(set(indices)):
        if group and index - group[0] >= reach:
            ranges.append(_range(flags, group))
            group = []
        group.append(index)
    if group:
        ranges.append(_range(flags, group))
    return ranges


def _range(flags: int, group: list[int]) -> Range:
    first = group[0]
    bitmap = bytearray(b"\xff" * ((group[-1] - first) // 8 + 1))
    for index in group:
        bitmap[(index - first) // 8] &= ~(1 << (index - first) % 8) & 0xFF
    return flags, first, bytes(bitmap)
