# SPDX-License-Identifier: Apache-2.0
"""Rules of the house that can be checked by reading or importing."""

import inspect
import subprocess
import sys
from collections import Counter
from pathlib import Path

import kvmpy


def test_public_names_are_all_and_only_what_the_module_has():
    names = {name for name in dir(kvmpy) if not name.startswith("_")}
    names = {name for name in names if not inspect.ismodule(getattr(kvmpy, name))}
    assert names - {"TYPE_CHECKING", "Any", "annotations"} | {"__version__"} == set(kvmpy.__all__)


def test_every_public_name_has_a_docstring():
    public = {name: getattr(kvmpy, name) for name in kvmpy.__all__ if name != "__version__"}
    methods = {
        f"{name}.{method}": getattr(item, method)
        for name, item in public.items()
        for method, value in vars(item).items()
        if inspect.isfunction(value) and not method.startswith("_")
    }
    assert [name for name, item in (public | methods).items() if not inspect.getdoc(item)] == []


def test_importing_opens_nothing_and_loads_nothing_heavy():
    code = (
        "import os, sys; before = set(os.listdir('/proc/self/fd')); import kvmpy;"
        "assert set(os.listdir('/proc/self/fd')) == before;"
        "heavy = {'cffi', 'iced_x86', 'pyroute2', 'numpy', 'asyncio', 'subprocess', 'argparse'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_test_files_have_names_of_their_own():
    names = Counter(path.name for path in Path(__file__).parent.rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
