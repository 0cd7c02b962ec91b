# SPDX-License-Identifier: Apache-2.0
"""The exceptions of kvmpy.

    KvmpyError
    ├── KvmError (OSError)            the kernel or the software engine refused an ioctl
    │   └── CapabilityError           ... because it lacks a capability (found before the ioctl)
    ├── BackendError                  no engine can be used, and why
    ├── GuestMemoryError (ValueError) an access outside guest memory, or one its region forbids
    ├── OverlapError (ValueError)     two owners for one address range; names both
    ├── BootError (ValueError)        a kernel, initrd, command line or firmware that cannot be loaded
    ├── ImageError (ValueError)       a damaged or unsupported disk image
    ├── UnsupportedError (NotImplementedError)  documented as not there yet
    ├── NetworkError                  a network, a link or a connection cannot be made, and why
    ├── StateError (RuntimeError)     right call, wrong moment: closed, running, not yet started
    └── GuestError                    the guest cannot go on; carries the report
        ├── GuestShutdown             triple fault
        ├── EmulationFailure          KVM could not emulate an instruction
        ├── EntryFailure              the processor refused the guest state
        └── UnexpectedExit            an exit nobody handles

Mistakes in arguments are plain ValueError and TypeError. What a guest does wrong is never a Python
exception in a device: it becomes an exit, a log record or a GuestError that ends the run.
"""

from __future__ import annotations

import os


class KvmpyError(Exception):
    """Base of everything kvmpy raises on its own account."""


class KvmError(KvmpyError, OSError):
    """An ioctl failed. `errno` and `ioctl` (the name, e.g. "KVM_SET_REGS") say which and how."""

    def __init__(self, errno: int, ioctl: str, detail: str = "") -> None:
        text = f"{ioctl}: {os.strerror(errno)}"
        super().__init__(errno, f"{text}: {detail}" if detail else text)
        self.ioctl = ioctl
        self.detail = detail

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.errno, self.ioctl, self.detail)


class CapabilityError(KvmError):
    """The engine lacks a capability that the call needs; `capability` is its name, e.g. "KVM_CAP_XSAVE2"."""

    def __init__(self, errno: int, ioctl: str, capability: str) -> None:
        super().__init__(errno, ioctl, f"needs {capability}, which this engine does not offer")
        self.capability = capability

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.errno, self.ioctl, self.capability)


class BackendError(KvmpyError):
    """No processor engine can be used; the text says what was tried and what each answered."""


class GuestMemoryError(KvmpyError, ValueError):
    """Guest addresses [gpa, gpa + size) are not (all) accessible memory; `hole` is the first bad address."""

    def __init__(self, message: str, gpa: int, size: int, hole: int) -> None:
        super().__init__(message)
        self.gpa = gpa
        self.size = size
        self.hole = hole


class OverlapError(KvmpyError, ValueError):
    """An address range is already taken; the text names both owners."""


class BootError(KvmpyError, ValueError):
    """A guest image cannot be loaded; the text has the numbers."""


class ImageError(KvmpyError, ValueError):
    """A disk image is damaged or uses what is not supported; `offset` is where in the file, if known."""

    def __init__(self, message: str, offset: int | None = None) -> None:
        super().__init__(message if offset is None else f"{message} (at file offset {offset:#x})")
        self.offset = offset


class UnsupportedError(KvmpyError, NotImplementedError):
    """What was asked for is not there (yet); the text says what is."""


class NetworkError(KvmpyError):
    """A network cannot be made; the text says what failed and what to do. `__cause__` is the OSError, if one was."""


class StateError(KvmpyError, RuntimeError):
    """The object is closed, running, or not yet started, and the call needs otherwise."""


class GuestError(KvmpyError):
    """The guest cannot go on. `str()` is one line; `report` is the full explanation, ready to print."""

    def __init__(self, message: str, report: str = "") -> None:
        super().__init__(message)
        self.report = report

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.args[0], self.report)


class GuestShutdown(GuestError):
    """Triple fault (KVM_EXIT_SHUTDOWN) where nobody asked for one."""


class EmulationFailure(GuestError):
    """KVM_EXIT_INTERNAL_ERROR: usually an instruction that KVM's emulator does not know."""


class EntryFailure(GuestError):
    """KVM_EXIT_FAIL_ENTRY: the processor refused to enter the guest with this state."""


class UnexpectedExit(GuestError):
    """An exit that no handler took and that has no default."""
