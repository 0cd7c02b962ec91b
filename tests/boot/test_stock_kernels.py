# SPDX-License-Identifier: Apache-2.0
"""Debian's own kernels, as its packages have them (`kvmpy guest get NAME`)."""

from __future__ import annotations

import pytest
from boot_images import MIB, guest_memory

from kvmpy import guests
from kvmpy.arch import layout
from kvmpy.boot import load
from kvmpy.errors import BootError

pytestmark = pytest.mark.guest

KERNELS = [name for name in guests.NAMES if name.startswith("debian-")]


@pytest.fixture(params=KERNELS)
def guest(request: pytest.FixtureRequest) -> guests.Guest:
    found = guests.find(request.param)
    if found is None:
        pytest.skip(f"{request.param} is not in the cache: kvmpy guest get {request.param}")
    return found


def test_debian_kernel_starts_by_the_64_bit_protocol(guest: guests.Guest) -> None:
    memory = guest_memory((0, 512 * MIB))
    entry = load(guest.kernel, memory, cmdline="console=ttyS0", initrd=guest.initrd)
    assert (entry.format, entry.mode, entry.rip) == ("bzImage", "long", 0x100_0200)
    assert "-cloud-amd64" in entry.detail
    start, size = memory.u32(layout.ZERO_PAGE + 0x218), memory.u32(layout.ZERO_PAGE + 0x21C)
    assert memory.read(start, size) == guest.initrd.read_bytes()
    assert start + size <= 512 * MIB


def test_vmlinux_inside_it_is_unpacked(guest: guests.Guest) -> None:
    memory = guest_memory((0, 512 * MIB))
    entry = load(guest.kernel, memory, decompress=True)
    assert entry.mode == "long"
    assert 0x100_0000 <= entry.rip < 0x110_0000
    assert "-cloud-amd64" in entry.detail
    assert memory.find(b"Linux version ", 0x100_0000, 64 * MIB) is not None


def test_pvh_door_of_the_unpacked_kernel(guest: guests.Guest) -> None:
    from kvmpy.boot.decompress import unpack_kernel
    from kvmpy.boot.image import read_image
    from kvmpy.boot.linux import parse_bzimage

    vmlinux = unpack_kernel(parse_bzimage(read_image(guest.kernel))).data
    entry = load(vmlinux, guest_memory((0, 512 * MIB)))
    assert (entry.format, entry.mode) == ("PVH", "protected")


def test_too_little_memory_says_how_much_is_needed(guest: guests.Guest) -> None:
    with pytest.raises(BootError, match="bytes do not fit from 0x100_0000"):
        load(guest.kernel, guest_memory((0, 32 * MIB)))
