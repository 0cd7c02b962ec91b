# SPDX-License-Identifier: Apache-2.0
"""The JIT: against the host's processor one instruction at a time, and against the interpreter in random sequences.

A threshold of 0 compiles every block before it runs for the first time; `all` also those that are mostly calls of
handlers, which the JIT otherwise leaves to the interpreter.
"""

from __future__ import annotations

import os
import platform
import random
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import kvmpy

HERE = Path(__file__).parent
TCG = HERE.parents[1] / "kvmpy" / "tcg"
sys.path.insert(0, str(HERE))
import instructions  # noqa: E402
import vectors  # noqa: E402

optable = instructions.optable
pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("cc") is None,
    reason="the JIT is for x86-64 hosts; needs a C compiler",
)
EAGER = {"KVMPY_TCG": "jit", "KVMPY_JIT_THRESHOLD": "0"}
OFF = ["all", "all,nochain,noindirect", "all,noflags,novec", "all,nogs,nobinding,notraces,nostrings,nocrossing"]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The core with each of the drivers."""
    folder = tmp_path_factory.mktemp("jit")
    optable.main(str(TCG))
    core = [TCG / name for name in (TCG / "core_sources.txt").read_text().split()]
    flags = ["-std=gnu11", "-O1", "-w", "-fno-strict-aliasing"]

    def compile_one(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        subprocess.run(["cc", *flags, "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, core))
    for name in ("diff", "vector_diff", "sequences"):
        source = str(HERE / "native" / f"{name}.c")
        command = ["cc", *flags, "-no-pie", source, *objects, "-lpthread", "-o", str(folder / name)]
        subprocess.run(command, check=True)
    return folder


def integers(seed: int, each: int, names: frozenset[str] = frozenset()) -> bytes:
    rng = random.Random(seed)
    host = set(Path("/proc/cpuinfo").read_text().split())
    rows = [row for row in optable.load() if instructions.usable(row, host) and (not names or row.handler in names)]
    return b"".join(instructions.encode(row, rng) for row in rows for _ in range(each))


def differences(command: list[str], cases: bytes, switches: str, threshold: int = 0) -> tuple[int, str]:
    """How many cases ran, and what the program said; none may differ."""
    env = os.environ | EAGER | {"KVMPY_JIT": switches, "KVMPY_JIT_THRESHOLD": str(threshold)}
    done = subprocess.run(command, input=cases, capture_output=True, timeout=900, env=env, check=False)
    output = done.stdout.decode()
    if done.returncode == 3:
        pytest.skip("no executable memory here for a JIT")
    summary = re.search(r"(\d+) (?:cases|runs|sequences),.* (\d+) differences", output)
    assert summary, output + done.stderr.decode()
    assert int(summary[2]) == 0, output[:8000]
    return int(summary[1]), output


@pytest.mark.parametrize("switches", OFF)
def test_integers_as_on_the_host(programs, switches):
    cases = integers(5, 20)
    ran, _ = differences([programs / "diff", "5", "2"], cases, switches)
    assert ran == len(cases) // 24 * 2


@pytest.mark.parametrize("switches", ["all", "all,novec"])
def test_vectors_as_on_the_host(programs, switches):
    cases = vectors.cases(5, 4)
    ran, _ = differences([programs / "vector_diff", "5", "6"], cases, switches)
    assert ran == len(cases) // vectors.RECORD.size * 6


@pytest.mark.parametrize("switches", OFF)
def test_sequences_as_in_the_interpreter(programs, switches):
    """Loops of random instructions with branches, page crossings and faults in the middle."""
    ran, output = differences([programs / "sequences", "9", "6000"], integers(9, 20), switches)
    assert ran == 6000
    faults = re.search(r"(\d+) faults", output)
    assert faults and int(faults[1]) > 500, "hardly a fault: the sequences are too tame"


@pytest.mark.parametrize("threshold", [1, 3])
def test_traces_as_in_the_interpreter(programs, threshold):
    """What has been interpreted some times is joined behind branches (with a threshold of 0 hardly anything is)."""
    ran, _ = differences([programs / "sequences", "23", "4000"], integers(23, 20), "all", threshold)
    assert ran == 4000


COUNTING = frozenset(["inc", "dec", "add", "cmp", "mov", "adc", "setb", "setbe", "setz", "cmovbe", "lahf", "shl"])


@pytest.mark.parametrize("switches", OFF)
def test_flags_of_counting_as_in_the_interpreter(programs, switches):
    """INC and DEC leave the carry where it is; others look at it, or fault and show it."""
    ran, _ = differences([programs / "sequences", "17", "1500"], integers(17, 20, COUNTING), switches)
    assert ran == 1500


@pytest.mark.parametrize("switches", [*OFF, "all,nox87"])
def test_x87_sequences_as_in_the_interpreter(programs, switches):
    """x87 among integers and MMX: stack faults, NaNs, denormals, exceptions masked and not, instruction pointers."""
    cases = vectors.sequences(11, 20, {"x87"}) + vectors.sequences(12, 3, {"mmxclass"}) + integers(13, 3)
    ran, _ = differences([programs / "sequences", "11", "10000"], cases, switches)
    assert ran == 10000


@pytest.mark.parametrize("switches", ["all", "all,noindirect"])
def test_vector_sequences_as_in_the_interpreter(programs, switches):
    """SSE and AVX among x87 and integers: alignment, MXCSR with exceptions unmasked, halves of registers."""
    cases = vectors.sequences(14, 5, {"sseclass", "avxclass"}) + vectors.sequences(15, 5, {"x87"}) + integers(16, 2)
    ran, _ = differences([programs / "sequences", "14", "10000"], cases, switches)
    assert ran == 10000


def in_long_mode(code: str, then: str, **environment: str) -> str:
    """What a process of its own prints that runs `code` (hexadecimal) at 0x1000, then the statements `then`."""
    program = f"""
