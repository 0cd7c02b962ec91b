# SPDX-License-Identifier: Apache-2.0
"""All sections in order, and the verdict."""

from __future__ import annotations

from kvmpy._version import __version__
from kvmpy.doctor import capabilities, host, kvm, network
from kvmpy.doctor.report import Check, Report, Section, lacking, ok
from kvmpy.engines import open_kvm
from kvmpy.errors import BackendError


def examine() -> Report:
    """Examine this host. Returns the report; what fails is a finding in it, never an exception."""
    kernel, *offers = _kernel_engine()
    sections = [kernel, _software_engine(), host.examine(), network.examine(), *offers]
    backend, reason = _auto()
    works = {section.name: _runs(section) for section in sections if section.name in ("kvm", "tcg")}
    usable = any(works.values())
    if backend and not works[backend]:
        reason += f", but the tiny guests do not run on it (see {backend})"
        if usable:
            reason += "; take the other with --backend"
    return Report(__version__, usable, backend, reason, tuple(sections))


def _runs(section: Section) -> bool:
    """Whether both tiny guests ran on the engine of this section."""
    guests = [section.find("real-mode"), section.find("long-mode")]
    return all(check is not None and check.data["works"] for check in guests)


def _kernel_engine() -> list[Section]:
    checks = [kvm.device(), kvm.module()]
    handle, opened = kvm.open_kernel()
    checks.append(opened)
    title = "KVM (the kernel's)"
    if handle is None:
        return [Section("kvm", title, tuple(checks))]
    with handle:
        checks += kvm.guests(handle, "kvm")
        return [Section("kvm", title, tuple(checks)), capabilities.examine(handle.capabilities())]


def _software_engine() -> Section:
    checks: list[Check] = []
    try:
        handle = open_kvm("tcg")
    except Exception as error:  # a half-built installation must be a finding, whatever it raises
        text = str(error) if isinstance(error, BackendError) else f"it does not open: {error!r}"
        checks.append(lacking("open", text, "reinstall kvmpy with its compiled parts", works=False))
    else:
        with handle:
            checks.append(ok("open", "the software CPU opens", works=True))
            checks += kvm.guests(handle, "tcg")
    return Section("tcg", "Software CPU (kvmpy's own)", tuple(checks))


def _auto() -> tuple[str, str]:
    """What "auto" takes, by taking it."""
    try:
        with open_kvm("auto") as handle:
            return handle.backend, handle.reason
    except Exception as error:  # as above; also a wrong $KVMPY_BACKEND
        return "", str(error)
