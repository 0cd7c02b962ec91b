# SPDX-License-Identifier: Apache-2.0
"""A tap interface, made and configured for a guest, and removed with everything around it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import socket
import struct
from collections.abc import Iterable
from ipaddress import IPv4Interface, IPv6Interface, ip_interface

from kvmpy.errors import NetworkError
from kvmpy.net import links, nat
from kvmpy.net.backend import OFFLOADS, Closing
from kvmpy.net.guard import Guard
from kvmpy.net.namespace import alone, inside, open_namespace
from kvmpy.net.tapfd import TUN, TapFd

log = logging.getLogger("kvmpy.net")

SIOCGIFFLAGS = 0x8913  # <linux/sockios.h>
PATTERN = "kvmpy%d"  # the kernel puts a number in


class Tap(Closing):
    """A tap interface and what the host needs to reach the guest behind it.

    name: of the interface, one with %d is numbered by the kernel; if it exists (made for this user by root, say), it is
    used. addresses: of the host on it, "192.168.77.1/24". bridge: a bridge to put it in, made if there is none of
    this name,
    which then carries the addresses. namespace: name or path of the network namespace that the interface is in. mtu:
    bytes. masquerade: the guest's packets leave by the host's other interfaces with their addresses (nftables).
    queues: how many queue pairs a card on it has; their back ends are in `queues`, and all but the first get no packets
    until a driver uses them.

    Everything is removed at `close`, and after a crash: the tap goes with the process, a bridge and a table of nftables
    are removed by a guard (`kvmpy.net.guard`), or by the next Tap in that namespace. Raises NetworkError, ValueError.
    """

    vnet_header = True
    offloads = OFFLOADS

    def __init__(
        self,
        name: str = PATTERN,
        *,
        addresses: str | Iterable[str] = (),
        bridge: str | None = None,
        namespace: str | None = None,
        mtu: int | None = None,
        masquerade: bool = False,
        queues: int = 1,
    ) -> None:
        words = [addresses] if isinstance(addresses, str) else list(addresses)
        self.addresses = [_interface(word) for word in words]
        if masquerade and not self.addresses:
            raise ValueError("masquerade needs addresses: the guest's network is theirs")
        if mtu is not None and not 68 <= mtu <= 65521:
            raise ValueError(f"the MTU of a tap is 68 to 65521 bytes, not {mtu}")
        for word in (name, bridge):
            if word is not None and (not 1 <= len(word.encode()) <= 15 or "/" in word or word.split() != [word]):
                raise ValueError(f"an interface name has 1 to 15 bytes without blanks and slashes, not {word!r}")
        if not 1 <= queues <= 16:
            raise ValueError(f"a tap has 1 to 16 queues, not {queues}")
        self.namespace = namespace
        self._place = None if namespace is None else open_namespace(namespace)
        self._undo = contextlib.ExitStack()
        self._guard: Guard | None = None
        try:
            inside(self._place, lambda: self._make(name, bridge, mtu, masquerade, queues))
        except BaseException:
            self.close()
            raise

    def _make(self, name: str, bridge: str | None, mtu: int | None, masquerade: bool, queues: int) -> None:
        if bridge or masquerade:
            self._guard = Guard()
        with alone():
            _reclaim()
            self._configure(name, bridge, mtu, masquerade, queues)

    def _configure(self, name: str, bridge: str | None, mtu: int | None, masquerade: bool, queues: int) -> None:
        self.queues = _open(name, queues)
        for tap in self.queues:
            self._undo.callback(tap.close)
        self.name = self.queues[0].name
        self.fd = self.queues[0].fd
        for tap in self.queues[1:]:
            tap.set_active(False)
        plain = "%" not in name and not (bridge or mtu or self.addresses) and _is_up(self.name)
        if not plain and links.configure(self.name, mtu=mtu, bridge=bridge, addresses=self.addresses) and bridge:
            # The taps are closed after it (and leave it then), so it is emptied by hand here.
            self._undo.pop_all()
            self._undo.callback(links.remove_bridge, bridge)
            for tap in self.queues:
                self._undo.callback(tap.close)
        if masquerade:
            table = nat.table_name(self.name)
            nat.add(table, bridge or self.name, self.addresses)
            self._undo.callback(nat.remove, table)

    def set_offloads(self, offloads: int) -> None:
        """TUNSETOFFLOAD: what the guest's driver takes (virtio 1.2, 5.1.3, GUEST_*)."""
        for tap in self.queues:
            tap.set_offloads(offloads)

    def close(self) -> None:
        """Remove the interface and what was made for it; again is no error. Raises NetworkError when that fails."""
        undo, place = self._undo.pop_all(), self._place
        self._place, self.fd = None, -1

        def take_back() -> None:
            with alone():
                undo.close()

        try:
            inside(place, take_back)
        finally:
            if self._guard is not None:
                self._guard.close()
            if place is not None:
                os.close(place)

    def __repr__(self) -> str:
        return f"<Tap {self.name}{f' in {self.namespace}' if self.namespace else ''}>"


def reclaim() -> list[str]:
    """Remove what kvmpys that were killed have left in this namespace: bridges and tables of nftables; their names."""
    with alone():
        return _reclaim()


def _reclaim() -> list[str]:
    removed = links.reclaim()
    if shutil.which("nft") is not None and os.geteuid() == 0:
        removed += nat.reclaim()
    for name in removed:
        log.info("removed %s, which a process that was killed had left", name)
    return removed


def _open(name: str, queues: int) -> list[TapFd]:
    try:
        taps = [TapFd.open(name, multi_queue=queues > 1)]
        try:
            for _ in range(queues - 1):
                taps.append(TapFd.open(taps[0].name, multi_queue=True))
        except BaseException:
            for tap in taps:
                tap.close()
            raise
        return taps
    except OSError as error:
        advice = ""
        if error.errno == errno.ENOENT:
            advice = "; load the driver: sudo modprobe tun"
        elif error.errno in (errno.EPERM, errno.EACCES):
            advice = (
                "; it needs CAP_NET_ADMIN: run as root, have root make one (ip tuntap add NAME mode tap user USER), "
            )
            advice += "or use the user-mode network"
        elif error.errno == errno.EBUSY:
            advice = "; another process has it"
        raise NetworkError(f"tap {name}: {error.strerror} ({TUN}){advice}") from error
    except ValueError as error:
        raise NetworkError(str(error)) from error


def _is_up(name: str) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        flags = struct.unpack("16xH22x", fcntl.ioctl(sock, SIOCGIFFLAGS, struct.pack("16s24x", name.encode())))[0]
    return bool(flags & 1)


def _interface(word: str) -> IPv4Interface | IPv6Interface:
    try:
        found = ip_interface(word)
    except ValueError as error:
        raise ValueError(f"an address of the host is like 192.168.77.1/24, not {word!r}") from error
    if "/" not in word:
        raise ValueError(f"an address of the host has a prefix, such as {word}/24")
    return found
