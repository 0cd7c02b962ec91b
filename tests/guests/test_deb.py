# SPDX-License-Identifier: Apache-2.0
"""Unpacking packages: what is right, and what a hostile one could try."""

import lzma
import os
import shutil
import subprocess
import tarfile

import pytest
from handmade import ar, file, gzip, link, special, tar

from kvmpy.guests import PackageError
from kvmpy.guests import archive as archives
from kvmpy.guests.deb import MAX_TAR_HEADER, Deb, paragraphs


def tree(root):
    return sorted(
        str(path.relative_to(root)) for path in root.rglob("*") if path.is_symlink() or path.is_file()
    )


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_unpack_gives_files_modes_and_links(make_deb, out, suffix):
    members = [
        file("./usr/bin/tool", b"#!/bin/sh\n", 0o4755),
        file("./usr/share/data", b"x" * 3_000_000),
        link("./usr/bin/alias", "tool"),
        link("./usr/share/far", "/usr/bin/tool"),
        link("./usr/bin/same", "./usr/bin/tool", tarfile.LNKTYPE),
    ]
    deb = Deb(make_deb(members, suffix=suffix))
    assert (deb.name, deb.version) == ("thing", "1.0-1")
    written = deb.unpack(out)
    assert sorted(written) == tree(out) == [
        "usr/bin/alias", "usr/bin/same", "usr/bin/tool", "usr/share/data", "usr/share/far",
    ]  # fmt: skip
    assert (out / "usr/bin/alias").read_bytes() == b"#!/bin/sh\n"
    assert (out / "usr/share/far").resolve() == (out / "usr/bin/tool").resolve()
    assert (out / "usr/bin/same").read_bytes() == b"#!/bin/sh\n"
    assert (out / "usr/bin/tool").stat().st_mode & 0o7777 == 0o755  # no set-uid bit
    assert (out / "usr/share/data").stat().st_mode & 0o7777 == 0o644
    assert (out / "usr/share/data").read_bytes() == b"x" * 3_000_000


def test_unpack_zstd_needs_python_314_or_the_program(make_deb, out):
    program = shutil.which("zstd")
    if program is None:
        pytest.skip("no zstd program to pack with")
    raw = tar([file("a", b"zstd")])
    packed = subprocess.run([program, "-q", "-c"], input=raw, capture_output=True, check=True).stdout
    path = make_deb([])
    content = ar([("debian-binary", b"2.0\n"), ("control.tar.gz", control()), ("data.tar.zst", packed)])
    path.write_bytes(content)
    assert Deb(path).unpack(out) == ["a"]
    path.write_bytes(content.replace(packed, packed[:-5] + b"\0" * 5))
    shutil.rmtree(out)
    out.mkdir()
    with pytest.raises(PackageError):
        Deb(path).unpack(out)


def control():
    return gzip(tar([file("./control", b"Package: thing\nVersion: 1\n")]))


def test_unpack_wanted_takes_only_what_is_asked_for(make_deb, out):
    path = make_deb([file("boot/vmlinuz", b"k"), file("usr/doc", b"d"), special("dev/sda", tarfile.BLKTYPE)])
    assert Deb(path).unpack(out, lambda name: name.startswith("boot/")) == ["boot/vmlinuz"]
    assert tree(out) == ["boot/vmlinuz"]


@pytest.mark.parametrize(
    "members",
    [
        [file("../evil", b"x")],
        [file("a/../../evil", b"x")],
        [file("/evil", b"x")],
        [file(".//../evil", b"x")],
        [link("out", ".."), file("out/evil", b"x")],
        [link("out", "/"), file("out/evil", b"x")],
        [link("etc", "../../../etc")],
        [link("a", "b/../.."), file("b/x", b"")],
        [link("d/up", ".."), link("x", "d/up/..")],
        [link("x", "y"), link("y", "x")],
        [link("hard", "/etc/passwd", tarfile.LNKTYPE)],
        [link("hard", "../../../../etc/passwd", tarfile.LNKTYPE)],
        [link("soft", "/etc/passwd"), link("hard", "soft", tarfile.LNKTYPE)],
        [file("a", b"1"), file("a", b"2")],
        [link("a", "b"), file("a", b"2")],
        [file("a", b"1"), file("a/b", b"2")],
        [special("null", tarfile.CHRTYPE)],
        [special("fifo", tarfile.FIFOTYPE)],
        [file("n" * 300, b"x")],
        [file("d/" * 2000 + "x", b"x")],
    ],
    ids=lambda members: " ".join(
        f"{info.name[:20]}{'->' * bool(info.linkname)}{info.linkname}" for info, _ in members
    ),
)
def test_unpack_hostile_member_is_refused_and_nothing_leaves(make_deb, tmp_path, out, members):
    before = {path for path in tmp_path.parent.rglob("*") if not path.is_relative_to(out)}
    path = make_deb(members)
    with pytest.raises(PackageError):
        Deb(path).unpack(out)
    after = {path for path in tmp_path.parent.rglob("*") if not path.is_relative_to(out)}
    assert after - before == {path}
    for leftover in out.rglob("*"):
        assert leftover.resolve().is_relative_to(out.resolve())


