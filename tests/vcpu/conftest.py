# SPDX-License-Identifier: Apache-2.0
"""A one-page 32-bit guest: `guest(code)` gives a VM that runs the code from 0x1000."""

import pytest

CODE = 0x1000


@pytest.fixture
def guest(vm):
    """Load 32-bit `code` (hex with comments allowed in blanks) for `cpus` processors; returns the VM."""

    def load(code, cpus=1):
        vm.add_ram(CODE, size=0x2000)
        vm.memory.write(CODE, bytes.fromhex(code))
        for _ in range(cpus):
            vm.create_vcpu().enter_protected_mode(CODE)
        return vm

    return load
