# SPDX-License-Identifier: Apache-2.0
"""Kernel modules for an initramfs: which ones, what they need, and the tables that modprobe(8) reads.

Packages hold no `modules.dep`; depmod(8) makes it on installation. Here it is made from what every module
says of itself in its `.modinfo` section (NUL-terminated `key=value` strings; Linux
include/linux/moduleparam.h).
A module is an ELF64 relocatable file and, like the rest of a package, is not trusted.
"""

from __future__ import annotations

import lzma
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from kvmpy.guests.errors import PackageError

MAX_MODULE = 64 << 20
MAX_CHAIN = 64
SECTION_HEADER = struct.Struct("<IIQQQQIIQQ")


@dataclass(frozen=True, slots=True)
class Module:
    """One module: `path` below lib/modules/VERSION, its plain ELF bytes, and what it says of itself."""

    path: str
    data: bytes
    depends: tuple[str, ...]
    aliases: tuple[str, ...]

    @property
    def name(self) -> str:
        return module_name(self.path)


def module_name(path: str) -> str:
    """The module's name, as lsmod(8) prints it: of "kernel/x/virtio-rng.ko.xz" it is "virtio_rng"."""
    return PurePosixPath(path).name.partition(".ko")[0].replace("-", "_")


def load(root: Path, wanted: Iterable[str]) -> list[Module]:
    """Load modules and all they depend on.

    Arguments: root, an unpacked lib/modules/VERSION; wanted, names (those that are built into the kernel, or
    not built at all, are left out).
    Returns: the modules, each after the ones it needs. Errors: PackageError for a damaged or lacking one.
    """
    files = {module_name(path.name): path for path in sorted(root.glob("**/*.ko*")) if path.is_file()}
    done: dict[str, Module] = {}

    def visit(name: str, chain: tuple[str, ...]) -> None:
        if name in done:
            return
        if name in chain or len(chain) > MAX_CHAIN:
            path = " -> ".join((*chain, name))
            raise PackageError(f"modules need each other in a circle, or too deeply: {path}")
        if name not in files:
            raise PackageError(f"module {chain[-1]} needs {name}, which the package lacks")
        module = _read(root, files[name])
        for need in module.depends:
            visit(need, (*chain, name))
        done[name] = module

    for name in wanted:
        if name in files:
            visit(name, ())
    return list(done.values())


def tables(modules: Iterable[Module]) -> Mapping[str, bytes]:
    """Make the files that modprobe(8) needs beside the modules: modules.dep and modules.alias (depmod(8)).

    `modules` come in the order of `load()`: each after the ones it needs.
    """
    modules = list(modules)
    needs: dict[str, set[str]] = {}
    dep = []
    for position, module in enumerate(modules):
        needs[module.name] = set(module.depends).union(*(needs[need] for need in module.depends))
        # modprobe loads the last of the line first.
        line = [m for m in reversed(modules[:position]) if m.name in needs[module.name]]
        dep.append(" ".join([f"{_plain_path(module.path)}:", *(_plain_path(m.path) for m in line)]))
    alias = [f"alias {alias} {module.name}" for module in modules for alias in module.aliases]
    return {
        "modules.dep": "".join(line + "\n" for line in dep).encode(),
        "modules.alias": "".join(line + "\n" for line in alias).encode(),
    }


def files(modules: Iterable[Module]) -> Mapping[str, bytes]:
    """The modules' files, unpacked, and their tables, by path below lib/modules/VERSION."""
    modules = list(modules)
    return {_plain_path(module.path): module.data for module in modules} | dict(tables(modules))


def _plain_path(path: str) -> str:
    return path.partition(".ko")[0] + ".ko"


def _read(root: Path, path: Path) -> Module:
    data = path.read_bytes()
    if path.suffix == ".xz":
        try:
            codec = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_MODULE)
            data = codec.decompress(data, MAX_MODULE)
        except lzma.LZMAError as error:
            raise PackageError(f"{path.name}: {error}") from error
        if not codec.eof:
            raise PackageError(f"{path.name}: cut short, or larger than {MAX_MODULE} bytes unpacked")
    elif path.suffix != ".ko":
        raise PackageError(f"{path.name}: modules packed with {path.suffix} are not read")
    info: dict[str, list[str]] = {}
    for item in modinfo(data, path.name).split(b"\0"):
        key, equals, value = item.partition(b"=")
        if equals:
            info.setdefault(key.decode("ascii", "replace"), []).append(value.decode("utf-8", "replace"))
    depends = [name.replace("-", "_") for text in info.get("depends", []) for name in text.split(",") if name]
    return Module(str(path.relative_to(root)), data, tuple(depends), tuple(info.get("alias", [])))


def modinfo(elf: bytes, name: str = "module") -> bytes:
    """The raw .modinfo section of a module. Errors: PackageError. Source: ELF-64 object file format, 1.5."""
    if elf[:6] != b"\x7fELF\x02\x01" or len(elf) < 64:
        raise PackageError(f"{name}: not a 64-bit little-endian ELF file")
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    if size != SECTION_HEADER.size or not names < count or table + size * count > len(elf):
        raise PackageError(f"{name}: section table of {count} entries at {table:#x} in {len(elf)} bytes")

    def section(index: int) -> tuple[int, bytes]:
        entry = SECTION_HEADER.unpack_from(elf, table + index * size)
        start, length = entry[4], entry[5]
        if entry[1] == 8:  # SHT_NOBITS has no bytes in the file
            return entry[0], b""
        if start + length > len(elf):
            raise PackageError(f"{name}: section {index} at {start:#x} runs past the end")
        return entry[0], elf[start : start + length]

    strings = section(names)[1]
    for index in range(count):
        offset, data = section(index)
        if strings[offset : offset + 9] == b".modinfo\0":
            return data
    raise PackageError(f"{name}: no .modinfo section")
