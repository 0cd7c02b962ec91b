# SPDX-License-Identifier: Apache-2.0
"""PCID, INVPCID and five-level paging, from inside a guest (SDM volume 3A, 4.10 and 4.5)."""

from __future__ import annotations

import lab
import pytest
from lab import GP, NONE, PF

NEEDS = ("pcid", "invpcid")
# Two address spaces, A at 0x9000 and B at 0x52000, that differ in the page at PLACE: 0x60000 and 0x61000.
SPACES = """
%define PLACE 0x140000000
%define A_ 0x9000
%define B_ 0x52000
%define KEEP (1 << 63)
%macro CR3 1
    mov rax, %1
    mov cr3, rax
%endmacro
%macro READ 0
    mov rbx, PLACE
    SAVE [rbx]
%endmacro
%macro INVPCID_ 3       ; type, PCID, address
    mov rax, %2
    mov [0x70000], rax
    mov rax, %3
    mov [0x70008], rax
    mov eax, %1
    invpcid rax, [0x70000]
%endmacro
%macro MAP_A 1
    mov dword [0x51000], %1 + 3
%endmacro
start:
    mov eax, 7
    xor ecx, ecx
    cpuid
    bt ebx, 10
    setc al
    movzx eax, al
    SAVE rax
    mov qword [0x60000], 0xa
    mov qword [0x61000], 0xb
    mov qword [0x62000], 0xc
    mov qword [0xa028], 0x50003
    mov qword [0x50000], 0x51003
    MAP_A 0x60000
    mov qword [0x52000], 0x53003
    mov rsi, 0xa000
    mov edi, 0x53000
    mov ecx, 4
    rep movsq
    mov qword [0x53028], 0x54003
    mov qword [0x54000], 0x55003
    mov qword [0x55000], 0x61003
"""
ENABLE = """
    mov rax, cr4
    bts eax, 17
    mov cr4, rax
"""


# Four pages from PLACE on: 0x60000 and 0x61000, then 0x60000 once more and 0x62000.
TWO_PLACES = """
    start:
    mov qword [0xa000 + (PLACE >> 30) * 8], 0x50003
    mov qword [0x50000], 0x51003
    mov qword [0x51000], 0x60003
    mov qword [0x51008], 0x61003
    mov qword [0x51010], 0x60003
    mov qword [0x51018], 0x62003
"""


@pytest.mark.parametrize("place", [0x40000000, 0x140000000], ids=["below 2 GiB", "above"])
def test_code_page_mapped_twice(backend, place):
    """One page of code at two places, before different pages: a jump to the next page leads to that of its place."""
    body = f"""
    %define PLACE {place:#x}
    {TWO_PLACES}
    mov rsi, page
    mov edi, 0x60000
    mov ecx, page_end - page
    rep movsb
    mov rsi, one
    mov edi, 0x61000
    mov ecx, 6
    rep movsb
    mov rsi, two
    mov edi, 0x62000
    mov ecx, 6
    rep movsb
    xor ebx, ebx
    xor ebp, ebp
    mov r12d, 200
    mov r13, PLACE
    again:
    call r13
    add rbx, rax
    sub rdx, r13
    add rbp, rdx
    add r13, 0x2000
    call r13
    sub r13, 0x2000
    add rbx, rax
    sub rdx, r13
    add rbp, rdx
    dec r12d
    jnz again
    SAVE rbx
    SAVE rbp
    DONE
    page:
    lea rdx, [rel page]
    db 0xe9                 ; jmp to the next page
    dd 0x1000 - (page_end - page)
    page_end:
    one:
    mov eax, 1
    ret
    two:
    mov eax, 2
    ret
    """
    assert lab.run(backend, body) == [200 * 3, 200 * 0x2000]


