# SPDX-License-Identifier: Apache-2.0
"""Whether the kernel's KVM is there, may be used, and runs guests; what to do when not."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat
from pathlib import Path

from kvmpy.doctor import probe
from kvmpy.doctor.host import cpu_flags, in_container, read
from kvmpy.doctor.report import Check, info, lacking, limited, ok
from kvmpy.engines import Kvm
from kvmpy.errors import KvmpyError

NODE = Path("/dev/kvm")
MODULES = ("kvm_intel", "kvm_amd", "kvm_pvm")


def device(node: Path = NODE) -> Check:
    """Who may open /dev/kvm."""
    try:
        status = node.stat()
    except FileNotFoundError:
        return lacking("device", f"there is no {node}", _why_absent(), present=False, accessible=False)
    except OSError as error:
        return lacking("device", f"{node}: {error.strerror}", "", present=False, accessible=False)
    owner, group = _user_name(status.st_uid), _group_name(status.st_gid)
    mode = stat.S_IMODE(status.st_mode)
    accessible = os.access(node, os.R_OK | os.W_OK)
    text = f"{node} belongs to {owner}:{group}, mode {mode:04o}"
    data = {"present": True, "owner": owner, "group": group, "mode": f"{mode:04o}", "accessible": accessible}
    if accessible:
        return ok("device", f"{text}; this user may use it", **data)
    return lacking("device", f"{text}; this user may not use it", _permission_advice(mode, group), **data)


def _why_absent() -> str:
    if in_container():
        return "start the container with --device /dev/kvm (the host must have it)"
    flags = cpu_flags()
    if "vmx" in flags or "svm" in flags:
        module = "kvm_intel" if "vmx" in flags else "kvm_amd"
        return (
            f"the processor can do it: sudo modprobe {module} (if that fails: switch it on in the firmware)"
        )
    if "hypervisor" in flags:
        return "this is a virtual machine without nested virtualisation: switch that on at its host or cloud"
    return "the processor shows no vmx or svm flag: switch virtualisation on in the firmware, if it has it"


def _permission_advice(mode: int, group: str) -> str:
    user = _user_name(os.geteuid())
    if in_container() and os.geteuid() == 0:
        return "root in this container is not root outside: let the container have the group of /dev/kvm"
    if mode & 0o060 == 0o060 and group != "root":
        return f"join its group and log in anew: sudo usermod -aG {group} {user}"
    return (
        "give it to a group (once): sudo chgrp kvm /dev/kvm && sudo chmod 660 /dev/kvm; "
        f"then join it and log in anew: sudo usermod -aG kvm {user}"
    )


def module() -> Check:
    """Which kernel module gives KVM, and whether guests may nest."""
    loaded = [name for name in MODULES if Path("/sys/module", name).is_dir()]
    listed = {line.split(" ", 1)[0] for line in read("/proc/modules").splitlines()}
    loaded += [name for name in MODULES if name in listed and name not in loaded]
    flags = sorted(cpu_flags() & {"vmx", "svm"})
    nested = {
        name: read(f"/sys/module/{name}/parameters/nested").strip() in ("Y", "1")
        for name in loaded
        if Path(f"/sys/module/{name}/parameters/nested").exists()
    }
    text = f"{' and '.join(loaded) or 'no KVM module seen'}; processor flags: "
    text += " ".join(flags) or "neither vmx nor svm"
    if nested:
        text += f"; guests can {'' if any(nested.values()) else 'not '}be hypervisors themselves"
    return info("module", text, modules=loaded, flags=flags, nested=nested)


def open_kernel() -> tuple[Kvm | None, Check]:
    """Open the kernel's KVM."""
    try:
        kvm = Kvm()
    except OSError as error:
        advice = {
            errno.ENOENT: "",  # `device()` has said it
            errno.EACCES: "",
            errno.ENODEV: "no module answers behind /dev/kvm: " + _why_absent(),
            errno.ENXIO: "no module answers behind /dev/kvm: " + _why_absent(),
        }.get(error.errno or 0, "see the kernel's log: sudo dmesg | grep -i kvm")
        return None, lacking("open", f"KVM does not open: {error}", advice, works=False)
    except KvmpyError as error:
        return None, lacking("open", str(error), "use a current Linux kernel", works=False)
    return kvm, ok("open", f"KVM opens, API version {kvm.api_version}", works=True, api=kvm.api_version)


def guests(kvm: Kvm, engine: str) -> list[Check]:
    """Run the tiny guests on an engine."""
    checks = []
    for name, run in (("real-mode", probe.real_mode), ("long-mode", probe.long_mode)):
        result = run(kvm)
        if result.worked:
            checks.append(ok(name, result.text, works=True))
        else:
            advice = "another hypervisor may hold the processor (VirtualBox, VMware): see `sudo dmesg`"
            checks.append(lacking(name, result.text, advice if engine == "kvm" else "", works=False))
    if all(check.data["works"] for check in checks):
        checks.append(_speed(kvm, engine))
    return checks


def _speed(kvm: Kvm, engine: str) -> Check:
    try:
        speed = probe.speed(kvm)
    except (KvmpyError, OSError) as error:
        return limited("speed", f"could not be measured: {error}")
    data = {"ring0": round(speed.ring0), "ring3": round(speed.ring3), "ring0_emulated": speed.ring0_emulated}
    text = f"ring 0 at {_rate(speed.ring0)}, ring 3 at {_rate(speed.ring3)}"
    if engine != "kvm" or not speed.ring0_emulated:
        return ok("speed", text, **data)
    pvm = Path("/sys/module/kvm_pvm").is_dir() or "kvm_pvm" in read("/proc/modules")
    what = "this is kvm_pvm, a KVM without hardware support; " if pvm else ""
    return limited(
        "speed",
        f"{text}: {what}guest ring 0 is emulated instruction by instruction, 64-bit ring 3 runs natively",
        "a Machine (kvmpy run) runs its guest on the software CPU, with KVM's chips around it; a bare Vm runs in KVM, "
        "and what this emulator lacks, the software CPU does for it",
        **data,
    )


def _rate(per_second: float) -> str:
    for unit, word in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if per_second >= unit:
            return f"{per_second / unit:.3g} {word} instructions/s"
    return f"{per_second:.0f} instructions/s"


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
