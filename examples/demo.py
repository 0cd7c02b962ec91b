#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What `make demo` runs: a micro-VM embedded in this Python program, step by step, saying what it does."""

import re
import time

import kvmpy
from kvmpy import guests

# The guest, 32-bit: ask the host for work at port 0x500, compute, report at port 0x504, until the work is 0.
#   next: mov dx,0x500  in eax,dx  test eax,eax  jz done
#         xor ebx,ebx   mov ecx,eax
#   sum:  add ebx,ecx   loop sum
#         mov dx,0x504  mov eax,ebx  out dx,eax  jmp next
#   done: hlt
GUEST = bytes.fromhex("66ba0005 ed 85c0 7411 31db 89c1 01cb e2fc 66ba0405 89d8 ef ebe6 f4")
WORK = [10, 100, 1000]
ESCAPE = re.compile("\x1b\\[[0-9;]*[A-Za-z]")  # the shell asks where the cursor is: your terminal would answer


def main() -> None:
    embedded()
    print("\nA guest that dies explains itself:")
    dying()
    print("\nDebian's own kernel, unmodified, on kvmpy's software CPU:")
    linux()


def embedded() -> None:
    started = time.perf_counter()
    with kvmpy.Vm() as vm:
        print(f"engine: {vm.backend} ({vm.kvm.reason})")
        vm.add_ram(0x1000, size=0x1000)
        vm.memory.write(0x1000, GUEST)
        print(f"guest memory: 1 page at 0x1000, {len(GUEST)} bytes of guest code in it:")
        print(vm.memory.hexdump(0x1000, len(GUEST)))
        work = iter(WORK)

        @vm.on_io_in(0x500)
        def give_work(exit: kvmpy.IoIn) -> int:
            n = next(work, 0)
            print(f"  guest asks for work  -> {n or 'there is no more'}")
            return n

        @vm.on_io_out(0x504)
        def take_result(exit: kvmpy.IoOut) -> None:
            print(f"  guest reports        <- {exit.value}")

        vcpu = vm.create_vcpu()
        vcpu.enter_protected_mode(0x1000)
        outcome = vm.run(timeout=10)
        print(f"the run ended: {outcome.reason}, RIP {vcpu.regs.rip:#x}, "
              f"{1000 * (time.perf_counter() - started):.1f} ms from nothing to here")


def dying() -> None:
    with kvmpy.Vm() as vm:
        vm.add_ram(0x1000, size=0x1000)
        vm.memory.write(0x1000, bytes.fromhex("b801000000 0f0b"))  # mov eax,1  ud2
        vm.create_vcpu().enter_protected_mode(0x1000)
        try:
            vm.run(timeout=10)
        except kvmpy.GuestError as e:
            print("  " + e.report.replace("\n", "\n  "))


def linux() -> None:
    try:
        guest = guests.get("debian-6.1", progress=lambda text: print(f"  {text}"))
    except guests.GuestUnavailableError as e:
        print(f"  not shown: {e}")
        return
    started = time.perf_counter()
    with kvmpy.Machine(kernel=guest.kernel, initrd=guest.initrd, cmdline=guest.cmdline, backend="tcg") as machine:
        machine.console.expect("# ", timeout=300)
        print(f"  a shell after {time.perf_counter() - started:.1f} s; we type: uname -a; free; poweroff -f")
        machine.console.send_line("uname -a; free; poweroff -f")
        outcome = machine.wait(timeout=300)
        for line in machine.console.read().splitlines():
            if not line.startswith("["):
                print(f"  | {ESCAPE.sub('', line)}")
    print(f"  the run ended: {outcome.reason}")


if __name__ == "__main__":
    main()
