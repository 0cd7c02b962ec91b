#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Two processors, two threads, one memory: both count up the same word with a locked instruction."""

from kvmpy import Vm

TIMES = 1000
COUNTER = 0x2000
# mov ecx,1000   L: lock inc dword [0x2000]   loop L   hlt
CODE = bytes.fromhex("b9e8030000 f0ff0500200000 e2f7 f4")

with Vm() as vm:
    vm.add_ram(0x1000, size=0x2000)
    vm.memory.write(0x1000, CODE)
    for _ in range(2):
        vm.create_vcpu().enter_protected_mode(0x1000)

    outcome = vm.run(timeout=10)  # returns when both have halted

    total = vm.memory.u32(COUNTER)
    print(f"{len(vm.vcpus)} processors counted to {total}; the run ended: {outcome.reason}")
    assert total == 2 * TIMES
