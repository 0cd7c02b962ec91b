#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Print what building and testing kvmpy needs, one requirement a line, as pyproject.toml says it.

The Makefile installs these before kvmpy itself, so that the build needs no isolated second copy of them.
"""

import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def requirements() -> list[str]:
    config = tomllib.loads(PYPROJECT.read_text())
    project = config["project"]
    extras = project["optional-dependencies"]
    wanted = [*config["build-system"]["requires"], *project["dependencies"], *extras["test"], *extras["dev"]]
    return sorted({line for line in wanted if not line.startswith("kvmpy[")})


if __name__ == "__main__":
    print("\n".join(requirements()))
