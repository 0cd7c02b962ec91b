# SPDX-License-Identifier: Apache-2.0
"""Whether guests can be given a network: tap devices, links, and the way without root."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
from typing import Any

from kvmpy.doctor.host import in_container, read
from kvmpy.doctor.report import Check, Section, info, lacking, limited, ok

TUN = "/dev/net/tun"
# linux/if_tun.h
IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000
IFF_MULTI_QUEUE = 0x0100
IFREQ = struct.Struct("16sH22x")  # struct ifreq with ifr_flags, linux/if.h

NAMESPACES = """
import ctypes, os, sys
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
libc = ctypes.CDLL(None, use_errno=True)
sys.exit(ctypes.get_errno() if libc.unshare(0x10000000 | 0x40000000) else 0)
"""  # CLONE_NEWUSER | CLONE_NEWNET, linux/sched.h; after unshare(2), which needs a process of its own


def examine() -> Section:
    """Try what networking needs; everything made is gone again at the end."""
    return Section("network", "Network", (_tap(), _links(), _namespaces(), _vhost()))


def _tap() -> Check:
    try:
        fd = os.open(TUN, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        contained = "start the container with --device /dev/net/tun"
        advice = contained if in_container() else "load the driver: sudo modprobe tun"
        return lacking("tap", f"there is no {TUN}", advice, works=False)
    except OSError as error:
        advice = f"ask root for access: sudo chmod 666 {TUN} (the usual mode; making a tap needs more)"
        return lacking("tap", f"{TUN}: {error.strerror}", advice, works=False)
    try:
        name, features = _make_tap(fd)
    except OSError as error:
        advice = (
            "as root, make one for your user: sudo ip tuntap add kvmpy0 mode tap user $USER; "
            "or use the user-mode network, which needs no rights"
        )
        return lacking("tap", f"a tap cannot be made: {error.strerror}", advice, works=False)
    finally:
        os.close(fd)  # a tap that is not persistent goes with its file
    offers = [
        word for bit, word in ((IFF_VNET_HDR, "vnet_hdr"), (IFF_MULTI_QUEUE, "multi-queue")) if features & bit
    ]
    text = f"a tap was made and removed ({name}; {', '.join(offers) or 'plain'})"
    return ok("tap", text, works=True, vnet_hdr=bool(features & IFF_VNET_HDR),
              multi_queue=bool(features & IFF_MULTI_QUEUE))  # fmt: skip


def _make_tap(fd: int) -> tuple[str, int]:
    import ctypes
    import fcntl

    import ioctl_opt

    get_features = ioctl_opt.IOR(ord("T"), 207, ctypes.c_uint)  # TUNGETFEATURES
    set_interface = ioctl_opt.IOW(ord("T"), 202, ctypes.c_int)  # TUNSETIFF
    features = bytearray(4)
    fcntl.ioctl(fd, get_features, features)
    request = bytearray(IFREQ.pack(b"kvmpydr%d", IFF_TAP | IFF_NO_PI))  # the kernel fills in the number
    fcntl.ioctl(fd, set_interface, request)
    return bytes(request[:16]).rstrip(b"\0").decode(), int.from_bytes(features, sys.byteorder)


def _links() -> Check:
    try:
        from pyroute2 import IPRoute
        from pyroute2.netlink.exceptions import NetlinkError
    except ImportError as error:
        return lacking("links", f"pyroute2 cannot be imported: {error}", "pip install pyroute2", works=False)
    name = f"kvmpydr{os.getpid() % 100000}"
    try:
        with IPRoute() as route:
            route.link("add", ifname=name, kind="bridge")
            _remove(route, name)
    except NetlinkError as error:
        if error.code == errno.EOPNOTSUPP:
            advice = "load the driver: sudo modprobe bridge"
            return limited("links", "this kernel cannot make bridges", advice, works=False)
        advice = "bridges and addresses of taps need CAP_NET_ADMIN: run that as root, or in a namespace"
        return limited("links", f"a bridge cannot be made: {os.strerror(error.code)}", advice, works=False)
    except OSError as error:
        advice = "a sandbox forbids netlink sockets"
        return limited("links", f"netlink: {error.strerror}", advice, works=False)
    return ok("links", "a bridge was made and removed through netlink", works=True)


def _remove(route: Any, name: str) -> None:
    for index in route.link_lookup(ifname=name):
        route.link("del", index=index)


def _namespaces() -> Check:
    """Whether an ordinary user may have a network namespace, the way to taps without root."""
    command = [sys.executable, "-I", "-S", "-c", NAMESPACES]
    try:
        done = subprocess.run(command, capture_output=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return limited("namespaces", f"could not be tried: {error}", works=None)
    if done.returncode == 0:
        return ok("namespaces", "user and network namespaces work without root", works=True)
    if done.stderr or done.returncode < 0:
        last = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        return limited("namespaces", f"could not be tried: {last or done.returncode}", works=None)
    advice = "networks without root need the user-mode network"
    if read("/proc/sys/kernel/apparmor_restrict_unprivileged_userns").strip() == "1":
        advice += "; or sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0"
    elif read("/proc/sys/kernel/unprivileged_userns_clone").strip() == "0":
        advice += "; or sudo sysctl kernel.unprivileged_userns_clone=1"
    elif read("/proc/sys/user/max_user_namespaces").strip() == "0":
        advice += "; or sudo sysctl user.max_user_namespaces=10000"
    text = f"an ordinary user gets no namespace: {os.strerror(done.returncode)}"
    return limited("namespaces", text, advice, works=False)


def _vhost() -> Check:
    """The kernel's virtio back ends; without them kvmpy's own serve, only slower."""
    found = {name: os.access(f"/dev/vhost-{name}", os.R_OK | os.W_OK) for name in ("net", "vsock")}
    there = [f"vhost-{name}" for name, usable in found.items() if usable]
    text = f"{' and '.join(there)} may be used" if there else "no vhost device may be used; kvmpy's own serve"
    return info("vhost", text, **found)
