# SPDX-License-Identifier: Apache-2.0
"""The processor beside QEMU's TCG: the same Linux guests on both, timed by themselves."""

from benchmarks.cpu.bench import HEADER as HEADER
from benchmarks.cpu.bench import ROUNDS as ROUNDS
from benchmarks.cpu.bench import run as run
