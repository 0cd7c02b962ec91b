# SPDX-License-Identifier: Apache-2.0
"""What the host offers besides KVM: processors, memory, huge pages, limits, kernel services."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import sys
from pathlib import Path

from kvmpy.doctor.report import Check, Section, info, lacking, limited, ok

MIB = 1 << 20

# System calls without a wrapper in Python or glibc; numbers of asm/unistd_64.h.
SYS_USERFAULTFD = 323
SYS_IO_URING_SETUP = 425
UFFD_USER_MODE_ONLY = 1  # linux/userfaultfd.h
MFD_HUGETLB = 4  # linux/memfd.h


def examine() -> Section:
    """Look at the host."""
    checks = [_system(), _processors(), _memory(), _memlock(), _thp(), *_huge_pages()]
    checks += [_memfd(), _userfaultfd(), _io_uring()]
    return Section("host", "Host", tuple(checks))


def in_container() -> str:
    """The kind of container this process is in, "" if none is seen."""
    if Path("/.dockerenv").exists():
        return "docker"
    if Path("/run/.containerenv").exists():
        return "podman"
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return "kubernetes"
    return read("/run/systemd/container").strip()


def read(path: str | Path) -> str:
    """A small text file of the kernel's, "" when it cannot be read."""
    try:
        return Path(path).read_text("utf-8", "replace")
    except OSError:
        return ""


