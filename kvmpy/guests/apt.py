# SPDX-License-Identifier: Apache-2.0
"""The host's apt, used as an ordinary user with a state of its own.

apt does what must not be written twice: it fetches through the host's proxies and mirrors, and checks the
archive's signature, the index's hash and the package's hash. It never sees the system's package database:
state, cache, sources and preferences are private, so nothing is installed and no root is needed
(apt.conf(5)). The hash of what arrives is
compared once more here.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvmpy.guests import sources
from kvmpy.guests.deb import paragraphs
from kvmpy.guests.errors import GuestUnavailableError, PackageError

Progress = Callable[[str], None]

FRESH_SECONDS = 900
UPDATE_SECONDS = 300
DOWNLOAD_SECONDS = 1800
QUERY_SECONDS = 60

# Anything the host's configuration would run or relax is switched off; its proxies and time-outs stay.
CONFIGURATION = """\
#clear APT::Update;
#clear DPkg::Post-Invoke;
#clear DPkg::Pre-Install-Pkgs;
#clear Acquire::IndexTargets::deb-src;
#clear Dir::Etc::trusted-extra;
Dir::State "{state}";
Dir::State::status "/dev/null";
Dir::Cache "{cache}";
Dir::Cache::pkgcache "pkgcache.bin";
Dir::Cache::srcpkgcache "";
Dir::Etc::sourcelist "{sources}";
Dir::Etc::sourceparts "{empty}";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "{empty}";
Dir::Log "{state}";
APT::Architecture "amd64";
APT::Architectures {{ "amd64"; }};
APT::Get::AllowUnauthenticated "false";
APT::Get::List-Cleanup "true";
APT::Sandbox::User "";
Acquire::AllowInsecureRepositories "false";
Acquire::AllowWeakRepositories "false";
Acquire::AllowDowngradeToInsecureRepositories "false";
Acquire::Languages "none";
Acquire::Retries "2";
Acquire::http::Timeout "30";
Acquire::https::Timeout "30";
"""


@dataclass(frozen=True, slots=True)
class Package:
    """A package of the archive as its signed index describes it; `size` in bytes."""

    name: str
    version: str
    architecture: str
    source: str
    depends: str
    sha256: str
    size: int

    @property
    def file_name(self) -> str:
        return f"{self.name}_{self.version.replace(':', '%3a')}_{self.architecture}.deb"


class Apt:
    """A private view of Debian's archive: some suites, a state directory.

    Arguments: directory, where state lives (made if absent); suites, e.g. ("bookworm", "bookworm-updates");
    archive, as `sources.find()` gives; progress, told of what takes time.
    Errors: GuestUnavailableError when there is no apt. Source: apt-get(8), apt-cache(8), apt.conf(5).
    """

    def __init__(
        self, directory: Path, suites: tuple[str, ...], archive: sources.Archive, progress: Progress
    ) -> None:
        self.suites = suites
        self.archive = archive
        self._progress = progress
        get, cache = shutil.which("apt-get"), shutil.which("apt-cache")
        if get is None or cache is None:
            raise GuestUnavailableError("there is no apt (apt-get and apt-cache) on this host")
        self._get, self._cache = get, cache
        self._directory = directory.absolute()
        self._configuration = self._configure(self._directory)
        self._current = False

    def _configure(self, directory: Path) -> Path:
        if re.search(r'["\\\n;{}]', str(directory)):
            raise GuestUnavailableError(f"apt cannot work in a directory of this name: {directory}")
        for part in ("state/lists/partial", "cache/archives/partial", "empty"):
            (directory / part).mkdir(parents=True, exist_ok=True)
        listed = directory / "kvmpy.sources"
        listed.write_text(self.archive.sources(self.suites))
        configuration = directory / "apt.conf"
        places = {"state": directory / "state", "cache": directory / "cache", "empty": directory / "empty"}
        configuration.write_text(CONFIGURATION.format(sources=listed, **places))
        return configuration

    def update(self, fresh_seconds: float = FRESH_SECONDS) -> None:
        """Fetch and check the suites' indices.

        Arguments: fresh_seconds, how old they may be to be used as they are.
        Errors: GuestUnavailableError with apt's words.
        """
        stamp = self._directory / "updated"
        if self._current or _is_fresh(stamp, self.archive.sources(self.suites), fresh_seconds):
            self._current = True
            return
        stamp.unlink(missing_ok=True)
        self._progress(f"reading the package lists of {' '.join(self.suites)} from {self.archive.mirror}")
        done = self._run([self._get, "-q", "update"], UPDATE_SECONDS)
        # apt may end well although an index could not be fetched; then what is there is old or nothing.
        complaints = [line for line in done.stderr.splitlines() if line.startswith(("E:", "W:", "Err:"))]
        failed = [line for line in complaints if "Failed to fetch" in line or line.startswith("E:")]
        if done.returncode != 0 or failed:
            raise GuestUnavailableError(
                f"the package lists of {' '.join(self.suites)} cannot be had from {self.archive.mirror} "
                f"(from {self.archive.found_in}):\n" + _indented(failed or complaints or [done.stdout])
            )
        stamp.write_text(self.archive.sources(self.suites))
        self._current = True

    def show(self, name: str) -> Package | None:
        """The package that these suites offer under a name, or None."""
        _check_name(name)
        self.update()
        done = self._run([self._cache, "show", "--no-all-versions", name], QUERY_SECONDS)
        fields = next(paragraphs(done.stdout), None)
        if done.returncode != 0 or fields is None:
            return None
        try:
            return Package(
                name=fields["package"],
                version=fields["version"],
                architecture=fields["architecture"],
                source=fields.get("source", fields["package"]),
                depends=fields.get("depends", ""),
                sha256=fields["sha256"],
                size=int(fields["size"]),
            )
        except (KeyError, ValueError) as error:
            raise PackageError(f"the index entry of {name} lacks {error}") from error

    def download(self, package: Package, directory: Path) -> Path:
        """Download a package into a directory and check it. Errors: GuestUnavailableError, PackageError."""
        self._progress(f"downloading {package.name} {package.version} ({package.size / 1e6:.1f} MB)")
        with tempfile.TemporaryDirectory(dir=directory, prefix=".download-") as work:
            command = [self._get, "-q", "download", f"{package.name}={package.version}"]
            done = self._run(command, DOWNLOAD_SECONDS, cwd=work)
            found = sorted(Path(work).glob("*.deb"))
            if done.returncode != 0 or len(found) != 1:
                raise GuestUnavailableError(
                    f"{package.name} {package.version} cannot be downloaded:\n"
                    + _indented(done.stderr.splitlines() or ["apt-get left no file and said nothing"])
                )
            check(found[0], package.sha256, package.size)
            target = directory / package.file_name
            found[0].chmod(0o644)
            found[0].replace(target)
            return target

    def _run(
        self, command: list[str], seconds: int, cwd: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
        try:
            return subprocess.run(
                [command[0], "-c", str(self._configuration), *command[1:]],
                stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
                timeout=seconds, env=environment, cwd=cwd, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise GuestUnavailableError(f"{' '.join(command)} did not end within {seconds} s") from error
        except OSError as error:
            raise GuestUnavailableError(f"{command[0]}: {error.strerror}") from error


def check(path: Path, sha256: str, size: int) -> None:
    """Compare a file with what the signed index says of it. Errors: PackageError."""
    actual = path.stat().st_size
    if actual != size:
        raise PackageError(f"{path.name}: {actual} bytes, the index says {size}")
    digest = sha256_of(path)
    if digest != sha256:
        raise PackageError(f"{path.name}: SHA-256 {digest}, the index says {sha256}")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        import hashlib  # libcrypto is large, and this is for downloads

        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_fresh(stamp: Path, content: str, seconds: float) -> bool:
    """Whether indices of the same sources were read lately; a clock that went back makes them old."""
    try:
        return stamp.read_text() == content and 0 <= time.time() - stamp.stat().st_mtime <= seconds
    except OSError:
        return False


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[a-z0-9][a-z0-9+.-]+", name):  # deb-control(5), Package
        raise ValueError(f"{name!r} is no package name")


def _indented(lines: list[str]) -> str:
    return "\n".join("    " + line for line in lines[:20])
