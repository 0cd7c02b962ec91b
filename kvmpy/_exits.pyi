# SPDX-License-Identifier: Apache-2.0

from collections.abc import Sequence
from typing import ClassVar, Final, final

from _typeshed import ReadableBuffer
from typing_extensions import disjoint_base

@disjoint_base
class Exit:
    __match_args__: ClassVar[tuple[str, ...]]
    __hash__: ClassVar[None]  # type: ignore[assignment]
    reason: int
    flags: Final[int]
    answered: Final[bytes | int | None]
    @property
    def current(self) -> bool: ...

@final
class IoIn(Exit):
    __match_args__ = ("port", "size", "count")
    port: Final[int]
    size: Final[int]
    count: Final[int]
    def __init__(self, port: int, size: int = 1, count: int = 1) -> None: ...
    def answer(self, value: int | ReadableBuffer) -> None: ...

@final
class IoOut(Exit):
    __match_args__ = ("port", "data", "size", "count")
    port: Final[int]
    data: Final[bytes]
    size: Final[int]
    count: Final[int]
    def __init__(self, port: int, data: bytes, size: int = 0, count: int = 1) -> None: ...
    @property
    def value(self) -> int: ...

@final
class MmioRead(Exit):
    __match_args__ = ("addr", "size")
    addr: Final[int]
    size: Final[int]
    def __init__(self, addr: int, size: int) -> None: ...
    def answer(self, value: int | ReadableBuffer) -> None: ...

@final
class MmioWrite(Exit):
    __match_args__ = ("addr", "data")
    addr: Final[int]
    data: Final[bytes]
    def __init__(self, addr: int, data: bytes) -> None: ...
    @property
    def size(self) -> int: ...
    @property
    def value(self) -> int: ...

@final
class Hlt(Exit): ...

@final
class Interrupted(Exit): ...

@final
class IrqWindowOpen(Exit): ...

@final
class Shutdown(Exit): ...

@final
class Nmi(Exit): ...

@final
class Watchdog(Exit): ...

@final
class SetTpr(Exit): ...

@final
class DirtyRingFull(Exit): ...

@final
class ApResetHold(Exit): ...

@final
class BusLock(Exit): ...

@final
class Notify(Exit):
    __match_args__ = ("notify",)
    notify: Final[int]
    def __init__(self, notify: int = 0) -> None: ...
    @property
    def context_invalid(self) -> bool: ...

@final
class IoapicEoi(Exit):
    __match_args__ = ("vector",)
    vector: Final[int]
    def __init__(self, vector: int) -> None: ...

@final
class Debug(Exit):
    __match_args__ = ("exception", "pc", "dr6", "dr7")
    exception: Final[int]
    pc: Final[int]
    dr6: Final[int]
    dr7: Final[int]
    def __init__(self, exception: int = 1, pc: int = 0, dr6: int = 0, dr7: int = 0) -> None: ...

@final
class HwUnknown(Exit):
    __match_args__ = ("hardware_reason",)
    hardware_reason: Final[int]
    def __init__(self, hardware_reason: int = 0) -> None: ...

@final
class GuestException(Exit):
    __match_args__ = ("exception", "error_code")
    exception: Final[int]
    error_code: Final[int]
    def __init__(self, exception: int = 0, error_code: int = 0) -> None: ...

@final
class FailEntry(Exit):
    __match_args__ = ("hardware_reason", "cpu")
    hardware_reason: Final[int]
    cpu: Final[int]
    def __init__(self, hardware_reason: int = 0, cpu: int = 0) -> None: ...

@final
class InternalError(Exit):
    __match_args__ = ("suberror", "data")
    suberror: Final[int]
    data: Final[tuple[int, ...]]
    instruction: Final[bytes]
    def __init__(self, suberror: int, data: Sequence[int] = (), instruction: bytes = b"") -> None: ...
    @property
    def suberror_name(self) -> str: ...

