# SPDX-License-Identifier: Apache-2.0
"""A laboratory for the processor: tiny guests in assembly at ring 0, with a handler that notes exceptions (lab.inc)."""

from __future__ import annotations

import shutil
import struct
import subprocess
import tempfile
import threading
from functools import cache
from pathlib import Path

import pytest

import kvmpy
from kvmpy import _exits as x
from kvmpy._constants import KVM_MP_STATE_RUNNABLE
from kvmpy.arch.x86 import identity_page_tables
from kvmpy.boot.cpuid import CpuidPolicy
from kvmpy.vcpu import modes

HERE = Path(__file__).parent
CODE, TABLES, RESULTS, STACK = 0x10000, 0x9000, 0x40000, 0x8000
RAM = 4 << 20
NONE = 0xFFFF_FFFF
HANG = 60  # seconds
DE, DB, BP, UD, NM, DF, TS, NP, SS, GP, PF, AC = 0, 1, 3, 6, 7, 8, 10, 11, 12, 13, 14, 17


@cache
def assemble(source: str, bits: int) -> bytes:
    """A guest's binary. Skips the test where there is no nasm."""
    if shutil.which("nasm") is None:
        pytest.skip("no nasm (Debian package nasm)")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "guest.asm"
        second = "%define SECOND\n" if "second:" in source.split() else ""
        path.write_text(f'{second}%define BITS_ {bits}\n%include "lab.inc"\n{source}\n')
        command = ["nasm", "-f", "bin", "-w-all", f"-I{HERE}/", str(path), "-o", f"{folder}/guest.bin"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return (Path(folder) / "guest.bin").read_bytes()


class Lab:
    """One guest in a VM of its own."""

    def __init__(
        self,
        backend: str,
        source: str,
        *,
        bits: int = 64,
        cpu: str = "host",
        needs: tuple[str, ...] = (),
        chips: bool = False,
    ) -> None:
        self.bits = bits
        self.vm = kvmpy.Vm(backend, assist=False)
        self.vm.add_ram(0, size=RAM)
        self.vm.memory.write(CODE, assemble(source, bits))
        self.vm.memory.write(TABLES, identity_page_tables(TABLES))
        try:
            policy = CpuidPolicy(self.vm.kvm.get_supported_cpuid(), ",".join([cpu, *(f"+{name}" for name in needs)]))
        except ValueError as e:
            self.vm.close()
            pytest.skip(f"{backend}: {e}")
        if chips:
            self.vm.create_irqchip()
        self._cpuid = policy.kvm_entries(0)
        self.vcpu = self._processor(0, CODE)
        self.second = None
        start = int.from_bytes(self.vm.memory.read(CODE + 8, 8), "little")
        if start:
            self.second = self._processor(1, start)
            self.second.mp_state = KVM_MP_STATE_RUNNABLE

    def _processor(self, index: int, start: int) -> kvmpy.Vcpu:
        vcpu = self.vm.create_vcpu(index)
        vcpu.cpuid = self._cpuid
        stack = STACK - 0x1000 * index
        entry = modes.long(start, cr3=TABLES, sp=stack) if self.bits == 64 else modes.protected(start, sp=stack)
        vcpu.sregs = modes.special_registers(vcpu.sregs, entry)
        vcpu.regs = modes.general_registers(entry)
        return vcpu

    def run(self) -> list[int]:
        """The guest's results. Skips the test if this KVM cannot run the guest."""
        watchdog = threading.Timer(HANG, self.vcpu.kick)
        watchdog.start()
        try:
            exit = self.vcpu.run()
        finally:
            watchdog.cancel()
        if isinstance(exit, x.InternalError) and self.vm.backend == "kvm":
            pytest.skip(f"this KVM does not emulate {bytes(exit.instruction)[:8].hex()}")
        strange = self.vm.memory.read(CODE + 16 + 2 * self.bits // 8, 4) != b"\0\0\0\0"
        where = f"rip {self.vcpu.regs.rip:#x}; {self.report()}; last results {self.results()[-4:]}"
        assert isinstance(exit, x.Hlt) and not strange, f"{exit}; {where}"
        return self.results()

    def results(self) -> list[int]:
        """What the guest saved so far."""
        width = self.bits // 8
        place = assemble_place(self.bits)
        raw = self.vm.memory.read(place, width)
        count = (int.from_bytes(raw, "little") - RESULTS) // width
        data = self.vm.memory.read(RESULTS, count * width)
        return list(struct.unpack(f"<{count}{'Q' if width == 8 else 'I'}", data))

    def report(self) -> str:
        """An exception outside TRY: what and where."""
        width = self.bits // 8
        words = self.vm.memory.read(CODE + 16 + 2 * width, 8 + 2 * width)
        strange, last = struct.unpack("<II", words[:8])
        ip = int.from_bytes(words[8 + width :], "little")
        return f"exception {last & 0xFF}, code {last >> 8:#x}, at {ip:#x}" if strange else "no exception outside TRY"

    def close(self) -> None:
        """Free the VM."""
        self.vm.close()


def assemble_place(bits: int) -> int:
    """Address of the word `place` in lab.inc: behind the jump over the data."""
    return CODE + 16


def run(backend: str, source: str, *, bits: int = 64, cpu: str = "host", needs: tuple[str, ...] = ()) -> list[int]:
    """Run a guest and give its results."""
    lab = Lab(backend, source, bits=bits, cpu=cpu, needs=needs)
    try:
        return lab.run()
    finally:
        lab.close()
