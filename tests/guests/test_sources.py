# SPDX-License-Identifier: Apache-2.0
"""Finding Debian's archive in a host's apt sources."""

import pytest

from kvmpy.guests import sources

DEB822 = """\
# a comment
Types: deb deb-src
URIs: http://mirror.example/debian/
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/some.gpg

Types: deb
URIs: http://security.example/debian-security
Suites: bookworm-security
Components: main
"""


@pytest.fixture
def etc(tmp_path):
    (tmp_path / "sources.list.d").mkdir()
    return tmp_path


def test_find_deb822(etc):
    (etc / "sources.list.d/debian.sources").write_text(DEB822)
    found = sources.find(etc=etc)
    assert found.mirror == "http://mirror.example/debian"
    assert found.security == "http://security.example/debian-security"
    assert found.signed_by == "/usr/share/keyrings/some.gpg"
    assert found.found_in.endswith("debian.sources")


def test_find_one_line(etc):
    (etc / "sources.list").write_text(
        "# deb http://old.example/debian bookworm main\n"
        "deb-src http://src.example/debian bookworm main\n"
        "deb cdrom:[Debian]/ bookworm main\n"
        "deb [arch=amd64 signed-by=/k.gpg trusted=yes] https://mirror.example/debian trixie main # x\n"
        "deb http://sec.example/debian-security trixie-security main\n"
    )
    found = sources.find(etc=etc)
    assert (found.mirror, found.signed_by) == ("https://mirror.example/debian", "/k.gpg")
    assert found.security == "http://sec.example/debian-security"
    assert "rusted" not in found.sources(("bookworm",))


@pytest.mark.parametrize(
    "text",
    [
        "Types: deb\nURIs: http://x.example/ubuntu\nSuites: noble\nComponents: main\n",
        "Types: deb\nURIs: http://x.example/repo\nSuites: bookworm\nComponents: contrib\n",
        "Types: deb-src\nURIs: http://x.example/debian\nSuites: bookworm\nComponents: main\n",
        "Enabled: no\nTypes: deb\nURIs: http://x.example/debian\nSuites: bookworm\nComponents: main\n",
        "garbage\n: :\n\n\n",
        "",
    ],
)
def test_find_nothing_of_debian_gives_debians_own_servers(etc, text):
    (etc / "sources.list.d/other.sources").write_text(text)
    assert sources.find(etc=etc).mirror == sources.DEFAULT_MIRROR


def test_find_given_mirror_wins(etc):
    (etc / "sources.list.d/debian.sources").write_text(DEB822)
    assert sources.find("http://given.example/debian/", etc).mirror == "http://given.example/debian"


def test_sources_put_security_suites_on_the_security_server():
    archive = sources.Archive("http://m.example/debian", "http://s.example/sec", "/k.gpg", "test")
    text = archive.sources(("bookworm", "bookworm-updates", "bookworm-security"))
    first, second = text.strip().split("\n\n")
    assert "URIs: http://m.example/debian\nSuites: bookworm bookworm-updates\n" in first
    assert "URIs: http://s.example/sec\nSuites: bookworm-security\n" in second
    assert first.count("Signed-By: /k.gpg") == second.count("Signed-By: /k.gpg") == 1


def test_sources_write_an_inline_key_as_continuation_lines():
    archive = sources.Archive("http://m.example", "http://s.example", "\n-----BEGIN\n\nabc\n-----END", "test")
    text = archive.sources(("bookworm",))
    assert "Signed-By: \n -----BEGIN\n .\n abc\n -----END\n" in text
