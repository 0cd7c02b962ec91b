# SPDX-License-Identifier: Apache-2.0
"""An engine (kvmpy/engine.h) written with ctypes: it records every ioctl and answers as the test says.

It makes exits that this machine's KVM cannot make, and shows what reaches the engine and what does not.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
from collections.abc import Callable
from typing import Self

from kvmpy import _kvm
from kvmpy._constants import IOCTLS

NAMES = {request: name for name, request in IOCTLS.items()}
RUN_SIZE = 3 * mmap.PAGESIZE
PORT_DATA = mmap.PAGESIZE

OPEN = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p)
CLOSE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)
IOCTL = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
MAP = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t, ctypes.c_uint64)
UNMAP = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
PREAD = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64)
WROTE = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64)
KICK = ctypes.CFUNCTYPE(None, ctypes.c_int)


class Door(ctypes.Structure):
    """struct kvmpy_engine."""

    _fields_ = [
        ("version", ctypes.c_uint32),
        ("name", ctypes.c_char_p),
        ("open", OPEN),
        ("close", CLOSE),
        ("ioctl", IOCTL),
        ("map", MAP),
        ("unmap", UNMAP),
        ("pread", PREAD),
        ("wrote", WROTE),
        ("kick", KICK),
    ]


class FakeEngine:
    """`kvm` speaks to it; `calls` are the ioctls so far, `answers` what each returns (or does), by name."""

    def __init__(self, version: int = 2) -> None:
        self.calls: list[str] = []
        self.closed: list[int] = []
        self.unmapped = 0
        self.wrote: list[tuple[int, int, int]] = []
        self.kicked: list[int] = []
        self.stats = b""
        self.capabilities: dict[int, int] = {}
        self.answers: dict[str, int | Callable[[int], int]] = {
            "KVM_GET_API_VERSION": 12,
            "KVM_GET_VCPU_MMAP_SIZE": RUN_SIZE,
            "KVM_CHECK_EXTENSION": lambda cap: self.capabilities.get(cap, 0),
        }
        self.run_page = (ctypes.c_ubyte * RUN_SIZE)()
        self.ring = (ctypes.c_ubyte * mmap.PAGESIZE)()
        self._handles = iter(range(1000, 2000))
        self._door = Door(
            version,
            b"fake",
            OPEN(lambda path: next(self._handles)),
            CLOSE(self._close),
            IOCTL(self._ioctl),
            MAP(lambda handle, size, offset: ctypes.addressof(self.ring if offset else self.run_page)),
            UNMAP(self._unmap),
            PREAD(self._pread),
            WROTE(lambda vm, gpa, size: self.wrote.append((vm, gpa, size))),
            KICK(self.kicked.append),
        )
        new_capsule = ctypes.pythonapi.PyCapsule_New
        new_capsule.restype = ctypes.py_object
        new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        self.capsule = new_capsule(ctypes.addressof(self._door), b"kvmpy.engine", None)
        self._kvm: _kvm.Kvm | None = None

    @property
    def kvm(self) -> _kvm.Kvm:
        if self._kvm is None:
            self._kvm = _kvm.Kvm(self.capsule)
        return self._kvm

    def vcpu(self) -> _kvm.Vcpu:
        """A vCPU of a new VM."""
        return self.kvm.create_vm().create_vcpu()

    def exits_with(self, reason: int, union: bytes = b"", data: bytes = b"") -> None:
        """Let KVM_RUN leave `reason`, `union` in kvm_run's union and `data` as port data."""

        def run(_: int) -> int:
            self.run_page[8:12] = reason.to_bytes(4, "little")
            self.run_page[32 : 32 + len(union)] = union
            self.run_page[PORT_DATA : PORT_DATA + len(data)] = data
            return 0

        self.answers["KVM_RUN"] = run

    def union(self, start: int, size: int) -> bytes:
        """Bytes of kvm_run's union now."""
        return bytes(self.run_page[32 + start : 32 + start + size])

    def _ioctl(self, handle: int, request: int, arg: int | None) -> int:
        name = NAMES.get(request, hex(request))
        self.calls.append(name)
        if name in ("KVM_CREATE_VM", "KVM_CREATE_VCPU", "KVM_GET_STATS_FD") and name not in self.answers:
            return next(self._handles)
        answer = self.answers.get(name, 0)
        return answer if isinstance(answer, int) else answer(arg or 0)

    def _close(self, handle: int) -> int:
        self.closed.append(handle)
        return 0

    def _unmap(self, address: int, size: int) -> int:
        self.unmapped += 1
        return 0

    def _pread(self, handle: int, buffer: int, size: int, offset: int) -> int:
        part = self.stats[offset : offset + size]
        ctypes.memmove(buffer, part, len(part))
        return len(part) if self.stats else -errno.EBADF

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._kvm is not None:
            self._kvm.close()
