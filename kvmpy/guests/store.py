# SPDX-License-Identifier: Apache-2.0
"""The cache of stock guests: find them, get them, remove them.

    $KVMPY_CACHE, else $XDG_CACHE_HOME/kvmpy, else ~/.cache/kvmpy
        guests/NAME/VERSION-RECIPE/     a guest's files and guest.json
        guests/NAME/current             a link to the newest, replaced in one step
        packages/                       the packages as they came
        apt/SUITES/                     apt's private state
        lock                            held by whoever changes something

A guest becomes visible by renaming: a reader sees the old one, the new one or none, never half of one.
"""

from __future__ import annotations

import dataclasses
import fcntl
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from kvmpy.guests import guest as guests
from kvmpy.guests import sources
from kvmpy.guests.apt import Apt, Package, Progress, sha256_of
from kvmpy.guests.deb import Deb
from kvmpy.guests.errors import GuestUnavailableError, PackageError
from kvmpy.guests.guest import Guest, Origin
from kvmpy.guests.recipes import RECIPES, Ingredient, Recipe

log = logging.getLogger("kvmpy.guests")


def cache_directory() -> Path:
    """Where guests are kept; it need not exist.

    Errors: GuestUnavailableError when there is no home directory.
    """
    if path := os.environ.get("KVMPY_CACHE"):
        return Path(path).absolute()
    # The XDG base directory specification says to ignore a relative path.
    if (path := os.environ.get("XDG_CACHE_HOME", "")).startswith("/"):
        return Path(path, "kvmpy")
    try:
        return Path.home() / ".cache" / "kvmpy"
    except RuntimeError as error:
        raise GuestUnavailableError("there is no home directory; set KVMPY_CACHE to a directory") from error


def find(name: str) -> Guest | None:
    """Find a guest in the cache; never opens the network.

    Returns: the guest, or None when it is not there, or only as another version of kvmpy makes it.
    Errors: ValueError for a name that is no stock guest.
    """
    recipe = _recipe(name)
    home = cache_directory() / "guests" / name
    # Not only the current one: another version of kvmpy may share this cache.
    for directory in [(home / "current").resolve(), *sorted(home.glob(f"*-{recipe.identity}"), reverse=True)]:
        guest = guests.load(directory)
        if guest is not None and guest.recipe == recipe.identity:
            return guest
    return None


def get(
    name: str,
    *,
    debs: Sequence[str | os.PathLike[str]] = (),
    update: bool = False,
    mirror: str | None = None,
    progress: Progress | None = None,
) -> Guest:
    """Get a guest: from the cache, else from Debian's archive by the host's apt, without root.

    Arguments: name, one of `NAMES`; debs, package files given by hand, which are taken as they are; update,
    look for a newer version though one is cached; mirror, base URI of a Debian archive in place of the
    host's; progress, called with a line of text for what takes time.
    Returns: the guest. Errors: ValueError for an unknown name; GuestUnavailableError that says what is
    lacking and how to supply it; PackageError for a bad package; OSError when the disk is full.
    """
    recipe = _recipe(name)
    if not debs and not update and (found := find(name)) is not None:
        return found
    tell = progress or log.info
    cache = cache_directory()
    with _locked(cache, tell):
        if not debs and not update and (found := find(name)) is not None:
            return found  # another process got it meanwhile
        return _Kitchen(cache, recipe, mirror, update, tell).make([Deb(path) for path in debs])


def remove(name: str) -> bool:
    """Remove a guest (every version) and its packages from the cache; whether there was one."""
    _recipe(name)
    cache = cache_directory()
    directory = cache / "guests" / name
    if not directory.is_dir():
        return False
    with _locked(cache, log.info):
        guest = guests.load((directory / "current").resolve())
        for origin in guest.packages if guest else ():
            for path in (cache / "packages").glob(f"{origin.package}_*.deb"):
                path.unlink(missing_ok=True)
        shutil.rmtree(directory)
    return True


def _recipe(name: str) -> Recipe:
    try:
        return RECIPES[name]
    except KeyError:
        raise ValueError(f"there is no stock guest {name!r}; there are {', '.join(RECIPES)}") from None


