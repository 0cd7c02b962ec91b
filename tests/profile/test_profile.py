# SPDX-License-Identifier: Apache-2.0
"""Profiles: samples fall where a guest spends its time, counters count, symbols name addresses."""

import struct
import time
from collections import Counter

import pytest

from kvmpy import Machine, Vm
from kvmpy.cli.command import main
from kvmpy.errors import StateError
from kvmpy.profile import Block, Profile, Profiler, Symbols
from kvmpy.profile.symbols import SymbolsError

MAP = b"""\
0000000000000000 A fixed
0000000000100000 T start
0000000000100002 t spin
0000000000100002 t spin_alias
ffffffffc0000000 t probe\t[virtio_net]
"""
BASE = 0x10_0000
#                    jmp +0   dec eax  jmp -4
SPIN = bytes.fromhex("eb00 ffc8 ebfc")


@pytest.fixture
def symbols(tmp_path):
    path = tmp_path / "System.map"
    path.write_bytes(MAP)
    return Symbols.read(path)


def spinning(backend):
    return Machine(kernel=SPIN, load_address=BASE, mode="long", memory="16M", backend=backend)


def test_samples_counters_and_report(backend, symbols):
    with spinning(backend) as machine:
        profiler = Profiler(machine)
        with profiler:
            deadline = time.monotonic() + 60
            while profiler.profile.total < 20:
                assert time.monotonic() < deadline, "no samples"
                time.sleep(0.01)
        machine.stop()
    profile = profiler.profile
    assert set(dict(profile.hottest())) <= {BASE, BASE + 2, BASE + 4}
    assert profile.blocks[BASE + 2].bits == 64 and profile.blocks[BASE + 2].cpl == 0
    assert profile.functions(symbols)[0][0] == "spin"
    report = profile.report(symbols)
    assert "ring 0 100.0%" in report and "at 0x100002  spin" in report
    if backend == "tcg":
        counted = profile.counters[0]
        assert counted["insns"] > 1000 or counted["jit_blocks"] >= 1  # host code does not count its instructions
        assert " per second" in report and "exits to Python" in report


#                         fninit  jmp +0  cpuid  dec ebx  jnz -6  jmp -12
CALLING = bytes.fromhex("dbe3    eb00    0fa2   ffcb     75fa    ebf4")


def test_host_code_beside_the_guests_and_calls_of_handlers(monkeypatch):
    pytest.importorskip("iced_x86")
    monkeypatch.setenv("KVMPY_TCG", "jit")
    monkeypatch.setenv("KVMPY_JIT", "all")
    with Machine(kernel=CALLING, load_address=BASE, mode="long", memory="16M", backend="tcg") as machine:
        profiler = Profiler(machine)
        with profiler:
            deadline = time.monotonic() + 60
            while not any(block.host for block in list(profiler.profile.blocks.values())):
                assert time.monotonic() < deadline, "no host code"
                time.sleep(0.01)
            if not dict(machine.stats()["engine"][0])["jit_blocks"]:
                pytest.skip("no executable memory here for a JIT")
        machine.stop()
    profile = profiler.profile
    assert profile.handlers[0]["cpuid"][0] > 100
    block = next(block for block in profile.blocks.values() if block.host)
    assert len(block.host) == len([line for line in block.disassembly() if line.startswith("0x")])
    text = "\n".join(block.disassembly())
    assert "micro-op cpuid" in text or "request" in text  # the block of CPUID, or of the branch behind it
    assert "handlers called by host code" in profile.report()


def test_one_profiler_at_a_time(backend):
    with spinning(backend) as machine, Profiler(machine):
        with pytest.raises(StateError, match="being profiled already"), Profiler(machine):
            pass
        machine.stop()
    with pytest.raises(ValueError, match="an interval"):
        Profiler(machine, 0)


