# SPDX-License-Identifier: Apache-2.0
"""Links, addresses and bridges through netlink (pyroute2's IPRoute), in the namespace of the calling thread."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from ipaddress import IPv4Interface, IPv6Interface
from typing import Any

from kvmpy.errors import NetworkError
from kvmpy.net import owner

ALIAS = "kvmpy:"  # of bridges that kvmpy made; behind it stands `owner.mark()`


@contextlib.contextmanager
def routes(what: str) -> Iterator[Any]:
    """An IPRoute; its errors become NetworkError: "`what`: ..."."""
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with IPRoute() as ip:
            yield ip
    except NetlinkError as error:
        advice = (
            "; it needs CAP_NET_ADMIN: run as root, or use the user-mode network" if error.code == errno.EPERM else ""
        )
        raise NetworkError(f"{what}: {os.strerror(error.code)}{advice}") from error
    except OSError as error:
        raise NetworkError(f"{what}: {error.strerror}") from error


def index_of(ip: Any, name: str) -> int | None:
    """The number of an interface; None: there is none of this name."""
    found = ip.link_lookup(ifname=name)
    return int(found[0]) if found else None


def configure(
    name: str, *, mtu: int | None, bridge: str | None, addresses: list[IPv4Interface | IPv6Interface]
) -> bool:
    """Set an interface up, in `bridge`, which is made if need be and then carries the addresses; was it made?

    Raises NetworkError; a bridge that was made is then removed again.
    """
    made = False
    with routes(f"interface {name}") as ip:
        index = index_of(ip, name)
        if index is None:
            raise NetworkError(f"interface {name}: it is gone")
        try:
            carrier = index
            if bridge is not None:
                found = index_of(ip, bridge)
                if found is not None and addresses:
                    raise NetworkError(f"bridge {bridge} exists: its addresses are not kvmpy's to set")
                if found is None:
                    ip.link("add", ifname=bridge, kind="bridge")
                    made = True
                    found = index_of(ip, bridge)
                    ip.link("set", index=found, ifalias=ALIAS + owner.mark(), state="up")
                ip.link("set", index=index, master=found)
                carrier = int(found or 0)
            for address in addresses:
                ip.addr("add", index=carrier, address=str(address.ip), prefixlen=address.network.prefixlen)
            if mtu is not None:
                ip.link("set", index=index, mtu=mtu)
            ip.link("set", index=index, state="up")
        except BaseException:
            if made and bridge is not None:
                _remove(ip, bridge)
            raise
    return made


def remove_bridge(name: str) -> None:
    """Remove a bridge that was made here, unless somebody else's interfaces are in it. Raises NetworkError."""
    with routes(f"bridge {name}") as ip:
        index = index_of(ip, name)
        if index is not None and not _ports(ip, index):
            _remove(ip, name)


def reclaim() -> list[str]:
    """Remove the bridges of processes that are gone; their names."""
    removed = []
    with routes("bridges") as ip:
        for link in ip.get_links():
            alias = link.get_attr("IFLA_IFALIAS") or ""
            name = link.get_attr("IFLA_IFNAME")
            if alias.startswith(ALIAS) and owner.is_gone(alias.removeprefix(ALIAS)) and not _ports(ip, link["index"]):
                _remove(ip, name)
                removed.append(name)
    return removed


def _ports(ip: Any, bridge: int) -> list[int]:
    return [link["index"] for link in ip.get_links() if link.get_attr("IFLA_MASTER") == bridge]


def _remove(ip: Any, name: str) -> None:
    index = index_of(ip, name)
    if index is not None:
        ip.link("del", index=index)
