# SPDX-License-Identifier: Apache-2.0
"""User-mode network: a guest on the host's sockets, without any rights. The gateway itself is C (user.h)."""

from __future__ import annotations

import logging
import os
import re
import select
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_address
from pathlib import Path

from kvmpy.errors import NetworkError
from kvmpy.net.backend import OFFLOADS, Closing, wire
from kvmpy.net.user._user import UserStack
from kvmpy.net.user.forward import GuestForward, HostForward
from kvmpy.net.user.policy import Policy

log = logging.getLogger("kvmpy.net")

MAC = bytes([0x52, 0x55, 0x0A, 0x00, 0x02, 0x02])
PREFIX6 = IPv6Network("fd00:6b76:6d70:7900::/64")
RESOLV_CONF = Path("/etc/resolv.conf")
DNS_PORT = 53
REASONS = ("default", "rule", "forward", "special address", "limit", "host")
PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp"}


@dataclass(frozen=True, slots=True)
class Decision:
    """Something that the guest (or, `inbound`, a client of a forward) wanted to reach, and what became of it.

    time: seconds since 1970. reason: "default", "rule" (number `rule` of the policy), "forward", "special address",
    "limit". name: of a question to the DNS, else empty.
    """

    time: float
    allowed: bool
    protocol: str
    guest: tuple[str, int]
    peer: tuple[str, int]
    reason: str
    rule: int | None
    inbound: bool
    name: str

    def __str__(self) -> str:
        verdict = "allowed" if self.allowed else "denied"
        why = f"rule {self.rule}" if self.rule is not None else self.reason
        guest, peer = (
            f"{host}:{port}" if ":" not in host else f"[{host}]:{port}" for host, port in (self.guest, self.peer)
        )
        if self.name:
            return f"{verdict} dns {guest} asks for {self.name} ({why})"
        return f"{verdict} {self.protocol} {f'{peer} -> {guest}' if self.inbound else f'{guest} -> {peer}'} ({why})"


