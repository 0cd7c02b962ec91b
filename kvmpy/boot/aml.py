# SPDX-License-Identifier: Apache-2.0
"""AML, ACPI's byte code: each function returns the bytes of one term (ACPI 6.5, chapter 20).

    Scope("\\\\_SB_", Device("COM1", Name("_HID", EisaId("PNP0501")), Name("_CRS", ResourceTemplate(...))))

Names follow ASL, the language that is compiled to AML (chapter 19); resources are chapter 6.4.
"""

from __future__ import annotations

import struct
import uuid

Term = bytes
Value = int | str | bytes  # a number, a string, or a term

ZERO, ONE, ONES = b"\0", b"\1", b"\xff"
ARG0, ARG1, ARG2, ARG3 = b"\x68", b"\x69", b"\x6a", b"\x6b"
LOCAL0, LOCAL1 = b"\x60", b"\x61"

SYSTEM_MEMORY, SYSTEM_IO = 0, 1
BYTE_ACCESS, WORD_ACCESS, DWORD_ACCESS = 1, 2, 3


# -- names and constants (20.2.2, 20.2.3)


def name_string(path: str) -> bytes:
    """A path such as "\\\\_SB_.PCI0" or "_HID": segments of up to four characters, filled up with "_"."""
    prefix = path[: len(path) - len(path.lstrip("\\^"))]
    if prefix not in ("", "\\") and set(prefix) != {"^"}:
        raise ValueError(f"{path!r} is no ACPI name")
    segments = [s for s in path[len(prefix) :].split(".") if s]
    raw = b"".join(_segment(s) for s in segments)
    match len(segments):
        case 0:
            return prefix.encode() + b"\0"
        case 1:
            return prefix.encode() + raw
        case 2:
            return prefix.encode() + b"\x2e" + raw
        case count:
            return prefix.encode() + b"\x2f" + bytes([count]) + raw


def _segment(segment: str) -> bytes:
    first = "ABCDEFGHIJKLMNOPQRSTUVWXYZ_"
    if not 1 <= len(segment) <= 4 or segment[0] not in first or set(segment) - set(first + "0123456789"):
        raise ValueError(f"{segment!r} is no ACPI name segment")
    return segment.ljust(4, "_").encode()


def integer(value: int) -> bytes:
    """The shortest encoding of a number of up to 64 bits."""
    if value in (0, 1):
        return bytes([value])
    for prefix, code, size in ((0x0A, "B", 8), (0x0B, "H", 16), (0x0C, "I", 32), (0x0E, "Q", 64)):
        if 0 <= value < 1 << size:
            return struct.pack("<B" + code, prefix, value)
    raise ValueError(f"AML numbers have 64 bits: {value:#x} does not fit")


def string(text: str) -> bytes:
    """A string of 7-bit characters."""
    raw = text.encode("ascii")
    if b"\0" in raw:
        raise ValueError("an AML string cannot hold a NUL")
    return b"\x0d" + raw + b"\0"


def value(item: Value) -> bytes:
    """A number, a string, or a term as it is."""
    if isinstance(item, int):
        return integer(item)
    return string(item) if isinstance(item, str) else item


def EisaId(text: str) -> bytes:  # noqa: N802 - ASL's own name, as all below
    """A compressed EISA id such as "PNP0501": three letters of 5 bits, four hex digits."""
    if len(text) != 7 or not (text[:3].isalpha() and text[:3].isupper()):
        raise ValueError(f"{text!r} is no EISA id")
    letters = [ord(c) - 0x40 for c in text[:3]]
    number = letters[0] << 26 | letters[1] << 21 | letters[2] << 16 | int(text[3:], 16)
    return b"\x0c" + number.to_bytes(4, "big")


def ToUUID(text: str) -> bytes:  # noqa: N802
    """A UUID as a buffer in ACPI's mixed byte order."""
    return Buffer(uuid.UUID(text).bytes_le)


# -- objects (20.2.5)


def _package_length(body: bytes) -> bytes:
    """PkgLength (20.2.4), which counts itself: a byte up to 63, else 4 bits there and one to three bytes."""
    if len(body) + 1 < 0x40:
        return bytes([len(body) + 1])
    for extra in (1, 2, 3):
        total = len(body) + 1 + extra
        if total < 1 << 4 + 8 * extra:
            return bytes([extra << 6 | total & 0xF]) + (total >> 4).to_bytes(extra, "little")
    raise ValueError(f"an AML package of {len(body):#x} bytes is too long")


def _packed(opcode: bytes, body: bytes) -> bytes:
    return opcode + _package_length(body) + body


def Scope(path: str, *terms: Term) -> bytes:  # noqa: N802
    """Terms in a name space that exists."""
    return _packed(b"\x10", name_string(path) + b"".join(terms))


def Device(name: str, *terms: Term) -> bytes:  # noqa: N802
    """A device and what belongs to it."""
    return _packed(b"\x5b\x82", name_string(name) + b"".join(terms))


def Name(name: str, item: Value) -> bytes:  # noqa: N802
    """A named object."""
    return b"\x08" + name_string(name) + value(item)


def Method(name: str, arguments: int, *terms: Term, serialized: bool = False) -> bytes:  # noqa: N802
    """A control method with up to seven arguments."""
    return _packed(b"\x14", name_string(name) + bytes([arguments | serialized << 3]) + b"".join(terms))


