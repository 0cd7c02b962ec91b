#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Say how many tests ran on each processor engine; fail if one that works here was not tested.

Reads the report that `pytest --engine-report=FILE` writes. The kernel engine is expected wherever
/dev/kvm opens and runs a guest.
"""

import json
import sys
from pathlib import Path


def main(report: str) -> int:
    engines = json.loads(Path(report).read_text())
    failed = 0
    for name, engine in engines.items():
        state = "works here" if engine["works"] else f"does not work here: {engine['why']}"
        print(f"engine {name}: {engine['passed']} tests passed, {engine['skipped']} skipped ({state})")
        if engine["works"] and not engine["passed"]:
            print(f"engine {name} works here and was not tested")
            failed = 1
    return failed


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} REPORT.json")
    sys.exit(main(sys.argv[1]))
