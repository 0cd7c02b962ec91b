# SPDX-License-Identifier: Apache-2.0
"""A room imports only from lower levels (docs/design.md, "The rooms")."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "kvmpy"

LEVELS = {
    "errors": 0, "clock": 0, "arch": 0, "_version": 0,
    "disasm": 1,
    "memory": 2, "bus": 2, "irq": 2, "chardev": 2, "block": 2, "net": 2, "tcg": 2,
    "engines": 3, "vcpu": 3,
    "devices": 3, "vm": 4, "pci": 4,
    "boot": 5, "virtio": 5,
    "machine": 6,
    "guests": 7, "doctor": 7, "aio": 7, "snapshot": 7, "gdb": 7, "control": 7, "profile": 7,
    "cli": 8, "testing": 8, "__main__": 9,
    "": 9,
}  # fmt: skip

KVM_LAYER = {p.stem for p in PACKAGE.glob("_*.pyx")} | {"_linux_kvm"}
# One room in several files, all of level 1: constants, structures, exits, handles.
LEVELS |= dict.fromkeys(KVM_LAYER, 1)


def room_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    name = relative.parts[0] if len(relative.parts) > 1 else relative.stem
    return "" if name == "__init__" else name.removesuffix(".pyx")


def imports_of(path: Path) -> set[str]:
    """The rooms that a module imports or cimports, wherever in the file (lazy imports count too)."""
    text = path.read_text()
    if path.suffix == ".pyx":
        found = re.findall(r"^\s*(?:from|cimport|import)\s+kvmpy\.(\w+)", text, re.M)
        found += re.findall(r"^\s*from\s+kvmpy\s+c?import\s+(\w+)", text, re.M)
        return set(found)
    rooms = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            if module == "kvmpy":
                rooms |= {alias.name for alias in node.names} - {"__version__"}
            elif module.startswith("kvmpy."):
                rooms.add(module.split(".")[1])
        elif isinstance(node, ast.Import):
            rooms |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("kvmpy.")}
    return rooms


MODULES = sorted(p for p in PACKAGE.rglob("*") if p.suffix in (".py", ".pyx"))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_imports_only_from_lower_levels(path):
    room = room_of(path)
    assert room in LEVELS, f"{room} has no level: add it to docs/design.md and here"
    for other in imports_of(path) - {room}:
        assert other in LEVELS, f"{path.name} imports kvmpy.{other}, which has no level"
        allowed = LEVELS[other] < LEVELS[room] or {room, other} <= KVM_LAYER
        assert allowed, f"{room} (level {LEVELS[room]}) imports {other} (level {LEVELS[other]})"


def test_every_file_names_its_licence():
    sources = [p for p in PACKAGE.rglob("*") if p.suffix in (".py", ".pyx", ".pxd", ".pyi", ".h")]
    missing = [str(p) for p in sources if "SPDX-License-Identifier: Apache-2.0" not in p.read_text()[:200]]
    assert missing == []