def Package(*items: Value) -> bytes:  # noqa: N802
    """A list of objects; more than 255 make a VarPackage."""
    if len(items) > 255:
        return _packed(b"\x13", integer(len(items)) + b"".join(value(i) for i in items))
    return _packed(b"\x12", bytes([len(items)]) + b"".join(value(i) for i in items))


def Buffer(data: bytes) -> bytes:  # noqa: N802
    """Raw bytes."""
    return _packed(b"\x11", integer(len(data)) + data)


def OperationRegion(name: str, space: int, offset: int, size: int) -> bytes:  # noqa: N802
    """A range of registers in an address space."""
    return b"\x5b\x80" + name_string(name) + bytes([space]) + integer(offset) + integer(size)


def Field(region: str, access: int, *fields: tuple[str, int]) -> bytes:  # noqa: N802
    """Fields of a region in order, each a name and a size in bits; "" skips bits. No lock, rest kept."""
    units = b"".join((_segment(n) if n else b"\0") + _field_length(bits) for n, bits in fields)
    return _packed(b"\x5b\x81", name_string(region) + bytes([access]) + units)


def _field_length(bits: int) -> bytes:
    """PkgLength encoding of a plain number, which does not count itself."""
    if bits < 0x40:
        return bytes([bits])
    return bytes([1 << 6 | bits & 0xF, bits >> 4])


def CreateDWordField(source: Term, index: int, name: str) -> bytes:  # noqa: N802
    """A name for 32 bits of a buffer, from byte `index`."""
    return b"\x8a" + source + integer(index) + name_string(name)


# -- statements and expressions (20.2.5.3, 20.2.5.4)


def If(condition: Term, *terms: Term) -> bytes:  # noqa: N802
    """Terms that run when the condition is not zero."""
    return _packed(b"\xa0", condition + b"".join(terms))


def Else(*terms: Term) -> bytes:  # noqa: N802
    """What runs instead; it follows an `If`."""
    return _packed(b"\xa1", b"".join(terms))


def Return(item: Value) -> bytes:  # noqa: N802
    """The result of a method."""
    return b"\xa4" + value(item)


def Store(item: Value, target: Term) -> bytes:  # noqa: N802
    """Assign to a local, an argument or a named object."""
    return b"\x70" + value(item) + target


def Notify(path: str, code: int) -> bytes:  # noqa: N802
    """Tell the driver of an object that something happened."""
    return b"\x86" + name_string(path) + integer(code)


def And(left: Value, right: Value, target: Term = b"\0") -> bytes:  # noqa: N802
    """Bitwise and; the result goes to `target` too when given."""
    return b"\x7b" + value(left) + value(right) + target


def Or(left: Value, right: Value, target: Term = b"\0") -> bytes:  # noqa: N802
    """Bitwise or; the result goes to `target` too when given."""
    return b"\x7d" + value(left) + value(right) + target


def LEqual(left: Value, right: Value) -> bytes:  # noqa: N802
    """All ones when equal, else zero."""
    return b"\x93" + value(left) + value(right)


def LNotEqual(left: Value, right: Value) -> bytes:  # noqa: N802
    """All ones when different, else zero."""
    return b"\x92" + LEqual(left, right)


# -- resource descriptors (6.4)


def ResourceTemplate(*descriptors: bytes) -> bytes:  # noqa: N802
    """A buffer of descriptors and the end tag (6.4.2.9), whose checksum 0 means: not checked."""
    return Buffer(b"".join(descriptors) + b"\x79\0")


def IO(start: int, size: int) -> bytes:  # noqa: N802
    """Fixed ports, 16-bit decode (6.4.2.5)."""
    return struct.pack("<BBHHBB", 0x47, 1, start, start, 1, size)


def Memory32Fixed(start: int, size: int) -> bytes:  # noqa: N802
    """Fixed memory, read/write (6.4.3.4)."""
    return struct.pack("<BHBII", 0x86, 9, 1, start, size)


def Interrupt(*gsis: int, edge: bool, shared: bool = False) -> bytes:  # noqa: N802
    """Active-high interrupts by GSI, consumed by the device (6.4.3.6)."""
    flags = 1 | edge << 1 | shared << 3
    return struct.pack("<BHBB", 0x89, 2 + 4 * len(gsis), flags, len(gsis)) + struct.pack(
        f"<{len(gsis)}I", *gsis
    )


def _address_space(tag: int, code: str, kind: int, flags: int, start: int, end: int) -> bytes:
    """A window that is produced, both ends fixed, positive decode (6.4.3.5): start..end inclusive."""
    body = struct.pack("<BBB" + 5 * code, kind, 0x0C, flags, 0, start, end, 0, end - start + 1)
    return struct.pack("<BH", tag, len(body)) + body


def WordBusNumber(start: int, end: int) -> bytes:  # noqa: N802
    return _address_space(0x88, "H", 2, 0, start, end)


def WordIO(start: int, end: int) -> bytes:  # noqa: N802
    """All of the range, ISA and not (flags 3)."""
    return _address_space(0x88, "H", 1, 3, start, end)


def DWordMemory(start: int, end: int) -> bytes:  # noqa: N802
    """Not cacheable, read/write."""
    return _address_space(0x87, "I", 0, 1, start, end)


def QWordMemory(start: int, end: int) -> bytes:  # noqa: N802
    """Not cacheable, read/write."""
    return _address_space(0x8A, "Q", 0, 1, start, end)
