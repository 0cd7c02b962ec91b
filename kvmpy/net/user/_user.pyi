# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

_Address = IPv4Address | IPv6Address
_Network = IPv4Network | IPv6Network
_Endpoint = tuple[_Address, int]
_Name = tuple[str, int]
_Rule = tuple[bool, int, _Network | None, str | None, int, int]
_Decision = tuple[float, bool, int, int, bool, int, _Name, _Name, str]

class UserStack:
    def __init__(
        self,
        port: int,
        *,
        network: IPv4Network,
        gateway: IPv4Address,
        dns: IPv4Address,
        first: IPv4Address,
        mac: bytes,
        mtu: int,
        prefix6: IPv6Network,
        gateway6: IPv6Address,
        dns6: IPv6Address,
        ipv6: bool,
        host_loopback: bool,
        max_tcp: int,
        max_udp: int,
        max_icmp: int,
        max_buffers: int,
        domain: str,
        hostname: str,
    ) -> None: ...
    def run(self) -> None: ...
    def stop(self) -> None: ...
    def close(self) -> None: ...
    @property
    def news(self) -> int: ...
    def takes(self, offloads: int) -> None: ...
    def listen(self, fd: int, protocol: int, guest: _Endpoint) -> None: ...
    def unlisten(self, fd: int) -> None: ...
    def forward(self, protocol: int, at: _Endpoint, to: _Endpoint | bytes) -> None: ...
    def set_rules(self, rules: Sequence[_Rule], allow: bool, filter_names: bool) -> None: ...
    def pin(self, rule: int, ip: _Address) -> None: ...
    def set_resolvers(self, servers: Sequence[_Endpoint]) -> None: ...
    def decisions(self) -> list[_Decision]: ...
    @property
    def counts(self) -> dict[str, int]: ...
