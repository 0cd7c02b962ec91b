# SPDX-License-Identifier: Apache-2.0
"""Protection keys for user pages, from inside a guest (SDM volume 3A, 4.6.2)."""

from __future__ import annotations

import lab
from lab import NONE, PF

# PLACE is a user page with key 1, in address space A at 0x9000 (PCID 1) and B at 0x52000 (PCID 2).
KEYS = """
%define PLACE 0x140000000
%define A_ 0x9001
%define B_ 0x52002
%define KEEP (1 << 63)
%define AD1 (1 << 2)
%define WD1 (1 << 3)
%macro CR3 1
    mov rax, %1
    mov cr3, rax
%endmacro
%macro PKRU 1
    mov eax, %1
    xor ecx, ecx
    xor edx, edx
    wrpkru
%endmacro
%macro BOTH 0
    mov rbx, PLACE
    TRIED mov rdx, [rbx]
    TRIED mov [rbx], rdx
%endmacro
start:
    or dword [0x9000], 4
    mov qword [0xa028], 0x50007
    mov qword [0x50000], 0x51007
    mov dword [0x51000], 0x60007
    mov dword [0x51004], 1 << (59 - 32)
    mov rsi, 0x9000
    mov edi, 0x52000
    mov ecx, 512
    rep movsq
    mov rax, cr0
    or eax, 1 << 16             ; WP: WD counts in ring 0, too
    mov cr0, rax
    mov rax, cr4
    or eax, 1 << 22 | 1 << 18   ; PKE, OSXSAVE
    mov cr4, rax
"""
FREE = [NONE, NONE]
READ_ONLY = [NONE, PF | 0x23 << 8]
CLOSED = [PF | 0x21 << 8, PF | 0x23 << 8]


def test_rights_change_with_pkru(backend):
    body = """
    PKRU 0
    BOTH
    PKRU AD1
    BOTH
    PKRU WD1
    BOTH
    PKRU 0
    BOTH
    PKRU ~0xf                   ; every key but 0 and 1
    mov rbx, PLACE
    TRIED mov rdx, [rbx]
    xor ecx, ecx
    rdpkru
    SAVE rax
    DONE
    """
    results = lab.run(backend, KEYS + body, needs=("pku",))
    assert results == [*FREE, *CLOSED, *READ_ONLY, *FREE, NONE, 0xFFFFFFF0]


def test_rights_come_with_xrstor(backend):
    body = """
    mov eax, 0x201
    xor ecx, ecx
    xor edx, edx
    xsetbv
    mov eax, 13
    mov ecx, 9
    cpuid
    mov esi, ebx
    PKRU 0
    BOTH
    mov dword [0x70000 + 24], 0x1f80
    mov qword [0x70000 + 512], 0x200
    mov dword [0x70000 + rsi], AD1
    mov eax, 0x200
    xor edx, edx
    xrstor64 [0x70000]
    BOTH
    mov eax, 1                  ; PKRU is not asked for
    xor edx, edx
    mov dword [0x70000 + rsi], 0
    xrstor64 [0x70000]
    BOTH
    mov qword [0x70000 + 512], 0
    mov eax, 0x200
    xrstor64 [0x70000]          ; not in the area: as after reset
    BOTH
    DONE
    """
    assert lab.run(backend, KEYS + body, needs=("pku", "xsave")) == [*FREE, *CLOSED, *CLOSED, *FREE]


def test_rights_of_an_address_space_that_comes_back(backend):
    body = """
    mov rax, cr4
    bts eax, 17
    mov cr4, rax
    PKRU 0
    CR3 A_
    BOTH
    CR3 B_
    PKRU AD1
    CR3 KEEP + A_
    BOTH
    PKRU WD1
    CR3 KEEP + B_
    BOTH
    DONE
    """
    assert lab.run(backend, KEYS + body, needs=("pku", "pcid")) == [*FREE, *CLOSED, *READ_ONLY]