class UserNet(Closing):
    """A network for one guest (or, through a `Switch`, several) behind a gateway made of ordinary sockets.

    network: IPv4, its second address is the gateway, the third the DNS server, the fifteenth and those after it are
    given
    out by DHCP. host_forwards, guest_forwards: see `HostForward.parse` and `GuestForward.parse`. policy: what the
    guest may
    reach. host_loopback: the gateway's ports are those of the host's 127.0.0.1. dns: servers to ask, "1.1.1.1" or
    ("127.0.0.1", 5353); by default those of /etc/resolv.conf. mtu: bytes. on_decision: called with each `Decision`
    in a thread of the network; they are logged too ("kvmpy.net", INFO and for denied ones WARNING).
    max_tcp, max_udp, max_icmp: flows at a time. max_buffers: of 512 KiB, for TCP; a connection uses at most two.

    It works from the start. Raises NetworkError when a port of the host is taken, ValueError.
    """

    vnet_header = True
    offloads = OFFLOADS

    def __init__(
        self,
        *,
        network: str = "10.0.2.0/24",
        host_forwards: Iterable[str | HostForward] = (),
        guest_forwards: Iterable[str | GuestForward] = (),
        policy: Policy | None = None,
        host_loopback: bool = False,
        dns: Sequence[str | tuple[str, int]] | None = None,
        ipv6: bool = True,
        mtu: int = 1500,
        domain: str = "",
        hostname: str = "",
        on_decision: Callable[[Decision], object] | None = None,
        max_tcp: int = 1024,
        max_udp: int = 512,
        max_icmp: int = 64,
        max_buffers: int = 128,
    ) -> None:
        self._closed = False
        self.network = IPv4Network(network)
        if not 8 <= self.network.prefixlen <= 27:
            raise ValueError(f"a user-mode network has a prefix of 8 to 27 bits, not {network}")
        if not 1280 <= mtu <= 65500:
            raise ValueError(f"the MTU of a user-mode network is 1280 to 65500 bytes, not {mtu}")
        for name in (domain, hostname):
            if name and not re.fullmatch(r"[A-Za-z0-9_.-]{1,63}", name):
                raise ValueError(f"not a name for DHCP: {name!r}")
        self.gateway, self.dns, self.guest = (self.network[n] for n in (2, 3, 15))
        self.mtu = mtu
        self.policy = policy if policy is not None else Policy()
        self.forwards: list[HostForward] = []
        self._sockets: dict[HostForward, int] = {}
        self._on_decision = on_decision
        self._own_dns = dns is not None
        self._resolv_conf = 0
        ours, theirs = wire()
        self._ours, self._theirs = ours, theirs
        try:
            self._stack = UserStack(
                theirs.fileno(), network=self.network, gateway=self.gateway, dns=self.dns, first=self.guest,
                mac=MAC, mtu=mtu, prefix6=PREFIX6, gateway6=PREFIX6[2], dns6=PREFIX6[3], ipv6=ipv6,
                host_loopback=host_loopback, max_tcp=_count(max_tcp), max_udp=_count(max_udp),
                max_icmp=_count(max_icmp), max_buffers=_count(max_buffers), domain=domain, hostname=hostname,
            )  # fmt: skip
        except OSError as error:
            self._close_wire()
            raise NetworkError(f"no user-mode network: {error.strerror}") from error
        except BaseException:
            self._close_wire()
            raise
        self.fd = ours.fileno()
        self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._threads = [
            threading.Thread(target=self._stack.run, name="kvmpy-net", daemon=True),
            threading.Thread(target=self._watch, name="kvmpy-net-log", daemon=True),
        ]
        try:
            self.set_policy(self.policy)
            if dns is not None:
                self._stack.set_resolvers([_server(server) for server in dns])
            else:
                self._read_resolv_conf()
            for guest in guest_forwards:
                self.add_guest_forward(guest)
            for host in host_forwards:
                self.add_forward(host)
        except BaseException:
            self.close()
            raise
        for thread in self._threads:
            thread.start()

    # -- what may be changed while it runs

    def add_forward(self, forward: str | HostForward) -> HostForward:
        """Lead a port of the host to the guest; the forward with the port that was taken, if it was 0.

        Raises NetworkError when the port cannot be had, ValueError.
        """
        asked = HostForward.parse(forward) if isinstance(forward, str) else forward
        guest = asked.guest or self.guest
        if guest.version == 4 and (guest not in self.network or guest in (self.gateway, self.dns)):
            raise ValueError(f"{guest} is no address of a guest in {self.network}")
        try:
            sock = asked.bind()
        except OSError as error:
            where = f"{asked.address} port {asked.port}"
            raise NetworkError(f"the host's {where} cannot be forwarded: {error.strerror}") from error
        with sock:
            made = HostForward(asked.protocol, asked.address, sock.getsockname()[1], guest, asked.guest_port)
            try:
                self._stack.listen(sock.fileno(), asked.protocol, (guest, asked.guest_port))
            except OSError as error:
                raise NetworkError(f"too many forwards: {error.strerror}") from error
            self._sockets[made] = sock.detach()
        self.forwards.append(made)
        return made

    def remove_forward(self, forward: HostForward) -> None:
        """Take a forward back; connections that it made go on. Raises ValueError for one that is not there."""
        if forward not in self._sockets:
            raise ValueError(f"no such forward: {forward}")
        self._stack.unlisten(self._sockets.pop(forward))
        self.forwards.remove(forward)

    def add_guest_forward(self, forward: str | GuestForward) -> None:
        """Lead an address of the guest's network to a socket of the host. Raises ValueError, NetworkError."""
        wanted = GuestForward.parse(forward) if isinstance(forward, str) else forward
        address = wanted.address or self.gateway
        if address.version != 4 or address not in self.network or address == self.network.broadcast_address:
            raise ValueError(f"{address} is not in the guest's network {self.network}")
        target = os.fsencode(wanted.target) if isinstance(wanted.target, str) else wanted.target
        try:
            self._stack.forward(wanted.protocol, (address, wanted.port), target)
        except OSError as error:
            raise NetworkError(f"too many forwards: {error.strerror}") from error

    def set_policy(self, policy: Policy) -> None:
        """From now on new connections are judged by this one; those that exist go on.

        Names without `*.` are resolved here and now, so that a guest with an address from elsewhere is served too; a
        name that the host cannot resolve is no error. Raises ValueError for more rules than fit.
        """
        rules = [(r.allow, r.protocols, r.network, r.name, *r.ports) for r in policy.rules]
        self._stack.set_rules(rules, policy.allows_the_rest, policy.filter_names)
        self.policy = policy
        for number, rule in enumerate(policy.rules):
            if rule.name is not None and not rule.name.startswith("."):
                for address in _resolve(rule.name):
                    self._stack.pin(number, address)

    # -- a back end

    def set_offloads(self, offloads: int) -> None:
        """What the guest's driver takes."""
        if not self._closed:
            self._stack.takes(offloads)

    def stats(self) -> dict[str, int]:
        """Live counters by name."""
        return self._stack.counts

    def close(self) -> None:
        """End all connections; again is no error."""
        if self._closed:
            return
        self._closed = True
        self._stack.stop()
        os.eventfd_write(self._stop, 1)
        for thread in self._threads:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join()
        self._tell()
        self._stack.close()
        os.close(self._stop)
        self._close_wire()

    def _close_wire(self) -> None:
        self.fd = -1
        self._ours.close()
        self._theirs.close()

    # -- the thread for what is not data

    def _watch(self) -> None:
        poll = select.poll()
        poll.register(self._stack.news, select.POLLIN)
        poll.register(self._stop, select.POLLIN)
        while not self._closed:
            for fd, _ in poll.poll():
                if fd == self._stack.news:
                    os.eventfd_read(fd)
                    self._tell()
                    if not self._own_dns:
                        self._read_resolv_conf()

    def _tell(self) -> None:
        for time, allowed, protocol, reason, inbound, rule, guest, peer, name in self._stack.decisions():
            decision = Decision(
                time,
                allowed,
                PROTOCOLS[protocol],
                guest,
                peer,
                REASONS[reason],
                None if rule < 0 else rule,
                inbound,
                name,
            )
            log.log(logging.INFO if allowed else logging.WARNING, "%s", decision)
            if self._on_decision is not None:
                try:
                    self._on_decision(decision)
                except Exception:
                    log.exception("on_decision failed")

    def _read_resolv_conf(self) -> None:
        """The host's DNS servers, anew when the file changed: a host may move to another network."""
        try:
            changed = RESOLV_CONF.stat().st_mtime_ns
            if changed == self._resolv_conf:
                return
            text = RESOLV_CONF.read_text("utf-8", "replace")
        except OSError as error:
            log.warning("%s: %s; names are not resolved for guests", RESOLV_CONF, error.strerror)
            return
        self._resolv_conf = changed
        servers = []
        for word in re.findall(r"^\s*nameserver\s+(\S+)", text, re.M):
            try:
                servers.append(_server(word))
            except ValueError:
                log.warning("%s: %s is no address", RESOLV_CONF, word)
        self._stack.set_resolvers(servers)

    def __repr__(self) -> str:
        return f"<UserNet {self.network}{' closed' if self._closed else ''}>"


def _count(number: int) -> int:
    if not 1 <= number <= 1 << 20:
        raise ValueError(f"a limit is 1 to {1 << 20}, not {number}")
    return number


def _server(where: str | tuple[str, int]) -> tuple[IPv4Address, int]:
    host, port = (where, DNS_PORT) if isinstance(where, str) else where
    return ip_address(host.partition("%")[0]), port  # type: ignore[return-value]


def _resolve(name: str) -> set[IPv4Address]:
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return set()
    return {ip_address(str(address[0]).partition("%")[0]) for *_, address in found}  # type: ignore[misc]
