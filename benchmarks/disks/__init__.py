# SPDX-License-Identifier: Apache-2.0
"""Disks of a guest beside QEMU's: sequential and random requests on raw and on qcow2, on the software CPUs."""

from benchmarks.disks import ring
from benchmarks.disks.bench import HEADER, ROUNDS, TRANSPORTS_HEADER, run, transports

__all__ = ["HEADER", "ROUNDS", "TRANSPORTS_HEADER", "ring", "run", "transports"]
