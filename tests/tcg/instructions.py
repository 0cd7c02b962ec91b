# SPDX-License-Identifier: Apache-2.0
"""Random instructions from the instruction table, as records for native/diff.c.

    python tests/tcg/instructions.py SEED COUNT_PER_ROW > cases

Only what can run in ring 3 of a Linux process and leave it unharmed: no branches, no system instructions, memory
operands through a register that the harness points into its buffer.
"""

from __future__ import annotations

import random
import struct
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kvmpy" / "tcg"))
import optable

SKIP = ("end", "priv", "pe", "i64")
SKIP_HANDLERS = (
    "in_ib", "in_i", "in_dxb", "in_dx", "out_ib", "out_i", "out_dxb", "out_dx", "insb", "ins", "outsb",
    "outs", "enter", "leave", "clflush", "rdrand", "rdseed", "rdpid", "xsave", "xrstor", "fxsave",
    "fxrstor", "xgetbv", "cli", "sti", "hlt", "movfromseg", "smsw", "sgdt", "sidt", "str", "sldt",
    "monitor", "rdpkru", "wrpkru", "pushf", "rdfsbase", "rdgsbase", "wrfsbase", "wrgsbase", "push_fs",
    "push_gs", "rdpmc", "mov_al", "mov_ax", "movs_al", "movs_ax", "lar", "lsl", "xchg_ax", "prefetch",
    "std",
)  # fmt: skip
STRINGS = ("movs", "cmps", "stos", "lods", "scas")
NONE = 0xFF


def usable(row: optable.Row, host: set[str]) -> bool:
    """Whether the host can run this row in a user process."""
    if not row.implemented or row.attributes & set(SKIP):
        return False
    if any(row.handler == h or (row.handler.startswith(h) and h.endswith("_")) for h in SKIP_HANDLERS):
        return False
    if row.handler.startswith(("xsave", "xrstor")):
        return False
    if row.attributes & {"x87", "mmxclass", "sseclass", "avxclass"}:
        return False  # compared by their own harness
    return not any(o[0] in "SCDAOJX" for o in row.operands)


