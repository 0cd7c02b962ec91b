# SPDX-License-Identifier: Apache-2.0
"""Where guest time goes: samples of the instruction pointer, and what the processor engine counted meanwhile.

    with Machine(kernel=..., cmdline="... nokaslr") as machine, Profiler(machine) as profiler:
        machine.wait()
    print(profiler.profile.report(Symbols.read("System.map")))

On every engine. With the software CPU's JIT, `KVMPY_JIT=perf` besides lets Linux' perf name translated code.
"""

from kvmpy.profile.profiler import Block as Block
from kvmpy.profile.profiler import Profile as Profile
from kvmpy.profile.profiler import Profiler as Profiler
from kvmpy.profile.symbols import Symbols as Symbols
