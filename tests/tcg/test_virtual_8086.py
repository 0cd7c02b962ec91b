# SPDX-License-Identifier: Apache-2.0
"""Virtual-8086 mode with and without CR4.VME, and ring 3 with CR4.PVI (SDM volume 3B, 20.3 and 20.4)."""

from __future__ import annotations

import struct

import lab
import pytest
from lab import GP, NONE

pytestmark = pytest.mark.parametrize("backend", ["tcg"], indirect=True)  # KVM with VMX leaves this to the processor
IF, IOPL3, VIF, VIP, VM = 1 << 9, 3 << 12, 1 << 19, 1 << 20, 1 << 17
AT = 0x30000  # where the 16-bit program is, and its stack

# Entry by IRETD. INT 0x21 is redirected to the program, INT 0x22 goes through the IDT.
GUEST = """
start:
    mov eax, cr4
    or eax, %(cr4)d
    mov cr4, eax
    mov word [TSS+102], 0x100
    mov dword [TSS+0xe0], 0
    mov dword [TSS+0xe4], 0xfffffffd    ; vectors 0x20 to 0x3f
    mov dword [0x21*4], 0x30000000 + handler - program
    mov esi, program
    mov edi, 0x30000
    mov ecx, program_end - program
    rep movsb
    push 0
    push 0
    push 0x1000
    push 0x4000
    push 0x3000
    push 0xff00
    push %(flags)d
    push 0x3000
    push 0
    iretd

bits 16
%%macro T 1+
    mov dword [20], %%%%after - program
    mov dword [28], -1
    %%1
%%%%after:
    mov eax, [28]
    stosd
%%endmacro
%%macro FLAGS_ 0
    pushf
    xor eax, eax
    pop ax
    and ax, 0x3200
    stosd
%%endmacro
program:
    xor di, di
    %(body)s
    mov dword [20], 0
    hlt
handler:
    mov bp, sp
    xor eax, eax
    mov ax, [bp+4]
    and ax, 0x3200
    stosd
    FLAGS_
    iret
program_end:
bits 32
"""


def outcomes(body: str, *, cr4: int, flags: int) -> list[int]:
    """What a program in virtual-8086 mode logs, until its HLT."""
    guest = lab.Lab("tcg", GUEST % {"cr4": cr4, "flags": flags | VM | 2, "body": body}, bits=32)
    try:
        guest.vcpu.run()
        assert guest.report().startswith("exception 13, code 0x0")
        count = (guest.vcpu.regs.rdi & 0xFFFF) // 4
        return list(struct.unpack(f"<{count}I", guest.vm.memory.read(0x40000, 4 * count)))
    finally:
        guest.close()


def test_vif_in_place_of_if(backend):
    body = """
    FLAGS_              ; IOPL reads as 3, IF is VIF: 0
    T sti
    FLAGS_
    T cli
    FLAGS_
    T pushfd
    T popfd
    T iretd
    push 0x202
    T popf
    FLAGS_
    push 0x102
    T popf              ; TF
    pop ax
    T int 0x21          ; logs twice
    FLAGS_
    T int 0x22
    """
    assert outcomes(body, cr4=1, flags=IF) == [
        *(IOPL3, NONE, IOPL3 | IF, NONE, IOPL3, GP, GP, GP, NONE, IOPL3 | IF, GP),
        *(IOPL3 | IF, IOPL3, NONE, IOPL3 | IF, GP),
    ]  # fmt: skip


def test_a_pending_interrupt(backend):
    """With VIP nothing may set VIF."""
    body = """
    T sti
    push 0x202
    T popf
    pop ax
    push 0x002
    T popf
    T cli
    push 0x0202
    push 0x3000
    push 0
    T iret
    add sp, 6
    """
    assert outcomes(body, cr4=1, flags=IF | VIP) == [GP, GP, NONE, NONE, GP]


def test_without_vme(backend):
    body = "T sti\n T cli\n T pushf\n T popf\n T int 0x21\n T int 0x22\n T iret"
    assert outcomes(body, cr4=0, flags=IF) == [GP] * 7


def test_iopl_3(backend):
    """The program has IF itself; INT 0x22 reaches the monitor's handler, and so does INT 0x21 without VME."""
    body = "FLAGS_\n T cli\n FLAGS_\n T sti\n T int 0x21\n FLAGS_\n T int 0x22"
    both = IOPL3 | IF
    assert outcomes(body, cr4=1, flags=both) == [both, NONE, IOPL3, NONE, both, IOPL3, NONE, both, 0x22]
    assert outcomes(body, cr4=0, flags=both) == [both, NONE, IOPL3, NONE, 0x21, both, 0x22]


PVI = """
%macro FLAGS_ 0
    pushfd
    pop eax
    and eax, 0x180200
    SAVE eax
%endmacro
start:
    mov eax, cr4
    or eax, {cr4}
    mov cr4, eax
    mov eax, 0x23
    mov ds, ax
    mov es, ax
    push 0x23
    push 0x7000
    push {flags}
    push 0x1b
    push .user
    iretd
.user:
    TRIED sti
    FLAGS_
    TRIED cli
    FLAGS_
    hlt
"""


@pytest.mark.parametrize(
    ("cr4", "flags", "wanted"),
    [
        (2, IF, [NONE, IF | VIF, NONE, IF]),
        (2, IF | VIP, [GP, IF | VIP, NONE, IF | VIP]),
        (0, IF, [GP, IF, GP, IF]),
    ],
)
def test_pvi(backend, cr4, flags, wanted):
    guest = lab.Lab(backend, PVI.format(cr4=cr4, flags=flags | 2), bits=32)
    guest.vcpu.run()
    assert guest.results() == wanted
    guest.close()
