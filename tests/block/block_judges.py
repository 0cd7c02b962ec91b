# SPDX-License-Identifier: Apache-2.0
"""The judges: qemu-img and qemu-io, and a random driver for disks."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvmpy.block import Disk


class Qemu:
    """qemu-img and qemu-io in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, *words: str | Path, status: int = 0) -> str:
        # A sanitizer that is preloaded for our own code would stop QEMU's coroutines.
        environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        done = subprocess.run(
            [str(one) for one in words],
            capture_output=True,
            text=True,
            cwd=self.folder,
            env=environment,
            timeout=120,
            check=False,
        )
        assert done.returncode == status, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def img(self, *words: str | Path, status: int = 0) -> str:
        return self.run("qemu-img", *words, status=status)

    def io(self, image: str | Path, *commands: str, format: str = "qcow2") -> str:
        words: list[str] = []
        for command in commands:
            words += ["-c", command]
        text = self.run("qemu-io", "-f", format, *words, image)
        assert "Pattern verification failed" not in text, text
        return text

    def check(self, image: str | Path, format: str = "qcow2") -> dict[str, Any]:
        """qemu-img check must find nothing at all."""
        found: dict[str, Any] = json.loads(self.img("check", "-f", format, "--output=json", image))
        assert not found.get("corruptions") and not found.get("leaks") and not found["check-errors"], found
        return found

    def same(self, image: str | Path, content: bytes | bytearray, format: str = "qcow2") -> None:
        """qemu-img compare: the image reads as these bytes."""
        raw = self.folder / "expected.raw"
        raw.write_bytes(content)
        self.img("compare", "-f", format, "-F", "raw", image, raw)


class Driver:
    """Random requests to a disk, and the same to a bytearray."""

    def __init__(self, seed: int, size: int, content: bytes | bytearray | None = None) -> None:
        self.random = random.Random(seed)
        self.size = size
        self.expected = bytearray(size) if content is None else bytearray(content)

    def range(self, largest: int = 300_000) -> tuple[int, int]:
        offset = self.random.randrange(self.size)
        length = self.random.choice([1, 511, 512, 4096, 65536, self.random.randrange(1, largest)])
        return offset, min(length, self.size - offset)

    def write(self, disk: Disk) -> None:
        offset, length = self.range()
        data = self.random.randbytes(length)
        disk.pwrite(offset, data)
        self.expected[offset : offset + length] = data

    def zero(self, disk: Disk) -> None:
        offset, length = self.range()
        disk.write_zeroes(offset, length, self.random.random() < 0.5)
        self.expected[offset : offset + length] = bytes(length)

    def read(self, disk: Disk) -> None:
        offset, length = self.range()
        assert disk.pread(offset, length) == self.expected[offset : offset + length]

    def run(self, disk: Disk, requests: int, more: Callable[[Disk], None] | None = None) -> None:
        """`requests` of them; `more` is one more kind."""
        for _ in range(requests):
            kind = self.random.random()
            if kind < 0.5:
                self.write(disk)
            elif kind < 0.65:
                self.zero(disk)
            elif kind < 0.7:
                disk.flush()
            elif kind < 0.85 or more is None:
                self.read(disk)
            else:
                more(disk)

    def verify(self, disk: Disk) -> None:
        """All of it, by data and by block status."""
        assert disk.size == self.size
        assert disk.pread(0, self.size) == self.expected
        at = 0
        while at < self.size:
            found = disk.block_status(at, self.size - at)
            assert found.offset == at and 0 < found.length <= self.size - at
            if found.zero:
                assert not any(self.expected[at : at + found.length])
            at += found.length
