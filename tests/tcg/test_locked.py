# SPDX-License-Identifier: Apache-2.0
"""Locked accesses at each address of a cache line, across two lines and across two pages: always the same result.

Across two lines the software CPU goes another way where a vCPU is alone, so that the host needs no bus lock.
"""

from __future__ import annotations

import lab
import pytest

OLD, ADD = 0x1122334455667788, 0x0102030405060708
MASK = (1 << 64) - 1
# instruction -> what [rbx] and RAX hold then; before, RAX is OLD, RCX is ADD
CASES = {
    "lock add [rbx], rcx": (OLD + ADD, OLD),
    "lock sub dword [rbx], ecx": ((OLD & ~0xFFFFFFFF) + (OLD - ADD & 0xFFFFFFFF), OLD),
    "lock not word [rbx]": (OLD ^ 0xFFFF, OLD),
    "lock bts qword [rbx], 7": (OLD | 0x80, OLD),
    "lock xadd [rbx], rax": (2 * OLD, OLD),
    "xchg [rbx], rax": (OLD, OLD),
    "xchg [rbx], cx": (OLD & ~0xFFFF | ADD & 0xFFFF, OLD),
    "lock cmpxchg [rbx], rcx": (ADD, OLD),
    "mov eax, 1\n lock cmpxchg dword [rbx], ecx": (OLD, OLD & 0xFFFFFFFF),
}
# The program runs thrice at each address, so that host code is made and runs; it ends with what it found last.
LOOP = """
start:
    mov r12, 3
again:
    mov rbx, 0x50000
next:
    mov rax, {old}
    mov rcx, {add}
    mov [rbx], rax
    mov qword [rbx + 8], 0
    {instruction}
    mov r8, [rbx]
    mov r9, [rbx + 8]
    cmp r12, 1
    jne no_result
    SAVE r8
    SAVE r9
    SAVE rax
no_result:
    inc rbx
    cmp rbx, 0x50000 + 80
    jne not_yet
    mov rbx, 0x51000 - 16
not_yet:
    cmp rbx, 0x51000 + 8
    jne next
    dec r12
    jnz again
    DONE
"""


@pytest.mark.parametrize("instruction", CASES)
def test_the_same_at_each_address(backend, instruction):
    if backend == "kvm":
        pytest.skip("the host's own bus locks may take seconds")
    got = lab.run(backend, LOOP.format(old=OLD, add=ADD, instruction=instruction))
    memory, rax = CASES[instruction]
    assert len(got) == 3 * (80 + 24)
    assert {tuple(got[i : i + 3]) for i in range(0, len(got), 3)} == {(memory & MASK, 0, rax)}
