# SPDX-License-Identifier: Apache-2.0
"""Time one whole pass of memtest86+ over a small memory, with its screen on the serial line.

python -m benchmarks.suites.memtest [--memory 64M] [--cpus 1] [--backend tcg] [--timeout SECONDS]
"""

from __future__ import annotations

import argparse
import re
import sys
import time

from kvmpy import Machine, guests

DONE = re.compile(r"Pass:\s+[1-9]")  # how many are done, in the screen's last line
ERRORS = re.compile(r"Errors:\s*(\d+)")
CURSOR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--memory", default="64M")
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--backend", default="tcg", choices=("auto", "kvm", "tcg"))
    parser.add_argument("--timeout", type=float, default=3600, metavar="S")
    options = parser.parse_args()
    guest = guests.get("memtest86+")
    start = time.monotonic()
    with Machine(
        kernel=guest.kernel,
        cmdline="console=ttyS0,115200",
        memory=options.memory,
        cpus=options.cpus,
        backend=options.backend,
    ) as machine:
        try:
            machine.console.expect(DONE, timeout=options.timeout)
        except TimeoutError as error:
            print(error)
            return 1
        seconds = time.monotonic() - start
        errors = max((int(n) for n in ERRORS.findall(CURSOR.sub("", machine.console.transcript))), default=0)
    print(f"a pass over {options.memory} on {options.backend}: {seconds / 60:.1f} minutes, {errors} errors")
    return errors != 0


if __name__ == "__main__":
    sys.exit(main())
