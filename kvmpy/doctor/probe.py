# SPDX-License-Identifier: Apache-2.0
"""Tiny guests that prove an engine: real mode, 64-bit ring 3, and the speed of ring 0 and ring 3.

Processor flags prove nothing (KVM works nested and paravirtualised without vmx or svm), so each engine is
asked to run code and the result is compared.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmpy._exits import IoOut, MmioWrite
from kvmpy.engines import Kvm
from kvmpy.errors import KvmpyError
from kvmpy.vcpu import Vcpu
from kvmpy.vm import Vm

if TYPE_CHECKING:
    from kvmpy._exits import Exit

SECONDS = 10.0  # after which a guest that does not come back is taken out
MEMORY = 0x2_0000  # page tables at 0x9000, code above
CODE = 0x1_0000
DOOR = 0xD000_0000  # no memory here: a write is an exit
ANSWER = 42

#                      mov dx,3f8  mov al,6  mov bl,7  mul bl  out dx,al  hlt
REAL_MODE = bytes.fromhex("baf803  b006      b307      f6e3    ee         f4")
#                      mov eax,7   imul eax,eax,6  mov edi,DOOR  mov [rdi],eax  jmp $
LONG_MODE = bytes.fromhex("b807000000  6bc006      bf000000d0    8907           ebfe")


@dataclass(frozen=True, slots=True)
class Probe:
    """How one tiny guest went: `worked`, and `text` that says what came instead if not."""

    worked: bool
    text: str


@dataclass(frozen=True, slots=True)
class Speed:
    """Instructions per second of a counting loop, exit and entry included."""

    ring0: float
    ring3: float

    @property
    def ring0_emulated(self) -> bool:
        """Whether ring 0 does not run on the processor itself: some hundred times slower than ring 3."""
        return self.ring0 * 20 < self.ring3


def real_mode(kvm: Kvm) -> Probe:
    """Run a multiplication in 16-bit real mode that writes its result to a port."""
    try:
        with Vm(kvm=kvm) as vm:
            vm.add_ram(0, MEMORY)
            vm.memory.write(0x1000, REAL_MODE)
            vcpu = vm.create_vcpu()
            vcpu.enter_real_mode(0x1000)
            got, _ = _run(vcpu)
    except (KvmpyError, OSError) as error:
        return Probe(False, str(error))
    match got:
        case IoOut(port=0x3F8, data=data) if bytes(data) == bytes([ANSWER]):
            return Probe(True, "a real-mode guest ran and gave the right answer")
    return Probe(False, f"a real-mode guest ended with {got!r}")


def long_mode(kvm: Kvm) -> Probe:
    """Run a multiplication in 64-bit ring 3 that writes its result where no memory is."""
    try:
        got, _ = _long(kvm, LONG_MODE, ring=3)
    except (KvmpyError, OSError) as error:
        return Probe(False, str(error))
    match got:
        case MmioWrite(addr=0xD000_0000, data=data) if bytes(data) == ANSWER.to_bytes(4, "little"):
            return Probe(True, "a 64-bit ring 3 guest ran and gave the right answer")
    return Probe(False, f"a 64-bit ring 3 guest ended with {got!r}")


def speed(kvm: Kvm) -> Speed:
    """Measure a loop of two instructions in ring 0 and ring 3. Errors: KvmpyError, OSError."""
    return Speed(ring0=_loop(kvm, 0, 50_000), ring3=_loop(kvm, 3, 1_000_000))


def _loop(kvm: Kvm, ring: int, count: int) -> float:
    #          mov ecx,count                        dec ecx; jnz   mov edi,DOOR; mov [rdi],ecx; jmp $
    code = b"\xb9" + count.to_bytes(4, "little") + bytes.fromhex("ffc975fc bf000000d0 890f ebfe")
    got, seconds = _long(kvm, code, ring)
    if not isinstance(got, MmioWrite):
        raise KvmpyError(f"the loop in ring {ring} ended with {got!r}")
    return 2 * count / seconds


def _long(kvm: Kvm, code: bytes, ring: int) -> tuple[Exit, float]:
    with Vm(kvm=kvm) as vm:
        vm.add_ram(0, MEMORY)
        vm.memory.write(CODE, code)
        vcpu = vm.create_vcpu()
        vcpu.enter_long_mode(CODE, ring=ring)
        return _run(vcpu)


def _run(vcpu: Vcpu) -> tuple[Exit, float]:
    """The vCPU's next exit and the seconds until it; after SECONDS the guest is taken out (Interrupted)."""
    alarm = threading.Timer(SECONDS, vcpu.kick)
    alarm.daemon = True
    alarm.start()
    begin = time.perf_counter()
    try:
        return vcpu.run(), time.perf_counter() - begin
    finally:
        alarm.cancel()
        alarm.join()  # else a late kick could reach a closed vCPU
