# SPDX-License-Identifier: Apache-2.0
"""Running, kicking, signals, threads and the end of a vCPU."""

from __future__ import annotations

import gc
import os
import signal
import threading
import weakref
from pathlib import Path

import pytest

from kvmpy import _constants as c
from kvmpy import _kvm
from kvmpy._exits import Hlt, Interrupted, IoIn, IoOut
from kvmpy.engines import open_kvm
from kvmpy.errors import KvmError, StateError

from .conftest import wait_until

SPIN = "ebfe"  # jmp $
OUTS = "ba8000 ee ebfd"  # mov dx,0x80; x: out dx,al; jmp x


def in_thread(function) -> tuple[threading.Thread, list[object]]:
    results: list[object] = []

    def body() -> None:
        try:
            results.append(function())
        except BaseException as e:
            results.append(e)

    thread = threading.Thread(target=body)
    thread.start()
    return thread, results


def test_kick_ends_a_run_that_never_exits(guest):
    vcpu = guest(SPIN).vcpu
    thread, results = in_thread(vcpu.run)
    wait_until(lambda: vcpu.running)
    vcpu.kick()
    thread.join(60)
    assert results == [Interrupted()]
    assert not vcpu.running


def test_kick_before_run_ends_the_next_run_once(guest):
    vcpu = guest("90 f4").vcpu  # nop; hlt
    vcpu.kick()
    assert vcpu.immediate_exit
    assert vcpu.run() == Interrupted()
    assert not vcpu.immediate_exit
    assert vcpu.run() == Hlt()


def test_many_kicks_before_a_run_are_one(guest):
    vcpu = guest("f4").vcpu
    for _ in range(5):
        vcpu.kick()
    assert vcpu.run() == Interrupted()
    assert vcpu.run() == Hlt()


def test_each_kick_during_a_run_gives_one_interrupted(guest):
    """A kick is answered through immediate_exit or its signal; the one that comes late must not count twice."""
    vcpu = guest(OUTS).vcpu
    kicks = 200
    interrupted = 0

    def runs() -> int:
        nonlocal interrupted
        while not done.is_set() or vcpu.immediate_exit:
            if isinstance(vcpu.run(), Interrupted):
                interrupted += 1
                answered.set()
        return interrupted

    done, answered = threading.Event(), threading.Event()
    thread, results = in_thread(runs)
    for _ in range(kicks):
        answered.clear()
        vcpu.kick()
        assert answered.wait(60)
    done.set()
    thread.join(60)
    assert results == [kicks]


def test_kick_completes_a_pending_read(guest):
    vcpu = guest("ba6000 ec f4").vcpu  # mov dx,0x60; in al,dx; hlt
    exit = vcpu.run()
    assert isinstance(exit, IoIn)
    exit.answer(0x42)
    vcpu.kick()
    assert vcpu.run() == Interrupted()
    assert vcpu.regs.rax & 0xFF == 0x42


def test_signal_handlers_run_and_may_raise(guest):
    class Stop(Exception):
        pass

    def handler(*_: object) -> None:
        raise Stop

    vcpu = guest(SPIN).vcpu
    old = signal.signal(signal.SIGALRM, handler)
    try:
        with pytest.raises(Stop):
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            vcpu.run()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert not vcpu.running
    vcpu.kick()
    assert vcpu.run() == Interrupted()


def test_signal_without_exception_gives_interrupted(guest):
    seen = []
    vcpu = guest(SPIN).vcpu
    old = signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)  # again: before run() it would be seen too early
        assert vcpu.run() == Interrupted()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert seen


def test_a_signal_that_another_thread_took_is_seen(guest):
    """Handlers run in the main thread alone, whoever the kernel gave the signal to."""

    class Stop(Exception):
        pass

    def handler(*_: object) -> None:
        raise Stop

    def other() -> None:
        wait_until(lambda: vcpu.running)
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)

    vcpu = guest(SPIN).vcpu
    watchdog = threading.Timer(20, vcpu.kick)
    thread = threading.Thread(target=other)
    old = signal.signal(signal.SIGUSR1, handler)
    try:
        with pytest.raises(Stop):
            watchdog.start()
            thread.start()
            vcpu.run()
    finally:
        signal.signal(signal.SIGUSR1, old)
        watchdog.cancel()
        thread.join(60)


