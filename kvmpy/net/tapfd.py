# SPDX-License-Identifier: Apache-2.0
"""An open tap or macvtap descriptor as a back end."""

from __future__ import annotations

import fcntl
import os
import struct

from ioctl_opt import IOC, IOC_READ, IOC_WRITE  # <asm-generic/ioctl.h>

from kvmpy.net.backend import HEADER_SIZE, OFFLOADS, Closing

TUN = "/dev/net/tun"

# <linux/if_tun.h>; the last argument of an ioctl number is only its size.
TUNSETIFF = IOC(IOC_WRITE, ord("T"), 202, 4)
TUNGETFEATURES = IOC(IOC_READ, ord("T"), 207, 4)
TUNSETOFFLOAD = IOC(IOC_WRITE, ord("T"), 208, 4)
TUNGETIFF = IOC(IOC_READ, ord("T"), 210, 4)
TUNSETVNETHDRSZ = IOC(IOC_WRITE, ord("T"), 216, 4)
TUNSETQUEUE = IOC(IOC_WRITE, ord("T"), 217, 4)
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
IFF_MULTI_QUEUE, IFF_ATTACH_QUEUE, IFF_DETACH_QUEUE = 0x0100, 0x0200, 0x0400


class TapFd(Closing):
    """An open tap or macvtap descriptor, with the virtio header and the kernel's offloads.

    fd: of /dev/net/tun after TUNSETIFF, or of /dev/tapN; it belongs to the back end from now on. Raises OSError;
    ValueError when the interface has no IFF_VNET_HDR.
    """

    vnet_header = True
    offloads = OFFLOADS

    def __init__(self, fd: int) -> None:
        name, flags = struct.unpack("16sH22x", fcntl.ioctl(fd, TUNGETIFF, bytes(40)))
        if not flags & IFF_VNET_HDR or not flags & IFF_TAP:
            raise ValueError(f"{name.rstrip(bytes(1)).decode()}: not a tap interface with IFF_VNET_HDR")
        fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", HEADER_SIZE))
        os.set_blocking(fd, False)
        self.name = name.rstrip(b"\0").decode()
        self.fd = fd
        self._active = True

    @classmethod
    def open(cls, name: str, *, multi_queue: bool = False) -> TapFd:
        """Attach to tap interface `name`, which is created if it does not exist (needs CAP_NET_ADMIN).

        multi_queue: the interface has several queues, this is one more of them. Raises OSError.
        """
        if not 1 <= len(name.encode()) <= 15:
            raise ValueError(f"an interface name has 1 to 15 bytes, not {name!r}")
        fd = os.open(TUN, os.O_RDWR | os.O_CLOEXEC)
        try:
            flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | (IFF_MULTI_QUEUE if multi_queue else 0)
            request = struct.pack("16sH22x", name.encode(), flags)
            fcntl.ioctl(fd, TUNSETIFF, request)
            return cls(fd)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def open_queues(cls, name: str, count: int) -> list[TapFd]:
        """Attach `count` times to tap interface `name` with IFF_MULTI_QUEUE: a back end for each queue pair."""
        taps: list[TapFd] = []
        try:
            for _ in range(count):
                taps.append(cls.open(name, multi_queue=True))
        except BaseException:
            for tap in taps:
                tap.close()
            raise
        return taps

    def set_active(self, active: bool) -> None:
        """TUNSETQUEUE: a queue that is detached gets no packets. Only for those of `open_queues`."""
        if self.fd >= 0 and active != self._active:
            flags = IFF_ATTACH_QUEUE if active else IFF_DETACH_QUEUE
            fcntl.ioctl(self.fd, TUNSETQUEUE, struct.pack("16sH22x", b"", flags))
            self._active = active

    def set_offloads(self, offloads: int) -> None:
        """TUNSETOFFLOAD: what the guest's driver takes (5.1.3, GUEST_*)."""
        if self.fd >= 0:
            fcntl.ioctl(self.fd, TUNSETOFFLOAD, offloads)

    def close(self) -> None:
        """Close the descriptor; an interface that is not persistent disappears when no card uses it any more."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)
