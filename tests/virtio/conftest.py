# SPDX-License-Identifier: Apache-2.0
"""Every device can be served by its threads, or in the test's own thread where a run must repeat exactly; and every
test of a device runs over split and over packed rings, unless it is about one of them (`split_ring`).
"""

import pytest
import virtio_rig


def pytest_configure(config):
    config.addinivalue_line("markers", "split_ring: pokes at the structures of a split ring")


def pytest_collection_modifyitems(config, items):
    def wanted(item):
        params = getattr(item, "callspec", None) and item.callspec.params
        if not params or params.get("ring") != "packed":
            return True
        # Packed rings with threads, and where there are none in the test's own: that is enough.
        return not item.get_closest_marker("split_ring") and params.get("threaded", True)

    dropped = [item for item in items if not wanted(item)]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if wanted(item)]


@pytest.fixture(params=["split", "packed"])
def ring(request, monkeypatch):
    monkeypatch.setattr(virtio_rig, "PACKED", request.param == "packed")
    return request.param


@pytest.fixture(params=[True, False], ids=["threads", "inline"])
def threaded(request, ring):
    return request.param