def test_blocked_signals_wait_until_after_the_run(guest):
    vcpu = guest(OUTS).vcpu
    vcpu.set_signal_mask([signal.SIGUSR1])
    seen = []
    old = signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
    try:
        assert isinstance(vcpu.run(), IoOut)
        vcpu.set_signal_mask(None)
    finally:
        signal.signal(signal.SIGUSR1, old)
    with pytest.raises(ValueError, match="no signal 65"):
        vcpu.set_signal_mask([65])


def test_state_cannot_be_had_while_running(guest):
    vcpu = guest(SPIN).vcpu
    thread, _ = in_thread(vcpu.run)
    try:
        wait_until(lambda: vcpu.running)
        for access in (lambda: vcpu.regs, lambda: setattr(vcpu, "cpuid", []), vcpu.run, lambda: vcpu.translate(0)):
            with pytest.raises(StateError):
                access()
        assert vcpu.exit_count == 0  # but this can
        assert vcpu.run_flags == 0
    finally:
        vcpu.kick()
        thread.join(60)
    assert vcpu.regs.rip == 0x1000


def test_close_while_running_is_refused(guest):
    g = guest(SPIN)
    thread, results = in_thread(g.vcpu.run)
    try:
        wait_until(lambda: g.vcpu.running)
        with pytest.raises(StateError, match="kick and join"):
            g.vcpu.close()
        with pytest.raises(StateError, match="kick and join"):
            g.vm.close()
        assert not g.vm.closed
    finally:
        g.vcpu.kick()
        thread.join(60)
    assert results == [Interrupted()]
    g.vm.close()
    assert g.vcpu.closed


def test_closed_objects_say_so(guest):
    g = guest("f4")
    g.vm.close()
    g.vm.close()  # again does nothing
    for access in (
        g.vcpu.run,
        g.vcpu.kick,
        g.vcpu.fileno,
        lambda: g.vcpu.regs,
        lambda: g.vcpu.immediate_exit,
        g.vcpu.coalesced,
        g.vm.create_vcpu,
        g.vm.create_irqchip,
        lambda: g.vm.wrote(0, 1),
    ):
        with pytest.raises(StateError, match="closed"):
            access()
    assert not g.vcpu.running


def test_close_goes_from_children_to_parents(fake):
    vm = fake.kvm.create_vm()
    first, second = vm.create_vcpu(), vm.create_vcpu()
    handles = {first.fileno(), second.fileno()}
    vm_handle = vm.fileno()
    fake.kvm.close()
    assert set(fake.closed[:2]) == handles
    assert fake.closed[2] == vm_handle
    assert fake.unmapped == 2
    assert first.closed and second.closed and vm.closed


def test_parents_do_not_keep_children_alive(fake):
    vm = fake.kvm.create_vm()
    vcpu = vm.create_vcpu()
    gone = weakref.ref(vcpu)
    handle = vcpu.fileno()
    del vcpu
    gc.collect()
    assert gone() is None
    assert handle in fake.closed
    assert fake.unmapped == 1
    assert vm.vcpus == []


def test_children_keep_parents_alive(fake):
    vcpu = fake.vcpu()
    gc.collect()
    assert not vcpu.vm.closed
    assert vcpu.vm.kvm is fake.kvm


def test_an_exit_outlives_its_vcpu_without_harm(fake):
    fake.exits_with(c.KVM_EXIT_MMIO, bytes(20))
    vcpu = fake.vcpu()
    exit = vcpu.run()
    del vcpu
    gc.collect()
    assert fake.unmapped == 1
    assert not exit.current
    with pytest.raises(StateError):
        exit.answer(0)


def test_failed_creation_leaves_nothing_open(fake):
    vm = fake.kvm.create_vm()
    fake.answers["KVM_CREATE_VCPU"] = -17  # EEXIST
    with pytest.raises(KvmError, match="KVM_CREATE_VCPU: File exists"):
        vm.create_vcpu(0)
    assert vm.vcpus == []
    assert fake.closed == []


