#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The smallest micro-VM: one page of memory, one processor, a guest that adds 2 and 2 and prints "4"."""

from kvmpy import Hlt, IoOut, Regs, Vm

#     mov dx,0x3f8  add al,bl  add al,'0'  out dx,al  mov al,'\n'  out dx,al  hlt
CODE = bytes.fromhex("baf803 00d8 0430 ee b00a ee f4")

with Vm() as vm:                                    # 1. a VM, on KVM or on the software CPU
    vm.add_ram(0x1000, size=0x1000)                 # 2. one page of guest memory at 0x1000
    vm.memory.write(0x1000, CODE)                   # 3. the program
    vcpu = vm.create_vcpu()                         # 4. a processor ...
    vcpu.enter_real_mode(0x1000)                    # 5. ... in 16-bit mode, with its registers
    vcpu.regs = Regs(rip=0x1000, rax=2, rbx=2, rflags=2)
    while True:                                     # 6. run until it needs us, again and again
        match vcpu.run():
            case IoOut(port=0x3F8, data=data):
                print(data.decode(), end="")
            case Hlt():
                break
            case other:
                raise SystemExit(f"unexpected {other}")