def test_unpack_existing_file_in_the_directory_is_not_overwritten(make_deb, out):
    (out / "a").write_bytes(b"mine")
    with pytest.raises(PackageError, match="two members"):
        Deb(make_deb([file("a", b"theirs")])).unpack(out)
    assert (out / "a").read_bytes() == b"mine"


def test_unpack_bomb_is_stopped(make_deb, out):
    path = make_deb([file("zeros", bytes(50 << 20))])
    assert path.stat().st_size < 100_000
    with pytest.raises(PackageError, match="unpacks to more than"):
        Deb(path, limit=10 << 20).unpack(out)


def test_unpack_huge_long_name_header_is_refused(make_deb, out):
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, MAX_TAR_HEADER + 1
    path = make_deb([], suffix=".xz", data=lzma.compress(info.tobuf() + bytes(1 << 20)))
    with pytest.raises(PackageError, match="extended header"):
        Deb(path).unpack(out)


def test_unpack_xz_dictionary_is_bounded(make_deb, out, monkeypatch):
    monkeypatch.setattr(archives, "CODEC_MEMORY", 1 << 20)
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 64 << 20}]
    packed = lzma.compress(tar([file("a", b"x")]), filters=filters)
    with pytest.raises(PackageError, match=r"(?i)memory"):
        Deb(make_deb([], data=packed)).unpack(out)


@pytest.mark.parametrize("cut", [1, 100, 2000])
def test_unpack_truncated_data_is_an_error(make_deb, out, cut):
    packed = lzma.compress(tar([file("a", os.urandom(10_000))]))
    with pytest.raises(PackageError):
        Deb(make_deb([], data=packed[:-cut])).unpack(out)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"!<arch>\n",
        b"#!/bin/sh\n",
        b"!<arch>\nshort",
        ar([("something", b"2.0\n")]),
        ar([("debian-binary", b"3.0\n"), ("control.tar.gz", control()), ("data.tar", tar([]))]),
        ar([("debian-binary", b"2.0\n"), ("data.tar", tar([]))]),
        ar([("debian-binary", b"2.0\n"), ("control.tar.gz", gzip(tar([])))]),
        ar(
            [
                ("debian-binary", b"2.0\n"),
                ("control.tar.gz", gzip(tar([file("control", b"Nothing: here\n")]))),
            ]
        ),
        ar([("debian-binary", b"2.0\n"), ("control.tar.gz", b"not gzip")]),
        ar([("debian-binary", b"2.0\n"), ("control.tar.lzma", b"")]),
        ar([("debian-binary", b"2.0\n"), ("debian-binary", b"2.0\n")]),
        ar([("debian-binary", b"2.0\n")])[:-2].replace(b"4         `", b"9999999999`"),
        ar([("debian-binary", b"2.0\n")]).replace(b"4         `", b"-4        `"),
    ],
)
def test_open_damaged_package_is_an_error(tmp_path, content):
    path = tmp_path / "bad.deb"
    path.write_bytes(content)
    with pytest.raises(PackageError, match=r"bad\.deb"):
        Deb(path)


def test_open_what_is_no_file_is_an_error(tmp_path):
    with pytest.raises(PackageError, match="No such file"):
        Deb(tmp_path / "absent.deb")
    with pytest.raises(PackageError):
        Deb(tmp_path)


def test_unpack_without_data_member_is_an_error(tmp_path, out):
    path = tmp_path / "bad.deb"
    path.write_bytes(ar([("debian-binary", b"2.0\n"), ("control.tar.gz", control())]))
    with pytest.raises(PackageError, match=r"no data\.tar"):
        Deb(path).unpack(out)


def test_unpack_equals_dpkg(make_deb, tmp_path, out):
    if shutil.which("dpkg-deb") is None:
        pytest.skip("no dpkg-deb to compare with")
    path = make_deb([file("./a/b", b"1"), link("./a/c", "b"), file("./" + "long/" * 30 + "name", b"2")])
    Deb(path).unpack(out)
    other = tmp_path / "dpkg"
    subprocess.run(["dpkg-deb", "-x", path, other], check=True)
    assert tree(out) == tree(other)


def test_paragraphs_split_fields_and_continuations():
    text = "A: 1\nB: 2\n more\n\n# comment\n\nC:\n x\n y\n"
    assert list(paragraphs(text)) == [{"a": "1", "b": "2\nmore"}, {"c": "\nx\ny"}]
