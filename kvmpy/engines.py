# SPDX-License-Identifier: Apache-2.0
"""Which processor: the kernel's KVM, or kvmpy's software CPU.

"auto" takes KVM when `/dev/kvm` opens and creates a VM; CPU flags prove nothing (nested and paravirtual KVM
work without vmx or svm). `$KVMPY_BACKEND` replaces "auto" where the program did not say.
"""

from __future__ import annotations

import os

from kvmpy import _kvm
from kvmpy.errors import BackendError, KvmpyError

BACKENDS = ("auto", "kvm", "tcg")
KVM_API_VERSION = 12  # fixed for ever (api.rst 4.1)


class Kvm(_kvm.Kvm):
    """The system handle of an engine; `reason` says why it was taken."""

    reason = "asked for"


def open_kvm(backend: str = "auto") -> Kvm:
    """Open an engine: "kvm", "tcg", or "auto" for the best that works here.

    Returns the system handle; its `backend` says which one it is and `reason` why.
    Raises BackendError that says what was tried and what each answered.
    """
    if backend == "auto":
        backend = os.environ.get("KVMPY_BACKEND") or "auto"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    if backend == "kvm":
        return _kernel("asked for")
    if backend == "tcg":
        return _software("asked for")
    try:
        return _kernel("/dev/kvm works")
    except BackendError as no_kernel:
        try:
            return _software(str(no_kernel))
        except BackendError as no_software:
            raise BackendError(f"no processor engine: {no_kernel}; {no_software}") from None


def _kernel(reason: str) -> Kvm:
    try:
        kvm = Kvm()
    except OSError as e:
        raise BackendError(f"KVM cannot be used: {e}; `kvmpy doctor` says what to do") from e
    version = kvm.api_version
    if version != KVM_API_VERSION:
        kvm.close()
        raise BackendError(f"KVM cannot be used: API version {version}, not {KVM_API_VERSION}")
    kvm.reason = reason
    return kvm


def _software(reason: str) -> Kvm:
    try:
        from kvmpy import tcg

        engine = tcg.engine()
    except ImportError as e:
        raise BackendError(f"the software CPU cannot be used: {e}") from e
    try:
        kvm = Kvm(engine)
    except (OSError, KvmpyError) as e:
        raise BackendError(f"the software CPU cannot be used: {e}") from e
    kvm.reason = reason
    return kvm
