# SPDX-License-Identifier: Apache-2.0
"""Hostile images: whatever the headers say, load() gives an Entry or a BootError, in bounded memory."""

from __future__ import annotations

import gzip
import random
import struct
import tracemalloc

import pytest
from boot_images import MIB, bzimage, elf, guest_memory, multiboot_kludge, pvh_note

from kvmpy.boot import Entry, load
from kvmpy.errors import BootError

CODE = b"\x90" * 63 + b"\xf4"
HEADER = struct.pack("<III", 0x1BAD_B002, 0, -0x1BAD_B002 & 0xFFFF_FFFF)
VMLINUX = elf([(1 << 63, 0x100_0000, CODE, 0x1000)], entry=0x100_0000)
PAYLOAD = gzip.compress(VMLINUX) + struct.pack("<I", len(VMLINUX))

SEEDS = {
    "bzImage": bzimage(PAYLOAD, payload=(0, len(PAYLOAD))),
    "ELF64": elf([(1 << 63, 0x10_0000, CODE, 0x1000), (0, 0x20_0000, CODE, 64)]),
    "ELF32": elf([(0xC010_0000, 0x10_0000, CODE, 0x1000)], bits=32, entry=0xC010_0000),
    "PVH": elf([(0x10_0000, 0x10_0000, CODE, 64)], note=pvh_note(0x10_0000)),
    "multiboot ELF": elf([(0x10_0000, 0x10_0000, HEADER + CODE, 0x1000)], bits=32),
    "multiboot": multiboot_kludge(0x10_0000, CODE, bss=64),
}
HEADERS = {"bzImage": (0x1F1, 0x26C)}
VALUES = (
    0,
    1,
    0x7F,
    0xFF,
    0x7FFF,
    0xFFFF,
    0x7FFF_FFFF,
    0x8000_0000,
    0xFFFF_FFFF,
    1 << 63,
    (1 << 64) - 1,
    0x10_0000,
)
ROUNDS = 1500


def mutate(rng: random.Random, image: bytes, start: int, end: int) -> bytes:
    """A copy with a few fields of its headers overwritten, sometimes cut short."""
    out = bytearray(image)
    for _ in range(rng.randint(1, 4)):
        width = rng.choice((1, 2, 4, 8))
        at = rng.randrange(start, min(end, len(out) - width))
        value = rng.choice(VALUES) if rng.random() < 0.6 else rng.getrandbits(64)
        out[at : at + width] = (value & ((1 << 8 * width) - 1)).to_bytes(width, "little")
    return bytes(out[: rng.randrange(len(out))] if rng.random() < 0.1 else out)


@pytest.mark.parametrize("decompress", [False, True])
@pytest.mark.parametrize("name", SEEDS)
def test_any_header_gives_an_entry_or_a_boot_error(name: str, decompress: bool) -> None:
    rng = random.Random(f"{name} {decompress}")
    memory = guest_memory((0, 32 * MIB))
    start, end = HEADERS.get(name, (0, 256))
    outcomes = {"entry": 0, "error": 0}
    for _ in range(ROUNDS):
        image = mutate(rng, SEEDS[name], start, end)
        try:
            entry = load(image, memory, decompress=decompress)
        except BootError as e:
            assert str(e)
            outcomes["error"] += 1
        else:
            assert isinstance(entry, Entry)
            outcomes["entry"] += 1
    # Both outcomes: the mutations neither miss the headers nor break every image.
    assert min(outcomes.values()) > 0


def test_random_bytes_are_no_kernel() -> None:
    rng = random.Random(7)
    memory = guest_memory((0, 16 * MIB))
    for _ in range(300):
        with pytest.raises(BootError):
            load(rng.randbytes(rng.randrange(1, 2000)), memory)


def test_a_decompression_bomb_takes_bounded_memory() -> None:
    bomb = gzip.compress(bytes(256 * MIB))
    payload = bomb + struct.pack("<I", MIB)
    image = bzimage(payload, payload=(0, len(payload)))
    tracemalloc.start()
    try:
        with pytest.raises(BootError, match="more than the 0x100000 bytes"):
            load(image, guest_memory(), decompress=True)
        assert tracemalloc.get_traced_memory()[1] < 16 * MIB
    finally:
        tracemalloc.stop()
