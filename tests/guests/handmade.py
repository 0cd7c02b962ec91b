# SPDX-License-Identifier: Apache-2.0
"""Packages made by hand, good and hostile."""

from __future__ import annotations

import io
import lzma
import tarfile
import zlib
from pathlib import Path

Member = tuple[tarfile.TarInfo, bytes]


def file(name: str, data: bytes = b"", mode: int = 0o644) -> Member:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), mode
    return info, data


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> Member:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def special(name: str, kind: bytes) -> Member:
    info = tarfile.TarInfo(name)
    info.type = kind
    return info, b""


def tar(members: list[Member]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def ar(members: list[tuple[str, bytes]]) -> bytes:
    out = b"!<arch>\n"
    for name, data in members:
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode()
        out += data + b"\n" * (len(data) % 2)
    return out


def gzip(data: bytes) -> bytes:
    codec = zlib.compressobj(wbits=31)
    return codec.compress(data) + codec.flush()


PACK = {"": bytes, ".xz": lzma.compress, ".gz": gzip}


class DebMaker:
    """Writes package files into a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __call__(
        self,
        members: list[Member],
        *,
        name: str = "thing",
        version: str = "1.0-1",
        suffix: str = ".xz",
        data: bytes | None = None,
    ) -> Path:
        control = f"Package: {name}\nVersion: {version}\nArchitecture: amd64\nDescription: made\n by hand\n"
        packed = PACK[suffix](tar(members)) if data is None else data
        content = ar(
            [
                ("debian-binary", b"2.0\n"),
                ("control.tar.gz", gzip(tar([file("./control", control.encode())]))),
                (f"data.tar{suffix}", packed),
            ]
        )
        path = self.directory / f"{name}_{version}_amd64.deb"
        path.write_bytes(content)
        return path
