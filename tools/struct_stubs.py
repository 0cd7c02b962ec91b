# SPDX-License-Identifier: Apache-2.0
"""Write kvmpy/_structs.pyi and kvmpy/_constants.pyi from the compiled modules.

    python tools/struct_stubs.py            writes the files
    python tools/struct_stubs.py --check    exits 1 if they are not up to date
"""

from __future__ import annotations

import sys
from pathlib import Path

from kvmpy import _constants, _structs

PACKAGE = Path(__file__).parent.parent / "kvmpy"

HEAD = "# SPDX-License-Identifier: Apache-2.0\n# Written by tools/struct_stubs.py from the compiled module.\n"

STRUCTS_HEAD = '''
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Generic, Self, TypeVar, final, overload

from _typeshed import ReadableBuffer
from typing_extensions import disjoint_base

_S = TypeVar("_S", bound=Struct)
_T = TypeVar("_T")

@final
class Layout:
    name: str
    origin: str
    size: int
    tail: bool
    fields: dict[str, Field]

@disjoint_base
class Field:
    name: str
    offset: int
    size: int
    alias: bool

@final
class IntField(Field):
    @overload
    def __get__(self, instance: None, owner: type[Struct] | None = None, /) -> Self: ...
    @overload
    def __get__(self, instance: Struct, owner: type[Struct] | None = None, /) -> int: ...
    def __set__(self, instance: Struct, value: int, /) -> None: ...

@final
class BytesField(Field):
    @overload
    def __get__(self, instance: None, owner: type[Struct] | None = None, /) -> Self: ...
    @overload
    def __get__(self, instance: Struct, owner: type[Struct] | None = None, /) -> bytes: ...
    def __set__(self, instance: Struct, value: ReadableBuffer, /) -> None: ...

@final
class StructField(Field, Generic[_S]):
    @overload
    def __get__(self, instance: None, owner: type[Struct] | None = None, /) -> Self: ...
    @overload
    def __get__(self, instance: Struct, owner: type[Struct] | None = None, /) -> _S: ...
    def __set__(self, instance: Struct, value: _S | Mapping[str, Any], /) -> None: ...

@final
class ArrayField(Field, Generic[_T]):
    @overload
    def __get__(self, instance: None, owner: type[Struct] | None = None, /) -> Self: ...
    @overload
    def __get__(self, instance: Struct, owner: type[Struct] | None = None, /) -> Array[_T]: ...
    def __set__(self, instance: Struct, value: Array[_T] | Sequence[_T], /) -> None: ...

@final
class Array(Generic[_T]):
    def __len__(self) -> int: ...
    @overload
    def __getitem__(self, key: int, /) -> _T: ...
    @overload
    def __getitem__(self, key: slice, /) -> list[_T]: ...
    def __setitem__(self, key: int, value: _T, /) -> None: ...
    def __iter__(self) -> Iterator[_T]: ...
    __hash__: ClassVar[None]  # type: ignore[assignment]

@disjoint_base
class Struct:
    layout: ClassVar[Layout]
    __match_args__: ClassVar[tuple[str, ...]]
    __hash__: ClassVar[None]  # type: ignore[assignment]
    def __init__(self, **fields: Any) -> None: ...
    def __bytes__(self) -> bytes: ...
    def __len__(self) -> int: ...
    def copy(self) -> Self: ...
    @classmethod
    def from_bytes(cls, data: ReadableBuffer) -> Self: ...
    def to_dict(self) -> dict[str, Any]: ...
    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Self: ...
    @property
    def tail(self) -> bytes: ...

def route_irqchip(gsi: int, irqchip: int, pin: int) -> IrqRoutingEntry: ...
def route_msi(gsi: int, address: int, data: int, devid: int | None = None) -> IrqRoutingEntry: ...
def route_hv_sint(gsi: int, vcpu: int, sint: int) -> IrqRoutingEntry: ...
def route_xen_evtchn(gsi: int, port: int, vcpu: int, priority: int = 0xFFFF_FFFF) -> IrqRoutingEntry: ...
'''


def structs() -> str:
    """The text of _structs.pyi."""
    lines = [HEAD + STRUCTS_HEAD]
    for cls in vars(_structs).values():
        if not isinstance(cls, type) or not issubclass(cls, _structs.Struct) or cls is _structs.Struct:
            continue
        lines.append(f"class {cls.__name__}(_structs.Struct):".replace("_structs.", ""))
        for name, field in cls.layout.fields.items():
            lines.append(f"    {name}: {annotation(cls, name, field)}")
        lines += initializer(cls)
    return "\n".join(lines)


def initializer(cls: type[_structs.Struct]) -> list[str]:
    """The keyword arguments that the class takes, so that a wrong name is found before it runs."""
    lines = ["    def __init__(", "        self,", "        *,"]
    for name, field in cls.layout.fields.items():
        lines.append(f"        {name}: {argument(cls, name, field)} = ...,")
    if cls.layout.tail:
        lines.append("        tail: ReadableBuffer = ...,")
    return [*lines, "    ) -> None: ...", ""]


def argument(cls: type[_structs.Struct], name: str, field: _structs.Field) -> str:
    """What can be assigned to a field."""
    value = getattr(cls(), name)
    if isinstance(field, _structs.IntField):
        return "int"
    if isinstance(field, _structs.BytesField):
        return "ReadableBuffer"
    if isinstance(field, _structs.StructField):
        return f"{type(value).__name__} | Mapping[str, Any]"
    return f"Sequence[{type(value[0]).__name__}]"


def annotation(cls: type[_structs.Struct], name: str, field: _structs.Field) -> str:
    """The stub type of a field."""
    kind = type(field).__name__
    value = getattr(cls(), name)
    if isinstance(field, _structs.StructField):
        return f"{kind}[{type(value).__name__}]"
    if isinstance(field, _structs.ArrayField):
        return f"{kind}[{type(value[0]).__name__}]"
    return kind


def constants() -> str:
    """The text of _constants.pyi."""
    lines = [HEAD, "from enum import IntEnum\n", "IOCTLS: dict[str, int]\n", "class Cap(IntEnum):"]
    lines += [f"    {cap.name} = {cap.value}" for cap in _constants.Cap]
    lines.append("")
    names = [name for name in vars(_constants) if name.startswith(("KVM_", "GUEST_MEMFD_"))]
    lines += [f"{name}: int" for name in names]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the stubs, or with --check compare them."""
    stale = []
    for path, text in ((PACKAGE / "_structs.pyi", structs()), (PACKAGE / "_constants.pyi", constants())):
        if "--check" not in sys.argv:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            stale.append(path.name)
    if stale:
        print(f"not up to date: {', '.join(stale)}; run python tools/struct_stubs.py")
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main())