@contextmanager
def _locked(cache: Path, tell: Progress) -> Iterator[None]:
    """Hold the cache alone. The kernel drops the lock with the process, so it cannot be left behind."""
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (cache / "lock").open("a")
    except OSError as error:
        raise GuestUnavailableError(
            f"the cache {cache} cannot be written: {error.strerror}; set KVMPY_CACHE to a directory that can"
        ) from error
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell("waiting for another kvmpy that is getting a guest")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


class _Kitchen:
    """Makes one guest; works under the lock."""

    def __init__(self, cache: Path, recipe: Recipe, mirror: str | None, update: bool, tell: Progress) -> None:
        self._recipe = recipe
        self._update = update
        self._tell = tell
        self._cache = cache
        self._packages = cache / "packages"
        self._home = cache / "guests" / recipe.name
        self._mirror = mirror
        self._apts: dict[tuple[str, ...], Apt] = {}

    def make(self, given: list[Deb]) -> Guest:
        self._packages.mkdir(exist_ok=True)
        self._home.mkdir(parents=True, exist_ok=True)
        for left_over in self._home.glob(".new-*"):  # of a process that was killed
            shutil.rmtree(left_over)
        chosen = self._choose(given)
        main, _ = chosen[self._recipe.ingredients[0].key]
        final = self._home / f"{_file_name(main.version)}-{self._recipe.identity}"
        before = (self._home / "current").resolve()
        work = Path(tempfile.mkdtemp(dir=self._home, prefix=".new-"))
        try:
            self._build(chosen, main.version, work)
            work.chmod(0o755)
            if final.exists():
                shutil.rmtree(final)
            work.rename(final)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        link = self._home / ".new-link"
        link.unlink(missing_ok=True)
        link.symlink_to(final.name)
        link.replace(self._home / "current")
        for old in self._home.iterdir():
            # The one before stays: a machine may be about to read it.
            if old.is_dir() and not old.is_symlink() and old not in (final, before):
                shutil.rmtree(old)
        made = guests.load(final)
        if made is None:
            raise GuestUnavailableError(f"{final} was written, yet cannot be read back")
        return made

    # -- packages ------------------------------------------------------------------------------------

    def _choose(self, given: list[Deb]) -> dict[str, tuple[Deb, Origin]]:
        """A package for every ingredient: given by hand, kept from last time, or downloaded."""
        chosen: dict[str, tuple[Deb, Origin]] = {}
        unused = list(given)
        for ingredient in self._recipe.ingredients:
            deb = next((deb for deb in unused if ingredient.fits(deb.name)), None)
            if deb is not None:
                unused.remove(deb)
                origin = self._origin(ingredient, deb, f"the file {deb.path.name}", verified=False)
                chosen[ingredient.key] = deb, origin
        if unused:
            wanted = ", ".join(ingredient.pattern for ingredient in self._recipe.ingredients)
            raise PackageError(
                f"{unused[0].path}: package {unused[0].name} is not part of {self._recipe.name}, "
                f"which is made of {wanted}"
            )
        for ingredient in self._recipe.ingredients:
            if ingredient.key not in chosen:
                try:
                    chosen[ingredient.key] = self._kept(ingredient) or self._fetch(ingredient)
                except GuestUnavailableError as error:
                    raise GuestUnavailableError(self._lack(ingredient, str(error))) from error
        return chosen

    def _kept(self, ingredient: Ingredient) -> tuple[Deb, Origin] | None:
        """What the guest in the cache was made of: after an upgrade of kvmpy no network is needed."""
        before = None if self._update else guests.load((self._home / "current").resolve())
        for origin in before.packages if before else ():
            if origin.verified and ingredient.fits(origin.package):
                for path in self._packages.glob(f"{origin.package}_*.deb"):
                    if sha256_of(path) == origin.sha256:
                        return Deb(path), dataclasses.replace(origin, licence=ingredient.licence)
        return None

    def _fetch(self, ingredient: Ingredient) -> tuple[Deb, Origin]:
        apt = self._apt(ingredient.suites)
        package = self._resolve(apt, ingredient)
        path = self._packages / package.file_name
        if not path.is_file() or path.stat().st_size != package.size or sha256_of(path) != package.sha256:
            path = apt.download(package, self._packages)
        deb = Deb(path)
        if (deb.name, deb.version) != (package.name, package.version):
            raise PackageError(f"{path.name} holds {deb.name} {deb.version}")
        came_from = f"{apt.archive.mirror} {' '.join(apt.suites)}"
        return deb, self._origin(ingredient, deb, came_from, verified=True)

    def _resolve(self, apt: Apt, ingredient: Ingredient) -> Package:
        package = apt.show(ingredient.ask)
        if package is not None and ingredient.fits(package.name):
            return package
        # A metapackage: "linux-image-6.1.0-37-cloud-amd64 (= 6.1.140-1), ..."
        for clause in re.split(r"[,|]", package.depends if package else ""):
            name = clause.strip().partition(" ")[0].partition(":")[0]
            if ingredient.fits(name) and (real := apt.show(name)) is not None:
                return real
        offered = f"it is {package.version}, needs {package.depends}" if package else "it is not there"
        raise GuestUnavailableError(
            f"{' '.join(apt.suites)} at {apt.archive.mirror} offers no package {ingredient.pattern} "
            f"under the name {ingredient.ask} ({offered})"
        )

    def _apt(self, suites: tuple[str, ...]) -> Apt:
        if suites not in self._apts:
            archive = sources.find(self._mirror)
            apt = self._apts[suites] = Apt(self._cache / "apt" / suites[0], suites, archive, self._tell)
            if self._update:
                apt.update(fresh_seconds=0)
        return self._apts[suites]

    def _lack(self, ingredient: Ingredient, why: str) -> str:
        name = self._recipe.name
        options = " ".join(f"--deb {other.ask}.deb" for other in self._recipe.ingredients)
        return (
            f"guest {name} lacks the package {ingredient.ask}: {why}\n"
            f"On a host that reaches a Debian mirror, give its address:\n"
            f"    kvmpy guest get {name} --mirror http://deb.debian.org/debian\n"
            f"Or download the packages elsewhere (https://packages.debian.org/{ingredient.suites[0]}/"
            f"{ingredient.ask}; of a metapackage, the package it depends on) and give the files:\n"
            f"    kvmpy guest get {name} {options}"
        )

    @staticmethod
    def _origin(ingredient: Ingredient, deb: Deb, came_from: str, *, verified: bool) -> Origin:
        return Origin(
            package=deb.name,
            version=deb.version,
            architecture=deb.control.get("architecture", ""),
            licence=ingredient.licence,
            sha256=sha256_of(deb.path),
            came_from=came_from,
            verified=verified,
        )

    # -- files ---------------------------------------------------------------------------------------

    def _taker(self, notice: str) -> Callable[[str], bool]:
        return lambda path: path == notice or self._recipe.take(path)

    def _build(self, chosen: Mapping[str, tuple[Deb, Origin]], version: str, out: Path) -> None:
        with tempfile.TemporaryDirectory(dir=self._home, prefix=".new-") as scratch:
            unpacked: dict[str, Path] = {}
            origins: list[Origin] = []
            for key, (deb, origin) in chosen.items():
                self._tell(f"unpacking {deb.name} {deb.version}")
                tree = unpacked[key] = Path(scratch, key)
                tree.mkdir()
                notice = f"usr/share/doc/{deb.name}/copyright"
                deb.unpack(tree, self._taker(notice))
                if (tree / notice).is_file():
                    shutil.copyfile(tree / notice, out / f"copyright.{key}")
                    origin = dataclasses.replace(origin, copyright=f"copyright.{key}")
                origins.append(origin)
            self._tell(f"building {self._recipe.name}")
            files = self._recipe.build(unpacked, out)
        Guest(
            name=self._recipe.name,
            version=version,
            directory=out,
            files=files,
            cmdline=self._recipe.cmdline,
            recipe=self._recipe.identity,
            packages=tuple(origins),
        ).save()


def _file_name(version: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+~-]", "_", version)[:80].lstrip(".") or "unknown"
