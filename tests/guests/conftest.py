# SPDX-License-Identifier: Apache-2.0
"""Directories and packages for tests of stock guests."""

from __future__ import annotations

from pathlib import Path

import pytest
from handmade import DebMaker


@pytest.fixture
def make_deb(tmp_path: Path) -> DebMaker:
    directory = tmp_path / "debs"
    directory.mkdir()
    return DebMaker(directory)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    directory = tmp_path / "out"
    directory.mkdir()
    return directory


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of guests of its own."""
    path = tmp_path / "cache"
    monkeypatch.setenv("KVMPY_CACHE", str(path))
    return path
