# SPDX-License-Identifier: Apache-2.0
"""What the guests run: a kernel, packed and unpacked, and an initramfs with the workloads as its init."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from kvmpy import guests
from kvmpy.boot.decompress import unpack_kernel
from kvmpy.boot.image import read_image
from kvmpy.boot.linux import parse_bzimage
from kvmpy.guests import initramfs

SOURCE = Path(__file__).with_name("work.c")
CONSOLE = "console=ttyS0 panic=-1"


class BenchmarkError(Exception):
    """A benchmark that cannot be run here, or whose outcome is not to be trusted."""


@dataclass(frozen=True, slots=True)
class Payload:
    """Files that every side gets: the same kernels and initramfs, and the programs to run on the host."""

    release: str
    bzimage: Path
    vmlinux: Path
    initrd: Path
    work: Path
    busybox: Path


def make(directory: Path, guest_name: str) -> Payload:
    """Make the payload in `directory`. Raises BenchmarkError without a static libc, GuestUnavailableError."""
    guest, busybox = guests.get(guest_name), guests.get("busybox").file("program")
    bzimage = parse_bzimage(read_image(guest.kernel))
    vmlinux = directory / "vmlinux"
    vmlinux.write_bytes(unpack_kernel(bzimage).data)
    work = compile_work(directory)
    initrd = directory / "initrd.gz"
    initrd.write_bytes(
        initramfs.build(
            {
                "init": initramfs.File(work.read_bytes(), 0o755),
                "bin/busybox": initramfs.File(busybox.read_bytes(), 0o755),
                "dev/console": initramfs.Device(5, 1),  # the kernel opens it for init
            }
        )
    )
    return Payload(bzimage.version_text.split()[0], guest.kernel, vmlinux, initrd, work, busybox)


def compile_work(directory: Path) -> Path:
    """Build work.c: static, for the initramfs has no libraries. Raises BenchmarkError."""
    program = directory / "work"
    command = ["cc", "-O2", "-static", "-Wall", "-o", str(program), str(SOURCE)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise BenchmarkError("there is no C compiler (cc); Debian: apt install gcc libc6-dev") from None
    if done.returncode != 0:
        hint = ""
        if "cannot find -lc" in done.stderr:
            hint = "there is no static libc; Debian: apt install libc6-dev, Fedora: dnf install glibc-static\n"
        raise BenchmarkError(f"{hint}`{' '.join(command)}` failed:\n{done.stderr}")
    return program