@pytest.mark.parametrize("place", [0x40000000, 0x140000000], ids=["below 2 GiB", "above"])
def test_instruction_in_two_pages(backend, place):
    """The second page differs from place to place, and later changes: so does the immediate operand."""
    body = f"""
    %define PLACE {place:#x}
    {TWO_PLACES}
    mov dword [0x60ffc], 0x0001b890     ; nop; mov eax, ..01
    mov dword [0x61000], 0x00c30000     ; 00 00; ret
    mov dword [0x62000], 0x00c30001     ; 01 00; ret
    xor ebx, ebx
    mov r12d, 100
    mov r13, PLACE + 0xffc
    again:
    call r13
    add rbx, rax
    add r13, 0x2000
    call r13
    sub r13, 0x2000
    add rbx, rax
    cmp r12d, 50
    jne unchanged
    mov qword [0x51008], 0x62003
    lea rax, [r13 + 4]
    invlpg [rax]
    unchanged:
    dec r12d
    jnz again
    SAVE rbx
    DONE
    """
    assert lab.run(backend, body) == [51 * 1 + 149 * 0x10001]


def test_pcid_keeps_and_drops(backend):
    body = """
    CR3 A_+1
    READ            ; a
    CR3 B_+2
    READ            ; b
    CR3 KEEP+A_+1
    MAP_A 0x62000
    mov rbx, PLACE
    invlpg [rbx]
    READ            ; c
    CR3 KEEP+B_+2
    READ            ; b
    MAP_A 0x60000
    CR3 A_+1        ; without bit 63: A's entries go
    READ            ; a
    %assign type 0
    %rep 4          ; each kind of INVPCID for A, from B
        MAP_A 0x60000
        CR3 A_+1
        READ        ; a
        CR3 KEEP+B_+2
        MAP_A 0x62000
        INVPCID_ type, 1, PLACE
        CR3 KEEP+A_+1
        READ        ; c
      %assign type type+1
    %endrep
    %assign type 0
    %rep 4          ; and for the present one
        MAP_A 0x60000
        CR3 A_+1
        READ        ; a
        MAP_A 0x62000
        INVPCID_ type, 1, PLACE
        READ        ; c
      %assign type type+1
    %endrep
    CR3 A_+1
    SAVE cr3
    DONE
    """
    results = lab.run(backend, SPACES + ENABLE + body, needs=NEEDS)
    assert results[0] == 1
    assert results[1:] == [0xA, 0xB, 0xC, 0xB, 0xA] + [0xA, 0xC] * 8 + [0x9001]


@pytest.mark.parametrize("backend", ["tcg"], indirect=True)
def test_pcid_is_worth_it(backend):
    """What may be kept is kept: a stale entry is seen until somebody drops it."""
    body = """
    CR3 A_+1
    READ            ; a
    MAP_A 0x62000
    CR3 B_+2
    READ            ; b
    CR3 KEEP+A_+1
    READ            ; still a
    CR3 KEEP+B_+2
    CR3 A_+1
    READ            ; c
    DONE
    """
    assert lab.run(backend, SPACES + ENABLE + body, needs=NEEDS)[1:] == [0xA, 0xB, 0xA, 0xC]


def test_many_pcids(backend):
    """More address spaces than the engine keeps: each still sees its own page."""
    body = """
    mov ecx, 1
.make:              ; PCID n: page tables at 0x100000 + n * 0x4000, page 0x200000 + n * 0x1000 with n in it
    mov ebx, ecx
    shl ebx, 14
    add ebx, 0x100000
    lea eax, [ebx+0x1003]
    mov [rbx], rax
    mov rsi, 0xa000
    lea edi, [ebx+0x1000]
    mov edx, ecx
    mov ecx, 4
    rep movsq
    mov ecx, edx
    lea eax, [ebx+0x2003]
    mov [rbx+0x1028], rax
    lea eax, [ebx+0x3003]
    mov [rbx+0x2000], rax
    mov eax, ecx
    shl eax, 12
    add eax, 0x200003
    mov [rbx+0x3000], rax
    mov [rax-3], rcx
    inc ecx
    cmp ecx, 21
    jne .make
    mov r8d, 3
.round:
    mov ecx, 1
.next:
    mov eax, ecx
    shl eax, 14
    add eax, 0x100000
    or eax, ecx
    bts rax, 63
    mov cr3, rax
    READ
    inc ecx
    cmp ecx, 21
    jne .next
    dec r8d
    jnz .round
    DONE
    """
    assert lab.run(backend, SPACES + ENABLE + body, needs=NEEDS)[1:] == list(range(1, 21)) * 3


