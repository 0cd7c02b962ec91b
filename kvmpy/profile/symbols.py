# SPDX-License-Identifier: Apache-2.0
"""Names of guest addresses: from System.map, /proc/kallsyms, or the symbol table of an ELF file."""

from __future__ import annotations

import bisect
import re
import struct
from collections.abc import Iterable
from pathlib import Path

from kvmpy.errors import KvmpyError

LINE = re.compile(r"([0-9a-f]{8,16}) (\w) (\S+)(?:\s+\[(\S+)\])?")
SHT_SYMTAB = 2
STT_NOTYPE, STT_FUNC = 0, 2
FARTHEST = 1 << 20  # an address so many bytes behind a symbol is not of it


class SymbolsError(KvmpyError):
    """A file that has no symbols that can be read."""


class Symbols:
    """Symbols by address: `name_of(address)` is "function+0x12", or "" where nothing is near."""

    def __init__(self, symbols: Iterable[tuple[int, str]] = ()) -> None:
        # Of several names at one address the first in the file.
        by_address: dict[int, str] = {}
        for address, name in symbols:
            by_address.setdefault(address, name)
        self._addresses = sorted(by_address)
        self._names = [by_address[address] for address in self._addresses]

    def __len__(self) -> int:
        return len(self._addresses)

    @classmethod
    def read(cls, path: str | Path) -> Symbols:
        """From a file: ELF, System.map or kallsyms. Raises SymbolsError, OSError."""
        data = Path(path).read_bytes()
        found = cls(_elf(data, str(path)) if data.startswith(b"\x7fELF") else _text(data))
        if not len(found):
            raise SymbolsError(f"{path}: no symbols in it: neither System.map, kallsyms nor ELF with a symbol table")
        return found

    def find(self, address: int) -> tuple[str, int] | None:
        """The symbol that `address` is in, and how many bytes behind its start."""
        at = bisect.bisect(self._addresses, address) - 1
        if at < 0 or address - self._addresses[at] >= FARTHEST:
            return None
        return self._names[at], address - self._addresses[at]

    def name_of(self, address: int) -> str:
        """As `find()`, as text."""
        found = self.find(address)
        if found is None:
            return ""
        return f"{found[0]}+{found[1]:#x}" if found[1] else found[0]


def _text(data: bytes) -> Iterable[tuple[int, str]]:
    for line in data.decode(errors="replace").splitlines():
        match = LINE.match(line)
        if match is not None and match[2] not in "aU" and (address := int(match[1], 16)):
            yield address, f"{match[3]} [{match[4]}]" if match[4] else match[3]


def _elf(data: bytes, what: str) -> Iterable[tuple[int, str]]:
    """Functions and labels of a 64-bit ELF file's symbol table (gABI chapter 4)."""
    if len(data) < 64 or data[4] != 2:
        raise SymbolsError(f"{what}: symbols are read from 64-bit ELF files")
    start, size, count = struct.unpack_from("<Q", data, 0x28)[0], *struct.unpack_from("<HH", data, 0x3A)
    try:
        sections = [struct.unpack_from("<IIQQQQIIQQ", data, start + size * i) for i in range(count if start else 0)]
        for _, kind, _, _, offset, length, link, _, _, entry in sections:
            if kind != SHT_SYMTAB or entry < 24 or link >= len(sections):
                continue
            names, end = sections[link][4], min(sections[link][4] + sections[link][5], len(data))
            for at in range(offset, min(offset + length, len(data)) - 23, entry):
                name, info, _, section, value, _ = struct.unpack_from("<IBBHQQ", data, at)
                if section and value and info & 15 in (STT_NOTYPE, STT_FUNC) and names + name < end:
                    stop = data.find(b"\0", names + name, end)
                    if stop > names + name:
                        yield value, data[names + name : stop].decode(errors="replace")
    except (struct.error, OverflowError):
        raise SymbolsError(f"{what}: its section headers lead outside the file") from None
