# SPDX-License-Identifier: Apache-2.0
"""Runs io.c in the same guest on kvmpy and on QEMU, in turn, on images with the same content."""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.cpu.payload import BenchmarkError
from benchmarks.cpu.sides import run_timed
from kvmpy import guests
from kvmpy.guests import initramfs
from kvmpy.guests.init import parameters

ROUNDS = 3
SIZE = 256  # MiB of the image; it is in the page cache of the host
SECONDS = 1  # for each way
TIMEOUT = 180
MEMORY = 512
FORMATS = ("raw", "qcow2")
WAYS = {
    "seq-read": "sequential reads of 1 MiB",
    "seq-write": "sequential writes of 1 MiB",
    "rand-read-1": "random reads of 4 KiB, depth 1",
    "rand-write-1": "random writes of 4 KiB, depth 1",
    "rand-read-32": "random reads of 4 KiB, depth 32",
    "rand-write-32": "random writes of 4 KiB, depth 32",
}
LINE = re.compile(r"bench: ([\w-]+) (\d+) (\d+\.\d+)")
HEADER = f"{'disk of a guest':<46}{'kvmpy':>10}{'QEMU':>10} {'':<6}{'ratio':>7}{'by cpu':>8}  goal"
GOAL = 1.0


@dataclass(frozen=True, slots=True)
class Rate:
    """Operations per second (MiB for sequential ones); the ratios are ours by QEMU's, round by round: more is better.

    by_cpu: the same for each second of processor time that the virtual machine used, which other work on the host and
    the number of its processors change little.
    """

    name: str
    unit: str
    ours: float
    peer: float
    ratio: float
    by_cpu: float

    def row(self) -> str:
        met = "met" if self.ratio >= GOAL else "NOT met"
        rates = f"{self.ours:10.0f}{self.peer:10.0f} {self.unit:<6}{self.ratio:7.2f}{self.by_cpu:8.2f}"
        return f"{self.name:<46}{rates}  >= {GOAL:.1f} {met}"

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def run(rounds: int | None = None, *, guest: str = "debian-6.1", qemu: str = "qemu-system-x86_64") -> Iterator[Rate]:
    """Measure; raises BenchmarkError when a side fails, GuestUnavailableError."""
    with tempfile.TemporaryDirectory(prefix="kvmpy-disks-") as name:
        folder = Path(name)
        kernel = guests.get(guest).kernel
        initrd = _initrd(folder, guests.get(guest).initrd_modules)
        images = _images(folder)
        for format in FORMATS:
            commands = [
                _kvmpy(kernel, initrd, images[format], format),
                _qemu(qemu, kernel, initrd, images[format], format),
            ]
            results = [[_measure(command) for command in commands] for _ in range(rounds or ROUNDS)]
            for way, words in WAYS.items():
                unit = "MiB/s" if way.startswith("seq") else "IOPS"
                pairs = [(ours[way], peer[way]) for ours, peer in results]
                yield Rate(
                    f"{format}: {words}",
                    unit,
                    statistics.median(ours.rate for ours, _ in pairs),
                    statistics.median(peer.rate for _, peer in pairs),
                    statistics.median(ours.rate / peer.rate for ours, peer in pairs),
                    statistics.median(ours.by_cpu / peer.by_cpu for ours, peer in pairs),
                )


def _initrd(folder: Path, modules: Path) -> Path:
    program = folder / "io"
    source = Path(__file__).with_name("io.c")
    done = subprocess.run(
        ["cc", "-O2", "-static", "-Wall", "-o", program, source], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise BenchmarkError(f"io.c does not compile (it needs a static libc):\n{done.stderr}")
    initrd = folder / "initrd"
    more = initramfs.build({"bin/io": initramfs.File(program.read_bytes(), 0o755)})
    initrd.write_bytes(modules.read_bytes() + more)  # the kernel unpacks one archive after the other
    return initrd


def _images(folder: Path) -> dict[str, Path]:
    """Images of one content, all of it allocated, made by qemu-img."""
    raw = folder / "disk.raw"
    with Path("/dev/urandom").open("rb") as noise, raw.open("wb") as file:
        for _ in range(SIZE):
            file.write(noise.read(1 << 20))
    images = {"raw": raw}
    for format in FORMATS[1:]:
        images[format] = folder / f"disk.{format}"
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", format, raw, images[format]], check=True)
    return images


def _cmdline() -> str:
    return f"console=ttyS0 quiet cryptomgr.notests {parameters(f'/bin/io /dev/vda {SECONDS}', modules=('virtio_blk',))}"


def _kvmpy(kernel: Path, initrd: Path, image: Path, format: str) -> list[str]:
    start = [sys.executable, "-m", "kvmpy", "run", str(kernel), "--initrd", str(initrd), "--append", _cmdline()]
    disk = ["--transport", "pci", "--disk", f"{image},format={format}", "-q"]
    return [*start, "--backend", "tcg", "--memory", f"{MEMORY}M", *disk]


def _qemu(program: str, kernel: Path, initrd: Path, image: Path, format: str) -> list[str]:
    machine = [program, "-M", "q35,accel=tcg", "-cpu", "max", "-smp", "1", "-m", str(MEMORY), "-nodefaults"]
    quiet = ["-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot"]
    drive = ["-drive", f"if=none,id=d,file={image},format={format},cache=writeback,discard=unmap"]
    disk = [*drive, "-device", "virtio-blk-pci,drive=d"]
    return [*machine, *quiet, *disk, "-kernel", str(kernel), "-initrd", str(initrd), "-append", _cmdline()]


@dataclass(frozen=True, slots=True)
class Measured:
    """Operations for each second, and for each second of processor time."""

    rate: float
    by_cpu: float


def _measure(command: list[str]) -> dict[str, Measured]:
    """What io.c did, by way."""
    ended = run_timed(command, TIMEOUT)
    rates, before = {}, 0.0
    for line in ended.lines:
        if match := LINE.search(line.text):
            name, count, seconds = match[1], int(match[2]), float(match[3])
            rates[name] = Measured(count / seconds, count / max(line.cpu - before, 1e-3))
        if line.cpu:
            before = line.cpu
    if rates.keys() != WAYS.keys():
        raise BenchmarkError(f"`{' '.join(command)}` did not measure everything:\n{ended.tail()}")
    return rates
