# SPDX-License-Identifier: Apache-2.0
"""Seeds for random tests: a fixed number of fixed ones, or for a given time ever new ones."""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Iterator

SECONDS = float(os.environ.get("KVMPY_FUZZ_SECONDS", "0"))


def seeds(count: int) -> Iterator[int]:
    """0 to count - 1; with $KVMPY_FUZZ_SECONDS as many new ones as fit. The failing test shall name its seed."""
    if not SECONDS:
        yield from range(count)
        return
    end = time.monotonic() + SECONDS
    for seed in itertools.count(random.SystemRandom().getrandbits(48)):
        if time.monotonic() > end:
            return
        yield seed
