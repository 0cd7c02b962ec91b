# SPDX-License-Identifier: Apache-2.0
"""Every device can be served by its threads, or in the test's own thread where a run must repeat exactly."""

import pytest


@pytest.fixture(params=[True, False], ids=["threads", "inline"])
def threaded(request):
    return request.param
