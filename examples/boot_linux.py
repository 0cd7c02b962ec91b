#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Boot Debian's own kernel with a busybox userland, run a command in it, power off.

Usage: boot_linux.py [GUEST [COMMAND]], GUEST is one of `kvmpy guest list` (default debian-6.1).
The guest's packages are fetched on first use, and cached.
"""

import sys

import kvmpy
from kvmpy import guests
from kvmpy.chardev import Stdio


def main(name: str = "debian-6.1", command: str = "uname -a") -> int:
    guest = guests.get(name, progress=lambda text: print(text, file=sys.stderr))
    machine = kvmpy.Machine(
        memory="512M",
        kernel=guest.kernel,
        initrd=guest.initrd,
        cmdline=f"{guest.cmdline} {guests.parameters(command)}",
        console=Stdio(),
    )
    print(f"{machine.entry.format}: {machine.entry.detail}")
    print(f"engine: {machine.backend} ({machine.backend_reason})\n")
    try:
        with machine:
            outcome = machine.wait()
    except kvmpy.GuestError as error:
        print(f"\nthe guest died: {error}\n{error.report}")
        return 70
    print(f"\nthe run ended: {outcome.reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
