#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A guest serves a web page through a port forward of the user-mode network; no rights are needed.

Usage: web_server.py [GUEST], one of `kvmpy guest list` (default debian-6.1). Its packages are fetched on first use.
"""

import sys
import time
import urllib.request

import kvmpy
from kvmpy import guests
from kvmpy.net import Policy, UserNet

SERVE = guests.DHCP + "mkdir /www; uname -a > /www/index.html; httpd -p 80 -h /www; read answer"


def fetch(url: str) -> str:
    """The page, as soon as there is one."""
    for _ in range(600):
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                return answer.read().decode()
        except OSError:
            time.sleep(0.2)
    raise SystemExit("the guest serves nothing")


def main(name: str = "debian-6.1") -> int:
    guest = guests.get(name, progress=lambda text: print(text, file=sys.stderr))
    net = UserNet(
        host_forwards=["tcp:127.0.0.1:0-:80"],  # any free port of this host to port 80 of the guest
        policy=Policy.of(deny=["any"]),  # and nothing out
        on_decision=lambda decision: print("network:", decision),
    )
    url = f"http://127.0.0.1:{net.forwards[0].port}/"
    words = guests.parameters(SERVE, modules=("virtio_mmio", "virtio_pci", "virtio_net"))
    machine = kvmpy.Machine(
        memory="256M",
        kernel=guest.kernel,
        initrd=guest.initrd_modules,
        cmdline=f"{guest.cmdline} quiet {words}",
        nets=[net],
    )
    with machine:
        print(f"{url} says: {fetch(url)}", end="")
        machine.console.send_line("enough")
        print(f"the run ended: {machine.wait(60).reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
