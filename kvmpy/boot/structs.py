# SPDX-License-Identifier: Apache-2.0
"""Packed little-endian C structures of boot protocols: declared once, read with bounds, written by name."""

from __future__ import annotations

import struct
from collections import namedtuple
from typing import Any

from kvmpy.errors import BootError

_CODES = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q"}


class Layout:
    """A structure: `Layout("struct x", "u32 magic; u8 pad[12]; u64 entry")`.

    Types are u8, u16, u32, u64; `u8 name[n]` is `n` raw bytes. Fields follow each other without padding.
    """

    def __init__(self, name: str, fields: str) -> None:
        self.name = name
        codes = "<"
        self.offsets: dict[str, int] = {}
        for declaration in fields.split(";"):
            kind, _, field = declaration.strip().partition(" ")
            field, _, count = field.strip().partition("[")
            self.offsets[field] = struct.calcsize(codes)
            codes += f"{int(count.rstrip(']'))}s" if count else _CODES[kind]
        self._codec = struct.Struct(codes)
        self.size = self._codec.size
        self._tuple: Any = namedtuple("_tuple", list(self.offsets))  # type: ignore[misc]
        self._empty = {
            name: b"" if code == "s" else 0 for name, code in zip(self.offsets, _kinds(codes), strict=True)
        }

    def unpack(self, data: bytes | memoryview, offset: int, what: str) -> Any:
        """The structure at `offset` of `data` as a named tuple; BootError when it goes past the end."""
        if not 0 <= offset <= len(data) - self.size:
            raise BootError(
                f"{what}: {self.name} of {self.size} bytes at offset {offset:#x} goes past the "
                f"file's {len(data):#x} bytes"
            )
        return self._tuple._make(self._codec.unpack_from(data, offset))

    def pack(self, **values: int | bytes) -> bytes:
        """The bytes of the structure; fields that are not named are zero."""
        if unknown := values.keys() - self.offsets.keys():
            raise TypeError(f"{self.name} has no field {', '.join(sorted(unknown))}")
        return self._codec.pack(*(self._empty | values).values())


def _kinds(codes: str) -> list[str]:
    return [c for c in codes if c.isalpha()]
