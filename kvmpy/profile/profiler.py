# SPDX-License-Identifier: Apache-2.0
"""A statistical profiler for guests: it kicks each vCPU at an interval and notes where that was.

A kick takes effect where the engine looks for it: on the software CPU between two blocks of instructions, so an
address is the start of a block, the one after that which was running; loops that are one block are charged to
themselves. Code bytes are copied when an address is seen for the first time, since guests reuse memory.

On the software CPU it also counts the handlers that host code calls, and copies the host code of blocks that are seen
more than once.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType

from kvmpy.disasm import instructions
from kvmpy.errors import CapabilityError, KvmpyError, StateError
from kvmpy.machine import Machine
from kvmpy.profile.symbols import Symbols
from kvmpy.vcpu import State, Vcpu

CODE_BYTES = 256  # no block of the software CPU is longer
PAGE = 4096
BLOCKS_MAX = 200_000  # a guest may jump anywhere
KERNEL = 1 << 63
SEEN_OFTEN = 3  # samples of a block before its host code is looked at
HOST_MOST = 400  # instructions of host code of a block
GUEST_WIDTH = 44  # columns
HOST_ADDRESS = re.compile(r"0x[0-9a-f]{9,16}")
WAIT = 1.0  # seconds for a running vCPU to take a kick

# Engine counters in the order of the report: what each says.
COUNTED = {
    "insns": "instructions interpreted",
    "blocks": "translations (blocks decoded)",
    "jit_blocks": "  of those made into host code",
    "jit_insns": "  ... with so many instructions",
    "jit_joined": "  ... with other blocks behind branches that are seldom taken",
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
    """Code that was seen running: its address, the bytes from there, 16, 32 or 64 bits, and the privilege level.

    host: of the software CPU's translation the instructions for each guest instruction, as text; host_bytes: how long
    that is, in line and out of line.
    """

    address: int
    code: bytes
    bits: int
    cpl: int
    host: tuple[tuple[str, ...], ...] = ()
    host_bytes: tuple[int, int] = (0, 0)

    def disassembly(self, most: int = 12) -> list[str]:
        """Its instructions up to the first that goes elsewhere, at most `most`; host code beside them."""
        lines = []
        most = len(self.host) or most
        for number, (address, _, text) in enumerate(instructions(self.code, self.address, self.bits, most)):
            host = self.host[number] if number < len(self.host) else ()
            guest = f"{address:#x}  {text}"
            lines.append(f"{guest:<{GUEST_WIDTH}}  {host[0]}" if host else guest)
            lines += [f"{'':<{GUEST_WIDTH}}  {line}" for line in host[1:]]
            if text.startswith(("j", "ret", "call", "iret", "syscall", "sysret", "hlt", "loop", "int")):
                break
        return lines


@dataclass(slots=True)
class Profile:
    """What was found: samples by vCPU and address, the code there, counters by vCPU, and seconds of wall time.

    handlers: by vCPU, how often host code called which handler of the interpreter: because the instruction has no host
    code, and out of line, mostly for memory that the softTLB did not know.
    """

    seconds: float = 0.0
    samples: dict[int, Counter[int]] = field(default_factory=dict)
    blocks: dict[int, Block] = field(default_factory=dict)
    counters: dict[int, dict[str, int]] = field(default_factory=dict)
    handlers: dict[int, dict[str, tuple[int, int]]] = field(default_factory=dict)

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
                    rate = counters[name] / max(self.seconds, 1e-9)
                    lines.append(f"  {counters[name]:>15,}  {text}, {rate:,.0f} per second")
            lines += self._handlers(vcpu, top)
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
            if block and block.host:
                sizes = "{} bytes of host code and {} out of line".format(*block.host_bytes)
                lines.append(f"        {'guest':<{GUEST_WIDTH}}  host: {sizes}")
            lines += ["        " + line for line in (block.disassembly() if block else ["(not readable)"])]
        return "\n".join(lines) + "\n"

    def _handlers(self, vcpu: int, top: int) -> list[str]:
        calls = sorted(self.handlers.get(vcpu, {}).items(), key=lambda item: -sum(item[1]))
        if not calls:
            return []
        lines = ["", f"  {'no host code':>15}  {'out of line':>15}  handlers called by host code"]
        return lines + [f"  {whole:>15,}  {slow:>15,}  {name}" for name, (whole, slow) in calls[:top]]


class Profiler:
    """Samples a running machine from entry to exit as a context manager; then `profile` is complete.

    interval: seconds that a vCPU runs between two samples, at least.
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
        self._asked: dict[int, threading.Event] = {}  # vCPUs of whose translator we asked; set: no longer
        self._due: dict[int, float] = {}  # when a vCPU is to be kicked again
        self._started = 0.0

    def __enter__(self) -> Profiler:
        if self._vm.handlers.kicked is not None:
            raise StateError("this machine is being profiled already")
        for vcpu in self._vm.vcpus:
            self.profile.samples[vcpu.id] = Counter()
        self._before = self._read()
        self._started = time.monotonic()
        self._vm.handlers.kicked = self._kicked
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        for running in self._vm.vcpus:
            self._end(running)
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
            now = time.monotonic()
            for vcpu in self._vm.vcpus:
                if now < self._due.get(vcpu.id, 0.0):
                    continue
                self._due[vcpu.id] = now + WAIT
                with contextlib.suppress(StateError):  # closed since we looked
                    vcpu.kick()

    def _kicked(self, vcpu: Vcpu) -> None:
        """In the vCPU's thread, out of the guest. The interval begins behind it: a slow host samples less often."""
        try:
            self._note(vcpu)
        finally:
            self._due[vcpu.id] = time.monotonic() + self._interval

    def _note(self, vcpu: Vcpu) -> None:
        if self._stop.is_set():
            self._ask_no_more(vcpu)
            return
        if self._vm.state is not State.RUNNING:
            return
        address = vcpu.regs.rip
        profile = self.profile
        if vcpu.id not in self._asked:
            self._asked[vcpu.id] = threading.Event()
            with contextlib.suppress(CapabilityError):  # the kernel's KVM
                vcpu.profile(True)
                self.profile.handlers[vcpu.id] = {}
        profile.samples[vcpu.id][address] += 1
        if address not in profile.blocks and len(profile.blocks) < BLOCKS_MAX:
            with contextlib.suppress(KvmpyError):
                profile.blocks[address] = self._look(vcpu, address)
        block = profile.blocks.get(address)
        often = profile.samples[vcpu.id][address] >= SEEN_OFTEN
        if block and not block.host and often and vcpu.id in profile.handlers:
            profile.blocks[address] = _with_host_code(vcpu, block)

    def _end(self, vcpu: Vcpu) -> None:
        """Take the counts: here, or in the vCPU's thread if it runs."""
        asked = self._asked.get(vcpu.id)
        if asked is None:
            return
        with contextlib.suppress(StateError):
            self._ask_no_more(vcpu)
        if not asked.is_set():
            with contextlib.suppress(StateError):
                vcpu.kick()
                asked.wait(WAIT)

    def _ask_no_more(self, vcpu: Vcpu) -> None:
        asked = self._asked.get(vcpu.id)
        if asked is not None and not asked.is_set():
            if vcpu.id in self.profile.handlers:
                self.profile.handlers[vcpu.id] = vcpu.handler_calls()
                vcpu.profile(False)
            asked.set()

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


def _with_host_code(vcpu: Vcpu, block: Block) -> Block:
    """`block` with its host code, where there is some; what that refers to has names."""
    found = vcpu.host_code(block.address) if block.bits == 64 else None
    if found is None or not found.starts:
        return block
    names: dict[str, str] = {}

    def name(match: re.Match[str]) -> str:
        text = match[0]
        if text not in names:
            names[text] = vcpu.host_name(int(text, 16)) or text
        return names[text]

    lines: list[list[str]] = [[] for _ in found.starts]
    for at, _, text in instructions(found.code, found.address, 64, HOST_MOST):
        number = sum(start <= at - found.address for start in found.starts) - 1
        lines[max(number, 0)].append(HOST_ADDRESS.sub(name, text))
    return replace(
        block,
        code=block.code[: found.guest_bytes],
        host=tuple(tuple(host) for host in lines),
        host_bytes=(len(found.code), found.out_of_line),
    )
