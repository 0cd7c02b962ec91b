# SPDX-License-Identifier: Apache-2.0
"""Loaded images start on every engine, in the mode and with the registers that their format promises."""

from __future__ import annotations

import struct

import pytest
from boot_images import MIB, bzimage, elf, multiboot_kludge, pvh_note

import kvmpy
from kvmpy.arch import layout
from kvmpy.boot import load

PORT = 0x80


def code(register: int) -> bytes:
    """Says 2 in 64-bit mode and 1 in 32-bit mode, then a register by its number in an opcode, then halts."""
    #      mov eax,1   inc rax / dec eax; inc eax   out 80h,eax   mov eax,<register>   out 80h,eax   hlt
    return (
        bytes.fromhex("b801000000 48ffc0 e780")
        + bytes([0x89, 0xC0 | register << 3])
        + bytes.fromhex("e780 f4")
    )


EBX, ESI = 3, 6


def says(vm: kvmpy.Vm, image: bytes, **arguments: object) -> tuple[list[int], kvmpy.boot.Entry]:
    """What a guest writes to the port until it halts."""
    vm.add_ram(0, size=32 * MIB)
    entry = load(image, vm.memory, **arguments)
    vcpu = vm.create_vcpu()
    vcpu.enter(entry)
    values = []
    for _ in range(10):
        match vcpu.run():
            case kvmpy.IoOut(port=port) as exit if port == PORT:
                values.append(exit.value)
            case kvmpy.Hlt():
                return values, entry
            case other:
                pytest.fail(f"unexpected {other}")
    return pytest.fail("the guest does not halt")


def test_flat_real_mode(vm) -> None:
    #             mov ax,cs  out 80h,ax  mov ax,ds  out 80h,ax  hlt
    program = bytes.fromhex("8cc8 e780 8cd8 e780 f4")
    values, _ = says(vm, program, load_address=0x2_0000)
    assert values == [0x2000, 0x2000]


@pytest.mark.parametrize(("mode", "bits"), [("protected", 1), ("long", 2)])
def test_flat_protected_and_long_mode(vm, mode: str, bits: int) -> None:
    values, _ = says(vm, code(EBX), load_address=0x10_0000, mode=mode)
    assert values == [bits, 0]


@pytest.mark.parametrize(("width", "bits"), [(32, 1), (64, 2)])
def test_elf(vm, width: int, bits: int) -> None:
    values, _ = says(vm, elf([(0x40_0000, 0x10_0000, code(EBX), 64)], bits=width, entry=0x40_0000))
    assert values == [bits, 0]


def test_segments_can_be_loaded_again_from_the_gdt(vm) -> None:
    #                 mov eax,10h  mov ds,eax  mov es,eax  mov ss,eax
    reload = bytes.fromhex("b810000000 8ed8 8ec0 8ed0")
    values, _ = says(vm, reload + code(EBX), load_address=0x10_0000, mode="long")
    assert values == [2, 0]


def test_pvh(vm) -> None:
    values, _ = says(vm, elf([(0, 0x10_0000, code(EBX), 64)], note=pvh_note(0x10_0000)), cmdline="x")
    assert values[0] == 1
    assert vm.memory.u32(values[1]) == 0x336E_C578


def test_multiboot(vm) -> None:
    #                                                     out 80h,eax
    values, _ = says(vm, multiboot_kludge(0x10_0000, b"\xe7\x80" + code(EBX)), modules=[b"module"])
    assert values[:2] == [0x2BAD_B002, 1]
    assert struct.unpack("<I", vm.memory.read(values[2] + 20, 4)) == (1,)


@pytest.mark.parametrize(("xloadflags", "offset", "bits"), [(3, 0x200, 2), (0, 0, 1)])
def test_bzimage(vm, xloadflags: int, offset: int, bits: int) -> None:
    values, _ = says(vm, bzimage(bytes(offset) + code(ESI), xloadflags=xloadflags), cmdline="quiet")
    assert values == [bits, layout.ZERO_PAGE]
    assert vm.memory.read(values[1] + 0x202, 4) == b"HdrS"


def test_firmware(vm) -> None:
    #                      jmp far F000:FF00 at the reset vector; there: mov ax,cs  out 80h,ax  hlt
    rom = bytearray(b"\xf4" * 0x1_0000)
    rom[0xFFF0:0xFFF5] = bytes.fromhex("ea00ff00f0")
    rom[0xFF00:0xFF05] = bytes.fromhex("8cc8 e780 f4")
    values, _ = says(vm, bytes(rom), format="firmware")
    assert values == [0xF000]
