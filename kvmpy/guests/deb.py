# SPDX-License-Identifier: Apache-2.0
"""Reading and unpacking Debian packages without root and without dpkg (deb(5), dpkg 1.21).

A `.deb` is an ar archive of three members: `debian-binary` ("2.x"), `control.tar[.gz|.xz|.zst]` and
`data.tar[...]`. A package file may come from anywhere, so it is treated as hostile:

    threat                                answer
    names that leave the directory        a path is made of plain components below the root, else refused
    writing through a planted link        no parent of what is written may be a link; links are made last
    links that point outside              each is resolved on the finished tree and must stay inside
    devices, fifos, sparse files          refused
    set-uid bits, foreign owners          dropped: the unpacking user owns everything
    decompression bombs                   one bound on the bytes that leave the decompressor
    huge headers (long names, pax)        bounded at 64 KiB
    xz dictionaries of gigabytes          bounded at 256 MiB
"""

from __future__ import annotations

import lzma
import os
import shutil
import stat
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO

from kvmpy.guests.archive import CHUNK, ar_members, ar_stream, decompressed
from kvmpy.guests.errors import PackageError

MAX_UNPACKED = 2 << 30
MAX_MEMBERS = 200_000
MAX_TAR_HEADER = 64 << 10
MAX_NAME = 2048
MAX_COMPONENT = 255
# What tarfile and the decompressors raise on damaged input.
DAMAGE = (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, ValueError, OverflowError)


