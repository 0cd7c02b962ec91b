# SPDX-License-Identifier: Apache-2.0
"""The real packages, from the cache or from Debian; skipped where they cannot be had."""

import functools
import gzip
import shutil
import subprocess

import pytest

from kvmpy import guests
from kvmpy.guests import GuestUnavailableError

pytestmark = pytest.mark.guest


@functools.cache
def _get(name):
    try:
        return guests.get(name)
    except GuestUnavailableError as error:
        return str(error).splitlines()[0]


def get(name):
    guest = _get(name)
    if isinstance(guest, str):
        pytest.skip(guest)
    return guest


@pytest.mark.parametrize("name", guests.NAMES)
def test_get_gives_a_whole_guest(name):
    guest = get(name)
    assert guests.find(name) == guest
    assert guests.verify(guest) == []
    assert all(origin.licence and origin.version for origin in guest.packages)
    assert all((guest.directory / origin.copyright).stat().st_size > 100 for origin in guest.packages)


@pytest.mark.parametrize(("name", "version"), [("debian-6.1", "6.1."), ("debian-6.12", "6.12.")])
def test_linux_is_a_bzimage_of_the_asked_version(name, version):
    guest = get(name)
    assert guest.version.startswith(version)
    image = guest.kernel.read_bytes()
    assert image[0x202:0x206] == b"HdrS"
    start = int.from_bytes(image[0x20E:0x210], "little") + 0x200
    assert image[start:].startswith(version.encode())


@pytest.mark.parametrize("name", ["debian-6.1", "debian-6.12"])
def test_linux_initramfs_holds_init_and_modules(name, tmp_path):
    program = shutil.which("cpio")
    if program is None:
        pytest.skip("no cpio program to read it with")
    guest = get(name)

    def names(path):
        command = [program, "-i", "-t", "--quiet"]
        raw = gzip.decompress(path.read_bytes())
        return (
            subprocess.run(command, input=raw, capture_output=True, check=True).stdout.decode().splitlines()
        )

    small, large = names(guest.initrd), names(guest.initrd_modules)
    assert {"init", "bin/busybox", "dev/console", "proc", "sys"} <= set(small) <= set(large)
    modules = {name.rpartition("/")[2] for name in large}
    assert {"virtio_mmio.ko", "virtio_net.ko", "virtio_blk.ko", "modules.dep", "modules.alias"} <= modules


def test_busybox_initramfs_is_read_by_busybox_itself(tmp_path):
    busybox = get("busybox").file("program")
    archive = guests.initramfs.build({"a/b": b"1", "a/c": guests.initramfs.Link("b")}, compress=False)
    subprocess.run(
        [busybox, "cpio", "-i", "-d"], input=archive, cwd=tmp_path, check=True, capture_output=True
    )
    assert (tmp_path / "a/c").read_bytes() == b"1"


def test_firmware_and_boot_images_are_what_they_say():
    bios = get("seabios")
    for role, size in (("bios", 128 << 10), ("bios-256k", 256 << 10), ("bios-microvm", 128 << 10)):
        image = bios.file(role).read_bytes()
        assert len(image) == size
        assert image[-16] == 0xEA  # a far jump at the reset vector
    floppy = get("grub-floppy").floppy.read_bytes()
    assert floppy[510:512] == b"\x55\xaa"
    assert get("memtest86+").kernel.read_bytes()[0x202:0x206] == b"HdrS"
