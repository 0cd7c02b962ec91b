# SPDX-License-Identifier: Apache-2.0
"""The NBD client against qemu-nbd, nbdkit, and servers that break the protocol."""

from __future__ import annotations

import random
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from block_judges import Driver, Qemu

from kvmpy.block import NbdDisk, open_disk, open_overlay
from kvmpy.cli import main
from kvmpy.errors import StateError

SIZE = 4 * 1024 * 1024 + 512


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Start a server with a Unix socket and wait for it."""
    running: list[subprocess.Popen[bytes]] = []

    def start(*words: str | Path) -> Path:
        if shutil.which(str(words[0])) is None:
            pytest.skip(f"{words[0]} is not installed")
        path = tmp_path / f"nbd{len(running)}.sock"
        running.append(subprocess.Popen([str(one).replace("SOCKET", str(path)) for one in words]))
        for _ in range(500):
            if path.exists():
                return path
            assert running[-1].poll() is None, f"{words[0]} ended"
            time.sleep(0.02)
        raise AssertionError(f"{words[0]} made no socket")

    yield start
    for one in running:
        one.terminate()
        one.wait()


@pytest.mark.parametrize("format", ["raw", "vhdx", "qcow2"])
def test_random_requests_to_qemu_nbd(
    qemu: Qemu, tmp_path: Path, driver: type[Driver], serve: Callable[..., Path], format: str
) -> None:
    size = SIZE if format != "vhdx" else 4 << 20
    qemu.img("create", "-q", "-f", format, "x.img", str(size))
    path = serve(
        "qemu-nbd",
        "-k",
        "SOCKET",
        "-t",
        "-f",
        format,
        "--discard=unmap",
        "--detect-zeroes=off",
        tmp_path / "x.img",
    )
    drive = driver(1, size)
    with open_disk(path, "nbd") as disk:
        drive.run(disk, 80)
        disk.discard(0, 4096)
        drive.expected[:4096] = disk.pread(0, 4096)
        drive.verify(disk)
        assert disk.stats.reads > 1 and disk.stats.errors == 0
    with open_disk(path, "nbd", readonly=True) as disk:
        drive.verify(disk)


def test_block_status_and_large_requests(tmp_path: Path, qemu: Qemu, serve: Callable[..., Path]) -> None:
    qemu.img("create", "-q", "-f", "qcow2", "x.img", "200M")
    qemu.io("x.img", "write -P 5 64M 64M")
    path = serve("qemu-nbd", "-k", "SOCKET", "-t", "-f", "qcow2", tmp_path / "x.img")
    with open_disk(path, "nbd") as disk:
        assert disk.block_status(0, 200 << 20)[:4] == (0, 64 << 20, False, True)
        assert disk.block_status(64 << 20, 1 << 20)[:4] == (64 << 20, 1 << 20, True, False)
        assert disk.pread(60 << 20, 72 << 20) == bytes(4 << 20) + b"\5" * (64 << 20) + bytes(4 << 20)
        disk.pwrite(0, b"\7" * (70 << 20))
        assert disk.pread(69 << 20, 2 << 20) == b"\7" * (1 << 20) + b"\5" * (1 << 20)


def test_the_image_command_copies_to_a_server_and_back(tmp_path: Path, qemu: Qemu, serve: Callable[..., Path]) -> None:
    qemu.img("create", "-q", "-f", "vpc", "-o", "force_size=on", "x.vhd", "3M")
    path = serve("qemu-nbd", "-k", "SOCKET", "-t", "-f", "vpc", tmp_path / "x.vhd")
    content = random.Random(3).randbytes(1 << 20) + bytes(2 << 20)
    (tmp_path / "raw").write_bytes(content)
    assert main(["image", "convert", "-n", "-f", "raw", "-O", "nbd", str(tmp_path / "raw"), str(path)]) == 0
    assert main(["image", "convert", "-f", "nbd", "-O", "raw", str(path), str(tmp_path / "back")]) == 0
    assert (tmp_path / "back").read_bytes() == content


def test_nbdkit_memory_and_errors(serve: Callable[..., Path]) -> None:
    path = serve(
        "nbdkit",
        "-f",
        "-U",
        "SOCKET",
        "--filter=error",
        "memory",
        f"{SIZE}",
        "error-pread-rate=0",
        "error-pwrite=ENOSPC",
        "error-pwrite-rate=100%",
    )
    with open_disk(path, "nbd") as disk:
        assert disk.pread(0, SIZE) == bytes(SIZE)
        with pytest.raises(OSError) as caught:
            disk.pwrite(0, b"x")
        assert caught.value.errno == 28
        assert disk.pread(SIZE - 1, 1) == b"\0"  # the connection lives on
        assert disk.stats.errors == 1


def test_minimum_block_size_is_obeyed(serve: Callable[..., Path], driver: type[Driver]) -> None:
    path = serve(
        "nbdkit", "-f", "-U", "SOCKET", "--filter=blocksize-policy", "memory", f"{4 << 20}",
        "blocksize-minimum=4096", "blocksize-preferred=4096", "blocksize-maximum=65536",
        "blocksize-error-policy=error",
    )  # fmt: skip
    drive = driver(2, 4 << 20)
    with open_disk(path, "nbd") as disk:
        drive.run(disk, 60)
        drive.verify(disk)


def test_unknown_export_and_readonly_export(qemu: Qemu, tmp_path: Path, serve: Callable[..., Path]) -> None:
    qemu.img("create", "-q", "-f", "raw", "x.img", "1M")
    path = serve("qemu-nbd", "-k", "SOCKET", "-t", "-r", "-x", "name", "-f", "raw", tmp_path / "x.img")
    with pytest.raises(OSError, match="no export"):
        NbdDisk(path, "other")
    with pytest.raises(PermissionError):
        NbdDisk(path, "name")
    with NbdDisk(path, "name", readonly=True) as disk:
        assert disk.size == 1 << 20
    with open_disk(f"nbd+unix:///name?socket={path}", "nbd", readonly=True) as disk:
        assert disk.size == 1 << 20
    with pytest.raises(ValueError, match="not of the form"):
        open_disk("nbd+unix://host/name", "nbd", readonly=True)


def test_overlay_over_nbd(qemu: Qemu, tmp_path: Path, driver: type[Driver], serve: Callable[..., Path]) -> None:
    (tmp_path / "x.img").write_bytes(b"nbd!" * (SIZE // 4))
    path = serve("qemu-nbd", "-k", "SOCKET", "-t", "-r", "-f", "raw", tmp_path / "x.img")
    drive = driver(3, SIZE, b"nbd!" * (SIZE // 4))
    with open_overlay(open_disk(path, "nbd", readonly=True)) as disk:
        drive.run(disk, 60)
        drive.verify(disk)
    assert (tmp_path / "x.img").read_bytes() == b"nbd!" * (SIZE // 4)


# --- servers that break the protocol

HELLO = struct.pack(">QQH", 0x4E42444D41474943, 0x49484156454F5054, 3)


def option_reply(option: int, kind: int, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, option, kind, len(data) if length is None else length) + data


GREETING = [
    HELLO,
    option_reply(8, 1),
    option_reply(10, 1),
    option_reply(7, 3, struct.pack(">HQH", 0, SIZE, 5)) + option_reply(7, 1),
]


def server(path: Path, answers: list[bytes]) -> threading.Thread:
    """Send the first answer at once, and one more for each thing that is received; then hang up."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(1)

    def run() -> None:
        with listener, listener.accept()[0] as one:
            try:
                one.sendall(answers[0])
                one.recv(4)  # the client's flags
                for answer in answers[1:]:
                    one.recv(65536)
                    one.sendall(answer)
            except OSError:
                pass

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def chunk(kind: int, data: bytes, flags: int = 1, cookie: int = 1, length: int | None = None) -> bytes:
    return struct.pack(">IHHQI", 0x668E33EF, flags, kind, cookie, len(data) if length is None else length) + data


