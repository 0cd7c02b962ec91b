# SPDX-License-Identifier: Apache-2.0
"""Network namespaces for tests."""

import subprocess

import pytest
from net_rig import new_namespace


@pytest.fixture
def namespace():
    """A network namespace, removed at the end with all that is in it."""
    space = new_namespace(0)
    yield space
    subprocess.run(["ip", "netns", "del", space.name], check=True)


@pytest.fixture
def other_namespace():
    """A second one."""
    space = new_namespace(1)
    yield space
    subprocess.run(["ip", "netns", "del", space.name], check=True)