import os, kvmpy
with kvmpy.Vm("tcg") as vm:
    vm.add_ram(0, size=0x20000)
    vm.memory.write(0x1000, bytes.fromhex("{code}"))
    vcpu = vm.create_vcpu()
    vcpu.enter_long_mode(0x1000)
    {then}
"""
    command, env = [sys.executable, "-c", program], os.environ | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=env, check=True).stdout


def test_misaligned_vector_in_page_0():
    """Its address and its misalignment once made the tag of an empty softTLB entry, and so an access to host memory."""
    # mov rax,cr4  or eax,OSFXSR  mov cr4,rax  movaps xmm0,[0x2000]  movaps xmm1,[1]  hlt
    code = "0f20e0 0d00020000 0f22e0 0f28042500200000 0f280c2501000000 f4"
    said = in_long_mode(code, "print(vcpu.run(), hex(vcpu.regs.rip))", **EAGER)
    assert said == "Shutdown() 0x1013\n"  # #GP without an IDT


def test_flags_behind_accesses_that_share_a_probe():
    """The two loads lie in two pages, so the interpreter does them, with the DEC between them."""
    # again: mov rax,[rbx]  dec ecx  mov rdx,[rbx+8]  jnz on  hlt; on: inc rsi  jmp again
    code = "b9e8030000 bbfc1f0000 31f6 488b03 ffc9 488b5308 7501 f4 48ffc6 ebef"
    assert in_long_mode(code, "print(vcpu.run(), vcpu.regs.rsi)", **EAGER) == "Hlt() 999\n"


def test_a_store_into_the_tail_of_a_trace():
    """A loop in which a branch is not taken; later it writes a byte behind that, where the same host code goes on."""
    # xor esi,esi  xor edi,edi  mov ecx,2000  mov ebx,TAIL+3
    # again: cmp ecx,1000  je patch  tail: add esi,1  dec ecx  jne again  hlt;  patch: mov byte [rbx],5  jmp tail
    code = "31f6 31ff b9d0070000 bb19100000 81f9e8030000 740a 4883c601 ffc9 75f0 f4 90 c60305 ebf1"
    then = """print(vcpu.run(), vcpu.regs.rsi)
    with vcpu.stats() as stats:
        print(dict(stats.read())["jit_joined"])"""
    end, joined = in_long_mode(code, then, KVMPY_TCG="jit").splitlines()
    assert end == f"Hlt() {1000 * 1 + 1000 * 5}"
    assert int(joined) or not has_jit()


def has_jit() -> bool:
    """Can there be host code here?"""
    then = """vcpu.run()
    with vcpu.stats() as stats:
        print(dict(stats.read())["jit_blocks"])"""
    return int(in_long_mode("b9e8030000 ffc9 75fc f4", then, KVMPY_TCG="jit")) > 0


def test_code_has_names_for_perf():
    """KVMPY_JIT=perf: START SIZE name, hexadecimal, as tools/perf/Documentation/jit-interface.txt has it."""
    # mov ecx,1000  1: dec ecx  jnz 1b  hlt
    if not has_jit():
        pytest.skip("no executable memory here for a JIT")
    then = "vcpu.run(); print(os.getpid())"
    pid = int(in_long_mode("b9e8030000 ffc9 75fc f4", then, KVMPY_TCG="jit", KVMPY_JIT="perf"))
    path = Path(f"/tmp/perf-{pid}.map")
    lines = path.read_text().splitlines()
    path.unlink()
    found = [re.fullmatch(r"[0-9a-f]+ [0-9a-f]+ guest_([0-9a-f]+)(?:_slow)?", line) for line in lines]
    assert all(found), lines
    assert 0x1005 in {int(match[1], 16) for match in found if match}


STRINGS = [b"\xa4", b"\xa5", b"\x48\xa5", b"\xaa", b"\xab", b"\x48\xab"]  # MOVS and STOS


def string_program(rng: random.Random) -> bytes:
    """MOVS and STOS of all sizes, with and without REP and DF, short and long, overlapping, across pages."""
    code = bytearray()
    for _ in range(40):
        where = [rng.randrange(0x4000, 0x9000) if rng.random() < 0.7 else 0x6000 - rng.randrange(40)]
        where.append(where[0] + rng.randrange(-40, 40) if rng.random() < 0.3 else rng.randrange(0x4000, 0x9000))
        count = rng.choice([0, 1, 2, 3, rng.randrange(64), rng.randrange(600)])
        for register, value in ((0xBE, where[0]), (0xBF, where[1]), (0xB9, count), (0xB8, rng.getrandbits(32))):
            code += bytes([register]) + value.to_bytes(4, "little")
        code += rng.choice([b"\xfc", b"\xfc", b"\xfc", b"\xfd"])  # CLD, STD
        code += b"\x67" if rng.random() < 0.1 else b""
        code += rng.choice([b"", b"\xf3", b"\xf3"]) + rng.choice(STRINGS)
        code += b"\x48\x01\xf5\x48\x01\xfd\x48\x01\xcd"  # ADD RBP, RSI; ADD RBP, RDI; ADD RBP, RCX
    return bytes(code)


def after(code: bytes, memory: bytes) -> tuple[object, int, int, bytes]:
    with kvmpy.Vm("tcg") as vm:
        vm.add_ram(0, size=0x20000)
        back = (-len(code) - 8).to_bytes(4, "little", signed=True)  # MOV EDX, 4; again: ... DEC EDX; JNZ again; HLT
        vm.memory.write(0x1000, b"\xba\x04\0\0\0" + code + b"\xff\xca\x0f\x85" + back + b"\xf4")
        vm.memory.write(0x3000, memory)
        vcpu = vm.create_vcpu()
        vcpu.enter_long_mode(0x1000)
        return vcpu.run(), vcpu.regs.rbp, vcpu.regs.rflags, vm.memory.read(0x3000, 0x8000)


def test_strings_as_in_the_interpreter(monkeypatch):
    """Within a page they are the host's own instructions."""
    rng = random.Random(31)
    for name, value in (EAGER | {"KVMPY_JIT": "all"}).items():
        monkeypatch.setenv(name, value)
    for _ in range(60):
        code, memory = string_program(rng), rng.randbytes(0x8000)
        monkeypatch.setenv("KVMPY_TCG", "interp")
        expected = after(code, memory)
        monkeypatch.setenv("KVMPY_TCG", "jit")
        assert after(code, memory) == expected
        assert expected[0] == kvmpy.Hlt()