BROKEN_GREETINGS = {
    "nothing": [b""],
    "not NBD": [b"HTTP/1.1 400 Bad Request\r\n\r\n"],
    "oldstyle": [struct.pack(">QQH", 0x4E42444D41474943, 0x420281861253, 0)],
    "huge option reply": [HELLO, option_reply(8, 1, length=0xFFFFFFFF)],
    "reply to another option": [HELLO, option_reply(3, 1)],
    "no export information": [*GREETING[:3], option_reply(7, 1)],
    "impossible size": [
        *GREETING[:3],
        option_reply(7, 3, struct.pack(">HQH", 0, 1 << 63, 5)) + option_reply(7, 1),
    ],
    "impossible block size": [
        *GREETING[:3],
        option_reply(7, 3, struct.pack(">HIII", 3, 3, 3, 3)) + option_reply(7, 1),
    ],
}


@pytest.mark.parametrize("answers", BROKEN_GREETINGS.values(), ids=BROKEN_GREETINGS)
def test_broken_greeting_is_an_error(tmp_path: Path, answers: list[bytes]) -> None:
    thread = server(tmp_path / "s", answers)
    with pytest.raises(OSError):
        NbdDisk(tmp_path / "s", timeout=5)
    thread.join()


BROKEN_ANSWERS = {
    "simple reply to a structured read": struct.pack(">IIQ", 0x67446698, 0, 1) + bytes(512),
    "wrong magic": bytes(100),
    "another cookie": chunk(1, struct.pack(">Q", 0) + bytes(512), cookie=99),
    "data before the range": chunk(1, struct.pack(">Q", (1 << 64) - 8) + bytes(512)),
    "data behind the range": chunk(1, struct.pack(">Q", 512) + bytes(512)),
    "more data than asked": chunk(1, struct.pack(">Q", 0), length=0xFFFFFFFF),
    "less data than asked": chunk(1, struct.pack(">Q", 0) + bytes(100)),
    "the same data twice": chunk(1, struct.pack(">Q", 0) + bytes(512), flags=0)
    + chunk(1, struct.pack(">Q", 0) + bytes(512)),
    "hole of wrong length": chunk(2, struct.pack(">Q", 0) + bytes(9)),
    "huge hole": chunk(2, struct.pack(">QI", 0, 0xFFFFFFFF)),
    "unknown chunk": chunk(77, b"x" * 10),
    "short error": chunk(0x8001, b"x"),
    "hang up": b"",
}


@pytest.mark.parametrize("answer", BROKEN_ANSWERS.values(), ids=BROKEN_ANSWERS)
def test_broken_answer_ends_the_connection(tmp_path: Path, answer: bytes) -> None:
    thread = server(tmp_path / "s", [*GREETING, answer])
    with NbdDisk(tmp_path / "s", readonly=True, timeout=5) as disk:
        with pytest.raises(OSError):
            disk.pread(0, 512)
        with pytest.raises(StateError, match="broken"):
            disk.pread(0, 512)
    thread.join()


def test_silent_server_times_out(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen(1)
    with listener, pytest.raises(TimeoutError):
        NbdDisk(tmp_path / "s", timeout=0.2)
