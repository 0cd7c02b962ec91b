# SPDX-License-Identifier: Apache-2.0
"""Ports of the host that lead to the guest, and addresses of the guest's network that lead to the host."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

Address = IPv4Address | IPv6Address

TCP, UDP = socket.IPPROTO_TCP, socket.IPPROTO_UDP
PROTOCOLS = {"tcp": TCP, "udp": UDP}
HOST = r"(?:\[([0-9a-fA-F:.]+)\]|([^:\[\]-]*))"
HOSTFWD = re.compile(rf"(tcp|udp):{HOST}:(\d+)-(?:{HOST}:)?(\d+)")
GUESTFWD = re.compile(rf"(tcp|udp):{HOST}:(\d+)-(?:unix:(.+)|{HOST}:(\d+))")


def _port(text: str, whole: str, least: int = 1) -> int:
    if not least <= int(text) <= 65535:
        raise ValueError(f"{whole!r}: a port is {least} to 65535")
    return int(text)


def _address(text: str, whole: str) -> Address:
    try:
        return ip_address(text)
    except ValueError as error:
        raise ValueError(f"{whole!r}: {error}") from error


@dataclass(frozen=True, slots=True)
class HostForward:
    """Connections (datagrams) to `port` of the host's `address` go to `guest_port` of the guest.

    port 0: any free one. guest: its address, by default the first that DHCP gives out.
    """

    protocol: int
    address: Address
    port: int
    guest: Address | None
    guest_port: int

    @classmethod
    def parse(cls, text: str) -> HostForward:
        """From "tcp:127.0.0.1:8080-:80" as QEMU has it, or "tcp::8080-10.0.2.15:80". Raises ValueError.

        Without an address of the host it is 127.0.0.1: to listen to the world, say 0.0.0.0.
        """
        found = HOSTFWD.fullmatch(text)
        if found is None:
            raise ValueError(f"a forward to the guest is tcp|udp:[HOST]:PORT-[GUEST]:PORT, not {text!r}")
        protocol, six, four, port, guest6, guest4, guest_port = found.groups()
        guest = guest6 or guest4
        return cls(
            PROTOCOLS[protocol],
            _address(six or four or "127.0.0.1", text),
            _port(port, text, 0),
            _address(guest, text) if guest else None,
            _port(guest_port, text),
        )

    def bind(self) -> socket.socket:
        """A socket of the host for it. Raises OSError."""
        family = socket.AF_INET6 if self.address.version == 6 else socket.AF_INET
        kind = socket.SOCK_STREAM if self.protocol == TCP else socket.SOCK_DGRAM
        sock = socket.socket(family, kind)
        try:
            sock.setblocking(False)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if kind == socket.SOCK_STREAM:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((str(self.address), self.port))
            if kind == socket.SOCK_STREAM:
                sock.listen(128)
        except BaseException:
            sock.close()
            raise
        return sock


@dataclass(frozen=True, slots=True)
class GuestForward:
    """The guest's connections to `address`:`port` of its network go to a socket of the host: (address, port) or a
    path."""

    protocol: int
    address: Address | None  # None: the gateway
    port: int
    target: tuple[Address, int] | str

    @classmethod
    def parse(cls, text: str) -> GuestForward:
        """From "tcp:10.0.2.100:80-127.0.0.1:8080", "tcp::80-unix:/run/web.sock". Raises ValueError."""
        found = GUESTFWD.fullmatch(text)
        if found is None:
            raise ValueError(f"a forward of the guest is tcp|udp:[ADDRESS]:PORT-HOST:PORT or -unix:PATH, not {text!r}")
        protocol, six, four, port, path, host6, host4, host_port = found.groups()
        if path and protocol == "udp":
            raise ValueError(f"{text!r}: datagrams do not go to a Unix socket")
        target: tuple[Address, int] | str = path
        if not path:
            target = _address(host6 or host4 or "127.0.0.1", text), _port(host_port, text)
        where = six or four
        return cls(PROTOCOLS[protocol], _address(where, text) if where else None, _port(port, text), target)
