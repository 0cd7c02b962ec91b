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
TRANSPORTS_HEADER = f"{'a raw disk':<46}{'PCI':>10}{'MMIO':>10} {'':<6}{'ratio':>7}{'by cpu':>8}"
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
    goal: float | None = GOAL

    def row(self) -> str:
        rates = f"{self.ours:10.0f}{self.peer:10.0f} {self.unit:<6}{self.ratio:7.2f}{self.by_cpu:8.2f}"
        if self.goal is None:
            return f"{self.name:<46}{rates}"
        return f"{self.name:<46}{rates}  >= {self.goal:.1f} {'met' if self.ratio >= self.goal else 'NOT met'}"

    def to_json(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Latency(Rate):
    """Microseconds of one request, with no other in flight; the ratios are ours by QEMU's: less is better."""

    def row(self) -> str:
        times = f"{self.ours:10.1f}{self.peer:10.1f} {self.unit:<6}{self.ratio:7.2f}{self.by_cpu:8.2f}"
        if self.goal is None:
            return f"{self.name:<46}{times}"
        return f"{self.name:<46}{times}  <= {self.goal:.1f} {'met' if self.ratio <= self.goal else 'NOT met'}"


def run(rounds: int | None = None, *, guest: str = "debian-6.1", qemu: str = "qemu-system-x86_64") -> Iterator[Rate]:
    """Measure; raises BenchmarkError when a side fails, GuestUnavailableError."""
    with tempfile.TemporaryDirectory(prefix="kvmpy-disks-") as name:
        folder = Path(name)
        kernel = guests.get(guest).kernel
        initrd = _initrd(folder, guests.get(guest).initrd_modules)
        images = _images(folder)
        for format in FORMATS:
            ours = _kvmpy(kernel, initrd, images[format], format)
            yield from _rows(f"{format}: ", ours, _qemu(qemu, kernel, initrd, images[format], format), rounds)


def transports(rounds: int | None = None, *, guest: str = "debian-6.1") -> Iterator[Rate]:
    """virtio-pci beside virtio-mmio, both ours: the columns are PCI's and MMIO's."""
    with tempfile.TemporaryDirectory(prefix="kvmpy-disks-") as name:
        folder = Path(name)
        kernel = guests.get(guest).kernel
        initrd = _initrd(folder, guests.get(guest).initrd_modules)
        image = _images(folder)["raw"]
        pci, mmio = (_kvmpy(kernel, initrd, image, "raw", transport) for transport in ("pci", "mmio"))
        yield from _rows("", pci, mmio, rounds, None)


def _rows(
    title: str, ours: list[str], peer: list[str], rounds: int | None, goal: float | None = GOAL
) -> Iterator[Rate]:
    """Two commands in turn."""
    results = [(_measure(ours), _measure(peer)) for _ in range(rounds or ROUNDS)]
    for way, words in WAYS.items():
        pairs = [(one[way], two[way]) for one, two in results]
        unit = "MiB/s" if way.startswith("seq") else "IOPS"
        rates = [statistics.median(one.rate for one in side) for side in zip(*pairs, strict=True)]
        ratio = statistics.median(one.rate / two.rate for one, two in pairs)
        by_cpu = statistics.median(one.by_cpu / two.by_cpu for one, two in pairs)
        yield Rate(f"{title}{words}", unit, rates[0], rates[1], ratio, by_cpu, goal)
        if way.endswith("-1"):
            times = [1e6 / rate for rate in rates]
            yield Latency(f"{title}... latency", "us", times[0], times[1], 1 / ratio, 1 / by_cpu, goal)


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
    run = parameters(f"/bin/io /dev/vda {SECONDS}", modules=("virtio_mmio", "virtio_blk"))
    return f"console=ttyS0 quiet cryptomgr.notests {run}"


def _kvmpy(kernel: Path, initrd: Path, image: Path, format: str, transport: str = "pci") -> list[str]:
    start = [sys.executable, "-m", "kvmpy", "run", str(kernel), "--initrd", str(initrd), "--append", _cmdline()]
    disk = ["--transport", transport, "--disk", f"{image},format={format}", "-q"]
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
