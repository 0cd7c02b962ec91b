# SPDX-License-Identifier: Apache-2.0
"""Random x87, MMX, SSE and AVX instructions from the instruction table, as records for native/vector_diff.c.

python tests/tcg/vectors.py SEED COUNT_PER_ROW [handler prefix] > cases
"""

from __future__ import annotations

import random
import struct
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kvmpy" / "tcg"))
import optable

IMAGES = ("fldenv", "fnstenv", "frstor", "fnsave")  # have a 16-bit form
CLASSES = {"x87", "mmxclass", "sseclass", "avxclass"}
HOST_FLAGS = {
    "sse3": "pni", "ssse3": "ssse3", "sse41": "sse4_1", "sse42": "sse4_2", "aes": "aes", "pclmul": "pclmulqdq",
    "sha": "sha_ni",
    "avx": "avx", "avx2": "avx2", "fma": "fma", "f16c": "f16c", "vaes": "vaes", "vpclmul": "vpclmulqdq",
}  # fmt: skip
KIND_PLAIN, KIND_MXCSR, KIND_GATHER, KIND_X87, KIND_X87_LOAD, KIND_MASKED = range(6)
CC_BITS = {"o": 0x800, "s": 0x80, "z": 0x40, "a": 0x10, "p": 4, "c": 1}
PP = {0: 0, 1: 0, 2: 1, 3: 2, 4: 3}
RECORD = struct.Struct("<B15sHHHB31s")


