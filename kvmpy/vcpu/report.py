# SPDX-License-Identifier: Apache-2.0
"""Failures explained: what a person needs to see when a guest dies.

The exit by name, the instruction that did it, registers, segments and control registers, the code around
RIP, the top of the stack and the last exits. Every part is optional: what cannot be had is said, and the
rest is still shown, since a report that fails hides the failure it is about.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvmpy import _exits as x
from kvmpy.arch import x86
from kvmpy.disasm import disassemble
from kvmpy.errors import KvmpyError

if TYPE_CHECKING:
    from kvmpy._structs import Regs, Segment, Sregs
    from kvmpy.vcpu.vcpu import Vcpu

CODE_BEFORE = 16  # raw bytes shown before RIP
CODE_AFTER = 48   # bytes disassembled from RIP
STACK_WORDS = 8

_GENERAL = (
    ("rax", "rbx", "rcx", "rdx"),
    ("rsi", "rdi", "rbp", "rsp"),
    ("r8", "r9", "r10", "r11"),
    ("r12", "r13", "r14", "r15"),
)
_SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")


def explain(vcpu: Vcpu, exit: x.Exit) -> str:
    """The report on `exit` that ended the run of `vcpu`."""
    lines = [f"vCPU {vcpu.id} on the {vcpu.backend} engine: {exit!r}"]
    if isinstance(exit, x.InternalError):
        lines += _part("suberror", lambda: _internal_error(vcpu, exit))
    elif isinstance(exit, x.Shutdown):
        lines.append("triple fault: an exception came up while a double fault was being delivered;")
        lines.append("usually a bad IDT, stack or page table, or a guest that resets itself this way")
    return "\n".join([*lines, "", describe(vcpu)])


def describe(vcpu: Vcpu) -> str:
    """Registers, code, stack and last exits of `vcpu` as text."""
    parts = [
        ("registers", lambda: _registers(vcpu.regs)),
        ("segments", lambda: _segments(vcpu.sregs)),
        ("control registers", lambda: _control(vcpu.sregs)),
        ("code", lambda: _code(vcpu)),
        ("stack", lambda: _stack(vcpu)),
        ("last exits, oldest first", lambda: [f"  {exit}" for exit in vcpu.history]),
    ]
    lines: list[str] = []
    for title, make in parts:
        lines += [f"{title}:", *_part(title, make)]
    return "\n".join(lines)


def bits_of(sregs: Sregs) -> int:
    """The operand size of the code segment: 16, 32 or 64."""
    if sregs.efer & x86.EFER_LMA and sregs.cs.l:
        return 64
    return 32 if sregs.cs.db else 16


def _part(title: str, make: Callable[[], list[str]]) -> list[str]:
    try:
        return make()
    except (KvmpyError, OSError, ValueError) as e:
        return [f"  ({title} not to be had: {e})"]


def _internal_error(vcpu: Vcpu, exit: x.InternalError) -> list[str]:
    lines = [f"suberror {exit.suberror}: {exit.suberror_name}"]
    if exit.instruction:
        sregs, regs = vcpu.sregs, vcpu.regs
        text = disassemble(exit.instruction, regs.rip, bits_of(sregs), count=1)
        lines.append(f"instruction that could not be emulated: {exit.instruction.hex(' ')}")
        lines += [f"  {line}" for line in text]
    elif exit.data:
        lines.append("data: " + " ".join(f"{word:#x}" for word in exit.data))
    return lines


def _registers(regs: Regs) -> list[str]:
    lines = ["  " + "  ".join(f"{name:<3} {getattr(regs, name):016x}" for name in row) for row in _GENERAL]
    flags = " ".join(x86.rflags_names(regs.rflags))
    return [*lines, f"  rip {regs.rip:016x}  rflags {regs.rflags:08x} [{flags}]"]


def _segments(sregs: Sregs) -> list[str]:
    lines = [f"  {name:<3} {_segment(getattr(sregs, name))}" for name in _SEGMENTS]
    tables = "  ".join(f"{name} {t.base:x}+{t.limit:x}" for name, t in (("gdt", sregs.gdt), ("idt", sregs.idt)))
    return [*lines, f"  {tables}"]


def _segment(s: Segment) -> str:
    size = "64" if s.l else "32" if s.db else "16"
    state = "unusable" if s.unusable else "" if s.present else "not present"
    hidden = f"base {s.base:016x} limit {s.limit:08x} type {s.type:x} dpl {s.dpl}"
    return f"{s.selector:04x} {hidden} {size}-bit {state}".rstrip()


def _control(sregs: Sregs) -> list[str]:
    rows = (
        ("cr0", sregs.cr0, x86.cr0_names),
        ("cr4", sregs.cr4, x86.cr4_names),
        ("efer", sregs.efer, x86.efer_names),
    )
    lines = [f"  {name:<4} {value:016x} [{' '.join(names(value))}]" for name, value, names in rows]
    lines.append(f"  cr2  {sregs.cr2:016x}  cr3 {sregs.cr3:016x}  cr8 {sregs.cr8:x}  apic base {sregs.apic_base:x}")
    return lines


def _code(vcpu: Vcpu) -> list[str]:
    regs, sregs = vcpu.regs, vcpu.sregs
    bits = bits_of(sregs)
    linear = regs.rip if bits == 64 else (sregs.cs.base + regs.rip) & 0xFFFF_FFFF
    before = _read_linear(vcpu, linear - CODE_BEFORE, CODE_BEFORE)
    code = _read_linear(vcpu, linear, CODE_AFTER)
    if not code:
        return [f"  (no memory at linear address {linear:#x})"]
    lines = [f"  before rip: {before.hex(' ')}"] if before else []
    return lines + [f"  {line}" for line in disassemble(code, regs.rip, bits, count=8)]


def _stack(vcpu: Vcpu) -> list[str]:
    regs, sregs = vcpu.regs, vcpu.sregs
    bits = bits_of(sregs)
    linear = regs.rsp if bits == 64 else (sregs.ss.base + regs.rsp) & 0xFFFF_FFFF
    width = bits // 8
    raw = _read_linear(vcpu, linear, STACK_WORDS * width)
    if not raw:
        return [f"  (no memory at linear address {linear:#x})"]
    words = [int.from_bytes(raw[i : i + width], "little") for i in range(0, len(raw) - width + 1, width)]
    return ["  " + " ".join(f"{word:0{2 * width}x}" for word in words)]


def _read_linear(vcpu: Vcpu, linear: int, size: int) -> bytes:
    """Up to `size` bytes at a linear address through the guest's page tables; stops where nothing is mapped."""
    out = bytearray()
    while len(out) < size:
        at = (linear + len(out)) & 0xFFFF_FFFF_FFFF_FFFF
        chunk = min(size - len(out), 0x1000 - (at & 0xFFF))
        try:
            found = vcpu.translate(at)
            if not found.valid:
                break
            out += vcpu.memory.read(found.physical_address, chunk)
        except (KvmpyError, OSError):
            break
    return bytes(out)
