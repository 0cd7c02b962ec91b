# SPDX-License-Identifier: Apache-2.0
"""A stock guest in the cache, and the JSON beside its files that says what it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kvmpy.guests.apt import sha256_of

MANIFEST = "guest.json"
FORMAT = 1
MAX_MANIFEST = 1 << 20


@dataclass(frozen=True, slots=True)
class Origin:
    """A package that a guest is made of: where it came from and its licence (SPDX).

    `verified` is whether a signed index vouched for it; a file given by hand has nobody to vouch.
    `copyright` names the file beside the guest that holds the package's own copyright statement, "" if none.
    """

    package: str
    version: str
    architecture: str
    licence: str
    sha256: str
    came_from: str
    verified: bool
    copyright: str = ""


@dataclass(frozen=True, slots=True)
class Guest:
    """A guest that is ready to run: files by role, kernel command line, where they came from.

    Roles: "kernel", "initrd", "initrd-modules", "bios", "floppy", "program" and what a guest has besides.
    """

    name: str
    version: str
    directory: Path
    files: Mapping[str, Path]
    cmdline: str = ""
    recipe: str = ""
    packages: tuple[Origin, ...] = field(default=())

    @property
    def kernel(self) -> Path:
        """The kernel image. Errors (as the other roles): LookupError if the guest has none."""
        return self.file("kernel")

    @property
    def initrd(self) -> Path:
        """An initramfs with busybox and kvmpy's init (see kvmpy.guests.init)."""
        return self.file("initrd")

    @property
    def initrd_modules(self) -> Path:
        """The same with the kernel's virtio and file system modules."""
        return self.file("initrd-modules")

    @property
    def bios(self) -> Path:
        """A firmware image for the reset vector."""
        return self.file("bios")

    @property
    def floppy(self) -> Path:
        """A bootable floppy image."""
        return self.file("floppy")

    def file(self, role: str) -> Path:
        """The file of a role. Errors: LookupError naming the roles there are."""
        try:
            return self.files[role]
        except KeyError:
            raise LookupError(f"guest {self.name} has no {role}; it has {', '.join(self.files)}") from None

    def save(self) -> None:
        """Write the manifest beside the files."""
        content = {
            "format": FORMAT,
            "name": self.name,
            "version": self.version,
            "recipe": self.recipe,
            "cmdline": self.cmdline,
            "files": {
                role: {"path": path.name, "size": path.stat().st_size, "sha256": sha256_of(path)}
                for role, path in self.files.items()
            },
            "packages": [asdict(origin) for origin in self.packages],
        }
        (self.directory / MANIFEST).write_text(json.dumps(content, indent=2) + "\n")


def load(directory: Path) -> Guest | None:
    """Read a guest back; None when it is absent, incomplete, damaged or of another format.

    Sizes are compared, hashes are not (that is what `verify()` does).
    """
    try:
        text = (directory / MANIFEST).read_bytes()
        if len(text) > MAX_MANIFEST:
            return None
        content = json.loads(text)
        if content["format"] != FORMAT:
            return None
        files = {
            _text(role): _present(directory, _text(entry["path"]), int(entry["size"]))
            for role, entry in content["files"].items()
        }
        return Guest(
            name=_text(content["name"]),
            version=_text(content["version"]),
            directory=directory,
            files=files,
            cmdline=_text(content["cmdline"]),
            recipe=_text(content["recipe"]),
            packages=tuple(Origin(**entry) for entry in content["packages"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def verify(guest: Guest) -> list[str]:
    """Compare every file of a guest with the hash in its manifest; the names of those that differ."""
    content = json.loads((guest.directory / MANIFEST).read_bytes())
    return [role for role, path in guest.files.items() if sha256_of(path) != content["files"][role]["sha256"]]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _present(directory: Path, name: str, size: int) -> Path:
    path = directory / name
    if path.name != name or path.stat().st_size != size:
        raise ValueError(f"{name!r} is not the file that was recorded")
    return path
