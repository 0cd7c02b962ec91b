# SPDX-License-Identifier: Apache-2.0
"""One thread per vCPU: start, pause, resume, stop, from anywhere, and nothing gets stuck."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from kvmpy import Outcome, StateError
from kvmpy.vcpu import State

LOOP = "ebfe"  # jmp $
COUNT = "ff0500200000 ebf8"  # again: inc dword [0x2000]  jmp again
COUNTER = 0x2000
LONG = 60  # seconds; only a failure waits so long


def test_a_guest_that_never_exits_is_stopped(guest):
    vm = guest(LOOP)
    vm.start()
    assert vm.state is State.RUNNING
    vm.stop()
    assert vm.wait(LONG) == Outcome("stopped")
    assert vm.state is State.STOPPED


def test_wait_times_out_and_the_guest_goes_on(guest):
    vm = guest(LOOP)
    vm.start()
    with pytest.raises(TimeoutError, match=r"still running after 0\.05 s"):
        vm.wait(0.05)
    assert vm.state is State.RUNNING


def test_run_that_times_out_stops_the_guest(guest):
    vm = guest(LOOP)
    with pytest.raises(TimeoutError):
        vm.run(timeout=0.05)
    assert vm.state is State.STOPPED


def test_a_paused_guest_stands_still_and_goes_on(guest):
    vm = guest(COUNT)
    vm.start()
    _wait_for(lambda: vm.memory.u32(COUNTER) > 0)
    vm.pause(LONG)
    assert vm.state is State.PAUSED
    stood = vm.memory.u32(COUNTER)
    assert vm.vcpus[0].regs.rip in (0x1000, 0x1006)  # its state can be had now
    assert vm.memory.u32(COUNTER) == stood
    vm.resume()
    _wait_for(lambda: vm.memory.u32(COUNTER) != stood)


def test_a_machine_started_paused_waits_for_resume(guest):
    vm = guest("b02a e680 f4")
    seen = []
    vm.on_io_out(0x80)(lambda exit: seen.append(exit.value))
    vm.start(paused=True)
    assert vm.state is State.PAUSED
    assert seen == []
    vm.resume()
    assert vm.wait(LONG).reason == "halted"
    assert seen == [42]


def test_a_handler_can_pause_its_own_vcpu(guest):
    vm = guest("e680 e681 f4")
    seen = []

    @vm.on_io_out(0x80)
    def first(exit):
        seen.append(1)
        vm.pause()  # takes effect when we return

    vm.on_io_out(0x81)(lambda exit: seen.append(2))
    vm.start()
    _wait_for(lambda: vm.state is State.PAUSED)
    assert seen == [1]
    vm.resume()
    assert vm.wait(LONG).reason == "halted"
    assert seen == [1, 2]


def test_waiting_in_a_vcpu_thread_is_refused(guest):
    vm = guest("e680 ebfe")
    vm.on_io_out(0x80)(lambda exit: vm.wait())
    with pytest.raises(StateError, match="would never return"):
        vm.run(timeout=LONG)


def test_an_exception_on_one_vcpu_stops_the_others(guest):
    # lock inc dword [0x2000]  cmp dword [0x2000],3  jne $  out 0x80,al: only the third gets there
    vm = guest("f0ff0500200000 833d0020000003 75fe e680 ebfe", cpus=3)

    @vm.on_io_out(0x80)
    def broken(exit):
        raise ArithmeticError("one of three")

    with pytest.raises(ArithmeticError, match="one of three"):
        vm.run(timeout=LONG)
    assert vm.state is State.STOPPED


def test_sixteen_vcpus_count_together_on_few_cores(guest):
    # mov ecx,200  again: lock inc dword [0x2000]  loop again  hlt
    vm = guest("b9c8000000 f0ff0500200000 e2f7 f4", cpus=16)
    assert vm.run(timeout=60).reason == "halted"
    assert vm.memory.u32(COUNTER) == 16 * 200


def test_sixteen_spinning_vcpus_pause_and_stop(guest):
    vm = guest(LOOP, cpus=16)
    vm.start()
    for _ in range(3):
        vm.pause(LONG)
        assert {thread.state for thread in vm._runner.threads} == {State.PAUSED}
        vm.resume()
    vm.stop()
    assert vm.wait(LONG).reason == "stopped"


def test_kicks_from_many_threads_lose_nothing(guest):
    # mov ecx,2000  again: out 0x80,al  loop again  hlt
    vm = guest("b9d0070000 e680 e2fc f4")
    seen = []
    vm.on_io_out(0x80)(lambda exit: seen.append(1))
    done = threading.Event()

    def kick():
        while not done.wait(0.0005):
            vm.vcpus[0].kick()

    kickers = [threading.Thread(target=kick) for _ in range(2)]
    for thread in kickers:
        thread.start()
    try:
        assert vm.run(timeout=60).reason == "halted"
    finally:
        done.set()
        for thread in kickers:
            thread.join()
    assert len(seen) == 2000


def test_a_vm_runs_again_after_it_halted(guest):
    vm = guest("40 f4")  # inc eax  hlt
    vcpu = vm.vcpus[0]
    for n in range(1, 4):
        assert vm.run(timeout=LONG).reason == "halted"
        assert vcpu.regs.rax == n
        vcpu.enter_protected_mode(0x1000)
        regs = vcpu.regs
        regs.rax = n
        vcpu.regs = regs


def test_starting_twice_is_refused(guest):
    vm = guest(LOOP)
    vm.start()
    with pytest.raises(StateError, match="running already"):
        vm.start()


def test_waiting_for_what_was_never_started_is_refused(vm):
    with pytest.raises(StateError, match="never started"):
        vm.wait()
    with pytest.raises(StateError, match="no vCPU"):
        vm.start()


def test_closing_a_running_vm_stops_it(guest):
    vm = guest(LOOP)
    vm.start()
    vm.close()
    assert vm.state is State.STOPPED
    vm.close()


def test_done_callbacks_come_once_and_late_ones_at_once(guest):
    vm = guest("f4")
    called = []
    vm.start(paused=True)
    vm.add_done_callback(lambda: called.append("early"))
    vm.resume()
    vm.wait(LONG)
    _wait_for(lambda: called == ["early"])
    vm.add_done_callback(lambda: called.append("late"))
    assert called == ["early", "late"]


@pytest.mark.parametrize("how", ["vm.run()", "vm.start(); vm.wait()", "vcpu.run()"])
def test_ctrl_c_stops_a_guest_that_never_exits(backend, how):
    program = f"""
import kvmpy, sys
with kvmpy.Vm({backend!r}) as vm:
    vm.add_ram(0x1000, size=0x1000)
    vm.memory.write(0x1000, bytes.fromhex({LOOP!r}))
    vcpu = vm.create_vcpu()
    vcpu.enter_protected_mode(0x1000)
    try:
        print("ready", flush=True)
        {how}
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "ready\n"
        os.kill(child.pid, signal.SIGINT)
        out, _ = child.communicate(timeout=LONG)
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    assert out == "interrupted\n"
    assert child.returncode == 0


def _wait_for(condition):
    done = threading.Event()
    for _ in range(LONG * 200):
        if condition():
            return
        done.wait(0.005)
    raise AssertionError("it did not happen")
