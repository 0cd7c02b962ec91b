# SPDX-License-Identifier: Apache-2.0
"""A Linux network stack in a namespace of its own is the guest: real ARP, DHCP, TCP, without a virtual machine."""

from __future__ import annotations

import contextlib
import os
import subprocess

import pytest

from kvmpy.errors import NetworkError
from kvmpy.net import Switch, Tap


class Namespace:
    """A network namespace in which programs run."""

    def __init__(self, name: str) -> None:
        self.name = name

    def run(self, *command: str, check: bool = True, timeout: float = 60) -> str:
        """The output of a program in it, errors too."""
        done = subprocess.run(
            ["ip", "netns", "exec", self.name, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert not check or done.returncode == 0, done.stdout
        return done.stdout

    def start(self, *command: str, **options) -> subprocess.Popen:
        return subprocess.Popen(["ip", "netns", "exec", self.name, *command], text=True, **options)


def new_namespace(number: int):
    name = f"kvmpyt{os.getpid()}-{number}"
    try:
        subprocess.run(["ip", "netns", "add", name], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no ip: install the package iproute2")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespace: {error.stderr.strip()}")
    space = Namespace(name)
    space.run("ip", "link", "set", "lo", "up")
    return space


@contextlib.contextmanager
def guest_on(backend, space: Namespace, name: str = "eth0", *addresses: str):
    """`space` gets an interface that is wired to `backend`, as the card of a guest would be; closes the back end."""
    switch = Switch()
    try:
        switch.connect(backend)
        try:
            switch.connect(Tap(name, namespace=space.name))
        except NetworkError as error:
            pytest.skip(f"no tap interface: {error}")
        for address in addresses:
            space.run("ip", "addr", "add", address, "dev", name)
        yield switch
    finally:
        switch.close()


UDHCPC = """#!/bin/sh
[ "$1" = bound ] || exit 0
ip addr add "$ip/$mask" dev "$interface"
ip link set "$interface" mtu "$mtu"
ip route add default via "$router"
echo "lease $ip/$mask router $router dns $dns mtu $mtu domain $domain hostname $hostname"
"""
