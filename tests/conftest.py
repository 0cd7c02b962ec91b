# SPDX-License-Identifier: Apache-2.0
"""Fixtures for all tests: the processor engines, and the count of tests that ran on each.

A test that takes `backend` (or `kvm`, `vm`, ... made from it) runs once per engine. An engine that does not
work here is skipped, with the reason; `--engine-report=FILE` writes what ran where.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from pathlib import Path

import pytest

import kvmpy
from kvmpy.errors import KvmpyError

ENGINES = ("kvm", "tcg")
HLT = b"\xf4"


@functools.cache
def why_not(backend: str) -> str | None:
    """Why an engine cannot run a guest here; None when it can."""
    try:
        with kvmpy.Vm(backend) as vm:
            vm.add_ram(0x1000, size=0x1000)
            vm.memory.write(0x1000, HLT)
            vcpu = vm.create_vcpu()
            vcpu.enter_real_mode(0x1000)
            exit = vcpu.run()
            return None if isinstance(exit, kvmpy.Hlt) else f"a guest that halts gave {exit}"
    except (KvmpyError, OSError) as e:
        return str(e)


@pytest.fixture(params=ENGINES)
def backend(request: pytest.FixtureRequest) -> str:
    """The name of an engine that works here; the test runs once for each."""
    reason = why_not(request.param)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture
def vm(backend):
    """An empty VM."""
    with kvmpy.Vm(backend) as vm:
        yield vm


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--engine-report", metavar="FILE", help="write how many tests ran on each engine (JSON)")
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


class EngineCount:
    """Counts outcomes by the engine named in a test's parameters."""

    def __init__(self) -> None:
        self.counts = {name: Counter() for name in ENGINES}
        self.engine_of: dict[str, str] = {}

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        params = getattr(item, "callspec", None)
        if params is not None:
            for value in params.params.values():
                if isinstance(value, str) and value in ENGINES:
                    self.engine_of[item.nodeid] = value

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        engine = self.engine_of.get(report.nodeid)
        if engine is not None and (report.when == "call" or report.outcome != "passed"):
            self.counts[engine][report.outcome] += 1

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
        report = {}
        for name in ENGINES:
            why = why_not(name)
            count = self.counts[name]
            report[name] = {"works": why is None, "why": why, **{k: count[k] for k in ("passed", "failed", "skipped")}}
            terminalreporter.write_line(f"engine {name}: {count['passed']} passed, {count['failed']} failed")
        path = config.getoption("--engine-report")
        if path:
            Path(path).write_text(json.dumps(report, indent=1))


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(EngineCount(), "engine-count")
