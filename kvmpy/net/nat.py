# SPDX-License-Identifier: Apache-2.0
"""Address translation for a guest's network: a table of nftables of its own, and forwarding of packets."""

from __future__ import annotations

import json
import re
import subprocess
from ipaddress import IPv4Interface, IPv6Interface
from pathlib import Path
from typing import Any

from kvmpy.errors import NetworkError
from kvmpy.net import owner

TABLE = re.compile(r"kvmpy_(\d+_\d+_\d+)_\w+")
FORWARDING = {4: Path("/proc/sys/net/ipv4/ip_forward"), 6: Path("/proc/sys/net/ipv6/conf/all/forwarding")}
WAS_OFF = "forwarding{}_was_off"  # an empty chain that remembers it, also after a crash


def nft(script: str) -> None:
    """Run a script of nft(8) in one transaction. Raises NetworkError."""
    _run(["-f", "-"], script)


def _run(words: list[str], script: str = "") -> str:
    try:
        done = subprocess.run(["nft", *words], input=script, text=True, capture_output=True, timeout=30, check=False)
    except FileNotFoundError as error:
        raise NetworkError("address translation needs nft: install the package nftables") from error
    if done.returncode:
        raise NetworkError(f"nft: {(done.stderr.strip() or str(done.returncode)).splitlines()[0]}")
    return done.stdout


def _list(*words: str) -> list[dict[str, Any]]:
    """What `nft list ...` finds."""
    found: list[dict[str, Any]] = json.loads(_run(["-j", "list", *words]))["nftables"]
    return found


def table_name(interface: str) -> str:
    """The table of an interface of this process."""
    return f"kvmpy_{owner.mark()}_{re.sub(r'[^0-9A-Za-z]', '_', interface)}"


def add(table: str, interface: str, addresses: list[IPv4Interface | IPv6Interface]) -> None:
    """What comes from the networks of `addresses` and leaves by another interface gets that one's address."""
    rules = []
    families = sorted({address.version for address in addresses})
    for address in addresses:
        word = "ip" if address.version == 4 else "ip6"
        rules.append(f'{word} saddr {address.network} oifname != "{interface}" masquerade')
    off = [version for version in families if FORWARDING[version].read_text().strip() == "0"]
    lines = [f"table inet {table} {{", "chain nat {", "type nat hook postrouting priority srcnat;", *rules, "}"]
    lines += [f"chain {WAS_OFF.format(version)} {{\n}}" for version in off]
    nft("\n".join([*lines, "}", ""]))
    try:
        for version in off:
            FORWARDING[version].write_text("1")
    except OSError as error:
        nft(f"delete table inet {table}\n")
        raise NetworkError(f"packets cannot be forwarded: {FORWARDING[version]}: {error.strerror}") from error


def remove(table: str) -> None:
    """Remove a table; the last of kvmpy's turns forwarding off again, if the first turned it on."""
    marks = {version for version in FORWARDING if WAS_OFF.format(version) in _chains(table)}
    others = [name for name in tables() if name != table]
    script = f"delete table inet {table}\n"
    if marks and others:  # hand the memory on
        script += "".join(f"add chain inet {others[0]} {WAS_OFF.format(version)}\n" for version in marks)
    nft(script)
    if not others:
        for version in marks:
            FORWARDING[version].write_text("0")


def tables() -> list[str]:
    """All tables of kvmpy in this namespace."""
    names = [entry["table"]["name"] for entry in _list("tables") if entry.get("table", {}).get("family") == "inet"]
    return [name for name in names if TABLE.fullmatch(name)]


def _chains(table: str) -> set[str]:
    return {entry["chain"]["name"] for entry in _list("table", "inet", table) if "chain" in entry}


def reclaim() -> list[str]:
    """Remove the tables of processes that are gone; their names."""
    removed = []
    for name in tables():
        found = TABLE.fullmatch(name)
        if found is not None and owner.is_gone(found[1]):
            remove(name)
            removed.append(name)
    return removed
