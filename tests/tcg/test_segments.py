# SPDX-License-Identifier: Apache-2.0
"""Segment limits and types in protected mode (SDM volume 3A, 5.3 to 5.5): the whole access counts, and what it does."""

from __future__ import annotations

import lab
import pytest
from lab import GP, NONE, SS

# The test's descriptors, from 0x40 on: base 0x30000 unless it is a code segment.
SMALL, READ_ONLY, EXECUTE_ONLY, DOWN_32, DOWN_16 = 0x40, 0x48, 0x50, 0x58, 0x60
PRELUDE = """
%macro DESCRIPTOR 4     ; selector, base, limit, access rights (bits 40 to 55)
    mov dword [GDT+%1], (%2 & 0xffff) << 16 | %3 & 0xffff
    mov dword [GDT+%1+4], %2 >> 16 & 0xff | %4 << 8 | %3 & 0xf0000 | %2 & 0xff000000
%endmacro
start:
    mov eax, cr4
    or eax, 0x600
    mov cr4, eax
    DESCRIPTOR 0x40, 0x30000, 0xfff, 0x4093
    DESCRIPTOR 0x48, 0x30000, 0xffff, 0x4091
    DESCRIPTOR 0x50, 0, 0xfffff, 0xc099
    DESCRIPTOR 0x58, 0x30000, 0xfff, 0x4097
    DESCRIPTOR 0x60, 0x30000, 0xfff, 0x0097
    %macro ES_ 1
        mov eax, %1
        mov es, ax
        xor eax, eax
    %endmacro
"""


def outcomes(backend: str, selector: int, *instructions: str) -> dict[str, int]:
    """What each instruction gave with this selector in ES."""
    body = f"ES_ {selector:#x}\n" + "\n".join(f"mov ecx, 0\nTRIED {text}" for text in instructions) + "\nDONE"
    return dict(zip(instructions, lab.run(backend, PRELUDE + body, bits=32), strict=True))


ENDS = {
    "mov al, [es:0xfff]": NONE,
    "mov al, [es:0x1000]": GP,
    "mov ax, [es:0xffe]": NONE,
    "mov ax, [es:0xfff]": GP,
    "mov eax, [es:0xffc]": NONE,
    "mov eax, [es:0xffd]": GP,
    "mov [es:0xffd], eax": GP,
    "mov [es:0xffc], eax": NONE,
    "add [es:0xffe], eax": GP,
    "add [es:0xffc], eax": NONE,
    "lock inc dword [es:0xffd]": GP,
    "lock inc dword [es:0xffc]": NONE,
    "bts dword [es:0xffc], 3": NONE,
    "bts dword [es:0xffd], 3": GP,
    "cmpxchg8b [es:0xff8]": NONE,
    "cmpxchg8b [es:0xff9]": GP,
    "movdqu xmm0, [es:0xff0]": NONE,
    "movdqu xmm0, [es:0xff1]": GP,
    "movdqu [es:0xff1], xmm0": GP,
    "fld tword [es:0xff6]": NONE,
    "fld tword [es:0xff7]": GP,
    "fstp tword [es:0xff7]": GP,
    "fxsave [es:0xe00]": NONE,
    "fxsave [es:0xe10]": GP,
    "lgs eax, [es:0xffb]": GP,
    "mov eax, [es:0xffffffff]": GP,
    "lea eax, [es:0x2000]": NONE,
}


@pytest.mark.parametrize("backend", ["tcg"], indirect=True)  # emulating KVMs look at the first byte only
def test_the_whole_access_lies_within_the_limit(backend):
    assert outcomes(backend, SMALL, *ENDS) == ENDS


WRITES = {
    "mov eax, [es:0]": NONE,
    "mov [es:0], eax": GP,
    "mov byte [es:0], 1": GP,
    "inc dword [es:0]": GP,
    "lock inc dword [es:0]": GP,
    "xchg [es:0], eax": GP,
    "cmpxchg [es:4], ecx": GP,
    "bt dword [es:0], 1": NONE,
    "bts dword [es:0], 1": GP,
    "cmp dword [es:0], 1": NONE,
    "stosb": GP,
    "scasb": NONE,
    "movdqu [es:0], xmm0": GP,
    "fnstcw [es:0]": GP,
    "sgdt [es:0]": GP,
    "pop dword [es:0]": GP,
    "push dword [es:0]": NONE,
}


@pytest.mark.parametrize("backend", ["tcg"], indirect=True)
def test_read_only_segments_are_not_written(backend):
    assert outcomes(backend, READ_ONLY, *WRITES) == WRITES