def cpu_flags() -> frozenset[str]:
    """The first processor's flags in /proc/cpuinfo."""
    for line in read("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return frozenset(value.split())
    return frozenset()


def _system() -> Check:
    text = f"Linux {platform.release()} {platform.machine()}, Python {platform.python_version()}"
    container = in_container()
    gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    data = {"kernel": platform.release(), "machine": platform.machine(), "container": container, "gil": gil}
    if platform.machine() != "x86_64":
        return lacking("system", text, "kvmpy runs on x86-64 Linux only", **data)
    return ok("system", text + (f", in a {container} container" if container else ""), **data)


def _processors() -> Check:
    usable = len(os.sched_getaffinity(0))
    total = os.cpu_count() or usable
    quota = _cpu_quota()
    text = f"{usable} for this process" + (f" of {total}" if total != usable else "")
    if quota is not None and quota < usable:
        return limited(
            "processors", f"{text}, but the cgroup allows the time of {quota:.1f}",
            "vCPUs beyond that wait for each other; raise cpu.max of the cgroup",
            usable=usable, total=total, quota=quota,
        )  # fmt: skip
    return ok("processors", text, usable=usable, total=total, quota=quota)


def _cpu_quota() -> float | None:
    """Processors' worth of time that cgroup v2 allows, None for no limit."""
    words = read("/sys/fs/cgroup/cpu.max").split()
    if len(words) != 2 or not all(word.isdigit() for word in words) or int(words[1]) == 0:
        return None
    return int(words[0]) / int(words[1])


def meminfo() -> dict[str, int]:
    """/proc/meminfo in bytes (page counts stay counts)."""
    table = {}
    for line in read("/proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        words = value.split()
        if words and words[0].isdigit():
            table[name] = int(words[0]) * (1024 if words[1:] == ["kB"] else 1)
    return table


def _memory() -> Check:
    table = meminfo()
    total, free = table.get("MemTotal", 0), table.get("MemAvailable", 0)
    text = f"{free // MIB} MiB available of {total // MIB} MiB"
    bound = read("/sys/fs/cgroup/memory.max").strip()
    data = {"total": total, "available": free, "cgroup": int(bound) if bound.isdigit() else None}
    if bound.isdigit() and int(bound) < total:
        text += f", the cgroup ends at {int(bound) // MIB} MiB"
    if free < 256 * MIB:
        return limited("memory", text, "little for a guest; give --memory a small number", **data)
    return ok("memory", text, **data)


def _memlock() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limits = [None if limit == resource.RLIM_INFINITY else limit for limit in (soft, hard)]
    shown = ["unlimited" if limit is None else f"{limit // 1024} KiB" for limit in limits]
    data = dict(zip(("soft", "hard"), limits, strict=True))
    text = f"{shown[0]} may be locked (hard limit {shown[1]})"
    if soft != resource.RLIM_INFINITY and soft < 64 * MIB and os.geteuid() != 0:
        advice = "guest memory cannot be locked; raise it with `ulimit -l` or in /etc/security/limits.conf"
        return limited("memlock", text, advice, **data)
    return ok("memlock", text, **data)


def _thp() -> Check:
    modes = read("/sys/kernel/mm/transparent_hugepage/enabled")
    mode = modes.partition("[")[2].partition("]")[0]
    if not mode:
        return limited("thp", "this kernel has no transparent huge pages", mode="")
    if mode == "never":
        return limited(
            "thp", "transparent huge pages are off",
            "for faster guests: echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
            mode=mode,
        )  # fmt: skip
    return ok("thp", f"transparent huge pages: {mode}", mode=mode)


def _huge_pages() -> list[Check]:
    checks = []
    for name, kib, some in (("2M", 2048, 256), ("1G", 1048576, 1)):
        base = Path(f"/sys/kernel/mm/hugepages/hugepages-{kib}kB")
        key = f"huge-pages-{name}"
        if not base.is_dir():
            checks.append(info(key, f"this host has no {name} pages", free=0, total=0))
            continue
        free, total = (int(read(base / leaf).strip() or 0) for leaf in ("free_hugepages", "nr_hugepages"))
        text = f"{free} free of {total} pages of {name}"
        if total == 0:
            reserve = f"echo {some} | sudo tee {base}/nr_hugepages"
            advice = f"only huge_pages={name!r} needs them; reserve with: {reserve}"
            checks.append(limited(key, text, advice, free=free, total=total))
        else:
            checks.append(ok(key, text, free=free, total=total))
    return checks


def _memfd() -> Check:
    try:
        os.close(os.memfd_create("kvmpy-doctor"))
    except OSError as error:
        advice = "shared guest memory and fork need it; a sandbox may forbid it"
        return lacking("memfd", f"memfd_create: {error.strerror}", advice, available=False)
    try:
        os.close(os.memfd_create("kvmpy-doctor", MFD_HUGETLB))
    except OSError as error:
        text = f"shared guest memory works, with huge pages it does not ({error.strerror})"
        return limited("memfd", text, available=True, huge=False)
    return ok("memfd", "shared guest memory works, with huge pages too", available=True, huge=True)


def _syscall(number: int, *arguments: object) -> int:
    """A system call: its result (a file descriptor here), or minus errno."""
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.syscall(ctypes.c_long(number), *arguments)
    return -ctypes.get_errno() if result < 0 else int(result)


def _userfaultfd() -> Check:
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    full = _syscall(SYS_USERFAULTFD, ctypes.c_int(flags))
    if full >= 0:
        os.close(full)
        return ok("userfaultfd", "works for kernel and user faults", available=True, kernel_faults=True)
    advice = (
        "lazy restore of snapshots needs kernel faults: "
        "`sudo sysctl vm.unprivileged_userfaultfd=1`, or access to /dev/userfaultfd"
    )
    if os.access("/dev/userfaultfd", os.R_OK | os.W_OK):
        return ok("userfaultfd", "works through /dev/userfaultfd", available=True, kernel_faults=True)
    user = _syscall(SYS_USERFAULTFD, ctypes.c_int(flags | UFFD_USER_MODE_ONLY))
    if user >= 0:
        os.close(user)
        text = "for user faults only; KVM's own faults are not seen"
        return limited("userfaultfd", text, advice, available=True, kernel_faults=False)
    text = f"userfaultfd: {os.strerror(-full)}"
    return lacking("userfaultfd", text, advice, available=False, kernel_faults=False)


def _io_uring() -> Check:
    parameters = ctypes.create_string_buffer(120)  # struct io_uring_params, linux/io_uring.h
    fd = _syscall(SYS_IO_URING_SETUP, ctypes.c_uint(1), parameters)
    if fd >= 0:
        os.close(fd)
        return ok("io_uring", "works", available=True)
    disabled = read("/proc/sys/kernel/io_uring_disabled").strip()
    if -fd == errno.ENOSYS:
        advice = "this kernel has none; disks use threads instead"
    elif disabled not in ("", "0"):
        advice = "disks use threads instead; to allow it: `sudo sysctl kernel.io_uring_disabled=0`"
    else:
        advice = "disks use threads instead; a container's seccomp profile often forbids it"
    return limited("io_uring", f"io_uring_setup: {os.strerror(-fd)}", advice, available=False)