def test_faults_of_pcid(backend):
    body = """
    mov rbx, cr4
    mov rcx, cr4
    bts ecx, 17
    mov rax, KEEP+A_
    TRIED mov cr3, rax      ; bit 63 is reserved without PCIDE
    TRIED INVPCID_ 0, 1, 0  ; so are PCIDs
    TRIED INVPCID_ 1, 1, 0
    TRIED INVPCID_ 0, 0, 0
    TRIED INVPCID_ 2, 1, 0
    TRIED INVPCID_ 4, 0, 0
    TRIED INVPCID_ 0, 0, 1 << 62
    TRIED INVPCID_ 1, 0, 1 << 62
    TRIED INVPCID_ 2, 0x1000, 0
    TRIED INVPCID_ 3, 1 << 63, 0
    mov rax, A_+8
    mov cr3, rax
    TRIED mov cr4, rcx      ; PCIDE while CR3 has low bits
    CR3 A_
    TRIED mov cr4, rcx
    mov rax, A_ + (1 << 62)
    TRIED mov cr3, rax
    mov rax, cr0
    btr eax, 31
    TRIED mov cr0, rax      ; no way out of paging
    CR3 A_+5
    TRIED mov cr4, rbx      ; PCIDE may go at any time
    DONE
    """
    assert lab.run(backend, SPACES + body, needs=NEEDS)[1:] == (
        [GP, GP, GP, NONE, NONE, GP, GP, NONE, GP, GP, GP, NONE, GP, GP, NONE]
    )


LINEAR = """
start:
    mov eax, 7
    xor ecx, ecx
    cpuid
    shr ecx, 16
    and ecx, 1
    SAVE rcx
    mov eax, 0x80000008
    cpuid
    movzx eax, ah
    SAVE rax
    mov rax, cr4
    xor eax, 1 << 12
    TRIED mov cr4, rax      ; not in 64-bit mode
    mov qword [0x60000], 0x1234
    %macro AT 1
        mov rbx, %1
        TRIED mov rax, [rbx]
    %endmacro
    AT 0x60000
    AT (1 << 52) + 0x60000
    SAVE rax
    AT 1 << 56
    AT 0xff << 56
    AT 0xffff8 << 44
    mov ecx, 0xc0000100     ; FS_BASE
    mov eax, 0x60000
    mov edx, 1 << 20
    TRIED wrmsr
    TRIED mov rax, [fs:0]
    DONE
"""


def test_five_levels():
    with Wide(True) as guest:
        bit, width, *results = guest.run()
        assert (bit, width) == (1, 57)
        assert results == [GP, NONE, NONE, 0x1234, GP, PF, PF, NONE, NONE]
        assert guest.vcpu.translate((1 << 52) + 0x60123).physical_address == 0x60123


def test_four_levels_of_five():
    """MSRs take what the processor can do, accesses what CR4.LA57 says."""
    with Wide(False) as guest:
        bit, width, *results = guest.run()
        assert (bit, width) == (1, 57)
        assert results[:3] == [GP, NONE, GP]
        assert results[4:] == [GP, GP, PF, NONE, GP]


def test_host_has_four_levels_unless_asked(backend):
    bit, width, *results = lab.run(backend, LINEAR)
    assert (bit, width) == (0, 48)
    assert results[:3] == [GP, NONE, GP]
    assert results[4:7] == [GP, GP, PF]
    # The kernel's KVM may let WRMSR have the width of the processor below it, whatever CPUID tells the guest.
    assert results[7:] == [GP, NONE] or (backend == "kvm" and results[7:] == [NONE, GP])


class Wide(lab.Lab):
    """A guest on a processor with LA57, in five or four levels."""

    def __init__(self, five: bool) -> None:
        super().__init__("tcg", LINEAR, cpu="host,+la57")
        if five:
            self.vm.memory.write(0x20000, (lab.TABLES | 7).to_bytes(8, "little"))
            self.vm.memory.write(0x20000 + 16 * 8, (lab.TABLES | 7).to_bytes(8, "little"))
            sregs = self.vcpu.sregs
            sregs.cr3, sregs.cr4 = 0x20000, sregs.cr4 | 1 << 12
            self.vcpu.sregs = sregs

    def __enter__(self) -> Wide:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
