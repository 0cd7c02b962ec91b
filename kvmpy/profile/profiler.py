# SPDX-License-Identifier: Apache-2.0
"""A statistical profiler for guests: it kicks each vCPU at an interval and notes where that was.

A kick takes effect where the engine looks for it: on the software CPU between two blocks of instructions, so an
address is the start of a block, the one after that which was running; loops that are one block are charged to
themselves. Code bytes are copied when an address is seen for the first time, since guests reuse memory.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType

from kvmpy.disasm import disassemble
from kvmpy.errors import KvmpyError, StateError
from kvmpy.machine import Machine
from kvmpy.profile.symbols import Symbols
from kvmpy.vcpu import State, Vcpu

CODE_BYTES = 96
PAGE = 4096
BLOCKS_MAX = 200_000  # a guest may jump anywhere
KERNEL = 1 << 63

# Engine counters in the order of the report: what each says, and what it is divided by to be comparable.
COUNTED = {
    "insns": "instructions",
    "blocks": "translations (blocks decoded)",
    "jit_blocks": "  of those made into host code",
    "jit_insns": "  ... with so many instructions",
    "jit_helpers": "  ... of them calls of the interpreter's handlers",
    "jit_links": "  ... and links between them",
    "lookups": "block look-ups that no link or jump cache answered",
    "tlb_misses": "softTLB misses",
    "page_walks": "page walks from the root",
    "tlb_flushes": "softTLB flushes",
    "code_invalidations": "stores into decoded code",
    "faults": "exceptions",
    "irq_injections": "interrupts",
    "halt_sleeps": "sleeps in HLT",
    "engine_io": "accesses answered by the engine's chips",
    "exits": "exits to Python",
    "io_exits": "  for ports",
    "mmio_exits": "  for device memory",
    "request_exits": "  for requests (kicks, signals)",
}


@dataclass(frozen=True, slots=True)
class Block:
    """Code that was seen running: its address, the bytes from there, 16, 32 or 64 bits, and the privilege level."""

    address: int
    code: bytes
    bits: int
    cpl: int

    def disassembly(self, most: int = 12) -> list[str]:
        """Its instructions up to the first that goes elsewhere, at most `most`."""
        lines = []
        for line in disassemble(self.code, self.address, self.bits, most):
            lines.append(line)
            text = line.split("  ")[-1].strip()
            if text.startswith(("j", "ret", "call", "iret", "syscall", "sysret", "hlt", "loop", "int")):
                break
        return lines


@dataclass(slots=True)
class Profile:
    """What was found: samples by vCPU and address, the code there, counters by vCPU, and seconds of wall time."""

    seconds: float = 0.0
    samples: dict[int, Counter[int]] = field(default_factory=dict)
    blocks: dict[int, Block] = field(default_factory=dict)
    counters: dict[int, dict[str, int]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """All samples."""
        return sum(counter.total() for counter in self.samples.values())

    def hottest(self) -> list[tuple[int, int]]:
        """(address, samples) over all vCPUs, the most first."""
        return sum(self.samples.values(), Counter[int]()).most_common()

    def functions(self, symbols: Symbols) -> list[tuple[str, int]]:
        """(symbol, samples), the most first; addresses without a symbol are "user" or "kernel"."""
        found: Counter[str] = Counter()
        for address, count in self.hottest():
            symbol = symbols.find(address)
            unnamed = "(kernel, no symbol)" if address & KERNEL else "(user or low memory)"
            found[symbol[0] if symbol else unnamed] += count
        return found.most_common()

    def report(self, symbols: Symbols | None = None, top: int = 15) -> str:
        """All of it as text, with the `top` functions and blocks."""
        symbols = symbols if symbols is not None else Symbols()
        lines = [f"{self.seconds:.3f} s, {self.total} samples on {len(self.counters)} vCPUs"]
        total = max(self.total, 1)
        for vcpu, counters in sorted(self.counters.items()):
            lines += ["", f"vCPU {vcpu}"]
            names = {**COUNTED, **{name: name for name in counters if name not in COUNTED}}
            for name, text in names.items():
                if counters.get(name):
                    rate = _per_1000(counters[name], counters.get("insns", 0)) if name != "insns" else ""
                    lines.append(f"  {counters[name]:>15,}  {text}{rate}")
        if len(symbols):
            lines += ["", f"functions{'':34}samples"]
            lines += [f"  {count / total:6.1%} {count:>7}  {name}" for name, count in self.functions(symbols)[:top]]
        levels: Counter[int] = Counter()
        for address, count in self.hottest():
            if address in self.blocks:
                levels[self.blocks[address].cpl] += count
        lines += ["", "privilege: " + ", ".join(f"ring {cpl} {n / total:.1%}" for cpl, n in sorted(levels.items()))]
        for address, count in self.hottest()[:top]:
            name = symbols.name_of(address)
            lines += ["", f"{count / total:6.1%}  {count} samples at {address:#x}{'  ' + name if name else ''}"]
            block = self.blocks.get(address)
            lines += ["        " + line for line in (block.disassembly() if block else ["(not readable)"])]
        return "\n".join(lines) + "\n"


class Profiler:
    """Samples a running machine from entry to exit as a context manager; then `profile` is complete.

    interval: seconds between two samples of a vCPU.
    """

    def __init__(self, machine: Machine, interval: float = 0.001) -> None:
        if not 0 < interval <= 10:
            raise ValueError(f"an interval is above 0 and at most 10 seconds, not {interval}")
        self.profile = Profile()
        self._machine, self._vm = machine, machine.vm
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._kick, name="profiler", daemon=True)
        self._before: dict[int, Mapping[str, int]] = {}
        self._started = 0.0

    def __enter__(self) -> Profiler:
        if self._vm.handlers.kicked is not None:
            raise StateError("this machine is being profiled already")
        for vcpu in self._vm.vcpus:
            self.profile.samples[vcpu.id] = Counter()
        self._before = self._read()
        self._started = time.monotonic()
        self._vm.handlers.kicked = self._note
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._vm.handlers.kicked = None
        self.profile.seconds = time.monotonic() - self._started
        for vcpu, after in self._read().items():
            before = self._before[vcpu]
            self.profile.counters[vcpu] = {name: value - before.get(name, 0) for name, value in after.items()}

    def _read(self) -> dict[int, Mapping[str, int]]:
        """The engine's counters of each vCPU; none where it counts nothing."""
        engine = self._machine.stats()["engine"]
        return {vcpu.id: dict(engine.get(vcpu.id, {})) for vcpu in self._vm.vcpus}

    def _kick(self) -> None:
        while not self._stop.wait(self._interval):
            for vcpu in self._vm.vcpus:
                with contextlib.suppress(StateError):  # closed since we looked
                    vcpu.kick()

    def _note(self, vcpu: Vcpu) -> None:
        """In the vCPU's thread, out of the guest."""
        if self._stop.is_set() or self._vm.state is not State.RUNNING:
            return
        address = vcpu.regs.rip
        profile = self.profile
        profile.samples[vcpu.id][address] += 1
        if address not in profile.blocks and len(profile.blocks) < BLOCKS_MAX:
            with contextlib.suppress(KvmpyError):
                profile.blocks[address] = self._look(vcpu, address)

    def _look(self, vcpu: Vcpu, address: int) -> Block:
        sregs = vcpu.sregs
        bits = 64 if sregs.cs.l and sregs.efer & 1 << 10 else 32 if sregs.cs.db else 16
        linear = address if bits == 64 else address + sregs.cs.base & 0xFFFF_FFFF
        room = PAGE - linear % PAGE
        code = self._page(vcpu, linear, min(CODE_BYTES, room))
        if room < CODE_BYTES:
            with contextlib.suppress(KvmpyError):
                code += self._page(vcpu, linear + room, CODE_BYTES - room)
        return Block(address, code, bits, sregs.ss.dpl)

    def _page(self, vcpu: Vcpu, linear: int, size: int) -> bytes:
        found = vcpu.translate(linear)
        if not found.valid:
            raise StateError(f"{linear:#x} is not mapped")
        return self._vm.memory.read(found.physical_address, size)


def _per_1000(count: int, instructions: int) -> str:
    return f", {1e3 * count / instructions:.3g} per 1000 instructions" if instructions else ""