def test_code_segments(backend):
    body = """
    TRIED mov eax, [cs:0x1000]
    TRIED mov [cs:0x1000], eax
    jmp 0x50:.there
.there:
    TRIED mov eax, [cs:0x1000]  ; execute-only
    TRIED mov [cs:0x1000], eax
    TRIED mov eax, [0x1000]
    jmp 8:.back
.back:
    mov eax, 8
    mov es, ax
    TRIED mov eax, [es:0x1000]
    TRIED mov [es:0x1000], eax
    mov eax, 0x50
    TRIED mov es, ax            ; not readable
    xor eax, eax
    mov es, ax
    TRIED mov eax, [es:0x1000]  ; null
    DONE
    """
    assert lab.run(backend, PRELUDE + body, bits=32) == [NONE, GP, GP, GP, NONE, NONE, GP, GP | 0x50 << 8, GP]


DOWN = {
    "mov al, [es:0xfff]": GP,
    "mov al, [es:0x1000]": NONE,
    "mov eax, [es:0x1000]": NONE,
    "mov eax, [es:0xffe]": GP,
    "mov [es:0xfff], al": GP,
    "mov [es:0xffff], al": NONE,
    "mov [es:0x1000], eax": NONE,
}


@pytest.mark.parametrize("backend", ["tcg"], indirect=True)
def test_expand_down(backend):
    wide = {**DOWN, "mov al, [es:0x10000]": NONE, "mov ax, [es:0xffff]": NONE, "mov al, [es:0x100000]": NONE}
    assert outcomes(backend, DOWN_32, *wide) == wide
    narrow = {**DOWN, "mov al, [es:0x10000]": GP, "mov ax, [es:0xffff]": GP, "mov [es:0xfffe], eax": GP}
    assert outcomes(backend, DOWN_16, *narrow) == narrow


@pytest.mark.parametrize("backend", ["tcg"], indirect=True)
def test_string_stops_at_the_limit(backend):
    """What lies within the limit is written, registers say how far it got; the stack segment raises #SS."""
    body = """
    ES_ 0x40
    mov edi, 0xff0
    mov ecx, 0x100
    mov al, 0x5a
    TRIED rep stosb
    SAVE edi
    SAVE ecx
    SAVE [0x30ffc]
    SAVE [0x31000]
    mov esi, 0x2000
    mov edi, 0xfe1
    mov ecx, 0x10
    TRIED rep movsd
    SAVE edi
    SAVE ecx
    mov ebx, esp
    mov eax, 0x40
    mov ss, ax
    mov esp, 0x800
    mov eax, [0x1000]
    TRY mov eax, [ebp*0+esp+0x7fd]
    mov ecx, 0x10
    mov ss, cx
    mov esp, ebx
    SAVE [last]
    DONE
    """
    assert lab.run(backend, PRELUDE + body, bits=32) == [
        *(GP, 0x1000, 0xF0, 0x5A5A5A5A, 0),
        *(GP, 0xFFD, 9),
        SS,
    ]  # fmt: skip


@pytest.mark.parametrize("backend", ["tcg"], indirect=True)
@pytest.mark.parametrize("insn", ["maskmovdqu xmm0, xmm1", "maskmovq mm0, mm1", "vmaskmovdqu xmm0, xmm1"])
def test_masked_store_uses_prefixes(backend, insn):
    """The implied DS:rDI follows address size and segment overrides."""
    wide = f"""
    start:
        mov eax, 7
        mov rcx, cr4
        or ecx, 0x40600
        mov cr4, rcx
        xor ecx, ecx
        xor edx, edx
        xsetbv
        mov rax, 0x8877665544332211
        movq xmm0, rax
        movq mm0, rax
        mov rax, 0x80ff0000008000ff
        movq xmm1, rax
        movq mm1, rax
        mov ecx, 0xc0000100
        mov eax, 0x100
        xor edx, edx
        wrmsr
        mov edi, 0x50000
        {insn}
        SAVE [0x50000]
        fs {insn}
        SAVE [0x50100]
        mov rdi, 0x7700000050200
        a32 {insn}
        SAVE [0x50200]
        fs a32 {insn}
        SAVE [0x50300]
        TRIED {insn}
        DONE
    """
    assert lab.run(backend, wide) == [0x8877000000330011] * 4 + [GP]
    if insn.startswith("v"):
        return
    narrow = f"""
    {PRELUDE}
        mov dword [0x50000], 0x44332211
        movd xmm0, [0x50000]
        movd mm0, [0x50000]
        mov dword [0x50004], 0x808000ff
        movd xmm1, [0x50004]
        movd mm1, [0x50004]
        ES_ 0x40
        mov edi, 0x50010
        {insn}
        SAVE [0x50010]
        mov edi, 0xa0400
        a16 {insn}
        SAVE [0x400]
        mov edi, 0xffc
        TRIED es {insn}
        SAVE [0x30ffc]
        mov edi, 0xffd
        TRIED es {insn}
        DONE
    """
    assert lab.run(backend, narrow, bits=32) == [0x44330011, 0x44330011, NONE, 0x44330011, GP]
