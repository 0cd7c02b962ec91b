# SPDX-License-Identifier: Apache-2.0
"""Corners of #DB: MOV SS, INT1, branch tracing, I/O breakpoints, general detect (SDM volume 3B, chapter 17)."""

from __future__ import annotations

import lab
import pytest
from lab import DB, NONE

from kvmpy import _exits as x

START = """
%macro DR7_ 1
    mov eax, %1
    mov dr7, rax
%endmacro
%macro DR6_ 0           ; saves and clears it
    mov rax, dr6
    SAVE rax
    xor eax, eax
    mov dr6, rax
%endmacro
start:
    mov rax, cr4
    or eax, 8           ; DE
    mov cr4, rax
    xor eax, eax
    mov dr6, rax
"""


@pytest.mark.parametrize("backend", ["tcg"], indirect=True)
def test_mov_ss(backend):
    """No code breakpoint right after MOV SS; a data breakpoint of MOV SS comes after the next instruction, once."""
    body = """
    mov ecx, 0x10
    mov rax, .one
    mov dr0, rax
    DR7_ 0x402
    mov qword [resume], .two
    xor edx, edx
    mov ss, cx
.one:
    inc edx
.two:
    mov qword [resume], 0
    SAVE rdx
    DR6_
    mov rax, .three
    mov dr0, rax
    mov qword [resume], .four
    xor edx, edx
    nop
.three:
    inc edx
.four:
    SAVE rdx
    DR6_
    mov word [0x50000], 0x10
    mov eax, 0x50000
    mov dr1, rax
    DR7_ 0x00700408     ; two bytes, read or write
    mov qword [resume], .behind
    mov ss, [0x50000]
    mov edx, 1
.behind:
    SAVE rdx
    SAVE [frame+8]
    mov rax, .behind
    SAVE rax
    DR6_
    mov qword [resume], .int1
    mov ss, [0x50000]
    db 0xf1
.int1:
    SAVE [frame+8]
    mov rax, .int1
    SAVE rax
    DR6_
    mov qword [resume], 0
    DONE
    """
    results = lab.run(backend, START + body)
    assert results[:2] == [1, 0xFFFF0FF0]
    assert results[2:4] == [0, 0xFFFF0FF1]
    assert results[4] == 1
    assert results[5] == results[6]
    assert results[7] == 0xFFFF0FF2
    assert results[8] == results[9]
    assert results[10] == 0xFFFF0FF2


@pytest.mark.parametrize("backend", ["tcg"], indirect=True)
def test_branch_trace(backend):
    """With IA32_DEBUGCTL.BTF, TF traps at the next taken branch only, and that clears BTF."""
    body = """
    mov ecx, 0x1d9
    mov eax, 2
    xor edx, edx
    wrmsr
    mov qword [resume], .caught
    mov ebx, 0
    mov edi, 0x50000
    pushfq
    or qword [rsp], 0x100
    popfq
    inc ebx
    cmp ebx, 5
    je .there           ; not taken
    mov ecx, 3
    rep stosb           ; comes back to itself, and is no branch
    inc ebx
    jmp .there
    add ebx, 100
.there:
    add ebx, 1000
.caught:
    mov qword [resume], 0
    SAVE rbx
    SAVE [frame+8]
    mov rax, .there
    SAVE rax
    mov ecx, 0x1d9
    rdmsr
    SAVE rax
    DR6_
    DONE
    """
    count, at, target, debugctl, dr6 = lab.run(backend, START + body)
    assert (count, at, debugctl, dr6) == (2, target, 0, 0xFFFF4FF0)


def test_general_detect(backend):
    body = """
    DR7_ 0x2400
    TRIED mov rbx, dr0
    DR6_
    mov rax, dr7
    SAVE rax
    TRIED mov rbx, dr0
    DONE
    """
    assert lab.run(backend, START + body) == [DB, 0xFFFF2FF0, 0x400, NONE]


@pytest.mark.parametrize("backend", ["tcg"], indirect=True)
def test_port_breakpoint(backend):
    body = """
    mov eax, 0x80
    mov dr0, rax
    DR7_ 0x00020402     ; one byte, ports
    TRIED out 0x7f, al
    TRIED out 0x80, al
    DR6_
    TRIED out 0x7f, ax
    DR6_
    TRIED in al, 0x81
    DONE
    """
    guest = lab.Lab(backend, START + body)
    while not isinstance(exit := guest.vcpu.run(), x.Hlt):
        if isinstance(exit, x.IoIn):
            exit.answer(0)
        else:
            assert isinstance(exit, x.IoOut)
    assert guest.results() == [NONE, DB, 0xFFFF0FF1, DB, 0xFFFF0FF1, NONE]
    guest.close()
