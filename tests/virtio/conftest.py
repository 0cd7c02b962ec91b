# SPDX-License-Identifier: Apache-2.0
"""Every device can be served by its threads, or in the test's own thread where a run must repeat exactly; and every
test of a device runs over split and over packed rings, and behind virtio-mmio and virtio-pci, unless it is about one of
them (`split_ring`, `mmio_registers`).
"""

import pytest
import virtio_rig


def pytest_configure(config):
    config.addinivalue_line("markers", "split_ring: pokes at the structures of a split ring")
    config.addinivalue_line("markers", "mmio_registers: pokes at the registers of virtio-mmio")


def pytest_collection_modifyitems(config, items):
    def wanted(item):
        params = getattr(item, "callspec", None) and item.callspec.params
        if not params or params.get("ring") not in ("packed", "pci"):
            return True
        if params["ring"] == "pci":
            return not item.get_closest_marker("mmio_registers") and params.get("threaded", True)
        # Packed rings with threads, and where there are none in the test's own: that is enough.
        return not item.get_closest_marker("split_ring") and params.get("threaded", True)

    dropped = [item for item in items if not wanted(item)]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if wanted(item)]


@pytest.fixture(params=["split", "packed", "pci"])
def ring(request, monkeypatch):
    monkeypatch.setattr(virtio_rig, "PACKED", request.param == "packed")
    monkeypatch.setattr(virtio_rig, "PCI", request.param == "pci")
    return request.param


@pytest.fixture(params=[True, False], ids=["threads", "inline"])
def threaded(request, ring):
    return request.param
