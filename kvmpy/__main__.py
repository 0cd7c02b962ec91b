# SPDX-License-Identifier: Apache-2.0
"""`python -m kvmpy` is the `kvmpy` command."""

from __future__ import annotations

import sys

from kvmpy.cli import main

if __name__ == "__main__":
    sys.exit(main())
