#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Memory-mapped I/O: where a guest address has no memory, its accesses come to us as exits."""

from kvmpy import Hlt, MmioRead, MmioWrite, Vm

# mov eax,[0xd0000000]  inc eax  mov [0xd0000004],eax  hlt
CODE = bytes.fromhex("a1000000d0 40 a3040000d0 f4")
DEVICE = 0xD000_0000

with Vm() as vm:
    vm.add_ram(0x1000, size=0x1000)
    vm.memory.write(0x1000, CODE)
    vcpu = vm.create_vcpu()
    vcpu.enter_protected_mode(0x1000)
    while True:
        match vcpu.run():
            case MmioRead(addr=addr, size=size) as read:
                print(f"guest reads {size} bytes at device register {addr - DEVICE:#x}: we say 41")
                read.answer(41)
            case MmioWrite(addr=addr, value=value):
                print(f"guest writes {value} to device register {addr - DEVICE:#x}")
            case Hlt():
                break
            case other:
                raise SystemExit(f"unexpected {other}")