def host_features() -> set[str]:
    """CPU flags as /proc/cpuinfo names them."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.split(":")[1].split())
    return set()


def rows(host: set[str]) -> list[optable.Row]:
    """Rows of this family that the host executes."""
    return [
        row
        for row in optable.load()
        if row.implemented
        and (row.attributes & CLASSES or row.handler == "fwait")
        and all(HOST_FLAGS.get(f, f) in host or f not in HOST_FLAGS for f in row.features)
    ]


def _aligned_disp(rng: random.Random, row: optable.Row) -> int:
    if row.handler.startswith("sha"):  # some processors take SHA operands unaligned; the SDM wants #GP
        return rng.choice((0, 32, 64, 96))
    if row.handler == "ldmxcsr":  # as vector_diff.c prepares memory
        return rng.randrange(24) * 4
    if rng.random() < 0.08:
        return rng.randrange(96)
    return rng.choice((0, 32, 64, 96)) if not row.vex else rng.choice((0, 32, 64, 96, rng.randrange(96)))


def encode(row: optable.Row, rng: random.Random) -> bytes:
    """One random instance of a row as a record."""
    gather = row.handler.startswith("vgather")
    memory = row.modrm and (row.mod == "m" or (row.mod == "" and rng.random() < 0.5))
    if row.handler == "cvtpi2ps":
        memory = False  # AMD processors do not switch to MMX for a memory operand; the SDM says that Intel's do
    kinds = [o[0] for o in row.operands]
    w = row.w if row.w >= 0 else rng.randrange(2)

    def number(kind: str) -> int:
        while True:
            n = rng.randrange(8 if kind in "PQNT" else 16)
            if kind not in "EGRB" or n not in (3, 4, 7):  # RBX and RDI point to memory, RSP to the stack
                return n

    reg_kind = next((k for k in kinds if k in "GVPSCD"), "V")
    rm_kind = next((k for k in kinds if k in "ERWUQNT"), "W")
    reg = row.digit if row.digit >= 0 else number(reg_kind)
    vvvv = number("V") if "H" in kinds or "B" in kinds else 0
    is4 = rng.randrange(16)
    disp = _aligned_disp(rng, row)
    rex_x = 0
    tail = b""
    if gather:
        reg, vvvv, index = (1, 3, 2) if rng.random() < 0.9 else (rng.randrange(1, 4), rng.randrange(1, 4), 2)
        modrm = 0x44 | reg << 3
        tail = bytes([rng.randrange(4) << 6 | index << 3 | 3, disp & 0x1F])
        rm = 0
    elif memory:
        modrm, rm = 0x43 | (reg & 7) << 3, 0  # [rbx + disp8]
        tail = bytes([disp])
    elif row.modrm:
        rm = row.rm if row.rm >= 0 else number(rm_kind)
        modrm = 0xC0 | (reg & 7) << 3 | (rm & 7)
    else:
        rm = modrm = 0
    imm = b""
    if "I" in kinds:
        imm = bytes([rng.randrange(256)])
    elif "L" in kinds:
        imm = bytes([is4 << 4 | rng.randrange(16)])
    maps = {0: b"", 1: b"\x0f", 2: b"\x0f\x38", 3: b"\x0f\x3a"}
    code = b""
    if row.vex:
        length = row.length if row.length >= 0 else rng.randrange(2)
        inverse = (~vvvv & 15) if "H" in kinds or "B" in kinds else 15
        odd = rng.random()
        if odd < 0.02:  # what the row does not allow must raise #UD, or mean another row
            length ^= 1
        elif odd < 0.04 and not gather:
            inverse = rng.randrange(16)
        elif odd < 0.05:  # (a wrong VEX.W is left out: processors ignore some that the SDM forbids)
            code = rng.choice((b"\x66", b"\xf2", b"\xf3", b"\xf0", b"\x48"))
        second = (0 if reg >> 3 else 0x80) | 0x40 | (0 if rm >> 3 else 0x20) | row.map
        code += bytes([0xC4, second, w << 7 | inverse << 3 | length << 2 | PP[row.prefix], row.opcode])
    else:
        if rng.random() < 0.01:
            code = b"\xf0"  # LOCK: #UD
        if row.prefix >= 2:
            code += {2: b"\x66", 3: b"\xf3", 4: b"\xf2"}[row.prefix]
        elif row.handler in IMAGES and rng.random() < 0.5:
            code += b"\x66"
        rex = (w << 3 if "x87" not in row.attributes else 0) | (reg >> 3) << 2 | rex_x << 1 | rm >> 3
        if rex:
            code += bytes([0x40 | rex])
        code += maps[row.map] + bytes([row.opcode])
    if row.modrm:
        code += bytes([modrm]) + tail
    code += imm
    flags = sum(bit for f, bit in CC_BITS.items() if f not in row.undefined)
    skip = (0, 0)
    if row.handler in ("fnstenv", "fnsave"):  # instruction and data pointers differ between processors
        skip = (disp + 6, 8) if b"\x66" in code[:2] else (disp + 12, 16)
    kind = KIND_PLAIN
    if gather:
        kind = KIND_GATHER
    elif row.handler == "ldmxcsr":
        kind = KIND_MXCSR
    elif row.handler.lstrip("v").startswith("dpp"):
        kind = KIND_MASKED  # see ops_sse_fp.c: intermediate results that are tiny and exact
    elif "x87" in row.attributes:
        kind = KIND_X87_LOAD if row.handler in ("fld32", "fld64") else KIND_X87
    return RECORD.pack(len(code), code, flags, *skip, kind, row.handler.encode()[:30])


def any_address(code: bytes, store: bool, rng: random.Random) -> bytes:
    """An x87 instruction whose operand is [rbx + disp8], with another way to address memory."""
    opcode, digit = code[-3:-2], code[-2] & 0x38
    prefix = rng.choice((b"",) * 6 + (b"\x64", b"\x67", b"\x36"))
    kind = rng.randrange(12)
    if kind == 0 and not store:  # [rip + disp32]: the code itself, which a store might turn into an endless loop
        return code[:-3] + prefix + opcode + bytes([digit | 5]) + struct.pack("<i", rng.randrange(-200, 200))
    base, index, disp = rng.randrange(16), rng.randrange(16), rng.randrange(-100, 100)
    if kind < 4:
        rex = 0x40 | index >> 3 << 1 | base >> 3
        sib = bytes([0x44 | digit, (0x40 if kind == 1 else 0) | (index & 7) << 3 | base & 7])
        return code[:-3] + prefix + bytes([rex]) + opcode + sib + struct.pack("b", disp)
    if base & 7 == 4:
        base ^= 1
    rex = bytes([0x40 | base >> 3]) if base > 7 else b""
    return code[:-3] + prefix + rex + opcode + bytes([0x40 | digit | base & 7]) + struct.pack("b", disp)


def sequences(seed: int, count: int, classes: set[str]) -> bytes:
    """`count` records for native/sequences.c for each row of these classes (of CLASSES)."""
    rng = random.Random(seed)
    out = b""
    for row in rows(host_features()):
        for _ in range(count if row.attributes & classes else 0):
            length, code, *_ = RECORD.unpack(encode(row, rng))
            code = code[:length]
            if "x87" in row.attributes and row.mod == "m":
                code = any_address(code, row.jit != "x87", rng)
            undefined = sum(1 << optable.FLAGS.index(f) for f in row.undefined if f in optable.FLAGS)
            out += struct.pack("<B15sB7x", len(code), code, undefined)
    return out


def cases(seed: int, count: int, prefix: str = "") -> bytes:
    """`count` records for each row whose handler begins with `prefix`."""
    rng = random.Random(seed)
    chosen = [row for row in rows(host_features()) if row.handler.startswith(prefix)]
    return b"".join(encode(row, rng) for row in chosen for _ in range(count))


if __name__ == "__main__":
    sys.stdout.buffer.write(cases(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else ""))
