# SPDX-License-Identifier: Apache-2.0
"""C structures over guest memory, parsed by cffi (ABI mode: no compiler).

    info = memory.view(0x6000, "struct hvm_start_info")      # or a structure of your own:
    TABLES = Definitions("struct point { uint16_t x, y; };")
    point = memory.view(0x8000, "struct point", TABLES)
    point.x = 7

A raw cffi pointer into a structure does not keep the memory alive (only the object that `from_buffer`
returned does), so what users get are small objects that hold both. cffi is imported by the first view.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from kvmpy.memory import bootstructs

if TYPE_CHECKING:
    from typing_extensions import Buffer

Note = Callable[[int, int], object]  # note(offset in the whole view, size): these bytes were written


class Definitions:
    """Declarations of C structures, with the types of <stdint.h>.

    text: C, as cffi's `cdef` takes it; parsed at first use. packed: no padding, as in firmware tables and
    boot protocols; False for structures laid out as C does.
    """

    def __init__(self, *text: str, packed: bool = True) -> None:
        self._text = text
        self._packed = packed
        self._ffi: Any = None
        self._lock = threading.Lock()

    @property
    def ffi(self) -> Any:
        """The cffi FFI object that knows these types."""
        with self._lock:
            if self._ffi is None:
                import cffi

                ffi = cffi.FFI()
                for text in self._text:
                    ffi.cdef(text, packed=self._packed)
                self._ffi = ffi
            return self._ffi

    def sizeof(self, name: str) -> int:
        """Bytes of the type `name`, e.g. "struct boot_params". Raises ValueError for one not declared."""
        return int(self.ffi.sizeof(self._type(name)))

    def offsetof(self, name: str, field: str) -> int:
        """Where `field` begins in the structure. Raises ValueError."""
        try:
            return int(self.ffi.offsetof(self._type(name), field))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{name} has no field {field!r}") from error

    def new(self, name: str, data: bytes = b"") -> StructView | ArrayView:
        """A structure of its own that starts as `data` and then zeros; `bytes(x)` gives it back."""
        size = self.sizeof(name)
        if len(data) > size:
            raise ValueError(f"{len(data)} bytes do not fit in {name} of {size} bytes")
        return self.view(name, bytearray(data.ljust(size, b"\0")), _nobody)

    def view(self, name: str, buffer: Buffer, note: Note | None = None) -> StructView | ArrayView:
        """The bytes of `buffer` seen as a structure or an array; a read-only buffer gives a read-only view.

        note(offset, size) is called after each change. Raises ValueError when the buffer is too short.
        """
        ffi, ctype = self.ffi, self._type(name)
        with memoryview(buffer) as check:
            if check.nbytes < ffi.sizeof(ctype):
                raise ValueError(f"{name} has {ffi.sizeof(ctype)} bytes, the buffer only {check.nbytes}")
            note = None if check.readonly else note or _nobody
        # The owner holds the buffer, and with it the mapping, until the last view of it is gone.
        owner = ffi.from_buffer(buffer)
        cdata = ffi.cast(ffi.getctype(ctype, "*"), owner)[0]
        origin = _Origin(ffi, owner, int(ffi.cast("uintptr_t", owner)), note)
        view = _wrap(origin, cdata)
        assert isinstance(view, StructView | ArrayView)
        return view

    def _type(self, name: str) -> Any:
        import cffi

        ffi = self.ffi
        try:
            ctype = ffi.typeof(name)
            ffi.sizeof(ctype)
        except (cffi.CDefError, ValueError) as error:
            raise ValueError(f"{name!r} is not a declared C type of known size: {error}") from error
        if ctype.kind not in ("struct", "union", "array"):
            raise ValueError(f"{name!r} is a {ctype.kind} type, not a structure or an array")
        return ctype


def _nobody(offset: int, size: int) -> None:
    pass


class _Origin:
    """What all views of one piece of memory share."""

    __slots__ = ("base", "ffi", "note", "owner")

    def __init__(self, ffi: Any, owner: Any, base: int, note: Note | None) -> None:
        self.ffi = ffi
        self.owner = owner
        self.base = base
        self.note = note  # None: read-only

    def check_writable(self) -> None:
        if self.note is None:
            raise TypeError("this memory is read-only")

    def changed(self, cdata: Any) -> None:
        if self.note is not None:
            address = int(self.ffi.cast("uintptr_t", self.ffi.addressof(cdata)))
            self.note(address - self.base, self.ffi.sizeof(cdata))


class StructView:
    """A structure in memory: its fields are attributes. `bytes(x)` copies it, `fields()` gives a dict."""

    __slots__ = ("_cdata", "_origin")

    _cdata: Any
    _origin: _Origin

    def __init__(self, origin: _Origin, cdata: Any) -> None:
        object.__setattr__(self, "_origin", origin)
        object.__setattr__(self, "_cdata", cdata)

    def __getattr__(self, name: str) -> Any:
        return _wrap(self._origin, getattr(self._cdata, name))

    def __setattr__(self, name: str, value: Any) -> None:
        self._origin.check_writable()
        current = getattr(self._cdata, name)
        setattr(self._cdata, name, _unwrap(self._origin.ffi, value, current))
        self._origin.changed(self._cdata)

    def __bytes__(self) -> bytes:
        return bytes(self._origin.ffi.buffer(self._origin.ffi.addressof(self._cdata)))

    def __len__(self) -> int:
        return int(self._origin.ffi.sizeof(self._cdata))

    def __dir__(self) -> list[str]:
        return [name for name, _ in self._origin.ffi.typeof(self._cdata).fields]

    def fields(self) -> dict[str, Any]:
        """A copy as plain values: numbers, bytes (of byte arrays), lists and dicts."""
        return {name: _plain(getattr(self, name)) for name in dir(self)}

    def __eq__(self, other: object) -> bool:
        return _same(self, other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        inside = ", ".join(f"{name}={value:#x}" if isinstance(value, int) else f"{name}={value!r}"
                           for name, value in self.fields().items())
        return f"<{self._origin.ffi.typeof(self._cdata).cname} {inside}>"


class ArrayView:
    """An array in memory: index it, iterate it, `bytes(x)` copies it."""

    __slots__ = ("_cdata", "_origin")

    def __init__(self, origin: _Origin, cdata: Any) -> None:
        self._origin = origin
        self._cdata = cdata

    def __len__(self) -> int:
        return len(self._cdata)

    def __getitem__(self, index: int) -> Any:
        return _wrap(self._origin, self._cdata[self._index(index)])

    def __setitem__(self, index: int, value: Any) -> None:
        self._origin.check_writable()
        index = self._index(index)
        self._cdata[index] = _unwrap(self._origin.ffi, value, self._cdata[index])
        self._origin.changed(self._cdata)

    def _index(self, index: int) -> int:
        # cffi checks the upper bound itself, but not a negative index's meaning.
        count = len(self._cdata)
        if not -count <= index < count:
            raise IndexError(f"index {index} of {count}")
        return index % count

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __bytes__(self) -> bytes:
        return bytes(self._origin.ffi.buffer(self._cdata))

    def __eq__(self, other: object) -> bool:
        return _same(self, other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{self._origin.ffi.typeof(self._cdata).cname} {_plain(self)!r}>"


def _wrap(origin: _Origin, value: Any) -> Any:
    ffi = origin.ffi
    if not isinstance(value, ffi.CData):
        return value
    kind = ffi.typeof(value).kind
    if kind in ("struct", "union"):
        return StructView(origin, value)
    if kind == "array":
        return ArrayView(origin, value)
    if kind == "pointer":
        return int(ffi.cast("uintptr_t", value))  # the guest's pointer: never to be followed here
    return value


def _unwrap(ffi: Any, value: Any, current: Any) -> Any:
    """`value` as cffi wants it in the place of `current`."""
    if not isinstance(current, ffi.CData):
        return value
    ctype = ffi.typeof(current)
    if ctype.kind == "pointer":
        return ffi.cast(ctype, value)
    if isinstance(value, StructView | ArrayView):
        value = bytes(value)
    if isinstance(value, bytes | bytearray | memoryview):
        size = ffi.sizeof(current)
        if len(value) > size:
            raise ValueError(f"{len(value)} bytes do not fit in {ctype.cname} of {size} bytes")
        fresh = ffi.new(ffi.getctype(ctype, "*"))
        ffi.memmove(fresh, bytes(value), len(value))
        return fresh[0] if ctype.kind != "array" else list(fresh[0])
    return value


def _same(view: StructView | ArrayView, other: object) -> bool:
    return isinstance(other, StructView | ArrayView | bytes) and bytes(view) == bytes(other)


def _plain(value: Any) -> Any:
    if isinstance(value, StructView):
        return value.fields()
    if isinstance(value, ArrayView):
        if value._origin.ffi.sizeof(value._origin.ffi.typeof(value._cdata).item) == 1:
            return bytes(value)
        return [_plain(item) for item in value]
    return value


BOOT = Definitions(bootstructs.LINUX, bootstructs.PVH, bootstructs.MULTIBOOT)