def test_a_block_ends_where_it_goes_elsewhere():
    pytest.importorskip("iced_x86")
    #                                     xor eax,eax  dec ecx  jne -4  nop
    block = Block(0x1000, bytes.fromhex("31c0 ffc9 75fc 90"), 32, 3)
    lines = block.disassembly()
    assert [line.split()[-2:] for line in lines[:2]] == [["eax,", "eax"], ["dec", "ecx"]]
    assert "jne" in lines[2] and len(lines) == 3
    assert len(block.disassembly(most=2)) == 2


def test_symbols(symbols):
    assert symbols.name_of(BASE) == "start"
    assert symbols.name_of(BASE + 3) == "spin+0x1"
    assert symbols.name_of(0xFFFF_FFFF_C000_0010) == "probe [virtio_net]+0x10"
    assert symbols.name_of(0xFFFF) == "" and symbols.name_of(BASE + (1 << 21)) == ""
    profile = Profile()
    profile.samples[0] = Counter({0xFFFF_FFFF_8000_0000: 2, 0x1000: 1})
    assert profile.functions(symbols) == [("(kernel, no symbol)", 2), ("(user or low memory)", 1)]


def elf_with_symbols(*, names=b"\0main\0other\0", link=2):
    """A 64-bit ELF file of section headers alone: null, .symtab, .strtab."""
    table = b"".join(
        struct.pack("<IBBHQQ", name, info, 0, section, value, 0)
        for name, info, section, value in ((0, 0, 0, 0), (1, 2, 1, BASE), (6, 2, 0, 0x5000), (6, 0x12, 1, BASE + 8))
    )
    at = 64
    strings, headers = at + len(table), at + len(table) + len(names)
    section = struct.Struct("<IIQQQQIIQQ")
    return (
        b"\x7fELF\x02\x01\x01" + bytes(9)
        + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0, 0, headers, 0, 64, 0, 0, 64, 3, 0)
        + table + names
        + section.pack(*[0] * 10)
        + section.pack(0, 2, 0, 0, at, len(table), link, 0, 8, 24)
        + section.pack(0, 3, 0, 0, strings, len(names), 0, 0, 1, 0)
    )  # fmt: skip


def test_symbols_of_an_elf_file(tmp_path):
    path = tmp_path / "vmlinux"
    path.write_bytes(elf_with_symbols())
    symbols = Symbols.read(path)
    assert len(symbols) == 2
    assert symbols.name_of(BASE + 4) == "main+0x4" and symbols.name_of(BASE + 8) == "other"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no symbols\n",
        b"\x7fELF\x01" + bytes(60),
        elf_with_symbols(link=9),
        elf_with_symbols()[:-100],
        b"\x7fELF\x02" + b"\xff" * 80,
    ],
    ids=range(6),
)
def test_a_file_without_symbols_is_an_error(tmp_path, data):
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(SymbolsError, match="file: "):
        Symbols.read(path)


def test_the_command(tmp_path, capfd):
    kernel, report, names = tmp_path / "spin.bin", tmp_path / "report.txt", tmp_path / "System.map"
    kernel.write_bytes(SPIN)
    names.write_bytes(MAP)
    guest = [str(kernel), "--load", hex(BASE), "--mode", "long", "--backend", "tcg", "--memory", "16M"]
    guest += ["--serial", "none", "-q", "--timeout", "0.5"]
    profile = ["--symbols", str(names), "--report", str(report), "--top", "3"]
    assert main(["debug", "profile", *guest, *profile]) == main(["run", *guest])
    assert "  spin\n" in report.read_text()


def test_addresses_that_are_nothing_have_no_name(monkeypatch):
    monkeypatch.setenv("KVMPY_TCG", "jit")
    with Vm("tcg") as vm:
        vcpu = vm.create_vcpu()
        vcpu.profile(True)
        for address in (0, 8, 1 << 47, (1 << 64) - 8, (1 << 64) - 1):
            assert vcpu.host_name(address) == ""
