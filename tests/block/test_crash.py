# SPDX-License-Identifier: Apache-2.0
"""A writer is killed at a random moment: the image has at most leaks, and nothing that was flushed is lost.

KVMPY_CRASH_ROUNDS sets the rounds per variant (default 4; 40 before a release, which makes 200 of qcow2).
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from block_judges import Qemu

from kvmpy.block import create_disk, open_disk
from kvmpy.block.hostfile import HostFile
from kvmpy.block.qcow2 import check

SIZE = 8 << 20
ROUNDS = int(os.environ.get("KVMPY_CRASH_ROUNDS", "4"))

WRITER = """
import os, sys
from kvmpy.block import open_disk
import test_crash
path, format, seed, out = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
disk = open_disk(path, format)
for i, (kind, offset, data) in enumerate(test_crash.requests(seed, format)):
    os.write(out, b"%d start\\n" % i)
    test_crash.request(disk, kind, offset, data)
    if kind == "flush":
        os.write(out, b"%d flushed\\n" % i)
"""


def requests(seed: int, format: str):  # type: ignore[no-untyped-def]
    """The writer's load: endless, and the same for the same seed."""
    rnd = random.Random(seed)
    number = 0
    while True:
        number += 1
        offset = rnd.randrange(SIZE)
        length = min(rnd.choice([512, 4096, 20_000, 150_000]), SIZE - offset)
        kind = rnd.random()
        if kind < 0.7:
            yield "write", offset, rnd.randbytes(length)
        elif kind < 0.8:
            yield "zero", offset, bytes(length)
        elif kind < 0.88 or format != "qcow2":
            yield "flush", 0, b""
        elif kind < 0.94:
            yield "discard", offset & ~0xFFFF, bytes(min(131072, SIZE - (offset & ~0xFFFF)))
        elif kind < 0.97:
            yield "snapshot", number, b""
        else:
            yield "forget", 0, b""


def request(disk, kind: str, offset: int, data: bytes) -> None:  # type: ignore[no-untyped-def]
    if kind == "write":
        disk.pwrite(offset, data)
    elif kind == "zero":
        disk.write_zeroes(offset, len(data))
    elif kind == "discard":
        disk.discard(offset, len(data))
    elif kind == "snapshot":
        disk.snapshots.create(f"s{offset}")
    elif kind == "forget":
        names = [one.name for one in disk.snapshots]
        if names:
            disk.snapshots.delete(names[0])
    else:
        disk.flush()


def run_and_kill(path: Path, format: str, seed: int, delay: float) -> tuple[int, int]:
    """(last request started, last flush that returned; -1: none)"""
    reader, writer = os.pipe()
    here = str(Path(__file__).parent)
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([here, str(Path(here).parents[1])]))
    words = [sys.executable, "-c", WRITER, str(path), format, str(seed), str(writer)]
    with subprocess.Popen(words, pass_fds=[writer], env=environment) as child:
        os.close(writer)
        text = os.read(reader, 64)  # it has begun
        time.sleep(delay)
        child.kill()
    while part := os.read(reader, 1 << 16):
        text += part
    os.close(reader)
    started, flushed = -1, -1
    for line in text.decode().splitlines():
        number, what = line.split()
        if what == "start":
            started = int(number)
        else:
            flushed = int(number)
    return started, flushed


VARIANTS = {
    "v3": ("qcow2", {}),
    "v2": ("qcow2", {"compat": "0.10"}),
    "lazy refcounts": ("qcow2", {"lazy_refcounts": True}),
    "small clusters": ("qcow2", {"cluster_size": 1024}),
    "extended L2": ("qcow2", {"extended_l2": True}),
    "vdi": ("vdi", {}),
    "vmdk": ("vmdk", {}),
    "raw": ("raw", {}),
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_kill_at_random_moments_loses_nothing_flushed(
    qemu: Qemu, tmp_path: Path, variant: tuple[str, dict[str, object]]
) -> None:
    format, options = variant
    path = tmp_path / "disk.image"
    flushes = 0
    for round in range(ROUNDS):
        create_disk(path, format, SIZE, **options)
        started, flushed = run_and_kill(path, format, round, random.Random(round).random() * 0.4)
        flushes += flushed >= 0
        if format == "qcow2":
            with HostFile.open(path) as file:
                before = check(file)
                assert not before.check_errors and (options.get("lazy_refcounts") or not before.corruptions), before
                assert check(file, repair="all").clean
            qemu.check(path)
        elif format != "raw":
            qemu.img("check", "-q", "-f", format, path)
        expected, touched = bytearray(SIZE), bytearray(SIZE)
        for i, (kind, offset, data) in enumerate(requests(round, format)):
            if i > started:
                break
            if kind in ("write", "zero", "discard"):
                if i < flushed:
                    expected[offset : offset + len(data)] = data
                else:
                    touched[offset : offset + len(data)] = b"\1" * len(data)
        with open_disk(path, format, readonly=True) as disk:
            content = disk.pread(0, SIZE)
        lost = [i for i in range(SIZE) if content[i] != expected[i] and not touched[i]] if content != expected else []
        assert not lost, f"round {round}: {len(lost)} flushed bytes differ, the first at {lost[0]:#x}"
    assert flushes or ROUNDS == 0, "no round got as far as a flush"
