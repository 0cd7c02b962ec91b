# SPDX-License-Identifier: Apache-2.0
"""Inputs for a fuzz target to begin with; the same seed gives the same files.

    python tests/tcg/fuzz/seeds.py cpu|jit FOLDER [PER_ROW [SEED]]
    python tests/tcg/fuzz/seeds.py machine FOLDER [COUNT [SEED]]

For the core: every form of the instruction table, in every mode; an input is the header of guest.h and a few
instructions. For the JIT: 64-bit code in loops that end. For the machine: requests by chance, since any bytes are a
sequence of them.
"""

from __future__ import annotations

import random
import struct
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "kvmpy" / "tcg"))
import optable

PREFIX_BYTES = {0: b"", 1: b"", 2: b"\x66", 3: b"\xf3", 4: b"\xf2"}
ESCAPES = {0: b"", 1: b"\x0f", 2: b"\x0f\x38", 3: b"\x0f\x3a"}
LONG = 5
REAL, PROT16, VM86 = 0, 1, 7


def modrm(row: optable.Row, rng: random.Random, wide: bool) -> bytes:
    """ModRM, SIB and displacement; small displacements, so that most addresses are somewhere."""
    reg = row.digit if row.digit >= 0 else rng.randrange(8)
    mod = 3 if row.mod in ("r", "R") else rng.choice((0, 1, 2)) if row.mod == "m" else rng.randrange(4)
    rm = row.rm if row.rm >= 0 else rng.randrange(8)
    if row.rm >= 0:
        mod = 3
    text = bytes([mod << 6 | reg << 3 | rm])
    if mod == 3:
        return text
    if wide and rm == 4:
        text += bytes([rng.choice((0x24, 0x20, 0x65, rng.randrange(256)))])
    small = rng.randrange(-64, 64)
    if mod == 1:
        return text + struct.pack("<b", small)
    if mod == 2 or rm == (5 if wide else 6):
        return text + struct.pack("<i" if wide else "<h", small)
    return text


def immediate(row: optable.Row, rng: random.Random) -> bytes:
    """As many bytes as the operands ask for, with a 32-bit operand size; what is too much is the next instruction."""
    size = 0
    for operand in row.operands:
        if operand[0] in "IJ":
            size += {"b": 1, "w": 2}.get(operand[1:], 4)
        elif operand[0] in "OA":
            size += 4
    value = rng.choice((0, 1, -1, 7, rng.getrandbits(31), rng.randrange(64)))
    return (value & (1 << 64) - 1).to_bytes(8, "little")[:size]


def encode(row: optable.Row, rng: random.Random, mode: int) -> bytes:
    """One instance of a row, more or less: a fuzzer's seed need not be right."""
    operand = modrm(row, rng, mode not in (REAL, PROT16, VM86)) if row.modrm else b""
    if row.vex:
        w = row.w if row.w >= 0 else rng.randrange(2)
        length = row.length if row.length >= 0 else rng.randrange(2)
        pp = {2: 1, 3: 2, 4: 3}.get(row.prefix, 0)
        text = bytes([0xC4, 0xE0 | row.map, w << 7 | rng.randrange(16) << 3 | length << 2 | pp, row.opcode])
    else:
        text = PREFIX_BYTES[row.prefix]
        if rng.random() < 0.1:
            text = bytes([rng.choice((0x66, 0x67, 0xF0, 0xF2, 0xF3, 0x64, 0x2E, 0x36))]) + text
        if mode == LONG and (row.w == 1 or rng.random() < 0.4):
            w = row.w if row.w >= 0 else rng.randrange(2)
            text += bytes([0x40 | w << 3 | rng.choice((0, 0, 0, rng.randrange(8)))])
        in_opcode = not row.modrm and any(o[0] == "Z" for o in row.operands)
        text += ESCAPES[row.map] + bytes([(row.opcode + (rng.randrange(8) if in_opcode else 0)) & 0xFF])
    return text + operand + immediate(row, rng)


