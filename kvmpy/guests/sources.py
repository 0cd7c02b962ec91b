# SPDX-License-Identifier: Apache-2.0
"""Where Debian's archive is for this host: read from the host's own apt sources (sources.list(5)).

The host's administrator already chose a mirror and the keys to trust, so those are used; only the suites
are ours. Options that would weaken the check of signatures (`trusted=yes`, `allow-insecure=yes`) are not
taken over.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvmpy.guests.deb import paragraphs

DEFAULT_MIRROR = "http://deb.debian.org/debian"
DEFAULT_SECURITY = "http://deb.debian.org/debian-security"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
ETC = Path("/etc/apt")

_NAMES = "buster|bullseye|bookworm|trixie|forky|sid|unstable|testing|stable|oldstable|oldoldstable"
_SUITE = re.compile(rf"(?:{_NAMES})(?P<pocket>-updates|-security|/updates|-backports|-proposed-updates)?/?")


@dataclass(frozen=True, slots=True)
class Archive:
    """Debian's archive: base URIs of the main and the security part, and what must have signed them.

    `signed_by` is the value of apt's Signed-By field, "" for apt's own trusted keys.
    """

    mirror: str
    security: str
    signed_by: str
    found_in: str

    def sources(self, suites: tuple[str, ...]) -> str:
        """The deb822 text of an apt source with just these suites, component main, amd64."""
        text = ""
        for uri, names in (
            (self.mirror, [suite for suite in suites if not suite.endswith("-security")]),
            (self.security, [suite for suite in suites if suite.endswith("-security")]),
        ):
            if names:
                text += f"Types: deb\nURIs: {uri}\nSuites: {' '.join(names)}\nComponents: main\n"
                text += "Architectures: amd64\n"
                if self.signed_by:
                    # An inline key has continuation lines; an empty line of it is written as a dot.
                    first, *rest = self.signed_by.split("\n")
                    text += "\n ".join([f"Signed-By: {first}", *(line or "." for line in rest)]) + "\n"
                text += "\n"
        return text


def find(mirror: str | None = None, etc: Path = ETC) -> Archive:
    """Find Debian's archive.

    Arguments: mirror, an archive's base URI to use instead of the host's; etc, apt's configuration directory.
    Returns: what the host's sources say, else Debian's own servers. Opens no network.
    """
    keyring = str(KEYRING) if KEYRING.is_file() else ""
    main: tuple[str, str, str] | None = None
    security: str | None = None
    for where, uri, suite, components, signed_by in _entries(etc):
        match = _SUITE.fullmatch(suite)
        if match is None or "main" not in components or uri.startswith("cdrom:"):
            continue
        if match["pocket"] in ("-security", "/updates"):
            security = security or uri
        elif main is None:
            main = (uri, signed_by, where)
    if mirror is not None:
        return Archive(mirror.rstrip("/"), security or DEFAULT_SECURITY, keyring, "the given mirror")
    if main is None:
        return Archive(DEFAULT_MIRROR, DEFAULT_SECURITY, keyring, "Debian's own servers")
    uri, signed_by, where = main
    return Archive(uri.rstrip("/"), (security or DEFAULT_SECURITY).rstrip("/"), signed_by or keyring, where)


def _entries(etc: Path) -> Iterator[tuple[str, str, str, list[str], str]]:
    """(file, URI, suite, components, Signed-By) of every enabled binary source."""
    parts = etc / "sources.list.d"
    for path in [*sorted(parts.glob("*.sources")), etc / "sources.list", *sorted(parts.glob("*.list"))]:
        try:
            text = path.read_text("utf-8", "replace")
        except OSError:  # absent, or private to root: then it cannot be a source for this user
            continue
        yield from (_deb822 if path.suffix == ".sources" else _one_line)(str(path), text)


def _deb822(where: str, text: str) -> Iterator[tuple[str, str, str, list[str], str]]:
    for fields in paragraphs(text):
        enabled = fields.get("enabled", "yes").lower() not in ("no", "false")
        if not enabled or "deb" not in fields.get("types", "").split():
            continue
        for uri in fields.get("uris", "").split():
            for suite in fields.get("suites", "").split():
                yield where, uri, suite, fields.get("components", "").split(), fields.get("signed-by", "")


def _one_line(where: str, text: str) -> Iterator[tuple[str, str, str, list[str], str]]:
    for line in text.splitlines():
        match = re.fullmatch(r"deb\s+(?:\[(?P<options>[^]]*)\]\s+)?(?P<rest>[^#]*)(?:#.*)?", line.strip())
        if match is None:
            continue
        words = match["rest"].split()
        options = dict(item.split("=", 1) for item in (match["options"] or "").split() if "=" in item)
        if len(words) >= 2:
            yield where, words[0], words[1], words[2:], options.get("signed-by", "").replace(",", " ")
