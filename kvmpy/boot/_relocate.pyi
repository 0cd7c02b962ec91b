# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence

def relocate(
    data: bytearray,
    segments: Sequence[tuple[int, int, int]],
    at: int,
    count: int,
    base: int,
    width: int,
    delta: int,
) -> None: ...
