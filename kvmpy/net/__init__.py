# SPDX-License-Identifier: Apache-2.0
"""Networks for guests, usable without a VM: back ends of network cards. See docs/networks.md.

| back end | leads to |
|---|---|
| `UserNet` | the world, through sockets of this process; needs no rights |
| `Tap` | the host's network, by an interface that is made and removed; needs CAP_NET_ADMIN |
| `TapFd` | a tap or macvtap that is open already |
| `Switch` | other machines of this process, and any other back end |
| `StreamSocket` | passt, gvproxy, QEMU's `-netdev stream`, a kvmpy in another process |
| `PacketSocket` | a program with the other end of a socket pair |
| `Pcap` | any of them, with a capture of what passes |
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvmpy.net.backend import NetBackend as NetBackend
    from kvmpy.net.backend import PacketSocket as PacketSocket
    from kvmpy.net.backend import QueueBackend as QueueBackend
    from kvmpy.net.pcap import Pcap as Pcap
    from kvmpy.net.stream import StreamSocket as StreamSocket
    from kvmpy.net.switch import Switch as Switch
    from kvmpy.net.switch import SwitchPort as SwitchPort
    from kvmpy.net.tap import Tap as Tap
    from kvmpy.net.tapfd import TapFd as TapFd
    from kvmpy.net.user import Decision as Decision
    from kvmpy.net.user import GuestForward as GuestForward
    from kvmpy.net.user import HostForward as HostForward
    from kvmpy.net.user import Policy as Policy
    from kvmpy.net.user import Rule as Rule
    from kvmpy.net.user import UserNet as UserNet

_WHERE = {
    "Decision": "user",
    "GuestForward": "user",
    "HostForward": "user",
    "NetBackend": "backend",
    "PacketSocket": "backend",
    "Pcap": "pcap",
    "Policy": "user",
    "QueueBackend": "backend",
    "Rule": "user",
    "StreamSocket": "stream",
    "Switch": "switch",
    "SwitchPort": "switch",
    "Tap": "tap",
    "TapFd": "tapfd",
    "UserNet": "user",
}

__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    # Loaded on first use: importing the package must stay cheap.
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    globals()[name] = value
    return value