@final
class TprAccess(Exit):
    __match_args__ = ("rip", "is_write")
    rip: Final[int]
    is_write: Final[bool]
    def __init__(self, rip: int = 0, is_write: bool = False) -> None: ...

@final
class SystemEvent(Exit):
    __match_args__ = ("type", "data")
    type: Final[int]
    data: Final[tuple[int, ...]]
    def __init__(self, type: int, data: Sequence[int] = ()) -> None: ...
    @property
    def name(self) -> str: ...

@final
class RdMsr(Exit):
    __match_args__ = ("index", "why")
    index: Final[int]
    why: Final[int]
    def __init__(self, index: int, why: int = 0) -> None: ...
    def answer(self, value: int) -> None: ...
    def fail(self) -> None: ...

@final
class WrMsr(Exit):
    __match_args__ = ("index", "data", "why")
    index: Final[int]
    data: Final[int]
    why: Final[int]
    def __init__(self, index: int, data: int = 0, why: int = 0) -> None: ...
    def answer(self) -> None: ...
    def fail(self) -> None: ...

@final
class Hypercall(Exit):
    __match_args__ = ("nr", "args", "longmode")
    nr: Final[int]
    args: Final[tuple[int, ...]]
    longmode: Final[bool]
    def __init__(self, nr: int, args: Sequence[int] = (), longmode: bool = True) -> None: ...
    def answer(self, result: int) -> None: ...

@final
class HypervSynic(Exit):
    __match_args__ = ("msr", "control", "evt_page", "msg_page")
    msr: Final[int]
    control: Final[int]
    evt_page: Final[int]
    msg_page: Final[int]
    def __init__(self, msr: int, control: int = 0, evt_page: int = 0, msg_page: int = 0) -> None: ...

@final
class HypervHcall(Exit):
    __match_args__ = ("input", "params")
    input: Final[int]
    params: Final[tuple[int, ...]]
    def __init__(self, input: int, params: Sequence[int] = (0, 0)) -> None: ...
    def answer(self, result: int) -> None: ...

@final
class HypervSyndbg(Exit):
    __match_args__ = ("msr", "control", "send_page", "recv_page", "pending_page")
    msr: Final[int]
    control: Final[int]
    send_page: Final[int]
    recv_page: Final[int]
    pending_page: Final[int]
    def __init__(
        self, msr: int, control: int = 0, send_page: int = 0, recv_page: int = 0, pending_page: int = 0
    ) -> None: ...
    def answer(self, status: int) -> None: ...

@final
class XenHcall(Exit):
    __match_args__ = ("input", "params", "longmode", "cpl")
    input: Final[int]
    params: Final[tuple[int, ...]]
    longmode: Final[bool]
    cpl: Final[int]
    def __init__(
        self, input: int, params: Sequence[int] = ..., longmode: bool = True, cpl: int = 0
    ) -> None: ...
    def answer(self, result: int) -> None: ...

@final
class MemoryFault(Exit):
    __match_args__ = ("gpa", "size", "fault_flags")
    gpa: Final[int]
    size: Final[int]
    fault_flags: Final[int]
    def __init__(self, gpa: int, size: int = 0, fault_flags: int = 0) -> None: ...
    @property
    def private(self) -> bool: ...

@final
class Tdx(Exit):
    __match_args__ = ("nr", "data")
    nr: Final[int]
    data: Final[tuple[int, ...]]
    def __init__(self, nr: int, data: Sequence[int] = ...) -> None: ...
    def answer(self, result: int, data: Sequence[int] | None = None) -> None: ...

@final
class SnpReqCerts(Exit):
    __match_args__ = ("gpa", "npages")
    gpa: Final[int]
    npages: Final[int]
    def __init__(self, gpa: int, npages: int = 0) -> None: ...
    def answer(self, result: int, npages: int | None = None) -> None: ...

@final
class Unknown(Exit):
    __match_args__ = ("reason",)
    def __init__(self, reason: int) -> None: ...
    @property
    def name(self) -> str: ...
