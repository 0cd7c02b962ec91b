# SPDX-License-Identifier: Apache-2.0
"""Networks as words of a command line: a kind, a name, and options such as "user" with hostfwd=tcp::8080-:80.

| kind | name | options |
|---|---|---|
| user | | hostfwd guestfwd allow deny rest network dns ipv6 loopback domain hostname |
| tap | interface, default a new one | address bridge netns masquerade queues |
| stream | PATH or HOST:PORT | listen reconnect |
| switch | of a switch that machines of this process share | lock (a MAC address) |

All have pcap=FILE and snaplen=BYTES. hostfwd, guestfwd, allow, deny, dns and address may be repeated: the values are
lines of one text.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from kvmpy.net.backend import NetBackend
from kvmpy.net.pcap import Pcap
from kvmpy.net.stream import StreamSocket
from kvmpy.net.switch import Switch, SwitchPort
from kvmpy.net.tap import PATTERN, Tap
from kvmpy.net.user import Policy, UserNet

MANY = frozenset(("hostfwd", "guestfwd", "allow", "deny", "dns", "address"))


def open_backend(kind: str, name: str, options: Mapping[str, str], mtu: int | None = None) -> NetBackend:
    """Open a network. Raises NetworkError, ValueError for a kind or an option that there is not."""
    if kind not in KINDS:
        raise ValueError(f"a network is one of {', '.join(KINDS)}, not {kind!r}")
    own = dict(options)
    file, snaplen = own.pop("pcap", None), own.pop("snaplen", None)
    if snaplen is not None and file is None:
        raise ValueError("snaplen goes with pcap")
    values = Values(kind, own)
    backend = KINDS[kind](name, values, mtu)
    if file is None:
        return backend
    return Pcap(backend, file, **({"snaplen": int(snaplen)} if snaplen is not None else {}))


class Values:
    """The options of a network, each to be taken once; `end` refuses what nobody took."""

    def __init__(self, kind: str, options: Mapping[str, str]) -> None:
        self._kind = kind
        self._left = dict(options)

    def lines(self, key: str) -> list[str]:
        """All values of an option that may be repeated."""
        return self._left.pop(key).split("\n") if key in self._left else []

    def text(self, key: str, default: str | None = None) -> str | None:
        """One value."""
        return self._left.pop(key, default)

    def number(self, key: str, default: int) -> int:
        """A decimal number. Raises ValueError."""
        word = self._left.pop(key, None)
        if word is not None and not (word.isascii() and word.isdigit()):
            raise ValueError(f"{self._kind}: {key} is a number, not {word!r}")
        return default if word is None else int(word)

    def switch(self, key: str, default: bool) -> bool:
        """on or off. Raises ValueError."""
        word = self._left.pop(key, None)
        if word not in (None, "on", "off"):
            raise ValueError(f"{self._kind}: {key} is on or off, not {word!r}")
        return default if word is None else word == "on"

    def end(self) -> None:
        """Raises ValueError for options that were not taken."""
        if self._left:
            raise ValueError(f"network {self._kind}: no option {', '.join(sorted(self._left))}")


def _user(name: str, values: Values, mtu: int | None) -> NetBackend:
    if name:
        raise ValueError(f"a user-mode network has no name: user:{name}")
    rest = values.text("rest")
    if rest not in (None, "allow", "deny"):
        raise ValueError(f"user: rest is allow or deny, not {rest!r}")
    rules = Policy.of(values.lines("allow"), values.lines("deny")).rules
    servers = values.lines("dns")
    settings: dict[str, Any] = {
        "host_forwards": values.lines("hostfwd"),
        "guest_forwards": values.lines("guestfwd"),
        "policy": Policy(rules, None if rest is None else rest == "allow"),
        "dns": [_server(word) for word in servers] if servers else None,
        "ipv6": values.switch("ipv6", True),
        "host_loopback": values.switch("loopback", False),
        "network": values.text("network", "10.0.2.0/24"),
        "domain": values.text("domain", ""),
        "hostname": values.text("hostname", ""),
    }
    values.end()
    if mtu is not None:
        settings["mtu"] = mtu
    return UserNet(**settings)


def _server(word: str) -> str | tuple[str, int]:
    """1.1.1.1, 127.0.0.1:5353, [::1]:53"""
    host, colon, port = word.rpartition(":")
    if colon and (":" not in host or host.startswith("[")) and port.isdigit():
        return host.strip("[]"), int(port)
    return word.strip("[]")


def _tap(name: str, values: Values, mtu: int | None) -> NetBackend:
    settings: dict[str, Any] = {
        "addresses": values.lines("address"),
        "bridge": values.text("bridge"),
        "namespace": values.text("netns"),
        "masquerade": values.switch("masquerade", False),
        "queues": values.number("queues", 1),
    }
    values.end()
    return Tap(name or PATTERN, mtu=mtu, **settings)


def _stream(name: str, values: Values, mtu: int | None) -> NetBackend:
    listen, word = values.switch("listen", False), values.text("reconnect")
    values.end()
    try:
        reconnect = None if word is None else float(word)
    except ValueError as error:
        raise ValueError(f"stream: reconnect is a number of seconds, not {word!r}") from error
    host, _, port = name.rpartition(":")
    if not name:
        raise ValueError("stream needs a PATH or HOST:PORT")
    if host and "/" not in name and port.isdigit():
        return StreamSocket((host.strip("[]"), int(port)), listen=listen, reconnect=reconnect)
    return StreamSocket(name, listen=listen, reconnect=reconnect)


class _SharedPort:
    """A port of a switch that is closed with the last of its ports."""

    vnet_header = True

    def __init__(self, name: str, port: SwitchPort) -> None:
        self._name, self._port = name, port
        self.fd, self.offloads = port.fd, port.offloads

    def set_offloads(self, offloads: int) -> None:
        self._port.set_offloads(offloads)

    def stats(self) -> dict[str, int]:
        return self._port.stats()

    def close(self) -> None:
        self.fd = -1
        with _lock:
            self._port.close()
            users = _switches[self._name][1] if self._name in _switches else set()
            users.discard(self)
            if self._name in _switches and not users:
                _switches.pop(self._name)[0].close()


_switches: dict[str, tuple[Switch, set[_SharedPort]]] = {}
_lock = threading.Lock()


def _switch(name: str, values: Values, mtu: int | None) -> NetBackend:
    lock = values.text("lock")
    values.end()
    with _lock:
        if name not in _switches:
            _switches[name] = Switch(), set()
        switch, users = _switches[name]
        try:
            port = _SharedPort(name, switch.port(mac=lock))
        except BaseException:
            if not users:
                _switches.pop(name)[0].close()
            raise
        users.add(port)
        return port


KINDS: Mapping[str, Callable[[str, Values, int | None], NetBackend]] = {
    "user": _user,
    "tap": _tap,
    "stream": _stream,
    "switch": _switch,
}