def test_objects_that_were_never_opened(kvm):
    for cls in (_kvm.Kvm, _kvm.Vm, _kvm.Vcpu, _kvm.Device, _kvm.Stats):
        empty = cls.__new__(cls)
        assert empty.closed
        assert empty.backend == ""
        empty.close()
        with pytest.raises(StateError):
            empty.fileno()
    vcpu = _kvm.Vcpu.__new__(_kvm.Vcpu)
    assert (vcpu.history, vcpu.exit_count, vcpu.running) == ([], 0, False)
    for access in (vcpu.run, vcpu.kick, vcpu.collect_dirty, lambda: vcpu.regs):
        with pytest.raises(StateError):
            access()
    assert repr(IoOut.__new__(IoOut)).startswith("IoOut(")


def test_opening_twice_is_refused(fake):
    vm = fake.kvm.create_vm()
    with pytest.raises(StateError, match="open already"):
        vm.__init__(fake.kvm)
    vcpu = vm.create_vcpu()
    with pytest.raises(StateError, match="created once"):
        vcpu.__init__(vm, 9)
    assert len(fake.closed) == 1


def test_the_id_of_a_closed_vcpu_is_not_given_again(vm):
    vm.create_vcpu().close()
    second = vm.create_vcpu()
    assert second.id == 1
    assert vm.vcpus == [second]


def test_a_processor_that_waits_for_its_start_is_kicked(chips):
    chips.create_vcpu()
    second = chips.create_vcpu()
    thread, results = in_thread(second.run)
    wait_until(lambda: second.running)
    second.kick()
    thread.join(60)
    assert results == [Interrupted()]
    assert second.mp_state == c.KVM_MP_STATE_UNINITIALIZED


def test_a_halted_processor_is_kicked(chips, guest):
    vcpu = guest("f4").vcpu  # with an in-kernel irqchip HLT waits in the engine
    thread, results = in_thread(vcpu.run)
    wait_until(lambda: vcpu.running)
    vcpu.kick()
    thread.join(60)
    assert results == [Interrupted()]


def test_two_vcpus_in_two_threads(vm, guest):
    first = guest(SPIN)
    second = vm.create_vcpu()
    sregs = second.sregs
    sregs.cs.base = sregs.cs.selector = 0
    second.sregs = sregs
    second.regs = first.vcpu.regs
    threads = [in_thread(vcpu.run) for vcpu in vm.vcpus]
    wait_until(lambda: all(vcpu.running for vcpu in vm.vcpus))
    for vcpu in vm.vcpus:
        vcpu.kick()
    for thread, results in threads:
        thread.join(60)
        assert results == [Interrupted()]


def test_the_kick_signal_is_one_that_nobody_used(vcpu):
    """It has a handler now, and signals that had one keep theirs."""
    taken = [n for n in range(signal.SIGRTMIN, signal.SIGRTMAX + 1) if caught(n)]
    assert taken


def caught(number: int) -> bool:
    with Path("/proc/self/status").open() as status:
        mask = next(int(line.split()[1], 16) for line in status if line.startswith("SigCgt"))
    return bool(mask >> (number - 1) & 1)


def test_kick_works_in_a_forked_child(backend, vm):
    """The thread that is kicked has another id there."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with open_kvm(backend) as kvm:
                vcpu = kvm.create_vm().create_vcpu()
                vcpu.kick()
                os.write(write, repr(vcpu.run()).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        assert pipe.read() == b"Interrupted()"


def test_subclasses_are_made(kvm):
    class Mine(_kvm.Vcpu):
        extra = 5

    class MyVm(_kvm.Vm):
        vcpu_class = Mine

        def __init__(self, kvm: _kvm.Kvm, name: str) -> None:
            super().__init__(kvm)
            self.name = name

    vm = MyVm(kvm, "fred")
    vcpu = vm.create_vcpu()
    assert type(vcpu) is Mine
    vcpu.note = 1
    assert vm.vcpus == [vcpu]
    assert vm.name == "fred"
    assert vm.create_vcpu(7).id == 7
    assert vm.create_vcpu().id == 1
