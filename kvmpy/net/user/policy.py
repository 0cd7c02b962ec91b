# SPDX-License-Identifier: Apache-2.0
"""What a guest may reach: rules in order, the first that fits decides.

    Policy([Rule.parse("deny", "10.0.0.0/8"), Rule.parse("allow", "tcp:*.debian.org:80-443")])

A rule is `[tcp:|udp:|icmp:]HOST[:PORT[-PORT]]`; HOST is an address, a network such as 10.0.0.0/8 or [fd00::]/8, a
name, a name with `*.` before it for everything below it, or `any`. With rules that allow, the rest is denied; with
rules that only deny, the rest is allowed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network

Network = IPv4Network | IPv6Network

TCP, UDP, ICMP = 1, 2, 4
PROTOCOLS = {"tcp": TCP, "udp": UDP, "icmp": ICMP}
EVERYTHING = IPv6Network("::/0")  # IPv4 too: as ::ffff:0:0/96

LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
NAME = re.compile(rf"(\*\.)?{LABEL}(\.{LABEL})*", re.IGNORECASE)
PATTERN = re.compile(
    r"(?:(?P<protocol>tcp|udp|icmp):)?"
    r"(?:\[(?P<six>[0-9a-fA-F:.]+)\](?P<bits>/\d+)?|(?P<host>[^:\[\]]+))"
    r"(?::(?P<low>\d+)(?:-(?P<high>\d+))?)?"
)


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: allow or deny; by network or by name ("host" or ".domain" for all below); ports are inclusive."""

    allow: bool
    network: Network | None = None
    name: str | None = None
    protocols: int = TCP | UDP | ICMP
    ports: tuple[int, int] = (0, 65535)

    @classmethod
    def parse(cls, verdict: str, text: str) -> Rule:
        """A rule from "allow" or "deny" and its text (see above). Raises ValueError."""
        if verdict not in ("allow", "deny"):
            raise ValueError(f"a rule allows or denies, not {verdict!r}")
        found = PATTERN.fullmatch(text.strip())
        if found is None:
            raise ValueError(f"a rule is [tcp:|udp:|icmp:]HOST[:PORT[-PORT]], not {text!r}")
        protocols = PROTOCOLS.get(found["protocol"] or "", TCP | UDP | ICMP)
        ports = (0, 65535)
        if found["low"]:
            ports = int(found["low"]), int(found["high"] or found["low"])
            if not 1 <= ports[0] <= ports[1] <= 65535:
                raise ValueError(f"{text!r}: ports are 1 to 65535, the lower first")
            if protocols == ICMP:
                raise ValueError(f"{text!r}: ICMP has no ports")
            protocols &= TCP | UDP
        network, name = _place(found["six"] + (found["bits"] or "") if found["six"] else found["host"], text)
        return cls(verdict == "allow", network, name, protocols, ports)

    def __str__(self) -> str:
        words = ["allow" if self.allow else "deny"]
        words += [word for word, bit in PROTOCOLS.items() if self.protocols & bit and self.protocols != 7]
        place = self.name or ("any" if self.network == EVERYTHING else str(self.network))
        words.append(f"*{place}" if place.startswith(".") else place)
        if self.ports != (0, 65535):
            words.append("-".join(map(str, self.ports)))
        return " ".join(words)


def _place(word: str, text: str) -> tuple[Network | None, str | None]:
    if word == "any":
        return EVERYTHING, None
    if re.fullmatch(r"[0-9./]+|.*:.*", word):
        try:
            return ip_network(word), None
        except ValueError as error:
            raise ValueError(f"{text!r}: {error}") from error
    if NAME.fullmatch(word) is None or len(word) > 253:
        raise ValueError(f"{text!r}: {word!r} is no address, network or host name")
    return None, word.lower().removeprefix("*")


@dataclass(frozen=True, slots=True)
class Policy:
    """Rules in order; what none fits is allowed if `otherwise` says so (None: unless there is a rule that allows).

    filter_names: names are resolved only if a rule for them or `otherwise` allows it, so that questions to the DNS
    carry nothing out. Addresses of the host itself (127.0.0.0/8, ::1), link-local ones and groups are reached only
    by a rule whose network is among them.
    """

    rules: tuple[Rule, ...] = ()
    otherwise: bool | None = None
    filter_names: bool = True

    @classmethod
    def of(cls, allow: Iterable[str] = (), deny: Iterable[str] = ()) -> Policy:
        """From texts; what is denied stands before what is allowed. Raises ValueError."""
        rules = [Rule.parse("deny", text) for text in deny] + [Rule.parse("allow", text) for text in allow]
        return cls(tuple(rules))

    @property
    def allows_the_rest(self) -> bool:
        """Is allowed what no rule fits?"""
        if self.otherwise is not None:
            return self.otherwise
        return not any(rule.allow for rule in self.rules)
