# SPDX-License-Identifier: Apache-2.0
"""Numbers of virtio 1.2 that every device and transport shares."""

from __future__ import annotations

# Device status (2.1).
ACKNOWLEDGE = 1
DRIVER = 2
DRIVER_OK = 4
FEATURES_OK = 8
NEEDS_RESET = 64
FAILED = 128

# Feature bits of queues and transports (6).
INDIRECT_DESC = 1 << 28
EVENT_IDX = 1 << 29
VERSION_1 = 1 << 32
RING_PACKED = 1 << 34
RING_RESET = 1 << 40

# What every device here offers besides its own features.
COMMON = INDIRECT_DESC | EVENT_IDX | VERSION_1 | RING_RESET

# Interrupt status (4.2.2).
USED_BUFFER = 1
CONFIG_CHANGE = 2
