# SPDX-License-Identifier: Apache-2.0
"""MONITOR and MWAIT (SDM volume 3A, 8.10): what ends the wait, and that no store is missed."""

from __future__ import annotations

import threading
import time

import lab
import pytest
from lab import GP, NONE, UD

from kvmpy import _exits as x

LINE = 0x50040
HANG = 60
pytestmark = pytest.mark.parametrize("backend", ["tcg"], indirect=True)  # KVM has MWAIT leave the guest or not at all

WAIT = """
%macro WAIT_ 2          ; address, extensions
    mov rax, %1
    xor ecx, ecx
    xor edx, edx
    monitor
    mov ecx, %2
    xor eax, eax
    mwait
%endmacro
start:
"""


def sleeping(guest: lab.Lab) -> threading.Thread:
    """Run the guest in a thread until it sleeps in MWAIT."""
    guest.exits = []
    thread = threading.Thread(target=lambda: guest.exits.append(guest.vcpu.run()), daemon=True)
    thread.start()
    time.sleep(0.1)
    assert thread.is_alive()
    return thread


@pytest.fixture
def guest_of(backend):
    guests = []

    def make(body: str, **options) -> lab.Lab:
        guests.append(lab.Lab(backend, WAIT + body, needs=("monitor",), chips=True, **options))
        return guests[-1]

    yield make
    for guest in guests:
        guest.close()


def ended(guest: lab.Lab, thread: threading.Thread) -> object:
    thread.join(HANG)
    assert not thread.is_alive(), "MWAIT did not end"
    return guest.exits[0]


def test_a_write_of_the_host_ends_it(guest_of):
    guest = guest_of(f"WAIT_ {LINE}, 0\n out 0x80, al\n hlt")
    thread = sleeping(guest)
    guest.vm.memory.write(LINE - 64, bytes(64))  # another line: nothing happens
    thread.join(0.05)
    assert thread.is_alive()
    guest.vm.memory.write(LINE + 63, b"\1")
    assert isinstance(ended(guest, thread), x.IoOut)


def test_a_store_of_another_processor_ends_it(guest_of):
    guest = guest_of(f"WAIT_ {LINE} + 8, 0\n out 0x80, al\n hlt\nsecond:\n mov byte [{LINE}], 1\n out 0x81, al\n hlt")
    thread = sleeping(guest)
    assert guest.second.run().port == 0x81
    assert ended(guest, thread).port == 0x80


@pytest.mark.parametrize("extensions", [0, 1])
def test_a_masked_interrupt_ends_it_if_asked(guest_of, extensions):
    pic = "".join(f"mov al, {value}\n out {port}, al\n" for value, port in
                  ((0x11, 0x20), (0x20, 0x21), (4, 0x21), (1, 0x21), (0xFE, 0x21)))  # fmt: skip
    guest = guest_of(f"{pic} cli\n WAIT_ {LINE}, {extensions}\n out 0x80, al\n hlt")
    thread = sleeping(guest)
    guest.vm.irq_line(0, True)
    if not extensions:
        thread.join(0.05)
        assert thread.is_alive()
        guest.vcpu.kick()
        assert ended(guest, thread) == x.Interrupted()
        return
    assert isinstance(ended(guest, thread), x.IoOut)


def test_what_came_before_is_not_waited_for(guest_of):
    """Not armed, or written since: MWAIT does nothing."""
    guest = guest_of(f"""
        xor ecx, ecx
        mwait
        mov rax, {LINE}
        xor edx, edx
        monitor
        mov dword [{LINE}], 1
        mwait
        out 0x80, al
        hlt
    """)
    assert isinstance(guest.vcpu.run(), x.IoOut)


def test_faults(guest_of, backend):
    body = """
        mov rax, 0x50000
        xor edx, edx
        mov ecx, 1
        TRIED monitor
        xor ecx, ecx
        TRIED monitor
        mov ecx, 2
        TRIED mwait
        mov rax, 1 << 62
        xor ecx, ecx
        TRIED monitor
        push 0x23
        push 0x7000
        push 2
        push 0x1b
        mov rax, .user
        push rax
        iretq
    .user:
        TRIED monitor
        TRIED mwait
        mov qword [resume], 0
        hlt                 ; #GP: the end
    """
    guest = guest_of(body)
    guest.vm.memory.write(0x50000, bytes(8))
    threading.Timer(0.5, guest.vcpu.kick).start()
    guest.vcpu.run()
    assert guest.results() == [GP, NONE, GP, GP, UD, UD]
    without = WAIT + "xor ecx, ecx\n TRIED monitor\n TRIED mwait\n mov eax, 1\n cpuid\n and ecx, 8\n SAVE rcx\n DONE"
    assert lab.run(backend, without) == [UD, UD, 0]


def test_no_store_is_missed(guest_of):
    """Two processors wake each other, each through a line of the same page, with other stores to it in between."""
    rounds = 3000
    half = """
        mov ebx, 1
    %%next:
        mov rax, %1
        xor ecx, ecx
        xor edx, edx
        monitor
        cmp [%1], ebx
        je %%come
        mwait
        jmp %%next
    %%come:
        inc dword [0x50200]
        mov [%2], ebx
        inc ebx
        cmp ebx, %3
        jne %%next
    """
    guest = guest_of(f"""
    %macro HALF 3
        {half}
    %endmacro
        mov dword [0x50040], 1
        HALF 0x50040, 0x50080, {rounds}
        out 0x80, al
        hlt
    second:
        mov ebx, 1
    .next:
        mov rax, 0x50080
        xor ecx, ecx
        xor edx, edx
        monitor
        cmp [0x50080], ebx
        je .come
        mwait
        jmp .next
    .come:
        inc ebx
        mov [0x50040], ebx
        cmp ebx, {rounds}
        jne .next
        out 0x81, al
        hlt
    """)
    exits = []
    threads = [threading.Thread(target=lambda v=v: exits.append(v.run().port), daemon=True)
               for v in (guest.vcpu, guest.second)]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
    assert sorted(exits) == [0x80, 0x81]