class Deb:
    """One package file: `control` (its fields) and `unpack()`.

    Arguments: path, the file; limit, the most bytes its data may grow to. Errors: PackageError.
    Source: deb(5), deb-control(5).
    """

    def __init__(self, path: str | os.PathLike[str], limit: int = MAX_UNPACKED) -> None:
        self.path = Path(path)
        self.limit = limit
        try:
            self._members = ar_members(self.path)
        except OSError as error:
            raise PackageError(f"{self.path}: {error.strerror}") from error
        first = next(iter(self._members), None)
        if first != "debian-binary":
            raise PackageError(f"{self.path}: not a Debian package (first member is {first!r})")
        start, size = self._members["debian-binary"]
        with self.path.open("rb") as file:
            version = ar_stream(file, start, size).read(16)
        if not version.startswith(b"2."):
            raise PackageError(f"{self.path}: package format {version!r}, only 2.x is known")
        self.control = self._read_control()

    @property
    def name(self) -> str:
        return self.control["package"]

    @property
    def version(self) -> str:
        return self.control["version"]

    def unpack(
        self, directory: str | os.PathLike[str], wanted: Callable[[str], bool] | None = None
    ) -> list[str]:
        """Unpack the package's files below `directory`, which must exist.

        Arguments: wanted, a filter on paths such as "boot/vmlinuz-6.1"; None takes all.
        Returns: the paths of the files and links written. Errors: PackageError; what was written until then
        stays.
        """
        root = Path(directory)
        written: list[str] = []
        links: list[tuple[Path, str]] = []
        with self._tar("data.tar") as members:
            for tar, member in members:
                path = self._inside(member.name)
                if path is None:  # the root itself
                    continue
                name = str(path)
                if member.isdir():
                    if wanted is None:
                        self._make_parents(root, path / "x")
                    continue
                if wanted is not None and not wanted(name):
                    continue
                self._make_parents(root, path)
                target = root / path
                if member.issym():
                    links.append((target, member.linkname))
                elif member.islnk():
                    self._copy_hard_link(root, target, member)
                elif member.isreg() and not member.issparse():
                    self._write_file(tar, member, target)
                else:
                    raise PackageError(f"{self.path}: {name}: a device, fifo or sparse file is not unpacked")
                written.append(name)
        self._make_links(root, links)
        return written

    # -- members -------------------------------------------------------------------------------------

    def _read_control(self) -> dict[str, str]:
        with self._tar("control.tar") as members:
            for tar, member in members:
                if member.name.lstrip("./") == "control" and member.isreg():
                    if member.size > CHUNK:
                        raise PackageError(f"{self.path}: a control file of {member.size} bytes")
                    data = _extracted(tar, member).read(CHUNK)
                    fields = next(paragraphs(data.decode("utf-8", "replace")), {})
                    if "package" not in fields or "version" not in fields:
                        raise PackageError(f"{self.path}: the control file names no package and version")
                    return fields
        raise PackageError(f"{self.path}: no control file")

    @contextmanager
    def _tar(self, stem: str) -> Iterator[Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]]:
        name = next((m for m in self._members if m == stem or m.startswith(stem + ".")), None)
        if name is None:
            raise PackageError(f"{self.path}: no {stem} member")
        with self.path.open("rb") as file:
            packed = ar_stream(file, *self._members[name])
            try:
                plain = decompressed(packed, name.removeprefix(stem), self.limit)
                with tarfile.open(fileobj=plain, mode="r|", tarinfo=_BoundedTarInfo) as tar:
                    yield self._bounded(tar, plain)
            except PackageError as error:
                if str(error).startswith(str(self.path)):
                    raise
                raise PackageError(f"{self.path}: {name}: {error}") from error
            except DAMAGE as error:
                raise PackageError(f"{self.path}: {name}: {error}") from error

    def _bounded(
        self, tar: tarfile.TarFile, plain: BinaryIO
    ) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
        for count, member in enumerate(tar):
            if count >= MAX_MEMBERS:
                raise PackageError(f"{self.path}: more than {MAX_MEMBERS} members")
            tar.members = []  # type: ignore[attr-defined]  # else tarfile keeps every header of a long archive
            yield tar, member
        while plain.read(CHUNK):  # to the end: only there the decompressor compares its checksum
            pass

    # -- writing -------------------------------------------------------------------------------------

    def _inside(self, name: str) -> PurePosixPath | None:
        """The path below the root that a member names, None for the root itself."""
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if name.startswith("/") or ".." in parts or "\0" in name:
            raise PackageError(f"{self.path}: the name {name!r} leads out of the package")
        if len(name) > MAX_NAME or any(len(os.fsencode(part)) > MAX_COMPONENT for part in parts):
            raise PackageError(f"{self.path}: the name {name[:40]!r}... is too long")
        return PurePosixPath(*parts) if parts else None

    def _make_parents(self, root: Path, path: PurePosixPath) -> None:
        here = root
        for part in path.parts[:-1]:
            here = here / part
            try:
                mode = here.lstat().st_mode
            except FileNotFoundError:
                here.mkdir(mode=0o755)
                continue
            if not stat.S_ISDIR(mode):
                raise PackageError(f"{self.path}: {path}: {part!r} is not a directory")

    def _fresh(self, target: Path) -> None:
        if target.is_symlink() or target.exists():
            raise PackageError(f"{self.path}: {target.name}: two members have this path")

    def _write_file(self, tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
        self._fresh(target)
        source = _extracted(tar, member)
        with target.open("xb") as out:
            shutil.copyfileobj(source, out, CHUNK)
            if out.tell() != member.size:
                raise PackageError(f"{self.path}: {member.name}: {out.tell()} of {member.size} bytes")
        target.chmod(0o755 if member.mode & 0o111 else 0o644)

    def _copy_hard_link(self, root: Path, target: Path, member: tarfile.TarInfo) -> None:
        path = self._inside(member.linkname)
        source = root / path if path else root
        if path is None or not source.is_file() or source.resolve() != root.resolve() / path:
            raise PackageError(
                f"{self.path}: {member.name}: hard link to {member.linkname!r}, which was not unpacked"
            )
        self._fresh(target)
        shutil.copy(source, target, follow_symlinks=False)

    def _make_links(self, root: Path, links: list[tuple[Path, str]]) -> None:
        for target, link in links:
            self._fresh(target)
            # An absolute link means the package's own root, which here is `root`.
            if link.startswith("/"):
                link = os.path.relpath(root / link.lstrip("/"), target.parent)
            target.symlink_to(link)
        top = root.resolve()
        for target, link in links:
            try:
                inside = target.resolve().is_relative_to(top)
            except (RuntimeError, OSError):  # a loop of links
                inside = False
            if not inside:
                for other, _ in links:
                    other.unlink(missing_ok=True)
                raise PackageError(f"{self.path}: {target.name} -> {link!r} leads out of the package")


def paragraphs(text: str) -> Iterator[dict[str, str]]:
    """Split deb822 text into paragraphs with lower-case field names (deb-control(5)).

    Continuation lines are kept, without their indentation.
    """
    fields: dict[str, str] = {}
    last = ""
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        if not line.strip():
            if fields:
                yield fields
            fields, last = {}, ""
        elif line[0] in " \t":
            if last:
                fields[last] += "\n" + line.strip()
        else:
            name, colon, value = line.partition(":")
            if colon:
                last = name.strip().lower()
                fields[last] = value.strip()
    if fields:
        yield fields


def _extracted(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    source = tar.extractfile(member)
    if source is None:
        raise PackageError(f"{member.name}: not a regular file")
    return source


class _BoundedTarInfo(tarfile.TarInfo):
    """tarfile reads extension headers whole into memory; this bounds them."""

    EXTENSIONS = (
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
        tarfile.SOLARIS_XHDTYPE,
    )

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> tarfile.TarInfo:  # type: ignore[override]
        info = super().frombuf(buf, encoding, errors)
        if info.size < 0 or (info.type in cls.EXTENSIONS and info.size > MAX_TAR_HEADER):
            raise tarfile.ReadError(f"an extended header of {info.size} bytes")
        return info
