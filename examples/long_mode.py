#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A 64-bit guest: page tables made for it, arguments and result in registers and memory."""

import struct

from kvmpy import Hlt, Vm

# Sum the 64-bit numbers at RSI, RCX of them, into RAX.
#     xor eax,eax  L: add rax,[rsi]  add rsi,8  dec rcx  jnz L  mov [rdi],rax  hlt
CODE = bytes.fromhex("31c0 480306 4883c608 48ffc9 75f4 488907 f4")
PROGRAM, NUMBERS, RESULT = 0x10_0000, 0x10_1000, 0x10_2000

with Vm() as vm:
    vm.add_ram(0, size=2 << 20)
    vm.memory.write(PROGRAM, CODE)
    vm.memory.write(NUMBERS, struct.pack("<100Q", *range(1, 101)))

    vcpu = vm.create_vcpu()
    vcpu.enter_long_mode(PROGRAM, sp=0x20_0000)
    regs = vcpu.regs
    regs.rsi, regs.rcx, regs.rdi = NUMBERS, 100, RESULT
    vcpu.regs = regs

    match vcpu.run():
        case Hlt():
            print("1 + 2 + ... + 100 =", vm.memory.u64(RESULT))
            print(f"and RAX says {vcpu.regs.rax}, at RIP {vcpu.regs.rip:#x}")
        case other:
            raise SystemExit(f"unexpected {other}\n{vcpu.describe()}")
