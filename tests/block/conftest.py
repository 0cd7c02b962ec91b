# SPDX-License-Identifier: Apache-2.0
"""Fixtures for disk images; the judges themselves are in block_judges.py."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from block_judges import Driver, Qemu


@pytest.fixture
def qemu(tmp_path: Path) -> Qemu:
    for tool in ("qemu-img", "qemu-io"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed (Debian: qemu-utils)")
    return Qemu(tmp_path)


@pytest.fixture
def driver() -> type[Driver]:
    return Driver
