# SPDX-License-Identifier: Apache-2.0
"""The service that calls devices when they are due."""

from __future__ import annotations

import threading

import pytest

from kvmpy.clock import FakeClock, HostClock
from kvmpy.devices import Timers
from kvmpy.errors import StateError


class Alarm:
    """A device with one deadline."""

    name = "alarm"

    def __init__(self, deadline=None):
        self.deadline = deadline
        self.rang = threading.Event()
        self.rearm = lambda: None

    def next_deadline_ns(self):
        return self.deadline

    def tick(self):
        self.deadline = None
        self.rang.set()


class Broken(Alarm):
    def tick(self):
        raise RuntimeError("broken")


def test_only_what_is_due_is_called_and_the_next_deadline_returned():
    clock = FakeClock()
    timers = Timers(clock)
    early, late, idle = Alarm(10), Alarm(30), Alarm()
    for device in (early, late, idle):
        timers.add(device)
    clock.advance(10)
    assert timers.run_due() == 30
    assert (early.rang.is_set(), late.rang.is_set()) == (True, False)
    clock.advance(20)
    assert timers.run_due() is None
    assert late.rang.is_set()


def test_a_device_can_be_added_once():
    timers = Timers(FakeClock())
    device = Alarm()
    timers.add(device)
    with pytest.raises(ValueError, match="alarm"):
        timers.add(device)


def test_the_thread_calls_a_device_that_is_due():
    clock = HostClock()
    timers = Timers(clock)
    device = Alarm(clock.monotonic_ns())
    timers.add(device)
    timers.start()
    try:
        assert device.rang.wait(30)
    finally:
        timers.stop()


def test_rearm_wakes_the_thread_from_an_endless_sleep():
    clock = HostClock()
    timers = Timers(clock)
    device = Alarm()
    timers.add(device)
    timers.start()
    try:
        device.deadline = clock.monotonic_ns()
        device.rearm()
        assert device.rang.wait(30)
    finally:
        timers.stop()


def test_stopped_service_can_be_started_again_but_not_twice():
    timers = Timers(HostClock())
    timers.start()
    with pytest.raises(StateError):
        timers.start()
    timers.stop()
    timers.stop()
    timers.start()
    timers.stop()


def test_failure_of_a_device_is_reported():
    failures = []
    failed = threading.Event()

    def report(error):
        failures.append(error)
        failed.set()

    timers = Timers(HostClock(), report)
    timers.add(Broken(0))
    timers.start()
    try:
        assert failed.wait(30)
    finally:
        timers.stop()
    assert [str(error) for error in failures] == ["broken"]
