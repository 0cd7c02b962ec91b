# SPDX-License-Identifier: Apache-2.0
"""Many threads on the same objects: errors are fine, lost kicks, hangs and crashes are not."""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Callable

from kvmpy import _kvm
from kvmpy._constants import KVM_MEM_LOG_DIRTY_PAGES
from kvmpy._exits import Interrupted, IoIn
from kvmpy.errors import StateError

# mov dx,0x60; x: in al,dx; jmp x
READS = "ba6000 ec ebfd"
ROUNDS = 300


def together(*bodies: Callable[[], object]) -> list[BaseException]:
    """Run the bodies in a thread each; what came out of them besides StateError."""
    errors: list[BaseException] = []

    def guarded(body: Callable[[], object]) -> None:
        try:
            body()
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=guarded, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread hangs"
    return errors


def tolerant(action: Callable[[], object], rounds: int = ROUNDS) -> Callable[[], None]:
    def body() -> None:
        for _ in range(rounds):
            with contextlib.suppress(StateError):
                action()

    return body


def test_everybody_uses_one_vcpu(guest):
    vcpu = guest(READS).vcpu
    exits: list[object] = []

    def run() -> None:
        exit = vcpu.run()
        exits.append(exit)
        if isinstance(exit, IoIn):
            exit.answer(1)

    def answer_late() -> None:
        for exit in exits[-3:]:
            if isinstance(exit, IoIn):
                exit.answer(2)

    errors = together(
        tolerant(run),
        tolerant(run),
        tolerant(answer_late),
        tolerant(lambda: vcpu.regs),
        tolerant(lambda: vcpu.history),
        tolerant(vcpu.kick),
        tolerant(lambda: vcpu.if_flag),
    )
    assert errors == []
    assert {type(exit) for exit in exits} <= {IoIn, Interrupted}
    assert not vcpu.running


def test_close_against_everything(vm, guest):
    vcpu = guest(READS).vcpu
    began = threading.Event()

    def run_until_kicked() -> None:
        began.set()
        with contextlib.suppress(StateError):
            while not isinstance(vcpu.run(), Interrupted):
                pass

    def close() -> None:
        began.wait()
        while not vcpu.closed:
            try:
                vcpu.close()
            except StateError:
                vcpu.kick()

    errors = together(
        run_until_kicked,
        close,
        tolerant(lambda: vcpu.sregs),
        tolerant(vcpu.kick),
        tolerant(lambda: vcpu.cr8),
        tolerant(vcpu.coalesced),
    )
    # close() may win between a failed close and the kick after it
    assert [e for e in errors if not isinstance(e, StateError)] == []
    assert vcpu.closed


def test_dirty_log_against_slots_that_come_and_go(vm, guest):
    """The kernel writes as much bitmap as the slot has pages: its size must not change meanwhile."""
    guest("f4")
    big = mmap.mmap(-1, 0x100_0000)
    address = _kvm.address_of(big)
    sizes = [0x1000, 0x100_0000]

    def change() -> None:
        for i in range(60):
            vm.set_user_memory_region(1, 0x1000_0000, sizes[i % 2], address, KVM_MEM_LOG_DIRTY_PAGES)
            vm.set_user_memory_region(1, 0x1000_0000, 0, address)

    def read() -> None:
        for _ in range(200):
            with contextlib.suppress(ValueError):  # it is just not there
                assert len(vm.get_dirty_log(1)) in (8, 512)

    assert together(change, read, read) == []
