# SPDX-License-Identifier: Apache-2.0
"""The network cards of a machine: where their packets go.

A word names a kind of back end, what it is called, and options: "tap:tap0,mac=52:54:00:12:34:56", "user".
Options that are not the card's own are the back end's: `kvmpy.net.words`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Self

from kvmpy.machine import words
from kvmpy.net import NetBackend
from kvmpy.net.words import KINDS, MANY, open_backend
from kvmpy.virtio import Net, RateLimit
from kvmpy.virtio.limits import NONE
from kvmpy.virtio.net import parse_mac


@dataclass(frozen=True, slots=True)
class Nic:
    """A network card of a machine: `Nic("tap:tap0", mac="52:54:00:12:34:56")`.

    backend: "tap:NAME" for a tap interface (needs the right to open it), "user" for a network without root, others of
    `net.words.KINDS`, or an object of `kvmpy.net`, which is closed with the machine. mac: default a random one.
    mtu: bytes, told to the guest. limit: how fast it may be, in each direction. options: of the kind of back end.
    """

    backend: str | NetBackend
    mac: str | None = None
    mtu: int | None = None
    limit: RateLimit = NONE
    options: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.backend, str):
            kind = self.backend.partition(":")[0]
            if kind not in KINDS:
                raise ValueError(f"a network is one of {', '.join(KINDS)}, not {self.backend!r}")
        elif self.options:
            raise ValueError(f"options {', '.join(self.options)} go with a back end that is given by name")
        if self.mac is not None:
            parse_mac(self.mac)

    @classmethod
    def parse(cls, text: str) -> Self:
        """A card from "KIND[:NAME][,mac=M][,mtu=BYTES][,bps=BYTES][,iops=FRAMES][,bps_burst=BYTES]
        [,iops_burst=FRAMES][,...]". Raises ValueError."""
        backend, options = words.split(text, MANY)
        known: dict[str, Callable[[str], object]] = {"mac": str, "mtu": int}
        own = {key: options.pop(key) for key in known if key in options}
        limit = words.take_limit(text, options)
        return cls(backend, limit=limit, options=options, **words.convert(text, own, known))

    def open(self) -> NetBackend:
        """Open the back end. Raises NetworkError, ValueError for options that it does not have."""
        if not isinstance(self.backend, str):
            return self.backend
        kind, _, name = self.backend.partition(":")
        return open_backend(kind, name, self.options, self.mtu)

    def device(self, backend: NetBackend, name: str) -> Net:
        """The virtio device for the open back end."""
        return Net(backend, name=name, mac=self.mac, mtu=self.mtu, receive_limit=self.limit, transmit_limit=self.limit)
