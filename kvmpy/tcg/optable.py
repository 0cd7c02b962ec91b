# SPDX-License-Identifier: Apache-2.0
"""The one table of x86 instructions, read from table/*.tab, and the C made from it.

`python optable.py <directory>` writes optable.h (feature and row numbers, handler declarations) and optable_data.h
(rows, handler pointers, the opcode index) for decode.c. Tests and the documentation read the same
rows through `load()`.

A line is `encoding | operands | handler | flags | attributes`:

encoding    SDM notation: `[NP|66|F3|F2] [0F|0F38|0F3A] XX [+r|+cc] [/r|/0../7] [mod=r|mod=m] [W0|W1]
            [rm=0..7]` or
            `VEX.{128|256|LIG|LZ}.{NP|66|F3|F2}.{0F|0F38|0F3A}.{W0|W1|WIG} XX ...`. A line
            without prefix matches any;
            `NP` matches only none. `x` in place of 128/256 (`VEX.x.`) is both lengths.
operands    comma separated, destination first; kind + size. A register takes micro-op slot d, s or x by its
            position;
            memory takes none; an immediate goes to `imm`. Fixed operands (AL, CL, 1) are part
            of the handler's meaning
            and are not written.
              E modrm r/m general register or memory   G modrm reg    R r/m, register only   M
              r/m, memory only
              Z register in the opcode   B VEX.vvvv general register   I immediate   J
              relative target   O moffs   A far pointer
              S segment register   C control register   D debug register   T x87 ST(i) of the r/m field
              V modrm reg vector   W r/m vector or memory   U r/m vector register only   H
              VEX.vvvv vector   L is4 vector (in imm bits 4-7)
              P modrm reg MMX      Q r/m MMX or memory      N r/m MMX register only    X
              memory with vector index (VSIB; u->index is the number)
            sizes: b w d q fixed; v 16/32/64; y 32/64 (REX.W); z immediate 16/32; x 128/256 by
            VEX.L; none: handler's business.
            Ib is sign-extended, Iub is not, Iv is up to 64 bits.
handler     NAME gives op_NAME_LETTERSSIZE: a letter per operand (r register, m memory, i immediate; J, A
            give none), the size when
            the first sized operand is b v y or x. `add | Ev,Gv` gives op_add_rr32, op_add_mr32,
            ... `-`: not implemented, raises #UD.
            `%c` is the condition (o no b ae z nz be a s ns p np l ge le g), with +cc.
flags       w=written and defined, u=written but undefined, r=read, of o s z a p c (and d i t ...: not
            tracked). `-`: none. Undefined flags that the handler leaves alone (BSF, BT) are read too, or an
            instruction before it would make none, and the result would depend on where a block begins.
attributes  words: gates (lower-case CPUID feature names of FEATURES; class x87 mmx sse avx for the CR0/CR4
            checks) and
            i64 o64 d64 f64 lock nf end link1 link2 fault priv pe rep nop0 imm2 rdi (memory at
            DS:rDI beside the operands) sz=16,32 jit=CLASS vec=SIZE... undoc count (flags are read only
            by a shift whose immediate is 0)
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
FLAGS = "oszapc"
CONDITIONS = ("o", "no", "b", "ae", "z", "nz", "be", "a", "s", "ns", "p", "np", "l", "ge", "le", "g")
# CPUID features an instruction may need, in the order of the bits of cpu.features.
FEATURES = [
    "cmov",
    "cx8",
    "cx16",
    "fxsr",
    "mmx",
    "sse",
    "sse2",
    "sse3",
    "ssse3",
    "sse41",
    "sse42",
    "popcnt",
    "movbe",
    "aes",
    "pclmul",
    "sha",
    "avx",
    "avx2",
    "fma",
    "f16c",
    "bmi1",
    "bmi2",
    "adx",
    "lzcnt",
    "rdrand",
    "rdseed",
    "fsgsbase",
    "xsave",
    "xsaveopt",
    "xsavec",
    "xsaves",
    "clflush",
    "clflushopt",
    "clwb",
    "rdtscp",
    "rdpid",
    "invpcid",
    "smap",
    "monitor",
    "syscall",
    "sysenter",
    "lahf",
    "pku",
    "fpu",
    "tsc",
    "msr",
    "longmode",
    "nx",
    "prefetchw",
    "umip",
    "smep",
    "pcid",
    "pge",
    "gbpages",
    "serialize",
    "vmcall",
    "mwaitx",
    "erms",
    "fsrm",
    "vaes",
    "vpclmul",
    "la57",
    "xgetbv1",
    "vme",
]
CLASSES = ("x87", "mmxclass", "sseclass", "avxclass")
ATTRIBUTES = (
    "i64 o64 d64 f64 lock nf end link1 link2 fault priv pe rep nop0 imm2 rdi undoc vexint count " + " ".join(CLASSES)
).split()
# How the JIT makes host code of a row (jit_insn.c, jit_block.c); none: it calls the interpreter's handler.
#   copy     the same opcode on host registers; a memory operand in first place is read and written,
#            copyr: only read, copyw: only written; elsewhere it is read
#   fixed    the same opcode, operands are implied
#   movs     the same opcode within a page each, stos: within one
#   x87      the same opcode on the host's x87 unit; a memory operand is read, x87w: written; x87c: a control
#            instruction, which leaves the pointers to the last instruction alone and writes memory, if any
#   x87cw    FLDCW
JIT_CLASSES = (
    *("none", "copy", "copyr", "copyw", "fixed", "lea", "push", "pop", "leave", "nop", "xchgax", "div", "bitreg"),
    *("movs", "stos", "pushf", "cli", "swapgs"),
    *("jcc", "jmp", "call", "jmpind", "callind", "ret", "loop", "vec", "vzeroupper"),
    *("x87", "x87w", "x87c", "x87cw"),
)
# vec=SIZE and letters, for rows with jit=vec and x87 rows with memory. SIZE: bytes of the memory operand; x all of the
# vector, h q e a half, a quarter, an eighth of it; y by REX.W.
VEC_SIZES = {"1": 1, "2": 2, "4": 4, "8": 8, "10": 10, "16": 16, "x": 32, "h": 33, "q": 34, "e": 35, "y": 36}
VEC_LETTERS = {
    "a": 1,  # in memory it must be aligned
    "n": 2,  # the destination is not read
    "m": 4,  # nor is it when the source is memory
    "r": 8,  # a VEX form that reads its destination
    "f": 16,  # may raise floating-point exceptions
    "c": 32,  # makes flags or a general register only: the first operand is a source
    "0": 64,  # reads XMM0
}
MAPS = {"": 0, "0F": 1, "0F38": 2, "0F3A": 3}
PREFIXES = {"": 0, "NP": 1, "66": 2, "F3": 3, "F2": 4}
KINDS = "EGRMZBIJOASCDTVWUHLPQNX"
SIZES = ("", "b", "w", "d", "q", "v", "y", "z", "x", "ub")
MEMORY_KINDS = set("EWQMXO")
REGISTER_KINDS = set("EGRZBSCDTVWUHLPQN")


@dataclass(frozen=True)
class Row:
    """One instruction form: what it looks like in memory and which handlers execute it."""

    encoding: str
    mnemonic: str
    vex: bool
    map: int
    prefix: int
    opcode: int
    digit: int  # modrm.reg must be this; -1: any
    mod: str  # "r", "m", "R" (a register whatever mod says: MOV CR) or "": any
    rm: int  # modrm.rm must be this; -1: any
    w: int  # 0, 1 or -1
    length: int  # VEX.L: 0, 1 or -1
    modrm: bool
    operands: tuple[str, ...]
    handler: str
    written: str
    undefined: str
    read: str
    attributes: frozenset[str] = frozenset()
    features: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    jit: str = "none"
    vec: tuple[int, int] = (0, 0)  # codes of VEC_SIZES and VEC_LETTERS
    source: str = field(default="", compare=False)

    @property
    def implemented(self) -> bool:
        return self.handler != "-"


def _kind(operand: str) -> tuple[str, str]:
    kind, size = operand[0], operand[1:]
    if kind not in KINDS or size not in SIZES:
        raise ValueError(f"unknown operand {operand!r}")
    return kind, size


def _parse(line: str, source: str) -> list[Row]:
    encoding, operands, handler, flags, attributes = (part.strip() for part in line.split("|"))
    words = encoding.split()
    vex = words[0].startswith("VEX.")
    lengths, w = [-1], -1
    opmap = prefix = ""
    if vex:
        _, l_word, prefix, opmap, w_word = words.pop(0).split(".")
        lengths = {"128": [0], "256": [1], "LIG": [-1], "LZ": [0], "x": [0, 1]}[l_word]
        w = {"W0": 0, "W1": 1, "WIG": -1}[w_word]
    else:
        if (
            words[0] in ("NP", "66", "F3", "F2")
            and len(words) > 1
            and re.fullmatch(r"0F(38|3A)?|[0-9A-F]{2}", words[1])
        ):
            prefix = words.pop(0)
        if words[0] in ("0F", "0F38", "0F3A") and len(words) > 1 and re.fullmatch(r"[0-9A-F]{2}(\+\w+)?", words[1]):
            opmap = words.pop(0)
    plus = ""
    code = words.pop(0)
    if "+" in code:
        code, plus = code.split("+")
    opcode = int(code, 16)
    digit, mod, rm, modrm = -1, "", -1, False
    for word in words:
        if word.startswith("/"):
            modrm = True
            digit = -1 if word == "/r" else int(word[1])
        elif word.startswith("mod="):
            mod = word[4:]
        elif word.startswith("rm="):
            rm = int(word[3:])
        elif word in ("W0", "W1"):
            w = int(word[1])
        elif word in ("ib", "iw", "id"):
            pass
        else:
            raise ValueError(f"unknown encoding word {word!r}")
    ops = tuple(o.strip() for o in operands.split(",")) if operands not in ("", "-") else ()
    for o in ops:
        kind, _ = _kind(o)
        if kind in "RUN":
            mod = "r" if o != "R" else "R"
        if kind in "MX":
            mod = "m"
        modrm = modrm or kind in "EGRMSCDTVWUPQNX"
    fl = {"w": "", "u": "", "r": ""}
    for word in flags.split():
        if word != "-":
            key, value = word.split("=")
            fl[key] = value
    attrs, feats, jit, vec = set(), [], "none", (0, 0)
    sizes: tuple[int, ...] = ()
    for word in attributes.split():
        if word.startswith("sz="):
            sizes = tuple(int(s) for s in word[3:].split(","))
        elif word.startswith("jit="):
            jit = word[4:]
            if jit not in JIT_CLASSES:
                raise ValueError(f"unknown jit class {jit!r}")
        elif word.startswith("vec="):
            found = re.fullmatch(r"vec=(\d+|[xhqey])(\D*0?)", word)
            if not found:
                raise ValueError(f"bad {word!r}")
            vec = VEC_SIZES[found[1]], sum(VEC_LETTERS[letter] for letter in found[2])
        elif word in ATTRIBUTES:
            attrs.add(word)
        elif word in FEATURES:
            feats.append(word)
        else:
            raise ValueError(f"unknown attribute {word!r}")
    if len(feats) > 3:
        raise ValueError("at most three features")
    rows = []
    for length in lengths:
        for n in range({"": 1, "r": 8, "cc": 16}[plus]):
            name = handler.replace("%c", CONDITIONS[n]) if plus == "cc" else handler
            read = fl["r"]
            if plus == "cc":
                read = {0: "o", 1: "c", 2: "z", 3: "cz", 4: "s", 5: "p", 6: "so", 7: "zso"}[n >> 1]
            rows.append(
                Row(encoding, name, vex, MAPS[opmap], PREFIXES[prefix], opcode + n, digit, mod, rm, w, length, modrm,
                    ops, name, fl["w"], fl["u"], read, frozenset(attrs), tuple(feats), sizes, jit, vec, source)
            )  # fmt: skip
    return rows


def load(directory: Path | None = None) -> list[Row]:
    """All rows of table/*.tab in file order."""
    rows: list[Row] = []
    for path in sorted((directory or HERE / "table").glob("*.tab")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            try:
                rows += _parse(line, f"{path.name}:{number}")
            except (ValueError, KeyError) as e:
                raise ValueError(f"{path.name}:{number}: {line!r}: {e}") from e
    return rows


def size_class(row: Row) -> str:
    """Which operand decides the size suffix: "v", "y", "x", "8" or ""."""
    for operand in row.operands:
        _, size = _kind(operand)
        if size in ("v", "y", "x"):
            return size
        if size == "z" and operand[0] != "J":
            return "v"
        if size == "b" and operand[0] in "EGZRMO":
            return "8"
    return "v" if row.sizes else ""


def handler_names(row: Row) -> list[list[list[str]]]:
    """names[size index][memory?][variant]: variant 0 plain, 1 flags dead, 2 LOCK; "" where there is none."""
    kind = size_class(row)
    sizes = {
        "v": ["16", "32", "64"],
        "y": ["", "32", "64"],
        "x": ["128", "256", ""],
        "8": ["8", "", ""],
        "": ["-", "", ""],
    }[kind]
    names = [[["", "", ""], ["", "", ""]] for _ in range(3)]
    if not row.implemented:
        return names
    for i, size in enumerate(sizes):
        if not size or (row.sizes and int(size) not in row.sizes) or (size == "64" and "i64" in row.attributes):
            continue
        if kind == "x" and row.length >= 0 and i != row.length:
            continue
        for memory in (0, 1):
            letters = ""
            has_rm = False
            for operand in row.operands:
                k = operand[0]
                if k in MEMORY_KINDS and k not in "MXO":
                    has_rm = True
                if k in "MXO" or (k in MEMORY_KINDS and memory):
                    letters += "m"
                elif k in REGISTER_KINDS:
                    letters += "r"
                elif k == "I":
                    letters += "i"
            always = any(o[0] in "MXO" for o in row.operands)
            if (memory and not (has_rm or always)) or (not memory and always):
                continue
            if (memory and row.mod in ("r", "R")) or (not memory and row.mod == "m" and has_rm):
                continue
            suffix = letters + ("" if size == "-" else size)
            base = f"op_{row.handler}" + (f"_{suffix}" if suffix else "")
            names[i][memory][0] = base
            if "nf" in row.attributes:
                names[i][memory][1] = base + "_nf"
            if "lock" in row.attributes and memory:
                names[i][memory][2] = base + "_lock"
    return names


def flag_mask(flags: str) -> int:
    return sum(1 << FLAGS.index(f) for f in flags if f in FLAGS)


def in_table_order(rows: list[Row]) -> list[Row]:
    """As the C table has them: by opcode; a row without a prefix of its own comes after those with one."""
    return sorted(rows, key=lambda row: (row.vex, row.map, row.opcode, row.prefix in (0, 1)))


def generate(rows: list[Row]) -> tuple[str, str]:
    """The text of optable.h and optable_data.h."""
    decls: dict[str, None] = {}
    bodies: list[str] = []
    pool: dict[tuple[str, ...], int] = {}
    pool_text: list[str] = []
    first: dict[int, int] = {}
    count: dict[int, int] = {}
    for position, row in enumerate(in_table_order(rows)):
        names = handler_names(row)
        flat = tuple(n for by_size in names for by_mem in by_size for n in by_mem)
        for n in flat:
            if n:
                decls[n] = None
        if flat not in pool:
            pool[flat] = len(pool)
            pool_text.append("    {" + ", ".join(n or "0" for n in flat) + "},")
        key = (row.map + 4 * row.vex) * 256 + row.opcode
        first.setdefault(key, position)
        count[key] = count.get(key, 0) + 1
        attrs = " | ".join(f"OPA_{a.upper()}" for a in sorted(row.attributes)) or "0"
        feats = [FEATURES.index(f) + 1 for f in row.features] + [0, 0, 0]
        kinds = []
        for operand in row.operands:
            k, s = _kind(operand)
            kinds.append(f"OPK('{k}', {SIZES.index(s)})")
        kinds += ["0"] * (4 - len(kinds))
        mod = {"": 0, "r": 1, "m": 2, "R": 3}[row.mod]
        size = {"v": 1, "y": 2, "x": 3, "8": 4, "": 0}[size_class(row)]
        fields = [f'"{row.mnemonic}"', row.prefix, row.digit, mod, row.rm, row.w, row.length, int(row.modrm), size]
        fields += ["{" + ", ".join(kinds) + "}", "{" + ", ".join(map(str, feats[:3])) + "}"]
        fields += [flag_mask(row.written) | flag_mask(row.undefined), flag_mask(row.read), pool[flat], attrs]
        fields += [f"JIT_{row.jit.upper()}", *row.vec]
        bodies.append("    {" + ", ".join(map(str, fields)) + "},")
    header = [
        "/* SPDX-License-Identifier: Apache-2.0 */",
        "/* Made by optable.py from the files in table/. */",
        "#ifndef KVMPY_TCG_OPTABLE_H",
        "#define KVMPY_TCG_OPTABLE_H",
        '#include "uop.h"',
        "",
    ]
    header.append("enum { " + ", ".join(f"FEAT_{f.upper()}" for f in FEATURES) + ", FEAT_COUNT };")
    header.append("enum { " + ", ".join(f"OPA_{a.upper()} = 1 << {i}" for i, a in enumerate(ATTRIBUTES)) + " };")
    header.append("enum { " + ", ".join(f"FLAG_{f.upper()} = {1 << i}" for i, f in enumerate(FLAGS)) + " };")
    header.append("enum { " + ", ".join(f"JIT_{j.upper()}" for j in JIT_CLASSES) + " };")
    header.append(f"#define OPROW_COUNT {len(rows)}")
    for name in decls:
        header.append(f"OP_DECL({name[3:]});")
    header += ["#endif", ""]
    data = [
        "/* SPDX-License-Identifier: Apache-2.0 */",
        "/* Made by optable.py from the files in table/; included by decode.c only. */",
    ]
    data.append(f"static const uop_fn handler_pool[{len(pool)}][18] = {{")
    data += [*pool_text, "};", "static const struct oprow oprows[OPROW_COUNT] = {"]
    data += [*bodies, "};", "static const struct { uint16_t first, count; } opindex[8 * 256] = {"]
    data += [f"    [{key}] = {{{first[key]}, {count[key]}}}," for key in sorted(first)]
    data += ["};", ""]
    return "\n".join(header), "\n".join(data)


def missing(rows: list[Row]) -> list[str]:
    """Encodings that are known but raise #UD because nobody has written them yet."""
    return [f"{row.encoding} {','.join(row.operands)}" for row in rows if not row.implemented]


def main(directory: str) -> None:
    header, data = generate(load())
    out = Path(directory)
    for name, text in (("optable.h", header), ("optable_data.h", data)):
        path = out / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(HERE))
