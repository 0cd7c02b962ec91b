# SPDX-License-Identifier: Apache-2.0
"""What the Python layer costs: exits, life cycle, import, memory of an idle VM; beside the same in C."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from pathlib import Path

import kvmpy
from benchmarks.measure import Result, compile_c, pairs, seconds

EXITS = 20_000
VMS = 40
PAGE = 0x1000


def exit_cost(rounds: int) -> list[Result]:
    """A guest that writes a port in a loop, each write served by a Python handler; the peer is a loop in C."""
    peer = compile_c("kvm_peer.c")

    def handled() -> float:
        with kvmpy.Vm("kvm") as vm:
            vm.add_ram(PAGE, size=PAGE)
            vm.memory.write(PAGE, bytes.fromhex("e680 ebfc"))  # again: out 0x80,al  jmp again
            vm.create_vcpu().enter_real_mode(PAGE)
            left = EXITS
            started = 0.0

            @vm.on_io_out(0x80)
            def serve(exit: kvmpy.IoOut) -> kvmpy.Outcome | None:
                nonlocal left, started
                if left == EXITS:
                    started = time.perf_counter()
                left -= 1
                return None if left >= 0 else kvmpy.Outcome("done")

            vm.run()
            return time.perf_counter() - started

    def matched() -> float:
        with kvmpy.Vm("kvm") as vm:
            vm.add_ram(PAGE, size=PAGE)
            vm.memory.write(PAGE, bytes.fromhex("e680 ebfc"))
            vcpu = vm.create_vcpu()
            vcpu.enter_real_mode(PAGE)
            started = time.perf_counter()
            total = 0
            for _ in range(EXITS):
                match vcpu.run():
                    case kvmpy.IoOut(port=0x80, value=value):
                        total += value
                    case other:
                        raise SystemExit(f"unexpected {other}")
            return time.perf_counter() - started

    results = []
    for name, run in (("exit served by a handler", handled), ("exit served by match", matched)):
        ours, theirs, ratio = pairs(run, lambda: seconds(peer, "exits", EXITS), rounds)
        us = 1e6 / EXITS
        results.append(Result(name, "us", ours * us, theirs * us, ratio, "ratio <= 1.25", ratio <= 1.25))
        extra = (ours - theirs) * us
        met = extra <= 1.0
        results.append(Result("  of that, Python per exit", "us", extra, goal="<= 1.0 us", met=met))
    return results


def life_cycle(rounds: int) -> list[Result]:
    """Create a VM with one page and a vCPU, run it to HLT, destroy it."""
    peer = compile_c("kvm_peer.c")

    def ours() -> float:
        started = time.perf_counter()
        for _ in range(VMS):
            with kvmpy.Vm("kvm") as vm:
                vm.add_ram(PAGE, size=PAGE)
                vm.memory.write(PAGE, b"\xf4")
                vcpu = vm.create_vcpu()
                vcpu.enter_real_mode(PAGE)
                assert isinstance(vcpu.run(), kvmpy.Hlt)
        return time.perf_counter() - started

    mine, theirs, ratio = pairs(ours, lambda: seconds(peer, "vms", VMS), rounds)
    ms = 1e3 / VMS
    goal = "ratio <= 1.3, <= 1.5 ms"
    met = ratio <= 1.3 and mine * ms <= 1.5
    return [Result("create, run, destroy a one-page VM", "ms", mine * ms, theirs * ms, ratio, goal, met)]


def import_time(rounds: int) -> list[Result]:
    """`import kvmpy` in a fresh interpreter that has nothing of it loaded."""
    code = "import time; t = time.perf_counter(); import kvmpy; print(time.perf_counter() - t)"
    times = sorted(
        float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
        for _ in range(2 * rounds + 1)
    )
    ms = times[len(times) // 2] * 1e3
    return [Result("import kvmpy", "ms", ms, goal="<= 50 ms", met=ms <= 50)]


def idle_memory(rounds: int) -> list[Result]:
    """Resident memory that one more one-vCPU VM adds to the process, beyond its guest RAM."""
    count = 16

    def resident() -> int:
        gc.collect()
        rollup = Path("/proc/self/smaps_rollup").read_text()
        return next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Rss:"))

    def create() -> kvmpy.Vm:
        vm = kvmpy.Vm("kvm")
        vm.add_ram(PAGE, size=PAGE)
        vm.memory.write(PAGE, b"\xf4")
        vcpu = vm.create_vcpu()
        vcpu.enter_real_mode(PAGE)
        vcpu.run()
        return vm

    create().close()
    before = resident()
    vms = [create() for _ in range(count)]
    kib = (resident() - before) / count - PAGE / 1024
    for vm in vms:
        vm.close()
    return [Result("an extra idle VM, beyond guest RAM", "KiB", kib, goal="<= 1024 KiB", met=kib <= 1024)]


BENCHMARKS = {"exits": exit_cost, "vms": life_cycle, "import": import_time, "memory": idle_memory}