def encode(row: optable.Row, rng: random.Random, addr: int = 0) -> bytes:
    """One random instance of a row as a record."""
    string = row.handler.startswith(STRINGS) and not row.modrm and not row.operands
    memory = row.modrm and (row.mod == "m" or (row.mod == "" and rng.random() < 0.5))
    w = row.w if row.w >= 0 else rng.randrange(2)
    p66 = row.prefix == optable.PREFIXES["66"] or (
        row.prefix == 0 and optable.size_class(row) == "v" and rng.random() < 0.3
    )
    if row.prefix in (3, 4) and optable.size_class(row) == "v" and rng.random() < 0.3:
        p66 = True
    reg = row.digit if row.digit >= 0 else rng.randrange(8)
    rex_r = 0 if row.digit >= 0 else rng.randrange(2)
    rm, rex_b, rex_x = rng.randrange(8), rng.randrange(2), 0
    base = index = small = NONE
    tail = b""
    flags = 0
    lock = "lock" in row.attributes and memory and rng.random() < 0.3
    need_aligned = "16b" in row.handler or lock or row.handler == "xchg"
    off = 0  # within 16 bytes: an access across two cache lines is a bus lock, which the host may make last for seconds
    if need_aligned and "16b" not in row.handler and not row.handler.startswith("bt"):
        off = rng.choice([0, rng.randrange(9)])
    if memory:
        while True:
            rm, rex_b = rng.randrange(8), rng.randrange(2)
            base = rm | rex_b << 3
            if rm == 4 or (base == 4):
                continue
            # the operand registers of implicit operands must stay free
            if base in (0, 1, 2, 3) and row.handler.startswith(
                ("cmpxchg", "mul", "div", "idiv", "imul1", "shl", "shr", "sar", "rol", "ror", "rc", "mulx")
            ):
                continue
            if (reg | rex_r << 3) == base and row.handler.startswith(("bt", "xchg", "xadd")):
                continue
            break
        kind = rng.randrange(3)
        if kind == 0:
            disp = 16 * rng.randrange(-4, 4) + off if need_aligned else rng.randrange(-100, 100)
            mod, tail = 1, struct.pack("b", disp)
        elif kind == 1:
            disp = 16 * rng.randrange(-9, 9) + off if need_aligned else rng.randrange(-200, 200)
            mod, tail = 2, struct.pack("<i", disp)
        else:
            mod, tail = (1, b"\0") if rm == 5 else (0, b"")
        if rng.random() < 0.3 and not need_aligned:
            index = rng.choice([i for i in range(16) if i not in (4, base, reg | rex_r << 3, 0, 1, 2, 3)])
            rex_x = index >> 3
            tail = bytes([rng.randrange(4) << 6 | (index & 7) << 3 | rm]) + tail
            rm = 4
        modrm = mod << 6 | reg << 3 | rm
        if need_aligned:
            flags |= 4
    else:
        while rm == 4 and not rex_b and row.modrm:
            rm = rng.randrange(8)
        modrm = 0xC0 | reg << 3 | (row.rm if row.rm >= 0 else rm)
    if row.modrm and row.digit < 0 and reg == 4 and not rex_r and row.handler not in ("test", "cmp"):
        rex_r = 1  # RSP as a destination would pull the stack away
    if row.handler.startswith("bt") and row.operands[1][0] == "G":
        small = reg | rex_r << 3
    vvvv = rng.choice([i for i in range(16) if i != 4])
    opcode = row.opcode
    if row.operands and row.operands[0][0] == "Z" and opcode & 7 == 4:
        rex_b = 1
    if row.handler == "xlat":
        flags |= 2
    if string:
        flags |= 1
    out = b""
    if row.vex:
        pp = {"NP": 0, "66": 1, "F3": 2, "F2": 3}[next(k for k, v in optable.PREFIXES.items() if v == row.prefix)]
        used = any(o[0] in "BH" for o in row.operands)
        length = row.length if row.length >= 0 else rng.randrange(2)
        b1 = (1 - rex_r) << 7 | (1 - rex_x) << 6 | (1 - rex_b) << 5 | row.map
        b2 = w << 7 | ((vvvv if used else 0) ^ 15) << 3 | length << 2 | pp
        out += bytes([0xC4, b1, b2, opcode])
    else:
        if lock:
            out += b"\xf0"
        if row.prefix in (3, 4):
            out += {3: b"\xf3", 4: b"\xf2"}[row.prefix]
        if p66:
            out = b"\x66" + out
        if "rep" in row.attributes:
            out += rng.choice([b"", b"\xf3", b"\xf2"] if row.handler.startswith(("cmps", "scas")) else [b"", b"\xf3"])
        rex = w << 3 | rex_r << 2 | rex_x << 1 | rex_b
        if rex or rng.random() < 0.3:
            out += bytes([0x40 | rex])
        out += {0: b"", 1: b"\x0f", 2: b"\x0f\x38", 3: b"\x0f\x3a"}[row.map] + bytes([opcode])
    if row.modrm:
        out += bytes([modrm]) + tail
    osize = (
        64 if w and not row.vex else 16 if (p66 and row.prefix != 2) or (p66 and optable.size_class(row) == "v") else 32
    )
    if "d64" in row.attributes:
        osize = 16 if p66 and not w else 64
    for o in row.operands:
        if o[0] == "I":
            size = {"b": 1, "ub": 1, "w": 2, "z": 2 if osize == 16 else 4, "v": osize // 8}[o[1:]]
            value = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.getrandbits(64), rng.getrandbits(5)])
            out += (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    undefined = sum(1 << optable.FLAGS.index(f) for f in row.undefined if f in optable.FLAGS)
    return struct.pack("<B15sBBBBB3x", len(out), out, undefined, base, index, small, flags)


def main() -> None:
    """Write records for every usable row, `COUNT` of each."""
    rng = random.Random(int(sys.argv[1]))
    host = set(Path("/proc/cpuinfo").read_text().split())
    for row in optable.load():
        if usable(row, host):
            for _ in range(int(sys.argv[2])):
                sys.stdout.buffer.write(encode(row, rng))


if __name__ == "__main__":
    main()
