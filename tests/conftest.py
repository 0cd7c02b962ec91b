# SPDX-License-Identifier: Apache-2.0
"""Fixtures for all tests: the processor engines, and the count of tests that ran on each.

A test that takes `backend` (or `kvm`, `vm`, ... made from it) runs once per engine. An engine that does not
work here is skipped, with the reason; `--engine-report=FILE` writes what ran where. In the places of `EXECUTED` a test
on the software CPU runs twice: on its interpreter and on its JIT.
"""

from __future__ import annotations

import functools
import json
import platform
import signal
from collections import Counter
from pathlib import Path

import pytest

import kvmpy
from kvmpy.errors import KvmpyError

ENGINES = ("kvm", "tcg")
EXECUTORS = ("interp", "jit") if platform.machine() == "x86_64" else ("interp",)
EXECUTED = ("tests/tcg/", "tests/profile/", "tests/guests/test_debian.py")
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


@pytest.fixture
def executor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """How the software CPU executes; None where a test does not care. Small guests are compiled at once."""
    value: str | None = getattr(request, "param", None)
    if value is not None:
        monkeypatch.setenv("KVMPY_TCG", value)
        if request.node.get_closest_marker("guest") is None:
            monkeypatch.setenv("KVMPY_JIT_THRESHOLD", "0")
    return value


@pytest.fixture(params=ENGINES)
def backend(request: pytest.FixtureRequest, executor: str | None) -> str:
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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    place = metafunc.definition.nodeid
    if "executor" in metafunc.fixturenames and place.startswith(EXECUTED):
        metafunc.parametrize("executor", EXECUTORS, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    twice = [item for item in items if _params(item).get("backend") == "kvm" and _params(item).get("executor") == "jit"]
    if twice:
        config.hook.pytest_deselected(items=twice)
        items[:] = [item for item in items if item not in set(twice)]
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


def _params(item: pytest.Item) -> dict[str, object]:
    callspec = getattr(item, "callspec", None)
    return callspec.params if callspec is not None else {}


def _executed(executor: str) -> str:
    """What the count calls the software CPU with one of its executors."""
    return f"tcg {executor}"


class EngineCount:
    """Counts outcomes by the engine named in a test's parameters."""

    def __init__(self) -> None:
        self.counts = {name: Counter() for name in (*ENGINES, *map(_executed, EXECUTORS))}
        self.engine_of: dict[str, str] = {}

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        params = _params(item)
        for value in params.values():
            if isinstance(value, str) and value in ENGINES:
                self.engine_of[item.nodeid] = value
        if self.engine_of.get(item.nodeid) == "tcg" and params.get("executor"):
            self.engine_of[item.nodeid] = _executed(str(params["executor"]))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        engine = self.engine_of.get(report.nodeid)
        if engine is not None and (report.when == "call" or report.outcome != "passed"):
            self.counts[engine][report.outcome] += 1
            if engine not in ENGINES:  # it counts for the engine too
                self.counts["tcg"][report.outcome] += 1

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
        report = {}
        for name in self.counts:
            why = why_not(name if name in ENGINES else "tcg")
            count = self.counts[name]
            report[name] = {"works": why is None, "why": why, **{k: count[k] for k in ("passed", "failed", "skipped")}}
            terminalreporter.write_line(f"engine {name}: {count['passed']} passed, {count['failed']} failed")
        path = config.getoption("--engine-report")
        if path:
            Path(path).write_text(json.dumps(report, indent=1))


def pytest_configure(config: pytest.Config) -> None:
    # A shell starts what it runs in the background with Ctrl-C ignored, and the programs that tests start inherit that.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.pluginmanager.register(EngineCount(), "engine-count")
