#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Compare every stub (.pyi) with the compiled module it describes, by mypy's stubtest."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    stubs = sorted((ROOT / "kvmpy").rglob("*.pyi"))
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in stubs]
    allow = ROOT / "tools" / "stubtest_allow.txt"
    command = [sys.executable, "-m", "mypy.stubtest", "--concise", "--mypy-config-file", "pyproject.toml", *modules]
    if allow.exists():
        command += ["--allowlist", str(allow)]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