def header(rng: random.Random, mode: int) -> bytes:
    """The mode, and few surprises: mutations add them."""
    ring = rng.choice((0, 0, 0, 3, 0x13, rng.randrange(256)))
    control = rng.choice((0x81, 0x01, rng.randrange(256)))
    units = rng.choice((0x80, 0x80, rng.randrange(256)))
    segments = rng.choice((0, 0, 8, rng.randrange(256)))
    place = rng.choice((0, 16, 0xF4, 0xFC, rng.randrange(256)))
    kinds = (0x00, 0x02, 0x20, 0x24, 0x28, 0x30, 0x38, 0x3C, 0x40, 0x50, 0x60, 0x70, 0xA1, 0xB0, 0xC0, 0xD2)
    regs = bytes(rng.choice(kinds) | rng.choice((0, 0, rng.randrange(16))) for _ in range(16))
    regs = regs[:4] + bytes([rng.choice((0x00, 0x10, 0x40, rng.randrange(256)))]) + regs[5:]
    return bytes([mode, ring, control, units, segments, place, rng.randrange(256), rng.randrange(256)]) + regs


def machine_inputs(count: int, seed: int) -> list[bytes]:
    """Machines with and without chips, and up to 300 bytes of requests."""
    rng = random.Random(seed)
    code = bytes.fromhex("e461 e661 0f01c1 0f32 0f30 f4 ebf0")
    made = []
    for number in range(count):
        body = bytes(rng.choice((rng.randrange(16), rng.randrange(256))) for _ in range(rng.randrange(20, 300)))
        made.append(bytes([0x40 | number & 0x3F, len(code)]) + code + body)
    return made


def cpu_inputs(per_row: int, seed: int) -> list[bytes]:
    """`per_row` inputs that begin with each row of the table; other rows follow in them."""
    rng = random.Random(seed)
    rows = optable.load()
    made = []
    for row in rows:
        for _ in range(per_row):
            mode = rng.choice((LONG, LONG, LONG, *range(8)))
            others = [encode(rng.choice(rows), rng, mode) for _ in range(rng.randrange(4))]
            made.append(header(rng, mode) + b"".join([encode(row, rng, mode), *others, encode(row, rng, mode)]))
    return made


def loop(body: bytes, counter: int, times: int) -> bytes:
    """MOV counter, times; the body; DEC counter; JNZ to it. Prefixes as for R8 to R15 where there is need."""
    high = counter >> 3
    start = bytes([0x40 | high, 0xB8 | counter & 7]) + struct.pack("<I", times)
    end = bytes([0x40 | high, 0xFF, 0xC8 | counter & 7])
    back = -(len(body) + len(end))
    jump = b"\x75" + struct.pack("<b", back - 2) if back >= -126 else b"\x0f\x85" + struct.pack("<i", back - 6)
    return start + body + end + jump


def jit_inputs(per_row: int, seed: int) -> list[bytes]:
    """`per_row` loops around each row of the table and some others; a call of the next one at times."""
    rng = random.Random(seed)
    rows = [row for row in optable.load() if row.handler != "hlt"]
    plain = [row for row in rows if row.jit not in ("none", "jcc", "jmp", "call", "jmpind", "callind", "ret")]
    made = []
    for row in rows:
        for _ in range(per_row):
            body = [encode(one, rng, LONG) for one in (*rng.choices(plain, k=rng.randrange(5)), row)]
            rng.shuffle(body)
            counter = rng.choice([n for n in range(16) if n != 4])
            code = loop(b"".join(body), counter, rng.choice((1, 2, 3, 30)))
            if rng.random() < 0.2:  # call over a HLT; what follows returns to it
                code = b"\xe8\x01\x00\x00\x00\xf4" + code + b"\xc3"
            made.append(header(rng, LONG) + code)
    return made


def main(target: str, folder: str, count: str = "", seed: str = "1") -> None:
    """Write them as FOLDER/seed-N."""
    make, usual = {"cpu": (cpu_inputs, 1), "jit": (jit_inputs, 1), "machine": (machine_inputs, 200)}[target]
    made = make(int(count or usual), int(seed))
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(made):
        (out / f"seed-{number:05}").write_bytes(data)


if __name__ == "__main__":
    main(*sys.argv[1:])
