# SPDX-License-Identifier: Apache-2.0
"""Run FEX's instruction tests (unittests/ASM and 32Bit_ASM) on the host, kvmpy and QEMU, and count what passes.

    python -m benchmarks.suites.fex SOURCES BINARIES [--sides native,kvmpy,qemu] [--only TEXT] [--logs DIR]

SOURCES is FEX's `unittests`: the expected registers stand in a JSON header of each .asm file. BINARIES holds what
an assembler made of each, at the same relative path with the suffix .bin. Linux loads and stops them (flat_run.c),
so all sides run the same bytes in ring 3, 64-bit or 32-bit.

The pack, little endian, for each test: name and needed processor flags (u32 length, text), u32 bits, code (u32 size,
bytes), u32 regions (u64 address, u64 size each), u32 data (u64 address, u32 size, bytes each), u32 expected registers
(u32 register, u32 count, u64 values each).
"""

from __future__ import annotations

import argparse
import json
import re
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks.suites import linux_guest

SUITES = {"ASM": 64, "32Bit_ASM": 32}
GENERAL = ("RIP", "RAX", "RBX", "RCX", "RDX", "RSI", "RDI", "RBP", "RSP", *(f"R{n}" for n in range(8, 16)))
REGISTERS = (*GENERAL, *(f"XMM{n}" for n in range(16)), "GS", "FS", *(f"MM{n}" for n in range(8)))
NUMBER = {name: index for index, name in enumerate(REGISTERS)}
# The header's words for features, as /proc/cpuinfo has them.
FLAGS = {
    "3DNOW": "3dnow", "SSE4A": "sse4a", "AVX": "avx2", "RAND": "rdrand", "SHA": "sha_ni", "CLZERO": "clzero",
    "BMI1": "bmi1", "BMI2": "bmi2", "CLWB": "clwb", "AES256": "vaes", "SSSE3": "ssse3", "SSE4.1": "sse4_1",
    "SSE4.2": "sse4_2", "AES": "aes", "PCLMUL": "pclmulqdq", "MOVBE": "movbe", "ADX": "adx", "XSAVE": "xsave",
    "RDPID": "rdpid", "CLFLOPT": "clflushopt", "FSGSBASE": "fsgsbase", "EMMI": "cxmmx", "AFP": "arm_afp",
}  # fmt: skip
CONFIG = re.compile(r"%ifdef CONFIG(.*?)%endif", re.DOTALL)


def pack_test(name: str, source: str, code: bytes, bits: int) -> bytes:
    """A test in the form that flat_run reads."""
    match = CONFIG.search(source)
    header = {k.upper(): v for k, v in json.loads(match[1]).items()} if match else {}
    bits = {"32BIT": 32, "64BIT": 64}.get(str(header.get("MODE", "")).upper(), bits)
    needs = " ".join(FLAGS[word.upper()] for word in header.get("HOSTFEATURES", []) if word.upper() != "LINUX")
    out = b"".join(struct.pack("<I", len(text)) + text for text in (name.encode(), needs.encode()))
    out += struct.pack("<II", bits, len(code)) + code
    regions = header.get("MEMORYREGIONS", {})
    out += struct.pack("<I", len(regions))
    for address, size in regions.items():
        out += struct.pack("<QQ", int(address, 0), int(size, 0))
    data = header.get("MEMORYDATA", {})
    out += struct.pack("<I", len(data))
    for address, text in data.items():
        words = [bytes.fromhex(word.removeprefix("0x").zfill(len(word) & ~1))[::-1] for word in text.split()]
        out += struct.pack("<QI", int(address, 0), len(b"".join(words))) + b"".join(words)
    expected = header.get("REGDATA", {})
    out += struct.pack("<I", len(expected))
    for register, value in expected.items():
        values = [int(v, 0) & (1 << 64) - 1 for v in (value if isinstance(value, list) else [value])]
        out += struct.pack(f"<II{len(values)}Q", NUMBER[register.upper()], len(values), *values)
    return out


def make_pack(sources: Path, binaries: Path, only: str) -> tuple[bytes, list[str]]:
    """All tests, and the names of those that have no binary."""
    pack, without = b"", []
    for suite, bits in SUITES.items():
        for path in sorted((sources / suite).rglob("*.asm")):
            name = str(path.relative_to(sources))
            if only not in name:
                continue
            binary = (binaries / name).with_suffix(".bin")
            if binary.exists():
                pack += pack_test(name, path.read_text(), binary.read_bytes(), bits)
            else:
                without.append(name)
    return pack, without


def compile_judge(folder: Path) -> Path:
    """flat_run, static and where no test wants memory."""
    program = folder / "flat_run"
    source = Path(__file__).with_name("flat_run.c")
    subprocess.run(["cc", "-O1", "-Wall", "-Wextra", "-static-pie", "-o", str(program), str(source)], check=True)
    return program


def outcomes(text: str) -> dict[str, str]:
    """By test: "ok", "skip" or the words that tell what is wrong."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        word, _, rest = line.removeprefix("not ").partition(" ")
        if word in ("ok", "skip"):
            name, _, why = rest.partition(": ") if line.startswith(("not ", "skip")) else (rest, "", "")
            found[name.strip()] = "ok" if line.startswith("ok") else "skip" if word == "skip" else why or "wrong"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sources", type=Path, help="FEX's directory unittests")
    parser.add_argument("binaries", type=Path, help="the assembled tests")
    parser.add_argument("--sides", default=",".join(linux_guest.SIDES))
    parser.add_argument("--only", default="", metavar="TEXT", help="tests with TEXT in their name")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep the consoles' output here")
    options = parser.parse_args()
    sides = options.sides.split(",")
    pack, without = make_pack(options.sources, options.binaries, options.only)
    results: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory(prefix="fex-") as name:
        judge = compile_judge(Path(name))
        for side in sides:
            log = options.logs / f"fex.{side}.log" if options.logs else None
            ended = linux_guest.run(
                side, {"flat_run": judge}, files={"pack": pack}, arguments={"flat_run": ["pack"]}, seconds=3000, log=log
            )["flat_run"]
            results[side] = outcomes(ended.output)
            if not ended.output.endswith("all run"):
                print(f"{side}: the run did not come to its end (status {ended.status})")
    print(f"{'':<10}{'side':<8}{'ok':>6}{'wrong':>7}{'skip':>6}{'of those that the host passes':>32}")
    native = results.get("native", {})
    for suite in SUITES:
        for side, found in results.items():
            mine = {n: o for n, o in found.items() if n.startswith(f"{suite}/")}
            count = Counter(o if o in ("ok", "skip") else "wrong" for o in mine.values())
            tried = [n for n, o in native.items() if o == "ok" and n.startswith(f"{suite}/") and mine.get(n) != "skip"]
            passed = sum(mine.get(n) == "ok" for n in tried)
            share = f"{passed} of {len(tried)}  {100 * passed / len(tried):.2f} %" if tried else "-"
            print(f"{suite:<10}{side:<8}{count['ok']:>6}{count['wrong']:>7}{count['skip']:>6}{share:>32}")
    for side, found in results.items():
        if side != "native":
            for test, outcome in found.items():
                if native.get(test, "ok") == "ok" and outcome not in ("ok", "skip"):
                    print(f"{side} differs from the host: {test}: {outcome}")
    print(f"not run, without a binary: {len(without)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
