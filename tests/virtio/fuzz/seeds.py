# SPDX-License-Identifier: Apache-2.0
"""Writes inputs for fuzz_virtio.c that are nearly right: for each device, a split and a packed ring with requests."""

import struct
import sys
from pathlib import Path

NEXT, WRITE, INDIRECT, AVAIL = 1, 2, 4, 0x80
SIZE = 8
DATA = 0x1000


def desc(addr, size, flags, last, packed):
    return struct.pack("<QIHH", addr, size, *((last, flags | AVAIL) if packed else (flags, last)))


def ring(chains, packed):
    """The first KiB of memory: descriptors at 0, the available ring at 0x800 (by steps)."""
    table, heads, slot = b"", [], 0
    for chain in chains:
        heads.append(slot)
        for number, (addr, size, flags) in enumerate(chain):
            more = number < len(chain) - 1
            flags |= NEXT if more else 0
            table += desc(addr, size, flags, heads[-1] if packed else slot + 1, packed)
            slot += 1
    return table.ljust(0x800, b"\0"), heads


def write(at, data):
    """A step's changes, at most seven bytes at a time."""
    steps = b""
    for start in range(0, len(data), 7):
        part = data[start : start + 7]
        steps += bytes([len(part)]) + b"".join(struct.pack("<HB", at + start + i, b) for i, b in enumerate(part))
        steps += bytes([0, 0, 0, 0])
    return steps


CHAINS = {
    0: [[(DATA, 16, 0), (DATA + 64, 600, WRITE)], [(DATA, 8, WRITE)]],
    1: [[(DATA, 16, 0), (DATA + 512, 512, WRITE), (DATA + 32, 1, WRITE)]],
    2: [[(DATA, 12, 0), (DATA + 64, 100, 0)], [(DATA, 60, WRITE)], [(DATA + 600, 2000, WRITE)]],
    3: [[(DATA, 100, WRITE)], [(0x100000000, 4096, WRITE)]],
}


def main(folder):
    for kind, chains in CHAINS.items():
        for packed in (False, True):
            for event in (0, 1):
                table, heads = ring(chains, packed)
                head = bytes([kind, 0x40 | 2 | event | (4 if packed else 0)]) + bytes(4)
                body = b"" if packed else write(0x804, struct.pack(f"<{len(heads)}H", *heads))
                body += b"" if packed else write(0x802, struct.pack("<H", len(heads)))
                tail = bytes([0, 1, 2, 3, 200, 9, 9, 0xF]) * 12
                data = head + table + bytes([8 | 4 | 2]) + body + tail
                # memory takes half of what is left: as much behind it again
                data = data.ljust(6 + 2 * 0x800 + 1, b"\x0f") if len(data) < 6 + 0x1001 else data
                (folder / f"seed-{kind}-{'packed' if packed else 'split'}-{event}").write_bytes(data)


if __name__ == "__main__":
    main(Path(sys.argv[2]))  # the first word is the target: this is for one only
