# SPDX-License-Identifier: Apache-2.0
"""A vCPU can always be stopped: halted for good, faulting for ever, woken after a long sleep."""

from __future__ import annotations

import random
import signal
import threading
import time

import pytest

from kvmpy import _constants as c
from kvmpy._exits import Interrupted

HANG = 60  # seconds
# the master PIC at vector 0x20 with only IRQ 0 open, then STI; HLT
WAIT_FOR_IRQ = "b011e620 b020e621 b004e621 b001e621 b0fee621 fb f4"


class Runner:
    """Runs a vCPU in a thread again and again and counts its Interrupted exits."""

    def __init__(self, vcpu) -> None:
        self.vcpu = vcpu
        self.results: list[object] = []
        self.answered = threading.Event()
        self.over = False
        self.thread = threading.Thread(target=self._main, daemon=True)

    def _main(self) -> None:
        while not self.over:
            self.results.append(self.vcpu.run())
            self.answered.set()

    def __enter__(self) -> Runner:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over = True
        self.vcpu.kick()
        self.thread.join(HANG)
        assert not self.thread.is_alive()


def test_kicks_of_a_vcpu_halted_without_interrupts(chips, guest):
    """CLI; HLT: only a kick ends that, whether it comes before, on the way into, or during the sleep."""
    vcpu = guest("fa f4 ebfd").vcpu
    delays = random.Random(1)
    with Runner(vcpu) as runner:
        for turn in range(400):
            runner.answered.clear()
            if turn % 4:  # a quarter of them at once: then the thread is still on its way in
                time.sleep(delays.random() * 2e-4)
            vcpu.kick()
            assert runner.answered.wait(HANG), f"kick {turn} was lost"
    assert all(result == Interrupted() for result in runner.results)


def test_kicks_and_interrupts_that_cannot_wake(chips, guest):
    """The wake-up calls of a masked interrupt must not eat a kick."""
    vcpu = guest(WAIT_FOR_IRQ.replace("fb f4", "fa f4 ebfd")).vcpu
    stop = threading.Event()

    def toggle() -> None:
        while not stop.is_set():
            chips.irq_line(0, True)
            chips.irq_line(0, False)

    noise = threading.Thread(target=toggle)
    noise.start()
    try:
        with Runner(vcpu) as runner:
            for turn in range(200):
                runner.answered.clear()
                vcpu.kick()
                assert runner.answered.wait(HANG), f"kick {turn} was lost"
    finally:
        stop.set()
        noise.join()
    assert all(result == Interrupted() for result in runner.results)


@pytest.mark.parametrize("backend", ["tcg"], indirect=True)  # an emulating KVM reports a failed emulation
def test_kick_ends_a_handler_that_faults_at_once(guest):
    made = guest("0f0b")  # ud2, and vector 6 leads to another
    made.memory[6 * 4 : 6 * 4 + 4] = (0x1000).to_bytes(4, "little")
    with Runner(made.vcpu) as runner:
        for turn in range(20):
            runner.answered.clear()
            made.vcpu.kick()
            assert runner.answered.wait(HANG), f"kick {turn} was lost"
    assert all(result == Interrupted() for result in runner.results)


def test_signal_after_a_long_sleep(chips, guest):
    """One KVM_RUN: HLT for most of a second, then a loop without exits. A plain signal still ends it.

    Not each signal: one that comes together with the nudge for signals of other threads lets the guest go on. And on a
    busy host the first may come before the guest has left HLT.
    """
    made = guest(WAIT_FOR_IRQ)
    made.memory[0x20 * 4 : 0x20 * 4 + 4] = (0x2000).to_bytes(4, "little")
    made.memory[0x2000:0x2002] = bytes.fromhex("ebfe")
    old = signal.signal(signal.SIGALRM, lambda *_: None)
    wake = threading.Timer(0.9, chips.irq_line, (0, True))
    wake.start()
    try:
        signal.setitimer(signal.ITIMER_REAL, 1.1, 0.33)
        for _ in range(HANG):
            assert made.vcpu.run() == Interrupted()
            if made.vcpu.regs.rip == 0x2000:
                break
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
        wake.join()
    assert made.vcpu.regs.rip == 0x2000
    assert made.vcpu.mp_state == c.KVM_MP_STATE_RUNNABLE
