#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A device of one's own: registers on a bus, served by the run loop. This one is a calculator.

    0x0  first operand     0x4  second operand     0x8  read: their product; write: print it
"""

from kvmpy import Vm


class Multiplier:
    """Registers and nothing else: it knows neither its address nor who runs it."""

    name = "multiplier"
    size = 0xC

    def __init__(self) -> None:
        self.operands = {0x0: 0, 0x4: 0}

    def read(self, offset: int, size: int) -> int:
        return self.operands.get(offset, self.operands[0x0] * self.operands[0x4])

    def write(self, offset: int, size: int, value: int) -> None:
        if offset in self.operands:
            self.operands[offset] = value
        else:
            print("the guest says:", value)

    def reset(self) -> None:
        self.operands = dict.fromkeys(self.operands, 0)

    def save(self) -> dict[str, object]:
        return {"version": 1, "operands": list(self.operands.values())}

    def load(self, state: dict[str, object]) -> None:
        if state.get("version") != 1:
            raise ValueError(f"multiplier state of unknown version {state.get('version')!r}")
        self.operands = dict(zip(self.operands, state["operands"], strict=True))


# mov ebx,0xd0000000   mov dword [ebx],6   mov dword [ebx+4],7   mov eax,[ebx+8]   mov [ebx+8],eax   hlt
CODE = bytes.fromhex("bb000000d0 c70306000000 c7430407000000 8b4308 894308 f4")

with Vm() as vm:
    vm.add_ram(0x1000, size=0x1000)
    vm.memory.write(0x1000, CODE)
    vm.mmio.add(0xD000_0000, Multiplier())
    vm.create_vcpu().enter_protected_mode(0x1000)
    print("the run ended:", vm.run().reason)
